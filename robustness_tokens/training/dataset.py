"""Prepares the images of a training run and yields its batches, step by step."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..configuration import RobustnessTokenConfig
from ..data import (
    PAIR_TYPES,
    AdversarialPairs,
    BrokenImageLog,
    Images,
    IterableImageDataset,
    PairsInfo,
    build_dataloader,
    check_base,
    load_adversarial_pairs,
    prepare_images,
)
from ..models import (
    ProbeHead,
    RobustnessTokenForImageClassification,
    RobustnessTokenPreTrainedModel,
    label_names,
    model_digest,
)
from ..utils import share_from_main
from .arguments import RobustnessTokenTrainingArguments


# Epochs without a possible step after which the run gives up.
_MAX_EMPTY_EPOCHS = 100

Batch = Mapping[str, Tensor]
Position = tuple[int, int]
"""Position of a run in its data: the epoch, and the number of batches that this process has taken from it."""


def take_pairs(
    dataset: Any, *, args: RobustnessTokenTrainingArguments, config: RobustnessTokenConfig
) -> tuple[Any, RobustnessTokenTrainingArguments]:
    """Loads pairs if `dataset` names them; returns the dataset, and arguments with the attack of the pairs.

    `ValueError` if the pairs were made for another base, or by another attack than `args` state.
    """
    if isinstance(dataset, str | os.PathLike):
        dataset = load_adversarial_pairs(dataset)
    if args.image_column_name is None and set(PAIR_TYPES) <= set(getattr(dataset, "column_names", None) or ()):
        raise ValueError(
            "train_dataset holds adversarial pairs, but not how they were made: give their folder, or their name on "
            "the Hub, instead (or image_column_name='image' to attack these images again)"
        )
    if not isinstance(dataset, AdversarialPairs):
        return dataset, args
    check_base(dataset.info, config)
    args = adopt_pairs_arguments(dataset.info, args)
    return dataset if dataset.info.similarity_axis == config.similarity_axis else dataset.without_baseline(), args


def prepare_train_dataset(
    dataset: Any,
    *,
    args: RobustnessTokenTrainingArguments,
    image_processor: Any,
    recipe: Mapping[str, Any] | None = None,
    argument: str = "dataset",
    label_names: Sequence[str] | None = None,
    num_labels: int | None = None,
    process_index: int = 0,
    num_processes: int = 1,
) -> Images:
    """Prepares images by `args`, with labels if the objective needs them; a stream is shuffled and split.

    `recipe` is that of an adapter whose resizing holds instead. `label_names` and `num_labels` are those of the head,
    see [`classes_of`]; labels must fit them.

    `ValueError`, which names `argument`, if the dataset can't be used or has fewer batches than there are processes.
    """
    if isinstance(dataset, datasets.IterableDataset):
        if args.resume_from_checkpoint is not None:
            raise ValueError("a stream can't be resumed at an exact position: load the dataset without streaming")
        dataset = dataset.shuffle(seed=args.seed, buffer_size=args.shuffle_buffer_size)
    needs_labels = args.objective == "cross_entropy"
    if needs_labels and isinstance(dataset, AdversarialPairs):
        raise ValueError(f'{argument} holds pairs, which have no labels: objective="cross_entropy" needs images')
    images = prepare_images(
        dataset,
        argument=argument,
        task="classification" if needs_labels else "features",
        resize=args.resize if recipe is None else None,
        image_size=args.image_size,
        recipe=recipe,
        image_processor=image_processor,
        image_column_name=args.image_column_name,
        label_column_name=args.label_column_name if needs_labels else None,
        label_names=label_names,
        streams=isinstance(dataset, datasets.IterableDataset),
        rank=process_index,
        world_size=num_processes,
    )
    if images.num_images is None:
        return images
    if needs_labels and "labels" not in (first := images.dataset[0]) and "images" in first:
        raise ValueError(
            f'{argument} has no labels, which objective="cross_entropy" needs: name their column by '
            'label_column_name, or give items with "labels"'
        )
    if num_labels is not None:
        images.check_labels(num_labels)
    if (num_batches := math.ceil(images.num_images / args.per_device_train_batch_size)) < num_processes:
        raise ValueError(
            f"{argument} has {images.num_images} images, which fill {num_batches} of the "
            f"{num_processes} batches of {args.per_device_train_batch_size} that a step of {num_processes} processes "
            "takes: start fewer processes, or set a smaller per_device_train_batch_size"
        )
    return images


def trained_on(model: RobustnessTokenPreTrainedModel, images: Images, accelerator: Accelerator) -> dict[str, str]:
    """Returns what a recipe says of its base and of its images, by digests; nothing of images that have none."""

    def read() -> dict[str, str | None]:
        return {"base_digest": model_digest(model.get_base_model()), "images_digest": images.identity}

    return {name: sha256 for name, sha256 in share_from_main(read, accelerator).items() if sha256 is not None}


def classes_of(
    model: RobustnessTokenPreTrainedModel, head: ProbeHead | None, args: RobustnessTokenTrainingArguments
) -> dict[str, Any]:
    """Returns the names and the number of the classes that labels refer to; nothing if no labels are read."""
    has_classes = isinstance(model if head is None else head, RobustnessTokenForImageClassification | ProbeHead)
    if args.objective != "cross_entropy" or not has_classes:
        return {}  # the training step refuses what has none
    names = label_names(model if head is None else head) if args.label_matching == "name" else None
    base: Any = model.get_base_model()
    return {"label_names": names, "num_labels": base.config.num_labels if head is None else head.num_labels}


def build_train_loader(
    dataset: Dataset[Any], *, args: RobustnessTokenTrainingArguments, accelerator: Accelerator
) -> DataLoader[Any]:
    """Returns the batches of this process, in another order every epoch."""
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
    """Yields endlessly the batches of each optimiser step and the position after them.

    A step has up to `gradient_accumulation_steps` batches, without broken images. An epoch has whole steps only, so
    that accumulated small batches see the images of one large batch; an epoch smaller than a step is one step. All
    processes skip a step for which one of them has no image. `ValueError` if too many images are broken, or all are.
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
        # The order of another epoch may give each process an image.
        if not found and (num_empty_epochs == _MAX_EMPTY_EPOCHS or not _sum(num_readable, accelerator)):
            on_processes = (
                f" on each of {accelerator.num_processes} processes" if accelerator.num_processes > 1 else ""
            )
            raise ValueError(f"train_dataset has no readable image to train on{on_processes}")
        epoch, batches_done = epoch + 1, 0


