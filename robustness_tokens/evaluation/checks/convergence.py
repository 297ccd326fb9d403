"""Checks that the white-box attack converges: more steps, more starts, larger eps."""

from __future__ import annotations

import itertools
from typing import Literal

import torch

from ..cells import Cell
from ..measurements import Measurements
from ..metrics import Outcome
from .parts import (
    Finding,
    NotRunError,
    attack_in_words,
    check,
    diagnostic,
    exceeds,
    has_converged,
    images_in_words,
    in_words,
    main_metric,
    score,
    verdict,
    worst,
)


PIXEL_TOLERANCE = 1e-6
# At most this is "about 0" where an attack may change every pixel at will.
ABOUT_ZERO = {"accuracy": 0.01, "miou": 0.05, "cosine": 0.1}


@check(
    5,
    "steps",
    "White-box PGD with more and more steps: doubling the last number must change less than half a point, and the "
    "number that the results take must leave at most half a point more than the last on the same images. If it fails, "
    "the attack has not converged and more steps would find more.",
)
def steps(measurements: Measurements) -> Finding:
    metric = main_metric(measurements)
    pairs = diagnostic(measurements, "steps")
    values = {cell.attack.num_steps or 0: score(outcome, metric) for cell, outcome in pairs}
    most = max(values)
    if most // 2 not in values:
        raise NotRunError(f"{most} steps, but not half of them")
    words = ", ".join(f"{count}: {in_words(values[count], metric)}" for count in sorted(values))
    suffices, taken = _in_suite(measurements, pairs[0], "num_steps", metric, least=values[most])
    passed = suffices and has_converged(values[most // 2], values[most])
    return passed, f"{metric} by steps {words} ({images_in_words(pairs[0][1])}){taken}"


@check(
    6,
    "restarts",
    "White-box PGD with more and more random starts, the worst for each image: doubling the last number must change "
    "less than half a point, and the number that the results take must leave at most half a point more than the last "
    "on the same images. If it fails, the attack depends on luck and more starts would find more.",
)
def restarts(measurements: Measurements) -> Finding:
    metric = main_metric(measurements)
    pairs = sorted(diagnostic(measurements, "restarts"), key=lambda pair: pair[0].attack.num_restarts or 0)
    prefixes = (worst(measurements, pairs[: number + 1], metric) for number in range(len(pairs)))
    numbers = (cell.attack.num_restarts or 0 for cell, _ in pairs)
    values = dict(zip(numbers, itertools.accumulate(prefixes, min), strict=True))
    most = max(values)
    if most // 2 not in values:
        raise NotRunError(f"{most} restarts, but not half of them")
    words = ", ".join(f"{count}: {in_words(value, metric)}" for count, value in values.items())
    suffices, taken = _in_suite(measurements, pairs[0], "num_restarts", metric, least=values[most])
    passed = suffices and has_converged(values[most // 2], values[most])
    return passed, f"{metric} by restarts {words} ({images_in_words(pairs[0][1])}){taken}"


def _in_suite(
    measurements: Measurements,
    pair: tuple[Cell, Outcome],
    effort: Literal["num_steps", "num_restarts"],
    metric: str,
    *,
    least: float,
) -> tuple[bool, str]:
    """Tells whether the attack in the results leaves at most `least`, as the most effort did, and says what it leaves.

    `pair` is a cell of the attack with any effort, and its outcome; `effort` names what was tried more of.
    """
    cell, count = pair[0], len(pair[1]["pixel_difference"])
    chosen = measurements.select(
        series="suite", knowledge="full", attack=cell.attack.name, target=cell.attack.target, eps=cell.eps
    )
    if not chosen:
        return True, ""
    values = [score({name: value[:count] for name, value in outcome.items()}, metric) for _, outcome in chosen]
    taken = sorted({getattr(one.attack, effort) for one, _ in chosen})
    left = ", ".join(in_words(value, metric) for value in values)
    words = f"; the results take {' and '.join(map(str, taken))}, which leaves {left}"
    return not exceeds(min(values), least), words


@check(
    7,
    "strength order",
    "White-box PGD must leave at most what a single step leaves, within half a point. If it leaves more, its steps go "
    "astray: gradients are masked, or the step size is wrong.",
)
def strength_order(measurements: Measurements) -> Finding:
    metric = main_metric(measurements)
    ((_, single),) = diagnostic(measurements, "single_step")
    weakest = max(score(outcome, metric) for _, outcome in diagnostic(measurements, "steps"))
    words = f"{metric} single step {in_words(score(single, metric), metric)}, iterative {in_words(weakest, metric)}"
    return not exceeds(weakest, score(single, metric)), f"{words} at its weakest ({images_in_words(single)})"


@check(
    8,
    "eps sweep",
    "At eps = 0 every attacker must measure exactly what was measured on clean images, and a larger eps must never "
    "help the white box's victim by more than half a point. Attacks that don't differentiate the model itself may. "
    "If it fails, something else than the attack changes the images, or the attack loses its way.",
)
def eps_sweep(measurements: Measurements) -> Finding:
    chosen = measurements.select(series="sweep")
    if not chosen:
        raise NotRunError("no sweep over eps")
    at_zero = [outcome for cell, outcome in chosen if cell.eps == 0]
    exact = None
    if at_zero:
        exact = all(
            torch.equal(value, measurements.clean[name][: len(value)])
            for outcome in at_zero
            for name, value in outcome.items()
        )
    words = [{True: "eps 0 equals clean", False: "eps 0 differs from clean", None: "eps 0 not swept"}[exact]]
    parts = [exact]
    full = sorted((pair for pair in chosen if pair[0].view.knowledge == "full"), key=lambda pair: pair[0].eps)
    for attack in dict.fromkeys(attack_in_words(cell) for cell, _ in full):
        curve = [(cell, outcome) for cell, outcome in full if attack_in_words(cell) == attack]
        metric = "cosine" if attack.startswith("feature") else main_metric(measurements)
        values = [score(outcome, metric) for _, outcome in curve]
        rises = any(exceeds(value, min(values[:i])) for i, value in enumerate(values) if i)
        parts.append(not rises if len(values) > 1 else None)
        along = ", ".join(
            f"{255 * cell.eps:g}: {in_words(v, metric)}" for (cell, _), v in zip(curve, values, strict=True)
        )
        words.append(f"{attack}, {metric} by 255 eps {along}")
    if not full:
        parts.append(None)
        words.append("white box not swept")
    return verdict(*parts), f"{'; '.join(words)} ({images_in_words(chosen[0][1])})"


@check(
    9,
    "unbounded",
    "With eps = 1 and many steps a white box may draw any picture, and must leave about nothing: an accuracy of at "
    "most 1%, an mIoU of at most 0.05, a cosine of at most 0.1. If it leaves more, gradients are masked or the "
    "attack doesn't work.",
)
def unbounded(measurements: Measurements) -> Finding:
    metric = main_metric(measurements)
    ((cell, outcome),) = diagnostic(measurements, "unbounded")
    value = score(outcome, metric)
    words = f"{metric} {in_words(value, metric)} after {cell.attack.num_steps} steps ({images_in_words(outcome)})"
    return value <= ABOUT_ZERO[metric], words


@check(
    11,
    "budget",
    "No attacked image may change a pixel by more than eps (and 0.000001 for rounding) or leave [0, 1], measured "
    "after all rounding; the published attack has a budget of its own. If it fails, the attack did more than it says, "
    "and its numbers mean nothing.",
)
def budget(measurements: Measurements) -> Finding:
    if not measurements.cells:
        raise NotRunError("no attack")
    violations: dict[str, int] = {}
    excess, total = -1.0, 0
    for cell, outcome in zip(measurements.cells, measurements.outcomes, strict=True):
        difference = outcome["pixel_difference"].double()
        # What is NaN is no pixel either.
        kept = (difference <= cell.eps + PIXEL_TOLERANCE) & (outcome["lowest_pixel"] >= 0)
        kept &= outcome["highest_pixel"] <= 1
        total += int(outcome.get("attacked", torch.ones_like(kept)).sum())  # the others are as they were
        excess = max(excess, difference.max().item() - cell.eps)
        if not kept.all():
            violations[cell.name] = int((~kept).sum())
    words = f"{sum(violations.values())} of {total} attacked images outside; largest change minus eps {excess:.1e}"
    where = f"; in {', '.join(f'{name} {count}' for name, count in violations.items())}" if violations else ""
    return not violations, words + where
