import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModel

from robustness_tokens.attacks.paper import paper_attack


GOLDEN = Path(__file__).parents[1] / "integration" / "golden"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGENET: dict[str, Any] = {"image_mean": MEAN, "image_std": STD}
EPS = 8 / 255


def normalise(images: Tensor) -> Tensor:
    return (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def unnormalise(pixel_values: Tensor) -> Tensor:
    return pixel_values * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images_u8(batch_size: int = 4, size: int = 6) -> Tensor:
    return torch.randint(0, 256, (batch_size, 3, size, size), generator=seeded(0), dtype=torch.uint8)


def extremes_and_grey() -> Tensor:
    """Pixel values of two images: one with black and white, so that the batch's bounds don't bind, one grey."""
    images = torch.full((2, 3, 4, 4), 100 / 255)
    images[0, :, 0], images[0, :, 1] = 0, 1
    return normalise(images)


class LinearClassifier(nn.Module):
    """Two classes with opposite weights: the gradient's sign is known at every image."""

    def __init__(self, size: int = 6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, size, size, generator=seeded(1)))

    def forward(self, pixel_values: Tensor) -> Tensor:
        logit = (self.weight * pixel_values).flatten(1).mean(dim=1)
        return torch.stack([logit, -logit], dim=1)


@pytest.mark.parametrize("folder", ["dinov2", "dinov2_reg4"])
def test_reproduces_the_published_implementation(folder: str) -> None:
    golden = load_file(GOLDEN / folder / "golden.safetensors")
    backbone = AutoModel.from_pretrained(GOLDEN / folder).eval()
    first_patch = 1 + getattr(backbone.config, "num_register_tokens", 0)

    def features_fn(pixel_values: Tensor) -> Tensor:
        hidden_states = backbone(pixel_values=pixel_values).last_hidden_state
        return torch.cat([hidden_states[:, :1], hidden_states[:, first_patch:]], dim=1)  # (B, 1 + P, D)

    pixel_values = normalise(golden["images_u8"][:4] / 255)
    torch.testing.assert_close(features_fn(pixel_values), golden["features_base"][:4], rtol=0, atol=1e-5)
    torch.manual_seed(2)
    assert torch.equal(torch.randn_like(pixel_values), golden["attack_noise"])

    torch.manual_seed(2)
    output = paper_attack(features_fn, pixel_values, **IMAGENET)

    output_u8 = (unnormalise(output) * 255).round().to(torch.uint8)
    difference = (output_u8.int() - golden["attack_output_u8"].int()).abs()
    assert (difference == 0).float().mean() >= 0.999
    assert difference.max() <= 1
    one_level = 1 / 255 / torch.tensor(STD).view(3, 1, 1)
    assert ((output - golden["attack_output"]).abs() <= one_level + 1e-5).all()
    assert {parameter.grad for parameter in backbone.parameters()} == {None}


def test_linear_classifier_reaches_the_closed_form_on_the_8bit_grid() -> None:
    pixel_values = normalise(random_images_u8() / 255)
    model, labels = LinearClassifier(), torch.tensor([0, 1, 0, 1])
    output = paper_attack(model, pixel_values, **IMAGENET, labels=labels, generator=seeded(2))
    away = torch.where(labels == 0, -1.0, 1.0).view(-1, 1, 1, 1)
    corner = (pixel_values + EPS * away * model.weight.detach().sign()).clamp(pixel_values.min(), pixel_values.max())
    expected = (unnormalise(corner).clamp(0, 1) * 255).floor()
    # A corner that lies on the grid but for a rounding may fall to either side.
    assert ((unnormalise(output) * 255).round() == expected).float().mean() >= 0.99
    torch.testing.assert_close(unnormalise(output) * 255, expected, rtol=0, atol=1.001)


def test_squared_error_pulls_back_what_the_model_does_not_see() -> None:
    pixel_values = extremes_and_grey()

    def only_the_first_column(pixel_values: Tensor) -> Tensor:
        logit = pixel_values[..., 0].flatten(1).sum(dim=1)
        return torch.stack([logit, -logit], dim=1)

    output = paper_attack(
        only_the_first_column, pixel_values, **IMAGENET, labels=torch.tensor([1, 1]), generator=seeded(0)
    )
    moved = (unnormalise(output) - unnormalise(pixel_values))[1] * 255
    assert (moved[..., 0] > 0.5).all()
    # Noise alone would leave some of them two levels darker.
    assert (moved[..., 1:].abs() < 1.01).all()


