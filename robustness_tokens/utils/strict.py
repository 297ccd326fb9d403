"""Checks of values that came from a file; each raises `ValueError` with the name, what came and what was expected."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping


MAX_TEXT = 2000
MAX_NAME = 200
MAX_INT = 2**63 - 1


def check_keys(name: str, content: object, expected: set[str]) -> None:
    """Refuses anything but a mapping with exactly these keys."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} must be a dictionary, got {type(content).__name__}")
    missing, unknown = sorted(expected - content.keys()), sorted(map(str, content.keys() - expected))
    if missing or unknown:
        raise ValueError(
            f"{name} has missing keys {missing} and unknown keys {unknown}: it is damaged, or was not written by "
            "robustness_tokens"
        )


def check_choice(name: str, value: object, allowed: Collection[str]) -> None:
    """Refuses anything but one of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r:.200}")


def check_text(name: str, value: object, longest: int = MAX_TEXT) -> None:
    """Refuses anything but a text, and one that is too long."""
    if not isinstance(value, str) or len(value) > longest:
        raise ValueError(f"{name} must be a text of at most {longest} characters, got {value!r:.200}")


def check_int(name: str, value: object, lowest: int, highest: int) -> None:
    """Refuses anything but a whole number in the range."""
    if type(value) is not int or not lowest <= value <= highest:
        raise ValueError(f"{name} must be a whole number from {lowest} to {highest}, got {value!r:.200}")


def check_number(name: str, value: object, lowest: float, highest: float) -> None:
    """Refuses anything but a finite number in the range."""
    if not _is_finite_number(value) or not lowest <= value <= highest:  # type: ignore[operator]
        raise ValueError(f"{name} must be a finite number from {lowest:g} to {highest:g}, got {value!r:.200}")


def _is_finite_number(value: object) -> bool:
    if type(value) is int:
        return abs(value) <= MAX_INT  # a larger one is no float
    return isinstance(value, float) and math.isfinite(value)


def check_parameters(parameters: object, name: str = "attack_parameters") -> None:
    """Refuses anything but a mapping of names to plain values, or to lists of them."""
    if not isinstance(parameters, dict):
        raise ValueError(f"{name} must be a dictionary, got {type(parameters).__name__}")
    for key, value in parameters.items():
        check_text(f"the name of a value in {name}", key, MAX_NAME)
        for element in value if isinstance(value, list) else [value]:
            if not (element is None or isinstance(element, bool) or _is_finite_number(element)):
                check_text(f"{name}[{key!r}]", element, MAX_NAME)
