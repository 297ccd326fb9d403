"""All backbones of the paper the whole way, at their true architecture with random weights.

`pytest -m slow tests/integration/test_paper_backbones.py -s` runs the large, huge and giant ones too, and prints what
they took.
"""

import dataclasses
import gc
import resource
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from robustness_tokens import (
    Normalizer,
    RobustnessTokenModel,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    cosine_similarity,
    extract_features,
    paper_attack,
)
from robustness_tokens.data.image_processors import build_image_processor
from robustness_tokens.data.preprocessing import ImageTransform
from robustness_tokens.training.arguments import resolve_preset


CONFIGS = Path(__file__).parents[2] / "examples" / "paper_backbones"
TRAINING_FIELDS = {field.name for field in dataclasses.fields(RobustnessTokenTrainingArguments)}

# (millions of parameters, width, layers, heads, shape of one image's features at 224 px). Counts: DINOv2 (arXiv
# 2304.07193) as timm lists it, which has no mask token; open_clip's docs/model_profile.csv; DeiT-III (arXiv
# 2204.07118), whose 1000-class head is subtracted where the count is compared.
PUBLISHED: dict[str, tuple[float, int, int, int, tuple[int, ...]]] = {
    "dinov2-small": (22.06, 384, 12, 6, (257, 384)),
    "dinov2-with-registers-small": (22.06, 384, 12, 6, (257, 384)),
    "deit3-small": (22.06, 384, 12, 6, (197, 384)),
    "dinov2-base": (86.58, 768, 12, 12, (257, 768)),
    "dinov2-with-registers-base": (86.58, 768, 12, 12, (257, 768)),
    "deit3-base": (86.59, 768, 12, 12, (197, 768)),
    "openclip-base-32": (87.85, 768, 12, 12, (512,)),
    "openclip-base-16": (86.19, 768, 12, 12, (512,)),
    "dinov2-large": (304.37, 1024, 24, 16, (257, 1024)),
    "dinov2-with-registers-large": (304.37, 1024, 24, 16, (257, 1024)),
    "deit3-large": (304.37, 1024, 24, 16, (197, 1024)),
    "openclip-large-14": (303.97, 1024, 24, 16, (768,)),
    "openclip-huge-14": (632.08, 1280, 32, 16, (1024,)),
    "deit3-huge": (632.13, 1280, 32, 16, (257, 1280)),
    "dinov2-giant": (1136.48, 1536, 40, 24, (257, 1536)),
    "dinov2-with-registers-giant": (1136.48, 1536, 40, 24, (257, 1536)),
}


