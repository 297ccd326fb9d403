"""Checks what holds for every family: see families.py."""

import copy
import pickle
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from robustness_tokens.configuration import TOKENS
from robustness_tokens.models.gains_and_shifts import find_adapted_modules
from robustness_tokens.models.injection import TokenInjector, attach_tokens, find_injector, remove_tokens
from robustness_tokens.models.layer_stack import find_layer_stack
from robustness_tokens.models.modeling import inject_tokens
from tests.support.families import BASES, FAMILIES, HIDDEN_SIZE, Family


NUM_TOKENS = 3
DEPTH = 2  # all layers
COMPILED = ("dinov2", "timm_eva")  # of the others each takes seconds: slow
ALL = pytest.mark.parametrize("name", list(FAMILIES))
RECORDING = pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.recorded])
LEARNED = pytest.mark.parametrize("learned", ["input", "deep"])
"""Tokens at the input alone, or tokens for each layer with gains and shifts."""


@dataclass
class Case:
    """A base, and its outputs without tokens."""

    model: Any
    inputs: dict[str, Tensor]
    family: Family

    def run(self, **kwargs: Any) -> Any:
        with torch.no_grad():
            return self.model(**self.inputs, **kwargs)

    def inject(self, learned: str = "input") -> TokenInjector:
        return attach_tokens(self.model, tokens() if learned == "input" else deep_state(self.model))


def make_case(name: str, **kwargs: Any) -> Case:
    family = FAMILIES[name]
    return Case(family.build(**kwargs), family.inputs(), family)


def tokens() -> Tensor:
    return torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(3))


def deep_state(model: Any) -> dict[str, Tensor]:
    """Returns tokens for each layer, and all gains and shifts that the model takes, none of them zero."""
    generator = torch.Generator().manual_seed(4)
    state = {TOKENS: torch.randn(DEPTH, NUM_TOKENS, HIDDEN_SIZE, generator=generator)}
    for found in find_adapted_modules(model, find_layer_stack(model)):
        state |= {key: torch.randn(shape, generator=generator) * 0.2 for key, shape in found.shapes.items()}
    return state


def flatten(output: Any, path: str = "") -> Iterator[tuple[str, Tensor | None]]:
    """Lists (path, tensor or None) for everything in an output, however deeply nested."""
    if output is None or isinstance(output, Tensor):
        yield path, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from flatten(value, f"{path}.{key}")
    elif isinstance(output, tuple | list):
        for index, value in enumerate(output):
            yield from flatten(value, f"{path}.{index}")
    else:
        raise TypeError(f"{path}: {type(output).__name__}")


def shapes(output: Any) -> dict[str, Any]:
    return {path: None if tensor is None else tuple(tensor.shape) for path, tensor in flatten(output)}


def assert_equal(actual: Any, expected: Any) -> None:
    """Asserts the same class, structure and bits."""
    assert type(actual) is type(expected)
    assert shapes(actual) == shapes(expected)
    for (path, one), (_, other) in zip(flatten(actual), flatten(expected), strict=True):
        assert one is other is None or torch.equal(one, other), path  # type: ignore[arg-type]


def assert_close(actual: Any, expected: Any, tolerance: float = 2e-5) -> None:
    assert shapes(actual) == shapes(expected)
    for (_, one), (_, other) in zip(flatten(actual), flatten(expected), strict=True):
        if one is not None:
            assert other is not None
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def main_outputs(output: Any) -> dict[str, Tensor]:
    """Selects the outputs that every token must change: floating, but no losses, text or recorded states."""
    return {
        path: tensor
        for path, tensor in flatten(output)
        if tensor is not None and tensor.is_floating_point() and not path.startswith((".text", ".mask", ".hidden"))
    }


