"""Metrics against values worked out by hand, closed forms and torchmetrics' own mIoU."""

import math
import sys

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.classification import MulticlassJaccardIndex

from robustness_tokens.evaluation.metrics import (
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


# Two images of 2 x 3 pixels and three classes, of which class 2 is in the second image alone; 255 doesn't count.
LABELS = torch.tensor([[[0, 0, 0], [1, 1, 255]], [[0, 0, 255], [2, 2, 2]]])
PREDICTIONS = torch.tensor([[[0, 0, 1], [1, 1, 2]], [[0, 2, 0], [2, 2, 0]]])
# By hand: image 0: class 0 has 2 of 3, class 1 has 2 of 3; image 1: class 0 has 1 of 3, class 2 has 2 of 4.
INTERSECTIONS = [[2, 2, 0], [1, 0, 2]]
UNIONS = [[3, 3, 0], [3, 0, 4]]


def test_accuracy_is_the_share_of_true_flags() -> None:
    assert accuracy(torch.tensor([True, False, True, True])) == 0.75


@pytest.mark.parametrize("correct", [torch.ones(3), torch.ones(0, dtype=torch.bool), torch.ones(2, 2) > 0])
def test_accuracy_refuses_what_are_no_flags(correct: Tensor) -> None:
    with pytest.raises(ValueError, match=r"correct must hold one bool per image, \(n,\), got"):
        accuracy(correct)


def test_worst_case_keeps_an_image_only_if_it_held_every_time() -> None:
    first, second = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    worst = worst_case(first, second)
    assert worst.dtype == torch.bool
    assert worst.tolist() == [True, False, False, False]
    assert torch.equal(worst_case(first), first)


def test_worst_case_takes_the_lowest_value_of_each_image() -> None:
    values = worst_case(torch.tensor([0.5, -0.25]), torch.tensor([0.75, -1.0]), torch.tensor([0.625, 1.0]))
    assert values.tolist() == [0.5, -1.0]


@pytest.mark.parametrize(
    "outcomes",
    [(), (torch.ones(2), torch.ones(3)), (torch.ones(2), torch.ones(2) > 0), (torch.ones(2, 2),)],
    ids=["none", "shapes", "dtypes", "rank"],
)
def test_worst_case_refuses_what_cannot_be_compared(outcomes: tuple[Tensor, ...]) -> None:
    with pytest.raises(ValueError, match="outcomes must be"):
        worst_case(*outcomes)
    with pytest.raises(ValueError, match="NaN"):
        worst_case(torch.tensor([0.0, math.nan]))


@pytest.mark.parametrize(("confidence", "z"), [(0.5, 0.6744897502), (0.95, 1.9599639845), (0.99, 2.5758293035)])
@pytest.mark.parametrize(("successes", "total"), [(0, 10), (1, 10), (5, 10), (10, 10), (37, 500), (499, 500), (1, 1)])
def test_wilson_interval_ends_where_the_score_test_just_rejects(
    successes: int, total: int, confidence: float, z: float
) -> None:
    low, high = wilson_interval(successes, total, confidence)
    share = successes / total
    assert 0 <= low <= share <= high <= 1
    assert low < high
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(z**2 * end * (1 - end) / total, abs=1e-10)


@pytest.mark.parametrize(("successes", "ends"), [(0, (0, 0.2775)), (1, (0.0179, 0.4042)), (5, (0.2366, 0.7634))])
def test_wilson_interval_of_ten_images_is_that_of_the_tables(successes: int, ends: tuple[float, float]) -> None:
    assert wilson_interval(successes, 10) == pytest.approx(ends, abs=5e-5)


def test_wilson_interval_ends_exactly_at_zero_and_one() -> None:
    assert wilson_interval(0, 7)[0] == 0.0
    assert wilson_interval(7, 7)[1] == 1.0


@pytest.mark.parametrize(("successes", "total", "confidence"), [(0, 0, 0.95), (3, 2, 0.95), (-1, 2, 0.95), (1, 2, 95)])
def test_wilson_interval_refuses_impossible_counts(successes: int, total: int, confidence: float) -> None:
    with pytest.raises(ValueError, match=r"successes must be from 0|confidence must lie between 0 and 1"):
        wilson_interval(successes, total, confidence)


def test_bootstrap_interval_of_a_mean_is_that_of_the_normal_law_for_many_values() -> None:
    values = np.random.default_rng(0).normal(0.3, 0.2, size=4000)
    half_width = 1.6448536270 * values.std() / math.sqrt(len(values))
    low, high = bootstrap_interval(values.tolist(), confidence=0.9, num_resamples=4000)
    assert (low, high) == pytest.approx(
        (values.mean() - half_width, values.mean() + half_width), abs=0.05 * half_width
    )


def test_bootstrap_interval_of_two_values_is_known_in_closed_form() -> None:
    # Means of 0 and 1 drawn twice: 0, 1/2, 1 with chances 1/4, 1/2, 1/4.
    assert bootstrap_interval([0.0, 1.0], confidence=0.4) == (0.5, 0.5)
    assert bootstrap_interval([0.0, 1.0], confidence=0.6) == (0.0, 1.0)


def test_bootstrap_interval_follows_from_its_seed() -> None:
    values = torch.rand(50)
    state = torch.random.get_rng_state()
    first = bootstrap_interval(values, seed=1, num_resamples=100)
    assert first == bootstrap_interval(values, seed=1, num_resamples=100)
    assert first != bootstrap_interval(values, seed=2, num_resamples=100)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_bootstrap_interval_is_a_point_where_nothing_varies() -> None:
    assert bootstrap_interval(torch.full((9,), 0.5)) == (0.5, 0.5)


@pytest.mark.parametrize("values", [[], [[0.5]], [math.nan], [1.0, math.inf]])
def test_bootstrap_interval_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError, match="values must be one finite number per image"):
        bootstrap_interval(values)


