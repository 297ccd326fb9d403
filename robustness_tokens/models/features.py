"""What "the features" of a backbone are: the paper's f, for every family.

Shapes: B images, N the sequence, P patches, D width, E projection.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration import FeatureView
from .layer_stack import vision_trunk


# The paper takes the pooled and projected embedding of CLIP, the normalised last hidden state of everything else.
_POOLED_MODEL_TYPES = {"clip", "clip_vision_model"}
_CLS_NAMES = {"cls_token", "class_embedding"}


def default_feature_view(model: nn.Module) -> FeatureView:
    """The view that the paper uses for this family: `"pooled"` for CLIP, `"cls_and_patches"` for all others."""
    model_type = getattr(getattr(vision_trunk(model), "config", None), "model_type", None)
    return "pooled" if model_type in _POOLED_MODEL_TYPES else "cls_and_patches"


def extract_features(
    model: nn.Module, pixel_values: Tensor, *, feature_view: FeatureView, **model_inputs: Any
) -> Tensor:
    """Features of normalised images, with whatever tokens are active in the model.

    ViT-MAE sees all patches, in their order, whatever its `mask_ratio`.

    Args:
        model: A transformers vision model, bare or under a classification head (the head is not run), or a two-tower
            model such as CLIPModel (the text tower is not run).
        pixel_values: (B, 3, H, W) normalised images; for SigLIP 2 also its processor's (B, P, 3 * patch_size ** 2)
            patches, with `pixel_attention_mask` and `spatial_shapes` in `model_inputs`.
        feature_view: `"cls_and_patches"`: (B, 1 + P, D), or (B, P, D) where the family has no CLS token; registers
            and a distillation token are dropped. `"cls"`: (B, D). `"patches"`: (B, P, D). `"pooled"`: (B, E), the
            projected embedding where there is a projection, else the pooler's output.
        model_inputs: Whatever else the model's forward takes.

    Returns:
        The features.

    Raises:
        ValueError: If the family has no such view, or the model is no feature extractor (a Backbone, a DPT).

    Source: section 3 of Pulfer et al., ECCV 2024, arXiv 2503.10191, and its published code.
    """
    trunk: Any = vision_trunk(model)
    if _is_timm(trunk):
        pixel_values = pixel_values.to(trunk.device, trunk.dtype)  # as its wrapper does
        hidden_states = trunk.timm_model.forward_features(pixel_values, **model_inputs)
        if feature_view == "pooled":
            pooled: Tensor = trunk.timm_model.forward_head(hidden_states, pre_logits=True)
            return pooled
        return _select_tokens(hidden_states, trunk, count_patches(trunk, pixel_values), feature_view)
    num_patches = count_patches(trunk, pixel_values)
    if _vision_config(trunk).model_type == "siglip2_vision_model" and pixel_values.dim() == 4:
        pixel_values, model_inputs = _siglip2_inputs(trunk, pixel_values, model_inputs)
    with _all_patches_in_order(trunk, pixel_values) as mae_inputs:
        forward = getattr(trunk, "get_image_features", trunk)  # two towers: the vision tower, then the projection
        output = forward(pixel_values=pixel_values, **{**mae_inputs, **model_inputs})
    if feature_view == "pooled":
        for key in ("image_embeds", "pooler_output"):
            if getattr(output, key, None) is not None:
                return getattr(output, key)
        raise ValueError(
            f'{type(trunk).__name__} has no pooled output: choose feature_view="cls_and_patches", "cls" or "patches"'
        )
    return _select_tokens(getattr(output, "last_hidden_state", None), trunk, num_patches, feature_view)


def count_patches(trunk: nn.Module, pixel_values: Tensor) -> int:
    """P, the number of patches that the model cuts these pixel values into."""
    if pixel_values.dim() == 3:
        return pixel_values.shape[1]  # patches already: SigLIP 2
    height, width = _patch_size(trunk)
    return (pixel_values.shape[-2] // height) * (pixel_values.shape[-1] // width)


def head_inputs(features: Tensor, num_patches: int) -> Tensor:
    """What a linear head reads: the CLS token beside the mean of the patches, or the mean alone without one.

    Args:
        features: (B, N, D) of the view `"cls_and_patches"` or `"patches"`; (B, D) is what a head reads already.
        num_patches: P, see [`count_patches`].

    Returns:
        (B, 2 D) or (B, D).
    """
    if features.dim() == 2:
        return features
    num_prefix = features.shape[1] - num_patches
    cls, patches = features[:, :num_prefix], features[:, num_prefix:]  # (B, 1 or 0, D), (B, P, D)
    return torch.cat([cls.flatten(1), patches.mean(dim=1)], dim=1)


def _select_tokens(hidden_states: Any, trunk: nn.Module, num_patches: int, feature_view: FeatureView) -> Tensor:
    """The wanted rows of a last hidden state (B, N, D): the CLS token comes first, the patches last."""
    name = type(trunk).__name__
    if not isinstance(hidden_states, Tensor) or hidden_states.dim() != 3:
        raise ValueError(
            f"{name} gives no last hidden state (B, N, D), so it has no features to extract: pass the headless model "
            'or a classifier on it, or choose feature_view="pooled" where there is a pooled output'
        )
    num_prefix = hidden_states.shape[1] - num_patches
    patches = hidden_states[:, num_prefix:]  # (B, P, D)
    if feature_view == "patches":
        return patches
    # Without a prefix a cls_token is a pooling head's own query (AIMv2); without that name the prefix is registers.
    has_cls = num_prefix > 0 and any(key.rpartition(".")[2] in _CLS_NAMES for key, _ in trunk.named_parameters())
    if feature_view == "cls":
        if not has_cls:
            raise ValueError(f'{name} has no CLS token: choose feature_view="cls_and_patches" or "patches"')
        return hidden_states[:, 0]
    return torch.cat([hidden_states[:, :1], patches], dim=1) if has_cls else patches  # (B, 1 + P, D) or (B, P, D)


def _is_timm(trunk: nn.Module) -> bool:
    return hasattr(trunk, "timm_model")


def _vision_config(trunk: Any) -> Any:
    """The vision half of a two-tower model's configuration, or the configuration itself."""
    return getattr(trunk.config, "vision_config", trunk.config)