def attributes(model: nn.Module) -> dict[str, Any]:
    """Lists every attribute of every module: tensors by identity, hooks by name, plain values as they are."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if "hooks" in key and isinstance(value, dict):
                found[f"{name}:{key}"] = [getattr(hook, "__qualname__", repr(hook)) for hook in value.values()]
            elif isinstance(value, dict):
                found[f"{name}:{key}"] = {k: id(v) for k, v in value.items()}
            else:
                found[f"{name}:{key}"] = value if isinstance(value, bool | int | float | str) else id(value)
    return found


@LEARNED
@ALL
def test_outputs_have_the_bases_class_and_shapes(name: str, learned: str) -> None:
    case = make_case(name)
    before = case.run()
    case.inject(learned)
    after = case.run()
    assert type(after) is type(before)
    assert shapes(after) == shapes(before)
    changed = main_outputs(after)
    assert changed
    for path, tensor in changed.items():
        assert tensor.isfinite().all()
        assert (tensor - main_outputs(before)[path]).abs().max() > 1e-3, f"the tokens don't reach {path}"


@LEARNED
@RECORDING
def test_recorded_states_have_the_bases_shapes(name: str, learned: str) -> None:
    # sdpa keeps no attention weights
    case = make_case(name, **({"attn_implementation": "eager"} if FAMILIES[name].implementations else {}))
    record = {f"output_{key}": True for key in case.family.recorded}
    before = case.run(**record)
    case.inject(learned)
    after = case.run(**record)
    assert type(after) is type(before)
    assert shapes(after) == shapes(before)
    assert any("hidden_states" in path for path in shapes(after))
    assert any("attentions" in path for path in shapes(after)) == ("attentions" in case.family.recorded)
    recorded = dict(flatten(after))
    assert all(
        one is recorded[path] is None or torch.equal(one, recorded[path])  # type: ignore[arg-type]
        for path, one in flatten(case.run())
    ), "recording changes what is recorded"


@RECORDING
def test_recorded_states_are_those_of_the_layers(name: str) -> None:
    """Checks that the first state is the embedding, and the others are the layers' outputs without tokens."""
    case = make_case(name)
    if find_layer_stack(case.model).is_timm:
        pytest.skip("timm's are maps of patches; see test_injection.py")
    before = dict(flatten(case.run(output_hidden_states=True)))
    case.inject()
    seen: list[Tensor] = []
    for layer in find_layer_stack(case.model).layers:
        layer.register_forward_hook(lambda module, args, output: seen.append(output))
    after = dict(flatten(case.run(output_hidden_states=True)))
    states = [tensor for path, tensor in after.items() if "hidden_states" in path and "text" not in path]
    bases = [tensor for path, tensor in before.items() if "hidden_states" in path and "text" not in path]
    assert len(states) == len(bases) == len(seen) + 1
    sequence = bases[0].shape[1]  # type: ignore[union-attr]
    torch.testing.assert_close(states[0], bases[0], rtol=0, atol=0)
    for state, output in zip(states[1:-1], seen[:-1], strict=True):
        torch.testing.assert_close(state, output[:, -sequence:], rtol=0, atol=0)
    assert not torch.equal(states[-1], bases[-1])  # type: ignore[arg-type]


@LEARNED
@RECORDING
def test_selected_hidden_states_are_those_of_all(name: str, learned: str) -> None:
    case = make_case(name)
    is_timm = find_layer_stack(case.model).is_timm
    for selected in ([0], [0, -1], [1]):
        base_shapes = shapes(case.run(output_hidden_states=selected))
        case.inject(learned)
        every = dict(flatten(case.run(output_hidden_states=True)))
        chosen = case.run(output_hidden_states=selected)
        assert shapes(chosen) == base_shapes
        for path, tensor in flatten(chosen):
            if tensor is not None and not (is_timm and "hidden_states" in path):  # timm leaves the others out
                assert torch.equal(tensor, every[path]), path  # type: ignore[arg-type]
        remove_tokens(case.model)


@LEARNED
@ALL
def test_tuples_hold_what_the_output_class_does(name: str, learned: str) -> None:
    case = make_case(name)
    recorded = {"output_hidden_states": True} if case.family.recorded else {}
    before = case.run(return_dict=False, **recorded)
    case.inject(learned)
    after = case.run(return_dict=False, **recorded)
    assert isinstance(after, tuple)
    assert shapes(after) == shapes(before)
    expected = [tensor for _, tensor in flatten(case.run(**recorded)) if tensor is not None]
    actual = [tensor for _, tensor in flatten(after) if tensor is not None]
    assert len(actual) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


@LEARNED
@ALL
def test_toggling_removing_and_injecting_again(name: str, learned: str) -> None:
    case = make_case(name)
    before, untouched = case.run(), attributes(case.model)
    injector = case.inject(learned)
    injected = case.run()
    injector.set_enabled(False)
    assert_equal(case.run(), before)
    injector.set_enabled(False)
    injector.set_enabled(True)
    assert_equal(case.run(), injected)
    assert remove_tokens(case.model) is case.model
    assert attributes(case.model) == untouched
    assert_equal(case.run(), before)
    case.inject(learned)
    assert_equal(case.run(), injected)
    injector = find_injector(case.model)  # type: ignore[assignment]
    injector.set_enabled(False)
    remove_tokens(case.model)
    assert attributes(case.model) == untouched, "removed while disabled"


@LEARNED
@ALL
def test_gradients_reach_what_is_learned_only(name: str, learned: str) -> None:
    case = make_case(name)
    case.model.requires_grad_(False)
    injector = case.inject(learned)
    loss(case.model(**case.inputs)).backward()
    for key, tensor in injector.state.items():
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        if is_used(case, key):
            assert (tensor.grad.abs().amax(dim=-1) > 0).all(), key
    assert all(parameter.grad is None for parameter in case.model.parameters())


def is_used(case: Case, key: str) -> bool:
    """Tells whether a tensor changes the outputs: the shift of a key adds the same to all scores of a query."""
    return not re.search(r"(^|[._])(key|k_proj)\.shift$", key)


def loss(output: Any) -> Tensor:
    """Returns a number that depends unevenly on every main output."""
    total = torch.zeros(())
    for tensor in main_outputs(output).values():
        if tensor.requires_grad:
            total = total + (tensor * torch.linspace(-1, 1, tensor.numel()).view(tensor.shape)).sum()
    return total


