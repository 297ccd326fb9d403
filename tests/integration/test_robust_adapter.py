"""Tests that the shipped robust adapter is small, loads, and holds as its report says."""

from pathlib import Path

import torch

from robustness_tokens import (
    ImageDataset,
    ImageTransform,
    Normalizer,
    RobustnessTokenForImageClassification,
    load_image_dataset,
    pgd_attack,
)
from robustness_tokens.attacks import margin_objective
from robustness_tokens.data import collate_images
from robustness_tokens.hub import load_adapter


QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
ADAPTER = QUICKSTART / "robust-adapter"
EPS = 16 / 255


def test_the_shipped_adapter_is_small_and_names_no_place_of_ours() -> None:
    adapter = load_adapter(ADAPTER)
    assert adapter.config.base_model_name_or_path == "examples/quickstart/base"
    assert sum(tensor.numel() for tensor in adapter.state.values()) < 0.03 * 1_206_922
    assert adapter.report is not None
    assert not [check.name for check in adapter.report.checks if check.passed is False]
    for file in ADAPTER.iterdir():
        if file.suffix in (".json", ".md"):
            assert "/work" not in file.read_text(encoding="utf-8")


def test_the_shipped_adapter_holds_in_the_white_box() -> None:
    model = RobustnessTokenForImageClassification.from_pretrained(ADAPTER, base_model=QUICKSTART / "base")
    assert model.config.image_mean is not None
    assert model.config.image_std is not None
    normalizer = Normalizer(model.config.image_mean, model.config.image_std)
    test_set = ImageDataset(
        load_image_dataset(QUICKSTART / "data", split="test"), ImageTransform(image_size=28), with_labels=True
    )
    batch = collate_images([test_set[row] for row in range(64)])
    images, labels = batch["images"], batch["labels"]

    def logits(pictures: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = model(pixel_values=normalizer(pictures)).logits
        return found

    def accuracy(pictures: torch.Tensor) -> float:
        with torch.no_grad():
            return (logits(pictures).argmax(dim=1) == labels).float().mean().item()

    attacked = pgd_attack(margin_objective(logits, labels), images, eps=EPS, num_steps=10)
    assert accuracy(images) > 0.75
    assert accuracy(attacked) > 0.45, "the base keeps less than a twentieth"
    with model.disable_adapter():
        attacked = pgd_attack(margin_objective(logits, labels), images, eps=EPS, num_steps=10)
        assert accuracy(attacked) < 0.2
