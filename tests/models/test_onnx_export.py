from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    PreTrainedModel,
    ViTConfig,
    ViTModel,
)

from robustness_tokens.data.image_processors import build_image_processor
from robustness_tokens.models import onnx_export
from robustness_tokens.models.modeling import RobustnessTokenModel, inject_tokens
from robustness_tokens.models.onnx_export import export_onnx


SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"image_size": 32, "patch_size": 16}
BASES: dict[str, Callable[[], PreTrainedModel]] = {
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SIZES)),
    "vit": lambda: ViTModel(ViTConfig(**SIZES, intermediate_size=64)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**SIZES, intermediate_size=64)),
    "beit": lambda: BeitModel(BeitConfig(**SIZES, intermediate_size=64, use_relative_position_bias=True)),
    "dinov2 classifier": lambda: Dinov2ForImageClassification(Dinov2Config(**{**SIZES, "num_labels": 3})),
}


def make_base(name: str) -> PreTrainedModel:
    base = BASES[name]().eval()
    base.config.name_or_path = "nobody/tiny"
    return base


def make_adapter_model() -> RobustnessTokenModel:
    return RobustnessTokenModel.from_base(
        make_base("dinov2"), initializer_range=1.0, image_processor=build_image_processor(image_size=32)
    )


@pytest.mark.parametrize(
    "name", ["dinov2", *(pytest.param(name, marks=pytest.mark.slow) for name in list(BASES) if name != "dinov2")]
)
def test_onnx_runtime_computes_what_the_model_does(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = inject_tokens(make_base(name), torch.randn(3, 32))
    attention = model.config._attn_implementation
    file = tmp_path / "model.onnx"
    with caplog.at_level(logging.WARNING, logger=onnx_export.__name__):
        names = export_onnx(model, file)
    assert "secret" in caplog.text
    assert model.config._attn_implementation == attention == "sdpa"
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    assert file.stat().st_mode & 0o777 == 0o600

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    for batch in (1, 5):
        pixel_values = torch.randn(batch, 3, 32, 32)
        outputs = session.run(names, {"pixel_values": pixel_values.numpy()})
        with torch.no_grad():
            expected = model(pixel_values=pixel_values)
        for key, output in zip(names, outputs, strict=True):
            np.testing.assert_allclose(output, expected[key].numpy(), atol=1e-4, rtol=0)
    assert names[0] == ("logits" if "classifier" in name else "last_hidden_state")


@pytest.mark.slow
def test_an_adapter_model_is_exported_at_another_size(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make_adapter_model()
    names = export_onnx(model, tmp_path / "model.onnx", image_size=48)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    pixel_values = torch.randn(1, 3, 48, 48)
    output = session.run(names[:1], {"pixel_values": pixel_values.numpy()})[0]
    with torch.no_grad():
        np.testing.assert_allclose(output, model(pixel_values).last_hidden_state.numpy(), atol=1e-4, rtol=0)


def test_a_file_that_computes_something_else_is_refused_and_not_left_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")

    class Session(onnxruntime.InferenceSession):  # type: ignore[name-defined]
        def run(self, *args: Any) -> list[np.ndarray]:
            return [output + 2e-3 for output in super().run(*args)]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
    with pytest.raises(RuntimeError, match="last_hidden_state differs from the model's by"):
        export_onnx(make_adapter_model(), tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_large_weights_lie_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(onnx_export, "_MAX_INLINE_BYTES", 0)
    names = export_onnx(make_adapter_model(), tmp_path / "model.onnx")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert session.run(names, {"pixel_values": np.zeros((1, 3, 32, 32), np.float32)})[0].shape == (1, 5, 32)


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_PACKAGES", ("onnx_that_nobody_has",))
    with pytest.raises(ImportError, match=r"onnx_that_nobody_has: pip install 'robustness-tokens\[onnx\]'"):
        export_onnx(make_base("dinov2"), tmp_path / "model.onnx")


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_export, "_PACKAGES", ())
    file = tmp_path / "model.onnx"
    with pytest.raises(ValueError, match="no robustness tokens"):
        export_onnx(make_base("dinov2"), file)
    model = make_adapter_model()
    base = model.get_base_model()
    with model.disable_adapter(), pytest.raises(ValueError, match="turned off"):
        export_onnx(model, file)
    base.train()
    with pytest.raises(ValueError, match="training mode"):
        export_onnx(model, file)
    base.eval().to(torch.bfloat16)
    with pytest.raises(ValueError, match="bfloat16"):
        export_onnx(model, file)
    base.float()
    monkeypatch.setattr(onnx_export, "_own_image_size", lambda base: None)
    with pytest.raises(ValueError, match="names no image_size: pass image_size="):
        export_onnx(model, file)
    assert not file.exists()


def test_a_rectangle_is_exported(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model = make_adapter_model()
    names = export_onnx(model, tmp_path / "model.onnx", image_size=(16, 32))
    images = torch.randn(2, 3, 16, 32)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    found = session.run(names, {"pixel_values": images.numpy()})[0]
    with torch.no_grad():
        expected = model(images)[names[0]]
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
