"""Checks of values that came from a file; each raises `ValueError` with the name, what came and what was expected."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from typing import Any


MAX_TEXT = 2000
MAX_NAME = 200
MAX_INT = 2**63 - 1


def check_keys(
    name: str, content: Any, expected: set[str], *, optional: Collection[str] = (), schema: int | None = None
) -> None:
    """Refuses anything but a mapping with these keys, and, first, a schema newer than `schema`."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{name} must be a dictionary, got {type(content).__name__}")
    if schema is not None:
        check_schema(name, content.get("schema_version"), schema)
    missing = sorted(expected - content.keys())
    unknown = sorted(map(str, content.keys() - expected - set(optional)))
    if missing or unknown:
        raise ValueError(
            f"{name} has missing keys {missing} and unknown keys {unknown}: it is damaged, or was not written by "
            "robustness_tokens"
        )


def check_schema(name: str, version: Any, newest: int) -> None:
    """Refuses a schema version that this package can't read."""
    check_int(f"{name}: schema_version", version, 1)
    if version > newest:
        raise ValueError(
            f"{name} has schema_version {version}, this package reads up to {newest}: "
            "pip install --upgrade robustness-tokens"
        )


def check_dict(name: str, value: Any) -> None:
    """Refuses anything but a dictionary."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} must be a dictionary, got {type(value).__name__}")


def check_list(name: str, value: Any) -> None:
    """Refuses anything but a list."""
    if not isinstance(value, list):
        raise ValueError(f"{name} must be a list, got {type(value).__name__}")


def check_bool(name: str, value: Any) -> None:
    """Refuses anything but true and false."""
    if type(value) is not bool:
        raise ValueError(f"{name} must be true or false, got {value!r:.200}")


def check_choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """Refuses anything but one of the allowed words."""
    if not isinstance(value, str) or value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r:.200}")


def check_text(name: str, value: Any, longest: int = MAX_TEXT) -> None:
    """Refuses anything but a text, and one that is too long."""
    if not isinstance(value, str) or len(value) > longest:
        raise ValueError(f"{name} must be a text of at most {longest} characters, got {value!r:.200}")


def check_pattern(name: str, value: Any, pattern: str, meaning: str) -> None:
    """Refuses anything but a text that the whole regular expression matches; `meaning` puts it into words."""
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise ValueError(f"{name} must be {meaning}, got {value!r:.200}")


def check_fingerprint(name: str, value: Any) -> None:
    """Refuses anything but sha256 digests by name."""
    check_dict(name, value)
    for key, digest in value.items():
        check_pattern(f"{name}[{key!r:.200}]", digest, r"[0-9a-f]{64}", "64 hexadecimal digits")


def check_int(name: str, value: Any, lowest: int, highest: int = MAX_INT) -> None:
    """Refuses anything but a whole number in the range."""
    if type(value) is not int or not lowest <= value <= highest:
        is_low = type(value) is not int or value < lowest
        expected = f"of at least {lowest}" if highest == MAX_INT and is_low else f"from {lowest} to {highest}"
        raise ValueError(f"{name} must be a whole number {expected}, got {value!r:.200}")


def check_number(name: str, value: Any, lowest: float = -math.inf, highest: float = math.inf) -> None:
    """Refuses anything but a finite number in the range."""
    if not _is_finite_number(value) or not lowest <= value <= highest:
        expected = f" of at least {lowest:g}" if lowest > -math.inf else ""
        if highest < math.inf:
            expected = f" from {lowest:g} to {highest:g}"
        raise ValueError(f"{name} must be a finite number{expected}, got {value!r:.200}")


def check_numbers(name: str, values: Any, lowest: float = -math.inf, highest: float = math.inf) -> None:
    """Refuses anything but a list of finite numbers in the range."""
    check_list(name, values)
    for index, value in enumerate(values):
        check_number(f"{name}[{index}]", value, lowest, highest)


def check_parameters(name: str, parameters: Any) -> None:
    """Refuses anything but a dictionary of plain values, or of lists of them."""
    check_dict(name, parameters)
    for key, value in parameters.items():
        check_text(f"the name of a value in {name}", key, MAX_NAME)
        for element in value if isinstance(value, list) else [value]:
            if not (element is None or isinstance(element, bool) or _is_finite_number(element)):
                check_text(f"{name}[{key!r}]", element, MAX_NAME)


def _is_finite_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) <= MAX_INT  # larger ones may not fit into a float
    return isinstance(value, float) and math.isfinite(value)
