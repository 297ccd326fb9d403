"""Tests where tokens enter and leave, against computations by hand, and which models are refused."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn
from torch.nn import functional as F

from robustness_tokens.configuration import TOKENS
from robustness_tokens.models.injection import TokenInjector, attach_tokens, find_injector, remove_tokens, tokens_in
from robustness_tokens.models.layer_stack import base_fingerprint, find_layer_stack
from robustness_tokens.models.modeling import inject_tokens
from tests.support.families import BASES, BATCH_SIZE, DEIT3, FAMILIES, HIDDEN_SIZE, hf, timm


NUM_TOKENS = 3
TIMM = ["timm_deit3", "timm_vit_registers", "timm_vit_no_cls", "timm_eva"]


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(3))


def build(name: str, **kwargs: Any) -> Any:
    return FAMILIES[name].build(**kwargs).requires_grad_(False)


def run(model: Any, name: str, **kwargs: Any) -> Any:
    with torch.no_grad():
        return model(**FAMILIES[name].inputs(), **kwargs)


def prepend(tokens: Tensor, hidden_states: Tensor) -> Tensor:
    return torch.cat([tokens.expand(hidden_states.shape[0], -1, -1), hidden_states], dim=1)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_vit_by_hand(tokens: Tensor) -> None:
    model, pixel_values = build("vit"), FAMILIES["vit"].inputs()["pixel_values"]
    hidden_states = prepend(tokens, model.embeddings(pixel_values))
    for layer in model.layers:
        hidden_states = layer(hidden_states)
    expected = model.layernorm(hidden_states[:, NUM_TOKENS:])
    attach_tokens(model, tokens)
    output = model(pixel_values)
    close(output.last_hidden_state, expected)
    close(output.pooler_output, model.pooler(expected))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["beit_relative", "beit_shared"])
def test_relative_position_bias_by_hand(name: str, implementation: str, tokens: Tensor) -> None:
    """Tokens attend and are attended to with bias 0; the patches keep theirs among each other."""
    model, pixel_values = build(name, attn_implementation=implementation), FAMILIES[name].inputs()["pixel_values"]
    hidden_states = prepend(tokens, model.embeddings(pixel_values))
    sequence = hidden_states.shape[1]
    for layer in model.layers:
        bias = torch.zeros(4, sequence, sequence)  # 4 heads
        source = layer.relative_position_bias or model.shared_position_bias
        bias[:, NUM_TOKENS:, NUM_TOKENS:] = source((2, 2))[0]
        attention, normed = layer.attention, layer.layernorm_before(hidden_states)
        query, key, value = (
            projection(normed).unflatten(2, (4, 8)).transpose(1, 2)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        weights = (query @ key.transpose(2, 3) / 8**0.5 + bias).softmax(dim=-1)
        mixed = attention.o_proj((weights @ value).transpose(1, 2).flatten(2))
        hidden_states = hidden_states + layer.lambda_1 * mixed
        hidden_states = hidden_states + layer.lambda_2 * layer.mlp(layer.layernorm_after(hidden_states))
    attach_tokens(model, tokens)
    close(model(pixel_values).last_hidden_state, model.layernorm(hidden_states[:, NUM_TOKENS:]))


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize(("name", "masked"), [("vit_masked", slice(4, 5)), ("siglip2_vision", slice(2, 4))])
def test_masked_positions_stay_masked(name: str, masked: slice, implementation: str, tokens: Tensor) -> None:
    """Checks that a mask for N positions moves with them and hides the same ones."""
    model, inputs = build(name, attn_implementation=implementation), FAMILIES[name].inputs()
    attach_tokens(model, tokens)
    before = model(**inputs).last_hidden_state
    hidden, shown = copy.deepcopy(inputs), copy.deepcopy(inputs)
    if name == "vit_masked":  # the second image's last patch is hidden, as position 4 behind the CLS token
        hidden["pixel_values"][1, :, 8:, 8:] += 1.0
        shown["pixel_values"][1, :, :8, :8] += 1.0
    else:
        hidden["pixel_values"][1, 2:] += 1.0
        shown["pixel_values"][1, :1] += 1.0
    kept = [index for index in range(before.shape[1]) if index not in range(masked.start, masked.stop)]
    close(model(**hidden).last_hidden_state[:, kept], before[:, kept])
    assert (model(**shown).last_hidden_state[1, kept] - before[1, kept]).abs().amax(dim=1).min() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_tokens_are_attended_to_under_a_mask(implementation: str, tokens: Tensor) -> None:
    model, inputs = build("vit_masked", attn_implementation=implementation), FAMILIES["vit_masked"].inputs()
    injector = attach_tokens(model, tokens)
    before = model(**inputs).last_hidden_state
    for index in range(NUM_TOKENS):
        injector.robustness_tokens.copy_(tokens)
        injector.robustness_tokens[index] *= -2.0
        assert ((model(**inputs).last_hidden_state - before).abs().amax(dim=(1, 2)) > 1e-3).all()


def test_two_dimensional_masks_of_flash_attention_are_extended(tokens: Tensor) -> None:
    injector = TokenInjector({TOKENS: tokens})
    hidden_states = torch.zeros(2, NUM_TOKENS + 2, HIDDEN_SIZE)
    for mask in (torch.tensor([[1, 1], [1, 0]]), torch.tensor([[True, True], [True, False]])):
        _, kwargs = injector.pad_attention_mask(nn.Identity(), (hidden_states,), {"attention_mask": mask})
        assert kwargs["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
        assert kwargs["attention_mask"].dtype == mask.dtype


@pytest.mark.parametrize(("mask", "expected"), [(torch.zeros(1, 1, 1, 2), 0.0), (torch.ones(1, 1, 1, 2).bool(), True)])
def test_masks_of_one_row_stay_so(mask: Tensor, expected: float, tokens: Tensor) -> None:
    args, _ = TokenInjector({TOKENS: tokens}).pad_attention_mask(
        nn.Identity(), (torch.zeros(1, 5, HIDDEN_SIZE), mask), {}
    )
    assert args[1].shape == (1, 1, 1, NUM_TOKENS + 2)
    assert (args[1] == expected).all()


def test_masks_of_another_kind_are_refused(tokens: Tensor) -> None:
    """Refuses flex attention's block masks, which would not cover the tokens."""
    with pytest.raises(ValueError, match='attn_implementation="sdpa"'):
        TokenInjector({TOKENS: tokens}).pad_attention_mask(
            nn.Identity(), (torch.zeros(1, 5, HIDDEN_SIZE),), {"attention_mask": object()}
        )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_beit_may_not_stretch_its_bias_over_the_tokens(implementation: str, tokens: Tensor) -> None:
    model = build("beit_relative", attn_implementation=implementation)
    before = run(model, "beit_relative", interpolate_pos_encoding=True).last_hidden_state
    injector = attach_tokens(model, tokens)
    with pytest.raises(ValueError, match="interpolate_pos_encoding=True"):
        run(model, "beit_relative", interpolate_pos_encoding=True)
    injector.set_enabled(False)
    assert torch.equal(run(model, "beit_relative", interpolate_pos_encoding=True).last_hidden_state, before)


