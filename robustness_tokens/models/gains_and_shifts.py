"""Gains and shifts beside the tokens: differences to the norms, linear layers and patch embedding of a frozen base.

Hooks add them to the outputs of the base's modules, whose weights stay as they are: a norm gives
`y * (1 + gain) + shift` (no shift if it has no bias), a LayerScale `y * (1 + gain)`, a linear layer that has a bias
`y * (1 + gain) + shift`, the patch embedding `y` plus what it computes with the differences of its weight and bias.
Differences of all layers are stacked in one tensor: L layers, D width.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configuration import GainsAndShifts
from .layer_stack import LayerStack


PATCH_EMBEDDING = "patch_embedding"


@dataclass(frozen=True)
class AdaptedModule:
    """A module of the base, the same in each layer, and the tensors of one kind that change its output."""

    name: str  # inside the layer, such as "norm1"
    kind: GainsAndShifts
    modules: tuple[nn.Module, ...]  # one per layer; the patch embedding alone
    shapes: dict[str, tuple[int, ...]]  # by the tensors' names, such as {"norm1.gain": (L, D), "norm1.shift": (L, D)}


def find_adapted_modules(model: nn.Module, stack: LayerStack) -> list[AdaptedModule]:
    """Returns all modules of a base that can have gains and shifts, in its order."""
    return list(_adapted_modules(model, stack))


def check_adapted_modules(model: nn.Module, stack: LayerStack, kinds: Collection[str]) -> list[AdaptedModule]:
    """Returns the modules of these kinds; `ValueError` for a kind that the base lacks."""
    found = find_adapted_modules(model, stack)
    held = [kind for kind in get_args(GainsAndShifts) if any(module.kind == kind for module in found)]
    if missing := [kind for kind in kinds if kind not in held]:
        raise ValueError(
            f"{type(model).__name__} has no modules for gains_and_shifts={missing}: choose among {held} for this base"
        )
    return [module for module in found if module.kind in kinds]


def kinds_of(model: nn.Module, stack: LayerStack, names: Iterable[str]) -> list[GainsAndShifts]:
    """Returns the kinds of the gains and shifts of these names."""
    found = {
        module.kind for module in find_adapted_modules(model, stack) if not module.shapes.keys().isdisjoint(names)
    }
    return [kind for kind in get_args(GainsAndShifts) if kind in found]


def _adapted_modules(model: nn.Module, stack: LayerStack) -> Iterator[AdaptedModule]:
    layers = list(stack.layers)
    for name, module in layers[0].named_modules():
        own = dict(module.named_parameters(recurse=False))
        modules = tuple(layer.get_submodule(name) for layer in layers)
        # Some of timm's attentions read the weight of a linear layer without a bias and never call it.
        if isinstance(module, nn.Linear) and module.bias is not None:
            shape = (len(layers), module.out_features)
            yield AdaptedModule(name, "linear", modules, {f"{name}.gain": shape})
            yield AdaptedModule(name, "bias", modules, {f"{name}.shift": shape})
        elif own and not list(module.children()) and all(parameter.dim() == 1 for parameter in own.values()):
            # LayerNorm, RMSNorm and LayerScale of any library.
            width = next(iter(own.values())).shape[0]
            kinds = ("gain", "shift") if "bias" in own else ("gain",)
            yield AdaptedModule(name, "norm", modules, {f"{name}.{kind}": (len(layers), width) for kind in kinds})
    inside = {id(module) for module in stack.layers.modules()}
    for name, module in model.named_modules():
        if "patch_embed" in name and id(module) not in inside and isinstance(module, nn.Conv2d | nn.Linear):
            shapes = {f"{PATCH_EMBEDDING}.weight": tuple(module.weight.shape)}
            if module.bias is not None:
                shapes[f"{PATCH_EMBEDDING}.bias"] = tuple(module.bias.shape)
            yield AdaptedModule(PATCH_EMBEDDING, "patch_embedding", (module,), shapes)
            return


def apply_patch_embedding(module: Any, pixel_values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns what a patch embedding computes with another weight and bias."""
    weight = weight.to(pixel_values.device, pixel_values.dtype)
    bias = None if bias is None else bias.to(weight)
    if isinstance(module, nn.Linear):
        return F.linear(pixel_values, weight, bias)
    return F.conv2d(pixel_values, weight, bias, module.stride, module.padding, module.dilation, module.groups)


@torch.no_grad()
def fold(model: nn.Module, stack: LayerStack, tensors: Mapping[str, Tensor]) -> None:
    """Writes gains and shifts into a model's own weights, which then compute what the hooks did, up to rounding."""
    for found in find_adapted_modules(model, stack):
        for key in (key for key in found.shapes if key in tensors):  # gains before shifts
            *_, part = key.rpartition(".")
            for layer, module in enumerate(found.modules):
                difference = tensors[key] if found.kind == "patch_embedding" else tensors[key][layer]
                # In float32, since 1 + a small gain is 1 in half precision.
                difference = difference.to(next(module.parameters()).device, torch.float32)
                if part == "gain":
                    for parameter in module.parameters(recurse=False):
                        parameter.mul_((1 + difference).view(-1, *[1] * (parameter.dim() - 1)))
                else:
                    module.get_parameter("bias" if part == "shift" else part).add_(difference)
