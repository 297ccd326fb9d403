"""Checks that compare what was measured: the attackers, and more steps, more starts, larger eps."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from ..attack_suite import Attack
from ..cells import Cell
from ..measurements import Measurements, attack_in_words
from ..metrics import Outcome
from .parts import (
    Finding,
    NotRunError,
    check,
    diagnostic,
    eps_in_words,
    exceeds,
    has_converged,
    images_in_words,
    in_words,
    main_metric,
    score,
    suite,
    verdict,
    worst,
)


PIXEL_TOLERANCE = 1e-6
# The largest values that count as "about 0" after an unbounded attack.
ABOUT_ZERO = {"accuracy": 0.01, "miou": 0.05, "cosine": 0.1}


@check(
    1,
    "white box",
    "White-box attacks alone, the worst for each image, must leave at most what the grey box and the attacker with "
    "own tokens leave, within half a point. If they leave more, gradients through the tokens mislead the attack, and "
    "every white-box number is too good.",
)
def white_box(measurements: Measurements) -> Finding:
    others = {"grey box": {"knowledge": "base"}, "own tokens": {"knowledge": "own_tokens"}}
    return _leaves_least(measurements, others, may_lack=True)


_WEAKER = (
    "The attacker who knows less must leave at least what the white box leaves, within half a point. If this attack "
    "does more, the white-box attacks are not as strong as they could be: suspect masked gradients."
)


@check(2, "queries", f"Square, without gradients. {_WEAKER}")
def queries(measurements: Measurements) -> Finding:
    return _leaves_least(measurements, {"square": {"knowledge": "none", "attack": "square"}})


@check(3, "transfer", f"Attacks made on another base. {_WEAKER}")
def transfer(measurements: Measurements) -> Finding:
    return _leaves_least(measurements, {"transfer": {"knowledge": "none", "view": "transfer"}})


@check(4, "noise", f"Uniform draws in the ball, and draws of its corners. {_WEAKER}")
def noise(measurements: Measurements) -> Finding:
    attacks = ("uniform_noise", "corner_noise")
    return _leaves_least(measurements, {name: {"knowledge": "none", "attack": name} for name in attacks})


def _leaves_least(
    measurements: Measurements, others: Mapping[str, Mapping[str, str]], *, may_lack: bool = False
) -> Finding:
    """Tells whether the white box leaves at most what the named others leave, at every eps."""
    metric = main_metric(measurements)
    parts: list[bool | None] = []
    words = []
    for eps in measurements.eps:
        full = worst(measurements, suite(measurements, eps, knowledge="full"), metric)
        values = [f"at {eps_in_words(eps)} white box {in_words(full, metric)}"]
        for name, wanted in others.items():
            if may_lack and not measurements.select(series="suite", eps=eps, **wanted):
                parts.append(None)
                values.append(f"{name} not run")
                continue
            chosen = suite(measurements, eps, **wanted)
            value = worst(measurements, chosen, metric)
            parts.append(not exceeds(full, value))
            values.append(f"{name} {in_words(value, metric)}{_effort(chosen[0][0].attack)}")
        words.append(", ".join(values))
    return verdict(*parts), f"{metric} {'; '.join(words)}"


def _effort(attack: Attack) -> str:
    """Returns the number of queries or draws in words: few find little and prove little."""
    if attack.num_queries is not None:
        return f" after {attack.num_queries} queries"
    return "" if attack.num_draws is None else f" after {attack.num_draws} draws"


@check(
    5,
    "steps",
    "White-box PGD with more and more steps: the last doubling of the steps must change less than half a point, and "
    "the steps that the results take must leave at most half a point more than the most steps do on the same images. "
    "If it fails, the attack has not converged and more steps would find more.",
)
def steps(measurements: Measurements) -> Finding:
    pairs = sorted(diagnostic(measurements, "steps"), key=lambda pair: pair[0].attack.num_steps or 0)
    left = [score(outcome, main_metric(measurements)) for _, outcome in pairs]
    return _converges(measurements, pairs, left, "steps")


@check(
    6,
    "restarts",
    "White-box PGD with more and more random starts, the worst for each image: the last doubling of the starts must "
    "change less than half a point, and the starts that the results take must leave at most half a point more than "
    "the most starts do on the same images. If it fails, the attack depends on luck and more starts would find more.",
)
def restarts(measurements: Measurements) -> Finding:
    pairs = sorted(diagnostic(measurements, "restarts"), key=lambda pair: pair[0].attack.num_restarts or 0)
    left = (worst(measurements, pairs[: row + 1], main_metric(measurements)) for row in range(len(pairs)))
    return _converges(measurements, pairs, list(itertools.accumulate(left, min)), "restarts")


def _converges(
    measurements: Measurements,
    pairs: Sequence[tuple[Cell, Outcome]],
    left: Sequence[float],
    effort: Literal["steps", "restarts"],
) -> Finding:
    """Judges whether an attack converges as its effort grows, and whether the results' effort leaves as little."""
    metric = main_metric(measurements)
    values = {getattr(cell.attack, f"num_{effort}"): value for (cell, _), value in zip(pairs, left, strict=True)}
    most = max(values)
    if most // 2 not in values:
        raise NotRunError(f"{most} {effort}, but not half as many")
    passed = has_converged(values[most // 2], values[most])
    cell, outcome = pairs[0]
    words = ", ".join(f"{count}: {in_words(value, metric)}" for count, value in values.items())
    words = f"{metric} by {effort} {words} ({images_in_words(outcome)})"
    chosen = measurements.select(
        series="suite", knowledge="full", attack=cell.attack.name, target=cell.attack.target, eps=cell.eps
    )
    if not chosen:
        return passed, words
    count = len(outcome["pixel_difference"])
    results = [score({name: value[:count] for name, value in found.items()}, metric) for _, found in chosen]
    taken = sorted({getattr(one.attack, f"num_{effort}") for one, _ in chosen})
    words += f"; the results take {' and '.join(map(str, taken))}, which leaves "
    words += ", ".join(in_words(value, metric) for value in results)
    return passed and not exceeds(min(results), values[most]), words


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
    "raise what the white box leaves by more than half a point; other attacks may, since they do not differentiate "
    "the model itself. If it fails, something other than the attack changes the images, or the attack loses its way.",
)
def eps_sweep(measurements: Measurements) -> Finding:
    chosen = measurements.select(series="sweep")
    if not chosen:
        raise NotRunError("no sweep over eps")
    exact = None
    if at_zero := [outcome for cell, outcome in chosen if cell.eps == 0]:
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
        along = [f"{255 * cell.eps:g}: {in_words(v, metric)}" for (cell, _), v in zip(curve, values, strict=True)]
        words.append(f"{attack}, {metric} by 255 eps {', '.join(along)}")
    if not full:
        parts.append(None)
        words.append("white box not swept")
    return verdict(*parts), f"{'; '.join(words)} ({images_in_words(chosen[0][1])})"


@check(
    9,
    "unbounded",
    "With eps = 1 and many steps a white box can turn an image into any other, and must leave about nothing: an "
    "accuracy of at most 1%, an mIoU of at most 0.05, a cosine of at most 0.1. If it leaves more, gradients are "
    "masked or the attack doesn't work.",
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
    "No pixel of an attacked image may change by more than eps (plus 0.000001 for rounding) or leave [0, 1], "
    "measured after all rounding; the published attack has its own budget. If it fails, the attack did more than it "
    "says, and its numbers mean nothing.",
)
def budget(measurements: Measurements) -> Finding:
    if not measurements.cells:
        raise NotRunError("no attack")
    violations: dict[str, int] = {}
    excess, total = -1.0, 0
    for cell, outcome in measurements.select():
        difference = outcome["pixel_difference"].double()
        # Written so that NaN counts as a violation.
        kept = (difference <= cell.eps + PIXEL_TOLERANCE) & (outcome["lowest_pixel"] >= 0)
        kept &= outcome["highest_pixel"] <= 1
        total += int(outcome.get("attacked", torch.ones_like(kept)).sum())  # the others were not attacked
        excess = max(excess, difference.max().item() - cell.eps)
        if not kept.all():
            violations[cell.name] = int((~kept).sum())
    words = f"{sum(violations.values())} of {total} attacked images outside; largest change minus eps {excess:.1e}"
    where = f"; in {', '.join(f'{name} {count}' for name, count in violations.items())}" if violations else ""
    return not violations, words + where
