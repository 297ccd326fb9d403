"""The report as the Hub's model-index holds it."""

from __future__ import annotations

from typing import Any

from huggingface_hub import EvalResult

from ..report import ATTACKERS, METRICS, Result, RobustnessReport, format_eps, group_results, plain


# In the arguments of every metric: tells our results from those that a person puts into the same card.
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


def to_eval_results(report: RobustnessReport) -> list[EvalResult]:
    """What leads the report of the adapter itself, with what the attacker knew, eps in pixels, and all else.

    Numbers of the bare base and of the baselines are not the adapter's; these, the single attacks that a worst case is
    over, and the curve over eps stay in the report.
    """
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
        for group in group_results(report.results).values()
        for result in group.leading
        if result.tokens == "trained"
    ]


def _metric_name(result: Result) -> str:
    metric = METRICS[result.metric]
    if result.attack is None:
        return f"{metric} on clean images"
    return (
        f"{metric} under attack {plain(result.attack)} (L-inf, eps {format_eps(result.eps)} in pixels), the attacker "
        f"knows {ATTACKERS[result.knowledge]}"
    )


def _metric_args(result: Result) -> dict[str, Any]:
    interval = result.confidence_interval
    arguments = {
        "knowledge": result.knowledge,
        "norm": result.norm,
        "eps_in_pixels": result.eps,
        "attack": None if result.attack is None else plain(result.attack),
        "attack_parameters": {plain(k): v for k, v in result.attack_parameters.items() if v is not None} or None,
        "num_images": result.num_images,
        "seed": result.seed,
        "confidence_interval_95": None if interval is None else list(interval),
    }
    # The Hub's client drops what is None.
    return {name: value for name, value in arguments.items() if value is not None}
