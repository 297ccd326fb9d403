"""Checks on one image that tokens act through attention alone: nothing else may see, shift or keep them."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from ..configuration import TOKENS
from .features import cut_for_siglip2, patch_size
from .injection import find_injector, remove_tokens, tokens_in
from .layer_stack import LayerStack, find_layer_stack, vision_config
from .speedups import attention_implementation


logger = logging.getLogger(__name__)

# Relative differences by rounding: tokens change the shapes that are multiplied, and so the order of sums. An 8-bit
# base rounds its activations by their largest value, which may be a token's.
_TOLERANCE, _ROUGH_TOLERANCE = 1e-3, 5e-2
_TIMM_ATTENTION = ("attn", "attn_out_proj")


def verify_injection(model: nn.Module) -> None:
    """Removes the tokens of a model and raises `ValueError` if they reach its features by other ways than attention.

    Runs an image with and without tokens while each attention's output is zero: the outputs must be equal. Positions
    and masks inside attention are not seen. The model is left as it was; on the meta device nothing can be verified.
    """
    stack = find_layer_stack(model)
    base = stack.owner if stack.is_timm else _module_that_takes_images(model, stack)
    if any(p.is_meta for p in base.parameters()) and not any(hasattr(m, "_hf_hook") for m in base.modules()):
        logger.warning("%s is on the meta device: its tokens could not be verified", type(model).__name__)
        return
    try:
        with _running_alike(base), _without_attention(stack):
            reason = _compare(model, base, stack)
    except Exception as exc:  # whatever a model does with tokens that it can't take
        reason = f"it fails ({type(exc).__name__}: {str(exc)[:300]})"
    if reason is not None:
        remove_tokens(model)
        raise ValueError(
            f"{type(model).__name__} can't take robustness tokens: with tokens in front of its sequence, and all "
            f"attention turned off, {reason}. Tokens need layers in which only attention mixes the sequence, without "
            "positions or windows of their own: use a plain ViT, or verify=False if you know that this model is one"
        )


def _compare(model: nn.Module, base: nn.Module, stack: LayerStack) -> str | None:
    """Returns what is wrong with a model's outputs, or None."""
    injector = find_injector(model)
    assert injector is not None
    noise = torch.randn(injector.robustness_tokens.shape, generator=torch.Generator().manual_seed(0))
    with tokens_in(model, None):
        inputs, expected = _run_smallest(base, stack)
    with tokens_in(model, {TOKENS: noise}):  # gains and shifts may change outputs
        found = _outputs(base, stack, inputs)
    if [tensor.shape for tensor in found] != [tensor.shape for tensor in expected]:
        shapes = [[tuple(tensor.shape) for tensor in outputs] for outputs in (found, expected)]
        return f"its outputs have the shapes {shapes[0]}, not {shapes[1]}"
    weights = base.state_dict().values()  # of a quantised base not only tensors
    is_rough = any(not isinstance(weight, Tensor) or weight.dtype.itemsize < 4 for weight in weights)
    for one, other in zip(found, expected, strict=True):
        difference = ((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-30)).item()
        if not difference <= (_ROUGH_TOLERANCE if is_rough else _TOLERANCE):
            return f"its outputs change by {difference:.2g} of their size"
    return None


def _run_smallest(base: Any, stack: LayerStack) -> tuple[dict[str, Any], list[Tensor]]:
    """Returns the inputs for the smallest image that a base takes, and its outputs."""
    parameter = next((p for p in base.parameters() if not p.is_meta and p.is_floating_point()), torch.zeros(()))
    channels = base.patch_embed.proj.in_channels if stack.is_timm else getattr(vision_config(base), "num_channels", 3)
    sizes = list(_sizes(base, stack))
    for size in sizes:
        images = torch.randn(1, channels, *size, generator=torch.Generator().manual_seed(0))
        images = images.to(parameter.device, getattr(base, "dtype", parameter.dtype))
        inputs: dict[str, Any] = {}
        if not stack.is_timm:
            images, others = cut_for_siglip2(base, images)
            inputs |= others
            if getattr(base.config, "output_attentions", False):
                inputs["output_attentions"] = False  # tokens take part of the attention, though none has an effect
        inputs["pixel_values"] = images
        try:
            return inputs, _outputs(base, stack, inputs)
        except Exception as exc:
            if size == sizes[-1]:
                raise RuntimeError(f"without tokens, on an image of {size[0]} x {size[1]} pixels: {exc}") from exc
    raise AssertionError


def _sizes(base: Any, stack: LayerStack) -> Iterator[tuple[int, int]]:
    with suppress(ValueError):  # 2 x 2 patches; many families refuse other images than their own size
        height, width = patch_size(base)
        yield 2 * height, 2 * width
    own: Any = base.patch_embed.img_size if stack.is_timm else getattr(vision_config(base), "image_size", None)
    own = 224 if own is None else own
    yield (own, own) if isinstance(own, int) else (own[0], own[1])


def _outputs(base: Any, stack: LayerStack, inputs: dict[str, Any]) -> list[Tensor]:
    images, seen = inputs["pixel_values"], list[Any]()
    # Each run starts from the caller's random state and leaves it: ViT-MAE shuffles the patches.
    with torch.random.fork_rng(devices=[images.device] if images.is_cuda else []):
        if stack.is_timm:  # a head may pool the features away
            handle = base.norm.register_forward_hook(lambda module, args, output: seen.append(output))
            try:
                seen.append(base(images))
            finally:
                handle.remove()
        else:
            seen.append(base(**inputs))
    return [leaf for leaf in pytree.tree_leaves(seen) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _module_that_takes_images(model: nn.Module, stack: LayerStack) -> nn.Module:
    """Returns the innermost module around the layers that takes pixel values: without text towers, heads and necks."""
    name = next(name for name, module in model.named_modules() if module is stack.owner)
    while True:
        module = model.get_submodule(name)
        if isinstance(module, PreTrainedModel) and "pixel_values" in inspect.signature(module.forward).parameters:
            return module
        if not name:
            raise ValueError(
                f"{type(model).__name__} takes no pixel values: give the model around it, or verify=False"
            )
        name = name.rpartition(".")[0]


@contextmanager
def _running_alike(base: nn.Module) -> Iterator[None]:
    """Runs a base in eval mode, without gradients, autocast or compiling, by the attention that any device has."""
    modes = {module: module.training for module in base.modules()}
    device_type = next((p.device.type for p in base.parameters() if not p.is_meta), "cpu")
    with (
        torch.no_grad(),
        torch.autocast(device_type, enabled=False),
        torch.compiler.set_stance("force_eager"),
        attention_implementation(base, "eager"),
    ):
        try:
            for module in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def _without_attention(stack: LayerStack) -> Iterator[None]:
    """Sets the output of each attention to zero; `ValueError` for a layer in which none is recognised."""
    handles = []
    try:
        for layer in stack.layers:
            found = [module for name, module in layer.named_modules() if _is_attention(name, module, stack)]
            if not found:
                raise ValueError(f"no attention is recognised in {type(layer).__name__}")
            handles += [module.register_forward_hook(_zero) for module in found]
        yield
    finally:
        for handle in handles:
            handle.remove()


def _is_attention(name: str, module: nn.Module, stack: LayerStack) -> bool:
    if stack.is_timm:
        return name.rpartition(".")[2] in _TIMM_ATTENTION
    return stack.attention_class is not None and isinstance(module, stack.attention_class)


def _zero(module: nn.Module, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return (torch.zeros_like(output[0]), *output[1:])
    return torch.zeros_like(output)
