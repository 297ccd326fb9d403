"""The words and numbers of a report, as people read them; tables are in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from .schema import ReportContent, Result


class Attacker(NamedTuple):
    """The field's word for an attacker, and the text after "the attacker knows"."""

    name: str
    knows: str


ATTACKERS = {
    "full_worst_case": Attacker("white box, worst case", "everything, tokens included"),
    "full": Attacker("white box", "everything, tokens included"),
    "own_tokens": Attacker("own tokens", "the base and the training recipe, and trains own tokens"),
    "base": Attacker("grey box", "the base, not the tokens"),
    "none": Attacker("black box", "nothing, and tries noise and queries"),
    None: Attacker("clean images", ""),
}
METRICS = {
    "accuracy": "accuracy",
    "miou": "mean IoU",
    "mean_image_miou": "mean of the images' mean IoU",
    "cosine": "cosine with the clean features",
}
TASKS = {"classification": "Classification", "segmentation": "Segmentation", "features": "Features"}
TOKENS = {
    "none": "without tokens",
    "trained": "with tokens",
    "untrained": "untrained tokens",
    "random": "random tokens of the same norm",
    "zero": "zero tokens",
    "mean": "mean of the tokens",
}
BASELINES = ("untrained", "random", "zero", "mean")

WORST_CASE = "worst_case"
PART_WORST_CASE = "worst_case_of_part"  # over some of a level's attacks, which attack_parameters name
ATTACKS = {None: "no attack", WORST_CASE: "worst case", PART_WORST_CASE: "worst case of some attacks"}
"""Other attacks are shown under their own names."""

BASE_HEAD = "The results without tokens use a separate head."
OWN_TOKENS = (
    "Settings in which the training of the attacker's tokens differs from the recipe. Seeds always differ. An "
    "attacker who follows the recipe exactly may do more damage."
)
OWN_TOKENS_GIVEN = "The tokens were given to the evaluation, so their training is not known."


def describe_attacker(knowledge: str | None) -> str:
    """Returns the attacker's name and knowledge, such as `"Grey box: knows the base, not the tokens"`."""
    name, knows = ATTACKERS[knowledge]
    return capitalize(f"{name}: knows {knows}" if knows else name)


def describe_attacker_of(result: Result) -> str:
    """Returns the attacker of a result; a black box with its queries, on whose number the result depends."""
    queries = num_queries(result)
    return describe_attacker(result.knowledge) + ("" if queries is None else f" ({queries:,} for each image)")


def num_queries(result: Result) -> int | None:
    """Returns the number of queries for each image; None if the attacker makes none, or a report does not hold it."""
    queries = result.attack_parameters.get("num_queries")
    return queries if result.knowledge == "none" and isinstance(queries, int) else None


def capitalize(text: str) -> str:
    """Returns the text with a capital first letter; the others keep theirs, as in IoU."""
    return text[:1].upper() + text[1:]


def plain(text: object) -> str:
    """Returns a text without line breaks, control characters and invisible characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def format_levels(eps: float) -> str:
    """Returns a size in pixel units as a multiple of 1/255, such as `"4/255"`."""
    return f"{255 * eps:.4g}/255"


def format_eps(eps: float) -> str:
    """Returns a size in pixel units as a multiple of 1/255 and as a number, such as `"4/255 (0.0157)"`."""
    return f"{format_levels(eps)} ({eps:.4g})"


def format_number(result: Result, value: float | None = None) -> str:
    """Returns the result, or another value of its metric: a cosine unchanged, all others in %."""
    value = result.value if value is None else value
    return f"{value:.3f}" if result.metric == "cosine" else f"{100 * value:.1f}"


def format_unit(result: Result) -> str:
    """Returns the unit of the result's metric: `"%"`, or nothing for a cosine."""
    return "" if result.metric == "cosine" else "%"


def format_interval(result: Result) -> str:
    """Returns the confidence interval, such as `"[20.0, 30.0]"`; empty without one."""
    if result.confidence_interval is None:
        return ""
    low, high = result.confidence_interval
    return f"[{format_number(result, low)}, {format_number(result, high)}]"


def format_setting(name: str, value: Any) -> str:
    """Returns a hyper-parameter's value as text; a size in pixel units such as 2/255 as a fraction."""
    if isinstance(value, list):
        return f"[{', '.join(format_setting(name, element) for element in value)}]"
    if not isinstance(value, float):
        return str(value)
    is_level = abs(510 * value - round(510 * value)) < 1e-9  # a whole or half one
    if name in ("eps", "step_size") and 0 < value < 1 and is_level:
        return f"{255 * value:g}/255"
    return f"{value:.6g}"


def own_tokens_rows(report: ReportContent) -> list[list[str]]:
    """Returns a table of how own tokens were trained, the header first; empty if none were trained."""
    if not (described := report.own_tokens):
        return []
    names = dict.fromkeys(name for settings in described.values() for name in settings)
    recipe = described.get("recipe", {})

    def cell(kind: str, name: str) -> str:
        if name in described[kind]:
            return format_setting(name, described[kind][name])
        return "as in the recipe" if kind != "recipe" and name in recipe else "-"

    return [["Setting", *described], *([name, *(cell(kind, name) for kind in described)] for name in names)]


class ResultGroups(NamedTuple):
    """The results of one task and metric, each in one group."""

    leading: list[Result]  # clean images, and each attacker's worst case, or every attack if it has none
    single: list[Result]  # the attacks that a worst case covers
    baselines: list[Result]  # with other tokens in place of the trained ones
    sweep: list[Result]  # the curve over eps


def is_sweep(result: Result) -> bool:
    """Tells whether a number belongs to the curve over eps."""
    return result.attack_parameters.get("series") == "sweep"


def group_results(results: Sequence[Result]) -> dict[tuple[str, str], ResultGroups]:
    """Returns the groups of each task and metric, in the order of the words; each group keeps the report's order."""
    pairs = [(task, metric) for task in TASKS for metric in METRICS]
    of_pairs = {pair: [r for r in results if (r.task, r.metric) == pair] for pair in pairs}
    return {pair: _group(chosen) for pair, chosen in of_pairs.items() if chosen}


def _group(results: Sequence[Result]) -> ResultGroups:
    suite = [r for r in results if not is_sweep(r)]
    main = [r for r in suite if r.tokens not in BASELINES]
    with_worst = {r.knowledge for r in main if r.attack == WORST_CASE}
    leading = [r for r in main if r.attack in (None, WORST_CASE) or r.knowledge not in with_worst]
    return ResultGroups(
        leading=leading,
        single=[r for r in main if r not in leading],
        baselines=[r for r in suite if r.tokens in BASELINES],
        sweep=[r for r in results if is_sweep(r) and r.tokens not in BASELINES],
    )
