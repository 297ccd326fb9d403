"""Computes the linear layers of a frozen base with oneDNN; weights are packed once.

Shapes: B images, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def onednn_is_faster(*, device: torch.device, half_precision: bool) -> bool:
    """Tells whether [`onednn_products`] is faster than torch alone: on a CPU, unless torch uses MKL with AVX2 only."""
    # torch gives float32 products to MKL. On processors that aren't Intel's, MKL leaves AVX-512 unused and takes twice
    # as long as oneDNN; with AVX2 only it takes 7% less. In bfloat16 torch casts and packs the weights at each call.
    return device.type == "cpu" and (half_precision or has_avx512() or not torch.backends.mkl.is_available())


def has_avx512() -> bool:
    """Tells whether this processor has AVX-512 and torch uses it."""
    return "AVX512" in torch.backends.cpu.get_cpu_capability()


@contextmanager
def packed_once() -> Iterator[None]:
    """Keeps packed weights for the whole context, so that entering [`onednn_products`] again reuses them.

    A weight that changed is packed again, unless it was changed through `.data`. Nesting changes nothing.
    """
    if _kept.get() is not None:
        yield
        return
    token = _kept.set({})
    try:
        yield
    finally:
        _kept.reset(token)


@contextmanager
def onednn_products(base: nn.Module, *, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Computes a frozen base's linear layers and patch embedding with oneDNN inside the context, on a CPU.

    Weights are cast to `dtype` (float32, or bfloat16 under autocast) and packed for forward and backward. The copies
    are freed at the end of the context, or of [`packed_once`]. Results differ by rounding. Trained layers and layers
    of other classes or dtypes stay unchanged. Do not change, copy or pickle the base inside the context.
    """
    swapped: dict[Any, type[nn.Module]] = {}
    try:
        if _has_onednn(dtype):
            modules: list[Any] = list(base.modules())
            for module in modules:
                plain = type(module)
                if plain in _SWAPPED and _can_be_packed(module, dtype):
                    module._packed = _pack(module, dtype)  # no buffer: it is never saved
                    module.__class__ = _SWAPPED[plain]
                    swapped[module] = plain
        yield
    finally:
        for module, plain in swapped.items():
            module.__class__ = plain
            del module._packed


def _can_be_packed(module: nn.Module, dtype: torch.dtype) -> bool:
    parameters = list(module.parameters())
    return (
        all(type(one) is nn.Parameter and one.device.type == "cpu" and not one.requires_grad for one in parameters)
        # A float32 product of half-precision weights would hide a missing autocast.
        and (dtype != torch.float32 or all(one.dtype == torch.float32 for one in parameters))
        and (isinstance(module, nn.Linear) or _cuts_patches(module))
    )


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _PackedWeight:
    """Holds a layer's weight in oneDNN's layouts for the forward and the backward product."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        with torch.inference_mode(False), torch.no_grad():  # autograd can't save inference tensors
            matrix = module.weight.flatten(1).to(dtype)  # (outputs, inputs)
            self.forward: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix, None)
            self.backward: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.t().contiguous(), None)
            self.bias = None if module.bias is None else module.bias.detach().to(dtype)
        self.dtype = dtype


# By layer: packed weight, its parameters (kept alive, so that their ids stay unique), and their state when packed.
_kept: ContextVar[dict[nn.Module, tuple[_PackedWeight, list[Tensor], Any]] | None] = ContextVar("kept", default=None)


def _pack(module: Any, dtype: torch.dtype) -> _PackedWeight:
    """Returns a layer's packed weight; reuses a kept one that is still valid."""
    kept = _kept.get()
    parameters = list(module.parameters())
    if kept is None or any(one.is_inference() for one in parameters):  # inference tensors count no changes
        return _PackedWeight(module, dtype)
    state = dtype, [(id(one), one.data_ptr(), one._version) for one in parameters]
    if module not in kept or kept[module][2] != state:
        kept[module] = _PackedWeight(module, dtype), parameters, state
    return kept[module][0]


# A custom operator, since torch.compile supports oneDNN's only with constant weights.
@torch.library.custom_op("robustness_tokens::onednn_product", mutates_args=())
def _onednn_product(inputs: Tensor, forward: Tensor, backward: Tensor, bias: Tensor | None) -> Tensor:
    """Computes inputs @ weight.T + bias from packed weights; only the inputs get a gradient."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, forward, bias, "none", [], "")
    return product


@_onednn_product.register_fake
def _product_shape(inputs: Tensor, forward: Tensor, backward: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], forward.shape[0])


def _keep_weights(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[2])


def _gradient_of_inputs(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    forward, backward = ctx.saved_tensors
    return _onednn_product(gradient.contiguous(), backward, forward, None), None, None, None


_onednn_product.register_autograd(_gradient_of_inputs, setup_context=_keep_weights)


def _product(inputs: Tensor, module: Any) -> Tensor:
    packed = module._packed
    device = inputs.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
    if device != "cpu" or dtype != packed.dtype:
        return F.linear(inputs, module.weight.flatten(1), module.bias)
    return _onednn_product(inputs.to(dtype), packed.forward, packed.backward, packed.bias)


class _OneDNNLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return _product(input, self)


class _PatchProducts(nn.Conv2d):
    """Computes a convolution without overlap as one product: its backward in oneDNN takes four times as long."""

    def forward(self, input: Tensor) -> Tensor:
        height, width = self.kernel_size
        rows, columns = input.shape[-2] // height, input.shape[-1] // width
        whole = input[..., : rows * height, : columns * width]  # whole patches only
        grid = whole.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # (B, 3, rows, h, columns, w)
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, rows, columns, 3 * h * w)
        return _product(patches, self).permute(0, 3, 1, 2)  # (B, D, rows, columns)


_SWAPPED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _OneDNNLinear, nn.Conv2d: _PatchProducts}


def _cuts_patches(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride
        and module.padding in ((0, 0), "valid")
        and module.dilation == (1, 1)
        and module.groups == 1
    )