def test_labels_make_it_climb_the_cross_entropy_and_none_lower_the_cosine() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 16), nn.GELU(), nn.Linear(16, 5))
    pixel_values = normalise(random_images_u8() / 255)
    labels = torch.arange(4)
    with torch.no_grad():
        clean = model(pixel_values)
        on_labels = model(paper_attack(model, pixel_values, **IMAGENET, labels=labels, generator=seeded(0)))
        on_features = model(paper_attack(model, pixel_values, **IMAGENET, generator=seeded(0)))
    entropies = [F.cross_entropy(logits, labels, reduction="none") for logits in (clean, on_labels, on_features)]
    cosines = [F.cosine_similarity(logits, clean) for logits in (on_labels, on_features)]
    assert (entropies[1] > entropies[0]).all()
    assert entropies[1].mean() > entropies[2].mean()
    assert cosines[1].mean() < cosines[0].mean()


def test_segmentation_labels_ignore_minus_100() -> None:
    pixel_values = extremes_and_grey()
    labels = torch.zeros(2, 4, 4, dtype=torch.long)
    labels[:, 2:] = -100
    output = paper_attack(nn.Identity(), pixel_values, **IMAGENET, labels=labels, generator=seeded(0))
    true_class = (unnormalise(output) - unnormalise(pixel_values))[1, 0] * 255  # (H, W)
    assert (true_class[:2] < -1.5).all()
    assert (true_class[2:].abs() < 1.01).all()


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 0, 1])])
def test_stays_on_the_8bit_grid_within_two_levels(labels: Tensor | None) -> None:
    images_u8 = random_images_u8()
    model = LinearClassifier() if labels is not None else nn.Flatten()
    output = paper_attack(model, normalise(images_u8 / 255), **IMAGENET, labels=labels, generator=seeded(0))
    levels = unnormalise(output) * 255
    torch.testing.assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    moved = levels.round() - images_u8
    assert moved.abs().max() == 2
    assert moved.max() == 1
    assert levels.round().min() >= 0
    assert levels.round().max() <= 255


def test_images_off_the_8bit_grid_can_move_by_another_level() -> None:
    images = (random_images_u8() / 255 + 0.75 / 255).clamp(0, 1)
    output = paper_attack(LinearClassifier(), normalise(images), **IMAGENET, labels=torch.tensor([0, 1, 0, 1]))
    moved = (unnormalise(output) - images).abs().max() * 255
    assert 2 < moved < EPS * max(STD) * 255 + 1


def test_bounds_depend_on_the_batch() -> None:
    grey = torch.full((1, 3, 6, 6), 128 / 255)
    wide = torch.cat([grey, torch.rand(1, 3, 6, 6, generator=seeded(3))])
    model = LinearClassifier()
    narrow, beside_wide = (
        paper_attack(
            model,
            normalise(images),
            **IMAGENET,
            labels=torch.zeros(len(images), dtype=torch.long),
            generator=[seeded(i) for i in range(len(images))],
        )[0]
        for images in (grey, wide)
    )
    # Grey's own extremes are those of its channels: red's 128 is the least number, so it can't go down alone.
    red_alone, red_beside = (unnormalise(output)[0] * 255 for output in (narrow, beside_wide))
    assert red_alone.min() >= 127 - 1e-3
    assert red_beside.min() == pytest.approx(126, abs=1e-3)


def test_one_generator_per_image_belongs_to_the_image() -> None:
    starts: list[Tensor] = []

    def record(pixel_values: Tensor) -> Tensor:
        if pixel_values.requires_grad:
            starts.append(pixel_values.detach().clone())
        return pixel_values.flatten(1)

    pixel_values = normalise(random_images_u8() / 255)
    paper_attack(record, pixel_values, **IMAGENET, num_steps=1, generator=[seeded(i) for i in range(4)])
    paper_attack(record, pixel_values[2:], **IMAGENET, num_steps=1, generator=[seeded(i) for i in (2, 3)])
    whole, part = starts
    assert torch.equal(whole[2:], part)
    noise = torch.stack([torch.randn(3, 6, 6, generator=seeded(i)) for i in range(4)])
    assert torch.equal(whole, pixel_values + 0.01 * noise)


