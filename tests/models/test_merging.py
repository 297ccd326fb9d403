from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTBackbone,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
    ViTConfig,
    ViTModel,
)

from robustness_tokens.models import merging
from robustness_tokens.models.injection import attach_tokens, find_injector, remove_tokens
from robustness_tokens.models.merging import extract_tokens, merge
from robustness_tokens.models.modeling import inject_tokens


WIDTH, K, SIZE = 32, 3, 32
SIZES: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIZE,
    "patch_size": 8,
    "initializer_range": 0.3,
}
LABELS: dict[str, Any] = {"id2label": {0: "cat", 1: "dog", 2: "owl"}, "label2id": {"cat": 0, "dog": 1, "owl": 2}}


def timm_config(architecture: str, **model_args: Any) -> TimmWrapperConfig:
    sizes = {"embed_dim": WIDTH, "depth": 2, "num_heads": 2, "img_size": SIZE, "patch_size": 8}
    return TimmWrapperConfig(architecture=architecture, model_args={**sizes, **model_args}, **LABELS)


def deit3(**model_args: Any) -> TimmWrapperModel:
    return TimmWrapperModel(timm_config("deit3_small_patch16_224", **model_args))


def eva(**model_args: Any) -> TimmWrapperModel:
    return TimmWrapperModel(timm_config("eva02_tiny_patch14_224", **{"ref_feat_shape": (4, 4), **model_args}))


MERGEABLE: dict[str, Callable[[], PreTrainedModel]] = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES)),
    "dinov2 no mask token": lambda: Dinov2Model(Dinov2Config(**SIZES, use_mask_token=False)),
    "dinov2 swiglu": lambda: Dinov2Model(Dinov2Config(**SIZES, use_swiglu_ffn=True)),
    "dinov2 classifier": lambda: Dinov2ForImageClassification(Dinov2Config(**SIZES, **LABELS)),
    "dinov2 backbone": lambda: Dinov2Backbone(Dinov2Config(**{**SIZES, "out_features": ["stage1", "stage2"]})),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SIZES, num_register_tokens=2)),
    "registers classifier": lambda: Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**SIZES, num_register_tokens=2, **LABELS)
    ),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**SIZES, intermediate_size=64, num_register_tokens=2)),
    "dinov3 backbone": lambda: DINOv3ViTBackbone(DINOv3ViTConfig(**SIZES, intermediate_size=64)),
    "timm vit": lambda: TimmWrapperModel(timm_config("vit_tiny_patch16_224")),
    "timm vit registers": lambda: TimmWrapperModel(timm_config("vit_tiny_patch16_224", reg_tokens=2)),
    "timm vit average": lambda: TimmWrapperModel(timm_config("vit_tiny_patch16_224", global_pool="avg")),
    "timm deit3": deit3,
    "timm deit3 dynamic": lambda: deit3(dynamic_img_size=True),
    "timm deit3 classifier": lambda: TimmWrapperForImageClassification(timm_config("deit3_small_patch16_224")),
    "timm eva": eva,
    "timm eva registers": lambda: eva(num_reg_tokens=2),
    "timm dinov3": lambda: TimmWrapperModel(timm_config("vit_small_patch16_dinov3")),
}
HAVE_OTHER_POSITIONS_ELSEWHERE = [name for name in MERGEABLE if name.startswith("dinov2")]


def make_base(name: str) -> Any:
    if name.startswith("timm"):
        pytest.importorskip("timm")
    base = MERGEABLE[name]().eval()
    with torch.no_grad():
        for tensor in base.parameters():  # layer scales and registers start near zero: nothing would depend on them
            tensor.add_(0.1 * torch.randn_like(tensor))
    return base


def tokens_in(base: PreTrainedModel) -> Tensor:
    tokens = torch.randn(K, WIDTH)
    inject_tokens(base, tokens)
    return tokens


@torch.no_grad()
def results(model: PreTrainedModel, pixel_values: Tensor) -> dict[str, Tensor]:
    """Returns every output without registers: the CLS token comes first and the patches last in all families."""
    output = model(pixel_values=pixel_values)
    found = {key: value for key, value in output.items() if isinstance(value, Tensor)}
    if "feature_maps" in output:
        found |= {f"feature map {i}": value for i, value in enumerate(output.feature_maps)}
    if "last_hidden_state" in found:
        patches = (pixel_values.shape[-1] // 8) ** 2
        hidden = found["last_hidden_state"]
        found["last_hidden_state"] = torch.cat([hidden[:, :1], hidden[:, -patches:]], dim=1)
    return found


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], *, atol: float) -> None:
    assert found.keys() == expected.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=0, atol=atol)


