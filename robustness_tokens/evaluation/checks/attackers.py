"""The checks that compare what each attacker reaches, and with what."""

from __future__ import annotations

from collections.abc import Iterable

from ...models import ProbedModel
from ..attack_suite import Attack
from ..cells import Cell
from ..measurements import Measurements, own_token_lengths
from ..outcomes import Outcome
from .parts import (
    Finding,
    NotRunError,
    attack_in_words,
    check,
    eps_in_words,
    exceeds,
    images_in_words,
    in_words,
    main_metric,
    score,
    suite,
    verdict,
    worst,
)


@check(
    1,
    "clean cost",
    "Only reported: clean images with and without the tokens, under the same head unless said; and how close the "
    "features stay to those without tokens, as a cosine. What is lost here is the price of the defence.",
)
def clean_cost(measurements: Measurements) -> Finding:
    clean, metric = measurements.clean, main_metric(measurements)
    parts = []
    if metric != "cosine":
        without, with_tokens = score(clean, metric, "none"), score(clean, metric)
        heads = ", each under a head of its own" if _has_two_heads(measurements) else ""
        parts.append(
            f"{metric} {in_words(without, metric)} without, {in_words(with_tokens, metric)} with tokens{heads}"
        )
    if "trained.cosine" in clean:
        parts.append(f"cosine {in_words(score(clean, 'cosine'), 'cosine')}")
    return None, "; ".join(parts)


@check(
    2,
    "grey box",
    "Only reported: every attack that was made on the base without tokens, measured on the model with its tokens: "
    'each at its eps, and the worst for each image. What is not named was not run. An attack behind "then" was run on '
    "the images alone that those before it left right, and its number is of all of them together. Targeted APGD and "
    "AutoAttack leave an image as it was where the base is wrong already or withstands them. Says nothing of an "
    "attacker who knows that there are tokens.",
)
def grey_box(measurements: Measurements) -> Finding:
    metric = main_metric(measurements)
    chosen = measurements.select(series="suite", knowledge="base")
    published = measurements.select(series="published", knowledge="base")
    if not chosen and not published:
        raise NotRunError("no attack with knowledge 'base'")
    found = []
    for eps in dict.fromkeys(cell.eps for cell, _ in chosen):
        at_eps = [(cell, outcome) for cell, outcome in chosen if cell.eps == eps]
        each = (_reached(measurements, cell, outcome, metric) for cell, outcome in at_eps)
        every = in_words(worst(measurements, at_eps, metric), metric)
        found.append(f"at {eps_in_words(eps)} worst case {every}: {', '.join(each)}")
    for cell, outcome in published:
        words = f"{_reached(measurements, cell, outcome, metric)} of {images_in_words(outcome)}"
        found.append(f"the published attack at {eps_in_words(cell.eps)}: {words}")
    classifies = measurements.model.task == "classification"
    if classifies and not any(cell.attack.name.startswith(("apgd", "auto_attack")) for cell, _ in chosen):
        found.append("APGD and AutoAttack not among them")
    return None, f"{metric} {'; '.join(found)}"


def _reached(measurements: Measurements, cell: Cell, outcome: Outcome, metric: str) -> str:
    then = "then " if cell.standing_only else ""
    value = score(measurements.reached(cell, outcome), metric)
    return f"{then}{attack_in_words(cell)} {in_words(value, metric)}"


