"""Prepares any dataset that a user gives: images in [0, 1], their description and their identity."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers.image_processing_utils import BaseImageProcessor

from ..utils import digest, digest_json
from .adversarial_pairs import AdversarialPairs
from .image_datasets import ImageDataset, IterableImageDataset, SegmentationDataset, TensorImageDataset
from .image_processors import processor_image_size
from .labels import check_label_range
from .preprocessing import ImageTransform, ResizeMode


# datasets itself drops the namespace of a Hub id.
_HUB_FILE = re.compile(r"hf://datasets/(?P<name>[^@]+)@(?P<commit>[0-9a-f]{40})/")

_NUM_READ_TWICE = 16  # images, to notice a random transform


@dataclass(frozen=True, eq=False)
class Images:
    """Prepared images and their properties, each computed once, when it is first read."""

    dataset: Dataset[dict[str, Any]]  # with the items of ImageDataset, SegmentationDataset or AdversarialPairs
    source: Any  # the dataset that the user gave

    @cached_property
    def num_images(self) -> int | None:
        """Number of images, broken ones included; `None` for a stream."""
        return len(self.dataset) if hasattr(self.dataset, "__len__") else None

    @cached_property
    def shape(self) -> tuple[int, int] | None:
        """Height and width in pixels; `None` if they vary. Ready images are assumed to have the first one's size."""
        if isinstance(self.dataset, ImageDataset | IterableImageDataset):
            wide, tall = (self.dataset.transform(Image.new("RGB", size)) for size in ((400, 300), (300, 400)))
            return (wide.shape[-2], wide.shape[-1]) if wide.shape == tall.shape else None
        items = map(self.dataset.__getitem__, range(self.num_images or 0))
        first = next((item["images"] for item in items if "images" in item), None)
        return None if first is None else (first.shape[-2], first.shape[-1])

    @property
    def image_size(self) -> int | list[int] | None:
        """The shape as a recipe holds it: one number if the images are square."""
        return self.shape[0] if self.shape and self.shape[0] == self.shape[1] else self.shape and list(self.shape)

    @cached_property
    def description(self) -> dict[str, Any]:
        """Origin and number of the images, as a recipe holds them in JSON."""
        known: dict[str, Any] = {"num_images": self.num_images}
        if isinstance(self.source, AdversarialPairs):
            info = self.source.info
            made = {name: getattr(info, name) for name in ("seed", "step", "batch_size", "mixed_precision")}
            return {**info.dataset, **known, "adversarial_pairs": {**made, "digest": self.source.digest()}}
        if _is_table(self.source):
            info = self.source.info
            known |= {"name": info.dataset_name or info.builder_name, "config": info.config_name}
            for url in info.download_checksums or ():
                if came_from := _HUB_FILE.match(url):
                    known |= {"name": came_from["name"], "revision": came_from["commit"]}
            known["split"] = None if self.source.split is None else str(self.source.split)
        return {key: value for key, value in known.items() if value is not None}

    def check_labels(self, num_labels: int) -> None:
        """Raises `ValueError` unless all labels in a table are classes; others are checked when they are read."""
        if isinstance(self.dataset, ImageDataset):
            check_label_range(self.dataset.labels, num_labels)

    @cached_property
    def identity(self) -> str | None:
        """A sha256 of all images and labels; `None` if they can't be known: a stream, or others at each reading.

        For a `datasets` dataset, of the rows' fingerprint and of the preprocessing; for ready images, all are read.
        """
        if isinstance(self.source, AdversarialPairs):
            return self.source.digest()
        if isinstance(self.dataset, ImageDataset) and isinstance(self.dataset.transform, ImageTransform):
            return digest_json([self.dataset.fingerprint, self.dataset.transform.settings])
        if self.num_images is None:
            return None
        sha = hashlib.sha256()
        for row in tqdm(range(self.num_images), desc="Reading all images, to tell them from others", delay=5):
            found = _digest_item(self.dataset[row])
            if row < _NUM_READ_TWICE and _digest_item(self.dataset[row]) != found:
                return None
            sha.update(found.encode())
        return sha.hexdigest()


def _digest_item(item: Mapping[str, Any]) -> str:
    """Returns a digest of a ready image and of its label, which is a tensor or a number; a broken image has none."""
    return digest({key: torch.as_tensor(item[key]) for key in ("images", "labels") if key in item})


