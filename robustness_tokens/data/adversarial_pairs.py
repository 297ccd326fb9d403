"""Adversarial pairs: a dataset of images and their attacked versions, made once for many trainings.

In training, the paper's attack sees only the base, so a pair depends on image, base, attack and seed, but not on the
tokens. A folder of pairs is a dataset that `datasets.load_from_disk` reads, with
`adversarial_pairs.json` beside it, which describes how they were made; on the Hub the images are PNG.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError, HFValidationError, RepositoryNotFoundError
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..configuration import RobustnessTokenConfig, check_same_base
from ..utils import (
    MAX_NAME,
    check_fingerprint,
    check_keys,
    check_number,
    check_pattern,
    check_text,
    check_type,
    flush_to_disk,
    local_path,
    naming,
    read_json,
    write_text,
)
from .loading import check_saved


if TYPE_CHECKING:
    import datasets  # imported where it is used: that takes a second


SCHEMA_VERSION = 3
_ADDED = {"base_digest", "images_digest"}  # keys that older versions don't have
_LARGEST_SIDE = 1 << 14
_MOST_SHARDS = 99_999  # five digits in a name
INFO_FILE = "adversarial_pairs.json"
PAIRS_STEP = 0
"""Step in the seed of the pairs' noise, (seed, step, index); they serve every training step."""

PAIRS_SPLIT = "train"

PAIR_TYPES = {
    "index": "int64",  # the image's row in the dataset that was attacked
    "image": "binary",  # (H, W, 3) uint8, raw: read in a tenth of the time that a PNG takes
    "adversarial_image": "binary",
    "baseline_cosine": "float32",  # between the base's features of the two
}

IMAGE_COLUMNS = ("image", "adversarial_image")

ATTACK_ARGUMENTS = ("attack", "eps", "step_size", "num_attack_steps", "objective")


def _upgrade(values: Any) -> Any:
    """Returns the content of schema 1 as schema 2; `ValueError` if its attack exists no more."""
    attack = values.get("attack") if isinstance(values, dict) and values.get("schema_version") == 1 else None
    if not isinstance(attack, dict) or "head_distance_weight" not in attack:
        return values
    if attack["head_distance_weight"] != 0:
        raise ValueError(
            f"{INFO_FILE}: these pairs were made by an older package with head_distance_weight="
            f"{attack['head_distance_weight']!r:.50}, which objective='head_distance' replaces: make them again"
        )
    attack = {
        **{name: value for name, value in attack.items() if name != "head_distance_weight"},
        "objective": "cosine",
    }
    return {**values, "attack": attack, "head": None, "schema_version": 2}


