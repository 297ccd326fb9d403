"""The images of an evaluation: a random choice from a dataset, in fixed batches that the processes share.

Shapes: B images, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import torch
from torch.utils.data import Dataset

from ..data import ImageDataset, ImageTransform, SegmentationDataset, processor_image_size, validate_images
from ..report import Task
from ..utils import process_state
from .attack_suite import AttackBatch
from .threat_models import EvaluatedModel


def prepare_dataset(
    dataset: Any, *, task: Task, image_processor: Any = None, image_size: int | None = None
) -> Dataset[dict[str, Any]]:
    """Returns a map-style dataset of images in [0, 1], with labels where the task needs them.

    Pictures are squashed to `image_size`, by default what the image processor makes; see [`evaluate_robustness`] for
    the datasets that it takes. `ValueError` for a stream, for several splits, or where `image_size` does not apply.
    """
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ValueError(f"dataset has the splits {sorted(dataset)}: give one of them, such as dataset['test']")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}, expected one that can be counted and read by row: load it "
            "without streaming"
        )
    if not isinstance(dataset, datasets.Dataset):
        if image_size is not None:
            raise ValueError(f"image_size={image_size} can't be applied to a {type(dataset).__name__} of ready images")
        return dataset
    if image_size is None:
        if image_processor is None:
            raise ValueError("image_size is needed, in pixels: the model has no image processor to say")
        image_size = processor_image_size(image_processor)
    if task == "segmentation":
        return SegmentationDataset(dataset, image_size=image_size)
    return ImageDataset(dataset, ImageTransform(image_size=image_size), with_labels=task == "classification")


def load_batches(
    dataset: Dataset[dict[str, Any]],
    rows: Sequence[int],
    model: EvaluatedModel,
    *,
    batch_size: int,
    ignore_index: int = 255,
) -> dict[int, AttackBatch]:
    """Loads this process's batches by number, on the model's device; batch b starts at row b * batch_size.

    `ValueError` if images can't be read or are not in [0, 1], or labels are missing or of the wrong shape.
    """
    state = process_state()
    batches = {}
    for number, start in enumerate(range(0, len(rows), batch_size)):
        if number % state.num_processes == state.process_index:
            items = [{**dataset[row], "index": row} for row in rows[start : start + batch_size]]
            batches[number] = _collate(items, model, ignore_index)
    return batches


def _collate(items: list[dict[str, Any]], model: EvaluatedModel, ignore_index: int) -> AttackBatch:
    if broken := [item["broken_image"] for item in items if "broken_image" in item]:
        raise ValueError(f"dataset has images that can't be read, such as {broken[0]}: filter such rows out")
    images = torch.stack([item["images"] for item in items]).float()
    validate_images(images)
    labels = None
    if model.task != "features":
        if "labels" not in items[0]:
            raise ValueError(f'dataset has no labels, which task={model.task!r} needs: evaluate task="features"')
        labels = torch.stack([torch.as_tensor(item["labels"]).long() for item in items])
        expected = (len(items), *(images.shape[2:] if model.task == "segmentation" else ()))
        if labels.shape != expected:
            raise ValueError(f"labels must have shape {expected} for {model.task}, got {tuple(labels.shape)}")
        labels = labels.to(model.device)
    index = torch.tensor([item["index"] for item in items])
    return AttackBatch(images=images.to(model.device), labels=labels, index=index, ignore_index=ignore_index)
