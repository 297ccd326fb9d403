from __future__ import annotations

import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    PreTrainedModel,
    TimmWrapperConfig,
    TimmWrapperModel,
)
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from robustness_tokens.data.image_processors import build_image_processor
from robustness_tokens.models.injection import find_injector
from robustness_tokens.models.modeling import RobustnessTokenModel
from robustness_tokens.models.published_tokens import import_published_tokens, read_published_tokens


REFERENCE_TOKENS = Path(
    os.environ.get("ROBTOK_REFERENCE_TOKENS") or Path(__file__).parents[2] / "../shared/reference_tokens"
)
PUBLISHED = {
    "dinov2_small": ("facebook/dinov2-small", 384),
    "dinov2_base": ("facebook/dinov2-base", 768),
    "dinov2_large": ("facebook/dinov2-large", 1024),
    "dinov2_giant": ("facebook/dinov2-giant", 1536),
    "dinov2_small_reg": ("facebook/dinov2-with-registers-small", 384),
    "dinov2_base_reg": ("facebook/dinov2-with-registers-base", 768),
    "dinov2_large_reg": ("facebook/dinov2-with-registers-large", 1024),
    "dinov2_giant_reg": ("facebook/dinov2-with-registers-giant", 1536),
    "deit3_base16": ("timm/deit3_base_patch16_224.fb_in1k", 768),
    "deit3_large16": ("timm/deit3_large_patch16_224.fb_in1k", 1024),
    "deit3_huge14": ("timm/deit3_huge_patch14_224.fb_in1k", 1280),
    "openclip_base16": ("laion/CLIP-ViT-B-16-laion2B-s34B-b88K", 768),
    "openclip_large14": ("laion/CLIP-ViT-L-14-laion2B-s32B-b82K", 1024),
    "openclip_huge14": ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", 1280),
}
PROCESSOR = build_image_processor(image_size=28)


def published_file(name: str) -> Path:
    if not REFERENCE_TOKENS.is_dir():
        pytest.skip(f"no folder {REFERENCE_TOKENS} with the authors' files: set ROBTOK_REFERENCE_TOKENS")
    return REFERENCE_TOKENS / f"{name}.pt"


def make_base(name: str, width: int) -> PreTrainedModel:
    """Builds a base with one random layer of the true width."""
    model_id, _ = PUBLISHED[name]
    sizes: dict[str, Any] = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"image_size": 28, "patch_size": 14}
    base: PreTrainedModel
    if name.startswith("deit3"):
        pytest.importorskip("timm")
        model_args = {
            "embed_dim": width,
            "depth": 1,
            "mlp_ratio": 0.5,
            "num_heads": 2,
            "img_size": 28,
            "patch_size": 14,
        }
        architecture = model_id.removeprefix("timm/").partition(".")[0]
        base = TimmWrapperModel(TimmWrapperConfig(architecture=architecture, model_args=model_args))
    elif name.startswith("openclip"):
        base = CLIPVisionModelWithProjection(CLIPVisionConfig(**sizes, intermediate_size=64, projection_dim=16))
    elif name.endswith("_reg"):
        base = Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**sizes, mlp_ratio=1))
    else:
        base = Dinov2Model(Dinov2Config(**sizes, mlp_ratio=1))
    base.config.name_or_path = model_id
    return base.eval()


def save_tokens(folder: Path, content: Any) -> Path:
    file = folder / "tokens.pt"
    torch.save(content, file)
    return file


