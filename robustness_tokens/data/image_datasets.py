"""Datasets of images in [0, 1], made from pictures or from ready images, and batches without broken images."""

from __future__ import annotations

import functools
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, get_worker_info

from .labels import LabelReader
from .loading import find_image_column, find_label_column
from .preprocessing import ImageTransform, height_and_width, to_rgb


if TYPE_CHECKING:
    import datasets


logger = logging.getLogger(__name__)

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Pillow's names of the formats that pictures of a dataset may have."""

MAX_PIXELS_VARIABLE = "ROBTOK_MAX_IMAGE_PIXELS"
if MAX_PIXELS_VARIABLE in os.environ:  # also read by the processes of a data loader
    Image.MAX_IMAGE_PIXELS = int(os.environ[MAX_PIXELS_VARIABLE])
_STRIP_PIXELS = 1 << 22
_LARGEST_RATIO = 200

IGNORE_INDEX = 255
"""Label of pixels that don't count, as in transformers and mmsegmentation."""


@dataclass(frozen=True)
class BrokenImage:
    """A row with a picture that can't be read: its index, its file if it has one, and the reader's message."""

    index: int
    path: str | None
    reason: str

    def __str__(self) -> str:
        return f"row {self.index}" + (f" ({self.path!r})" if self.path else "") + f": {self.reason}"


class _PictureDataset:
    """Turns a dataset's rows, with undecoded pictures, into items."""

    def __init__(
        self,
        dataset: datasets.Dataset | datasets.IterableDataset,
        transform: Callable[[Image.Image], Tensor],
        *,
        image_column_name: str | None = None,
        label_column_name: str | None = None,
        with_labels: bool = True,
        label_names: Sequence[str] | None = None,
    ) -> None:
        import datasets

        if isinstance(dataset, datasets.Dataset) and dataset.format["type"] == "custom":
            raise ValueError(
                "dataset must have no transform (with_transform), which would be bypassed: give it as `transform`, "
                "from a picture to a float tensor in [0, 1], and dataset.with_format(None)"
            )
        if label_column_name is not None and not with_labels:
            raise ValueError(f"label_column_name={label_column_name!r} with with_labels=False: leave one of them out")
        self.transform = transform
        self._image_column = find_image_column(dataset, image_column_name)
        self._label_column = find_label_column(dataset, label_column_name) if with_labels else None
        columns = [column for column in (self._image_column, self._label_column) if column is not None]
        feature = (
            None if self._label_column is None or dataset.features is None else dataset.features[self._label_column]
        )
        own_names = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
        self._read_label = LabelReader(own_names, label_names)
        self.label_names: Sequence[str] | None = own_names if label_names is None else label_names
        self._rows: Any = dataset.with_format(None).select_columns(columns)
        if self._rows.features is not None:
            # If `datasets` decoded the pictures, one broken file would end the run.
            self._rows = self._rows.cast_column(self._image_column, datasets.Image(decode=False))

    def _read(self, row: Mapping[str, Any], index: int) -> dict[str, Any]:
        item: dict[str, Any] = {"index": index}
        if self._label_column is not None:
            if row[self._label_column] is None:
                raise ValueError(f"row {index} has no {self._label_column!r}: filter such rows out of the dataset")
            item["labels"] = int(self._read_label(row[self._label_column]))
        stored = row[self._image_column]
        try:
            image = _to_rgb_in_strips(open_picture(stored))
        except Exception as exc:  # Pillow's readers raise nearly anything on a broken file
            path = stored.get("path") if isinstance(stored, Mapping) else None
            return {**item, "broken_image": BrokenImage(index, path, f"{type(exc).__name__}: {exc}")}
        return {**item, "images": self.transform(image)}


