"""What makes a frozen base faster to attack and to train through, for the time of a context; each can be left out."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
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

# Without this each attack would try again, and fail after seconds.
_not_compilable: WeakSet[nn.Module] = WeakSet()

MixedPrecision = Literal["no", "bf16"]


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
    """Within the context a frozen base computes faster, and the same but for rounding; nesting it changes nothing.

    Args:
        base: A model.
        device: Where it is computed.
        half_precision: Whether under bfloat16 autocast.
        attn_implementation: See [`choose_attention`].
        onednn: Let oneDNN compute its linear layers where [`~robustness_tokens.models.onednn.onednn_is_faster`].

    Raises:
        ValueError: If the base does not support the attention.
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
