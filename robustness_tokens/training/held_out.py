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

from ..data import BrokenImageLog, Normalizer, build_dataloader
from ..models import RobustnessTokenPreTrainedModel
from .arguments import RobustnessTokenTrainingArguments
from .dataset import prepare_train_dataset, take_pairs
from .losses import robustness_loss
from .run_folder import EVAL_LOG_COLUMNS
from .step import agreement_of, attacked_pixel_values, base_features, compute_features, faster_base, mean_cosine


_METRICS = EVAL_LOG_COLUMNS[1:-1]

# The same at every step of the run, so that the noise depends on (seed, example) alone.
_NOISE_STEP = 0


def prepare_eval_dataset(
    dataset: Any,
    *,
    args: RobustnessTokenTrainingArguments,
    model: RobustnessTokenPreTrainedModel,
    train_image_shape: tuple[int, int] | None,
) -> Dataset[Any]:
    """Prepares held-out images as [`prepare_train_dataset`] does.

    `ValueError` for a stream, for pairs of another attack, and for images whose size differs from `train_image_shape`.
    """
    if isinstance(dataset, str | os.PathLike):
        raise ValueError(
            f"eval_dataset is a {type(dataset).__name__}, expected a dataset of images, which are attacked as those "
            "of the training: load them by load_image_dataset"
        )
    dataset, adopted = take_pairs(dataset, args=args, config=model.config)
    if adopted.recipe() != args.recipe():
        raise ValueError("eval_dataset holds pairs of another attack than the training's: give images, or other pairs")
    if isinstance(dataset, datasets.IterableDataset):
        raise ValueError(
            "eval_dataset is a stream, expected a fixed set that every process can take its share of: give "
            "datasets.Dataset.from_list(list(stream.take(256)))"
        )
    try:
        images = prepare_train_dataset(dataset, args=args, image_processor=model.image_processor)
    except ValueError as exc:
        raise ValueError(f"eval_dataset can't be used: {exc}") from exc
    if None not in (images.shape, train_image_shape) and images.shape != train_image_shape:
        raise ValueError(
            f"eval_dataset has images of {images.shape} pixels, those to train on have {train_image_shape}: set "
            "image_size where they are resized, or give ready images of that size"
        )
    return images.dataset


def measure_held_out(
    model: RobustnessTokenPreTrainedModel,
    dataset: Dataset[Any],
    *,
    args: RobustnessTokenTrainingArguments,
    accelerator: Accelerator,
    normalizer: Normalizer,
) -> dict[str, float]:
    """Returns the losses of the training, under its attack, on held-out images: the same on every process.

    Means over the images: `eval_loss`, `eval_invariance_cosine`, `eval_adversarial_cosine`, `eval_baseline_cosine`
    (attacked, without tokens); and `eval_num_images`. Each image is measured once. Its noise depends on `args.seed`
    and its index alone, so `"pgd"` gives the same numbers for any number of processes, up to rounding; the bounds of
    `"paper"` depend on the batch. `ValueError` if too many images are broken, or all.
    """
    size = len(dataset)  # type: ignore[arg-type]  # torch's Dataset leaves __len__ to its children
    own = Subset(dataset, range(accelerator.process_index, size, accelerator.num_processes))
    loader = build_dataloader(
        own, batch_size=args.per_device_eval_batch_size, shuffle=False, num_workers=args.dataloader_num_workers
    )
    broken_images = BrokenImageLog(args.max_broken_images)
    totals, num_images = torch.zeros(len(_METRICS), dtype=torch.float64), 0
    with faster_base(model, args, accelerator.device):
        for batch in loader:
            broken_images.update(batch)
            if count := len(batch["images"]):
                means = _measure_batch(model, batch, args=args, accelerator=accelerator, normalizer=normalizer)
                totals += means.cpu().double() * count
                num_images += count
    sums = torch.tensor([*totals.tolist(), num_images], device=accelerator.device)
    *sums_of_metrics, total = accelerator.reduce(sums, reduction="sum").tolist()
    if total == 0:
        raise ValueError("eval_dataset has no readable image")
    metrics = {name: value / total for name, value in zip(_METRICS, sums_of_metrics, strict=True)}
    return {**metrics, "eval_num_images": int(total)}


@torch.no_grad()
def _measure_batch(
    model: RobustnessTokenPreTrainedModel,
    batch: dict[str, Any],
    *,
    args: RobustnessTokenTrainingArguments,
    accelerator: Accelerator,
    normalizer: Normalizer,
) -> Tensor:
    precision = args.mixed_precision
    pixel_values = normalizer(batch["images"].to(accelerator.device))
    target = base_features(model, pixel_values, mixed_precision=precision)
    rows = []
    for through_tokens in args.attack_routes:
        attacked = attacked_pixel_values(
            model, batch, target, args=args, normalizer=normalizer, step=_NOISE_STEP, through_tokens=through_tokens
        )
        losses = robustness_loss(
            lambda x: compute_features(model, x, mixed_precision=precision),
            pixel_values,
            attacked,
            target,
            invariance_weight=args.invariance_weight,
            adversarial_weight=args.adversarial_weight,
            **agreement_of(model, args, pixel_values),
        )
        baseline = mean_cosine(model, base_features(model, attacked, mixed_precision=precision), target)
        rows.append(torch.stack([losses.loss, losses.invariance, losses.adversarial, baseline]))
    return torch.stack(rows).mean(dim=0)  # (4,)
