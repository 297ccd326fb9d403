"""Checks that compare what the attackers reach."""

from __future__ import annotations

from ..attack_suite import Attack
from ..measurements import Measurements
from .parts import Finding, NotRunError, check, eps_in_words, exceeds, in_words, main_metric, suite, verdict, worst


@check(
    1,
    "white box",
    "White-box attacks alone, the worst for each image, must leave at most what the grey box and the attacker with "
    "own tokens leave, within half a point. If they leave more, gradients through the tokens mislead the attack, and "
    "every white-box number is too good.",
)
def white_box(measurements: Measurements) -> Finding:
    metric = main_metric(measurements)
    parts: list[bool | None] = []
    words = []
    for eps in measurements.eps:
        full = worst(measurements, suite(measurements, eps, knowledge="full"), metric)
        values = [f"at {eps_in_words(eps)} white box {in_words(full, metric)}"]
        for level, name in (("base", "grey box"), ("own_tokens", "own tokens")):
            try:
                other = worst(measurements, suite(measurements, eps, knowledge=level), metric)
            except NotRunError:
                parts.append(None)
                values.append(f"{name} not run")
            else:
                parts.append(not exceeds(full, other))
                values.append(f"{name} {in_words(other, metric)}")
        words.append(", ".join(values))
    return verdict(*parts), f"{metric} {'; '.join(words)}"


_WEAKER = (
    "The attacker who knows less must leave at least what the white box leaves, within half a point. If this attack "
    "does more, the white-box attacks are not as strong as they could be: suspect masked gradients."
)


@check(2, "queries", f"Square, without gradients. {_WEAKER}")
def queries(measurements: Measurements) -> Finding:
    return _is_weaker(measurements, ("attack", "square"))


@check(3, "transfer", f"Attacks made on another backbone. {_WEAKER}")
def transfer(measurements: Measurements) -> Finding:
    return _is_weaker(measurements, ("view", "transfer"))


@check(4, "noise", f"Uniform draws in the ball, and draws of its corners. {_WEAKER}")
def noise(measurements: Measurements) -> Finding:
    return _is_weaker(measurements, ("attack", "uniform_noise"), ("attack", "corner_noise"))


def _is_weaker(measurements: Measurements, *attackers: tuple[str, str]) -> Finding:
    metric = main_metric(measurements)
    parts: list[bool | None] = []
    words = []
    for eps in measurements.eps:
        full = worst(measurements, suite(measurements, eps, knowledge="full"), metric)
        values = [f"at {eps_in_words(eps)} white box {in_words(full, metric)}"]
        for key, name in attackers:
            chosen = suite(measurements, eps, knowledge="none", **{key: name})
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
