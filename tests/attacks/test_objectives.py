from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from robustness_tokens.attacks.objectives import (
    cosine_similarity,
    cross_entropy_objective,
    feature_cosine_objective,
    feature_mse_objective,
    margin_objective,
    pixel_cross_entropy_objective,
)
from robustness_tokens.attacks.pgd import pgd_attack


def identity(x: Tensor) -> Tensor:
    return x


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# Three tokens of width two, so that either axis gives other cosines.
FEATURES = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [[3.0, 4.0], [3.0, 4.0], [3.0, 4.0]]])
TARGET = torch.tensor([[[1.0, 1.0], [0.0, 1.0], [5.0, 0.0]], [[-3.0, 4.0], [-3.0, 4.0], [-3.0, 4.0]]])


@pytest.mark.parametrize(
    ("similarity_axis", "expected"),
    [
        # Columns: (1,0,0).(1,0,5) / sqrt 26 and (0,1,0).(1,1,0) / sqrt 2; then -1 and 1.
        ("token", [(26**-0.5 + 2**-0.5) / 2, 0.0]),
        # Rows: 1 / sqrt 2, 1, 0; then (16 - 9) / 25 three times.
        ("feature", [(2**-0.5 + 1 + 0) / 3, 7 / 25]),
    ],
)
def test_cosine_similarity_along_either_axis(similarity_axis: Any, expected: list[float]) -> None:
    cosine = cosine_similarity(FEATURES, TARGET, similarity_axis=similarity_axis)
    torch.testing.assert_close(cosine, torch.tensor(expected))


def test_cosine_similarity_is_along_tokens_by_default_as_torch_does() -> None:
    a, b = randn(3, 5, 7), randn(3, 5, 7, seed=1)
    torch.testing.assert_close(cosine_similarity(a, b).mean(), torch.nn.CosineSimilarity()(a, b).mean())


@pytest.mark.parametrize("similarity_axis", ["token", "feature"])
def test_cosine_similarity_of_pooled_features_is_along_features(similarity_axis: Any) -> None:
    features, target = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[4.0, 3.0], [-2.0, 0.0]])
    cosine = cosine_similarity(features, target, similarity_axis=similarity_axis)
    torch.testing.assert_close(cosine, torch.tensor([24 / 25, -1.0]))