@dataclass(frozen=True, kw_only=True)
class PairsInfo:
    """The content of `adversarial_pairs.json`; base, features and statistics as in `RobustnessTokenConfig`."""

    schema_version: int = SCHEMA_VERSION
    package_version: str
    base_model: str
    base_model_revision: str | None
    base_model_class: str
    base_model_fingerprint: dict[str, str]
    base_digest: str | None = None  # sha256 of all of the base; None in pairs of schema 1 or 2
    feature_view: str
    similarity_axis: str
    image_mean: list[float]
    image_std: list[float]
    attack: dict[str, Any]  # arguments by their names in RobustnessTokenTrainingArguments
    head: str | None  # digest of the head whose predictions were attacked; None for an attack on features
    max_pixel_difference: int  # budget in 8-bit levels, which no pixel of a pair exceeds
    seed: int
    step: int  # the noise comes from (seed, step, index)
    batch_size: int  # images per forward, on which the paper's attack depends
    mixed_precision: str  # of the attack; "no" if the device has no bfloat16
    resize: str  # as in ImageTransform
    image_size: list[int]  # height and width in pixels
    dataset: dict[str, Any]  # origin of the images
    images_digest: str | None = None  # sha256 of all images; None if unknown
    num_images: int  # images to attack; broken ones have no pair
    images_per_shard: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PairsInfo:
        """Reads strictly: `ValueError` for missing or unknown keys, a wrong value or a newer schema."""
        values = _upgrade(values)
        names = {field.name for field in dataclasses.fields(cls)}
        check_keys(INFO_FILE, values, names - _ADDED, optional=_ADDED, schema=SCHEMA_VERSION)
        for name, kind in get_type_hints(cls).items():
            if name in values:
                check_type(f"{INFO_FILE}: {name}", values[name], kind, lowest=0 if name in ("seed", "step") else 1)
        info = cls(**{**values, "schema_version": SCHEMA_VERSION})
        if len(info.image_size) != 2 or max(info.image_size) > _LARGEST_SIDE:
            raise ValueError(
                f"{INFO_FILE}: image_size must be height and width of at most {_LARGEST_SIDE:,}, got "
                f"{info.image_size!r:.200}"
            )
        info.check_shards()
        check_keys(f"{INFO_FILE}: attack", info.attack, set(ATTACK_ARGUMENTS))
        for name, value in info.attack.items():
            if name in ("attack", "objective"):
                check_text(f"{INFO_FILE}: attack.{name}", value, MAX_NAME)
            elif value is not None:
                check_number(f"{INFO_FILE}: attack.{name}", value)
        check_fingerprint(f"{INFO_FILE}: base_model_fingerprint", info.base_model_fingerprint)
        for name in ("head", *_ADDED):
            if (sha256 := getattr(info, name)) is not None:
                check_pattern(f"{INFO_FILE}: {name}", sha256, r"[0-9a-f]{64}", "a sha256 or null")
        return info

    def check_shards(self) -> None:
        """Refuses more shards than their names can number."""
        if self.num_shards > _MOST_SHARDS:
            raise ValueError(
                f"num_images={self.num_images:,} in shards of images_per_shard={self.images_per_shard:,} are "
                f"{self.num_shards:,} files, expected at most {_MOST_SHARDS:,}: raise images_per_shard"
            )

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def bytes_per_pair(self) -> int:
        """Bytes of a pair on the disk, without its share of the file's header."""
        return 2 * 3 * math.prod(self.image_size) + 64

    @property
    def num_shards(self) -> int:
        return math.ceil(self.num_images / self.images_per_shard)

    def shard_name(self, shard: int) -> str:
        return f"shard-{shard:05d}-of-{self.num_shards:05d}.arrow"