def open_picture(stored: Mapping[str, Any] | Image.Image | None) -> Image.Image:
    """Decodes a picture as a dataset stores it; `ValueError` if it has too many pixels, or Pillow's own error.

    Every picture of a dataset is opened here, in formats that Pillow decodes itself: others start programs.
    """
    if isinstance(stored, Image.Image):
        return stored
    if stored is None or (stored["bytes"] is None and stored["path"] is None):
        raise ValueError("the row holds no image")
    content = stored["bytes"]
    if content is None:
        from datasets.utils.file_utils import xopen

        if os.path.exists(stored["path"]) and not os.path.isfile(stored["path"]):
            raise ValueError(f"{stored['path']!r} is no regular file")  # a device or a pipe has no end
        with xopen(stored["path"], "rb") as file:
            content = file.read()
    Image.init()  # fills Image.OPEN; a build of Pillow may lack a format
    with Image.open(BytesIO(content), formats=[name for name in FORMATS if name in Image.OPEN]) as picture:
        limit, (shorter, longer) = Image.MAX_IMAGE_PIXELS, sorted(picture.size)
        if longer > _LARGEST_RATIO * shorter:  # an image processor that scales the shorter side makes it huge
            raise ValueError(
                f"it has {picture.width:,} x {picture.height:,} pixels, one side {_LARGEST_RATIO} times the other"
            )
        if limit is not None and longer * shorter > limit:  # Pillow raises at twice as many
            raise ValueError(
                f"it has {picture.width:,} x {picture.height:,} pixels, more than {limit:,}: make it smaller, or set "
                f"the environment variable {MAX_PIXELS_VARIABLE}, or PIL.Image.MAX_IMAGE_PIXELS"
            )
        picture.load()
        return picture