def test_all_published_files_are_known() -> None:
    published_file("dinov2_small")
    assert {path.stem for path in REFERENCE_TOKENS.glob("*.pt")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_become_adapters(name: str, tmp_path: Path) -> None:
    file, (model_id, width) = published_file(name), PUBLISHED[name]
    base = make_base(name, width)
    model = import_published_tokens(file, base, tmp_path / "adapter", image_processor=PROCESSOR)

    # The raw float32 storage in the archive is the independent witness: no torch.load in between.
    with zipfile.ZipFile(file) as archive:
        raw = archive.read(next(entry for entry in archive.namelist() if entry.endswith("data/0")))
    stored = load_file(tmp_path / "adapter" / "model.safetensors")["robustness_tokens"]
    assert stored.shape == (10, width)
    assert stored.numpy().tobytes() == raw
    assert torch.equal(model.robustness_tokens, stored)

    reloaded = RobustnessTokenModel.from_pretrained(tmp_path / "adapter", base_model=model.unload())
    assert torch.equal(reloaded.robustness_tokens, stored)
    training = reloaded.config.training
    assert training is not None
    assert training["source"] == "https://github.com/BrianPulfer/robustness-tokens"
    assert training["paper"] == "arXiv:2503.10191"
    assert training["file"] == f"{name}.pt"
    assert training["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert reloaded.config.base_model_name_or_path == model_id
    assert reloaded.config.feature_view == ("pooled" if name.startswith("openclip") else "cls_and_patches")
    assert reloaded.config.image_mean == IMAGENET_DEFAULT_MEAN
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert all(value in card for value in (training["source"], training["paper"], training["sha256"], model_id))


def test_a_base_in_a_folder(tmp_path: Path) -> None:
    make_base("dinov2_small", 384).save_pretrained(tmp_path / "base")
    # An image processor with other statistics lies beside it, as beside OpenCLIP's; the tokens were not trained so.
    build_image_processor(image_size=28, image_mean=OPENAI_CLIP_MEAN, image_std=OPENAI_CLIP_STD).save_pretrained(
        tmp_path / "base"
    )
    tokens = torch.randn(4, 384)
    file = save_tokens(tmp_path, {"rtokens": tokens[None]})
    import_published_tokens(file, tmp_path / "base", tmp_path / "adapter", base_model_id="facebook/dinov2-small")
    model = RobustnessTokenModel.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "base")
    assert torch.equal(model.robustness_tokens, tokens)
    assert model.config.base_model_name_or_path == "facebook/dinov2-small"
    assert model.config.image_mean == IMAGENET_DEFAULT_MEAN


def test_a_base_of_another_width_is_refused_and_left_as_it_was(tmp_path: Path) -> None:
    file = save_tokens(tmp_path, {"rtokens": torch.zeros(1, 10, 768)})
    base = make_base("dinov2_small", 384)
    with pytest.raises(ValueError, match=r"width 768, the base facebook/dinov2-small has the width 384: choose"):
        import_published_tokens(file, base, tmp_path / "adapter", image_processor=PROCESSOR)
    assert find_injector(base) is None
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_is_replaced_only_when_asked(tmp_path: Path) -> None:
    def import_filled_with(value: float, **kwargs: Any) -> None:
        file = save_tokens(tmp_path, {"rtokens": torch.full((1, 2, 384), value)})
        base = make_base("dinov2_small", 384)
        import_published_tokens(file, base, tmp_path / "adapter", image_processor=PROCESSOR, **kwargs)

    import_filled_with(1.0)
    with pytest.raises(ValueError, match="holds an adapter already: pass overwrite=True"):
        import_filled_with(2.0)
    assert load_file(tmp_path / "adapter/model.safetensors")["robustness_tokens"].max() == 1
    import_filled_with(3.0, overwrite=True)
    assert load_file(tmp_path / "adapter/model.safetensors")["robustness_tokens"].max() == 3


def not_finite(value: float) -> Tensor:
    tokens = torch.zeros(1, 3, 8)
    tokens[0, 1, 2] = value
    return tokens


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"tokens": torch.zeros(1, 3, 8)}, r"got keys \['tokens'\]"),
        ({"rtokens": torch.zeros(1, 3, 8), "more": 1}, r"got keys \['more', 'rtokens'\]"),
        ({}, r"got keys \[\]"),
        (torch.zeros(1, 3, 8), "got Tensor"),
        ([1, 2], "got list"),
        ({"rtokens": [1.0]}, "got list under 'rtokens'"),
        ({"rtokens": torch.zeros(3, 8)}, r"shape \(3, 8\)"),
        ({"rtokens": torch.zeros(2, 3, 8)}, r"shape \(2, 3, 8\)"),
        ({"rtokens": torch.zeros(1, 0, 8)}, r"shape \(1, 0, 8\)"),
        ({"rtokens": torch.zeros(1, 1, 1).expand(1, 1 << 20, 1 << 20)}, r"shape \(1, 1048576, 1048576\)"),
        ({"rtokens": torch.zeros(1, 3, 8, device="meta")}, "meta|shape"),
        ({"rtokens": torch.zeros(1, 3, 8, dtype=torch.float64)}, "torch.float64"),
        ({"rtokens": torch.zeros(1, 3, 8).to_sparse()}, "torch.sparse_coo"),
        ({"rtokens": not_finite(float("nan"))}, "not finite"),
        ({"rtokens": not_finite(float("inf"))}, "not finite"),
    ],
)
def test_other_contents_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    file = save_tokens(tmp_path, content)
    with pytest.raises(ValueError, match=message) as caught:
        read_published_tokens(file)
    text = str(caught.value)
    assert str(file) in text
    assert "expected" in text or "must hold" in text
    assert "take the file from https://" in text


class Hostile:
    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("key", ["rtokens", "other"])
def test_code_in_a_pickle_is_not_run(key: str, tmp_path: Path) -> None:
    witness = tmp_path / "ran"
    file = save_tokens(tmp_path, {"rtokens": torch.zeros(1, 3, 8), key: Hostile(witness)})
    with pytest.raises(ValueError, match="holds more than tensors"):
        read_published_tokens(file)
    assert not witness.exists()
    torch.load(file, weights_only=False)  # it would have run
    assert witness.is_dir()


def test_a_zip_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "load", None)
    file = tmp_path / "tokens.pt"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("rtokens/data/0", bytes(8 << 20))
    assert file.stat().st_size < 10_000
    with pytest.raises(ValueError, match=r"holds 8,388,608 bytes, expected at most 4,194,304"):
        read_published_tokens(file)


def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="is no file"):
        read_published_tokens(tmp_path / "missing.pt")
    with pytest.raises(ValueError, match="is no file"):
        read_published_tokens(tmp_path)
    big = tmp_path / "big.pt"
    big.write_bytes(bytes(5 << 20))
    with pytest.raises(ValueError, match="holds 5,242,880 bytes"):
        read_published_tokens(big)
    for content in (b"", b"not an archive", pickle.dumps({"rtokens": [1.0]})):
        file = tmp_path / "tokens.pt"
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"no archive that torch\.save wrote"):
            read_published_tokens(file)
    file = save_tokens(tmp_path, {"rtokens": torch.zeros(1, 3, 8)})
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(tmp_path / "cut.pt", "w") as cut:
        for entry in archive.namelist():
            cut.writestr(entry, archive.read(entry)[:-5])
    with pytest.raises(ValueError, match="or is damaged"):
        read_published_tokens(tmp_path / "cut.pt")


def test_tokens_of_any_strides_come_out_contiguous(tmp_path: Path) -> None:
    tokens = torch.randn(8, 3)
    file = save_tokens(tmp_path, {"rtokens": torch.nn.Parameter(tokens.T[None])})
    found = read_published_tokens(file)
    assert torch.equal(found, tokens.T)
    assert found.is_contiguous()
    assert not found.requires_grad