def find_patch_size(trunk: Any) -> tuple[int, int] | None:
    """Height and width of a headless model's patches in pixels; None where it names none."""
    owner = trunk.timm_model.patch_embed if _is_timm(trunk) else _vision_config(trunk)
    size: Any = getattr(owner, "patch_size", None)
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _patch_size(trunk: Any) -> tuple[int, int]:
    size = find_patch_size(trunk)
    if size is None:
        raise ValueError(f"{type(trunk).__name__} names no patch size: pass the headless model or a classifier on it")
    return size


def _siglip2_inputs(trunk: nn.Module, images: Tensor, model_inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """What SigLIP 2's processor makes of images, differentiably: patches of (row, column, channel), none padded.

    Args:
        images: (B, 3, H, W).

    Returns:
        (B, P, 3 * patch_size ** 2) patches, and the inputs that go with them.
    """
    batch, channels, height, width = images.shape
    patch_height, patch_width = _patch_size(trunk)
    rows, columns = height // patch_height, width // patch_width
    images = images[..., : rows * patch_height, : columns * patch_width]  # the rest is no whole patch
    grid = images.reshape(batch, channels, rows, patch_height, columns, patch_width)
    patches = grid.permute(0, 2, 4, 3, 5, 1).reshape(batch, rows * columns, -1)  # (B, P, patch area * C)
    shapes = torch.tensor([[rows, columns]] * batch, device=images.device)
    mask = torch.ones(batch, rows * columns, dtype=torch.int32, device=images.device)
    return patches, {"pixel_attention_mask": mask, "spatial_shapes": shapes, **model_inputs}


@contextmanager
def _all_patches_in_order(trunk: Any, pixel_values: Tensor) -> Iterator[dict[str, Tensor]]:
    """ViT-MAE drops and shuffles patches at random: keeps it from either, and yields the inputs that it takes."""
    if trunk.config.model_type != "vit_mae":
        yield {}
        return
    before = trunk.config.mask_ratio
    trunk.config.mask_ratio = 0.0
    order = torch.arange(count_patches(trunk, pixel_values), dtype=torch.float32, device=pixel_values.device)
    try:
        yield {"noise": order.expand(pixel_values.shape[0], -1)}  # patches are shuffled by the rank of their noise
    finally:
        trunk.config.mask_ratio = before


def check_patches(base: nn.Module, image_shape: tuple[int, int]) -> None:
    """Refuses images that the base can't cut into patches.

    Args:
        base: Of the model; one that names no patch size is not checked.
        image_shape: Height and width in pixels.

    Raises:
        ValueError: If a side is smaller than a patch, or no multiple of it.
    """
    trunk: Any = vision_trunk(base)
    config = getattr(trunk.config, "vision_config", trunk.config)
    patch_shape = find_patch_size(trunk)
    if patch_shape is None:
        return
    # Some bases leave out a border of the size that they were made for: SigLIP has 384 pixels and patches of 14.
    own_size = getattr(config, "image_size", None)
    if image_shape in (own_size, (own_size, own_size)):
        return
    if any(side < patch or side % patch for side, patch in zip(image_shape, patch_shape, strict=True)):
        raise ValueError(
            f"the images have {image_shape[0]} x {image_shape[1]} pixels, and the patches of {type(base).__name__} "
            f"{patch_shape[0]} x {patch_shape[1]}: set image_size to a multiple of the patch size"
        )
