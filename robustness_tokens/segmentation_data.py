"""Pictures with a class per pixel, made ready for a segmentation probe and its evaluation."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from .data import ImageDataset
from .dataset_loading import find_image_column
from .preprocessing import ImageTransform


IGNORE_INDEX = 255
"""Label of the pixels that don't count, as in transformers and mmsegmentation."""


class SegmentationDataset(Dataset[dict[str, Any]]):
    """Items of a map-style data set with a picture and a mask per row, both squashed to a square.

    An item is {"images": (3, S, S) float32 in [0, 1], "labels": (S, S) int64, "index": the row}; `IGNORE_INDEX` marks
    pixels that don't count. A picture that can't be read is a `BrokenImage`, as in `ImageDataset`.

    Args:
        dataset: with two columns of `datasets.Image`.
        image_size: S in pixels; pictures are resized bilinearly, masks to the nearest pixel.
        image_column_name: of the pictures.
        mask_column_name: of the masks, which have one channel.
        do_reduce_labels: 0 becomes `IGNORE_INDEX` and all other classes one less, as ADE20K needs it (transformers'
            name).

    Raises:
        ValueError: no such columns, or a data set with a transform.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        image_size: int,
        image_column_name: str = "image",
        mask_column_name: str = "mask",
        do_reduce_labels: bool = False,
    ) -> None:
        self._pictures = ImageDataset(
            dataset,
            ImageTransform(image_size=image_size),
            image_column_name=image_column_name,
            with_labels=False,
        )
        mask_column = find_image_column(dataset, mask_column_name)
        self._masks = dataset.with_format(None).select_columns([mask_column])
        self._mask_column, self._size, self._reduce = mask_column, (image_size, image_size), do_reduce_labels

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self._pictures[index], "labels": self._read_mask(int(index))}

    def _read_mask(self, index: int) -> Tensor:
        mask: Image.Image | None = self._masks[index][self._mask_column]
        if mask is None or len(mask.getbands()) != 1 or mask.mode == "F":
            came = "none" if mask is None else f"one of mode {mask.mode!r}"
            raise ValueError(f"row {index} needs a mask of one channel of integers, got {came}")
        classes = np.array(mask.resize(self._size, Image.Resampling.NEAREST)).astype(np.int64)  # (S, S)
        if self._reduce:
            ignored = (classes == 0) | (classes == IGNORE_INDEX)
            classes = np.where(ignored, IGNORE_INDEX, classes - 1)
        return torch.from_numpy(classes)
