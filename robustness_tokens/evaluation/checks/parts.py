"""Parts of the checks: selecting measurements, comparing numbers, and putting them into words."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from ...report import Check
from ...utils import MAX_TEXT
from ..cells import Cell
from ..measurements import Measurements
from ..metrics import IoUCounts, Outcome, accuracy, mean_iou


TOLERANCE = 0.005  # half a point, within which numbers are called the same
_ROUNDING = 9  # decimals, so that one image of 200 is half a point exactly

CheckFunction: TypeAlias = Callable[[Measurements], Check]
Finding: TypeAlias = tuple[bool | None, str]  # the verdict, and the numbers in words


class NotRunError(Exception):
    """A check lacks the measurements that it needs; the message says which."""


def check(number: int, name: str, explanation: str) -> Callable[[Callable[[Measurements], Finding]], CheckFunction]:
    """Makes a check of a function that returns its verdict and its finding in words.

    `explanation` tells how it is judged and what a failure means. If the function raises `NotRunError`, the check has
    no verdict and gives the reason.
    """

    def decorate(function: Callable[[Measurements], Finding]) -> CheckFunction:
        @functools.wraps(function)
        def run(measurements: Measurements) -> Check:
            try:
                passed, value = function(measurements)
            except NotRunError as missing:
                passed, value = None, f"not run: {missing}"
            # A report limits the length of its texts, however much was measured.
            value = value if len(value) <= MAX_TEXT else f"{value[: MAX_TEXT - 4]} ..."
            return Check(number=number, name=name, passed=passed, value=value, explanation=explanation)

        return run

    return decorate


def verdict(*parts: bool | None) -> bool | None:
    """Returns False if a part failed, None if a part was not run, else True."""
    if False in parts:
        return False
    return None if None in parts else True


def main_metric(measurements: Measurements) -> str:
    """Returns the metric that is judged: accuracy, mIoU over the dataset, or cosine with the clean features."""
    return {"classification": "accuracy", "segmentation": "miou", "features": "cosine"}[measurements.model.task]


def score(outcome: Outcome, metric: str) -> float:
    """Returns the average over the images of `"accuracy"`, `"miou"` or `"cosine"`, with the trained tokens."""
    if metric == "accuracy":
        return accuracy(outcome["trained.correct"])
    if metric == "miou":
        return mean_iou(IoUCounts(outcome["trained.intersections"], outcome["trained.unions"]))
    return outcome["trained.cosine"].double().mean().item()


def suite(measurements: Measurements, eps: float, **wanted: Any) -> list[tuple[Cell, Outcome]]:
    """Returns the suite's cells with these values (see [`Measurements.select`]); `NotRunError` if there are none."""
    chosen = measurements.select(series="suite", eps=eps, **wanted)
    if not chosen:
        words = ", ".join(f"{key} {value!r}" for key, value in wanted.items())
        raise NotRunError(f"no attack with {words} at eps {eps_in_words(eps)}")
    return chosen


def diagnostic(measurements: Measurements, series: str) -> list[tuple[Cell, Outcome]]:
    """Returns the cells of a series that only a check needs; `NotRunError` if there are none."""
    chosen = measurements.select(series=series)
    if not chosen:
        raise NotRunError("needs the diagnostics, and an attacker who knows the tokens (knowledge 'full')")
    return chosen


def worst(measurements: Measurements, chosen: Sequence[tuple[Cell, Outcome]], metric: str) -> float:
    """Returns the average over the images of the worst outcome, see [`Measurements.worst`]."""
    return score(measurements.worst(chosen), metric)


def exceeds(value: float, reference: float) -> bool:
    """Tells whether a value is more than half a point higher."""
    return round(value - reference, _ROUNDING) > TOLERANCE


def has_converged(before: float, after: float) -> bool:
    """Tells whether two values are less than half a point apart."""
    return round(abs(before - after), _ROUNDING) < TOLERANCE


def in_words(value: float, metric: str) -> str:
    """Returns text such as `34.5%` or `0.345`."""
    return f"{100 * value:.1f}%" if metric == "accuracy" else f"{value:.3f}"


def eps_in_words(eps: float) -> str:
    """Returns text such as `4/255`."""
    return f"{255 * eps:g}/255"


def images_in_words(outcome: Outcome) -> str:
    """Returns text such as `50 images`, which shows how much one image counts."""
    count = len(outcome["pixel_difference"])
    return f"{count} images" if count > 1 else "1 image"
