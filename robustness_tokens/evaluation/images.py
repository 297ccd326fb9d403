"""The images of an evaluation, in fixed batches that the processes share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Dataset

from ..data import validate_images
from ..report import MeasuredImages
from ..utils import digest, process_state
from .attack_suite import AttackBatch
from .threat_models import EvaluatedModel


def load_batches(
    dataset: Dataset[dict[str, Any]], rows: Sequence[int], model: EvaluatedModel, *, batch_size: int, ignore_index: int
) -> dict[int, AttackBatch]:
    """Loads this process's batches by number, on the model's device; batch b starts at row b * batch_size."""
    state = process_state()
    batches = {}
    for number, start in enumerate(range(0, len(rows), batch_size)):
        if number % state.num_processes == state.process_index:
            items = [{**dataset[row], "index": row} for row in rows[start : start + batch_size]]
            batches[number] = _collate(items, model, ignore_index)
    return batches


def measured_images(batches: Mapping[int, AttackBatch], rows: Sequence[int]) -> MeasuredImages:
    """Returns the rows and the digest of all images and labels, which do not depend on batches and processes.

    All processes call it, each with its own batches, by number, of the images in `rows`.
    """
    parts = []
    for number, batch in batches.items():
        columns = [batch.images, *([] if batch.labels is None else [batch.labels])]
        parts.append((number, [digest(of_image) for of_image in zip(*columns, strict=True)]))
    digests = [one for _, of_batch in sorted(gather_object(parts)) for one in of_batch]
    return MeasuredImages(rows=list(rows), sha256=hashlib.sha256("".join(digests).encode()).hexdigest())


def _collate(items: list[dict[str, Any]], model: EvaluatedModel, ignore_index: int) -> AttackBatch:
    if broken := [item["broken_image"] for item in items if "broken_image" in item]:
        raise ValueError(f"dataset has images that can't be read, such as {broken[0]}: filter such rows out")
    images = torch.stack([item["images"] for item in items]).float()
    validate_images(images)
    labels = None
    if model.task != "features":
        if "labels" not in items[0]:
            raise ValueError(
                f"dataset has no labels, which task={model.task!r} needs: name their column by "
                'label_column_name (mask_column_name), give items with "labels", or evaluate task="features"'
            )
        labels = torch.stack([torch.as_tensor(item["labels"]).long() for item in items])
        check_labels(labels, images, model.task)
        labels = labels.to(model.device)
    index = torch.tensor([item["index"] for item in items])
    return AttackBatch(images=images.to(model.device), labels=labels, index=index, ignore_index=ignore_index)


def check_labels(labels: Tensor, images: Tensor, task: str) -> None:
    """Raises `ValueError` unless there is one label per image, or for segmentation per pixel."""
    expected = (len(images), *(images.shape[2:] if task == "segmentation" else ()))
    if labels.shape != expected:
        raise ValueError(f"labels must have shape {expected} for {task}, got {tuple(labels.shape)}")