def test_bootstrap_interval_needs_a_resample() -> None:
    with pytest.raises(ValueError, match="num_resamples must be at least 1, got 0"):
        bootstrap_interval([1.0], num_resamples=0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int16])
def test_iou_counts_are_those_by_hand(dtype: torch.dtype) -> None:
    counts = iou_counts(PREDICTIONS.to(dtype), LABELS.to(dtype), num_labels=3)
    assert counts.intersections.tolist() == INTERSECTIONS
    assert counts.unions.tolist() == UNIONS


def test_miou_of_the_dataset_adds_pixels_up_before_it_divides() -> None:
    counts = iou_counts(PREDICTIONS, LABELS, num_labels=3)
    assert mean_iou(counts) == pytest.approx((3 / 6 + 2 / 3 + 2 / 4) / 3)


def test_miou_of_images_is_over_the_classes_that_each_has() -> None:
    counts = iou_counts(PREDICTIONS, LABELS, num_labels=3)
    by_image = [(2 / 3 + 2 / 3) / 2, (1 / 3 + 2 / 4) / 2]
    assert image_ious(counts).tolist() == pytest.approx(by_image)
    assert mean_image_iou(image_ious(counts)) == pytest.approx(sum(by_image) / 2)


def test_a_class_that_nobody_names_changes_no_miou() -> None:
    few, many = (iou_counts(PREDICTIONS, LABELS, num_labels=n) for n in (3, 7))
    assert mean_iou(few) == mean_iou(many)
    assert torch.equal(image_ious(few), image_ious(many))


@pytest.mark.parametrize("ignore_index", [255, 0, -1])
def test_miou_is_that_of_torchmetrics_over_the_dataset(ignore_index: int) -> None:
    labels, predictions = torch.randint(0, 6, (2, 20, 9, 7))
    labels[torch.rand(labels.shape) < 0.2] = ignore_index
    metric = MulticlassJaccardIndex(6, average="macro", ignore_index=ignore_index)
    for predicted, label in zip(predictions.split(6), labels.split(6), strict=True):
        metric.update(predicted, label)
    value = mean_iou(iou_counts(predictions, labels, num_labels=6, ignore_index=ignore_index))
    # torchmetrics gives an ignored class no weight, even where predictions of other pixels name it.
    if ignore_index == 0:
        by_class = MulticlassJaccardIndex(6, average="none")
        kept = labels != 0
        expected = by_class(predictions[kept], labels[kept]).mean().item()
    else:
        expected = metric.compute().item()
    assert value == pytest.approx(expected, abs=1e-6)


def test_images_without_a_labelled_pixel_are_left_out() -> None:
    counts = iou_counts(
        torch.cat([PREDICTIONS, PREDICTIONS[:1]]), torch.cat([LABELS, torch.full((1, 2, 3), 255)]), num_labels=3
    )
    assert image_ious(counts)[2].isnan()
    whole = iou_counts(PREDICTIONS, LABELS, num_labels=3)
    assert mean_image_iou(image_ious(counts)) == mean_image_iou(image_ious(whole))
    assert mean_iou(counts) == mean_iou(whole)
    assert mean_iou_interval(counts) == mean_iou_interval(whole)


def test_nothing_labelled_at_all_is_an_error() -> None:
    counts = iou_counts(PREDICTIONS, torch.full_like(LABELS, 255), num_labels=3)
    for metric in (mean_iou, mean_iou_interval):
        with pytest.raises(ValueError, match="no labelled pixel"):
            metric(counts)
    with pytest.raises(ValueError, match="no labelled pixel"):
        mean_image_iou(image_ious(counts))


def test_miou_interval_resamples_images() -> None:
    # Three means are possible of two images drawn twice; .4 of confidence leaves the middle one, both images once.
    counts = IoUCounts(torch.tensor([[1], [3]]), torch.tensor([[4], [4]]))
    assert mean_iou_interval(counts, confidence=0.4) == (0.5, 0.5)
    assert mean_iou_interval(counts, confidence=0.6) == (0.25, 0.75)


@pytest.mark.parametrize(
    ("predictions", "labels", "message"),
    [
        (PREDICTIONS[0], LABELS[0], r"must have one shape, \(n, H, W\)"),
        (PREDICTIONS, LABELS[:1], r"must have one shape, \(n, H, W\)"),
        (PREDICTIONS + 1, LABELS, "predictions hold classes from 1 to 3, expected 0 to 2"),
        (PREDICTIONS, LABELS - 1, "labels hold classes from -1 to 254, expected 0 to 2"),
        (PREDICTIONS.float(), LABELS, r"predictions must be integers, got torch.float32"),
    ],
    ids=["rank", "shapes", "prediction", "label", "dtype"],
)
def test_iou_counts_refuse_what_are_no_classes(predictions: Tensor, labels: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        iou_counts(predictions, labels, num_labels=3)


def test_without_torchmetrics_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchmetrics.functional.classification", None)
    with pytest.raises(ImportError, match=r"pip install 'robustness-tokens\[eval\]'"):
        iou_counts(PREDICTIONS, LABELS, num_labels=3)