class AdversarialPairs(Dataset[dict[str, Any]]):
    """Pairs, read one at a time; none is held in memory.

    An item is `{"images", "adversarial_images": (3, H, W) float32 in [0, 1] on the 8-bit grid, "baseline_cosine":
    float, "index": row of the image in the attacked dataset}`. An item raises `ValueError` if its images are damaged
    or differ by more than the attack's budget.

    Args:
        dataset: Rows with the columns of `PAIR_TYPES`, images raw or PNG.
        info: How the pairs were made.
        with_baseline: False drops "baseline_cosine".

    Attributes:
        stored: The rows as they are stored.

    Raises:
        ValueError: If the columns differ.
    """

    def __init__(self, dataset: datasets.Dataset, info: PairsInfo, *, with_baseline: bool = True) -> None:
        import datasets

        if set(dataset.column_names) != set(PAIR_TYPES):
            raise ValueError(f"dataset must have the columns {sorted(PAIR_TYPES)}, got {dataset.column_names}")
        self.info, self._with_baseline = info, with_baseline
        self._is_raw = dataset.features["image"] == datasets.Value(PAIR_TYPES["image"])
        for column in () if self._is_raw else IMAGE_COLUMNS:
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.stored = dataset.with_format(None)

    def __len__(self) -> int:
        return len(self.stored)

    def __getitem__(self, row: int) -> dict[str, Any]:
        stored = self.stored[int(row)]
        clean, adversarial = (self._pixels(row, stored[column]) for column in IMAGE_COLUMNS)
        difference = int(np.abs(clean.astype(np.int16) - adversarial).max())
        if difference > self.info.max_pixel_difference:
            raise ValueError(
                f"pair {row} differs by {difference}/255, more than the {self.info.max_pixel_difference}/255 of its "
                "attack, so the dataset is damaged: make the pairs again"
            )
        item = {"images": to_images(clean), "adversarial_images": to_images(adversarial)}
        baseline = {"baseline_cosine": float(stored["baseline_cosine"])} if self._with_baseline else {}
        return {**item, **baseline, "index": int(stored["index"])}

    def select(self, rows: Sequence[int]) -> AdversarialPairs:
        return AdversarialPairs(self.stored.select(rows), self.info, with_baseline=self._with_baseline)

    def without_baseline(self) -> AdversarialPairs:
        """Returns the pairs without their baseline cosine, for training along the other similarity axis."""
        return AdversarialPairs(self.stored, self.info, with_baseline=False)

    def digest(self) -> str:
        """Returns 64 hexadecimal digits that identify the pairs, the same here and on the Hub.

        They cover the pixels of the first and the last pair, and the index and baseline cosine of every pair; the
        cosine depends on all pixels of both images and is quick to read.
        """
        content = hashlib.sha256()
        columns = self.stored.select_columns(["index", "baseline_cosine"]).with_format("numpy")[:]
        for name, dtype in (("index", "<i8"), ("baseline_cosine", "<f4")):
            content.update(np.asarray(columns[name], dtype=dtype).tobytes())
        for row in range(len(self))[:: max(1, len(self) - 1)]:
            stored = self.stored[row]
            for column in IMAGE_COLUMNS:
                content.update(self._pixels(row, stored[column]).tobytes())
        return content.hexdigest()

    def _pixels(self, row: int, stored: Any) -> NDArray[np.uint8]:
        height, width = self.info.image_size
        if self._is_raw:
            if len(stored) == height * width * 3:
                return np.frombuffer(stored, dtype=np.uint8).reshape(height, width, 3)
            found = f"{len(stored)} bytes"
        else:
            with Image.open(BytesIO(stored["bytes"]), formats=["png"]) as picture:
                if picture.size == (width, height) and picture.mode == "RGB":
                    return np.asarray(picture)
                found = f"{picture.mode} of size {picture.size}"
        raise ValueError(
            f"an image of pair {row} must be RGB of {width} x {height} pixels, got {found}: make the pairs again"
        )


def to_images(pixels: NDArray[np.uint8]) -> Tensor:
    """Turns pixels, (..., H, W, 3) uint8, into images, (..., 3, H, W) float32 in [0, 1]."""
    return torch.from_numpy(pixels.copy()).movedim(-1, -3).contiguous().float() / 255


def to_pixels(images: Tensor) -> NDArray[np.uint8]:
    """Rounds images, (B, 3, H, W) float in [0, 1], to pixels, (B, H, W, 3) uint8."""
    return (images * 255).round().to(torch.uint8).movedim(1, -1).contiguous().cpu().numpy()


def round_to_budget(adversarial: Tensor, clean: NDArray[np.uint8], levels: int) -> NDArray[np.uint8]:
    """Rounds adversarial images to pixels, (B, H, W, 3) uint8, within `levels` of the clean ones.

    Rounding may push a pixel over the budget, so the projection comes after it. `adversarial` is (B, 3, H, W) float,
    in [0, 1] up to rounding errors; `clean` is (B, H, W, 3) uint8.
    """
    rounded = to_pixels(adversarial.clamp(0, 1)).astype(np.int16)
    projected = np.clip(rounded, clean.astype(np.int16) - levels, clean.astype(np.int16) + levels)
    return projected.astype(np.uint8)  # between a clean and a rounded pixel, so from 0 to 255