@ALL
def test_order_of_the_tokens_is_irrelevant(name: str) -> None:
    """Tokens have no position: neither a rotary one nor a relative bias may fall on them."""
    case = make_case(name)
    injector = case.inject()
    before = case.run()
    with torch.no_grad():
        injector.robustness_tokens.copy_(tokens().flip(0))
    assert_close(case.run(), before, tolerance=2e-4)


@LEARNED
@ALL
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_have_tokens_of_their_own(name: str, how: str, learned: str) -> None:
    case = make_case(name)
    if how == "pickle" and not case.family.can_pickle:
        with pytest.raises(AttributeError, match="output_capturing_hook"):
            pickle.dumps(case.model)
        return
    injector = case.inject(learned)
    other = copy.deepcopy(case.model) if how == "deepcopy" else pickle.loads(pickle.dumps(case.model))
    expected = case.run()
    twin = Case(other, case.inputs, case.family)
    assert_equal(twin.run(), expected)
    copied = find_injector(other)
    assert copied is not None
    assert copied is not injector
    with torch.no_grad():
        for tensor in copied.parameters():
            tensor.zero_()
    assert_equal(case.run(), expected)
    assert any(not torch.equal(one, main_outputs(expected)[path]) for path, one in main_outputs(twin.run()).items())
    remove_tokens(other)
    assert_equal(case.run(), expected)
    remove_tokens(case.model)
    assert_equal(twin.run(), case.run())


@LEARNED
@pytest.mark.parametrize("use_reentrant", [True, False])
@ALL
def test_gradient_checkpointing_gives_the_same_gradient(name: str, use_reentrant: bool, learned: str) -> None:
    case = make_case(name)
    case.model.requires_grad_(False)
    injector = case.inject(learned)
    loss(case.model(**case.inputs)).backward()
    expected = {key: tensor.grad for key, tensor in injector.state.items()}
    injector.zero_grad(set_to_none=True)
    if not case.model.supports_gradient_checkpointing:
        pytest.skip(f"{type(case.model).__name__} does not support it")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # it has another name since 5.20, which 5.4 doesn't know
        case.model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for module in case.model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True  # transformers checkpoints a layer only then
    calls: list[None] = []
    first = next(find_layer_stack(case.model).layers[0].children())
    first.register_forward_hook(lambda module, args, output: calls.append(None))
    loss(case.model(**case.inputs)).backward()
    assert len(calls) == 2, "the layer was not run again in the backward pass"
    for key, tensor in injector.state.items():
        torch.testing.assert_close(tensor.grad, expected[key], rtol=1e-4, atol=1e-5)


@LEARNED
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if len(family.implementations) == 2])
def test_eager_and_sdpa_agree(name: str, learned: str) -> None:
    outputs = []
    for implementation in ("eager", "sdpa"):
        case = make_case(name, attn_implementation=implementation)
        owner: Any = find_layer_stack(case.model).owner
        assert owner.config._attn_implementation == implementation
        case.inject(learned)
        outputs.append(case.run())
    assert_close(outputs[0], outputs[1], tolerance=2e-4)


@LEARNED
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in COMPILED else pytest.mark.slow) for name in FAMILIES]
)
def test_compiles_as_one_graph(name: str, learned: str) -> None:
    torch._dynamo.reset()
    case = make_case(name)
    injector = case.inject(learned)
    expected = case.run()
    compiled = Case(torch.compile(case.model, fullgraph=True, backend="aot_eager"), case.inputs, case.family)
    assert_close(compiled.run(), expected)
    injector.set_enabled(False)
    assert_close(compiled.run(), remove_and_run(case))


def remove_and_run(case: Case) -> Any:
    """Returns the base's output, computed by a copy without hooks."""
    plain: PreTrainedModel = remove_tokens(copy.deepcopy(case.model))
    return Case(plain, case.inputs, case.family).run()


@LEARNED
@pytest.mark.parametrize("name", list(BASES))
def test_half_precision_bases_take_float32_tokens(name: str, learned: str) -> None:
    case = make_case(name)
    case.model.to(torch.bfloat16)
    case.inputs = {k: v.bfloat16() if k == "pixel_values" else v for k, v in case.inputs.items()}
    before = case.run()
    injector = case.inject(learned)
    after = case.run()
    assert injector.robustness_tokens.dtype == torch.float32
    for (path, one), (_, other) in zip(flatten(after), flatten(before), strict=True):
        assert one is other is None or one.dtype == other.dtype, path  # type: ignore[union-attr]


@pytest.mark.parametrize("name", ["clip_two_towers", "dpt_on_dinov2", "upernet_on_beit", "timm_eva_classifier"])
def test_inject_tokens_is_the_same_mechanism(name: str) -> None:
    case, other = make_case(name), make_case(name)
    case.inject()
    assert inject_tokens(other.model, tokens()) is other.model
    assert_equal(other.run(), case.run())
    injector = find_injector(other.model)
    assert injector is not None
    assert not injector.robustness_tokens.requires_grad