@pytest.mark.parametrize("name", MERGEABLE)
def test_a_merged_model_computes_the_same_and_gives_the_tokens_back(name: str) -> None:
    base = make_base(name)
    pixel_values = torch.randn(2, 3, SIZE, SIZE)
    without = results(base, pixel_values)
    tokens = tokens_in(base)
    before = {key: tensor.clone() for key, tensor in base.state_dict().items()}
    expected = results(base, pixel_values)

    plain = merge(base)

    assert find_injector(plain) is None
    assert not plain.training
    assert_same(results(plain, pixel_values), expected, atol=1e-5)
    assert any((without[key] - expected[key]).abs().max() > 1e-2 for key in expected)
    assert torch.equal(extract_tokens(plain, num_robustness_tokens=K), tokens)
    # The original is as it was, and shares nothing with the plain model.
    with torch.no_grad():
        for tensor in plain.parameters():
            tensor.zero_()
    assert all(torch.equal(base.state_dict()[key], tensor) for key, tensor in before.items())
    assert_same(results(base, pixel_values), expected, atol=0)
    assert_same(results(remove_tokens(base), pixel_values), without, atol=0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("dinov2", Dinov2WithRegistersModel),
        ("dinov2 classifier", Dinov2WithRegistersForImageClassification),
        ("registers", Dinov2WithRegistersModel),
        ("dinov3", DINOv3ViTModel),
        ("timm vit", TimmWrapperModel),
    ],
)
def test_the_class_and_the_labels_of_a_merged_model(name: str, expected: type) -> None:
    base = make_base(name)
    tokens_in(base)
    plain = merge(base)
    assert type(plain) is expected
    assert plain.config.id2label == base.config.id2label
    if not name.startswith("timm"):
        assert plain.config.num_register_tokens == K + getattr(base.config, "num_register_tokens", 0)
        assert plain.config.patch_size == 8


@pytest.mark.parametrize("name", ["dinov2", "dinov2 classifier", "registers", "timm vit", "timm deit3 dynamic"])
def test_positions_are_stored_as_the_base_resamples_them(name: str, caplog: pytest.LogCaptureFixture) -> None:
    base = make_base(name)
    tokens_in(base)
    small = torch.randn(2, 3, 16, 16)
    with caplog.at_level(logging.WARNING, logger=merging.__name__):
        plain = merge(base, image_size=16)
    if name == "timm vit":  # takes no other size until told, and refuses all others afterwards
        base.timm_model.set_input_size((16, 16))
    else:
        assert "16 x 16 pixels only" in caplog.text
        other = torch.randn(2, 3, SIZE, SIZE)
        with pytest.raises(AssertionError):
            assert_same(results(plain, other), results(base, other), atol=1e-3)
    assert_same(results(plain, small), results(base, small), atol=1e-5)


def test_a_timm_model_whose_input_size_was_set(tmp_path: Path) -> None:
    base: Any = make_base("timm deit3")
    tokens_in(base)
    base.timm_model.set_input_size((16, 24))
    pixel_values = torch.randn(2, 3, 16, 24)
    merge(base).save_pretrained(tmp_path)
    plain = TimmWrapperModel.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        found, expected = plain(pixel_values).pooler_output, base(pixel_values).pooler_output
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_518_px_base_merges_for_224_px() -> None:
    base = Dinov2Model(Dinov2Config(**{**SIZES, "image_size": 518, "patch_size": 14})).eval()
    tokens_in(base)
    pixel_values = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        expected = base(pixel_values).last_hidden_state
        found = merge(base, image_size=224)(pixel_values).last_hidden_state
        elsewhere = merge(base)(pixel_values).last_hidden_state
    torch.testing.assert_close(found[:, 0], expected[:, 0], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[:, 1 + K :], expected[:, 1:], rtol=0, atol=1e-5)
    assert (elsewhere[:, 1 + K :] - expected[:, 1:]).abs().max() > 1e-2  # the trap that image_size= is for