@check(
    3,
    "own tokens",
    "Only reported: attacks through tokens that the attacker trained by the same recipe, each set of them and their "
    'ensemble; behind "after" together with the sets before, which left it the images to attack. The worst case '
    "takes, for each image, the attack that did the most. Where their training departs from the recipe, an attacker "
    "who follows it may find more.",
)
def own_tokens(measurements: Measurements) -> Finding:
    metric = main_metric(measurements)
    chosen = suite(measurements, knowledge="own_tokens")
    found = []
    for eps in measurements.eps:
        at_eps = [(cell, outcome) for cell, outcome in chosen if cell.eps == eps]
        if not at_eps:
            continue
        views = list(dict.fromkeys(cell.view.name for cell, _ in at_eps))
        every = worst(measurements, at_eps, metric)
        together = any(cell.standing_only for cell, _ in at_eps)
        chosen_views = {view: views[: row + 1] if together else [view] for row, view in enumerate(views)}
        by_view = {
            view: worst(measurements, [pair for pair in at_eps if pair[0].view.name in names], metric)
            for view, names in chosen_views.items()
        }
        after = "after " if together else ""
        each = ", ".join(f"{after}{view} {in_words(value, metric)}" for view, value in by_view.items())
        found.append(f"at {eps_in_words(eps)} worst case {in_words(every, metric)}: {each}")
    if lengths := own_token_lengths([cell for cell, _ in chosen]):
        sets = ", ".join(map(str, lengths))
        found.append(f"own tokens: sets of {sets}, trained {', '.join(measurements.training)}")
    return None, f"{metric} {'; '.join(found)}"


@check(
    4,
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


@check(
    5,
    "adaptive feature attacks",
    "Only reported: white-box attacks that push the features away from those of clean images, seen by the base and by "
    "the defended model; the worst for each image of those that were run on all.",
)
def feature_adaptive(measurements: Measurements) -> Finding:
    metrics = list(dict.fromkeys(["cosine", main_metric(measurements)]))
    words = []
    for eps in measurements.eps:
        chosen = [
            pair
            for target in ("base", "defended")
            for pair in measurements.select(series="suite", knowledge="full", target=target, eps=eps)
            if not pair[0].standing_only
        ]
        if not chosen:
            raise NotRunError("no white-box feature attack")
        targets = " and ".join(dict.fromkeys(f"{cell.attack.target}" for cell, _ in chosen))
        values = (f"{metric} {in_words(worst(measurements, chosen, metric), metric)}" for metric in metrics)
        words.append(f"at {eps_in_words(eps)} {', '.join(values)} (away from: {targets})")
    return None, "; ".join(words)


_WEAKER = (
    "The attacker who knows less must leave at least what the white box leaves, within half a point. If this attack "
    "does more, the white-box attacks are not as strong as they could be: suspect masked gradients."
)


@check(6, "queries", f"Square, without gradients. {_WEAKER}")
def queries(measurements: Measurements) -> Finding:
    return _is_weaker(measurements, ("attack", "square"))


@check(7, "transfer", f"Attacks made on another backbone. {_WEAKER}")
def transfer(measurements: Measurements) -> Finding:
    return _is_weaker(measurements, ("view", "transfer"))


@check(8, "noise", f"Uniform draws in the ball, and draws of its corners. {_WEAKER}")
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
    """A few queries or draws find little, and so say little."""
    if attack.num_queries is not None:
        return f" after {attack.num_queries} queries"
    return "" if attack.num_draws is None else f" after {attack.num_draws} draws"


@check(
    17,
    "baselines",
    "Only reported: tokens that were never trained, tokens of zeros, and the mean of the trained tokens in the place "
    "of each, on clean images and in the grey box. What they give too was not learned.",
)
def baselines(measurements: Measurements) -> Finding:
    metric = main_metric(measurements)
    names = [name for name in ("none", "untrained", "zero", "mean", "trained") if _has(measurements.clean, name)]

    def row(name: str, values: Iterable[float]) -> str:
        pairs = zip(names, values, strict=True)
        return f"{name}: {', '.join(f'{tokens} {in_words(value, metric)}' for tokens, value in pairs)}"

    words = [row("clean", (score(measurements.clean, metric, tokens) for tokens in names))]
    for eps in measurements.eps:
        grey = measurements.select(series="suite", knowledge="base", eps=eps)
        if grey:
            words.append(
                row(
                    f"grey box at {eps_in_words(eps)}", (worst(measurements, grey, metric, tokens) for tokens in names)
                )
            )
    return None, f"{metric} {'; '.join(words)}"


def _has_two_heads(measurements: Measurements) -> bool:
    model = measurements.model.model
    return isinstance(model, ProbedModel) and model.base_head is not None


def _has(outcome: Iterable[str], tokens: str) -> bool:
    return any(name.startswith(f"{tokens}.") for name in outcome)