def test_generator_makes_the_result_reproducible() -> None:
    pixel_values = normalise(random_images_u8() / 255)
    first, again, other = (
        paper_attack(nn.Flatten(), pixel_values, **IMAGENET, generator=seeded(seed)) for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_ends_early_once_the_squared_error_is_reached() -> None:
    pixel_values = normalise(random_images_u8() / 255)
    model, calls = LinearClassifier(), 0

    def count(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return model(x)

    labels = torch.tensor([0, 1, 0, 1])
    paper_attack(count, pixel_values, **IMAGENET, labels=labels, eps=1.0, num_steps=30, generator=seeded(0))
    # After t steps of .01 the error is (t^2 + 1) * 1e-4 * mean(std^2) = (t^2 + 1) * 5.07e-6: 8.6e-5 after 4 steps and
    # 1.3e-4 after 5. It is that of the iterate before a step, so the sixth is still made.
    assert calls == 6
    calls = 0
    paper_attack(count, pixel_values, **IMAGENET, labels=labels, num_steps=30, generator=seeded(0))
    assert calls == 30


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients_get_the_same_attack(context: Callable[[], Any]) -> None:
    model, labels = LinearClassifier(), torch.tensor([0, 1, 0, 1])
    pixel_values = normalise(random_images_u8() / 255)
    expected = paper_attack(model, pixel_values, **IMAGENET, labels=labels, generator=seeded(0))
    with context():
        inside, labels = pixel_values + 0, labels + 0
        output = paper_attack(model, inside, **IMAGENET, labels=labels, generator=seeded(0))
    assert torch.equal(output, expected)
    assert not output.is_inference()


def test_model_and_pixel_values_stay_as_they_were() -> None:
    model = LinearClassifier().train()
    model.weight.grad = torch.ones_like(model.weight)
    pixel_values = normalise(random_images_u8() / 255).requires_grad_()
    kept = pixel_values.detach().clone()
    output = paper_attack(model, pixel_values, **IMAGENET, labels=torch.zeros(4, dtype=torch.long))
    assert torch.equal(pixel_values, kept)
    assert pixel_values.grad is None
    assert pixel_values.requires_grad
    assert not output.requires_grad
    assert torch.equal(model.weight.grad, torch.ones_like(model.weight))
    assert model.weight.requires_grad
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_mean": [0.5]}, r"image_mean must hold one number per channel, 3, got \[0.5\]"),
        ({"image_std": [0.5] * 4}, "image_std must hold one number per channel, 3, got"),
        ({"image_std": [0.2, 0.0, 0.2]}, r"image_std must be above 0, got \[0.2, 0.0, 0.2\]"),
        ({"image_std": [1.0] * 3}, "unnormalised they go from -1.6"),
        ({"pixel_values": torch.zeros(3, 6, 6)}, r"pixel_values must have shape \(B, C, H, W\), got \(3, 6, 6\)"),
        ({"pixel_values": torch.zeros(0, 3, 6, 6)}, "pixel_values must hold at least one image"),
        (
            {"pixel_values": torch.zeros(1, 3, 6, 6).half()},
            "pixel_values must be float32 or float64, got torch.float16",
        ),
        ({"pixel_values": torch.full((1, 3, 6, 6), math.nan)}, "unnormalised they go from nan to nan"),
        ({"eps": -0.1}, "eps must be .* at least 0, got -0.1"),
        ({"step_size": 0.0}, "step_size must be .* above 0, got 0.0"),
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1, got 0"),
        ({"generator": [torch.Generator()]}, "generator must hold one generator per image, 4, got 1"),
        ({"model_fn": lambda x: x.flatten(1).detach()}, "model_fn has no gradient with respect to the images"),
        ({"model_fn": lambda x: x.flatten(1) * math.nan}, "model_fn must return finite outputs, .* step 0 is nan"),
    ],
)
def test_bad_input_is_refused(arguments: dict[str, Any], message: str) -> None:
    pixel_values = normalise(torch.cat([torch.zeros(1, 3, 6, 6), torch.ones(3, 3, 6, 6)]))
    good = {"model_fn": nn.Flatten(), "pixel_values": pixel_values, **IMAGENET}
    with pytest.raises(ValueError, match=message):
        paper_attack(**(good | arguments))