@pytest.mark.parametrize("name", MERGEABLE)
def test_merging_warns_of_the_published_tokens_and_of_other_sizes(name: str, caplog: pytest.LogCaptureFixture) -> None:
    base = make_base(name)
    tokens_in(base)
    with caplog.at_level(logging.WARNING, logger=merging.__name__):
        merge(base)
    assert "secret" in caplog.text
    assert ("32 x 32 pixels only" in caplog.text) == (name in HAVE_OTHER_POSITIONS_ELSEWHERE)


LOAD = """
import sys, torch, transformers
for auto, folder in zip(sys.argv[1::2], sys.argv[2::2]):
    model = getattr(transformers, auto).from_pretrained(folder).eval()
    with torch.no_grad():
        output = model(pixel_values=torch.load(folder + "/pixel_values.pt"))
    torch.save(dict(name=type(model).__name__, output=output[0]), folder + "/output.pt")
assert not any(name.startswith("robustness_tokens") for name in sys.modules)
"""


def test_plain_transformers_loads_it_in_a_fresh_process(tmp_path: Path) -> None:
    cases = {"dinov2": 16, "dinov2 classifier": 16, "registers": 16, "dinov3": SIZE, "timm deit3 classifier": 16}
    cases |= {"timm eva registers": 16}
    bases: dict[str, Any] = {}
    arguments: list[str] = []
    for name, size in cases.items():
        base = bases[name] = make_base(name)
        tokens = tokens_in(base)
        folder = tmp_path / name
        plain = merge(base, image_size=size)
        plain.save_pretrained(folder)
        assert torch.equal(extract_tokens(type(plain).from_pretrained(folder), num_robustness_tokens=K), tokens)
        torch.save(torch.randn(2, 3, size, size), folder / "pixel_values.pt")
        arguments += ["AutoModelForImageClassification" if "classifier" in name else "AutoModel", str(folder)]

    subprocess.run([sys.executable, "-c", LOAD, *arguments], check=True, cwd=tmp_path)

    for name, size in cases.items():
        base, found = bases[name], torch.load(tmp_path / name / "output.pt")
        if name.startswith("timm"):
            base.timm_model.set_input_size((size, size))
        with torch.no_grad():
            expected = base(pixel_values=torch.load(tmp_path / name / "pixel_values.pt"))[0]
        if "classifier" not in name:  # CLS and patches: the registers are dropped
            patches = (size // 8) ** 2
            expected = torch.cat([expected[:, :1], expected[:, -patches:]], dim=1)
            found["output"] = torch.cat([found["output"][:, :1], found["output"][:, -patches:]], dim=1)
        torch.testing.assert_close(found["output"], expected, rtol=0, atol=1e-5)
        assert found["name"] == type(merge(base)).__name__


def without_last_registers(native: PreTrainedModel, base: PreTrainedModel, name: str) -> Tensor:
    """Fills a base with a native-register model's weights, its last K registers left out; returns these, (K, D)."""
    state = native.state_dict()
    key = next(key for key in state if key.endswith(name))
    registers = state.pop(key)
    if key in base.state_dict():
        state[key] = registers[:, :-K]
    base.load_state_dict(state)
    return registers[0, -K:].clone()


def parity_pair(family: str) -> tuple[PreTrainedModel, PreTrainedModel, str]:
    if family == "dinov2":
        config = Dinov2WithRegistersConfig(**SIZES, num_register_tokens=K)
        return Dinov2WithRegistersModel(config), Dinov2Model(Dinov2Config(**SIZES)), "register_tokens"
    if family == "dinov3":
        native, base = (
            DINOv3ViTModel(DINOv3ViTConfig(**SIZES, intermediate_size=64, num_register_tokens=count))
            for count in (4 + K, 4)
        )
        return native, base, "register_tokens"
    pytest.importorskip("timm")
    if family == "timm vit":
        return deit3(reg_tokens=2 + K), deit3(reg_tokens=2), "reg_token"
    return eva(num_reg_tokens=K, use_abs_pos_emb=False), eva(use_abs_pos_emb=False), "reg_token"


@pytest.mark.parametrize("family", ["dinov2", "dinov3", "timm vit", "timm eva"])
def test_injected_tokens_are_native_registers(family: str) -> None:
    native, base, name = parity_pair(family)
    native.eval(), base.eval()
    with torch.no_grad():
        for tensor in native.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    attach_tokens(base, without_last_registers(native, base, name))
    pixel_values = torch.randn(2, 3, SIZE, SIZE)
    assert_same(results(base, pixel_values), results(native, pixel_values), atol=5e-6)


def test_half_precision_stays_half_precision() -> None:
    base = make_base("dinov3").to(torch.bfloat16)
    tokens = tokens_in(base)
    plain = merge(base)
    assert {tensor.dtype for tensor in plain.parameters()} == {torch.bfloat16}
    assert torch.equal(extract_tokens(plain, num_robustness_tokens=K), tokens.bfloat16().float())


@pytest.mark.parametrize(
    "base",
    [
        lambda: ViTModel(ViTConfig(**SIZES, intermediate_size=64)),
        lambda: CLIPVisionModel(CLIPVisionConfig(**{**SIZES, "intermediate_size": 64})),
    ],
)
def test_families_without_registers_name_the_alternatives(base: Callable[[], PreTrainedModel]) -> None:
    model = inject_tokens(base().eval(), torch.randn(K, WIDTH))
    with pytest.raises(ValueError, match=r"no native registers.*adapter.*ONNX"):
        merge(model)


@pytest.mark.parametrize(
    ("architecture", "model_args", "message"),
    [
        ("vit_base_patch16_clip_224", {}, "normalises its sequence with its registers before the first layer"),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "pool_include_prefix": True}, "pools over its registers"),
        ("eva02_tiny_patch14_224", {"global_pool": "map"}, "pools over its registers"),
        ("deit_tiny_distilled_patch16_224", {}, "VisionTransformerDistilled has no registers"),
    ],
)
def test_timm_models_that_would_compute_something_else_are_refused(
    architecture: str, model_args: dict[str, Any], message: str
) -> None:
    pytest.importorskip("timm")
    base = TimmWrapperModel(timm_config(architecture, **model_args)).eval()
    tokens_in(base)
    with pytest.raises(ValueError, match=message):
        merge(base)


