"""The features of a base, the paper's f, for every family.

Shapes: B images, N the sequence, P patches, D width, E projection.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration import FeatureView
from .layer_stack import headless_model, is_timm_vit, vision_config


# The paper uses the pooled, projected embedding for CLIP and the normalised last hidden state for all other families.
_POOLED_MODEL_TYPES = {"clip", "clip_vision_model"}
_CLS_NAMES = {"cls_token", "class_embedding"}


def default_feature_view(model: nn.Module) -> FeatureView:
    """Returns the paper's view for this family: `"pooled"` for CLIP, `"cls_and_patches"` for all others."""
    model_type = getattr(getattr(headless_model(model), "config", None), "model_type", None)
    return "pooled" if model_type in _POOLED_MODEL_TYPES else "cls_and_patches"


def extract_features(
    model: nn.Module, pixel_values: Tensor, *, feature_view: FeatureView, **model_inputs: Any
) -> Tensor:
    """Computes the features of normalised images, with the tokens that are active in the model.

    ViT-MAE gets all patches in order, regardless of `mask_ratio`.

    Args:
        model: A transformers vision model, bare or under a classification head (the head is not run), or a two-tower
            model such as CLIPModel (the text tower is not run).
        pixel_values: (B, 3, H, W) normalised images. SigLIP 2 also takes its processor's patches,
            (B, P, 3 * patch_size ** 2), with `pixel_attention_mask` and `spatial_shapes` in `model_inputs`.
        feature_view: `"cls_and_patches"`, `"cls"`, `"patches"` or `"pooled"`.
        model_inputs: Other arguments of the model's forward.

    Returns:
        In the model's dtype: (B, 1 + P, D) for `"cls_and_patches"`, or (B, P, D) where the family has no CLS token
        (registers and a distillation token are dropped); (B, D) for `"cls"`; (B, P, D) for `"patches"`; (B, E) for
        `"pooled"`, the projected embedding where there is a projection, else the pooler's output.

    Raises:
        ValueError: If the family has no such view, or the model returns no features (a Backbone, a DPT).

    Source: section 3 of Pulfer et al., ECCV 2024, arXiv 2503.10191, and its published code.
    """
    headless: Any = headless_model(model)
    if hasattr(headless, "timm_model"):
        pixel_values = pixel_values.to(headless.device, headless.dtype)  # as TimmWrapperModel does
        hidden_states = headless.timm_model.forward_features(pixel_values, **model_inputs)
        if feature_view == "pooled":
            pooled: Tensor = headless.timm_model.forward_head(hidden_states, pre_logits=True)
            return pooled
        return _select_tokens(hidden_states, headless, count_patches(headless, pixel_values), feature_view)
    pixel_values = pixel_values.to(headless.dtype)  # most families do it themselves, BEiT does not
    num_patches = count_patches(headless, pixel_values)
    pixel_values, siglip2_inputs = cut_for_siglip2(headless, pixel_values)
    model_inputs = {**siglip2_inputs, **model_inputs}
    with _all_patches_in_order(headless, pixel_values) as mae_inputs:
        forward = getattr(headless, "get_image_features", headless)  # two towers: vision tower and projection
        output = forward(
            pixel_values=pixel_values, **{**mae_inputs, **size_inputs(headless, pixel_values), **model_inputs}
        )
    if feature_view == "pooled":
        for key in ("image_embeds", "pooler_output"):
            if getattr(output, key, None) is not None:
                return getattr(output, key)
        raise ValueError(
            f"{type(headless).__name__} has no pooled output: choose feature_view="
            '"cls_and_patches", "cls" or "patches"'
        )
    return _select_tokens(getattr(output, "last_hidden_state", None), headless, num_patches, feature_view)


def head_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the parameters of a classifier's own head by name; none for a headless model."""
    headless: Any = headless_model(model)
    timm_model = getattr(headless, "timm_model", None)
    if timm_model is not None:  # its wrapper has the head inside
        own = {id(parameter) for parameter in timm_model.get_classifier().parameters()}
        return {name: p for name, p in model.named_parameters() if id(p) in own}
    inside = {id(parameter) for parameter in headless.parameters()}
    return {name: p for name, p in model.named_parameters() if id(p) not in inside}


def size_inputs(model: nn.Module, pixel_values: Tensor) -> dict[str, Any]:
    """Returns what a forward needs for images (B, 3, H, W) of another size than the model's: interpolated positions.

    Nothing for families without the argument: they interpolate unasked, or have positions for any size.
    """
    config, found = vision_config(headless_model(model)), tuple(pixel_values.shape[-2:])
    own = getattr(config, "image_size", None) or found
    # BEiT's relative positions fit any size, and must not be stretched over the tokens.
    is_relative = any(getattr(config, f"use_{kind}relative_position_bias", False) for kind in ("", "shared_"))
    if pixel_values.dim() != 4 or is_relative or found == ((own, own) if isinstance(own, int) else tuple(own)):
        return {}
    takes = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return {"interpolate_pos_encoding": True} if takes else {}


def count_patches(model: nn.Module, pixel_values: Tensor) -> int:
    """Returns P, the number of patches that the model cuts these pixel values into."""
    if pixel_values.dim() == 3:
        return pixel_values.shape[1]  # SigLIP 2's processor has cut them
    return math.prod(patch_grid(model, pixel_values))


