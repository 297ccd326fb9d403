"""Selects the results of a report for the Hub's model-index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult

from ..report import ATTACKERS, METRICS, Result, RobustnessReport, format_eps, group_results, plain


# Marks our metrics, to tell them from those that a person adds to the same card.
EVALUATED_WITH, PACKAGE = "evaluated_with", "robustness_tokens"

_TASK_TYPES = {
    "features": "image-feature-extraction",
    "classification": "image-classification",
    "segmentation": "image-segmentation",
}
_METRIC_TYPES = {
    "cosine": "cosine_similarity",
    "accuracy": "accuracy",
    "miou": "mean_iou",
    "mean_image_miou": "mean_image_iou",
}


def main_results(report: RobustnessReport) -> list[Result]:
    """Returns the leading results of a report's main metric, the first that was measured."""
    groups = list(group_results(report.results).values())
    return groups[0].leading if groups else []


def to_eval_results(report: RobustnessReport) -> list[EvalResult]:
    """Returns the adapter's main metric on clean images, in the grey box and in the white box, for the model-index."""
    results = [result for result in main_results(report) if result.tokens == "trained"]
    has_worst_case = any(result.knowledge == "full_worst_case" for result in results)
    name = plain(report.dataset["name"])
    return [
        EvalResult(
            task_type=_TASK_TYPES[result.task],
            dataset_type=name,
            dataset_name=name,
            dataset_split=None if report.dataset["split"] is None else plain(report.dataset["split"]),
            metric_type=_METRIC_TYPES[result.metric],
            metric_value=result.value,
            metric_name=_metric_name(result),
            metric_args={EVALUATED_WITH: f"{PACKAGE} {plain(report.package_version)}", **_metric_args(result)},
        )
        for knowledge in (None, "base", "full_worst_case" if has_worst_case else "full")
        if (result := _strongest([result for result in results if result.knowledge == knowledge])) is not None
    ]


def _strongest(results: Sequence[Result]) -> Result | None:
    """Returns the lowest result at the first eps; None if there is none."""
    at_first_eps = (result for result in results if result.eps == results[0].eps)
    return min(at_first_eps, key=lambda result: result.value, default=None)


def _metric_name(result: Result) -> str:
    metric = METRICS[result.metric]
    if result.attack is None:
        return f"{metric} on clean images"
    return (
        f"{metric} under attack {plain(result.attack)} (L-inf, eps {format_eps(result.eps)} in pixels), the attacker "
        f"knows {ATTACKERS[result.knowledge].knows}"
    )


def _metric_args(result: Result) -> dict[str, Any]:
    interval = result.confidence_interval
    arguments = {
        "knowledge": result.knowledge,
        "norm": result.norm,
        "eps_in_pixels": result.eps,
        "attack": None if result.attack is None else plain(result.attack),
        "num_images": result.num_images,
        "seed": result.seed,
        "confidence_interval_95": None if interval is None else list(interval),
    }
    # The Hub's client drops None.
    return {name: value for name, value in arguments.items() if value is not None}
