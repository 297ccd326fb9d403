"""Inserts robustness tokens in front of the first layer's sequence and strips them after the last layer, by hooks.

Nothing of the base is copied or changed: heads, poolers and wrappers downstream see the sequence that they expect.
Shapes: B images, N the base's own sequence, K robustness tokens, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .layer_stack import LayerStack, find_layer_stack


class TokenInjector(nn.Module):
    """Holds the tokens, (K, D). Its bound methods are the hooks, so deepcopy and pickle keep both together."""

    def __init__(self, robustness_tokens: Tensor) -> None:
        super().__init__()
        self.robustness_tokens = nn.Parameter(robustness_tokens)
        self.enabled = True
        self.strips_before_norm = True
        self._rotary_modules: list[nn.Module] = []  # timm's Eva: positions begin after the prefix

    @property
    def num_active_tokens(self) -> int:
        """Returns K, or 0 while the tokens are off."""
        return self.robustness_tokens.shape[0] if self.enabled else 0

    def set_enabled(self, enabled: bool) -> None:
        """Turns the tokens on or off. While they are off, outputs are bit-equal to the base's."""
        before = self.num_active_tokens
        self.enabled = enabled
        for module in self._rotary_modules:
            module.num_prefix_tokens += self.num_active_tokens - before  # type: ignore[operator, assignment]

    def attach(self, stack: LayerStack) -> None:
        """Registers the hooks on the stack's layers."""
        if stack.is_timm:
            timm_model: Any = stack.owner
            # The tokens go from norm_pre to norm: all intermediate outputs hold them as extra prefix tokens.
            timm_model.norm_pre.register_forward_hook(self.insert_after_norm_pre)
            timm_model.norm.register_forward_pre_hook(self.strip_before_norm)
            timm_model.forward_intermediates = functools.partial(_forward_intermediates, timm_model, self)
            self._rotary_modules = [m for m in stack.layers.modules() if hasattr(m, "num_prefix_tokens")]
            for module in self._rotary_modules:
                module.num_prefix_tokens += self.num_active_tokens  # type: ignore[operator, assignment]
            return
        stack.layers[0].register_forward_pre_hook(self.insert_before_layer, with_kwargs=True)
        # Prepended, so that transformers' recorder of hidden states sees the stripped output.
        stack.layers[-1].register_forward_hook(self.strip_after_layer, prepend=True)
        stack.owner.register_forward_hook(self.trim_recorded)
        for module in stack.layers.modules():
            if stack.attention_class is not None and isinstance(module, stack.attention_class):
                module.register_forward_pre_hook(self.pad_attention_mask, with_kwargs=True)

    def _insert(self, hidden_states: Tensor) -> Tensor:
        """Maps (B, N, D) to (B, K + N, D); returns it unchanged while the tokens are off."""
        if not self.enabled:
            return hidden_states
        if hidden_states.dim() != 3:
            raise ValueError(
                f"robustness tokens need a sequence (B, N, D) before the first layer, got {tuple(hidden_states.shape)}"
            )
        tokens = self.robustness_tokens.to(hidden_states.device, hidden_states.dtype)
        return torch.cat([tokens.expand(hidden_states.shape[0], -1, -1), hidden_states], dim=1)  # (B, K + N, D)

    def insert_before_layer(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        if args:
            return (self._insert(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._insert(kwargs["hidden_states"])}

    def strip_after_layer(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0][:, self.num_active_tokens :], *output[1:])
        return output[:, self.num_active_tokens :]  # (B, K + N, D) -> (B, N, D)

    def pad_attention_mask(self, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """Extends the base's attention masks and relative position biases to the tokens."""
        by_position = len(args) > 1
        mask = args[1] if by_position else kwargs.get("attention_mask")
        if mask is None or not self.enabled:
            return args, kwargs
        sequence = (args[0] if args else kwargs["hidden_states"]).shape[1]
        mask = _pad_mask(mask, self.num_active_tokens, sequence - self.num_active_tokens)
        if by_position:
            return (args[0], mask, *args[2:]), kwargs
        return args, {**kwargs, "attention_mask": mask}

    def trim_recorded(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Removes the tokens from recorded `hidden_states` and `attentions`."""
        k = self.num_active_tokens
        if k == 0:
            return output
        if isinstance(output, ModelOutput):
            for key in ("hidden_states", "attentions"):
                if output.get(key) is not None:
                    output[key] = _trim(output[key], k)
            return output
        return tuple(_trim(item, k) if isinstance(item, tuple) else item for item in output)

    def insert_after_norm_pre(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return self._insert(output)

    def strip_before_norm(self, module: nn.Module, args: Any) -> Any:
        if not self.strips_before_norm:
            return args
        return (args[0][:, self.num_active_tokens :], *args[1:])


def attach_tokens(model: nn.Module, robustness_tokens: Tensor) -> TokenInjector:
    """Puts tokens, (K, D) floating, into a model in place; returns the injector, which holds them as a parameter."""
    if find_injector(model) is not None:
        raise ValueError(
            f"{type(model).__name__} has robustness tokens already: call remove_tokens(model) (or .unload()) first"
        )
    stack = find_layer_stack(model)
    if robustness_tokens.dim() != 2 or robustness_tokens.shape[1] != stack.hidden_size:
        raise ValueError(
            f"robustness tokens must have shape (K, {stack.hidden_size}) for {type(model).__name__}, "
            f"got {tuple(robustness_tokens.shape)}: they belong to a base of another width"
        )
    injector = TokenInjector(robustness_tokens)
    injector.attach(stack)
    return injector


def find_injector(model: nn.Module) -> TokenInjector | None:
    """Returns the injector that is attached to the model, or None."""
    return next((hook.__self__ for _, _, hook in _own_hooks(model)), None)


def active_injector(model: nn.Module, *, to: str) -> TokenInjector:
    """Returns the injector; `ValueError`, with `to` as its verb, if the tokens are off or missing."""
    injector = find_injector(model)
    if injector is None or not injector.enabled:
        raise ValueError(
            f"{type(model).__name__} has no robustness tokens to {to}, or they are turned off: "
            f"inject_tokens(model, ...) first, and {to} outside disable_adapter()"
        )
    return injector


@contextmanager
def tokens_in(model: nn.Module, tokens: Tensor | None) -> Iterator[None]:
    """Runs a model with other tokens, (K, D) for any K, or without tokens if None is given; contexts nest.

    The given tokens get no gradient. A model without tokens accepts only None, which changes nothing.
    """
    injector = find_injector(model)
    if injector is None:
        if tokens is not None:
            raise ValueError(f"{type(model).__name__} has no robustness tokens to replace: call inject_tokens first")
        yield
        return
    own, enabled = injector.robustness_tokens, injector.enabled
    injector.set_enabled(False)  # rotary modules follow the number of active tokens
    try:
        if tokens is not None:
            injector.robustness_tokens = nn.Parameter(tokens.detach().to(own.device), requires_grad=False)
            injector.set_enabled(True)
        yield
    finally:
        injector.set_enabled(False)
        injector.robustness_tokens = own
        injector.set_enabled(enabled)


def remove_tokens(model: nn.Module) -> Any:
    """Removes the tokens and all hooks from a model in place, which undoes [`inject_tokens`].

    Args:
        model: A model that [`inject_tokens`] was called on.

    Returns:
        The same model.

    Raises:
        ValueError: If the model has no robustness tokens.
    """
    injector = find_injector(model)
    if injector is None:
        raise ValueError(f"{type(model).__name__} has no robustness tokens to remove")
    injector.set_enabled(False)
    for module, hook_id, _ in _own_hooks(model):
        for registry in (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs, module._forward_hooks):
            registry.pop(hook_id, None)
    stack = find_layer_stack(model)
    if stack.is_timm:
        del stack.owner.forward_intermediates
    return model


def _own_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, int, Any]]:
    """Yields (module, hook id, bound method) for every hook of an injector. Handles would not survive a deepcopy."""
    for module in model.modules():
        for hook_id, hook in [*module._forward_pre_hooks.items(), *module._forward_hooks.items()]:
            if isinstance(getattr(hook, "__self__", None), TokenInjector):
                yield module, hook_id, hook


def _pad_mask(mask: Any, k: int, sequence: int) -> Tensor:
    """Maps (B, H, N or 1, N) to (B, H, K + N or 1, K + N), or flash attention's (B, N) to (B, K + N)."""
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        raise ValueError(
            f"an attention mask of type {type(mask).__name__} can't be extended to the robustness tokens: load the "
            'base with attn_implementation="sdpa" or "eager"'
        )
    if mask.shape[-1] != sequence:
        raise ValueError(
            f"an attention mask or relative position bias is {mask.shape[-1]} wide, the sequence without robustness "
            f"tokens is {sequence}: BEiT with interpolate_pos_encoding=True stretches its bias over the tokens; "
            "leave it out, the bias fits any image size without it"
        )
    if mask.dim() == 2:
        return F.pad(mask, (k, 0), value=1)
    if mask.shape[-2] != 1:  # a single row is broadcast over the queries
        mask = torch.cat([_token_row(mask).expand(-1, -1, k, -1), mask], dim=-2)  # (B, H, K + N, N)
    return F.pad(mask, (k, 0), value=0.0 if mask.is_floating_point() else True)


def _token_row(mask: Tensor) -> Tensor:
    """Maps (B, H, N, N) to the row of a token, (B, H, 1, N): no bias, but padding stays masked."""
    if not mask.is_floating_point():
        return mask.any(dim=-2, keepdim=True)
    lowest = torch.finfo(mask.dtype).min
    hidden = (mask <= lowest / 2).all(dim=-2, keepdim=True)  # no position bias is this low
    return torch.zeros_like(mask[..., :1, :]).masked_fill(hidden, lowest)


def _trim(recorded: Any, k: int) -> Any:
    """Trims attentions (B, H, K + N, K + N), or hidden states (B, K + N, D) except the last, which has no tokens."""
    if not recorded:
        return recorded  # some attention kernels keep no weights
    *inner, last = recorded
    if last is not None and last.dim() == 4:
        return tuple(attention[..., k:, k:] for attention in recorded)
    return (*(None if state is None else state[:, k:] for state in inner), last)


def _forward_intermediates(timm_model: Any, injector: TokenInjector, *args: Any, **kwargs: Any) -> Any:
    """Runs timm's own method, which splits off the tokens as prefix tokens; then removes them from the prefix."""
    own, k = timm_model.num_prefix_tokens, injector.num_active_tokens
    timm_model.num_prefix_tokens = own + k
    injector.strips_before_norm = False  # with norm=True the intermediates pass through the norm before the split
    try:
        output = type(timm_model).forward_intermediates(timm_model, *args, **kwargs)
    finally:
        timm_model.num_prefix_tokens = own
        injector.strips_before_norm = True

    def strip_prefix(intermediate: Any) -> Any:
        if not isinstance(intermediate, tuple):
            return intermediate
        patches, prefix = intermediate
        return (patches, prefix[:, k:]) if own else patches

    if isinstance(output, dict):
        prefixes = [prefix[:, k:] for prefix in output.pop("image_intermediates_prefix", [])]
        if own and prefixes:
            output["image_intermediates_prefix"] = prefixes
        if "image_features" in output:
            output["image_features"] = output["image_features"][:, k:]
        return output
    if isinstance(output, tuple):
        features, intermediates = output
        return features[:, k:], [strip_prefix(item) for item in intermediates]
    return [strip_prefix(item) for item in output]