def patch_grid(model: nn.Module, pixel_values: Tensor) -> tuple[int, int]:
    """Returns the rows and columns of patches that the model cuts images (B, 3, H, W) into."""
    height, width = patch_size(model)
    return pixel_values.shape[-2] // height, pixel_values.shape[-1] // width


def head_inputs(features: Tensor, num_patches: int) -> Tensor:
    """Concatenates CLS token and mean of the P patches: (B, 1 + P, D) -> (B, 2 D), (B, P, D) or (B, D) -> (B, D)."""
    if features.dim() == 2:
        return features
    num_prefix = features.shape[1] - num_patches
    cls, patches = features[:, :num_prefix], features[:, num_prefix:]  # (B, 1 or 0, D), (B, P, D)
    return torch.cat([cls.flatten(1), patches.mean(dim=1)], dim=1)


def _select_tokens(hidden_states: Any, headless: nn.Module, num_patches: int, feature_view: FeatureView) -> Tensor:
    """Selects rows of a last hidden state (B, N, D): the CLS token comes first, the patches last."""
    name = type(headless).__name__
    if not isinstance(hidden_states, Tensor) or hidden_states.dim() != 3:
        raise ValueError(
            f"{name} gives no last hidden state (B, N, D), so it has no features to extract: pass the headless model "
            'or a classifier on it, or choose feature_view="pooled" where there is a pooled output'
        )
    num_prefix = hidden_states.shape[1] - num_patches
    patches = hidden_states[:, num_prefix:]  # (B, P, D)
    if feature_view == "patches":
        return patches
    # A `cls_token` without a prefix is the query of AIMv2's pooling head; a prefix without `cls_token` is registers.
    has_cls = num_prefix > 0 and any(key.rpartition(".")[2] in _CLS_NAMES for key, _ in headless.named_parameters())
    if feature_view == "cls":
        if not has_cls:
            raise ValueError(f'{name} has no CLS token: choose feature_view="cls_and_patches" or "patches"')
        return hidden_states[:, 0]
    return torch.cat([hidden_states[:, :1], patches], dim=1) if has_cls else patches  # (B, 1 + P, D) or (B, P, D)


def patch_size(model: nn.Module) -> tuple[int, int]:
    """Returns height and width of the model's patches in pixels; `ValueError` if it names no patch size."""
    headless: Any = headless_model(model)
    vision_transformer = getattr(headless, "timm_model", headless)
    described_by = vision_transformer.patch_embed if is_timm_vit(vision_transformer) else vision_config(headless)
    size: Any = getattr(described_by, "patch_size", None)
    if size is None:
        raise ValueError(f"{type(model).__name__} names no patch size: pass the headless model or a classifier on it")
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def cut_for_siglip2(headless: Any, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Cuts (B, 3, H, W) into (B, P, 3 * patch_size ** 2) as SigLIP 2's processor does, but differentiably.

    Returns them with the mask and the grid; for other families, or what is cut already, the images as they are.
    """
    if vision_config(headless).model_type != "siglip2_vision_model" or images.dim() != 4:
        return images, {}
    (height, width), (rows, columns) = patch_size(headless), patch_grid(headless, images)
    whole = images[..., : rows * height, : columns * width]  # whole patches only
    grid = whole.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # (B, 3, rows, height, columns, width)
    patches = grid.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # (B, P, 3 * height * width)
    shapes = torch.tensor([[rows, columns]] * len(images), device=images.device)
    mask = torch.ones(patches.shape[:2], dtype=torch.int32, device=images.device)
    return patches, {"pixel_attention_mask": mask, "spatial_shapes": shapes}


@contextmanager
def _all_patches_in_order(headless: Any, pixel_values: Tensor) -> Iterator[dict[str, Tensor]]:
    """Keeps ViT-MAE from dropping and shuffling patches at random; yields the inputs for its forward."""
    if headless.config.model_type != "vit_mae":
        yield {}
        return
    before = headless.config.mask_ratio
    headless.config.mask_ratio = 0.0
    order = torch.arange(count_patches(headless, pixel_values), dtype=torch.float32, device=pixel_values.device)
    try:
        yield {"noise": order.expand(pixel_values.shape[0], -1)}  # patches are shuffled by the rank of their noise
    finally:
        headless.config.mask_ratio = before


def check_patches(base: nn.Module, image_shape: tuple[int, int]) -> None:
    """Raises `ValueError` unless height and width of the images, in pixels, are multiples of the base's patch size."""
    # Some bases cut off a border at their own image size: SigLIP's 384 pixels are no multiple of its 14.
    own_size = getattr(vision_config(headless_model(base)), "image_size", None)
    if image_shape in (own_size, (own_size, own_size)):
        return
    patch_shape = patch_size(base)
    if any(side < patch or side % patch for side, patch in zip(image_shape, patch_shape, strict=True)):
        raise ValueError(
            f"the images have {image_shape[0]} x {image_shape[1]} pixels, and the patches of {type(base).__name__} "
            f"{patch_shape[0]} x {patch_shape[1]}: set image_size to a multiple of the patch size"
        )