def find_pairs(name_or_path: str | os.PathLike[str], **hub_kwargs: Any) -> Path | None:
    """Returns the `adversarial_pairs.json` of a folder or a Hub dataset; `None` if it holds no pairs."""
    folder = Path(local_path(name_or_path))
    if folder.exists():
        path = folder / INFO_FILE
        return path if path.is_file() else None
    try:
        return Path(hf_hub_download(os.fspath(name_or_path), INFO_FILE, repo_type="dataset", **hub_kwargs))
    except (EntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None


def load_adversarial_pairs(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
) -> AdversarialPairs:
    """Loads the pairs that `robtok attack` made, memory-mapped.

    Args:
        name_or_path: Folder of pairs, or id of a Hub dataset of pairs.
        revision: Commit, tag or branch on the Hub.
        token: Access token for private datasets.
        cache_dir: Folder for downloads.

    Raises:
        ValueError: If there are no pairs, some are missing, or their description is damaged.
    """
    import datasets

    options: dict[str, Any] = {"token": token, "cache_dir": cache_dir}
    path = find_pairs(name_or_path, revision=revision, **options)
    if path is None:
        raise ValueError(f"{os.fspath(name_or_path)!r} holds no adversarial pairs: it has no {INFO_FILE}")
    info = PairsInfo.from_dict(read_json(path))
    if path.parent == Path(local_path(name_or_path)):
        missing = missing_shards(path.parent, info)
        if missing or not (path.parent / "state.json").is_file():
            raise ValueError(
                f"{path.parent} holds {info.num_shards - len(missing)} of {info.num_shards} shards: run the attack "
                "again with the same arguments to make the others"
            )
        check_saved(path.parent)
        dataset = datasets.load_from_disk(str(path.parent))
    else:
        # The images are read from the same commit as the description.
        name, commit = os.fspath(name_or_path), path.parent.name
        dataset = datasets.load_dataset(name, split=PAIRS_SPLIT, revision=commit, **options)
    return AdversarialPairs(dataset, info)


def pair_features() -> datasets.Features:
    """Returns the columns of stored pairs."""
    import datasets

    return datasets.Features({name: datasets.Value(kind) for name, kind in PAIR_TYPES.items()})


def missing_shards(folder: Path, info: PairsInfo) -> list[int]:
    """Returns the numbers of the shards that a folder of pairs lacks."""
    return [shard for shard in range(info.num_shards) if not (folder / info.shard_name(shard)).is_file()]


def write_shard(path: Path, batches: Iterable[Mapping[str, list[Any]]]) -> None:
    """Writes a shard under another name and renames it when it is whole and on the disk."""
    from datasets.arrow_writer import ArrowWriter

    partial = path.with_name(f".{path.name}.part")
    with naming(path), ArrowWriter(path=str(partial), features=pair_features()) as writer:
        for batch in batches:
            writer.write_batch(dict(batch))
        writer.finalize()
    flush_to_disk(partial)
    partial.replace(path)


def finish_folder(folder: Path, info: PairsInfo) -> None:
    """Writes the two files that make the shards a dataset for `datasets.load_from_disk`."""
    import datasets
    from datasets.fingerprint import Hasher

    description = f"Adversarial pairs, see {INFO_FILE}"
    datasets.DatasetInfo(description=description, features=pair_features()).write_to_directory(str(folder))
    state = {
        "_data_files": [{"filename": info.shard_name(shard)} for shard in range(info.num_shards)],
        "_fingerprint": Hasher.hash(info.to_json()),
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": PAIRS_SPLIT,
    }
    write_text(folder / "state.json", json.dumps(state, indent=2))


def check_base(info: PairsInfo, config: RobustnessTokenConfig) -> None:
    """Refuses pairs of another base or of other features; the error names the difference."""
    check_same_base(
        config.base_model_fingerprint or {},
        info.base_model_fingerprint,
        found_name=f"{config.base_model_class} {config.base_model_name_or_path!r}",
        expected_name=f"{info.base_model_class} {info.base_model!r}",
        made="the pairs were made for",
        fix="make pairs for it by robtok attack",
    )
    names = ["feature_view", "image_mean", "image_std"]
    if info.attack["attack"] != "paper":  # the paper's attack always uses dim 1
        names.append("similarity_axis")
    for name in names:
        stored, value = getattr(info, name), getattr(config, name)
        if stored != (list(value) if isinstance(value, tuple) else value):
            raise ValueError(
                f"the pairs were made with {name}={stored!r}, the model has {value!r}: give from_base the same, or "
                "make pairs for it by robtok attack"
            )
