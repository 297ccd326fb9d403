"""The images of a training run: any dataset made ready, and dealt out step by step, epoch after epoch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import datasets
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from .data import BrokenImageLog, ImageDataset, IterableImageDataset, TensorImageDataset, build_dataloader
from .preprocessing import ImageTransform, processor_image_size
from .training_args import RobustnessTokenTrainingArguments


Batch = Mapping[str, Tensor]
Position = tuple[int, int]
"""Where in the data a run is: epoch, and batches of this process that it has taken from that epoch."""


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
            `{"images": (3, H, W) float in [0, 1]}`, whose size is taken as it is.
        args: Of the training.
        image_processor: Of the base.
        process_index, num_processes: A stream deals its own shards out.

    Returns:
        A dataset of `data`.

    Raises:
        ValueError: If the dataset has no image column (the columns are listed) or no images, is several splits at
            once, or can't be trained on as `args` say.
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
    if not streaming and not isinstance(dataset, datasets.Dataset):
        if unused := [name for name in ("image_column_name", "image_size") if getattr(args, name) is not None]:
            raise ValueError(f"{unused} can't be applied to a {type(dataset).__name__}, whose images are ready: unset")
        return TensorImageDataset(dataset)
    if args.resize == "processor":
        transform = ImageTransform(resize="processor", image_processor=image_processor)
    else:
        transform = ImageTransform(
            resize="squash", image_size=args.image_size or processor_image_size(image_processor)
        )
    if not streaming:
        return ImageDataset(dataset, transform, image_column_name=args.image_column_name)
    return IterableImageDataset(
        dataset,
        transform,
        image_column_name=args.image_column_name,
        rank=process_index,
        world_size=num_processes,
    )


def build_train_loader(
    dataset: Dataset[Any], *, args: RobustnessTokenTrainingArguments, accelerator: Accelerator
) -> DataLoader[Any]:
    """Batches for this process, shuffled anew every epoch; a stream keeps its order."""
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

    Raises:
        ValueError: If too many images are broken, or there are none.
    """
    broken_images = BrokenImageLog(args.max_broken_images)
    epoch, batches_done = start
    while True:
        (loader if hasattr(loader, "set_epoch") else loader.dataset).set_epoch(epoch)
        found = batches_done > 0
        batches: list[Batch] = []
        for batch in accelerator.skip_first_batches(loader, batches_done) if batches_done else loader:
            broken_images.update(batch)
            batches.append(batch)
            batches_done += 1
            if len(batches) == args.gradient_accumulation_steps:
                if whole := _without_empty(batches, accelerator):
                    found = True
                    yield whole, (epoch, batches_done)
                batches = []
        if batches_done == len(batches) and (whole := _without_empty(batches, accelerator)):
            found = True
            yield whole, (epoch, batches_done)
        if not found:
            raise ValueError("train_dataset has no readable image to train on")
        epoch, batches_done = epoch + 1, 0


def _without_empty(batches: list[Batch], accelerator: Accelerator) -> list[Batch]:
    whole = [batch for batch in batches if len(batch["images"])]
    if batches and not whole and accelerator.num_processes > 1:
        # One process would skip a step that the others wait in.
        raise ValueError(
            f"all images of a step on process {accelerator.process_index} are broken: remove them from the dataset, "
            "or make per_device_train_batch_size larger"
        )
    return whole
