"""Outcomes, their worst case over several attacks, and metrics with intervals, as pure functions.

An outcome maps names such as `"trained.correct"` (tokens in the model, quantity) to tensors with one entry per image.
Shapes: n images, C classes, H and W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from statistics import NormalDist
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..report import Metric, Task


Outcome: TypeAlias = Mapping[str, Tensor]
Interval: TypeAlias = tuple[float, float]


def accuracy(correct: Tensor) -> float:
    """Returns the share of correct images; `ValueError` unless `correct` is (n,) bool with n > 0."""
    if correct.dtype != torch.bool or correct.dim() != 1 or len(correct) == 0:
        raise ValueError(
            f"correct must hold one bool per image, (n,), got {correct.dtype} of shape {tuple(correct.shape)}"
        )
    return int(correct.sum()) / len(correct)


def worst_case(*outcomes: Tensor) -> Tensor:
    """Returns the lowest value of each image, (n,), over (n,) outcomes of one dtype for which higher is better.

    `ValueError` if there is none, they differ in shape or dtype, or one holds NaN.
    """
    kinds = {(outcome.dtype, tuple(outcome.shape)) for outcome in outcomes}
    if len(kinds) != 1 or outcomes[0].dim() != 1:
        raise ValueError(f"outcomes must be (n,) tensors of one dtype, got {sorted(map(str, kinds)) or 'none'}")
    if any(outcome.isnan().any() for outcome in outcomes):
        raise ValueError("outcomes hold NaN, expected values that can be compared")
    return torch.stack(outcomes).amin(dim=0)


def wilson_interval(successes: int, total: int, confidence: float = 0.95) -> Interval:
    """Returns Wilson's score interval of a proportion, such as an accuracy; it is valid near 0 and 1 too.

    Source: E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927.
    """
    _check_confidence(confidence)
    if total < 1 or not 0 <= successes <= total:
        raise ValueError(f"successes must be from 0 to total, and total at least 1, got {successes} of {total}")
    z, p = NormalDist().inv_cdf(0.5 + confidence / 2), successes / total
    scale = 1 + z**2 / total
    centre = (p + z**2 / (2 * total)) / scale
    half_width = z * math.sqrt(p * (1 - p) / total + z**2 / (4 * total**2)) / scale
    # At the ends the formula gives 0 and 1 except for rounding.
    low = 0.0 if successes == 0 else centre - half_width
    high = 1.0 if successes == total else centre + half_width
    return low, high


def bootstrap_interval(
    values: Tensor | Sequence[float], *, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> Interval:
    """Returns the percentile bootstrap interval of the mean of (n,) finite values, one per image.

    Source: B. Efron, "Bootstrap methods: another look at the jackknife", Annals of Statistics 1979.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or array.size == 0 or not np.isfinite(array).all():
        raise ValueError(f"values must be one finite number per image, (n,), got shape {array.shape}: {array}")
    return _bootstrap(array, np.mean, confidence=confidence, num_resamples=num_resamples, seed=seed)


