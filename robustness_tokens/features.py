"""What "the features" of a backbone are: the paper's f, for every family.

Shapes: B images, N the sequence, P patches, D width, E projection.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .backbones import vision_trunk
from .configuration import FeatureView


# The paper takes the pooled and projected embedding of CLIP, the normalised last hidden state of everything else.
_POOLED_MODEL_TYPES = {"clip", "clip_vision_model"}


def default_feature_view(model: nn.Module) -> FeatureView:
    """The view that the paper uses for this family: `"pooled"` for CLIP, `"cls_and_patches"` for all others."""
    model_type = getattr(getattr(vision_trunk(model), "config", None), "model_type", None)
    return "pooled" if model_type in _POOLED_MODEL_TYPES else "cls_and_patches"


def extract_features(model: nn.Module, pixel_values: Tensor, *, feature_view: FeatureView) -> Tensor:
    """Features of normalised images, with whatever tokens are active in the model.

    Args:
        model: A transformers vision model, bare or under a classification head (the head is not run).
        pixel_values: (B, 3, H, W) normalised images, or what the family takes instead.
        feature_view: `"cls_and_patches"`: (B, 1 + P, D), or (B, P, D) where the family has no CLS token; registers
            and a distillation token are dropped. `"cls"`: (B, D). `"patches"`: (B, P, D). `"pooled"`: (B, E), the
            projected embedding where there is a projection, else the pooler's output.

    Returns:
        The features.

    Raises:
        ValueError: If the family has no such view.
    """
    trunk = vision_trunk(model)
    return select_view(trunk(pixel_values=pixel_values), trunk, pixel_values, feature_view=feature_view)


def select_view(output: Any, trunk: nn.Module, pixel_values: Tensor, *, feature_view: FeatureView) -> Tensor:
    """The features in a headless model's output; see [`extract_features`]."""
    name = type(trunk).__name__
    if feature_view == "pooled":
        for key in ("image_embeds", "pooler_output"):
            if getattr(output, key, None) is not None:
                return getattr(output, key)
        raise ValueError(f'{name} has no pooled output: choose feature_view="cls_and_patches", "cls" or "patches"')
    hidden_states = getattr(output, "last_hidden_state", None)
    if hidden_states is None or hidden_states.dim() != 3:
        raise ValueError(f'{name} has no last hidden state (B, N, D): choose feature_view="pooled"')
    patches = hidden_states[:, hidden_states.shape[1] - count_patches(trunk, pixel_values) :]  # (B, P, D)
    has_cls = any(key.rpartition(".")[2] in _CLS_NAMES for key, _ in trunk.named_parameters())
    if feature_view == "patches":
        return patches
    if feature_view == "cls":
        if not has_cls:
            raise ValueError(f'{name} has no CLS token: choose feature_view="cls_and_patches" or "patches"')
        return hidden_states[:, 0]
    if not has_cls:
        return patches
    return torch.cat([hidden_states[:, :1], patches], dim=1)  # (B, 1 + P, D)


_CLS_NAMES = {"cls_token", "class_embedding"}


def count_patches(trunk: nn.Module, pixel_values: Tensor) -> int:
    """P, the number of patches that the model cuts these pixel values into."""
    if pixel_values.dim() == 3:
        return pixel_values.shape[1]  # patches already: SigLIP 2
    timm_model = getattr(trunk, "timm_model", None)
    size: Any = timm_model.patch_embed.patch_size if timm_model is not None else trunk.config.patch_size  # type: ignore[union-attr]
    height, width = (size, size) if isinstance(size, int) else size
    return (pixel_values.shape[-2] // height) * (pixel_values.shape[-1] // width)
