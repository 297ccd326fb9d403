"""Whatever the user gave as a dataset -> what is known of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .adversarial_pairs import AdversarialPairs
from .image_datasets import ImageDataset, IterableImageDataset


# datasets itself drops the namespace of a Hub id.
_HUB_FILE = re.compile(r"hf://datasets/(?P<name>[^@]+)@(?P<commit>[0-9a-f]{40})/")


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """What is known of a dataset that was given to [`prepare_train_dataset`], for the recipe; must be JSON."""
    known: dict[str, Any] = {"num_images": len(dataset) if hasattr(dataset, "__len__") else None}
    if isinstance(dataset, AdversarialPairs):
        made = {name: getattr(dataset.info, name) for name in ("seed", "step", "batch_size", "mixed_precision")}
        return {**dataset.info.dataset, **known, "adversarial_pairs": {**made, "digest": dataset.digest()}}
    import datasets

    if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        info = dataset.info
        known |= {"name": info.dataset_name or info.builder_name, "config": info.config_name}
        for url in info.download_checksums or ():
            if came_from := _HUB_FILE.match(url):
                known |= {"name": came_from["name"], "revision": came_from["commit"]}
        known["split"] = None if dataset.split is None else str(dataset.split)
    return {key: value for key, value in known.items() if value is not None}


def find_image_shape(dataset: Dataset[Any]) -> tuple[int, int] | None:
    """Height and width in pixels of a prepared dataset's images; None where they follow the pictures' own.

    Ready images are taken to be as large as the first.
    """
    if isinstance(dataset, ImageDataset | IterableImageDataset):
        wide, tall = (dataset.transform(Image.new("RGB", size)) for size in ((400, 300), (300, 400)))
        return (wide.shape[-2], wide.shape[-1]) if wide.shape == tall.shape else None
    first: Tensor = dataset[0]["images"]
    return first.shape[-2], first.shape[-1]


def describe_image_size(image_shape: Sequence[int]) -> int | list[int]:
    """Height and width in pixels as the recipe has them: one number if they are the same."""
    height, width = image_shape
    return height if height == width else [height, width]