def _bootstrap(
    values: np.ndarray, statistic: Callable[[np.ndarray], float], *, confidence: float, num_resamples: int, seed: int
) -> Interval:
    _check_confidence(confidence)
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be at least 1, got {num_resamples}")
    generator = np.random.default_rng(seed)
    # One resample at a time: all at once would take gigabytes for a dataset of 50,000 images.
    draws = [statistic(values[generator.integers(len(values), size=len(values))]) for _ in range(num_resamples)]
    low, high = np.quantile(draws, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def _check_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, such as 0.95, got {confidence}")


@dataclass(frozen=True)
class IoUCounts:
    """Counts of labelled pixels per image and class: both prediction and label are the class, or at least one is.

    Both are (n, C) int64 on the CPU.
    """

    intersections: Tensor
    unions: Tensor


def iou_counts(predictions: Tensor, labels: Tensor, *, num_labels: int, ignore_index: int = 255) -> IoUCounts:
    """Counts intersections and unions of (n, H, W) integer classes by torchmetrics.

    `ImportError` without torchmetrics (extra `eval`); `ValueError` if shapes differ or a class is out of range.
    """
    try:
        from torchmetrics.functional.classification import multiclass_stat_scores
    except ImportError as exc:
        raise ImportError("mIoU needs torchmetrics: pip install 'robustness-tokens[eval]'") from exc
    if predictions.dim() != 3 or predictions.shape != labels.shape:
        raise ValueError(
            "predictions and labels must have one shape, (n, H, W), "
            f"got {tuple(predictions.shape)} and {tuple(labels.shape)}"
        )
    _check_classes("predictions", predictions, num_labels)
    _check_classes("labels", labels[labels != ignore_index], num_labels)
    intersections, unions = torch.zeros(2, len(labels), num_labels, dtype=torch.int64)
    for image, (predicted, label) in enumerate(zip(predictions, labels, strict=True)):
        # Image by image: torchmetrics by sample makes one-hot maps, 300 MB for 518 x 518 pixels and 150 classes.
        scores = multiclass_stat_scores(
            predicted.long(), label.long(), num_labels, average="none", ignore_index=ignore_index, validate_args=False
        ).cpu()  # (C, 5)
        true_positives, false_positives, _, false_negatives, _ = scores.unbind(dim=1)
        intersections[image] = true_positives
        unions[image] = true_positives + false_positives + false_negatives
    return IoUCounts(intersections, unions)


def _check_classes(name: str, classes: Tensor, num_labels: int) -> None:
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {classes.dtype}")
    if classes.numel() and not (int(classes.min()) >= 0 and int(classes.max()) < num_labels):
        raise ValueError(
            f"{name} hold classes from {int(classes.min())} to {int(classes.max())}, expected 0 to {num_labels - 1} "
            "(or, of labels, ignore_index)"
        )


def mean_iou(counts: IoUCounts) -> float:
    """Returns the mIoU of a dataset: each class's IoU over all pixels of all images, then the mean over the classes.

    Classes without a pixel in labels and predictions are left out. `ValueError` if there is no labelled pixel.
    """
    return _check_labelled(_mean_iou(_stacked(counts)))


def image_ious(counts: IoUCounts) -> Tensor:
    """Returns the (n,) float64 mIoU of each image over the classes in it; NaN without a labelled pixel."""
    ious = counts.intersections / counts.unions.double()  # (n, C)
    return ious.nanmean(dim=1)


def mean_image_iou(ious: Tensor) -> float:
    """Returns the paper's mIoU, the mean of [`image_ious`] over the images that have a labelled pixel.

    Source: the published code of Pulfer et al., ECCV 2024.
    """
    return _check_labelled(ious.nanmean().item())


def mean_iou_interval(
    counts: IoUCounts, *, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> Interval:
    """Returns the percentile bootstrap interval of [`mean_iou`] over the images; see [`bootstrap_interval`]."""
    mean_iou(counts)  # raises if no pixel is labelled
    labelled = (counts.unions.sum(dim=1) > 0).numpy()  # (n,)
    return _bootstrap(
        _stacked(counts)[labelled], _mean_iou, confidence=confidence, num_resamples=num_resamples, seed=seed
    )


def _stacked(counts: IoUCounts) -> np.ndarray:
    return np.stack([counts.intersections.numpy(), counts.unions.numpy()], axis=1)  # (n, 2, C)


def _mean_iou(rows: np.ndarray) -> float:
    """Returns the mIoU of (n, 2, C) intersections and unions; NaN without a labelled pixel."""
    intersections, unions = rows.sum(axis=0)  # (C,)
    named = unions > 0
    return float((intersections[named] / unions[named]).mean()) if named.any() else math.nan


def _check_labelled(mean: float) -> float:
    if math.isnan(mean):
        raise ValueError("labels have no labelled pixel in any image: nothing to measure")
    return mean


def worst_outcome(
    outcomes: Sequence[Outcome], tokens: str = "trained", *, parts: Iterable[Sequence[Outcome]] = ()
) -> dict[str, Tensor]:
    """Returns the worst outcome of each image over these attacks, for each metric separately.

    For a segmentation it holds `image_iou`, the lowest of each image, and the `intersections` and `unions` of the
    lowest mIoU of the dataset. Candidates for the latter are each attack alone, and the worst attack for each image's
    own IoU among all attacks or among one of `parts`. So the mIoU of a whole never exceeds that of its parts.
    """
    worst = {}
    for metric in ("cosine", "correct"):
        name = f"{tokens}.{metric}"
        if measured := [outcome[name] for outcome in outcomes if name in outcome]:
            worst[name] = worst_case(*measured)
    if f"{tokens}.unions" in outcomes[0]:
        counts = [_counts(outcome, tokens) for outcome in outcomes]
        image_by_image = _image_by_image(counts)
        of_parts = (_image_by_image([_counts(outcome, tokens) for outcome in part]) for part in parts)
        # An image's own IoU weighs classes differently than the dataset's, so a single attack, or a part of them, may
        # leave a lower mIoU than the worst attack for each image.
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
    """Returns task, metric, average and 95% interval of each metric that was measured with these tokens."""
    rows: list[tuple[Task, Metric, float, Interval]] = []
    if (correct := outcome.get(f"{tokens}.correct")) is not None:
        interval = wilson_interval(int(correct.sum()), len(correct))
        rows.append(("classification", "accuracy", accuracy(correct), interval))
    if f"{tokens}.unions" in outcome:
        counts = _counts(outcome, tokens)
        rows.append(("segmentation", "miou", mean_iou(counts), mean_iou_interval(counts, seed=seed)))
        ious = outcome.get(f"{tokens}.image_iou", image_ious(counts))
        interval = bootstrap_interval(ious[~ious.isnan()], seed=seed)
        rows.append(("segmentation", "mean_image_miou", mean_image_iou(ious), interval))
    if (cosine := outcome.get(f"{tokens}.cosine")) is not None:
        interval = bootstrap_interval(cosine, seed=seed)
        rows.append(("features", "cosine", cosine.double().mean().item(), interval))
    return rows


def _counts(outcome: Outcome, tokens: str) -> IoUCounts:
    return IoUCounts(outcome[f"{tokens}.intersections"], outcome[f"{tokens}.unions"])
