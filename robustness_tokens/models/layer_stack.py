"""Finds the layers of a vision transformer of any family, its width, and its fingerprint."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils.modeling import get_state_dict_offloaded_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..configuration import check_same_base


# Rounding float32 to these is deterministic, so their digests identify a base in all three dtypes.
_FINGERPRINT_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class LayerStack:
    """The layers that the tokens pass through."""

    owner: nn.Module  # runs the layers, and records their hidden states and attentions
    layers: nn.ModuleList | nn.Sequential  # first to last; each maps (B, N, D) to (B, N, D)
    hidden_size: int  # D
    attention_class: type[nn.Module] | None  # of the attention modules, where transformers names it
    is_timm: bool  # the owner is a timm model, inside a wrapper of transformers


def find_layer_stack(model: nn.Module) -> LayerStack:
    """Returns the first stack of vision transformer layers in a model; `ValueError` if it is hierarchical or missing.

    transformers models name the class of their layers in `_can_record_outputs`; timm models call them `blocks`.
    """
    owners: dict[str, nn.Module] = {"": model}
    for name, module in model.named_modules():
        if is_timm_vit(module):
            _check_alike(module.blocks, model)
            return LayerStack(module, module.blocks, module.embed_dim, None, True)
        owners[name] = module if isinstance(module, PreTrainedModel) else owners[name.rpartition(".")[0]]
        owner = owners[name]
        if not (isinstance(module, nn.ModuleList) and len(module) and isinstance(owner, PreTrainedModel)):
            continue
        layer_class = _recorded_class(owner, "hidden_states")
        if owner.main_input_name == "pixel_values" and layer_class and all(isinstance(m, layer_class) for m in module):
            _check_alike(module, model)
            hidden_size = getattr(owner.config, "hidden_size", None)
            if not isinstance(hidden_size, int):
                raise ValueError(f"{type(model).__name__} has no single hidden_size: robustness tokens need one width")
            return LayerStack(owner, module, hidden_size, _recorded_class(owner, "attentions"), False)
    raise ValueError(
        f"no stack of vision transformer layers found in {type(model).__name__}: robustness tokens need layers that "
        "hand one sequence (B, N, D) from the first to the last, as in ViT, DINOv2 or CLIP's vision model of "
        "transformers, and VisionTransformer or Eva of timm; text models, convolutional networks, and layers that "
        "pass feature maps on (ViTDet) have none, and programs that were exported, scripted or traced have no layers "
        "left: put tokens in before"
    )


def base_fingerprint(model: nn.Module, dtypes: Mapping[str, torch.dtype] = _FINGERPRINT_DTYPES) -> dict[str, str]:
    """Returns digests of a base's first and last layer, equal under any head, in a DPT, and in half precision.

    Each is a sha256 of the tensors' names in the stack, their shapes, and their values rounded to bfloat16 or float16,
    by name of that dtype. A model in half precision has a digest for its own dtype only.
    """
    layers = find_layer_stack(model).layers
    tensors: dict[str, Tensor] = {}
    for index in sorted({0, len(layers) - 1}):
        tensors |= {f"{index}.{name}": tensor for name, tensor in sorted(layers[index].state_dict().items())}
    if any(tensor.is_meta for tensor in layers.parameters()) and any(hasattr(m, "_hf_hook") for m in layers.modules()):
        offloaded = get_state_dict_offloaded_model(layers)
        tensors = {name: offloaded.get(name, tensor) for name, tensor in tensors.items()}
    if any(not isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise ValueError(
            f"{type(model).__name__} is quantised, so its weights can't be compared: put the tokens in first and "
            "quantise then, or pass ignore_base_mismatch=True if you know that it is the same base"
        )
    floating = {t.dtype for t in tensors.values() if t.is_floating_point()}
    if any(tensor.is_meta for tensor in tensors.values()):
        raise ValueError("the base's weights are on the meta device: load it without offloading to fingerprint it")
    digests = {}
    for dtype_name, dtype in dtypes.items():
        if any(held.itemsize <= 2 and held != dtype for held in floating):
            continue  # already rounded to another half precision
        digest = hashlib.sha256()
        for name, tensor in tensors.items():
            value = tensor.detach().to(device="cpu", dtype=dtype if tensor.is_floating_point() else tensor.dtype)
            digest.update(f"{name}:{tuple(tensor.shape)}:".encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        digests[dtype_name] = digest.hexdigest()
    return digests


def check_base(model: nn.Module, expected: Mapping[str, str], *, expected_name: str, made: str, fix: str) -> None:
    """Raises `ValueError` unless the model's base has the expected fingerprint, see [`check_same_base`]."""
    found: dict[str, str] = {}
    for name, dtype in _FINGERPRINT_DTYPES.items():
        if name in expected and not found:  # one is enough, and each takes time
            found = base_fingerprint(model, {name: dtype})
    check_same_base(
        found,
        expected,
        found_name=f"{type(model).__name__} {getattr(getattr(model, 'config', None), 'name_or_path', '')!r}",
        expected_name=expected_name,
        made=made,
        fix=f"{fix}, or pass ignore_base_mismatch=True if you know that they are the same",
    )


def headless_model(model: nn.Module) -> nn.Module:
    """Returns the headless model inside a classifier (`classifier.dinov2`), or the model itself if it has no head."""
    if hasattr(model, "visual_projection") or hasattr(model, "get_image_features"):
        return model  # it projects the vision tower's output to the embedding (CLIP, SigLIP)
    for name in (getattr(model, "base_model_prefix", ""), "vision_model"):  # CLIP's classifier has the latter
        base = getattr(model, name, None) if name else None
        # DINOv3's `model` is its bare encoder, which takes no images.
        if isinstance(base, PreTrainedModel) and "pixel_values" in inspect.signature(base.forward).parameters:
            return headless_model(base)
    return model


def vision_config(model: Any) -> Any:
    """Returns the vision config of a two-tower model, or a model's only config."""
    return getattr(model.config, "vision_config", model.config)


def square_size(size: Any) -> int | None:
    """Returns the side of a square size, given as a number or a pair; None if it is None or not square."""
    if isinstance(size, list | tuple):
        return size[0] if len(set(size)) == 1 else None
    return size


def _recorded_class(owner: PreTrainedModel, key: str) -> type[nn.Module] | None:
    """Returns the module class whose outputs transformers records as `key`: "hidden_states" or "attentions"."""
    spec = (owner._can_record_outputs or {}).get(key)
    spec = spec[0] if isinstance(spec, list) else spec
    return spec if isinstance(spec, type) else getattr(spec, "target_class", None)


def is_timm_vit(module: nn.Module) -> bool:
    """Tells whether a module is timm's plain vision transformer, by name: timm need not be installed."""
    return any(
        base.__module__.startswith("timm.") and base.__name__ in ("VisionTransformer", "Eva")
        for base in type(module).__mro__
    )


def _check_alike(layers: nn.ModuleList | nn.Sequential, model: nn.Module) -> None:
    # Quantised layers hold more than tensors.
    first, last = ({n: getattr(t, "shape", None) for n, t in layers[i].state_dict().items()} for i in (0, -1))
    if first != last:
        raise ValueError(
            f"{type(model).__name__} is hierarchical (its first and last stage differ in shape): robustness tokens "
            "live in one sequence of one width from the first layer to the last; use a plain ViT such as DINOv2"
        )
