"""Rows of a data set of pictures, map-style or streaming, to images in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from .loading import find_image_column, find_label_column
from .preprocessing import ImageTransform, to_rgb


if TYPE_CHECKING:
    import datasets


IGNORE_INDEX = 255
"""Label of the pixels that don't count, as in transformers and mmsegmentation."""


@dataclass(frozen=True)
class BrokenImage:
    """A row whose picture can't be read: its index, its file if it has one, and the reader's complaint."""

    index: int
    path: str | None
    reason: str

    def __str__(self) -> str:
        return f"row {self.index}" + (f" ({self.path})" if self.path else "") + f": {self.reason}"


class ImageDataset(Dataset[dict[str, Any]]):
    """Items of a map-style data set, read and decoded one at a time, in the data loader's workers if it has any.

    An item is {"images": (3, H, W) float32 in [0, 1], "index": the row, "labels": the class index, if there is a label
    column}. Where the picture can't be read, "broken_image", a `BrokenImage`, stands in for "images"; Pillow's guard
    against decompression bombs counts as that. EXIF orientations are not applied (see `to_rgb`).

    Args:
        dataset: with a `datasets.Image` column, and no transform of its own.
        transform: picture -> (3, H, W) float32 in [0, 1], such as an `ImageTransform`.
        image_column_name: see `find_image_column`.
        label_column_name: see `find_label_column`.
        with_labels: False leaves labels out, and then it does not matter what they are.

    Raises:
        ValueError: no such columns, or a data set with a transform.
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        transform: Callable[[Image.Image], Tensor],
        *,
        image_column_name: str | None = None,
        label_column_name: str | None = None,
        with_labels: bool = True,
    ) -> None:
        if dataset.format["type"] == "custom":
            raise ValueError(
                "dataset has a transform (with_transform), which would be bypassed: pass it as `transform`, from a "
                "picture to a float tensor in [0, 1], and the data set with_format(None)."
            )
        self.transform = transform
        self._reader = _RowReader.of(dataset, transform, image_column_name, label_column_name, with_labels)
        self._dataset = self._reader.narrow(dataset)

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._reader.read(self._dataset[int(index)], int(index))


class IterableImageDataset(IterableDataset[dict[str, Any]]):
    """Items of a streaming data set, as `ImageDataset` makes them.

    Processes and workers share the shards as `datasets` deals them out (where the number of shards is no multiple of
    that of processes, each process reads all rows and decodes its own). Nothing else may split the stream again.

    A row's index is its position in the stream; with P processes of W workers each, worker w of process p numbers its
    rows p * W + w, p * W + w + P * W, ... So no index is given twice in a pass, and it is the same in every pass over
    the same order with the same P and W.

    A picture that is broken where `datasets` decodes it, in a `map` before this, is an error of that `map`.

    Args:
        dataset: with a `datasets.Image` column, shuffled or not.
        transform: picture -> (3, H, W) float32 in [0, 1], such as an `ImageTransform`.
        image_column_name: see `find_image_column`.
        label_column_name: see `find_label_column`.
        with_labels: False leaves labels out, and then it does not matter what they are.
        rank: of this process.
        world_size: number of processes.

    Raises:
        ValueError: no such columns.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: Callable[[Image.Image], Tensor],
        *,
        image_column_name: str | None = None,
        label_column_name: str | None = None,
        with_labels: bool = True,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        self.transform = transform
        self._reader = _RowReader.of(dataset, transform, image_column_name, label_column_name, with_labels)
        narrowed = self._reader.narrow(dataset)
        self._dataset = split_dataset_by_node(narrowed, rank=rank, world_size=world_size)
        self._rank, self._world_size = rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which reorders a shuffled stream."""
        self._dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        num_workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        first, stride = self._rank * num_workers + worker_id, self._world_size * num_workers
        for position, row in enumerate(self._dataset):
            yield self._reader.read(row, first + position * stride)


def validate_images(images: Tensor, *, ndim: int = 4) -> None:
    """Checks that images are float in [0, 1].

    Args:
        images: (B, C, H, W); an empty batch is fine.
        ndim: 4 for a batch, 3 for one image (C, H, W).

    Raises:
        ValueError: no tensor, another rank, not floating point, NaN, or values outside [0, 1].
    """
    if not isinstance(images, Tensor):
        raise ValueError(f"images is a {type(images).__name__}, expected a float tensor in [0, 1].")
    if images.ndim != ndim:
        expected = "(B, C, H, W)" if ndim == 4 else "(C, H, W)"
        raise ValueError(f"images has shape {tuple(images.shape)}, expected {ndim} dimensions {expected}.")
    low, high = (images.min().item(), images.max().item()) if images.numel() else (0.0, 1.0)
    # Written so that NaN, which compares false to everything, fails too.
    if not images.is_floating_point() or not (low >= 0 and high <= 1):
        raise ValueError(
            f"images has dtype {images.dtype}, minimum {low:.6g} and maximum {high:.6g}, expected float in [0, 1]. "
            "Divide 8-bit images by 255; undo a normalisation with Normalizer.inverse."
        )


class TensorImageDataset(Dataset[dict[str, Any]]):
    """Items of a map-style dataset of ready images, checked and numbered.

    Args:
        dataset: Map-style dataset of `{"images": (3, H, W) float in [0, 1]}`, with "labels" if it has any; other
            keys are dropped.
        with_labels: False drops the labels, whatever they hold.
        broken_images: True keeps a "broken_image" as it is; by default an item without "images" is an error.
    """

    def __init__(
        self, dataset: Dataset[Mapping[str, Any]], *, with_labels: bool = True, broken_images: bool = False
    ) -> None:
        self._dataset = dataset
        self._images = {"images", "broken_image"} if broken_images else {"images"}
        self._kept = self._images | ({"labels"} if with_labels else set())

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]  # torch's Dataset leaves __len__ to its children

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._dataset[int(index)]
        if not isinstance(item, Mapping) or not self._images & item.keys():
            came = f"keys {list(item)}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
            raise ValueError(f"dataset[{index}] must be a dict with 'images', got {came}")
        if "images" in item:
            validate_images(item["images"], ndim=3)
        return {**{key: item[key] for key in self._kept if key in item}, "index": int(index)}


def choose_rows(num_rows: int, num_images: int, *, seed: int) -> list[int]:
    """A random choice of rows, in random order, so that the first few are one too: datasets are often sorted by class.

    Args:
        num_rows: Of the dataset.
        num_images: To choose; all rows if there are no more.
        seed: Of the choice.
    """
    rows: list[int] = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))[:num_images].tolist()
    return rows


@dataclass(frozen=True)
class _RowReader:
    transform: Callable[[Image.Image], Tensor]
    image_column: str
    label_column: str | None

    @classmethod
    def of(
        cls,
        dataset: datasets.Dataset | datasets.IterableDataset,
        transform: Callable[[Image.Image], Tensor],
        image_column_name: str | None,
        label_column_name: str | None,
        with_labels: bool,
    ) -> _RowReader:
        if label_column_name is not None and not with_labels:
            raise ValueError(f"label_column_name={label_column_name!r} with with_labels=False: leave one of them out.")
        image_column = find_image_column(dataset, image_column_name)
        label_column = find_label_column(dataset, label_column_name) if with_labels else None
        return cls(transform, image_column, label_column)

    def narrow(
        self, dataset: datasets.Dataset | datasets.IterableDataset
    ) -> datasets.Dataset | datasets.IterableDataset:
        columns = [column for column in (self.image_column, self.label_column) if column is not None]
        narrowed = dataset.with_format(None).select_columns(columns)
        if narrowed.features is None:
            return narrowed
        from datasets import Image as ImageFeature

        # Decoded by `datasets`, one broken file would end the run.
        return narrowed.cast_column(self.image_column, ImageFeature(decode=False))

    def read(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"index": index}
        if self.label_column is not None:
            if row[self.label_column] is None:
                raise ValueError(f"row {index} has no {self.label_column!r}: filter such rows out of the data set.")
            item["labels"] = int(row[self.label_column])
        stored = row[self.image_column]
        try:
            image = _decode(stored)
        except Exception as exc:  # Pillow's readers raise nearly anything on a broken file
            path = stored.get("path") if isinstance(stored, Mapping) else None
            return {**item, "broken_image": BrokenImage(index, path, f"{type(exc).__name__}: {exc}")}
        return {**item, "images": self.transform(image)}


def _decode(stored: Mapping[str, Any] | Image.Image | None) -> Image.Image:
    if isinstance(stored, Image.Image):
        return to_rgb(stored)
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        raise ValueError("the row holds no image")
    content = stored["bytes"]
    if content is None:
        from datasets.utils.file_utils import xopen

        with xopen(stored["path"], "rb") as file:
            content = file.read()
    with Image.open(BytesIO(content)) as image:
        image.load()
        return to_rgb(image)


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
