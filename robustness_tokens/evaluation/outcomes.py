"""Outcomes: what the model did to each image, and the worst of several attacks, image by image.

An outcome maps names such as `"trained.correct"` (tokens in the model, quantity) to tensors with one entry per image.
Shapes: n or B images, C classes, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import TypeAlias

import torch
from torch import Tensor

from ..attacks import cosine_similarity
from ..report import Metric, Task
from .attack_suite import AttackBatch
from .metrics import (
    Interval,
    IoUCounts,
    accuracy,
    bootstrap_interval,
    image_ious,
    iou_counts,
    mean_image_iou,
    mean_iou,
    mean_iou_interval,
    wilson_interval,
    worst_case,
)
from .threat_models import EvaluatedModel


Outcome: TypeAlias = Mapping[str, Tensor]


@torch.no_grad()
def measure_outcome(
    model: EvaluatedModel, batch: AttackBatch, adversarial: Tensor, tokens: Mapping[str, Tensor | None]
) -> dict[str, Tensor]:
    """Measures a batch of attacked images, (B, 3, H, W), in float32 with each of the tokens.

    Returns on the CPU, with B rows: `pixel_difference` (the largest absolute one), `lowest_pixel` and `highest_pixel`,
    and per kind of tokens the `cosine` with the base's clean features, `correct`, or `intersections` and `unions`.
    """
    flat = adversarial.flatten(1)
    outcome = {
        "pixel_difference": (adversarial - batch.images).abs().flatten(1).amax(dim=1),
        "lowest_pixel": flat.amin(dim=1),
        "highest_pixel": flat.amax(dim=1),
    }
    target = batch.base_features
    if target is None and model.feature_view is not None:
        target = model.features(batch.images, None, exact=True)
    for name, value in tokens.items():
        if target is not None:
            features = model.features(adversarial, value, exact=True)
            outcome[f"{name}.cosine"] = cosine_similarity(features, target, similarity_axis=model.similarity_axis)
        if model.task == "classification":
            assert batch.labels is not None
            outcome[f"{name}.correct"] = model.logits(adversarial, value, exact=True).argmax(dim=1) == batch.labels
        elif model.task == "segmentation":
            assert batch.labels is not None
            logits = model.pixel_logits(adversarial, value, batch.labels.shape[1:], exact=True)
            counts = iou_counts(
                logits.argmax(dim=1), batch.labels, num_labels=logits.shape[1], ignore_index=batch.ignore_index
            )
            outcome[f"{name}.intersections"], outcome[f"{name}.unions"] = counts.intersections, counts.unions
    return {name: value.cpu() for name, value in outcome.items()}


def worst_outcome(
    outcomes: Sequence[Outcome], tokens: str = "trained", *, parts: Iterable[Sequence[Outcome]] = ()
) -> dict[str, Tensor]:
    """Returns the worst that any of these attacks did to each image, each metric on its own.

    For a segmentation: `image_iou`, the lowest of each image, and the `intersections` and `unions` of the lowest mIoU
    of the dataset: those of the attack that hurts each image's own IoU most, over all attacks or over one of `parts`,
    or all those of one attack. With `parts`, the mIoU of a whole never exceeds that of its parts.
    """
    worst = {}
    for metric in ("cosine", "correct"):
        name = f"{tokens}.{metric}"
        if measured := [outcome[name] for outcome in outcomes if name in outcome]:
            worst[name] = worst_case(*measured)
    if f"{tokens}.unions" in outcomes[0]:
        counts = [_iou_counts(outcome, tokens) for outcome in outcomes]
        image_by_image = _image_by_image(counts)
        of_parts = (_image_by_image([_iou_counts(outcome, tokens) for outcome in part]) for part in parts)
        # An image's own IoU weighs classes differently than the dataset's IoU does, so one attack, or a part of them,
        # may leave less than the worst of each image.
        lowest = min(chain([image_by_image], counts, of_parts), key=mean_iou)
        worst[f"{tokens}.image_iou"] = image_ious(image_by_image)
        worst[f"{tokens}.intersections"], worst[f"{tokens}.unions"] = lowest.intersections, lowest.unions
    return worst


def _image_by_image(counts: Sequence[IoUCounts]) -> IoUCounts:
    """Returns for each image the counts of the attack that hurts its own IoU most."""
    ious = torch.stack([image_ious(one) for one in counts])  # (attacks, n); NaN for all attacks or for none
    rows, images = ious.nan_to_num(nan=0.0).argmin(dim=0), torch.arange(ious.shape[1])
    return IoUCounts(
        torch.stack([one.intersections for one in counts])[rows, images],
        torch.stack([one.unions for one in counts])[rows, images],
    )


def summarize(outcome: Outcome, tokens: str, *, seed: int) -> list[tuple[Task, Metric, float, Interval]]:
    """Returns task, metric, average and 95% interval of everything measured with these tokens.

    The interval is Wilson's for an accuracy, and a bootstrap for everything else.
    """
    rows: list[tuple[Task, Metric, float, Interval]] = []
    if (correct := outcome.get(f"{tokens}.correct")) is not None:
        interval = wilson_interval(int(correct.sum()), len(correct))
        rows.append(("classification", "accuracy", accuracy(correct), interval))
    if f"{tokens}.unions" in outcome:
        counts = _iou_counts(outcome, tokens)
        rows.append(("segmentation", "miou", mean_iou(counts), mean_iou_interval(counts, seed=seed)))
        ious = outcome.get(f"{tokens}.image_iou", image_ious(counts))
        interval = bootstrap_interval(ious[~ious.isnan()], seed=seed)
        rows.append(("segmentation", "mean_image_miou", mean_image_iou(ious), interval))
    if (cosine := outcome.get(f"{tokens}.cosine")) is not None:
        interval = bootstrap_interval(cosine, seed=seed)
        rows.append(("features", "cosine", cosine.double().mean().item(), interval))
    return rows


def _iou_counts(outcome: Outcome, tokens: str) -> IoUCounts:
    return IoUCounts(outcome[f"{tokens}.intersections"], outcome[f"{tokens}.unions"])
