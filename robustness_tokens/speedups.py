"""What makes a frozen base faster to attack and to train through, for the time of a context; each can be left out.

Shapes: B images, N sequence, P patches, D width.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from .backbones import find_layer_stack


logger = logging.getLogger(__name__)

AUTO, BASE = "auto", "base"

# Without this each attack would try again, and fail after seconds.
_not_compilable: WeakSet[nn.Module] = WeakSet()


def runs_in_half(mixed_precision: str, *, device: torch.device) -> bool:
    """Whether to compute under bfloat16 autocast: where it is asked for, and the device has instructions for it.

    Without them torch computes a product in bfloat16 a hundred times slower than in float32, which is taken then,
    and logged once.

    Args:
        mixed_precision: `"no"` or `"bf16"`.
        device: That computes.
    """
    if mixed_precision != "bf16":
        return False
    if not has_bfloat16(device.type):
        _say_that_float32_is_used(device.type)
        return False
    return True


@functools.cache
def has_bfloat16(device_type: str) -> bool:
    """Whether devices of this type, such as `"cpu"`, have instructions for bfloat16 here."""
    if device_type == "cpu":
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True  # Accelerate, or torch itself, refuses what can't


@functools.cache
def _say_that_float32_is_used(device_type: str) -> None:
    logger.warning(
        "bf16 was asked for, but this %s has no bfloat16 instructions: float32 is used instead, which is much faster "
        "here and differs by rounding",
        device_type,
    )


def choose_attention(attn_implementation: str, *, device: torch.device, half_precision: bool) -> str | None:
    """The attention implementation to attack and train with; None leaves the base's own.

    Args:
        attn_implementation: `"auto"`, `"base"` (the base's own), or one of transformers' such as `"eager"`. `"auto"`
            is eager in bfloat16 on a CPU, where the backward of the fused kernel takes longer than all of eager
            attention, and the base's own elsewhere.
        device: Where the base is.
        half_precision: Whether it runs under bfloat16 autocast.
    """
    if attn_implementation == AUTO:
        return "eager" if device.type == "cpu" and half_precision else None
    return None if attn_implementation == BASE else attn_implementation


def attention_configs(base: nn.Module) -> list[Any]:
    """The configs, each once, in which the parts of a base of transformers look up how to compute attention."""
    found: list[Any] = [module.config for module in base.modules() if hasattr(module, "config")]
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())


@contextmanager
def attention_implementation(base: nn.Module, implementation: str | None) -> Iterator[None]:
    """Within the context a base computes its attention by another implementation; None changes nothing.

    Args:
        base: Of transformers; in one of timm, `"eager"` is its unfused attention and `"sdpa"` its fused one.
        implementation: One that the base supports.

    Raises:
        ValueError: If the base does not support it.
    """
    if implementation is None:
        yield
        return
    trunk = find_layer_stack(base)
    fused: dict[Any, Any] = {m: m.fused_attn for m in trunk.layers.modules() if hasattr(m, "fused_attn")}
    configs = attention_configs(base)
    before = [config._attn_implementation_internal for config in configs]
    try:
        if trunk.is_timm:
            if implementation not in ("eager", "sdpa"):
                raise ValueError(f'timm\'s attention is "eager" or "sdpa", got {implementation!r}')
            for module in fused:
                module.fused_attn = implementation == "sdpa"
        elif isinstance(base, PreTrainedModel):
            try:
                base.set_attn_implementation(implementation)
            except (ImportError, ValueError) as exc:
                raise ValueError(f"{type(base).__name__} can't take attention {implementation!r}: {exc}") from exc
        yield
    finally:
        for module, was_fused in fused.items():
            module.fused_attn = was_fused
        for config, was in zip(configs, before, strict=True):
            config._attn_implementation_internal = was


@contextmanager
def onednn_products(base: nn.Module, *, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Within the context a frozen base on a CPU computes its linear layers by oneDNN, its patches among them.

    torch gives float32 products to MKL, which takes twice as long as oneDNN on processors that are not Intel's; in
    bfloat16 it casts the weights, and oneDNN lays them out anew, at each call. Here both happen once, for the forward
    and for the backward pass, which keeps two more copies of these weights for the time of the context. Results differ
    by rounding. Layers that are trained, of another class, in another precision, or not on a CPU are left alone.

    Within the context the base must not be changed, copied or pickled.

    Args:
        base: A model.
        dtype: What it computes in: `torch.float32`, or `torch.bfloat16` under autocast.
    """
    swapped: dict[Any, type[nn.Module]] = {}
    try:
        if _has_onednn(dtype):
            modules: list[Any] = list(base.modules())
            for module in modules:
                plain = type(module)
                if plain in _SWAPPED and _can_be_packed(module, dtype):
                    module._packed = _PackedWeight(module, dtype)  # no buffer: it is never saved
                    module.__class__ = _SWAPPED[plain]
                    swapped[module] = plain
        yield
    finally:
        for module, plain in swapped.items():
            module.__class__ = plain
            del module._packed


def run_compiled(base: nn.Module, function: Callable[[], Tensor]) -> Tensor:
    """Calls a function while a base's layers are compiled where they need a gradient; without, if that fails.

    All layers share what one of them is compiled to, so it takes seconds for a base of any depth; hooks stay outside.

    Args:
        base: What the function runs.
        function: Called once more from the beginning after a failure, which is said in a `RuntimeWarning`.

    Returns:
        What the function returns.
    """
    if base not in _not_compilable:
        try:
            with _compiled_layers(base):
                return function()
        except (TorchDynamoException, FailOnRecompileLimitHit) as exc:
            _not_compilable.add(base)
            warnings.warn(
                f"torch.compile failed, the attack goes on without it ({type(exc).__name__}: {str(exc)[:500]}). "
                "On a CPU it needs a C++ compiler; torch_compile=False leaves it out",
                RuntimeWarning,
                stacklevel=2,
            )
    return function()


@contextmanager
def _compiled_layers(base: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for layer in find_layer_stack(base).layers:
            stack.enter_context(_own_forward(layer, _compile_where_differentiated(layer.forward)))
        yield


def _compile_where_differentiated(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, fullgraph=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled(*args, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)

    return call


@contextmanager
def _own_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")  # Accelerate's hooks, say, have set one
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


def _can_be_packed(module: nn.Module, dtype: torch.dtype) -> bool:
    parameters = list(module.parameters())
    return (
        all(type(one) is nn.Parameter and one.device.type == "cpu" and not one.requires_grad for one in parameters)
        # A float32 product of weights in half precision would hide that somebody forgot autocast.
        and (dtype != torch.float32 or all(one.dtype == torch.float32 for one in parameters))
        and (isinstance(module, nn.Linear) or _cuts_patches(module))
    )


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class _PackedWeight:
    """A layer's weight in the layouts that oneDNN's forward and backward products take."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        with torch.inference_mode(False), torch.no_grad():  # or autograd could not save them
            matrix = module.weight.flatten(1).to(dtype)  # (outputs, inputs)
            self.forward: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix, None)
            self.backward: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.t().contiguous(), None)
            self.bias = None if module.bias is None else module.bias.detach().to(dtype)
        self.dtype = dtype


# An operator of its own, since torch.compile takes oneDNN's only where the weights are constants.
@torch.library.custom_op("robustness_tokens::onednn_product", mutates_args=())
def _onednn_product(inputs: Tensor, forward: Tensor, backward: Tensor, bias: Tensor | None) -> Tensor:
    """inputs @ weight.T + bias, of packed weight.T and weight, with a gradient to the inputs alone."""
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
    """A convolution whose patches don't overlap, as one product: oneDNN's backward takes four times as long."""

    def forward(self, input: Tensor) -> Tensor:
        height, width = self.kernel_size
        rows, columns = input.shape[-2] // height, input.shape[-1] // width
        whole = input[..., : rows * height, : columns * width]  # the rest is no whole patch
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
