"""Data sets by name, from the Hub or a disk, map-style or streaming; and which of their columns hold what."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image


if TYPE_CHECKING:
    import datasets


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
    import datasets

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
    import datasets

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
    import datasets

    features = _features(dataset)
    classes = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    scalars = {column: feature.dtype for column, feature in features.items() if isinstance(feature, datasets.Value)}
    integers = [column for column, dtype in scalars.items() if "int" in dtype]
    found = classes or [column for column in integers if column in ("label", "labels")]
    if label_column_name is None and not found:
        return None
    candidates = found if label_column_name is None else [*classes, *integers]
    return _pick(candidates, features, label_column_name, argument="label_column_name", expected="class indices")


def _load_saved(path: Path, *, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    import datasets

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
    import datasets

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
    import datasets

    if isinstance(feature, type):
        return feature.__name__
    return feature.dtype if isinstance(feature, datasets.Value) else type(feature).__name__