def prepare_images(
    dataset: Any,
    *,
    argument: str = "dataset",
    task: str = "features",
    resize: ResizeMode | None = None,
    image_size: int | Sequence[int] | None = None,
    recipe: Mapping[str, Any] | None = None,
    image_processor: BaseImageProcessor | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    mask_column_name: str | None = None,
    label_names: Sequence[str] | None = None,
    streams: bool = False,
    broken_images: bool = False,
    rank: int = 0,
    world_size: int = 1,
) -> Images:
    """Prepares a `datasets` dataset of pictures, a torch dataset of ready images or `AdversarialPairs`.

    The task "classification" reads class labels, "segmentation" masks, any other no labels. By default, pictures are
    resized as the `recipe` of an adapter says, and without one squashed to the size of the image processor.
    `label_names` are those of the model's classes, see `ImageDataset`. `streams` allows a stream; one of `datasets` is
    split among the processes. `broken_images` allows broken images in a dataset of ready images; pictures may always
    be broken. `ValueError` names `argument` if the dataset can't be used, or a setting that has no effect on it.
    """
    import datasets

    kind = type(dataset).__name__
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        example = f"dataset[{next(iter(dataset), 'train')!r}]"
        raise ValueError(f"{argument} has the splits {sorted(dataset)}: give one of them, such as {example}")
    streaming = isinstance(dataset, datasets.IterableDataset)
    if streaming or isinstance(dataset, IterableDataset):
        if not streams or (streaming and task == "segmentation"):
            raise ValueError(f"{argument} must be read by row, got a stream, {kind}: load it without streaming")
    elif isinstance(dataset, str) or not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise ValueError(
            f"{argument} must be a datasets.Dataset or a torch dataset with __len__ and __getitem__, got a {kind}: "
            "load pictures by load_image_dataset"
        )
    elif len(dataset) == 0:
        raise ValueError(f"{argument} has no rows, expected at least one image")
    if isinstance(dataset, AdversarialPairs):
        return Images(dataset, dataset)
    if not _is_table(dataset):
        columns = {
            "image_column_name": image_column_name,
            "label_column_name": label_column_name,
            "mask_column_name": mask_column_name,
        }
        for name, value in {"image_size": image_size, **columns}.items():
            if value is not None:
                raise ValueError(f"{name}={value!r} can't be applied to a {kind} of ready images: leave it out")
        if isinstance(dataset, IterableDataset) or (isinstance(dataset, ImageDataset) and label_names is None):
            return Images(dataset, dataset)  # prepared already
        ready = TensorImageDataset(
            dataset,
            with_labels=task in ("classification", "segmentation"),
            broken_images=broken_images,
            label_names=label_names if task == "classification" else None,
        )
        return Images(ready, dataset)
    if resize is None and image_size is None and recipe is not None:
        resize = recipe.get("resize")
        image_size = None if resize == "processor" else recipe.get("image_size")
    if resize is None or task == "segmentation":  # masks are squashed too
        resize = "squash"
    if resize == "squash" and image_size is None:
        if image_processor is None:
            raise ValueError("image_size must be given, in pixels: there is no image processor that names one")
        image_size = processor_image_size(image_processor)
    if task == "segmentation":
        assert image_size is not None
        named = {"image_column_name": image_column_name, "mask_column_name": mask_column_name}
        given: dict[str, Any] = {name: column for name, column in named.items() if column is not None}
        return Images(SegmentationDataset(dataset, image_size=image_size, **given), dataset)
    processor = image_processor if resize == "processor" else None
    transform = ImageTransform(resize=resize, image_size=image_size, image_processor=processor)
    options: dict[str, Any] = {"image_column_name": image_column_name, "with_labels": task == "classification"}
    if task == "classification":
        options |= {"label_column_name": label_column_name, "label_names": label_names}
    if streaming:
        return Images(IterableImageDataset(dataset, transform, rank=rank, world_size=world_size, **options), dataset)
    return Images(ImageDataset(dataset, transform, **options), dataset)


def _is_table(dataset: Any) -> bool:
    import datasets

    return isinstance(dataset, datasets.Dataset | datasets.IterableDataset)
