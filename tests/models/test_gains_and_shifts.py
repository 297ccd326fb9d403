"""Tests tokens in several layers, and gains and shifts, against computations by hand and against changed weights."""

import copy
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from robustness_tokens import RobustnessTokenModel, inject_tokens
from robustness_tokens.configuration import TOKENS, GainsAndShifts
from robustness_tokens.models.gains_and_shifts import find_adapted_modules, fold, kinds_of
from robustness_tokens.models.injection import attach_tokens, find_injector, random_state, remove_tokens, tokens_in
from robustness_tokens.models.layer_stack import find_layer_stack
from robustness_tokens.models.merging import merge
from tests.integration.test_families import assert_close, deep_state, make_case
from tests.support.bases import build_base
from tests.support.families import BASES, FAMILIES, HIDDEN_SIZE


ALL_KINDS = get_args(GainsAndShifts)


def deep_model(**kwargs: Any) -> RobustnessTokenModel:
    """Returns a model with 3 tokens for each layer, gains and shifts, none of them zero."""
    settings = {"num_robustness_tokens": 3, "token_depth": "all", "gains_and_shifts": ALL_KINDS, **kwargs}
    model = RobustnessTokenModel.from_base(build_base("dinov2"), **settings)
    with torch.no_grad():
        for tensor in model.injector.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return model


@torch.no_grad()
def test_each_layer_gets_its_own_tokens_in_place_of_those_before() -> None:
    model, pixel_values = FAMILIES["vit"].build(), FAMILIES["vit"].inputs()["pixel_values"]
    tokens = torch.randn(2, 3, HIDDEN_SIZE)
    hidden_states = model.embeddings(pixel_values)
    for layer, own in zip(model.layers, tokens, strict=True):
        hidden_states = layer(torch.cat([own.expand(2, -1, -1), hidden_states], dim=1))[:, 3:]
    expected = model.layernorm(hidden_states)
    attach_tokens(model, tokens)
    torch.testing.assert_close(model(pixel_values).last_hidden_state, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", [*BASES, "timm_eva_classifier", "dpt_on_dinov2", "upernet_on_beit"])
def test_gains_and_shifts_are_other_weights_of_the_base(name: str) -> None:
    case = make_case(name)
    before = case.run()
    state = deep_state(case.model)
    del state[TOKENS]
    changed = copy.deepcopy(case.model)
    fold(changed, find_layer_stack(changed), state)
    attach_tokens(case.model, {TOKENS: torch.zeros(0, HIDDEN_SIZE), **state})
    with_state = case.run()
    remove_tokens(case.model)
    case.model = changed
    assert_close(with_state, case.run(), tolerance=1e-3)
    with pytest.raises(AssertionError):
        assert_close(with_state, before, tolerance=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", list(BASES))
def test_every_gain_and_shift_changes_the_output(name: str) -> None:
    case = make_case(name)
    attach_tokens(case.model, deep_state(case.model))
    state = {key: tensor.clone() for key, tensor in find_injector(case.model).state.items()}  # type: ignore[union-attr]
    expected = case.run()[0]
    for key, tensor in state.items():
        if not key.endswith(("key.shift", "k_proj.shift")):  # these add the same to all scores of a query
            with tokens_in(case.model, {**state, key: tensor + 0.3 * torch.randn_like(tensor)}):
                assert not torch.allclose(case.run()[0], expected, atol=1e-5), key


def test_what_a_family_has() -> None:
    names = {
        "dinov2": (set(ALL_KINDS), "layer_scale1.gain", "norm"),
        "timm_deit3": (set(ALL_KINDS), "attn.qkv.shift", "bias"),
        "vit": (set(ALL_KINDS), "mlp.fc1.gain", "linear"),
        "aimv2": ({"norm", "patch_embedding"}, "rms_norm1.gain", "norm"),
    }
    for name, (kinds, tensor, kind) in names.items():
        model = FAMILIES[name].build()
        found = find_adapted_modules(model, find_layer_stack(model))
        assert {module.kind for module in found} == kinds
        assert any(tensor in module.shapes for module in found)
        assert kinds_of(model, find_layer_stack(model), [tensor]) == [kind]


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("dinov2", {"token_depth": 3}, 'token_depth must be from 1 to 2, .* Dinov2Model, or "all", got 3'),
        ("dinov2", {"token_depth": 0}, "token_depth"),
        ("dinov2", {"token_depth": "deep"}, "token_depth .*got 'deep'"),
        ("dinov2", {"num_robustness_tokens": 0}, "num_robustness_tokens"),
        ("dinov2", {"gains_and_shifts": ["weights"]}, "gains_and_shifts must be one of .*got 'weights'"),
        ("aimv2", {"gains_and_shifts": ["norm", "bias"]}, r"Aimv2VisionModel has no .*gains_and_shifts=\['bias'\]"),
    ],
)
def test_what_a_base_lacks_is_refused_and_leaves_it_alone(family: str, settings: dict[str, Any], message: str) -> None:
    base = FAMILIES[family].build()
    with pytest.raises(ValueError, match=message):
        RobustnessTokenModel.from_base(base, **settings)
    assert find_injector(base) is None


