"""What the scripts that train on all of Fashion-MNIST share: held-out images, a normalizer, and reading a report."""

from __future__ import annotations

import hashlib
from pathlib import Path

import datasets

from robustness_tokens import Normalizer, RobustnessReport, load_image_dataset
from robustness_tokens.models import RobustnessTokenPreTrainedModel


BASE = Path(__file__).parent / "base"
NUM_HELD_OUT = 2000


def load_training_images(folder: Path) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Returns the images to train on, and the last ones of the training split, which are held out to choose by."""
    images = load_image_dataset(folder)
    if len(images) <= NUM_HELD_OUT:
        raise SystemExit(
            f"error: {folder} has {len(images)} training images, expected more than the {NUM_HELD_OUT} that are held "
            f"out: run prepare_data.py --all --output {folder}"
        )
    num_training = len(images) - NUM_HELD_OUT
    return images.select(range(num_training)), images.select(range(num_training, len(images)))


def fingerprints(*parts: datasets.Dataset | Path) -> list[str]:
    """Returns what identifies datasets, by their fingerprints, and files, by their sha256."""
    return [hashlib.sha256(p.read_bytes()).hexdigest() if isinstance(p, Path) else p._fingerprint for p in parts]


def normalizer_of(model: RobustnessTokenPreTrainedModel) -> Normalizer:
    """Returns the map from [0, 1] images to pixel values that an adapter was trained with."""
    assert model.config.image_mean is not None
    assert model.config.image_std is not None
    return Normalizer(model.config.image_mean, model.config.image_std)


def accuracy(
    report: RobustnessReport, *, tokens: str = "trained", knowledge: str | None = None, eps: float | None = None
) -> float:
    """Returns the accuracy on clean images (knowledge None), or the worst case over the attacks of a level."""
    wanted = ("accuracy", tokens, knowledge, None if knowledge is None else "worst_case")
    found = [r for r in report.results if (r.metric, r.tokens, r.knowledge, r.attack) == wanted]
    (value,) = (result.value for result in found if eps in (None, result.eps))
    return value
