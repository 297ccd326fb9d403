"""What the checks are made of: a number per measurement, when one number exceeds another, and how they are worded."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ...report import Check
from ...utils import MAX_TEXT
from ..cells import Cell
from ..measurements import Measurements
from ..metrics import IoUCounts, accuracy, mean_iou
from ..outcomes import Outcome


TOLERANCE = 0.005  # half a point, within which numbers are called the same
_ROUNDING = 9  # decimals, so that one image of 200 is half a point exactly

CheckFunction: TypeAlias = Callable[[Measurements], Check]
Finding: TypeAlias = tuple[bool | None, str]


class NotRunError(Exception):
    """A check lacks what it looks at; the message says what."""


def check(number: int, name: str, explanation: str) -> Callable[[Callable[[Measurements], Finding]], CheckFunction]:
    """Makes a check of a function that returns its verdict and what it found, in words.

    Args:
        number, name: Of the check.
        explanation: How it is judged, and what it means if it fails.

    Returns:
        A decorator. Where the function raises `NotRunError`, the check has no verdict and says why.
    """

    def decorate(function: Callable[[Measurements], Finding]) -> CheckFunction:
        @functools.wraps(function)
        def run(measurements: Measurements) -> Check:
            try:
                passed, value = function(measurements)
            except NotRunError as missing:
                passed, value = None, f"not run: {missing}"
            # However much was measured, a report must not fail for the length of a sentence.
            value = value if len(value) <= MAX_TEXT else f"{value[: MAX_TEXT - 4]} ..."
            return Check(number=number, name=name, passed=passed, value=value, explanation=explanation)

        return run

    return decorate


def verdict(*parts: bool | None) -> bool | None:
    """Fails if a part fails; passes if all were run and pass."""
    if False in parts:
        return False
    return None if None in parts else True


def main_metric(measurements: Measurements) -> str:
    """What is judged: accuracy, mIoU over the data set, or the cosine with the base's clean features."""
    return {"classification": "accuracy", "segmentation": "miou", "features": "cosine"}[measurements.model.task]


def score(outcome: Outcome, metric: str, tokens: str = "trained") -> float:
    """The average over the images.

    Args:
        outcome: Of n images.
        metric: `"accuracy"`, `"miou"` or `"cosine"`.
        tokens: Name of the tokens that were in the model.
    """
    if metric == "accuracy":
        return accuracy(outcome[f"{tokens}.correct"])
    if metric == "miou":
        return mean_iou(IoUCounts(outcome[f"{tokens}.intersections"], outcome[f"{tokens}.unions"]))
    return outcome[f"{tokens}.cosine"].double().mean().item()


def suite(measurements: Measurements, eps: float | None = None, **wanted: Any) -> list[tuple[Cell, Outcome]]:
    """The suite's cells with these values (see [`Measurements.select`]), and their outcomes.

    Raises:
        NotRunError: If there are none.
    """
    chosen = measurements.select(series="suite", **wanted, **({} if eps is None else {"eps": eps}))
    if not chosen:
        at = "" if eps is None else f" at eps {eps_in_words(eps)}"
        raise NotRunError(f"no attack with {', '.join(f'{key} {value!r}' for key, value in wanted.items())}{at}")
    return chosen


def diagnostic(measurements: Measurements, series: str) -> list[tuple[Cell, Outcome]]:
    """The cells of a series that only a check looks at, on the same images, and their outcomes.

    Raises:
        NotRunError: If there are none.
    """
    chosen = measurements.select(series=series)
    if not chosen:
        raise NotRunError("needs the diagnostics, and an attacker who knows the tokens (knowledge 'full')")
    return chosen


def worst(
    measurements: Measurements, chosen: Sequence[tuple[Cell, Outcome]], metric: str, tokens: str = "trained"
) -> float:
    """The average over the images of the worst for each, see [`Measurements.worst`]."""
    return score(measurements.worst(chosen, tokens), metric, tokens)


def exceeds(value: float, reference: float) -> bool:
    """Whether a value is more than half a point higher."""
    return round(value - reference, _ROUNDING) > TOLERANCE


def has_converged(before: float, after: float) -> bool:
    """Whether two values are less than half a point apart."""
    return round(abs(before - after), _ROUNDING) < TOLERANCE


def in_words(value: float, metric: str) -> str:
    """Such as `34.5%` or `.345`."""
    return f"{100 * value:.1f}%" if metric == "accuracy" else f"{value:.3f}"


def eps_in_words(eps: float) -> str:
    """Such as `4/255`."""
    return f"{255 * eps:g}/255"


def images_in_words(outcome: Outcome) -> str:
    """Such as `50 images`, which says how much one of them counts."""
    count = len(outcome["pixel_difference"])
    return f"{count} images" if count > 1 else "1 image"


def attack_in_words(cell: Cell) -> str:
    """Such as `feature_cosine:base`."""
    return f"{cell.attack.name}:{cell.attack.target}" if cell.attack.target else cell.attack.name
