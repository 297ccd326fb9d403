"""Data sets of pictures, from the Hub or a disk, map-style or streaming, to batches of images in [0, 1]."""

import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import datasets
import torch
from datasets.distributed import split_dataset_by_node
from datasets.utils.file_utils import xopen
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, get_worker_info

from .preprocessing import to_rgb


logger = logging.getLogger(__name__)

# A saved folder that is streamed is cut into this many shards, so that processes and workers have some to share.
STREAMED_SHARDS = 64


def load_image_dataset(
    name_or_path: str | os.PathLike[str],
    *,
    name: str | None = None,
    split: str = "train",
    streaming: bool = False,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Loads a data set from the Hub or from a disk; nothing is held in memory.

    Args:
        name_or_path: a Hub id, a folder of images (one sub-folder per class or split) or of parquet files, a parquet
            file, or a folder written by `save_to_disk`. What exists on the disk goes first.
        name: the configuration of a data set that has several.
        split: its name; slices as `"train[:100]"` but for `save_to_disk` folders. What carries no split is "train".
        streaming: read as it goes instead of preparing an Arrow file on the disk first.
        revision: commit, tag or branch of a Hub id.
        token: for private data sets.
        cache_dir: where prepared data sets are kept.

    Returns:
        A map-style data set, memory-mapped, or an iterable one where `streaming`.

    Raises:
        ValueError: nothing readable there, an unknown split (those that exist are listed) or configuration, or an
            argument that a local source has no use for.
    """
    path = Path(name_or_path).expanduser()
    if path.exists() and revision is not None:
        raise ValueError(f"revision={revision!r} with name_or_path={str(path)!r}: what is on the disk has none.")
    is_saved = any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
    if (is_saved or path.is_file()) and name is not None:
        raise ValueError(f"name={name!r} with name_or_path={str(path)!r}: it has no configurations.")
    if is_saved:
        return _load_saved(path, split=split, streaming=streaming)
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"name_or_path={str(path)!r} is a file, expected a .parquet file, a folder or a Hub id.")
    builder, data_files = ("parquet", str(path)) if path.is_file() else (str(path), None)
    options = {"revision": revision, "token": token, "cache_dir": None if cache_dir is None else str(cache_dir)}
    try:
        return datasets.load_dataset(builder, name, data_files=data_files, split=split, streaming=streaming, **options)
    except (ConnectionError, FileNotFoundError, ValueError) as exc:
        place = "on this disk" if path.exists() else "on the Hub, since there is no such file or folder here"
        wanted = f"name_or_path={str(name_or_path)!r}, name={name!r}, split={split!r}"
        raise ValueError(f"{wanted} can't be loaded (looked {place}): {exc}") from exc


def find_image_column(
    dataset: datasets.Dataset | datasets.IterableDataset, image_column_name: str | None = None
) -> str:
    """Finds the column that holds pictures.

    Args:
        dataset: map-style or streaming; where a stream does not know its features, its first row is looked at.
        image_column_name: the column, if it is known; it is checked.

    Returns:
        Its name.

    Raises:
        ValueError: the named column is missing or no `datasets.Image`, or not exactly one column is.
    """
    features = _features(dataset)
    found = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    return _pick(found, features, image_column_name, argument="image_column_name", expected="datasets.Image")


def find_label_column(
    dataset: datasets.Dataset | datasets.IterableDataset, label_column_name: str | None = None
) -> str | None:
    """Finds the column that holds class indices.

    Args:
        dataset: map-style or streaming; where a stream does not know its features, its first row is looked at.
        label_column_name: the column, if it is known; it is checked.

    Returns:
        The name of the `ClassLabel`, or else of the integer column "label" or "labels"; None if there is neither.

    Raises:
        ValueError: the named column is missing or holds no integers, or several columns qualify.
    """
    features = _features(dataset)
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    scalars = {column: feature.dtype for column, feature in features.items() if isinstance(feature, datasets.Value)}
    integers = [column for column, dtype in scalars.items() if "int" in dtype]
    found = classes or [column for column in integers if column in ("label", "labels")]
    if label_column_name is None and not found:
        return None
    candidates = found if label_column_name is None else [*classes, *integers]
    return _pick(candidates, features, label_column_name, argument="label_column_name", expected="class indices")


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
    """Items of any map-style data set that yields dicts with ready images, checked and numbered.

    Args:
        dataset: items {"images": (C, H, W) float in [0, 1], "labels": int, if they have one}; what else they hold is
            left out.
        with_labels: False leaves labels out, and then it does not matter what they are.
    """

    def __init__(self, dataset: Dataset[Mapping[str, Any]], *, with_labels: bool = True) -> None:
        self._dataset = dataset
        self._with_labels = with_labels

    def __len__(self) -> int:
        return len(self._dataset)  # type: ignore[arg-type]  # torch's Dataset leaves __len__ to its children

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = self._dataset[int(index)]
        if not isinstance(item, Mapping) or "images" not in item:
            came = f"keys {list(item)}" if isinstance(item, Mapping) else type(item).__name__
            raise ValueError(f"dataset[{index}] has {came}, expected a dict with 'images'.")
        validate_images(item["images"], ndim=3)
        labels = {"labels": int(item["labels"])} if self._with_labels and "labels" in item else {}
        return {"images": item["images"], "index": int(index), **labels}


def collate_images(items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Stacks items to a batch, without the broken ones.

    Args:
        items: of `ImageDataset`, `IterableImageDataset`, `TensorImageDataset` or `AdversarialPairs`.

    Returns:
        {"images": (B, C, H, W), "index": (B,) int64, "labels": (B,) int64, or (B, H, W) where pixels have them, if the
        items have any, "broken_images": a tuple of `BrokenImage`}; B counts whole images, and if there are none,
        "images" is (0, 3, 0, 0). Adversarial pairs have "adversarial_images" (B, C, H, W) too, and "baseline_cosine"
        (B,) where their items do.

    Raises:
        ValueError: images of different shapes.
    """
    broken = tuple(item["broken_image"] for item in items if "broken_image" in item)
    whole = [item for item in items if "broken_image" not in item]
    shapes = sorted({tuple(item["images"].shape) for item in whole})
    if len(shapes) > 1:
        raise ValueError(
            f"images of one batch have shapes {shapes}, expected one: let the transform crop or squash them, "
            "as ImageTransform(resize='squash') does."
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


def choose_rows(num_rows: int, num_images: int, *, seed: int) -> list[int]:
    """A random choice of rows, in random order, so that the first few are one too: datasets are often sorted by class.

    Args:
        num_rows: Of the dataset.
        num_images: To choose; all rows if there are no more.
        seed: Of the choice.
    """
    rows: list[int] = torch.randperm(num_rows, generator=torch.Generator().manual_seed(seed))[:num_images].tolist()
    return rows


class BrokenImageLog:
    """Counts the broken images of the batches of one process, each row once, up to a limit.

    Args:
        max_broken_images: how many are skipped before it is an error.
    """

    def __init__(self, max_broken_images: int = 10) -> None:
        if max_broken_images < 0:
            raise ValueError(f"max_broken_images={max_broken_images}, expected at least 0.")
        self.max_broken_images = max_broken_images
        self.broken_images: dict[int, BrokenImage] = {}

    def update(self, batch: Mapping[str, Any]) -> None:
        """Warns of a batch's broken images and counts them.

        Args:
            batch: of `collate_images`.

        Raises:
            ValueError: more than `max_broken_images` so far.
        """
        for image in batch["broken_images"]:
            if image.index not in self.broken_images:
                self.broken_images[image.index] = image
                logger.warning("Skipped a broken image, %s", image)
        if len(self.broken_images) > self.max_broken_images:
            listed = "\n".join(f"  {image}" for image in self.broken_images.values())
            raise ValueError(
                f"{len(self.broken_images)} broken images, more than max_broken_images={self.max_broken_images}. "
                f"Mend or remove these rows, or raise max_broken_images:\n{listed}"
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
    """Makes a data loader whose batches are those of `collate_images`.

    Args:
        dataset: one of this module's.
        batch_size: images per batch, broken ones included.
        shuffle: a new order every epoch; streams are shuffled beforehand, by `dataset.shuffle(seed, buffer_size)`.
        seed: of the order.
        num_workers: processes that read and decode; 0 does it in this one.
        drop_last: leave out a last batch that is not full.

    Raises:
        ValueError: `shuffle` with a stream.
    """
    if shuffle and isinstance(dataset, IterableDataset):
        raise ValueError("shuffle=True with a stream: shuffle it before, by dataset.shuffle(seed=, buffer_size=).")
    # Two generators: the loader draws its workers' seeds from its own, and how many depends on num_workers, which from
    # a shared one would change the order, and from torch's default one the noise of whatever else draws from it.
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
    """A scheduler sends SIGTERM to workers too, and a loader without one can't finish the step that is to be saved.

    The second ends it: that of the loader, or of the interpreter at its end.
    """
    signal.signal(signal.SIGTERM, lambda signum, frame: signal.signal(signal.SIGTERM, signal.SIG_DFL))


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
    ) -> "_RowReader":
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
        # Decoded by `datasets`, one broken file would end the run.
        return narrowed.cast_column(self.image_column, datasets.Image(decode=False))

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
        with xopen(stored["path"], "rb") as file:
            content = file.read()
    with Image.open(BytesIO(content)) as image:
        image.load()
        return to_rgb(image)


def _load_saved(path: Path, *, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    loaded = datasets.load_from_disk(str(path))
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
    if split not in splits:
        raise ValueError(f"split={split!r} is not in {str(path)!r}, which holds {', '.join(map(repr, splits))}.")
    dataset = splits[split]
    return dataset.to_iterable_dataset(min(len(dataset), STREAMED_SHARDS)) if streaming else dataset


def _features(dataset: datasets.Dataset | datasets.IterableDataset) -> Mapping[str, Any]:
    if dataset.features is not None:
        return dataset.features
    row = next(iter(dataset), None)
    if row is None:
        raise ValueError("dataset is empty, expected at least one row.")
    kinds = {Image.Image: datasets.Image(), int: datasets.Value("int64")}
    return {
        column: next((feature for kind, feature in kinds.items() if isinstance(value, kind)), type(value))
        for column, value in row.items()
    }


def _pick(
    candidates: Sequence[str], features: Mapping[str, Any], named: str | None, *, argument: str, expected: str
) -> str:
    if named in candidates or (named is None and len(candidates) == 1):
        return named or candidates[0]
    columns = ", ".join(f"{column!r} ({_type_name(feature)})" for column, feature in features.items())
    if named is not None:
        problem = f"{argument}={named!r} is " + ("no column" if named not in features else f"no column of {expected}")
    elif candidates:
        problem = (
            f"dataset has several columns of {expected} ({', '.join(map(repr, candidates))}): choose by {argument}"
        )
    else:
        problem = f"dataset has no column of {expected}: cast the one that holds it by dataset.cast_column(...)"
    raise ValueError(f"{problem}; its columns are {columns}.")


def _type_name(feature: Any) -> str:
    if isinstance(feature, type):
        return feature.__name__
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
