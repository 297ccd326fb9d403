"""Attacks a dataset once for many trainings, in shards that are each complete or absent, so that it can resume."""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch.utils.data import Subset
from tqdm.auto import tqdm

from ..attacks import PAPER_EPS_NORMALIZED, cosine_similarity, paper_attack_eps
from ..data import (
    ATTACK_ARGUMENTS,
    INFO_FILE,
    PAIR_TYPES,
    PAIRS_STEP,
    AdversarialPairs,
    BrokenImageLog,
    Images,
    Normalizer,
    PairsInfo,
    build_dataloader,
    choose_rows,
    find_pairs,
    finish_folder,
    load_adversarial_pairs,
    missing_shards,
    round_to_budget,
    to_images,
    to_pixels,
    write_shard,
)
from ..models import MixedPrecision, RobustnessTokenPreTrainedModel, check_patches, model_digest, runs_in_half
from ..utils import LEFTOVERS, PROCESS_GROUP, __version__, check_int, in_use, read_json, share_from_main, write_text
from .arguments import RobustnessTokenTrainingArguments
from .dataset import prepare_train_dataset
from .step import TrainingStep, head_settings


_ROUNDING = 1e-3  # in 8-bit levels: 255 * (4 / 255) need not be 4


@dataclass(kw_only=True)
class PairsArguments:
    """Arguments of `robtok attack` beside those of `robtok train`; `ValueError` if a value is out of range."""

    num_images: int | None = field(
        default=None, metadata={"help": "Number of images to attack, chosen at random by the seed; by default all."}
    )
    images_per_shard: int = field(
        default=500, metadata={"help": "Images per file; a resumed run keeps complete files."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Upload the pairs to this dataset, user/name; by default nowhere."}
    )
    base_model_id: str | None = field(
        default=None,
        metadata={"help": "Hub id of the base to publish if base_model is a local folder; by default base_model."},
    )
    public: bool = field(default=False, metadata={"help": "Let everyone see the pairs on the Hub."})

    def __post_init__(self) -> None:
        for name in ("num_images", "images_per_shard"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)


def make_adversarial_pairs(
    model: RobustnessTokenPreTrainedModel,
    args: RobustnessTokenTrainingArguments,
    dataset: Any,
    *,
    num_images: int | None = None,
    images_per_shard: int = 500,
) -> AdversarialPairs:
    """Attacks the base on a dataset's images and writes the pairs to `args.output_dir`.

    An image is rounded to 8 bits before it is attacked; the attacked image is rounded to 8 bits, projected into the
    budget again, and measured. The noise depends on `(args.seed, 0, row of the dataset)`: all steps of a training read
    the pairs that its first step would make. A second run with the same arguments makes the missing
    shards. Under `accelerate launch` the processes share the shards.

    Args:
        model: Gives the base to attack. Its tokens take no part, so the pairs reveal nothing about them.
        args: The attack, the images and the folder, as for a training.
        dataset: A `datasets` dataset with an image column, or a torch dataset of ready images; no stream.
        num_images: Number of images to attack, chosen at random by `args.seed` and in random order, so that a dataset
            sorted by class gives images of every class. All, in their order, if None.
        images_per_shard: Images per file.

    Returns:
        The pairs, as [`load_adversarial_pairs`] reads them; broken images are left out.

    Raises:
        ValueError: If the attack can't be stored as pairs, the folder holds other pairs or files, or the disk has no
            room for all pairs.
        FloatingPointError: If the base's features are not finite.
    """
    PairsArguments(num_images=num_images, images_per_shard=images_per_shard)
    if args.attack_through != "base":
        raise ValueError(
            f"attack_through={args.attack_through!r}, expected 'base', since pairs serve any tokens: set it to 'base'"
        )
    if args.objective == "cross_entropy" or args.eps_warmup_ratio > 0:
        raise ValueError(
            f"objective={args.objective!r} and eps_warmup_ratio={args.eps_warmup_ratio:g}: pairs have no labels and "
            "one eps for all steps, so choose another objective, and leave eps_warmup_ratio out"
        )
    accelerator = Accelerator(kwargs_handlers=[PROCESS_GROUP])
    images = prepare_train_dataset(dataset, args=args, image_processor=model.image_processor)
    if images.num_images is None or isinstance(dataset, AdversarialPairs):
        raise ValueError(
            f"dataset is a {type(dataset).__name__}, expected a map-style dataset of images that are not attacked "
            "yet: load it without streaming, or only a slice of it, such as split='train[:10000]'"
        )
    in_half = runs_in_half(args.mixed_precision, device=accelerator.device)
    rows: Sequence[int] = range(images.num_images)
    if num_images is not None and num_images < len(rows):
        rows = choose_rows(len(rows), num_images, seed=args.seed)
    precision: MixedPrecision = "bf16" if in_half else "no"
    info = share_from_main(lambda: _describe(model, args, images, len(rows), images_per_shard, precision), accelerator)
    folder = Path(args.output_dir)

    with ExitStack() as held:
        share_from_main(lambda: held.enter_context(in_use(folder)), accelerator)

        def start() -> list[int]:
            _start(folder, info, args)
            missing = missing_shards(folder, info)
            _check_room(folder, info, len(missing), announce=not args.disable_tqdm)
            return missing

        missing = share_from_main(start, accelerator)
        model.to(accelerator.device)
        normalizer = Normalizer(info.image_mean, info.image_std).to(accelerator.device)
        training_step = TrainingStep(model, args, normalizer)
        broken_images = BrokenImageLog(args.max_broken_images)
        for shard in tqdm(
            missing[accelerator.process_index :: accelerator.num_processes],
            desc="Attacking, shards",
            disable=args.disable_tqdm or not accelerator.is_local_main_process,
        ):
            batches = build_dataloader(
                Subset(images.dataset, _rows_of(shard, rows, info)),
                batch_size=info.batch_size,
                shuffle=False,
                num_workers=args.dataloader_num_workers,
            )
            pairs = (_attack_batch(training_step, batch, info, broken_images) for batch in batches)
            with training_step.computing_faster():
                write_shard(folder / info.shard_name(shard), pairs)
        accelerator.wait_for_everyone()
        share_from_main(lambda: finish_folder(folder, info), accelerator)
    return load_adversarial_pairs(folder)


def _describe(
    model: RobustnessTokenPreTrainedModel,
    args: RobustnessTokenTrainingArguments,
    images: Images,
    num_images: int,
    images_per_shard: int,
    precision: MixedPrecision,
) -> PairsInfo:
    config, recipe = model.config, args.recipe()
    if config.image_mean is None or config.image_std is None:
        raise ValueError("the model's config has no image_mean and image_std: give them to from_base")
    if images.shape is None:
        raise ValueError(
            f"resize={args.resize!r} leaves each image its own size, but pairs share one: set resize='squash'"
        )
    check_patches(model.get_base_model(), images.shape)
    info = PairsInfo(
        package_version=__version__,
        base_model=config.base_model_name_or_path,
        base_model_revision=config.base_model_revision,
        base_model_class=config.base_model_class,
        base_model_fingerprint=dict(config.base_model_fingerprint or {}),
        base_digest=model_digest(model.get_base_model()),
        feature_view=config.feature_view,
        similarity_axis=config.similarity_axis,
        image_mean=list(config.image_mean),
        image_std=list(config.image_std),
        attack={name: recipe[name] for name in ATTACK_ARGUMENTS},
        head=head_settings(args, model.get_base_model(), None).get("head"),
        max_pixel_difference=max_pixel_difference(args, config.image_std),
        seed=args.seed,
        step=PAIRS_STEP,
        batch_size=args.per_device_train_batch_size,
        mixed_precision=precision,
        resize=args.resize,
        image_size=list(images.shape),
        dataset=images.description,
        images_digest=images.identity,
        num_images=num_images,
        images_per_shard=images_per_shard,
    )
    info.check_shards()
    return info


def _rows_of(shard: int, rows: Sequence[int], info: PairsInfo) -> Sequence[int]:
    return rows[shard * info.images_per_shard : (shard + 1) * info.images_per_shard]


def _start(folder: Path, info: PairsInfo, args: RobustnessTokenTrainingArguments) -> None:
    """Keeps the folder's pairs if they were made by the same `info`; otherwise empties it, if `args` allow it."""
    folder.mkdir(parents=True, exist_ok=True)
    own = {
        *(file for pattern in ("shard-*.arrow", ".shard-*.part", LEFTOVERS) for file in folder.glob(pattern)),
        *(folder / "state.json", folder / "dataset_info.json"),
    }
    if (path := find_pairs(folder)) is None:
        found = set(folder.iterdir())
        if found - own:
            raise ValueError(f"output_dir {str(folder)!r} holds files other than adversarial pairs: choose another")
        if found and not args.overwrite_output_dir:  # left by a replacement that was interrupted
            raise ValueError(
                f"output_dir {str(folder)!r} holds files of adversarial pairs, but no {INFO_FILE} that says how they "
                "were made: set overwrite_output_dir=True to replace them, or choose another"
            )
    else:
        stored = PairsInfo.from_dict(read_json(path))
        if args.ignore_images_mismatch:
            stored = dataclasses.replace(stored, images_digest=info.images_digest)
        differing = _differences(dataclasses.asdict(stored), dataclasses.asdict(info))
        if info.images_digest is None and len(missing_shards(folder, info)) < info.num_shards:
            differing.append("the dataset gives other images at each reading")
        if not differing:
            return
        if not args.overwrite_output_dir:
            raise ValueError(
                f"output_dir {str(folder)!r} holds pairs that were made differently ({'; '.join(differing)}): choose "
                "another, or set overwrite_output_dir=True (or, if only the place of the images differs, "
                "ignore_images_mismatch=True)"
            )
        path.unlink()  # first, so that an interruption leaves no description of a half-deleted set
    for file in own:
        file.unlink(missing_ok=True)
    write_text(folder / INFO_FILE, info.to_json())


def _differences(stored: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    # The pairs depend neither on where the base lies nor on the version that wrote them.
    ignored = {"package_version", "base_model", "base_model_revision"}
    return [
        f"{name}: {stored[name]!r} -> {found[name]!r}"
        for name in found
        if found[name] != stored[name] and name not in ignored
    ]


def _check_room(folder: Path, info: PairsInfo, num_missing: int, *, announce: bool) -> None:
    num_images = min(num_missing * info.images_per_shard, info.num_images)
    needed, free = num_images * info.bytes_per_pair, shutil.disk_usage(folder).free
    if announce:
        print(
            f"{info.num_images:,} images of {info.image_size[0]} x {info.image_size[1]} pixels take "
            f"{info.num_images * info.bytes_per_pair:,} bytes in {info.num_shards:,} shards; {num_missing:,} shards "
            f"({needed:,} bytes) are to be made, {free:,} bytes are free"
        )
    if needed > free:
        raise ValueError(
            f"output_dir {str(folder)!r} has {free:,} bytes free, the pairs need {needed:,}: choose another disk, or "
            "fewer images by num_images"
        )


def _attack_batch(
    training_step: TrainingStep, batch: Mapping[str, Any], info: PairsInfo, broken_images: BrokenImageLog
) -> dict[str, list[Any]]:
    """Attacks a batch; returns the columns of its pairs."""
    broken_images.update(batch)
    if not len(batch["images"]):
        return {column: [] for column in PAIR_TYPES}
    normalizer = training_step.normalizer
    device = normalizer.image_mean.device
    clean = to_pixels(batch["images"])  # (B, H, W, 3)
    images = to_images(clean).to(device)
    target = training_step.base_outputs(normalizer(images))
    attacked = training_step.attack(images, target, step=info.step, index=batch["index"], through_tokens=False)
    if not attacked.isfinite().all():
        raise FloatingPointError(
            f"the base's features of the images {batch['index'].tolist()} are not finite: try mixed_precision='no'"
        )
    adversarial = round_to_budget(normalizer.inverse(attacked), clean, info.max_pixel_difference)
    baseline = training_step.base_outputs(normalizer(to_images(adversarial).to(device)))
    cosine = cosine_similarity(baseline, target, similarity_axis=training_step.model.config.similarity_axis)  # (B,)
    return {
        "index": batch["index"].tolist(),
        "image": [pixels.tobytes() for pixels in clean],
        "adversarial_image": [pixels.tobytes() for pixels in adversarial],
        "baseline_cosine": cosine.tolist(),
    }


def max_pixel_difference(args: RobustnessTokenTrainingArguments, image_std: Sequence[float]) -> int:
    """Returns the budget of an attack in 8-bit levels: 4 for an eps of 4/255, 2 for the paper's with ImageNet's std.

    `image_std`, per channel and in [0, 1] image units, scales the paper's radius; `ValueError` for less than 1.
    """
    if args.attack == "paper":
        smallest = 255 * PAPER_EPS_NORMALIZED * min(image_std)
        budget = round(255 * paper_attack_eps(image_std, on_grid=True))  # the images of pairs are on the 8-bit grid
    else:
        assert args.eps is not None, "the arguments set it for pgd"
        smallest = 255 * args.eps
        budget = math.floor(smallest + _ROUNDING)
    if smallest + _ROUNDING < 1:
        raise ValueError(
            f"the attack's eps is {smallest:.3g}/255 in pixels, less than 1/255, which the 8 bits of stored pairs "
            "can't hold: take a larger eps, or train on images, which are attacked in every step"
        )
    return budget
