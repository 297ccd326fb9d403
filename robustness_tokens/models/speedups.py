"""Makes a frozen base faster to attack and to train through, inside a context; each speedup is optional."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from transformers import PreTrainedConfig, PreTrainedModel

from .layer_stack import find_layer_stack
from .onednn import onednn_is_faster, onednn_products


logger = logging.getLogger(__name__)

AUTO, BASE = "auto", "base"

# Remembered, or every attack would fail again after seconds.
_not_compilable: WeakSet[nn.Module] = WeakSet()

MixedPrecision = Literal["no", "bf16"]


def runs_in_half(mixed_precision: str, *, device: torch.device) -> bool:
    """Tells whether to use bfloat16 autocast: only for `"bf16"`, and on a device with bfloat16 instructions."""
    if mixed_precision != "bf16":
        return False
    if not has_bfloat16(device.type):  # a product would take a hundred times as long as in float32
        _say_that_float32_is_used(device.type)
        return False
    return True


@functools.cache
def has_bfloat16(device_type: str) -> bool:
    """Tells whether this machine's devices of a type, such as `"cpu"`, have bfloat16 instructions."""
    if device_type == "cpu":
        return bool(torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True  # Accelerate or torch refuses devices that can't


@functools.cache
def _say_that_float32_is_used(device_type: str) -> None:
    logger.warning(
        "bf16 was asked for, but this %s has no bfloat16 instructions: float32 is used instead, which is much faster "
        "here and differs by rounding",
        device_type,
    )


def choose_attention(attn_implementation: str, *, device: torch.device, half_precision: bool) -> str | None:
    """Returns the attention implementation to attack and train with, or None for the base's own."""
    if attn_implementation == AUTO:  # in bfloat16, the fused kernel's backward alone is slower than eager attention
        return "eager" if device.type == "cpu" and half_precision else None
    return None if attn_implementation == BASE else attn_implementation


def attention_configs(base: nn.Module) -> list[Any]:
    """Returns the distinct configs in which a transformers base looks up its attention."""
    found: list[Any] = [module.config for module in base.modules() if hasattr(module, "config")]
    return list({id(config): config for config in found if isinstance(config, PreTrainedConfig)}.values())


@contextmanager
def attention_implementation(base: nn.Module, implementation: str | None) -> Iterator[None]:
    """Switches a base's attention inside the context; None changes nothing; `ValueError` if it isn't supported.

    For timm, `"eager"` is the unfused attention and `"sdpa"` the fused one.
    """
    if implementation is None:
        yield
        return
    stack = find_layer_stack(base)
    fused: dict[Any, Any] = {m: m.fused_attn for m in stack.layers.modules() if hasattr(m, "fused_attn")}
    configs = attention_configs(base)
    before = [config._attn_implementation_internal for config in configs]
    try:
        if stack.is_timm:
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
def computing_faster(
    base: nn.Module,
    *,
    device: torch.device,
    half_precision: bool,
    attn_implementation: str = AUTO,
    onednn: bool = True,
) -> Iterator[None]:
    """Makes a frozen base faster inside the context, with equal results up to rounding; nesting changes nothing.

    Uses the attention of [`choose_attention`], and oneDNN for linear layers where [`onednn_is_faster`].
    """
    attention = choose_attention(attn_implementation, device=device, half_precision=half_precision)
    use_onednn = onednn and onednn_is_faster(device=device, half_precision=half_precision)
    dtype = torch.bfloat16 if half_precision else torch.float32
    with (
        attention_implementation(base, attention),
        onednn_products(base, dtype=dtype) if use_onednn else nullcontext(),
    ):
        yield


def run_compiled(base: nn.Module, function: Callable[[], Tensor]) -> Tensor:
    """Calls a function that runs a base; the base's layers are compiled where gradients are on.

    All layers share one compiled layer, so compiling takes seconds at any depth; hooks stay outside. If compiling
    fails, warns and calls the function uncompiled.
    """
    if base not in _not_compilable:
        try:
            with _compiled_layers(base):
                return function()
        except (TorchDynamoException, FailOnRecompileLimitHit) as exc:
            _not_compilable.add(base)
            warnings.warn(
                f"torch.compile failed, so the attack runs without it ({type(exc).__name__}: {str(exc)[:500]}). "
                "On a CPU it needs a C++ compiler; torch_compile=False turns it off",
                RuntimeWarning,
                stacklevel=2,
            )
    return function()


@contextmanager
def _compiled_layers(base: nn.Module) -> Iterator[None]:
    # A layer has its own forward only under Accelerate's hooks.
    before = {layer: layer.__dict__.get("forward") for layer in find_layer_stack(base).layers}
    try:
        for layer in before:
            layer.__dict__["forward"] = _compile_where_differentiated(layer.forward)
        yield
    finally:
        for layer, own_forward in before.items():
            layer.__dict__.pop("forward", None)
            if own_forward is not None:
                layer.__dict__["forward"] = own_forward


def _compile_where_differentiated(forward: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(forward, fullgraph=True)
    return lambda *args, **kwargs: (compiled if torch.is_grad_enabled() else forward)(*args, **kwargs)