@pytest.mark.parametrize("name", ["beit_shared", "beit_absolute"])
def test_beit_may_interpolate_otherwise(name: str, tokens: Tensor) -> None:
    model = build(name)
    attach_tokens(model, tokens)
    expected = run(model, name).last_hidden_state
    close(run(model, name, interpolate_pos_encoding=True).last_hidden_state, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kwargs"),
    [("dinov2", {}), ("dinov3_vit", {}), ("beit_relative", {}), ("vit", {"interpolate_pos_encoding": True})],
)
def test_other_image_sizes(name: str, kwargs: dict[str, Any], tokens: Tensor) -> None:
    model, pixel_values = build(name), torch.randn(BATCH_SIZE, 3, 24, 32)
    before = model(pixel_values, **kwargs).last_hidden_state
    attach_tokens(model, tokens)
    after = model(pixel_values, **kwargs).last_hidden_state
    assert after.shape == before.shape
    assert (after - before).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", TIMM)
def test_timm_intermediates_by_hand(name: str, norm: bool, tokens: Tensor) -> None:
    model, pixel_values = build(name), FAMILIES[name].inputs()["pixel_values"]
    seen: list[Tensor] = []
    attach_tokens(model, tokens)
    timm_model = model.timm_model
    handles = [block.register_forward_hook(lambda m, args, out: seen.append(out)) for block in timm_model.blocks]
    features = timm_model.forward_features(pixel_values)
    for handle in handles:
        handle.remove()
    prefix = timm_model.num_prefix_tokens
    states = [state[:, NUM_TOKENS:] for state in seen]
    close(features, timm_model.norm(seen[-1]))
    final, maps = timm_model.forward_intermediates(pixel_values, norm=norm)
    assert torch.equal(final, features)
    assert timm_model.num_prefix_tokens == prefix
    remove_tokens(model)
    expected = [timm_model.norm(state) if norm else state for state in states]
    for image_map, state in zip(maps, expected, strict=True):
        close(image_map, state[:, prefix:].transpose(1, 2).unflatten(2, (2, 2)))


