"""Turns tokens into native register tokens, in a plain checkpoint that needs no add-on; and extracts them again.

The base's family needs a class with registers. Registers have no positions, and attention ignores order, so tokens
have the same effect after the CLS token as before it.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..configuration import TOKENS
from ..utils import check_finite, check_int
from .features import patch_size
from .gains_and_shifts import fold
from .injection import active_injector, remove_tokens
from .layer_stack import find_layer_stack, square_size


logger = logging.getLogger(__name__)

# Class -> its equivalent with registers; by name, since not every supported release of transformers has all of them.
_REGISTER_CLASSES = {
    "Dinov2Model": "Dinov2WithRegistersModel",
    "Dinov2ForImageClassification": "Dinov2WithRegistersForImageClassification",
    "Dinov2Backbone": "Dinov2WithRegistersBackbone",
    "Dinov2WithRegistersModel": "Dinov2WithRegistersModel",
    "Dinov2WithRegistersForImageClassification": "Dinov2WithRegistersForImageClassification",
    "Dinov2WithRegistersBackbone": "Dinov2WithRegistersBackbone",
    "DINOv3ViTModel": "DINOv3ViTModel",
    "DINOv3ViTBackbone": "DINOv3ViTBackbone",
}
_TIMM_WRAPPERS = ("TimmWrapperModel", "TimmWrapperForImageClassification")
# timm's own classes only: their subclasses (distilled, hybrid, ...) may accept the argument and ignore it.
_TIMM_REGISTER_ARGUMENTS = {"VisionTransformer": "reg_tokens", "Eva": "num_reg_tokens"}

_REGISTER_NAMES = ("register_tokens", "reg_token")

_ALTERNATIVES = (
    "ship the adapter instead (save_pretrained, then from_pretrained or inject_tokens), or export the model with its "
    "tokens to ONNX (robustness_tokens.export_onnx)"
)


def merge(model: PreTrainedModel, *, image_size: int | None = None) -> PreTrainedModel:
    """Returns a plain copy of a model, in eval mode, with its robustness tokens as its last K registers.

    Gains and shifts are folded into its weights. Position embeddings are stored as the model resamples them for images
    of `image_size` pixels.
    """
    state = active_injector(model, to="merge").active_state
    check_finite("refusing to merge tokens", state)
    tokens, gains_and_shifts = state.pop(TOKENS).detach(), state
    name = type(model).__name__
    if tokens.dim() == 3 and tokens.shape[1] > 0:
        raise ValueError(
            f"tokens in the first {len(tokens)} layers can't be merged, since registers enter before the first layer "
            f"and stay to the last: {_ALTERNATIVES}"
        )
    if gains_and_shifts or tokens.numel() == 0:
        model = copy.deepcopy(model)
        fold(model, find_layer_stack(model), gains_and_shifts)
    if tokens.numel() == 0:
        if image_size is not None:
            _check_image_size(image_size, model)  # the positions stay, and are resampled as before
        plain = remove_tokens(model).requires_grad_(True)
        plain.config.name_or_path = ""
    elif name in _TIMM_WRAPPERS:
        plain = _merge_timm(model, tokens, image_size)
    elif name in _REGISTER_CLASSES:
        plain = _merge_transformers(model, tokens, image_size)
    else:
        raise ValueError(
            f"{name} has no native registers for the tokens to become (DINOv2, DINOv3 and timm's VisionTransformer "
            f"and Eva have): {_ALTERNATIVES}"
        )
    logger.warning(
        "The merged model holds what the adapter learned, the secret of the defence: whoever has its file can attack "
        "through it."
    )
    return plain


def extract_tokens(plain: nn.Module, *, num_robustness_tokens: int = 10) -> Tensor:
    """Returns the tokens that `merge_and_unload` put into a plain model: the last K of its registers.

    Args:
        plain: A merged model, bare or under its head.
        num_robustness_tokens: K, at least 1; registers before the last K are the base's own.

    Returns:
        (K, D) float32 on the CPU; bit-equal to the tokens that were merged if the base was float32.

    Raises:
        ValueError: If the model has fewer than K registers, or K is below 1.
    """
    check_int("num_robustness_tokens", num_robustness_tokens, 1)
    registers = next((p for n, p in plain.named_parameters() if n.rpartition(".")[2] in _REGISTER_NAMES), None)
    found = 0 if registers is None else registers.shape[1]
    if registers is None or found < num_robustness_tokens:
        raise ValueError(
            f"{type(plain).__name__} has {found} registers, expected at least num_robustness_tokens="
            f"{num_robustness_tokens}: pass the number that was merged, and a model that merge_and_unload() made"
        )
    return registers[0, -num_robustness_tokens:].detach().to("cpu", torch.float32).clone()  # (K, D)


def _merge_transformers(model: PreTrainedModel, tokens: Tensor, image_size: int | None) -> PreTrainedModel:
    register_class: Any = getattr(transformers, _REGISTER_CLASSES[type(model).__name__])
    changes_class = register_class is not type(model)
    if changes_class:
        dropped = ("model_type", "architectures", "transformers_version", "use_mask_token")
        settings = {key: value for key, value in model.config.to_dict().items() if key not in dropped}
        config = register_class.config_class.from_dict(settings)
        config._attn_implementation = model.config._attn_implementation
    else:
        config = copy.deepcopy(model.config)
    if image_size is not None:
        _check_image_size(image_size, model)
        config.image_size = image_size

    state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    stem = next(name for name in state if name.endswith("embeddings.cls_token")).removesuffix("cls_token")
    registers = state.get(f"{stem}register_tokens", tokens.new_empty(1, 0, tokens.shape[1]))
    tokens = tokens.to(state[f"{stem}cls_token"])
    state[f"{stem}register_tokens"] = torch.cat([registers.to(tokens), tokens[None]], dim=1)  # (1, R + K, D)
    config.num_register_tokens = registers.shape[1] + tokens.shape[0]
    # The class with registers requires a mask token, DINOv2 may lack it. Only masked patches use it.
    state.setdefault(f"{stem}mask_token", tokens.new_zeros(1, tokens.shape[1]))
    if f"{stem}position_embeddings" in state:
        size = square_size(config.image_size)
        if size is None:
            raise ValueError(f"{type(model).__name__} names no square image_size: pass image_size= in pixels")
        embeddings: Any = model.get_submodule(stem.removesuffix("."))
        height, width = (size // side for side in patch_size(model))
        sequence = tokens.new_empty(1, 1 + height * width, tokens.shape[1])  # only its shape matters
        with torch.no_grad():
            positions = embeddings.interpolate_pos_encoding(sequence, size, size)  # (1, 1 + P, D)
        state[f"{stem}position_embeddings"] = positions.detach().clone()
        if changes_class or size != square_size(model.config.image_size):
            _warn_of_other_sizes(size)

    old, new = f"{type(model).base_model_prefix}.", f"{register_class.base_model_prefix}."
    state = {new + name.removeprefix(old) if name.startswith(old) else name: t for name, t in state.items()}
    return _fill(register_class(config), state, model)


def _merge_timm(model: PreTrainedModel, tokens: Tensor, image_size: int | None) -> PreTrainedModel:
    timm_model: Any = model.timm_model
    name = type(timm_model).__name__
    if name not in _TIMM_REGISTER_ARGUMENTS:
        raise ValueError(f"timm's {name} has no registers for the tokens to become: {_ALTERNATIVES}")
    if not isinstance(timm_model.norm_pre, nn.Identity):
        raise ValueError(
            f"this {name} normalises its sequence with its registers before the first layer, and the tokens enter "
            f"after that, so no register can hold them: {_ALTERNATIVES}"
        )
    # Eva lacks this setting: its attention pooling always sees the prefix.
    if getattr(timm_model, "pool_include_prefix", timm_model.attn_pool is not None):
        raise ValueError(f"this {name} pools over its registers, so its head would see the tokens: {_ALTERNATIVES}")

    state = {key: tensor.detach().clone() for key, tensor in model.state_dict().items()}
    registers = state.get("timm_model.reg_token", tokens.new_empty(1, 0, tokens.shape[1]))
    tokens = tokens.to(next(timm_model.parameters()))
    state["timm_model.reg_token"] = torch.cat([registers.to(tokens), tokens[None]], dim=1)  # (1, R + K, D)
    positions = state.get("timm_model.pos_embed")
    if positions is not None and not timm_model.no_embed_class:
        prefix, patches = positions.tensor_split([timm_model.num_prefix_tokens], dim=1)
        state["timm_model.pos_embed"] = torch.cat([prefix, torch.zeros_like(tokens)[None], patches], dim=1)

    config: Any = copy.deepcopy(model.config)
    count = registers.shape[1] + tokens.shape[0]
    own_size = tuple(timm_model.patch_embed.img_size)  # the config's is stale after set_input_size()
    config.model_args = {**(config.model_args or {}), "img_size": own_size, _TIMM_REGISTER_ARGUMENTS[name]: count}
    plain = _fill(type(model)(config), state, model)
    if image_size is not None and (image_size, image_size) != own_size:
        _check_image_size(image_size, model)
        plain_timm: Any = plain.timm_model
        plain_timm.set_input_size((image_size, image_size))
        config.model_args["img_size"] = (image_size, image_size)
        if isinstance(data := getattr(config, "pretrained_cfg", None), dict):
            config.pretrained_cfg = {**data, "input_size": [timm_model.in_chans, image_size, image_size]}
        if positions is not None and timm_model.dynamic_img_size:  # otherwise timm refuses other sizes
            _warn_of_other_sizes(image_size)
    return plain


def _fill(plain: PreTrainedModel, state: dict[str, Tensor], model: PreTrainedModel) -> PreTrainedModel:
    # Assigned, not copied, so that each tensor keeps its dtype; unsaved buffers get the model's.
    plain.load_state_dict(state, strict=True, assign=True)
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
    for name, buffer in plain.named_buffers():
        buffer.data = buffer.to(dtypes.get(name, buffer.dtype))
    plain.config.name_or_path = ""
    return plain.to(model.device).eval()  # type: ignore[arg-type]


def _check_image_size(image_size: int, model: PreTrainedModel) -> None:
    patches = patch_size(model)
    if image_size < 1 or any(image_size % side for side in patches):
        raise ValueError(f"image_size must be a multiple of the patch size {patches} in pixels, got {image_size}")


def _warn_of_other_sizes(image_size: int) -> None:
    logger.warning(
        "The merged model equals this one on images of %d x %d pixels only: it resamples its positions differently. "
        "Merge again with image_size= for another size.",
        image_size,
        image_size,
    )
