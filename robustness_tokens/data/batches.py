"""Batches of images, read by workers; broken images are left out and counted."""

import logging
import signal
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler

from .image_datasets import BrokenImage


logger = logging.getLogger(__name__)


def collate_images(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stacks items to a batch, without the broken images.

    Args:
        items: Items of `ImageDataset`, `IterableImageDataset`, `SegmentationDataset` or `AdversarialPairs`.

    Returns:
        `{"images": (B, C, H, W), "index": (B,) int64, "broken_images": tuple of BrokenImage}`, and if the items have
        them "labels", (B,) or (B, H, W) int64, "adversarial_images", (B, C, H, W), and "baseline_cosine", (B,). B
        counts the readable images; if there are none, "images" is (0, 3, 0, 0).

    Raises:
        ValueError: If the images have different shapes.
    """
    broken = tuple(item["broken_image"] for item in items if "broken_image" in item)
    whole = [item for item in items if "broken_image" not in item]
    shapes = sorted({tuple(item["images"].shape) for item in whole})
    if len(shapes) > 1:
        raise ValueError(
            f"images of one batch must have one shape, got {shapes}: let the transform crop or squash them, as "
            "ImageTransform(resize='squash') does"
        )
    batch: dict[str, Any] = {
        "images": torch.stack([item["images"] for item in whole]) if whole else torch.empty(0, 3, 0, 0),
        "index": torch.tensor([item["index"] for item in whole], dtype=torch.int64),
    }
    if all("labels" in item for item in items):
        labels = [torch.as_tensor(item["labels"], dtype=torch.int64) for item in whole]
        batch["labels"] = torch.stack(labels) if labels else torch.empty(0, dtype=torch.int64)
    if whole and all("adversarial_images" in item for item in whole):
        batch["adversarial_images"] = torch.stack([item["adversarial_images"] for item in whole])
        if all("baseline_cosine" in item for item in whole):
            batch["baseline_cosine"] = torch.tensor([item["baseline_cosine"] for item in whole])
    batch["broken_images"] = broken
    return batch


class BrokenImageLog:
    """Counts the broken images of one process, each row once, and raises if they exceed `max_broken_images`."""

    def __init__(self, max_broken_images: int = 10) -> None:
        if max_broken_images < 0:
            raise ValueError(f"max_broken_images must be at least 0, got {max_broken_images}")
        self.max_broken_images = max_broken_images
        self.broken_images: dict[int, BrokenImage] = {}

    def update(self, batch: Mapping[str, Any]) -> None:
        """Warns of the broken images of a batch from `collate_images` and counts them; `ValueError` if too many."""
        for image in batch["broken_images"]:
            if image.index not in self.broken_images:
                self.broken_images[image.index] = image
                logger.warning("Skipped a broken image, %s", image)
        if len(self.broken_images) > self.max_broken_images:
            listed = "\n".join(f"  {image}" for image in self.broken_images.values())
            raise ValueError(
                f"{len(self.broken_images)} broken images, more than max_broken_images={self.max_broken_images}: "
                f"repair or remove these rows, or raise max_broken_images\n{listed}"
            )


def build_dataloader(
    dataset: Dataset[dict[str, Any]],
    *,
    batch_size: int,
    shuffle: bool,
    seed: int = 0,
    num_workers: int = 0,
    drop_last: bool = False,
) -> DataLoader[dict[str, Any]]:
    """Makes a data loader with the batches of `collate_images`.

    Args:
        dataset: Dataset with items of `ImageDataset`.
        batch_size: Images per batch, broken ones included.
        shuffle: Take a new order every epoch. Shuffle a stream beforehand, by `dataset.shuffle(seed, buffer_size)`.
        seed: Seed of the order, which does not depend on `num_workers`.
        num_workers: Processes that read and decode; with 0 this one does.
        drop_last: Drop a last batch that is not full.

    Raises:
        ValueError: If a stream is to be shuffled here.
    """
    if shuffle and isinstance(dataset, IterableDataset):
        raise ValueError("shuffle=True with a stream: shuffle it before, by dataset.shuffle(seed=, buffer_size=)")
    # The loader draws as many seeds as it has workers. From a generator shared with the sampler that would change the
    # order, and from torch's default generator the noise of whatever else draws from that.
    order = torch.Generator().manual_seed(seed)
    return DataLoader(
        dataset,
        batch_size=batch_size,
        sampler=RandomSampler(dataset, generator=order) if shuffle else None,  # type: ignore[arg-type]
        generator=torch.Generator().manual_seed(seed),
        num_workers=num_workers,
        persistent_workers=num_workers > 0,
        worker_init_fn=_outlive_one_sigterm if num_workers > 0 else None,
        drop_last=drop_last,
        collate_fn=collate_images,
    )


def _outlive_one_sigterm(worker_id: int) -> None:
    """Lets a worker live through a scheduler's SIGTERM, so that its loader can finish the step that is to be saved.

    The second SIGTERM, from the loader or the ending interpreter, terminates it.
    """
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