@torch.no_grad()
@pytest.mark.parametrize(
    "kwargs",
    [
        {"output_fmt": "NLC"},
        {"output_fmt": "NLC", "intermediates_only": True},
        {"indices": [0], "stop_early": True, "intermediates_only": True},
        {"return_prefix_tokens": True},
        {"return_prefix_tokens": True, "intermediates_only": True, "norm": True},
        {"output_dict": True},
        {"output_dict": True, "return_prefix_tokens": True, "norm": True},
        {"output_dict": True, "intermediates_only": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", TIMM)
def test_timm_intermediates_have_the_bases_structure(name: str, kwargs: dict[str, Any], tokens: Tensor) -> None:
    if name == "timm_eva" and "output_dict" in kwargs:
        pytest.skip("Eva has no output_dict")
    model, pixel_values = build(name), FAMILIES[name].inputs()["pixel_values"]
    before = model.timm_model.forward_intermediates(pixel_values, **kwargs)
    injector = attach_tokens(model, tokens)
    after = model.timm_model.forward_intermediates(pixel_values, **kwargs)
    assert structure(after) == structure(before)
    injector.set_enabled(False)
    torch.testing.assert_close(model.timm_model.forward_intermediates(pixel_values, **kwargs), before, rtol=0, atol=0)


def structure(value: Any) -> Any:
    if isinstance(value, Tensor):
        return tuple(value.shape)
    if isinstance(value, dict):
        return {key: structure(item) for key, item in value.items()}
    return (type(value).__name__, [structure(item) for item in value])


def test_timm_prefix_tokens_come_without_the_robustness_tokens(tokens: Tensor) -> None:
    model, pixel_values = build("timm_eva"), FAMILIES["timm_eva"].inputs()["pixel_values"]
    attach_tokens(model, tokens)
    with torch.no_grad():
        features, pairs = model.timm_model.forward_intermediates(
            pixel_values, norm=True, return_prefix_tokens=True, output_fmt="NLC"
        )
    patches, prefix = pairs[-1]
    close(torch.cat([prefix, patches], dim=1), features)


def test_evas_rotary_positions_skip_the_tokens(tokens: Tensor) -> None:
    model = build("timm_eva")
    attentions = [block.attn for block in model.timm_model.blocks]
    assert [attention.num_prefix_tokens for attention in attentions] == [2, 2]
    injector = attach_tokens(model, tokens)
    assert [attention.num_prefix_tokens for attention in attentions] == [2 + NUM_TOKENS] * 2
    assert model.timm_model.num_prefix_tokens == 2, "the head's own count is about the stripped sequence"
    injector.set_enabled(False)
    assert [attention.num_prefix_tokens for attention in attentions] == [2, 2]
    injector.set_enabled(True)
    remove_tokens(model)
    assert [attention.num_prefix_tokens for attention in attentions] == [2, 2]


@pytest.mark.parametrize("name", ["dinov2", "beit_relative", "timm_deit3", "timm_eva"])
def test_a_context_puts_other_tokens_in_and_nests(name: str, tokens: Tensor) -> None:
    model, more = build(name), torch.randn(7, HIDDEN_SIZE)
    plain = run(model, name).last_hidden_state
    attach_tokens(model, more)
    with_more = run(model, name).last_hidden_state
    remove_tokens(model)
    injector = attach_tokens(model, tokens)
    own, with_own = injector.robustness_tokens, run(model, name).last_hidden_state
    with tokens_in(model, more):
        assert torch.equal(run(model, name).last_hidden_state, with_more)
        with tokens_in(model, None):
            assert torch.equal(run(model, name).last_hidden_state, plain)
            with tokens_in(model, tokens):
                assert torch.equal(run(model, name).last_hidden_state, with_own)
                assert not injector.active_state[TOKENS].requires_grad
            assert torch.equal(run(model, name).last_hidden_state, plain)
        assert torch.equal(run(model, name).last_hidden_state, with_more)
    assert injector.robustness_tokens is own
    assert torch.equal(run(model, name).last_hidden_state, with_own)


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("given", [None, torch.zeros(1, HIDDEN_SIZE)])
@pytest.mark.parametrize("name", ["dinov2", "timm_eva"])
def test_tokens_come_back_after_an_error(name: str, given: Tensor | None, enabled: bool, tokens: Tensor) -> None:
    model = build(name)
    injector = attach_tokens(model, tokens)
    injector.set_enabled(enabled)
    own, expected = injector.robustness_tokens, run(model, name).last_hidden_state

    def fail() -> None:
        with tokens_in(model, given):
            assert injector.num_active_tokens == (0 if given is None else 1)
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert injector.robustness_tokens is own
    assert injector.enabled is enabled
    assert torch.equal(run(model, name).last_hidden_state, expected)


def test_a_model_without_tokens_takes_none_in_a_context(tokens: Tensor) -> None:
    model = build("dinov2")
    before = run(model, "dinov2").last_hidden_state
    with tokens_in(model, None):
        assert torch.equal(run(model, "dinov2").last_hidden_state, before)
    with pytest.raises(ValueError, match="Dinov2Model has no robustness tokens to replace"), tokens_in(model, tokens):
        pass


def test_a_failed_timm_call_leaves_the_model_as_it_was(tokens: Tensor) -> None:
    model, pixel_values = build("timm_eva"), FAMILIES["timm_eva"].inputs()["pixel_values"]
    attach_tokens(model, tokens)
    expected = run(model, "timm_eva").last_hidden_state
    with pytest.raises(AssertionError, match="Output format"):
        model.timm_model.forward_intermediates(pixel_values, output_fmt="other")
    assert model.timm_model.num_prefix_tokens == 2
    assert torch.equal(run(model, "timm_eva").last_hidden_state, expected)


def test_timm_feature_extractors_are_found_inside_their_wrapper(tokens: Tensor) -> None:
    model = timm("TimmWrapperModel", "vit_tiny_patch16_224", **DEIT3, features_only=True, out_indices=[0, 1])()
    before = run(model, "timm_deit3").last_hidden_state
    attach_tokens(model, tokens)
    after = run(model, "timm_deit3").last_hidden_state
    assert structure(after) == structure(before)
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(after, before, strict=True))


SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20}
REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "swin": (
        hf("SwinModel", "SwinConfig", image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 1]),
        "SwinModel is hierarchical",
    ),
    "convnext": (
        hf("ConvNextModel", "ConvNextConfig", hidden_sizes=[4, 8], depths=[1, 1], num_stages=2),
        "found in ConvNextModel.*convolutional",
    ),
    "resnet": (
        hf("ResNetModel", "ResNetConfig", embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic"),
        "no stack of vision transformer layers found in ResNetModel.*convolutional",
    ),
    "vitdet": (
        hf("VitDetBackbone", "VitDetConfig", hidden_size=16, num_hidden_layers=1, num_attention_heads=2),
        "found in VitDetBackbone.*feature maps",
    ),
    "bert": (hf("BertModel", "BertConfig", **SIZES, intermediate_size=16), "found in BertModel.*text"),
    "clip_text": (
        hf("CLIPTextModel", "CLIPTextConfig", **SIZES, intermediate_size=16, bos_token_id=0, eos_token_id=1),
        "found in CLIPTextModel.*text",
    ),
    "timm_resnet": (timm("TimmWrapperModel", "test_resnet"), "found in TimmWrapperModel"),
    "timm_beit": (
        timm("TimmWrapperModel", "beit_base_patch16_224", embed_dim=32, depth=1, num_heads=4),
        "found in TimmWrapperModel",
    ),
    "no model of transformers": (lambda: nn.Sequential(nn.Linear(2, 2)), "found in Sequential"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_what_has_no_single_sequence_is_refused(name: str, tokens: Tensor) -> None:
    make, message = REFUSED[name]
    model = make()
    with pytest.raises(ValueError, match=message):
        attach_tokens(model, tokens)
    assert find_injector(model) is None


@pytest.mark.parametrize("shape", [(3, HIDDEN_SIZE + 1), (HIDDEN_SIZE,), (1, 2, 3, HIDDEN_SIZE)])
def test_tokens_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    model = build("dinov2")
    with pytest.raises(ValueError, match=rf"\(depth, K, {HIDDEN_SIZE}\) for Dinov2Model, got \({shape[0]},"):
        attach_tokens(model, torch.zeros(shape))
    assert find_injector(model) is None


@pytest.mark.parametrize("name", ["dinov2", "dinov2_classifier", "timm_eva", "clip_two_towers"])
def test_a_second_injection_is_refused(name: str, tokens: Tensor) -> None:
    model = build(name)
    injector = attach_tokens(model, tokens)
    expected = run(model, name)
    injector.set_enabled(False)
    with pytest.raises(ValueError, match="has robustness tokens already: call remove_tokens"):
        attach_tokens(model, tokens)
    with pytest.raises(ValueError, match="has robustness tokens already"):
        attach_tokens(copy.deepcopy(model), tokens)
    injector.set_enabled(True)
    assert torch.equal(run(model, name)[0], expected[0])


def test_removing_what_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="Dinov2Model has no robustness tokens to remove"):
        remove_tokens(build("dinov2"))


def test_removal_leaves_the_hooks_of_others(tokens: Tensor) -> None:
    model = build("dinov2")
    calls: list[str] = []
    layer = find_layer_stack(model).layers[0]
    layer.register_forward_pre_hook(lambda module, args: calls.append("pre"))
    attach_tokens(model, tokens)
    layer.register_forward_hook(lambda module, args, output: calls.append("post"))
    remove_tokens(model)
    run(model, "dinov2")
    assert calls == ["pre", "post"]


def test_layers_that_take_maps_are_refused_as_they_run(tokens: Tensor) -> None:
    injector = TokenInjector({TOKENS: tokens})
    with pytest.raises(ValueError, match=r"need a sequence \(B, N, D\) before the first layer, got \(2, 4, 4, 32\)"):
        injector.put_before_layer(nn.Identity(), (torch.zeros(2, 4, 4, HIDDEN_SIZE),), {}, layer=0)


def test_attention_kernels_without_weights_record_none(tokens: Tensor) -> None:
    model = build("dinov2", attn_implementation="sdpa")
    before = run(model, "dinov2", output_attentions=True)
    attach_tokens(model, tokens)
    assert structure(dict(run(model, "dinov2", output_attentions=True))) == structure(dict(before))


def test_gradients_match_finite_differences(tokens: Tensor) -> None:
    model = build("beit_relative").double()
    injector = attach_tokens(model, tokens.double())
    pixel_values = FAMILIES["beit_relative"].inputs()["pixel_values"].double()
    direction = torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(4)).double()

    def value() -> Tensor:
        return F.cosine_similarity(model(pixel_values).last_hidden_state, torch.ones(HIDDEN_SIZE), dim=-1).sum()

    (gradient,) = torch.autograd.grad(value(), injector.robustness_tokens)
    with torch.no_grad():
        injector.robustness_tokens.add_(direction, alpha=1e-5)
        above = value()
        injector.robustness_tokens.sub_(direction, alpha=2e-5)
        slope = (above - value()) / 2e-5
    torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-5, atol=1e-7)