def build(name: str) -> PreTrainedModel:
    """The architecture with random weights."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(CONFIGS / f"{name}.json")
    config.name_or_path = f"random-weights/{name}"
    return getattr(transformers, config.architectures[0])(config).eval()


def heads(base: PreTrainedModel) -> int:
    timm_model = getattr(base, "timm_model", None)
    return base.config.num_attention_heads if timm_model is None else timm_model.blocks[0].attn.num_heads


def layers(base: PreTrainedModel) -> int:
    timm_model = getattr(base, "timm_model", None)
    return base.config.num_hidden_layers if timm_model is None else len(timm_model.blocks)


def test_every_backbone_of_the_paper_has_a_config() -> None:
    assert {path.stem for path in CONFIGS.glob("*.json")} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_architecture_is_the_published_one(name: str) -> None:
    millions, hidden_size, num_layers, num_heads, _ = PUBLISHED[name]
    with torch.device("meta"):
        base = build(name)
    count = sum(parameter.numel() for key, parameter in base.named_parameters() if "mask_token" not in key)
    if name.startswith("deit3"):
        count += 1000 * (hidden_size + 1)
    assert count / 1e6 == pytest.approx(millions, abs=0.01)
    assert (layers(base), heads(base)) == (num_layers, num_heads)
    assert base.config.to_dict().get("num_register_tokens", 0) == (4 if "registers" in name else 0)


def pictures() -> datasets.Dataset:
    """Two smooth pictures, no square, so that resizing and attacks see something like a photograph."""
    coarse = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    fine = torch.nn.functional.interpolate(coarse, size=(240, 300), mode="bilinear")
    arrays = (fine * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()  # (2, H, W, 3)
    features = datasets.Features({"image": datasets.Image()})
    return datasets.Dataset.from_dict({"image": [Image.fromarray(array) for array in arrays]}, features=features)


def cases() -> list[Any]:
    fast = {"dinov2-small", "dinov2-with-registers-small", "deit3-small", "openclip-base-32"}
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.slow]) for name in PUBLISHED]


@pytest.mark.parametrize("name", cases())
def test_the_whole_way(name: str, tmp_path: Path) -> None:
    gc.collect()  # hooks and modules refer to each other, and two giants at a time are too many
    start = time.perf_counter()
    base = build(name)
    for key, parameter in base.named_parameters():
        if key.endswith("gamma"):
            # DeiT-III starts its layer scale at 1e-6, with which an untrained model hides its tokens in rounding.
            torch.nn.init.ones_(parameter)
    preset = resolve_preset("paper", base.config.model_type)
    transform = ImageTransform(resize=preset["resize"], image_size=preset["image_size"])
    images = torch.stack([transform(picture) for picture in pictures()["image"]])
    pixel_values = Normalizer(preset["image_mean"], preset["image_std"])(images)
    with torch.no_grad():
        plain = extract_features(base, pixel_values, feature_view=preset["feature_view"])
    assert plain.shape == (2, *PUBLISHED[name][4])

    model = RobustnessTokenModel.from_base(
        base,
        image_processor=build_image_processor(image_size=preset["image_size"]),
        **{setting: value for setting, value in preset.items() if setting not in TRAINING_FIELDS},
    )
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["injector.robustness_tokens"]
    untrained = model.robustness_tokens.detach().clone()
    settings = {setting: value for setting, value in preset.items() if setting in TRAINING_FIELDS}
    settings |= {"max_steps": 1, "per_device_train_batch_size": 2, "num_attack_steps": 2, "disable_tqdm": True}
    args = RobustnessTokenTrainingArguments(output_dir=str(tmp_path / "adapter"), **settings)
    trainer = RobustnessTokenTrainer(model, args, pictures())
    trainer.train()
    # Adam's first step is the learning rate's length wherever the gradient is above its epsilon.
    moved = (model.robustness_tokens.detach() - untrained).abs()
    assert moved.max() <= args.learning_rate * 1.001
    assert (moved > args.learning_rate / 2).float().mean() > 0.99
    trainer.save_model()
    with torch.no_grad():
        expected = model.get_features(pixel_values)
    assert not torch.equal(expected, plain)

    loaded = RobustnessTokenModel.from_pretrained(tmp_path / "adapter", base_model=model.unload())
    assert torch.equal(loaded.robustness_tokens, model.robustness_tokens)
    assert loaded.config.training is not None
    assert loaded.config.training["num_steps_done"] == 1
    evaluate(loaded, pixel_values, plain=plain, expected=expected)
    gibibytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    print(f"\n{name}: {time.perf_counter() - start:.1f} s, peak RSS of the process so far {gibibytes:.2f} GiB")


def evaluate(model: RobustnessTokenModel, pixel_values: Tensor, *, plain: Tensor, expected: Tensor) -> None:
    """Features with and without tokens, on clean and on attacked images."""
    mean, std, axis = model.config.image_mean, model.config.image_std, model.config.similarity_axis
    assert mean is not None
    assert std is not None
    with model.disable_adapter():
        attacked = paper_attack(
            model.get_features,
            pixel_values,
            image_mean=mean,
            image_std=std,
            num_steps=2,
            generator=torch.Generator().manual_seed(0),
        )
        with torch.no_grad():
            assert torch.equal(model.get_features(pixel_values), plain)
            undefended = cosine_similarity(model.get_features(attacked), plain, similarity_axis=axis)
    with torch.no_grad():
        assert torch.equal(model.get_features(pixel_values), expected)
        defended = cosine_similarity(model.get_features(attacked), expected, similarity_axis=axis)
    for cosine in (undefended, defended):
        assert cosine.min() >= -1
        assert cosine.mean() < 1 - 1e-6