def test_new_gains_and_shifts_change_nothing() -> None:
    plain = RobustnessTokenModel.from_base(build_base("dinov2"), num_robustness_tokens=3)
    model = RobustnessTokenModel.from_base(build_base("dinov2"), num_robustness_tokens=3, gains_and_shifts=ALL_KINDS)
    with torch.no_grad():
        model.robustness_tokens.copy_(plain.robustness_tokens)
        images = torch.randn(2, 3, 32, 32)
        torch.testing.assert_close(model.get_features(images), plain.get_features(images), rtol=0, atol=1e-6)


def test_an_adapter_comes_back_bit_equal(tmp_path: Path) -> None:
    model = deep_model()
    model.config.base_model_name_or_path = ""
    images = torch.randn(2, 3, 32, 32)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["schema_version"], config["token_depth"]) == (2, 2)
    assert config["gains_and_shifts"] == list(ALL_KINDS)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored[TOKENS].shape == (2, 3, 32)
    assert stored["norm1.gain"].shape == (2, 32)
    assert stored["mlp.fc1.gain"].shape == stored["mlp.fc1.shift"].shape == (2, 64)
    assert stored["patch_embedding.weight"].shape == (32, 3, *stored["patch_embedding.weight"].shape[2:])
    assert stored.keys() == model.injector.state.keys()
    loaded = RobustnessTokenModel.from_pretrained(tmp_path, base_model=build_base("dinov2"))
    injected = inject_tokens(build_base("dinov2"), tmp_path)
    with torch.no_grad():
        expected = model(images).last_hidden_state
        assert torch.equal(loaded(images).last_hidden_state, expected)
        assert torch.equal(injected(images).last_hidden_state, expected)
    assert sum(p.numel() for p in loaded.parameters() if p.requires_grad) == sum(t.numel() for t in stored.values())


def without(name: str) -> Any:
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


DAMAGED: list[tuple[Any, str]] = [
    (without("norm1.gain"), r"missing tensors \['norm1.gain'\]"),
    (without(TOKENS), f"must hold .*'{TOKENS}'"),
    (lambda tensors: {**tensors, "norm3.gain": torch.zeros(2, 32)}, "'norm3.gain' of shape .* does not fit"),
    (lambda tensors: {**tensors, "norm1.gain": torch.zeros(2, 31)}, r"'norm1.gain' of shape \(2, 31\)"),
    (lambda tensors: {**tensors, "norm1.gain": torch.zeros(2, 32).half()}, "torch.float16"),
    (lambda tensors: {**tensors, "norm1.gain": torch.full((2, 32), torch.nan)}, "norm1.gain is not finite"),
    (lambda tensors: {**tensors, "model.weight": torch.zeros(1)}, "model.weight"),
    (lambda tensors: {**tensors, "a\nb.gain": torch.zeros(1)}, r"a\\nb.gain"),
    (lambda tensors: {**tensors, "big.gain": torch.zeros(1 << 25)}, "bytes, expected at most"),
    (lambda tensors: {**tensors, TOKENS: torch.zeros(3, 3, 32)}, r"shape \(2, 3, 32\).*shape \(3, 3, 32\)"),
    (lambda tensors: {**tensors, TOKENS: torch.zeros(3, 32)}, r"shape \(2, 3, 32\).*shape \(3, 32\)"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGED)
@pytest.mark.parametrize("load", [RobustnessTokenModel.from_pretrained, None])
def test_damaged_gains_and_shifts_are_refused(damage: Any, message: str, load: Any, tmp_path: Path) -> None:
    deep_model().save_pretrained(tmp_path)
    file, base = tmp_path / "model.safetensors", build_base("dinov2")
    save_file(damage(load_file(file)), file)
    with pytest.raises(ValueError, match=message):
        inject_tokens(base, tmp_path) if load is None else load(tmp_path, base_model=base)
    assert find_injector(base) is None


@pytest.mark.parametrize("kinds", [["norm"], ["norm", "linear", "bias"], []])
def test_a_file_holds_just_the_kinds_of_its_config(kinds: list[str], tmp_path: Path) -> None:
    deep_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "gains_and_shifts": kinds}))
    with pytest.raises(ValueError, match="patch_embedding"):
        inject_tokens(build_base("dinov2"), tmp_path)