# Against a plain forward of the same blocks


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in BASES if name != "beit_relative"])  # its layers make their bias
def test_layers_compute_as_without_hooks(name: str, tokens: Tensor) -> None:
    """Runs the base's layers on [tokens, sequence] by hand: rotary offsets, masks and biases act as they should."""
    model, inputs = build(name), FAMILIES[name].inputs()
    stack = find_layer_stack(model)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    hooks = [
        layer.register_forward_pre_hook(lambda m, args, kwargs: calls.append((args, kwargs)), with_kwargs=True)
        for layer in stack.layers
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    plain = copy.deepcopy(stack.layers)
    module: Any
    for module in plain.modules():
        if hasattr(module, "num_prefix_tokens"):  # timm's Eva
            module.num_prefix_tokens += NUM_TOKENS
    hidden_states = prepend(tokens, calls[0][0][0])
    for layer, (args, kwargs) in zip(plain, calls, strict=True):
        widened = [widen(value) for value in args[1:]]
        hidden_states = layer(
            hidden_states, *widened, **{k: widen(v) if "mask" in k else v for k, v in kwargs.items()}
        )
    seen: list[Tensor] = []
    attach_tokens(model, tokens)
    stack.layers[-1].register_forward_hook(lambda m, args, output: seen.append(output))
    model(**inputs)
    close(seen[0] if not stack.is_timm else seen[0][:, NUM_TOKENS:], hidden_states[:, NUM_TOKENS:])


def widen(mask: Any) -> Any:
    """Lets every position attend to the tokens, and tokens to what any position may attend to."""
    if mask is None:
        return None
    is_bool = mask.dtype == torch.bool
    batch, heads, rows, columns = mask.shape
    assert rows == columns
    wide = torch.full((batch, heads, rows + NUM_TOKENS, columns + NUM_TOKENS), 1.0 if is_bool else 0.0).to(mask.dtype)
    wide[..., NUM_TOKENS:, NUM_TOKENS:] = mask
    hidden = ~mask if is_bool else mask < -1e30
    for image in range(batch):
        for column in range(columns):
            if hidden[image, 0, :, column].all():
                wide[image, :, :NUM_TOKENS, NUM_TOKENS + column] = mask[image, 0, 0, column]
    return wide


# Programs that were captured before


@torch.no_grad()
@pytest.mark.parametrize("name", ["dinov2", "timm_eva"])
@pytest.mark.parametrize("how", ["wrapped", "in place", "given"])
def test_compiled_programs_see_the_tokens_come_and_go(name: str, how: str, tokens: Tensor) -> None:
    model, inputs = build(name), FAMILIES[name].inputs()
    if how == "in place":
        model.compile(backend="eager")
    compiled: Any = model if how == "in place" else torch.compile(model, backend="eager")
    before = compiled(**inputs).last_hidden_state
    expected = build(name)
    attach_tokens(expected, tokens)
    inject_tokens(compiled if how == "given" else model, tokens)
    close(compiled(**inputs).last_hidden_state, expected(**inputs).last_hidden_state)
    remove_tokens(compiled if how == "given" else model)
    close(compiled(**inputs).last_hidden_state, before)


@pytest.mark.parametrize("how", ["exported", "traced"])
def test_captured_programs_are_refused(how: str, tokens: Tensor) -> None:
    model, inputs = build("dinov2"), FAMILIES["dinov2"].inputs()
    if how == "exported":
        program: Any = torch.export.export(model, (), inputs).module()
    else:
        program = torch.jit.trace(model, inputs["pixel_values"], strict=False)
    with pytest.raises(ValueError, match=r"exported, scripted or traced have no layers left: put tokens in before"):
        attach_tokens(program, tokens)


@torch.no_grad()
@pytest.mark.parametrize("name", ["beit_relative", "beit_shared", "vit", "dinov3_vit", "timm_eva"])
def test_exported_programs_hold_the_tokens_or_are_refused(name: str, tokens: Tensor) -> None:
    """Under export, transformers adds BEiT's bias to a boolean mask, and tokens would get too little attention."""
    for implementation in FAMILIES[name].implementations or (None,):
        model, inputs = build(name, attn_implementation=implementation), FAMILIES[name].inputs()
        attach_tokens(model, tokens)
        if name.startswith("beit") and implementation == "sdpa":
            with pytest.raises(Exception, match=r'set_attn_implementation\("eager"\)'):
                torch.export.export(model, (), inputs)
            model.set_attn_implementation("eager")
        program = torch.export.export(model, (), inputs).module()
        close(program(**inputs).last_hidden_state, model(**inputs).last_hidden_state)


# Layers that change afterwards


CHANGES: dict[str, Callable[[Any, Any], list[Any]]] = {
    "last dropped": lambda layers, fresh: [layers[0]],
    "first dropped": lambda layers, fresh: [layers[1]],
    "one more": lambda layers, fresh: [*layers, fresh[1]],
    "one between": lambda layers, fresh: [layers[0], fresh[0], layers[1]],
    "first replaced": lambda layers, fresh: [fresh[0], layers[1]],
    "last replaced": lambda layers, fresh: [layers[0], fresh[1]],
    "all replaced": lambda layers, fresh: [*fresh],
}


@torch.no_grad()
@pytest.mark.parametrize("change", list(CHANGES))
@pytest.mark.parametrize("name", ["dinov2", "vit", "beit_relative", "clip_vision"])
def test_changed_layers_are_an_error(name: str, change: str, tokens: Tensor) -> None:
    model = build(name)
    injector = attach_tokens(model, tokens.expand(2, -1, -1))
    run(model, name)
    owner: Any = find_layer_stack(model).owner
    *path, last = injector._layers_name.split(".")
    parent = owner.get_submodule(".".join(path))
    fresh = find_layer_stack(build(name)).layers
    setattr(parent, last, nn.ModuleList(CHANGES[change](getattr(parent, last), fresh)))
    with pytest.raises(ValueError, match=r"added, removed or replaced since .* remove_tokens"):
        run(model, name)
    injector.set_enabled(False)
    run(model, name)  # off, there is nothing to lose
    remove_tokens(model)


@torch.no_grad()
@pytest.mark.parametrize("place", ["blocks", "norm", "norm_pre"])
def test_changed_timm_layers_are_an_error(place: str, tokens: Tensor) -> None:
    model = build("timm_deit3")
    attach_tokens(model, tokens)
    old = getattr(model.timm_model, place)
    setattr(model.timm_model, place, old[:-1] if place == "blocks" else type(old)(HIDDEN_SIZE))
    with pytest.raises(ValueError, match="added, removed or replaced"):
        run(model, "timm_deit3")


class Wrapped(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


def test_layers_may_be_wrapped_afterwards(tokens: Tensor) -> None:
    """Runs their hooks inside, as under FSDP."""
    model = inject_tokens(build("vit"), tokens)
    expected = run(model, "vit").last_hidden_state
    model.layers = nn.ModuleList(Wrapped(layer) for layer in model.layers)
    assert torch.equal(run(model, "vit").last_hidden_state, expected)


# Devices


@pytest.mark.parametrize("offload", ["cpu", "disk"])
@pytest.mark.parametrize("name", ["dinov2", "beit_relative"])
def test_offloaded_bases_take_tokens(name: str, offload: str, tokens: Tensor, tmp_path: Path) -> None:
    model, expected = build(name), build(name)
    attach_tokens(expected, tokens)
    digests = base_fingerprint(model)
    if offload == "cpu":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    assert next(model.parameters()).is_meta
    assert base_fingerprint(model) == digests
    inject_tokens(model, tokens)
    injector = find_injector(model)
    assert injector is not None
    assert injector.robustness_tokens.device.type == "cpu"
    close(run(model, name)[0], run(expected, name)[0])


def test_tokens_that_were_offloaded_say_so(tokens: Tensor) -> None:
    model = build("dinov2")
    attach_tokens(model, tokens).to("meta")
    with pytest.raises(ValueError, match="offload the base first"):
        run(model, "dinov2")


def test_tokens_move_once_to_their_layers_device(monkeypatch: pytest.MonkeyPatch, tokens: Tensor) -> None:
    injector, device = TokenInjector({TOKENS: tokens}), torch.device("cuda")
    moved: list[torch.device] = []
    monkeypatch.setattr(injector, "to", moved.append)
    injector._follow(nn.Identity(), device)
    replica = nn.Identity()._replicate_for_data_parallel()  # shares the original's tokens
    injector._follow(replica, device)
    injector._follow(nn.Identity(), torch.device("meta"))
    assert moved == [device]


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("name", TIMM)
def test_replicas_of_timm_run_their_own_weights(name: str, norm: bool, tokens: Tensor) -> None:
    """DataParallel copies a module's attributes; a replica's `forward_intermediates` must not be the original's."""
    model, pixel_values = build(name).timm_model, FAMILIES[name].inputs()["pixel_values"]
    attach_tokens(model, tokens)
    other = copy.deepcopy(model)
    other.patch_embed.proj.weight.mul_(2.0)
    features, maps = other.forward_intermediates(pixel_values, norm=norm)
    replica = model._replicate_for_data_parallel()
    for key, value in [*other._parameters.items(), *other._modules.items()]:
        setattr(replica, key, value)
    found, found_maps = replica.forward_intermediates(pixel_values, norm=norm)
    assert torch.equal(found, features)
    assert all(torch.equal(one, expected) for one, expected in zip(found_maps, maps, strict=True))
    assert not torch.equal(model.forward_intermediates(pixel_values, norm=norm)[0], features)
    remove_tokens(model)
    assert "_replicate_for_data_parallel" not in vars(model)