def _to_rgb_in_strips(picture: Image.Image) -> Image.Image:
    """Converts as `to_rgb` does, which takes up to 30 bytes a pixel, a strip at a time."""
    rows = max(1, _STRIP_PIXELS // picture.width)
    if rows >= picture.height or picture.mode == "RGB":
        return to_rgb(picture)
    rgb = Image.new("RGB", picture.size)
    for top in range(0, picture.height, rows):
        box = (0, top, picture.width, min(top + rows, picture.height))
        rgb.paste(to_rgb(picture.crop(box)), box)
    return rgb


class ImageDataset(_PictureDataset, Dataset[dict[str, Any]]):
    """Images of a map-style dataset; each picture is read and decoded when its item is asked for.

    An item is `{"images": (3, H, W) float32 in [0, 1], "index": row, "labels": class index}`, without "labels" if
    there is no label column. For a picture that can't be read (or has too many pixels, see `open_picture`), it has
    a `BrokenImage` as "broken_image" instead of "images". EXIF orientations are not applied, as in the paper.

    Args:
        dataset: Dataset with a `datasets.Image` column and no transform of its own.
        transform: Picture -> (3, H, W) float32 in [0, 1], such as an `ImageTransform`.
        image_column_name: Column of the pictures; by default the only `datasets.Image` column.
        label_column_name: Column of the class indices; by default the only `ClassLabel` column, or else the integer
            column "label" or "labels", if there is one.
        with_labels: False reads no labels, whatever columns there are.
        label_names: Names of the model's classes, in their order: labels with names are then numbered by them.

    Attributes:
        label_names: Names of the classes that labels are numbered by; None if unknown.

    Raises:
        ValueError: If there is no such column or several qualify, if the dataset has a transform, or if it names a
            class that is not in `label_names`.
    """

    @functools.cached_property
    def labels(self) -> set[int]:
        """All labels, read without the pictures; `ValueError` if a row has none or an unknown word."""
        if self._label_column is None:
            return set()
        column = self._rows.select_columns([self._label_column]).with_format("arrow")[:].column(0)
        if column.null_count:
            raise ValueError(
                f"{column.null_count} rows have no {self._label_column!r}: filter them out of the dataset"
            )
        return set(map(self._read_label, column.unique().to_pylist()))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._read(self._rows[int(index)], int(index))

    @property
    def fingerprint(self) -> str:
        """The fingerprint that `datasets` gives to the rows, of the columns that are read, and how labels are."""
        return f"{self._rows._fingerprint} {self._read_label.settings}"


class IterableImageDataset(_PictureDataset, IterableDataset[dict[str, Any]]):
    """Images of a stream, with the arguments and items of `ImageDataset`.

    Processes and workers share the shards as `datasets` deals them out; if the number of processes does not divide
    the number of shards, each process reads all rows and decodes its own. Do not split the stream any further.

    The index of a row is its position in the stream. With P processes of W workers each, worker w of process p numbers
    its rows p * W + w, p * W + w + P * W, ... No index occurs twice in a pass, and a row keeps its index in every pass
    over the same order with the same P and W. A picture that an earlier `map` can't read raises in that `map`.
    """

    def __init__(
        self,
        dataset: datasets.IterableDataset,
        transform: Callable[[Image.Image], Tensor],
        *,
        rank: int = 0,
        world_size: int = 1,
        **columns: Any,
    ) -> None:
        from datasets.distributed import split_dataset_by_node

        super().__init__(dataset, transform, **columns)
        self._rows = split_dataset_by_node(self._rows, rank=rank, world_size=world_size)
        self._rank, self._world_size = rank, world_size

    def set_epoch(self, epoch: int) -> None:
        """Sets the epoch, which reorders a shuffled stream."""
        self._rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        num_workers, worker_id = (worker.num_workers, worker.id) if worker else (1, 0)
        first, stride = self._rank * num_workers + worker_id, self._world_size * num_workers
        for position, row in enumerate(self._rows):
            yield self._read(row, first + position * stride)


def validate_images(images: Tensor, *, ndim: int = 4) -> None:
    """Raises a `ValueError` unless images, (B, C, H, W) or with `ndim=3` one (C, H, W), are float in [0, 1]."""
    if not isinstance(images, Tensor):
        raise ValueError(f"images must be a float tensor in [0, 1], got a {type(images).__name__}")
    if images.ndim != ndim:
        expected = "(B, C, H, W)" if ndim == 4 else "(C, H, W)"
        raise ValueError(f"images must have {ndim} dimensions, {expected}, got shape {tuple(images.shape)}")
    low, high = (images.min().item(), images.max().item()) if images.numel() else (0.0, 1.0)
    # Written so that NaN, which compares false to everything, fails too.
    if not images.is_floating_point() or not (low >= 0 and high <= 1):
        raise ValueError(
            f"images must be float in [0, 1], got dtype {images.dtype}, minimum {low:.6g} and maximum {high:.6g}: "
            "divide 8-bit images by 255, undo a normalisation with Normalizer.inverse"
        )


class TensorImageDataset(Dataset[dict[str, Any]]):
    """Checks ready images, `{"images": (3, H, W) float in [0, 1]}`, keeps their "labels", and adds "index".

    A tuple, as torchvision's datasets give, is an image and its label. Other keys are dropped. Only with
    `broken_images` may an item hold a "broken_image" instead of "images".
    """

    def __init__(
        self,
        dataset: Dataset[Mapping[str, Any]],
        *,
        with_labels: bool = True,
        broken_images: bool = False,
        label_names: Sequence[str] | None = None,
    ) -> None:
        self._dataset = dataset
        self._images = {"images", "broken_image"} if broken_images else {"images"}
        # Our datasets name their classes so, torchvision's call them `classes`.
        self.label_names = getattr(dataset, "label_names", getattr(dataset, "classes", None))
        self._read_label = LabelReader(self.label_names, label_names)
        self._kept = self._images | ({"labels"} if with_labels else set())

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]  # torch's Dataset leaves __len__ to its children

    def __getitem__(self, index: int) -> dict[str, Any]:
        item: Any = self._dataset[int(index)]
        if isinstance(item, tuple | list) and len(item) in (1, 2):
            item = dict(zip(("images", "labels"), item, strict=False))
        if not isinstance(item, Mapping) or not self._images & item.keys():
            came = f"keys {list(item)}" if isinstance(item, Mapping) else f"a {type(item).__name__}"
            raise ValueError(
                f"dataset[{index}] must be a dict with 'images', got {came}: give that, or (image, label)"
            )
        if "images" in item:
            validate_images(item["images"], ndim=3)
        kept = {key: item[key] for key in self._kept if key in item}
        if "labels" in kept:
            kept["labels"] = self._read_label(kept["labels"])
        return {**kept, "index": int(index)}