@pytest.mark.parametrize(
    ("features", "target", "axis", "message"),
    [
        (randn(2, 3, 4), randn(2, 3, 4), "channel", 'similarity_axis must be "token" or "feature", got \'channel\''),
        (randn(2, 3, 4), randn(2, 3, 5), "token", r"same shape, got \(2, 3, 4\) and \(2, 3, 5\)"),
        (randn(2, 3, 4), randn(1, 3, 4), "token", r"same shape, got \(2, 3, 4\) and \(1, 3, 4\)"),
        (randn(2), randn(2), "token", r"features must have shape \(B, N, D\) or \(B, D\), got \(2,\)"),
        (randn(2, 3, 4, 5), randn(2, 3, 4, 5), "feature", r"or \(B, D\), got \(2, 3, 4, 5\)"),
    ],
)
def test_cosine_similarity_refuses(features: Tensor, target: Tensor, axis: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cosine_similarity(features, target, similarity_axis=axis)


@pytest.mark.parametrize("similarity_axis", ["token", "feature"])
def test_feature_cosine_is_minus_the_similarity(similarity_axis: Any) -> None:
    objective = feature_cosine_objective(lambda x: 2 * x, TARGET, similarity_axis=similarity_axis)
    expected = -cosine_similarity(FEATURES, TARGET, similarity_axis=similarity_axis)
    torch.testing.assert_close(objective(FEATURES), expected)


def test_feature_mse() -> None:
    objective = feature_mse_objective(identity, torch.zeros(2, 1, 2))
    torch.testing.assert_close(objective(torch.tensor([[[3.0, 4.0]], [[0.0, 1.0]]])), torch.tensor([12.5, 0.5]))
    with pytest.raises(ValueError, match=r"same shape, got \(2, 2\) and \(2, 1, 2\)"):
        objective(randn(2, 2))


def test_cross_entropy_is_per_image() -> None:
    logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
    expected = torch.tensor([2.0, 1 + torch.e**2]).log()
    torch.testing.assert_close(cross_entropy_objective(identity, torch.tensor([0, 1]))(logits), expected)


def test_margin_is_positive_where_misclassified() -> None:
    logits = torch.tensor([[5.0, 2.0, 1.0], [5.0, 2.0, 1.0], [-5.0, -5.0, -7.0]])
    objective = margin_objective(identity, torch.tensor([0, 2, 1]))
    torch.testing.assert_close(objective(logits), torch.tensor([-3.0, 4.0, 0.0]))


def test_margin_has_a_gradient_where_cross_entropy_has_none() -> None:
    images = torch.tensor([[200.0, 0.0, -200.0]], requires_grad=True)
    labels = torch.tensor([0])
    (flat,) = torch.autograd.grad(cross_entropy_objective(identity, labels)(images).sum(), images)
    (steep,) = torch.autograd.grad(margin_objective(identity, labels)(images).sum(), images)
    assert torch.equal(flat, torch.zeros(1, 3))
    assert torch.equal(steep, torch.tensor([[-1.0, 1.0, 0.0]]))


def test_a_bonus_prefers_what_is_misclassified_and_leaves_the_gradient() -> None:
    held = torch.tensor([[0.34, 0.33, 0.33]]).log()  # right, with a cross-entropy of 1.08
    fooled = torch.tensor([[0.45, 0.55, 1e-9]]).log()  # wrong, with one of .80
    label = torch.tensor([0])
    plain = cross_entropy_objective(identity, label)
    assert plain(held) > plain(fooled)
    preferring = cross_entropy_objective(identity, label, misclassified_bonus=10.0)
    assert preferring(held) == plain(held)
    torch.testing.assert_close(preferring(fooled), plain(fooled) + 10)
    for logits in (held, fooled):
        images = logits.clone().requires_grad_()
        gradients = [torch.autograd.grad(one(images).sum(), images)[0] for one in (plain, preferring)]
        assert torch.equal(*gradients)


@pytest.mark.parametrize("factory", [cross_entropy_objective, margin_objective])
@pytest.mark.parametrize(
    ("logits", "labels"),
    [(randn(2, 3), torch.zeros(3, dtype=torch.long)), (randn(2, 3, 4), torch.zeros(2, dtype=torch.long))],
)
def test_logits_and_labels_must_fit(factory: Callable[..., Any], logits: Tensor, labels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"logits must have shape \(B, C\) and labels \(B,\), got"):
        factory(identity, labels)(logits)


def test_margin_needs_two_classes() -> None:
    with pytest.raises(ValueError, match=r"at least two classes, got shape \(2, 1\)"):
        margin_objective(identity, torch.zeros(2, dtype=torch.long))(randn(2, 1))


@pytest.mark.parametrize("ignore_index", [255, -100, 0])
def test_pixel_cross_entropy_averages_each_image_over_its_labelled_pixels(ignore_index: int) -> None:
    logits = randn(3, 4, 2, 2)
    labels = torch.tensor([[[1, 2], [3, 1]], [[1, 1], [2, 2]], [[3, 3], [3, 3]]])
    labels[1, 0, 1] = labels[1, 1, 0] = ignore_index
    labels[2] = ignore_index
    values = pixel_cross_entropy_objective(identity, labels, ignore_index=ignore_index)(logits)
    log_probabilities = logits.log_softmax(dim=1)
    expected = [
        -(log_probabilities[0, 1, 0, 0] + log_probabilities[0, 2, 0, 1]) / 4
        - (log_probabilities[0, 3, 1, 0] + log_probabilities[0, 1, 1, 1]) / 4,
        -(log_probabilities[1, 1, 0, 0] + log_probabilities[1, 2, 1, 1]) / 2,
        torch.tensor(0.0),
    ]
    torch.testing.assert_close(values, torch.stack(expected))


def test_pixel_cross_entropy_names_logits_of_another_size() -> None:
    objective = pixel_cross_entropy_objective(identity, torch.zeros(2, 8, 8, dtype=torch.long))
    with pytest.raises(ValueError, match=r"got \(2, 4, 2, 2\) and \(2, 8, 8\): resize the logits"):
        objective(randn(2, 4, 2, 2))


OBJECTIVES: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "cosine": lambda: feature_cosine_objective(lambda x: x.flatten(2) - 0.5, randn(2, 4, 9)),
    "mse": lambda: feature_mse_objective(identity, torch.full((2, 4, 3, 3), 0.5)),
    "cross_entropy": lambda: cross_entropy_objective(lambda x: 9 * x.mean(dim=(2, 3)), torch.tensor([0, 3])),
    "margin": lambda: margin_objective(lambda x: 9 * x.mean(dim=(2, 3)), torch.tensor([0, 3])),
    "pixel": lambda: pixel_cross_entropy_objective(lambda x: 9 * x, torch.randint(0, 4, (2, 3, 3))),
}


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("make_in", [torch.enable_grad, torch.inference_mode])
def test_pgd_raises_every_objective(name: str, make_in: Callable[[], Any]) -> None:
    images = torch.rand((2, 4, 3, 3), generator=torch.Generator().manual_seed(0))
    with make_in():
        objective = OBJECTIVES[name]()
        adversarial = pgd_attack(objective, images, eps=0.1, generator=torch.Generator().manual_seed(1))
    assert (objective(adversarial) > objective(images) + 1e-3).all()


def test_targets_and_labels_are_copied() -> None:
    target, labels = randn(2, 3).requires_grad_(), torch.tensor([0, 1])
    cosine, entropy = feature_cosine_objective(identity, target), cross_entropy_objective(identity, labels)
    expected = F.cross_entropy(randn(2, 3, seed=1), torch.tensor([0, 1]), reduction="none")
    with torch.no_grad():
        target.zero_()
    labels.zero_()
    torch.testing.assert_close(cosine(randn(2, 3)), torch.tensor([-1.0, -1.0]))
    assert not cosine(randn(2, 3)).requires_grad
    torch.testing.assert_close(entropy(randn(2, 3, seed=1)), expected)


@pytest.mark.parametrize(
    "objective",
    [
        feature_cosine_objective(lambda x: x.flatten(2), randn(4, 2, 9, seed=1)),
        feature_mse_objective(identity, randn(4, 2, 3, 3, seed=1)),
        cross_entropy_objective(lambda x: x.flatten(1), torch.tensor([1, 0, 5, 2]), misclassified_bonus=9.0),
        margin_objective(lambda x: x.flatten(1), torch.tensor([1, 0, 5, 2])),
        pixel_cross_entropy_objective(identity, torch.tensor([0, 1, 255]).repeat(4, 3, 1)),
    ],
    ids=["cosine", "mse", "cross-entropy", "margin", "pixels"],
)
def test_an_objective_can_be_taken_of_some_images(objective: Any) -> None:
    images, rows = randn(4, 2, 3, 3), torch.tensor([3, 1])
    torch.testing.assert_close(objective.select(rows)(images[rows]), objective(images)[rows])
    again = objective.select(rows).select(torch.tensor([1]))
    torch.testing.assert_close(again(images[[1]]), objective(images)[[1]])