def test_a_model_takes_other_states_of_its_kind() -> None:
    model, images = deep_model(), torch.randn(2, 3, 32, 32)
    own = {name: tensor.detach().clone() for name, tensor in model.injector.state.items()}
    with torch.no_grad():
        expected = model(images).last_hidden_state
        with model.disable_adapter():
            base = model(images).last_hidden_state
        with tokens_in(model, own):
            assert torch.equal(model(images).last_hidden_state, expected)
        with tokens_in(model, {TOKENS: torch.zeros(0, 32)}):
            assert torch.equal(model(images).last_hidden_state, base)
        alone = inject_tokens(build_base("dinov2"), own[TOKENS])
        with tokens_in(model, own[TOKENS]):
            assert torch.equal(model(images).last_hidden_state, alone(images).last_hidden_state)
        assert torch.equal(model(images).last_hidden_state, expected)
    with pytest.raises(ValueError, match="hooks for tokens in 2 layers"), tokens_in(model, torch.zeros(3, 1, 32)):
        pass
    with pytest.raises(ValueError, match="call remove_tokens"), tokens_in(alone, own):
        pass


def test_a_second_adapter_finds_the_base_as_it_was() -> None:
    base, images = build_base("dinov2"), torch.randn(2, 3, 32, 32)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    first, second = deep_state(base), {TOKENS: torch.randn(1, 32), "norm2.shift": torch.randn(2, 32)}
    outputs = []
    with torch.no_grad():
        for state in (first, second, first):
            inject_tokens(base, state)
            outputs.append(base(images).last_hidden_state)
            remove_tokens(base)
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in base.state_dict().items())


@pytest.mark.parametrize("name", ["dinov2", "vit", "clip_vision", "timm_eva", "beit_relative", "aimv2"])
def test_gains_and_shifts_alone_merge_in_every_family(name: str) -> None:
    case = make_case(name)
    state = deep_state(case.model) | {TOKENS: torch.zeros(0, HIDDEN_SIZE)}
    attach_tokens(case.model, state)
    before = {key: tensor.clone() for key, tensor in case.model.state_dict().items()}
    expected = case.run()
    plain = merge(case.model)
    assert type(plain) is type(case.model)
    assert find_injector(plain) is None
    assert all(torch.equal(tensor, before[key]) for key, tensor in case.model.state_dict().items())
    case.model = plain
    assert_close(case.run(), expected, tolerance=1e-3)


@pytest.mark.parametrize("name", ["dinov2", "dinov3_vit", "timm_deit3"])
def test_gains_and_shifts_merge_with_tokens_of_the_input(name: str) -> None:
    case = make_case(name)
    state = deep_state(case.model)
    state[TOKENS] = state[TOKENS][0]
    attach_tokens(case.model, state)
    expected = case.run().last_hidden_state
    plain = merge(case.model)
    with torch.no_grad():
        found = plain(**case.inputs).last_hidden_state
    torch.testing.assert_close(found[:, -4:], expected[:, -4:], rtol=1e-4, atol=1e-4)


def test_tokens_of_deeper_layers_do_not_merge() -> None:
    with pytest.raises(ValueError, match=r"tokens in the first 2 layers can't be merged.*export_onnx"):
        deep_model().merge_and_unload()


