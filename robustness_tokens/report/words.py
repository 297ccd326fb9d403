"""The names in a report in plain words, in the order in which they are shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .schema import Result


METRICS = {
    "accuracy": "accuracy",
    "miou": "mean IoU",
    "mean_image_miou": "mean of the images' mean IoU",
    "cosine": "cosine with the clean features",
}
ATTACKERS = {
    "full_worst_case": "everything, worst case over all attacks",
    "full": "everything, tokens included",
    "own_tokens": "backbone and training recipe, own tokens",
    "base": "the backbone, not the tokens",
    "none": "nothing (noise, queries)",
    None: "(clean images)",
}
TOKENS = {
    "none": "without tokens",
    "trained": "with tokens",
    "untrained": "untrained tokens",
    "zero": "zero tokens",
    "mean": "mean of the tokens",
}
TASKS = {"classification": "Classification", "segmentation": "Segmentation", "features": "Features"}

WORST_CASE = "worst_case"
PART_WORST_CASE = "worst_case_of_part"  # of a level's attacks; attack_parameters name the part
BASELINES = ("untrained", "zero", "mean")


class ResultGroups(NamedTuple):
    """Results of one task and metric, each in one group.

    Attributes:
        leading: Clean images, and the worst case of each attacker; every attack of one that has no worst case.
        single: The attacks that a worst case is over.
        baselines: With other tokens in place of the trained ones.
        sweep: The curve over eps.
    """

    leading: list[Result]
    single: list[Result]
    baselines: list[Result]
    sweep: list[Result]


def is_sweep(result: Result) -> bool:
    """Whether a number belongs to the curve over eps."""
    return result.attack_parameters.get("series") == "sweep"


def group_results(results: Sequence[Result]) -> dict[tuple[str, str], ResultGroups]:
    """By task and metric, in the order in which they are shown, the groups of their results.

    Args:
        results: In the order of the report, which the groups keep.
    """
    pairs = [(task, metric) for task in TASKS for metric in METRICS]
    of_pairs = {pair: [r for r in results if (r.task, r.metric) == pair] for pair in pairs}
    return {pair: _group(chosen) for pair, chosen in of_pairs.items() if chosen}


def _group(results: Sequence[Result]) -> ResultGroups:
    sweep = [r for r in results if is_sweep(r) and r.tokens not in BASELINES]
    suite = [r for r in results if not is_sweep(r)]
    main = [r for r in suite if r.tokens not in BASELINES]
    with_worst = {r.knowledge for r in main if r.attack == WORST_CASE}
    leading = [r for r in main if r.attack in (None, WORST_CASE) or r.knowledge not in with_worst]
    return ResultGroups(
        leading=leading,
        single=[r for r in main if r not in leading],
        baselines=[r for r in suite if r.tokens in BASELINES],
        sweep=sweep,
    )
