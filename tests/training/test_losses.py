import math

import pytest
import torch
from torch import Tensor

from robustness_tokens.attacks.common import example_generators
from robustness_tokens.training.losses import head_distance, objective_values, robustness_loss


# Two images of two tokens of width two; along tokens and along features the cosines differ.
TARGET = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [1.0, 1.0]]])
ATTACKED = torch.tensor([[[3.0, 4.0], [0.0, 3.0]], [[1.0, 1.0], [0.0, 0.0]]])


def identity(features: Tensor) -> Tensor:
    return features


@pytest.mark.parametrize(
    ("axis", "adversarial"),
    [
        # Columns: (3, 0).(1, 0) / 3 = 1 and (4, 3).(0, 1) / 5 = .6; then (1, 0).(1, 1) / sqrt 2 twice.
        ("token", (0.8 + 2**-0.5) / 2),
        # Rows: (3, 4).(1, 0) / 5 = .6 and 1; then 1 and 0.
        ("feature", (0.8 + 0.5) / 2),
    ],
)
def test_loss_is_minus_the_weighted_cosines(axis: str, adversarial: float) -> None:
    losses = robustness_loss(
        identity,
        TARGET,
        ATTACKED,
        TARGET,
        similarity_axis=axis,  # type: ignore[arg-type]
        invariance_weight=2,
        adversarial_weight=3,
    )
    torch.testing.assert_close(losses.invariance, torch.tensor(1.0))
    torch.testing.assert_close(losses.adversarial, torch.tensor(adversarial))
    torch.testing.assert_close(losses.loss, torch.tensor(-2 - 3 * adversarial))


def test_default_weights_are_the_papers() -> None:
    losses = robustness_loss(identity, TARGET, ATTACKED, TARGET)
    torch.testing.assert_close(losses.loss, -(losses.invariance + losses.adversarial))


def test_clean_images_go_first_and_attacked_ones_apart() -> None:
    seen: list[Tensor] = []

    def features(pixel_values: Tensor) -> Tensor:
        seen.append(pixel_values)
        return pixel_values

    robustness_loss(features, TARGET, ATTACKED, TARGET)
    assert [one is expected for one, expected in zip(seen, (TARGET, ATTACKED), strict=True)] == [True, True]


def test_gradient_reaches_the_tokens_and_vanishes_at_the_optimum() -> None:
    shift = torch.zeros(2, requires_grad=True)
    robustness_loss(lambda x: x + shift, TARGET, TARGET, TARGET).loss.backward()
    assert shift.grad is not None
    torch.testing.assert_close(shift.grad, torch.zeros(2), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(robustness_loss(lambda x: x + shift, TARGET, ATTACKED, TARGET).loss, shift)
    assert gradient.abs().max() > 1e-3


def test_features_of_another_shape_than_the_target_are_refused() -> None:
    with pytest.raises(ValueError, match="same shape"):
        robustness_loss(identity, TARGET, ATTACKED, TARGET[:, :1])


def noise(seed: int, step: int, index: list[int]) -> Tensor:
    return torch.stack([torch.randn(8, generator=g) for g in example_generators(seed, step, torch.tensor(index))])


def test_noise_belongs_to_the_example_not_to_the_batch() -> None:
    whole = noise(0, 3, [0, 1, 2, 1000])
    assert torch.equal(whole[[3, 1]], noise(0, 3, [1000, 1]))
    assert torch.equal(whole, noise(0, 3, [0, 1, 2, 1000]))


def test_noise_differs_by_seed_step_and_example() -> None:
    keys = [(seed, step, index) for seed in (0, 1, 2) for step in (0, 1, 2) for index in (0, 1, 2)]
    rows = torch.cat([noise(seed, step, [index]) for seed, step, index in keys])
    assert len(rows.unique(dim=0)) == len(keys)


def test_example_generators_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    noise(0, 0, [0, 1])
    assert torch.equal(torch.get_rng_state(), before)


def test_the_head_distance_is_that_of_cls_and_mean_patch_relative_to_what_they_were() -> None:
    target = torch.tensor([[[1.0, 2.0], [1.0, 0.0], [3.0, 0.0]]])  # CLS (1, 2), mean patch (2, 0): squared length 9
    features = torch.tensor([[[1.0, 2.0], [4.0, 3.0], [6.0, 3.0]]])  # mean patch (5, 3): 9 + 9 away
    assert head_distance(features, target, num_patches=2).tolist() == [2.0]
    assert head_distance(features, target, num_patches=3).tolist() == pytest.approx(
        [((11 - 5) ** 2 + (8 - 2) ** 2) / (5**2 + 2**2)]
    )
    assert head_distance(features[:, 0] * 3, target[:, 0], num_patches=2).tolist() == [4.0]


def test_the_head_distance_sees_what_the_cosine_along_the_tokens_does_not() -> None:
    target = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    found = objective_values(2 * target, target, objective="head_distance", num_patches=4)
    assert found.tolist() == pytest.approx([1, 1])
    assert objective_values(2 * target, target).tolist() == pytest.approx([-1, -1])


def test_distillation_is_the_divergence_from_the_bases_prediction() -> None:
    target = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log() + 3  # logits may be shifted
    outputs = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    expected = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    found = objective_values(outputs, target, objective="distillation")
    assert found.tolist() == pytest.approx([expected, 0], abs=1e-6)
    of_patches = objective_values(
        torch.stack([outputs[0], outputs[1]])[None],
        torch.stack([target[0], target[1]])[None],
        objective="distillation",
    )
    assert of_patches.tolist() == pytest.approx([expected / 2], abs=1e-6), "a mean over the patches"


def test_the_cross_entropy_is_that_of_the_labels() -> None:
    outputs = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    found = objective_values(outputs, outputs, objective="cross_entropy", labels=torch.tensor([0, 1]))
    assert found.tolist() == pytest.approx([-math.log(0.25), -math.log(0.1)])
    with pytest.raises(ValueError, match="needs labels"):
        objective_values(outputs, outputs, objective="cross_entropy")


def test_an_unknown_objective_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective must be one of .*'mse'"):
        objective_values(torch.zeros(1, 2), torch.zeros(1, 2), objective="mse")  # type: ignore[arg-type]


def test_the_loss_weighs_both_terms_and_reports_the_cosines() -> None:
    target = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    losses = robustness_loss(
        lambda x: x.mean() * target,
        torch.full((2, 3, 1, 1), 1.0),
        torch.full((2, 3, 1, 1), 2.0),
        target,
        adversarial_weight=3,
        objective="head_distance",
        num_patches=4,
    )
    assert losses.loss.item() == pytest.approx(0 + 3 * 1)  # 1 and 2 times the target
    assert (losses.invariance.item(), losses.adversarial.item()) == pytest.approx((1, 1))