def test_borrowed_tensors_get_no_gradient() -> None:
    model, images = deep_model(), torch.randn(1, 3, 32, 32)
    state: dict[str, Tensor] = {
        name: tensor.detach().requires_grad_() for name, tensor in model.injector.state.items()
    }
    with tokens_in(model, state):
        assert not model(images).last_hidden_state.requires_grad


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2", "timm_deit3", "timm_eva"])
def test_borrowed_tokens_of_the_input_enter_there_alone(name: str) -> None:
    case, other = make_case(name), make_case(name)
    tokens = torch.randn(4, HIDDEN_SIZE)
    attach_tokens(case.model, torch.randn(2, 3, HIDDEN_SIZE))
    attach_tokens(other.model, tokens)
    for given in (tokens, tokens[None]):
        with tokens_in(case.model, given):
            assert torch.equal(case.run()[0], other.run()[0])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({TOKENS: torch.zeros(3, 16)}, r"'robustness_tokens' has shape \(3, 16\), in the model it has \(2, 3, 32\)"),
        ({TOKENS: torch.zeros(32)}, r"has shape \(32,\)"),
        ({TOKENS: torch.zeros(3, 32), "norm1.gain": torch.zeros(2, 1)}, r"'norm1.gain' has shape \(2, 1\)"),
        ({TOKENS: torch.zeros(3, 32), "norm1.gain": torch.zeros(1, 32)}, r"'norm1.gain' has shape \(1, 32\)"),
        ({"norm1.gain": torch.zeros(2, 32)}, "needs 'robustness_tokens'"),
    ],
)
def test_what_does_not_fit_is_not_borrowed(state: dict[str, Tensor], message: str) -> None:
    model, images = deep_model(), torch.randn(1, 3, 32, 32)
    expected = model(images).last_hidden_state
    with pytest.raises(ValueError, match=message), tokens_in(model, state):
        pass
    assert torch.equal(model(images).last_hidden_state, expected)


@torch.no_grad()
def test_small_gains_count_in_half_precision() -> None:
    base, images = build_base("dinov2").bfloat16(), torch.randn(1, 3, 32, 32).bfloat16()
    before = base(images).last_hidden_state
    gains = {"layer_scale1.gain": torch.full((2, 32), 0.003), "norm1.gain": torch.full((2, 32), 0.003)}
    inject_tokens(base, {TOKENS: torch.zeros(0, 32), **gains})
    assert not torch.equal(base(images).last_hidden_state, before)


@torch.no_grad()
def test_small_gains_of_an_adapter_in_half_precision_merge() -> None:
    model = RobustnessTokenModel.from_base(build_base("dinov2"), num_robustness_tokens=0, gains_and_shifts=ALL_KINDS)
    for name, tensor in model.injector.state.items():
        tensor.fill_(0.003 if name.endswith(".gain") else 0)
    images = torch.randn(1, 3, 32, 32).bfloat16()
    model.bfloat16()
    with model.disable_adapter():
        before = model(images).last_hidden_state
    assert not torch.equal(model.merge_and_unload()(images).last_hidden_state, before)


def test_random_states_have_the_norms_of_the_given_one_whatever_its_order() -> None:
    state = {name: tensor.detach() for name, tensor in deep_model().injector.state.items()}
    random, reversed_ = random_state(state, seed=5), random_state(dict(reversed(state.items())), seed=5)
    assert random.keys() == state.keys()
    torch.testing.assert_close(random[TOKENS].norm(dim=-1), state[TOKENS].norm(dim=-1))
    for name, tensor in random.items():
        assert torch.equal(tensor, reversed_[name])
        torch.testing.assert_close(tensor.norm(), state[name].norm())
        assert not torch.allclose(tensor, state[name])
    assert not torch.equal(random_state(state, seed=2)[TOKENS], random[TOKENS])


def test_gains_and_shifts_without_tokens_merge_at_any_depth_and_leave_the_model_alone() -> None:
    model, images = deep_model(num_robustness_tokens=0), torch.randn(1, 3, 32, 32)
    expected = model(images).last_hidden_state
    plain = model.merge_and_unload()
    torch.testing.assert_close(plain(images).last_hidden_state, expected, rtol=1e-4, atol=1e-4)
    assert all(parameter.requires_grad for parameter in plain.parameters())
    with tokens_in(model, torch.zeros(0, 32)):
        assert find_injector(model.merge_and_unload()) is None
    assert torch.equal(model(images).last_hidden_state, expected)
    with pytest.raises(ValueError, match="image_size must be a multiple of the patch size"):
        model.merge_and_unload(image_size=13)


def test_kinds_have_one_order() -> None:
    first, second = (
        RobustnessTokenModel.from_base(build_base("dinov2"), gains_and_shifts=kinds).config.gains_and_shifts  # type: ignore[arg-type]
        for kinds in (["bias", "norm"], ("norm", "bias"))
    )
    assert first == second == ["norm", "bias"]
    with pytest.raises(ValueError, match="must be a list, such as"):
        RobustnessTokenModel.from_base(build_base("dinov2"), gains_and_shifts="norm")  # type: ignore[arg-type]
