"""Measures the tokens on held-out images during a training run.

Shapes: B images of a batch, N sequence, D width.
"""

from __future__ import annotations

import os
from typing import Any

import datasets
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset, Subset

from ..data import BrokenImageLog, Images, build_dataloader
from ..models import ProbeHead, RobustnessTokenPreTrainedModel
from .arguments import RobustnessTokenTrainingArguments
from .dataset import classes_of, prepare_train_dataset, take_pairs
from .losses import METRICS, robustness_loss
from .step import TrainingStep


# The same throughout the run, so that the noise depends on (seed, example) alone.
_NOISE_STEP = 0


def prepare_eval_dataset(
    dataset: Any,
    *,
    args: RobustnessTokenTrainingArguments,
    model: RobustnessTokenPreTrainedModel,
    head: ProbeHead | None,
    train_image_shape: tuple[int, int] | None,
) -> Images:
    """Prepares held-out images as [`prepare_train_dataset`] does.

    `ValueError` for a stream, for pairs of another attack, and for images whose size differs from `train_image_shape`.
    """
    if isinstance(dataset, str | os.PathLike):
        raise ValueError(
            f"eval_dataset is a {type(dataset).__name__}, expected a dataset of images, which are attacked as in "
            "training: load it with load_image_dataset"
        )
    dataset, adopted = take_pairs(dataset, args=args, config=model.config)
    if adopted.recipe() != args.recipe():
        raise ValueError("eval_dataset holds pairs of another attack than the training's: give images, or other pairs")
    if isinstance(dataset, datasets.IterableDataset):
        raise ValueError(
            "eval_dataset is a stream, expected a dataset with a length, which processes can share: give "
            "datasets.Dataset.from_list(list(stream.take(256)))"
        )
    try:
        images = prepare_train_dataset(
            dataset, args=args, image_processor=model.image_processor, **classes_of(model, head, args)
        )
    except ValueError as exc:
        raise ValueError(f"eval_dataset can't be used: {exc}") from exc
    if None not in (images.shape, train_image_shape) and images.shape != train_image_shape:
        raise ValueError(
            f"eval_dataset has images of {images.shape} pixels, those to train on have {train_image_shape}: set "
            "image_size if they are resized, or give ready images of that size"
        )
    return images


def measure_held_out(
    training_step: TrainingStep, dataset: Dataset[Any], *, accelerator: Accelerator
) -> dict[str, float]:
    """Returns the losses on held-out images, attacked as in training; the same on every process.

    Means over the images: `eval_loss`, `eval_invariance_cosine`, `eval_adversarial_cosine`, `eval_baseline_cosine`
    (attacked, without tokens); and `eval_num_images`. Each image is measured once. Its noise depends on `args.seed`
    and its index alone, so `"pgd"` gives the same numbers for any number of processes, up to rounding; the bounds of
    `"paper"` depend on the batch. `ValueError` if too many images are broken, or all.
    """
    args = training_step.args
    size = len(dataset)  # type: ignore[arg-type]  # torch's Dataset leaves __len__ to its subclasses
    own = Subset(dataset, range(accelerator.process_index, size, accelerator.num_processes))
    loader = build_dataloader(
        own, batch_size=args.per_device_eval_batch_size, shuffle=False, num_workers=args.dataloader_num_workers
    )
    broken_images = BrokenImageLog(args.max_broken_images)
    totals, num_images = torch.zeros(len(METRICS), dtype=torch.float64), 0
    with training_step.computing_faster():
        for batch in loader:
            broken_images.update(batch)
            if count := len(batch["images"]):
                totals += _measure_batch(training_step, batch, device=accelerator.device).cpu().double() * count
                num_images += count
    sums = torch.tensor([*totals.tolist(), num_images], device=accelerator.device)
    *sums_of_metrics, total = accelerator.reduce(sums, reduction="sum").tolist()
    if total == 0:
        raise ValueError("eval_dataset has no readable image")
    metrics = {f"eval_{name}": value / total for name, value in zip(METRICS, sums_of_metrics, strict=True)}
    return {**metrics, "eval_num_images": int(total)}


@torch.no_grad()
def _measure_batch(training_step: TrainingStep, batch: dict[str, Any], *, device: torch.device) -> Tensor:
    args = training_step.args
    pixel_values = training_step.normalizer(batch["images"].to(device))
    target = training_step.base_outputs(pixel_values)
    labels = training_step.labels_of(batch, target)
    rows, baseline = [], torch.full((), torch.nan, device=device)
    for through_tokens in args.attack_routes:
        attacked = training_step.attacked(
            batch, target, labels=labels, step=_NOISE_STEP, through_tokens=through_tokens
        )
        losses = robustness_loss(
            training_step.outputs,
            pixel_values,
            attacked,
            target,
            invariance_weight=args.invariance_weight,
            adversarial_weight=args.adversarial_weight,
            **training_step.objective_options(pixel_values, labels),
        )
        rows.append(torch.stack([losses.loss, losses.invariance, losses.adversarial]))
        if not through_tokens:
            baseline = training_step.cosine(training_step.base_outputs(attacked), target)
    return torch.cat([torch.stack(rows).mean(dim=0), baseline[None]])  # (4,)
