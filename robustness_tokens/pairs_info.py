"""How adversarial pairs were made: the description that lies beside them, and the budget that 8 bits can hold."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .training_args import ATTACK_ARGUMENTS, RobustnessTokenTrainingArguments


SCHEMA_VERSION = 1
INFO_FILE = "adversarial_pairs.json"
PAIRS_STEP = 0
"""The step that the noise of pairs is drawn for, whichever step of a training reads them: it comes from (seed, step,
index), so an image has one attacked version."""

PAPER_EPS_NORMALIZED = 8 / 255
"""The radius of the published attack, in normalised units; times a channel's standard deviation, in pixels."""

_ROUNDING = 1e-3  # of a 255th: 255 * (4 / 255) need not be 4


@dataclass(frozen=True, kw_only=True)
class PairsInfo:
    """How pairs were made: what `adversarial_pairs.json` holds.

    Attributes:
        schema_version, package_version: Of what wrote it.
        base_model, base_model_revision, base_model_class, base_model_fingerprint: The model that was attacked, as in
            `RobustnessTokenConfig`.
        feature_view, similarity_axis, image_mean, image_std: Of the attacked features, likewise.
        attack: The arguments of the attack, by their names in `RobustnessTokenTrainingArguments`.
        max_pixel_difference: Budget in 8-bit levels, which no pixel of a pair exceeds.
        seed, step: Of the noise, which comes from (seed, step, index).
        batch_size: Images per forward, on which the paper's attack depends.
        mixed_precision: That the attack was computed in: `"no"` where the device has no bfloat16.
        resize: How pictures became images.
        image_size: Height and width in pixels.
        dataset: What is known of the images' origin.
        num_images: That were to be attacked; broken ones have no pair.
        images_per_shard: Per file.
    """

    schema_version: int = SCHEMA_VERSION
    package_version: str
    base_model: str
    base_model_revision: str | None
    base_model_class: str
    base_model_fingerprint: dict[str, str]
    feature_view: str
    similarity_axis: str
    image_mean: list[float]
    image_std: list[float]
    attack: dict[str, Any]
    max_pixel_difference: int
    seed: int
    step: int
    batch_size: int
    mixed_precision: str
    resize: str
    image_size: list[int]
    dataset: dict[str, Any]
    num_images: int
    images_per_shard: int

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PairsInfo:
        """Reads strictly.

        Raises:
            ValueError: If keys are missing or unknown, a value is not what it must be, or the schema is newer.
        """
        version = values.get("schema_version")
        if type(version) is not int or version < 1:
            raise ValueError(f"schema_version must be a whole number of at least 1, got {version!r}")
        if version > SCHEMA_VERSION:
            raise ValueError(
                f"the pairs have schema_version {version}, this package reads up to {SCHEMA_VERSION}: "
                "pip install --upgrade robustness-tokens"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        if set(values) != known:
            raise ValueError(
                f"{INFO_FILE} has missing keys {sorted(known - set(values))} and unknown keys "
                f"{sorted(set(values) - known)}: it is damaged, or was not written by robustness_tokens"
            )
        info = cls(**values)
        sizes = [info.max_pixel_difference, info.num_images, info.images_per_shard, info.batch_size]
        if not isinstance(info.image_size, list) or len(info.image_size) != 2:
            raise ValueError(f"{INFO_FILE}: image_size must be height and width, got {info.image_size!r}")
        if not all(type(size) is int and size >= 1 for size in [*sizes, *info.image_size]):
            raise ValueError(
                f"{INFO_FILE}: max_pixel_difference, num_images, images_per_shard, batch_size and image_size must be "
                f"whole numbers of at least 1, got {[*sizes, *info.image_size]}"
            )
        if not isinstance(info.attack, dict) or set(info.attack) != set(ATTACK_ARGUMENTS):
            raise ValueError(f"{INFO_FILE}: attack must hold {sorted(ATTACK_ARGUMENTS)}, got {info.attack!r}")
        name, *numbers = (info.attack[argument] for argument in ATTACK_ARGUMENTS)
        if type(name) is not str or not all(number is None or type(number) in (int, float) for number in numbers):
            raise ValueError(f"{INFO_FILE}: attack must hold a name and numbers, got {info.attack!r}")
        digests = info.base_model_fingerprint
        if not all(isinstance(value, dict) for value in (digests, info.dataset)) or not all(
            isinstance(digest, str) for digest in digests.values()
        ):
            raise ValueError(f"{INFO_FILE}: base_model_fingerprint, of texts, and dataset must be objects")
        return info

    def to_json(self) -> str:
        """What [`from_dict`] reads, as text."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @property
    def bytes_per_pair(self) -> int:
        """What a pair takes on a disk, but for the frame of the file."""
        return 2 * 3 * math.prod(self.image_size) + 64

    @property
    def num_shards(self) -> int:
        """How many files there are."""
        return math.ceil(self.num_images / self.images_per_shard)

    def shard_name(self, shard: int) -> str:
        """Name of a file of the folder."""
        return f"shard-{shard:05d}-of-{self.num_shards:05d}.arrow"


def paper_attack_eps(image_std: Sequence[float], *, on_grid: bool) -> float:
    """The budget of the paper's attack in pixel units, after its 8-bit step.

    That step rounds towards black, so it adds up to a level. From the grid to the grid only whole levels lead.

    Args:
        image_std: One standard deviation per channel that images are normalised with.
        on_grid: Whether the images are on the 8-bit grid.
    """
    levels = round(255 * PAPER_EPS_NORMALIZED * max(image_std), 6) + 1
    return (math.floor(levels) if on_grid else levels) / 255


def max_pixel_difference(args: RobustnessTokenTrainingArguments, image_std: Sequence[float]) -> int:
    """The budget of an attack in 8-bit levels: of a 4/255 it is 4; of the paper's, on ImageNet's statistics, 2.

    Args:
        args: The attack.
        image_std: One standard deviation per channel, in [0, 1] image units, by which the paper's radius is stretched;
            see [`paper_attack_eps`].

    Raises:
        ValueError: If it is less than one level.
    """
    if args.attack == "paper":
        smallest = 255 * PAPER_EPS_NORMALIZED * min(image_std)
        budget = round(255 * paper_attack_eps(image_std, on_grid=True))  # as images of pairs are
    else:
        assert args.eps is not None, "the arguments set it for pgd"
        smallest = 255 * args.eps
        budget = math.floor(smallest + _ROUNDING)
    if smallest + _ROUNDING < 1:
        raise ValueError(
            f"the attack's eps is {smallest:.3g}/255 in pixels, less than 1/255, and 8 bits, which pairs are stored "
            "in, can't hold it: take a larger eps, or let the training attack"
        )
    return budget
