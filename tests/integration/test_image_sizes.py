"""Images of another size than the base's: from the picture to the report, and in every family that takes them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from robustness_tokens import (
    RobustnessTokenForImageClassification,
    RobustnessTokenModel,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    evaluate_robustness,
    inject_tokens,
)
from robustness_tokens.data.image_processors import build_image_processor
from robustness_tokens.models.features import extract_features
from tests.support.bases import NUM_LABELS, build_base
from tests.support.families import BASES, HIDDEN_SIZE


SIZE = (24, 16)
# AIMv2 has a position for each patch of its own size and no way to interpolate; timm's models are made for a size.
FIXED = {name for name in BASES if name == "aimv2" or name.startswith("timm_")}


@pytest.mark.parametrize("name", sorted(BASES.keys() - FIXED))
def test_features_of_another_size(name: str) -> None:
    model, images = BASES[name].build(), torch.randn(2, 3, *SIZE)
    asked = {"interpolate_pos_encoding": True}
    takes = asked.keys() <= inspect.signature(getattr(model, "get_image_features", model.forward)).parameters.keys()
    if "relative" in name or "shared" in name:
        takes = False
    expected = extract_features(model, images, feature_view="patches", **(asked if takes else {}))
    assert expected.shape == (2, 6, HIDDEN_SIZE)
    inject_tokens(model, torch.zeros(3, HIDDEN_SIZE))
    found = extract_features(model, images, feature_view="patches")
    assert found.shape == expected.shape


def pictures() -> datasets.Dataset:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 40, 30, 3), dtype=np.uint8)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [Image.fromarray(one) for one in pixels], "label": [0, 1, 2, 3, 4, 0]}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("of_the_processor", [True, False], ids=["a rectangle", "another square"])
def test_from_the_picture_to_the_report(family: str, of_the_processor: bool, tmp_path: Path) -> None:
    build_base(family, classifier=True).save_pretrained(tmp_path / "base")
    build_image_processor(image_size=SIZE if of_the_processor else 16).save_pretrained(tmp_path / "base")
    image_size = None if of_the_processor else 24
    model = RobustnessTokenForImageClassification.from_base(tmp_path / "base", num_robustness_tokens=3)
    args = RobustnessTokenTrainingArguments(
        output_dir=str(tmp_path / "run"),
        attack="pgd",
        num_attack_steps=1,
        max_steps=1,
        per_device_train_batch_size=2,
        image_size=image_size,
        disable_tqdm=True,
    )
    trainer = RobustnessTokenTrainer(model, args, pictures())
    trainer.train()
    trainer.save_model()
    loaded = RobustnessTokenForImageClassification.from_pretrained(tmp_path / "run")
    shape = SIZE if of_the_processor else (24, 24)
    settings: dict[str, Any] = {"num_images": 4, "eps_sweep": (), "diagnostics": False, "disable_tqdm": True}
    settings |= {"knowledge": "base", "attacks": ("cross_entropy", "feature_cosine"), "num_steps": 1}
    report = evaluate_robustness(loaded, pictures(), **settings)
    ready = [
        {"images": item["images"], "labels": item["label"]}
        for item in ({**pictures()[row], **trainer.train_dataset[row]} for row in range(6))
    ]
    assert ready[0]["images"].shape == (3, *shape)
    as_trained = evaluate_robustness(loaded, ready, **settings)
    assert report.images == as_trained.images, "evaluation resizes as the training did"
    assert [result.value for result in report.results] == [result.value for result in as_trained.results]
    logits = loaded(torch.randn(1, 3, *shape)).logits
    assert logits.shape == (1, NUM_LABELS)


def test_pictures_are_evaluated_by_the_processor_where_it_resized_the_training(tmp_path: Path) -> None:
    build_base("dinov2").save_pretrained(tmp_path / "base")
    processor: Any = build_image_processor(image_size=16)
    processor.size, processor.do_center_crop = {"shortest_edge": 20}, True
    processor.save_pretrained(tmp_path / "base")
    model = RobustnessTokenModel.from_base(tmp_path / "base", num_robustness_tokens=3)
    settings: dict[str, Any] = {"num_images": 4, "eps_sweep": (), "diagnostics": False, "disable_tqdm": True}
    settings |= {"knowledge": "base", "attacks": "feature_cosine", "num_steps": 1}
    squashed = evaluate_robustness(model, pictures(), **settings)
    model.config.training = {"resize": "processor", "image_size": 16}
    cropped = evaluate_robustness(model, pictures(), **settings)
    assert squashed.images is not None
    assert cropped.images is not None
    assert squashed.images.sha256 != cropped.images.sha256
    by_hand = [
        {"images": torch.as_tensor(processor(picture, do_normalize=False, return_tensors="pt")["pixel_values"][0])}
        for picture in pictures()["image"]
    ]
    assert evaluate_robustness(model, by_hand, **settings).images == cropped.images
    stated = evaluate_robustness(model, pictures(), **settings, image_size=16)
    assert stated.images == squashed.images, "what the user says goes first"