def _without_empty(batches: list[Batch], accelerator: Accelerator) -> list[Batch]:
    """Returns the batches that hold images; none if a process has none, since the others would wait for it."""
    whole = [batch for batch in batches if len(batch["images"])]
    return whole if _sum(not whole, accelerator) == 0 else []


def _sum(value: float, accelerator: Accelerator) -> float:
    """Sums a value over the processes."""
    total: Tensor = accelerator.reduce(torch.tensor(float(value), device=accelerator.device), reduction="sum")
    return total.item()


def adopt_pairs_arguments(info: PairsInfo, args: RobustnessTokenTrainingArguments) -> RobustnessTokenTrainingArguments:
    """Returns new arguments with the attack and `resize` of the pairs; `ValueError` if `args` state something else."""
    if args.attack_through != "base":
        raise ValueError(
            f"attack_through={args.attack_through!r} does not fit adversarial pairs, made through the base: "
            "leave it out, or train on images, which are attacked in every step"
        )
    if args.eps_warmup_ratio > 0:
        raise ValueError(
            f"eps_warmup_ratio={args.eps_warmup_ratio:g} does not fit adversarial pairs, which have one eps for all "
            "steps: leave it out, or train on images"
        )
    for name, value in args.stated_attack.items():
        if not _agree(value, info.attack[name]):
            raise ValueError(
                f"{name}={value!r}, but the pairs were made with {info.attack[name]!r} (attack {info.attack!r}): "
                "leave it out to train on them as they are, or make other pairs by robtok attack"
            )
    if args.image_column_name is not None:
        raise ValueError(
            f"image_column_name={args.image_column_name!r} has no meaning for adversarial pairs: unset it"
        )
    if args.image_size is not None and [args.image_size] * 2 != info.image_size:
        raise ValueError(f"image_size={args.image_size}, but the pairs have {info.image_size} pixels: leave it out")
    if args.resize == "processor" != info.resize:
        raise ValueError(f"resize={args.resize!r}, but the pairs were made with {info.resize!r}: leave it out")
    # Pairs have their size already, but held-out pictures are resized to the stated one.
    image_size = args.image_size if info.resize == "squash" else None
    adopted: dict[str, Any] = {**info.attack, "resize": info.resize, "image_size": image_size}
    return dataclasses.replace(args, **adopted)


def _agree(stated: Any, stored: Any) -> bool:
    if isinstance(stated, float) and isinstance(stored, int | float):
        return math.isclose(stated, stored, rel_tol=1e-6)
    return bool(stated == stored)
