"""Loads datasets of pictures from the Hub or a disk, and finds their columns of pictures and labels."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..utils import local_path, read_json


if TYPE_CHECKING:
    import datasets  # imported where it is used: that takes a second


# Shards of a streamed `save_to_disk` folder, for processes and workers to share.
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
    """Loads a dataset of pictures from the Hub or a disk; no picture is held in memory.

    Args:
        name_or_path: Hub id, folder of pictures (one sub-folder per class or split) or of parquet files, parquet file,
            or folder written by `save_to_disk`. An existing path wins over a Hub id.
        name: Configuration of a dataset that has several.
        split: Name of the split, or a slice such as `"train[:100]"` (not for `save_to_disk` folders). Data without a
            split counts as "train".
        streaming: Read rows as they are needed, instead of preparing an Arrow file on the disk first.
        revision: Commit, tag or branch on the Hub.
        token: Access token for private datasets.
        cache_dir: Folder for downloaded and prepared datasets.

    Returns:
        A map-style dataset, memory-mapped; with `streaming`, an iterable one.

    Raises:
        ValueError: If nothing readable is there, if the split (the error lists those that exist) or the configuration
            is unknown, or if an argument has no meaning for data on the disk.
    """
    path = Path(local_path(name_or_path))
    is_saved = any((path / file).is_file() for file in ("state.json", "dataset_dict.json"))
    unused = {"revision": revision} if path.exists() else {}
    unused |= {"name": name} if is_saved or path.is_file() else {}
    for argument, value in unused.items():
        if value is not None:
            raise ValueError(f"{argument}={value!r} has no meaning for {str(path)!r} on this disk: leave it out")
    if is_saved:
        return _load_saved(path, split=split, streaming=streaming)
    if path.is_file() and path.suffix != ".parquet":
        raise ValueError(f"name_or_path must be a .parquet file, a folder or a Hub id, got the file {str(path)!r}")
    import datasets

    data_files: Any = str(path) if path.is_file() else None
    if path.is_dir():
        data_files = _picture_files(path)
    builder = "parquet" if path.is_file() else str(path)
    options = {"revision": revision, "token": token, "cache_dir": None if cache_dir is None else str(cache_dir)}
    try:
        return datasets.load_dataset(builder, name, data_files=data_files, split=split, streaming=streaming, **options)
    except Exception as exc:  # datasets and its readers raise nearly anything on damaged or unknown files
        place = "on this disk" if path.exists() else "on the Hub, since there is no such file or folder here"
        wanted = f"name_or_path={str(name_or_path)!r}, name={name!r}, split={split!r}"
        reasons = dict.fromkeys(f"{one}" or type(one).__name__ for one in (exc, exc.__cause__) if one is not None)
        raise ValueError(f"{wanted} can't be loaded (looked {place}): {': '.join(reasons)}") from exc


def _picture_files(root: Path) -> dict[str, list[str]] | None:
    """Returns patterns of the files of each split of a folder of pictures; `None` for other folders.

    Left alone, datasets takes a class such as train_station for a split and drops the other classes. Here, the folders
    of the first level that has several are splits if all of them are named as splits.
    """
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    card = root / "README.md"
    if card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace"):
        return None  # it says itself which splits there are
    holding = []  # folders with pictures
    for place, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith((".", "__"))]  # as datasets does
        kinds = {os.path.splitext(file)[1].lower() for file in files if not file.startswith("metadata.")}
        if kinds & {".parquet", ".arrow", ".tar", ".zip"}:
            return None
        if not kinds.isdisjoint(ImageFolder.EXTENSIONS):
            holding.append(Path(place).relative_to(root).parts)
    depth, names = 0, {parts[:1] for parts in holding}
    while len(names) == 1 and len(above := next(iter(names))) > depth and _split_of(above[-1]) is None:
        depth += 1
        names = {parts[: depth + 1] for parts in holding}
    splits = {name: _split_of(name[-1]) if len(name) > depth else None for name in names}
    if None in splits.values():
        return {"train": ["**"]}
    if not splits or any(root.glob("metadata.*")):
        return None
    patterns: dict[str, list[str]] = {}
    for name, split in sorted(splits.items(), key=lambda pair: pair[1] != "train"):
        patterns.setdefault(str(split), []).append("/".join(map(glob.escape, name)) + "/**")
    return patterns


def _split_of(name: str) -> str | None:
    """Returns the split that a folder named so holds, such as "test" for testing, test_images or test2017."""
    from datasets.data_files import SPLIT_KEYWORDS

    word = re.sub(r"[-_. ]*(\d+|images?|imgs?|set|split|data)$", "", name.lower())
    return next((str(split) for split, words in SPLIT_KEYWORDS.items() if word in words), None)


def find_image_column(
    dataset: datasets.Dataset | datasets.IterableDataset,
    image_column_name: str | None = None,
    *,
    argument: str = "image_column_name",
) -> str:
    """Returns the named or the only column of pictures; `ValueError` if it is missing or there are several.

    A column of bytes, the content of image files, counts only if it is named.
    """
    types = _column_types(dataset)
    kinds = ("Image",) if image_column_name is None else ("Image", "binary", "large_binary")
    found = [column for column, name in types.items() if name in kinds]
    return _pick(found, types, image_column_name, argument=argument, expected="datasets.Image")


def find_label_column(
    dataset: datasets.Dataset | datasets.IterableDataset, label_column_name: str | None = None
) -> str | None:
    """Returns the named column, else the `ClassLabel` column, else "label", "labels" or "cls", else `None`.

    `ValueError` if several columns qualify, or the named one holds neither integers nor words.
    """
    types = _column_types(dataset)
    classes = [column for column, name in types.items() if name == "ClassLabel"]
    others = [column for column, name in types.items() if re.fullmatch(r"u?int\d+|(large_)?string", name)]
    found = classes or [column for column in others if column in ("label", "labels", "cls")]  # cls: webdataset
    if label_column_name is None and not found:
        return None
    candidates = found if label_column_name is None else classes + others
    return _pick(candidates, types, label_column_name, argument="label_column_name", expected="class labels")


def check_saved(folder: Path) -> None:
    """Refuses a `save_to_disk` folder whose files name data outside of it, which `datasets` would read."""
    for file in (folder / "dataset_dict.json", *folder.glob("state.json"), *folder.glob("*/state.json")):
        content = read_json(file) if file.is_file() else {}
        entries = content.get("splits", content.get("_data_files", []))
        for entry in entries if isinstance(entries, list) else [entries]:
            name = entry.get("filename") if isinstance(entry, dict) else entry
            if not isinstance(name, str) or name in ("", "..") or name != Path(name).name:
                raise ValueError(f"{file} names {name!r:.200}, expected files of its own folder: make the data again")


def _load_saved(path: Path, *, split: str, streaming: bool) -> datasets.Dataset | datasets.IterableDataset:
    import datasets

    try:
        check_saved(path)
        loaded = datasets.load_from_disk(str(path))
    except Exception as exc:  # as above
        raise ValueError(f"{str(path)!r} can't be loaded, so it is damaged: {exc}") from exc
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {str(loaded.split or "train"): loaded}
    if split not in splits:
        raise ValueError(
            f"split={split!r} is not in {str(path)!r}, which holds {', '.join(map(repr, splits))}: choose one of these"
        )
    dataset = splits[split]
    return dataset.to_iterable_dataset(min(len(dataset), STREAMED_SHARDS)) if streaming else dataset


def _column_types(dataset: datasets.Dataset | datasets.IterableDataset) -> dict[str, str]:
    """Returns the columns' types by name, from the features or else from a stream's first row."""
    if dataset.features is not None:
        return {column: _type_of(feature) for column, feature in dataset.features.items()}
    if (row := next(iter(dataset), None)) is None:
        raise ValueError("dataset has no rows, expected at least one")
    known = ((Image.Image, "Image"), (int, "int64"), (str, "string"), (bytes, "binary"))
    return {
        column: next((name for kind, name in known if isinstance(value, kind)), _type_of(value))
        for column, value in row.items()
    }


def _type_of(feature: Any) -> str:
    """Names a column's type; a struct with the content of a file, as parquet files hold pictures, is an image."""
    if isinstance(feature, Mapping) and "bytes" in feature and feature.keys() <= {"bytes", "path"}:
        return "Image"
    name = type(feature).__name__
    return str(feature.dtype) if name == "Value" else name


def _pick(found: Sequence[str], types: Mapping[str, str], named: str | None, *, argument: str, expected: str) -> str:
    if named is not None and named in found:
        return named
    if named is None and len(found) == 1:
        return found[0]
    if named is not None:
        problem = f"{argument} must name one of the dataset's columns of {expected}, got {named!r}"
    elif found:
        problem = f"dataset has several columns of {expected}, {list(found)}: choose by {argument}"
    else:
        problem = f"dataset has no column of {expected}: name the one that holds it by {argument}"
    raise ValueError(f"{problem}; its columns are {', '.join(f'{name!r} ({kind})' for name, kind in types.items())}")