def choose_rows(num_rows: int, num_images: int, *, seed: int) -> list[int]:
    """Returns `num_images` random rows, at most all, in random order: the first few are a random choice too."""
    rows: list[int] = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))[:num_images].tolist()
    return rows


class SegmentationDataset(ImageDataset):
    """Images and masks of a map-style dataset, both squashed to `image_size`, H and W or one side of a square.

    An item is `{"images": (3, H, W) float32 in [0, 1], "labels": (H, W) int64, "index": row}`; `IGNORE_INDEX` marks
    pixels that don't count. A picture that can't be read is a `BrokenImage`, as in `ImageDataset`. A mask has one
    channel of integers. `do_reduce_labels`, as in transformers, turns class 0 into `IGNORE_INDEX` and lowers all
    other classes by one (ADE20K).
    """

    def __init__(
        self,
        dataset: datasets.Dataset,
        *,
        image_size: int | Sequence[int],
        image_column_name: str = "image",
        mask_column_name: str = "mask",
        do_reduce_labels: bool = False,
    ) -> None:
        import datasets

        transform = ImageTransform(image_size=image_size)
        super().__init__(dataset, transform, image_column_name=image_column_name, with_labels=False)
        self._mask_column = find_image_column(dataset, mask_column_name, argument="mask_column_name")
        masks = dataset.with_format(None).select_columns([self._mask_column])
        self._masks = masks.cast_column(self._mask_column, datasets.Image(decode=False))
        height, width = height_and_width(image_size)
        self._size, self._reduce = (width, height), do_reduce_labels

    @property
    def fingerprint(self) -> str:
        return f"{super().fingerprint} {self._masks._fingerprint} {self._reduce}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            mask = open_picture(self._masks[int(index)][self._mask_column])
        except Exception as exc:  # as in _read
            raise ValueError(f"the mask of row {index} can't be read: {type(exc).__name__}: {exc}") from exc
        if len(mask.getbands()) != 1 or mask.mode == "F":
            raise ValueError(f"the mask of row {index} must have one channel of integers, got mode {mask.mode!r}")
        classes = np.array(mask.resize(self._size, Image.Resampling.NEAREST)).astype(np.int64)  # (H, W)
        if self._reduce:
            ignored = (classes == 0) | (classes == IGNORE_INDEX)
            classes = np.where(ignored, IGNORE_INDEX, classes - 1)
        return {**super().__getitem__(index), "labels": torch.from_numpy(classes)}


def collate_images(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stacks items of our datasets into a batch without the broken images.

    Returns `{"images": (B, C, H, W), "index": (B,) int64, "broken_images": tuple of BrokenImage}`, and if the items
    have them "labels", (B,) or (B, H, W) int64, "adversarial_images", (B, C, H, W), and "baseline_cosine", (B,). If no
    image is readable, "images" is (0, 3, 0, 0). `ValueError` if the images have different shapes.
    """
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
        "broken_images": tuple(item["broken_image"] for item in items if "broken_image" in item),
    }
    if all("labels" in item for item in items):
        labels = [torch.as_tensor(item["labels"], dtype=torch.int64) for item in whole]
        batch["labels"] = torch.stack(labels) if labels else torch.empty(0, dtype=torch.int64)
    if whole and all("adversarial_images" in item for item in whole):
        batch["adversarial_images"] = torch.stack([item["adversarial_images"] for item in whole])
        if all("baseline_cosine" in item for item in whole):
            batch["baseline_cosine"] = torch.tensor([item["baseline_cosine"] for item in whole])
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

    `batch_size` counts broken images too. `shuffle` gives a new order in every epoch, which depends on `seed` but not
    on `num_workers`; `ValueError` for a stream.
    """
    if shuffle and isinstance(dataset, IterableDataset):
        raise ValueError("shuffle=True with a stream: shuffle it before, by dataset.shuffle(seed=, buffer_size=)")
    # The loader draws a seed per worker, from a generator of its own: the number of workers must change neither the
    # sampler's order nor other noise.
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
    """Lets a worker survive a scheduler's SIGTERM, so that the current step can be finished and saved.

    The second SIGTERM, from the loader or the ending interpreter, terminates it.
    """
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))
