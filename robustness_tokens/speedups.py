"""What makes a frozen base faster to attack and to train through, for the time of a context; each can be left out.

Shapes: B images, N sequence, P patches, D width.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn import functional as F
from transformers import PreTrainedModel

from .backbones import find_layer_stack


AUTO, BASE = "auto", "base"

# Without this each attack would try again, and fail after seconds.
_not_compilable: WeakSet[nn.Module] = WeakSet()


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
    configs = {id(m.config): m.config for m in base.modules() if isinstance(m, PreTrainedModel)}
    before = {key: config._attn_implementation_internal for key, config in configs.items()}
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
        for key, config in configs.items():
            config._attn_implementation_internal = before[key]


@contextmanager
def onednn_products(base: nn.Module) -> Iterator[None]:
    """Within the context a frozen float32 base on a CPU computes its linear layers by oneDNN, its patches among them.

    torch gives float32 products to MKL, which takes twice as long as oneDNN on processors that are not Intel's.
    Results differ by rounding. Layers that are trained, in another precision, or of another class are left alone.

    Args:
        base: A model on a CPU.
    """
    classes: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: _OneDNNLinear, nn.Conv2d: _PatchProducts}
    swapped = [
        module
        for module in base.modules()
        if type(module) in classes and not any(parameter.requires_grad for parameter in module.parameters())
    ]
    swapped = [module for module in swapped if isinstance(module, nn.Linear) or _cuts_patches(module)]
    if not torch.backends.mkldnn.is_available():
        swapped = []
    before = {module: type(module) for module in swapped}
    try:
        for module in swapped:
            module.__class__ = classes[before[module]]
        yield
    finally:
        for module, plain in before.items():
            module.__class__ = plain


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


# An operator of its own, since torch.compile takes oneDNN's only where the weights are constants.
@torch.library.custom_op("robustness_tokens::onednn_product", mutates_args=())
def _onednn_product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """inputs @ weight.T + bias, with a gradient to the inputs alone."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")
    return product


@_onednn_product.register_fake
def _product_shape(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return inputs.new_empty(*inputs.shape[:-1], weight.shape[0])


def _keep_weight(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gradient_of_inputs(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    (weight,) = ctx.saved_tensors
    return _onednn_product(gradient.contiguous(), weight.t().contiguous(), None), None, None


_onednn_product.register_autograd(_gradient_of_inputs, setup_context=_keep_weight)


def _product(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    plain = inputs.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled(inputs.device.type)
    if plain and inputs.device.type == "cpu":
        return _onednn_product(inputs, weight, bias)
    return F.linear(inputs, weight, bias)  # bfloat16 is oneDNN's already


class _OneDNNLinear(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return _product(input, self.weight, self.bias)


class _PatchProducts(nn.Conv2d):
    """A convolution whose patches don't overlap, as one product: oneDNN's backward takes four times as long."""

    def forward(self, input: Tensor) -> Tensor:
        height, width = self.kernel_size
        rows, columns = input.shape[-2] // height, input.shape[-1] // width
        whole = input[..., : rows * height, : columns * width]  # the rest is no whole patch
        grid = whole.unflatten(3, (columns, width)).unflatten(2, (rows, height))  # (B, 3, rows, h, columns, w)
        patches = grid.permute(0, 2, 4, 1, 3, 5).flatten(3)  # (B, rows, columns, 3 * h * w)
        return _product(patches, self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)  # (B, D, rows, columns)


def _cuts_patches(module: nn.Module) -> bool:
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == module.stride
        and module.padding in ((0, 0), "valid")
        and module.dilation == (1, 1)
        and module.groups == 1
    )
