"""Tiny random bases of three families, the same at each call."""

from typing import Any

import torch
from torch import Tensor
from transformers import (
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from robustness_tokens.models import RobustnessTokenModel


IMAGE_SIZE, HIDDEN_SIZE, NUM_TOKENS, NUM_LABELS = 16, 32, 3, 5

# Packing weights needs the instructions; computing in bfloat16 does not.
ONEDNN_BFLOAT16: bool = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


FAMILIES: dict[str, tuple[Any, Any, Any]] = {
    "vit": (ViTConfig, ViTModel, ViTForImageClassification),
    "dinov2": (Dinov2Config, Dinov2Model, Dinov2ForImageClassification),
    "dinov2_with_registers": (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        Dinov2WithRegistersForImageClassification,
    ),
}


def build_base(family: str, *, classifier: bool = False, **overrides: Any) -> Any:
    """Returns a tiny base, the same at each call; its dropout shows if it is left in training mode."""
    config_class, model_class, classifier_class = FAMILIES[family]
    sizes: dict[str, Any] = {"image_size": IMAGE_SIZE, "patch_size": 8, "hidden_size": HIDDEN_SIZE}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4, "num_labels": NUM_LABELS, "initializer_range": 0.2}
    sizes |= {"hidden_dropout_prob": 0.3}
    if family == "vit":
        sizes["intermediate_size"] = 64
    else:
        sizes |= {"mlp_ratio": 2, "drop_path_rate": 0.3}
    with torch.random.fork_rng():
        torch.manual_seed(1 + list(FAMILIES).index(family))
        model = (classifier_class if classifier else model_class)(config_class(**{**sizes, **overrides}))
    return model.eval()


def input_gradient(model: RobustnessTokenModel, pixel_values: Tensor) -> Tensor:
    """Returns the gradient of a weighted sum of the features, (B, 3, H, W)."""
    pixel_values = pixel_values.clone().requires_grad_()
    features = model.get_features(pixel_values)
    weights = torch.linspace(-1, 1, features.numel()).view_as(features)
    return torch.autograd.grad((weights * features).sum(), pixel_values)[0]
