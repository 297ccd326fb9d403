"""Puts robustness tokens in front of a layer's sequence and strips them after the last layer, by hooks.

Tokens enter before the first layer; with a depth above 1, the next layers replace them by tokens of their own. Gains
and shifts change what the base's modules return. Nothing of the base is copied or changed: heads, poolers and
wrappers downstream see the sequence that they expect.
Shapes: B images, N the base's own sequence, K robustness tokens, D width.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from ..configuration import TOKENS, RobustnessTokenConfig, TokenState
from .gains_and_shifts import apply_patch_embedding, check_adapted_modules, find_adapted_modules
from .layer_stack import LayerStack, find_layer_stack


logger = logging.getLogger(__name__)


class TokenInjector(nn.Module):
    """Holds tokens, gains and shifts. Its bound methods are the hooks, so deepcopy and pickle keep both together."""

    robustness_tokens: nn.Parameter

    def __init__(self, tokens: TokenState) -> None:
        super().__init__()
        self.names = tuple(tokens)
        for name, tensor in tokens.items():
            self.register_parameter(attribute(name), nn.Parameter(tensor))
        self.enabled = True
        self._borrowed: TokenState | None = None  # used instead of the injector's own
        self._rotary_modules: list[nn.Module] = []  # timm's Eva: positions begin after the prefix
        self._stacks: list[LayerStack] = []  # in a list, since modules that are attributes would become children
        self._layers_name = ""  # of the stack's layers inside its owner
        self._num_hooked = 0  # modules inside the owner
        self._has_warned = False

    @property
    def state(self) -> dict[str, nn.Parameter]:
        """The injector's own state: its parameters by name."""
        return {name: self.get_parameter(attribute(name)) for name in self.names}

    def active(self, name: str) -> Tensor | None:
        """Returns a tensor of the state in use; None while the injector is off, or if the state has no such tensor."""
        if not self.enabled:
            return None
        if self._borrowed is not None:
            return self._borrowed.get(name)
        return getattr(self, attribute(name), None)

    @property
    def active_state(self) -> dict[str, Tensor]:
        """The state that is used now, see [`active`]."""
        return {name: tensor for name in self.names if (tensor := self.active(name)) is not None}

    @property
    def num_active_tokens(self) -> int:
        """Returns K, or 0 while the tokens are off."""
        tokens = self.active(TOKENS)
        return 0 if tokens is None else tokens.shape[-2]

    def set_enabled(self, enabled: bool, *, borrowed: TokenState | None = None) -> None:
        """Turns the injector on or off; on with its own state or with a borrowed one.

        While it is off, outputs are bit-identical to the base's.
        """
        before = self.num_active_tokens
        self.enabled, self._borrowed = enabled, borrowed
        for module in self._rotary_modules:
            module.num_prefix_tokens += self.num_active_tokens - before  # type: ignore[operator, assignment]

    def attach(self, model: nn.Module, stack: LayerStack) -> None:
        """Registers the hooks on the stack's layers, and on the modules that have gains and shifts."""
        self._stacks = [stack]
        self._layers_name = next(name for name, module in stack.owner.named_modules() if module is stack.layers)
        self._register_hooks(model, stack)
        self._num_hooked = sum(map(self._has_hook, stack.owner.modules()))
        torch.compiler.reset()  # programs that were compiled without the hooks would go on without the tokens

    def _register_hooks(self, model: nn.Module, stack: LayerStack) -> None:
        depth = depth_of(self.state[TOKENS])
        adapted = find_adapted_modules(model, stack)
        used = [found for found in adapted if not found.shapes.keys().isdisjoint(self.names)]
        for found in {found.name: found for found in used}.values():  # one hook for all kinds of a module
            for layer, module in enumerate(found.modules):
                change = self.add_patches if found.kind == "patch_embedding" else self.scale_and_shift
                module.register_forward_hook(functools.partial(change, name=found.name, layer=layer))
        for layer in range(1 if stack.is_timm else 0, depth):
            put = functools.partial(self.put_before_layer, layer=layer)
            stack.layers[layer].register_forward_pre_hook(put, with_kwargs=True)
        if stack.is_timm:
            timm_model: Any = stack.owner
            # The tokens go from norm_pre to norm: all intermediate outputs hold them as extra prefix tokens.
            timm_model.norm_pre.register_forward_hook(self.put_after_norm_pre)
            timm_model.norm.register_forward_pre_hook(self.strip_before_norm)
            timm_model.forward_intermediates = functools.partial(_forward_intermediates, timm_model, self)
            timm_model._replicate_for_data_parallel = functools.partial(_replicate, timm_model, self)
            self._rotary_modules = [m for m in stack.layers.modules() if hasattr(m, "num_prefix_tokens")]
            for module in self._rotary_modules:
                module.num_prefix_tokens += self.num_active_tokens  # type: ignore[operator, assignment]
            return
        stack.owner.register_forward_pre_hook(self.check_layers)
        # Prepended, so that transformers' recorder of hidden states sees the stripped output.
        stack.layers[-1].register_forward_hook(self.strip_after_layer, prepend=True)
        stack.owner.register_forward_hook(self.trim_recorded)
        for module in stack.layers.modules():
            if stack.attention_class is not None and isinstance(module, stack.attention_class):
                module.register_forward_pre_hook(self.pad_attention_mask, with_kwargs=True)

    def warn_of_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        """Says once that the state dict of a model with injected tokens lacks them."""
        if not (self._has_warned or keep_vars):  # torch.export keeps them, saving does not
            self._has_warned = True
            logger.warning(
                "%s is saved without its robustness tokens: keep their adapter, and inject_tokens(model, adapter) "
                "after loading",
                type(module).__name__,
            )

    def check_layers(self, *args: Any) -> None:  # also a hook
        """Raises `ValueError` if layers were added, removed or replaced since the hooks were set."""
        if not self.enabled:
            return
        (stack,) = self._stacks
        owner: Any = stack.owner
        layers: Any = owner.get_submodule(self._layers_name)
        is_whole = len(layers) == len(stack.layers)
        if is_whole:
            ends = (owner.norm_pre, owner.norm) if stack.is_timm else (layers[0], layers[-1])
            if all(map(self._has_hook, (*ends, *layers[1 : depth_of(self.robustness_tokens)]))):
                return
        # Slower: a layer may have been wrapped, as by FSDP, and then runs its hooks inside.
        if not is_whole or sum(map(self._has_hook, owner.modules())) != self._num_hooked:
            raise ValueError(
                f"layers of {type(owner).__name__} were added, removed or replaced since the robustness tokens were "
                "put in: call remove_tokens(model) before changing layers, and inject_tokens afterwards"
            )

    def _has_hook(self, module: nn.Module) -> bool:
        hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
        return any(_injector_of(hook) is self for hook in hooks)

    def _follow(self, module: nn.Module, device: torch.device) -> None:
        """Moves the injector to its first layer's device at the first use, rather than copying at each one."""
        if self.robustness_tokens.is_meta and device.type != "meta":
            raise ValueError(
                "the robustness tokens are on the meta device: offload the base first, and put them in afterwards"
            )
        is_lasting = device.type != "meta" and not torch.compiler.is_compiling()
        if is_lasting and not getattr(module, "_is_replica", False):  # replicas share the original's injector
            self.to(device)

    def _put(self, module: nn.Module, hidden_states: Tensor, layer: int) -> Tensor:
        """Puts a layer's tokens in front, and drops those of the previous layer: (B, N, D) to (B, K + N, D)."""
        if layer == 0 and self.robustness_tokens.device != hidden_states.device:
            self._follow(module, hidden_states.device)
        tokens = self.active(TOKENS)
        if tokens is None:
            return hidden_states
        if hidden_states.dim() != 3:
            raise ValueError(
                f"robustness tokens need a sequence (B, N, D) before the first layer, got {tuple(hidden_states.shape)}"
            )
        if layer >= depth_of(tokens):
            return hidden_states
        if tokens.dim() == 3:
            tokens = tokens[layer]
        if layer > 0:
            hidden_states = hidden_states[:, len(tokens) :]
        tokens = tokens.to(hidden_states.device, hidden_states.dtype)
        return torch.cat([tokens.expand(hidden_states.shape[0], -1, -1), hidden_states], dim=1)  # (B, K + N, D)

    def put_before_layer(self, module: nn.Module, args: Any, kwargs: Any, *, layer: int) -> tuple[Any, Any]:
        if args:
            return (self._put(module, args[0], layer), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._put(module, kwargs["hidden_states"], layer)}

    def scale_and_shift(self, module: nn.Module, args: Any, output: Tensor, *, name: str, layer: int) -> Tensor:
        """Returns `output * (1 + gain) + shift`, each over the last dimension."""
        gain, shift = self.active(f"{name}.gain"), self.active(f"{name}.shift")
        if gain is not None:
            # Not output * (1 + gain): a small gain would be lost where 1 + gain is rounded to half precision.
            output = torch.addcmul(output, output, gain[layer].to(output.device, output.dtype))
        return output if shift is None else output + shift[layer].to(output.device, output.dtype)

    def add_patches(self, module: nn.Module, args: Any, output: Tensor, *, name: str, layer: int) -> Tensor:
        """Adds what the patch embedding computes with the differences of its weight and bias."""
        weight, bias = self.active(f"{name}.weight"), self.active(f"{name}.bias")
        return output if weight is None else output + apply_patch_embedding(module, args[0], weight, bias)

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
        if torch.compiler.is_exporting() and getattr(module, "config", None) is not None:
            _check_exported_mask(mask, module.config)
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

    def put_after_norm_pre(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        self.check_layers()
        return self._put(module, output, 0)

    def strip_before_norm(self, module: nn.Module, args: Any) -> Any:
        if getattr(module, "_keeps_robustness_tokens", False):
            return args
        self.check_layers()
        return (args[0][:, self.num_active_tokens :], *args[1:])


def depth_of(tokens: Tensor) -> int:
    """Returns the number of layers that tokens, (K, D) or (depth, K, D), belong to."""
    return len(tokens) if tokens.dim() == 3 else 1


def as_state(tokens: Tensor | TokenState) -> dict[str, Tensor]:
    """Returns tokens, given alone or with gains and shifts, as a state."""
    state = {TOKENS: tokens} if isinstance(tokens, Tensor) else dict(tokens)
    if TOKENS not in state:
        raise ValueError(f"a state of an adapter needs {TOKENS!r}, its tokens, got {sorted(state)}")
    if state[TOKENS].dim() == 3 and len(state[TOKENS]) == 1:
        state[TOKENS] = state[TOKENS][0]  # (1, K, D) -> (K, D)
    return state


def new_state(model: nn.Module, config: RobustnessTokenConfig) -> dict[str, Tensor]:
    """Returns an untrained state of a config for a base: random tokens, and gains and shifts of zero."""
    stack = find_layer_stack(model)
    check_depth(model, stack, config.token_depth)
    state = {TOKENS: torch.randn(config.tokens_shape) * config.initializer_range}
    for found in check_adapted_modules(model, stack, config.gains_and_shifts or ()):
        state |= {name: torch.zeros(shape) for name, shape in found.shapes.items()}
    return state


def random_state(state: TokenState, *, seed: int) -> dict[str, Tensor]:
    """Returns random tensors: each token, and each gain or shift of all layers, has the norm of the given one."""
    generator = torch.Generator().manual_seed(seed)
    noise = {name: torch.randn(state[name].shape, generator=generator).to(state[name]) for name in sorted(state)}
    random = {name: tensor * (state[name].norm() / tensor.norm()) for name, tensor in noise.items()}
    return random | {TOKENS: F.normalize(noise[TOKENS], dim=-1) * state[TOKENS].norm(dim=-1, keepdim=True)}


def check_state(model: nn.Module, config: RobustnessTokenConfig, state: TokenState, *, name: str) -> None:
    """Raises `ValueError` unless a state holds just the tensors that a config says, in the shapes of the base."""
    stack = find_layer_stack(model)
    _check_shapes(model, stack, state)
    wanted = check_adapted_modules(model, stack, config.gains_and_shifts or ())
    names = {TOKENS}.union(*(found.shapes for found in wanted))
    if names != state.keys():
        raise ValueError(
            f"{name} has missing tensors {sorted(names - state.keys())} and unknown tensors "
            f"{sorted(state.keys() - names)}, by gains_and_shifts={config.gains_and_shifts} and the modules of "
            f"{type(model).__name__}: it is damaged, or belongs to another base"
        )


def attach_tokens(model: nn.Module, tokens: Tensor | TokenState) -> TokenInjector:
    """Puts tokens, gains and shifts into a model in place; returns the injector, which holds them as parameters."""
    if find_injector(model) is not None:
        raise ValueError(
            f"{type(model).__name__} has robustness tokens already: call remove_tokens(model) (or .unload()) first"
        )
    stack, state = find_layer_stack(model), as_state(tokens)
    _check_shapes(model, stack, state)
    injector = TokenInjector(state)
    injector.attach(model, stack)
    return injector


def _check_shapes(model: nn.Module, stack: LayerStack, state: TokenState) -> None:
    tokens, name = state[TOKENS], type(model).__name__
    if tokens.dim() not in (2, 3) or tokens.shape[-1] != stack.hidden_size:
        raise ValueError(
            f"robustness tokens must have shape (K, {stack.hidden_size}) or (depth, K, {stack.hidden_size}) for "
            f"{name}, got {tuple(tokens.shape)}: they belong to a base of another width"
        )
    check_depth(model, stack, depth_of(tokens))
    shapes = {key: shape for found in find_adapted_modules(model, stack) for key, shape in found.shapes.items()}
    for key, tensor in state.items():
        if key != TOKENS and tensor.shape != shapes.get(key):
            raise ValueError(
                f"{key!r} of shape {tuple(tensor.shape)} does not fit {name}, which takes "
                f"{shapes.get(key, 'no such gain or shift')}: it belongs to another base"
            )


def check_depth(model: nn.Module, stack: LayerStack, depth: int) -> None:
    """Raises `ValueError` unless that many layers of the model can have tokens of their own."""
    if not 1 <= depth <= len(stack.layers):
        raise ValueError(
            f"token_depth must be from 1 to {len(stack.layers)}, the number of layers of {type(model).__name__}, "
            f'or "all", got {depth}'
        )


def find_injector(model: nn.Module) -> TokenInjector | None:
    """Returns the injector that is attached to the model, or None."""
    return next((injector for *_, injector in _own_hooks(model)), None)


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
def tokens_in(model: nn.Module, tokens: Tensor | TokenState | None) -> Iterator[None]:
    """Runs a model with another state, or without tokens, gains and shifts if None is given; contexts nest.

    The state may have another number of tokens, tokens in fewer layers, and fewer gains and shifts than the model's.
    No gradient flows to it.
    A model without tokens accepts only None, which changes nothing.
    """
    injector = find_injector(model)
    if injector is None:
        if tokens is not None:
            raise ValueError(f"{type(model).__name__} has no robustness tokens to replace: call inject_tokens first")
        yield
        return
    borrowed = None if tokens is None else _to_borrow(as_state(tokens), injector)
    before, before_borrowed = injector.enabled, injector._borrowed
    try:
        injector.set_enabled(borrowed is not None, borrowed=borrowed)
        yield
    finally:
        injector.set_enabled(before, borrowed=before_borrowed)


def _to_borrow(state: TokenState, injector: TokenInjector) -> dict[str, Tensor]:
    own = injector.state
    for name in state.keys() & own.keys():
        given, expected = tuple(state[name].shape), tuple(own[name].shape)
        fits = len(given) in (2, 3) and given[-1] == expected[-1] if name == TOKENS else given == expected
        if not fits:
            raise ValueError(f"{name!r} has shape {given}, in the model it has {expected}: it belongs to another base")
    depth, largest = depth_of(state[TOKENS]), depth_of(own[TOKENS])
    if depth > largest or not state.keys() <= own.keys():
        raise ValueError(
            f"the model has hooks for tokens in {largest} layers, {sorted(own)}; got a state with tokens in {depth} "
            f"layers, {sorted(state)}: call remove_tokens(model), then inject_tokens(model, state)"
        )
    return {name: tensor.detach().to(own[TOKENS].device) for name, tensor in state.items()}


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
        for registry in _registries(module):
            registry.pop(hook_id, None)
    (stack,) = injector._stacks
    if stack.is_timm:
        del stack.owner.forward_intermediates, stack.owner._replicate_for_data_parallel
    torch.compiler.reset()
    return model


def _own_hooks(model: nn.Module) -> Iterator[tuple[nn.Module, int, TokenInjector]]:
    """Yields (module, hook id, injector) for every hook of an injector. Handles would not survive a deepcopy."""
    for module in model.modules():
        for hook_id, hook in [item for registry in _registries(module) for item in registry.items()]:
            injector = _injector_of(hook)
            if injector is not None:
                yield module, hook_id, injector


def _registries(module: nn.Module) -> tuple[dict[int, Any], ...]:
    pre_hooks = module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs
    return *pre_hooks, module._forward_hooks, module._state_dict_pre_hooks


def _injector_of(hook: Any) -> TokenInjector | None:
    owner = getattr(getattr(hook, "func", hook), "__self__", None)
    return owner if isinstance(owner, TokenInjector) else None


def attribute(name: str) -> str:
    """Returns the attribute of a tensor: torch takes no dots in names of parameters."""
    return name.replace(".", "/")


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


def _check_exported_mask(mask: Any, config: Any) -> None:
    # When exporting with sdpa, transformers adds BEiT's position bias to a boolean mask, so it is 1 too high. The
    # softmax ignores a constant, but the tokens' bias stays 0: they would get less attention than the patches.
    if config._attn_implementation == "sdpa" and isinstance(mask, Tensor) and mask.is_floating_point():
        raise ValueError(
            'with robustness tokens, a relative position bias can\'t be exported with attn_implementation="sdpa": '
            'load the base with "eager", or call model.set_attn_implementation("eager")'
        )


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


def _replicate(timm_model: Any, injector: TokenInjector) -> Any:
    """Makes a replica for DataParallel, which would run its original's `forward_intermediates`."""
    replica = type(timm_model)._replicate_for_data_parallel(timm_model)
    replica.forward_intermediates = functools.partial(_forward_intermediates, replica, injector)
    return replica


def _forward_intermediates(timm_model: Any, injector: TokenInjector, *args: Any, **kwargs: Any) -> Any:
    """Runs timm's own method, which splits off the tokens as prefix tokens; then removes them from the prefix."""
    own, k = timm_model.num_prefix_tokens, injector.num_active_tokens
    timm_model.num_prefix_tokens = own + k
    # With norm=True the intermediates pass through the norm before the split. The mark is the norm's, since replicas
    # share an injector.
    timm_model.norm._keeps_robustness_tokens = True
    try:
        output = type(timm_model).forward_intermediates(timm_model, *args, **kwargs)
    finally:
        timm_model.num_prefix_tokens = own
        del timm_model.norm._keeps_robustness_tokens

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
