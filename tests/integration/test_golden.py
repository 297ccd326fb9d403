"""Parity with what the published implementation computes, see `golden/`."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from robustness_tokens.attacks.objectives import cosine_similarity
from robustness_tokens.attacks.paper import paper_attack
from robustness_tokens.data.preprocessing import Normalizer
from robustness_tokens.models.modeling import RobustnessTokenModel
from robustness_tokens.models.onednn import onednn_products
from robustness_tokens.training.losses import robustness_loss


GOLDEN = Path(__file__).parent / "golden"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH_SIZE = 4

Golden = tuple[RobustnessTokenModel, dict[str, Tensor], Tensor]


@pytest.fixture(params=["dinov2", "dinov2_reg4"])
def golden(request: pytest.FixtureRequest) -> Golden:
    """The model with the golden starting tokens, the golden tensors, and the images as pixel values."""
    tensors = load_file(GOLDEN / request.param / "golden.safetensors")
    model = RobustnessTokenModel.from_base(GOLDEN / request.param)
    with torch.no_grad():
        model.robustness_tokens.copy_(tensors["tokens"][0])
    return model, tensors, Normalizer(MEAN, STD)(tensors["images_u8"] / 255)


def test_features_without_tokens(golden: Golden) -> None:
    model, tensors, pixel_values = golden
    with torch.no_grad(), model.disable_adapter():
        features = model.get_features(pixel_values)
    torch.testing.assert_close(features, tensors["features_base"], rtol=0, atol=1e-5)


def test_features_with_tokens(golden: Golden) -> None:
    model, tensors, pixel_values = golden
    with torch.no_grad():
        features = model.get_features(pixel_values)
    torch.testing.assert_close(features, tensors["features_tokens"], rtol=0, atol=1e-5)
    assert (features - tensors["features_base"]).abs().max() > 1e-3  # else the test above says nothing of the tokens


def test_the_attack_on_the_hooked_base(golden: Golden) -> None:
    model, tensors, pixel_values = golden
    torch.manual_seed(2)
    with model.disable_adapter():
        attacked = paper_attack(model.get_features, pixel_values[:BATCH_SIZE], image_mean=MEAN, image_std=STD)
    attacked_u8 = (Normalizer(MEAN, STD).inverse(attacked) * 255).round().to(torch.uint8)
    difference = (attacked_u8.int() - tensors["attack_output_u8"].int()).abs()
    assert (difference == 0).float().mean() >= 0.999
    assert difference.max() <= 1


@pytest.mark.parametrize(
    ("products", "reuses_target"), [(nullcontext, False), (onednn_products, True)], ids=["as published", "faster"]
)
def test_five_training_steps(
    golden: Golden, products: Callable[[Any], AbstractContextManager[None]], reuses_target: bool
) -> None:
    model, tensors, pixel_values = golden
    optimizer = torch.optim.Adam([model.robustness_tokens], lr=1e-3)
    trajectory = []
    torch.manual_seed(3)
    for batch in pixel_values.split(BATCH_SIZE):
        with model.disable_adapter():
            with torch.no_grad():
                target = model.get_features(batch)
            given = target if reuses_target else None
            with products(model.get_base_model()):
                attacked = paper_attack(model.get_features, batch, target=given, image_mean=MEAN, image_std=STD)
            with torch.no_grad():
                baseline = cosine_similarity(model.get_features(attacked), target).mean()
        losses = robustness_loss(model.get_features, batch, attacked, target)
        optimizer.zero_grad()
        losses.loss.backward()
        optimizer.step()
        trajectory.append(torch.stack([losses.invariance, losses.adversarial, baseline]).detach())
    assert len(trajectory) == 5
    torch.testing.assert_close(torch.stack(trajectory), tensors["train_trajectory"], rtol=0, atol=1e-4)
    tokens = model.robustness_tokens.detach()
    torch.testing.assert_close(tokens, tensors["tokens_after_training"].view_as(tokens), rtol=0, atol=1e-4)
    # Five steps of 1e-3 move the tokens by far more than the tolerance.
    assert (tokens - tensors["tokens"][0]).abs().max() > 3e-3
