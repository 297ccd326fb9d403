"""The images of a training run: any dataset made ready, and dealt out step by step, epoch after epoch."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .adversarial_pairs import (
    PAIR_FEATURES,
    PAIRS_SPLIT,
    AdversarialPairs,
    check_base,
    find_pairs,
    load_adversarial_pairs,
    settle_arguments,
)
from .backbones import vision_trunk
from .batches import BrokenImageLog, build_dataloader
from .configuration import RobustnessTokenConfig
from .data import ImageDataset, IterableImageDataset, TensorImageDataset
from .dataset_loading import load_image_dataset
from .features import find_patch_size
from .image_processors import processor_image_size
from .preprocessing import ImageTransform
from .training_args import DataArguments, RobustnessTokenTrainingArguments


# After so many in which no step was possible it never will be.
_MAX_EMPTY_EPOCHS = 100

# datasets itself drops the namespace of a Hub id.
_HUB_FILE = re.compile(r"hf://datasets/(?P<name>[^@]+)@(?P<commit>[0-9a-f]{40})/")


Batch = Mapping[str, Tensor]
Position = tuple[int, int]
"""Where in the data a run is: epoch, and batches of this process that it has taken from that epoch."""


def load_train_dataset(data_args: DataArguments) -> Any:
    """What the command line names: adversarial pairs, where `robtok attack` made it, or else a dataset of images.

    Raises:
        ValueError: If it can't be loaded, or an argument has no meaning for pairs.
    """
    if find_pairs(data_args.dataset) is None:
        return load_image_dataset(
            data_args.dataset, name=data_args.dataset_config, split=data_args.split, streaming=data_args.streaming
        )
    if data_args.streaming or data_args.dataset_config is not None or data_args.split != PAIRS_SPLIT:
        raise ValueError(
            f"dataset {data_args.dataset!r} holds adversarial pairs, which are one split, {PAIRS_SPLIT!r}, read from "
            "the disk as they are needed: leave streaming, dataset_config and split out"
        )
    return load_adversarial_pairs(data_args.dataset)


def take_pairs(
    dataset: Any, *, args: RobustnessTokenTrainingArguments, config: RobustnessTokenConfig
) -> tuple[Any, RobustnessTokenTrainingArguments]:
    """Loads adversarial pairs where they are given, and makes their attack that of the arguments.

    Args:
        dataset: What the user gave the trainer: `AdversarialPairs`, their folder or their name on the Hub; anything
            else comes back as it is.
        args: Of the training.
        config: Of the model.

    Returns:
        The dataset, and the arguments to train with.

    Raises:
        ValueError: If the pairs were made for another base or by another attack than `args` state.
    """
    if isinstance(dataset, str | os.PathLike):
        dataset = load_adversarial_pairs(dataset)
    if args.image_column_name is None and set(PAIR_FEATURES) <= set(getattr(dataset, "column_names", None) or ()):
        raise ValueError(
            "train_dataset holds adversarial pairs, but not how they were made: give their folder, or their name on "
            "the Hub, instead (or image_column_name='image' to attack these images anew)"
        )
    if not isinstance(dataset, AdversarialPairs):
        return dataset, args
    check_base(dataset.info, config)
    settled = settle_arguments(dataset.info, args)
    return dataset if dataset.info.similarity_axis == config.similarity_axis else dataset.without_baseline(), settled


def prepare_train_dataset(
    dataset: Any,
    *,
    args: RobustnessTokenTrainingArguments,
    image_processor: Any,
    process_index: int = 0,
    num_processes: int = 1,
) -> Dataset[Any]:
    """Makes a dataset yield images in [0, 1] with their indices.

    Args:
        dataset: A `datasets` dataset with an image column, map-style or streaming, or a map-style torch dataset of
            `{"images": (3, H, W) float in [0, 1]}`, whose size is taken as it is, or `AdversarialPairs`.
        args: Of the training.
        image_processor: Of the base.
        process_index, num_processes: Which process this is, of how many. A stream deals its own shards out.

    Returns:
        A dataset of `data`.

    Raises:
        ValueError: If the dataset has no image column (the columns are listed) or no images, or fewer batches than
            there are processes, is several splits at once, or can't be trained on as `args` say.
    """
    if isinstance(dataset, datasets.DatasetDict | datasets.IterableDatasetDict):
        raise ValueError(f"train_dataset has the splits {sorted(dataset)}: give one of them, such as dataset['train']")
    streaming = isinstance(dataset, datasets.IterableDataset)
    if streaming and args.resume_from_checkpoint is not None:
        raise ValueError("a streaming dataset can't be resumed at its exact place: train on it without streaming")
    if not streaming and (isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")):
        raise ValueError(
            f"train_dataset is a {type(dataset).__name__}, expected a datasets.Dataset or IterableDataset, or a torch "
            "dataset with __getitem__ and __len__"
        )
    if not streaming and len(dataset) == 0:
        raise ValueError("train_dataset has no rows, expected at least one image")
    if not streaming and (num_batches := math.ceil(len(dataset) / args.per_device_train_batch_size)) < num_processes:
        raise ValueError(
            f"train_dataset has {len(dataset)} images, which are {num_batches} of the "
            f"{num_processes} batches of {args.per_device_train_batch_size} that a step of {num_processes} processes "
            "takes: start fewer processes, or set a smaller per_device_train_batch_size"
        )
    if isinstance(dataset, AdversarialPairs):
        return dataset
    if not streaming and not isinstance(dataset, datasets.Dataset):
        if unused := [name for name in ("image_column_name", "image_size") if getattr(args, name) is not None]:
            raise ValueError(f"{unused} can't be applied to a {type(dataset).__name__}, whose images are ready: unset")
        return TensorImageDataset(dataset, with_labels=False)
    if args.resize == "processor":
        transform = ImageTransform(resize="processor", image_processor=image_processor)
    else:
        transform = ImageTransform(
            resize="squash", image_size=args.image_size or processor_image_size(image_processor)
        )
    if not streaming:
        return ImageDataset(dataset, transform, image_column_name=args.image_column_name, with_labels=False)
    return IterableImageDataset(
        dataset.shuffle(seed=args.seed, buffer_size=args.shuffle_buffer_size),
        transform,
        image_column_name=args.image_column_name,
        with_labels=False,
        rank=process_index,
        world_size=num_processes,
    )


def describe_dataset(dataset: Any) -> dict[str, Any]:
    """What is known of a dataset that was given to [`prepare_train_dataset`], for the recipe; must be JSON."""
    known: dict[str, Any] = {"num_images": len(dataset) if hasattr(dataset, "__len__") else None}
    if isinstance(dataset, AdversarialPairs):
        made = {name: getattr(dataset.info, name) for name in ("seed", "step", "batch_size", "mixed_precision")}
        return {**dataset.info.dataset, **known, "adversarial_pairs": {**made, "digest": dataset.digest()}}
    if isinstance(dataset, datasets.Dataset | datasets.IterableDataset):
        info = dataset.info
        known |= {"name": info.dataset_name or info.builder_name, "config": info.config_name}
        for url in info.download_checksums or ():
            if came_from := _HUB_FILE.match(url):
                known |= {"name": came_from["name"], "revision": came_from["commit"]}
        known["split"] = None if dataset.split is None else str(dataset.split)
    return {key: value for key, value in known.items() if value is not None}


def find_image_shape(dataset: Dataset[Any]) -> tuple[int, int] | None:
    """Height and width in pixels of a prepared dataset's images; None where they follow the pictures' own.

    Ready images are taken to be as large as the first.
    """
    if isinstance(dataset, ImageDataset | IterableImageDataset):
        wide, tall = (dataset.transform(Image.new("RGB", size)) for size in ((400, 300), (300, 400)))
        return (wide.shape[-2], wide.shape[-1]) if wide.shape == tall.shape else None
    first: Tensor = dataset[0]["images"]
    return first.shape[-2], first.shape[-1]


def describe_image_size(image_shape: Sequence[int]) -> int | list[int]:
    """Height and width in pixels as the recipe has them: one number if they are the same."""
    height, width = image_shape
    return height if height == width else [height, width]


def check_patches(base: nn.Module, image_shape: tuple[int, int]) -> None:
    """Refuses images that the base can't cut into patches.

    Args:
        base: Of the model; one that names no patch size is not checked.
        image_shape: Height and width in pixels.

    Raises:
        ValueError: If a side is smaller than a patch, or no multiple of it.
    """
    trunk: Any = vision_trunk(base)
    config = getattr(trunk.config, "vision_config", trunk.config)
    patch_shape = find_patch_size(trunk)
    if patch_shape is None:
        return
    # Some bases leave out a border of the size that they were made for: SigLIP has 384 pixels and patches of 14.
    own_size = getattr(config, "image_size", None)
    if image_shape in (own_size, (own_size, own_size)):
        return
    if any(side < patch or side % patch for side, patch in zip(image_shape, patch_shape, strict=True)):
        raise ValueError(
            f"the images have {image_shape[0]} x {image_shape[1]} pixels, and the patches of {type(base).__name__} "
            f"{patch_shape[0]} x {patch_shape[1]}: set image_size to a multiple of the patch size"
        )


def build_train_loader(
    dataset: Dataset[Any], *, args: RobustnessTokenTrainingArguments, accelerator: Accelerator
) -> DataLoader[Any]:
    """Batches for this process, shuffled anew every epoch."""
    streaming = isinstance(dataset, IterableImageDataset)
    images_per_step = args.per_device_train_batch_size * accelerator.num_processes * args.gradient_accumulation_steps
    loader = build_dataloader(
        dataset,
        batch_size=args.per_device_train_batch_size,
        shuffle=not streaming,
        seed=args.seed,
        num_workers=args.dataloader_num_workers,
        drop_last=not streaming and len(dataset) >= images_per_step,  # type: ignore[arg-type]
    )
    return loader if streaming else accelerator.prepare(loader)


def iterate_steps(
    loader: Any, *, args: RobustnessTokenTrainingArguments, accelerator: Accelerator, start: Position = (0, 0)
) -> Iterator[tuple[list[Batch], Position]]:
    """The batches of each optimiser step, without end.

    An epoch has whole steps only, so that several small batches a step see what one large batch would; one that is
    smaller than a step is a step of its own.

    Args:
        loader: From [`build_train_loader`].
        args: Of the training.
        accelerator: Of the training.
        start: The position to go on from.

    Returns:
        An iterator of up to `gradient_accumulation_steps` batches without broken images, and the position after them.
        A step for which one of the processes has no image is passed over by all of them.

    Raises:
        ValueError: If too many images are broken, or none is readable, or no step was possible in many epochs.
    """
    broken_images = BrokenImageLog(args.max_broken_images)
    epoch, batches_done = start
    num_empty_epochs = 0
    while True:
        (loader if hasattr(loader, "set_epoch") else loader.dataset).set_epoch(epoch)
        found, num_readable = batches_done > 0, 0
        batches: list[Batch] = []
        for batch in accelerator.skip_first_batches(loader, batches_done) if batches_done else loader:
            broken_images.update(batch)
            batches.append(batch)
            num_readable += len(batch["images"])
            batches_done += 1
            if len(batches) == args.gradient_accumulation_steps:
                if whole := _without_empty(batches, accelerator):
                    found = True
                    yield whole, (epoch, batches_done)
                batches = []
        if batches_done == len(batches) and (whole := _without_empty(batches, accelerator)):
            found = True
            yield whole, (epoch, batches_done)
        num_empty_epochs = 0 if found else num_empty_epochs + 1
        # In another order each process may have an image.
        if not found and (num_empty_epochs == _MAX_EMPTY_EPOCHS or not _sum(num_readable, accelerator)):
            on_processes = (
                f" on each of {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
            )
            raise ValueError(f"train_dataset has no readable image to train on{on_processes}")
        epoch, batches_done = epoch + 1, 0


def _without_empty(batches: list[Batch], accelerator: Accelerator) -> list[Batch]:
    """The batches that hold images; none if a process has none, for which the others would wait in vain."""
    whole = [batch for batch in batches if len(batch["images"])]
    return whole if _sum(not whole, accelerator) == 0 else []


def _sum(value: float, accelerator: Accelerator) -> float:
    """Over the processes."""
    total: Tensor = accelerator.reduce(torch.tensor(float(value), device=accelerator.device), reduction="sum")
    return total.item()