@pytest.mark.parametrize("name", ["dinov2", "dinov3", "timm vit"])
@pytest.mark.parametrize("image_size", [0, -8, 20])
def test_an_image_size_that_does_not_fit_is_refused(name: str, image_size: int) -> None:
    base = make_base(name)
    tokens_in(base)
    with pytest.raises(ValueError, match=rf"multiple of the patch size \(8, 8\) in pixels, got {image_size}"):
        merge(base, image_size=image_size)


def test_nothing_to_merge_or_to_extract() -> None:
    base = make_base("dinov2")
    with pytest.raises(ValueError, match="no robustness tokens to merge"):
        merge(base)
    attach_tokens(base, torch.randn(K, WIDTH)).set_enabled(False)
    with pytest.raises(ValueError, match="turned off"):
        merge(base)
    with pytest.raises(ValueError, match="has 0 registers, expected at least num_robustness_tokens=10"):
        extract_tokens(base)
    with pytest.raises(ValueError, match="has 2 registers"):
        extract_tokens(make_base("registers"), num_robustness_tokens=3)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        extract_tokens(make_base("registers"), num_robustness_tokens=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MERGEABLE)
def test_half_precision_merges_too(name: str, dtype: torch.dtype) -> None:
    """Cast after loading, a base has its unsaved buffers in half precision too: rotary positions."""
    base = make_base(name).to(dtype)
    tokens_in(base)
    pixel_values = torch.randn(2, 3, SIZE, SIZE).to(dtype)
    plain = merge(base)
    expected = {key: buffer.dtype for key, buffer in base.named_buffers()}
    assert {key: b.dtype for key, b in plain.named_buffers() if key in expected} == expected
    for key, tensor in results(plain, pixel_values).items():
        torch.testing.assert_close(tensor, results(base, pixel_values)[key], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
def test_tokens_that_are_not_finite_are_not_merged(broken: float) -> None:
    base = make_base("dinov2")
    attach_tokens(base, torch.full((K, WIDTH), broken))
    with pytest.raises(ValueError, match="refusing to merge tokens whose robustness_tokens is not finite"):
        merge(base)
