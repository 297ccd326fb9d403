"""Training of probes: linear heads on frozen features, with or without tokens.

Shapes: B images, H and W pixels, F features that a head reads, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar

import datasets
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import BatchSampler, Dataset, RandomSampler
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..data import BrokenImageLog, Normalizer, build_dataloader, prepare_images, validate_images
from ..models import (
    ProbeHead,
    RobustnessTokenPreTrainedModel,
    base_fingerprint,
    base_of,
    find_injector,
    resize_logits,
    tokens_in,
)
from .images import check_labels


HeadT = TypeVar("HeadT", bound=ProbeHead)
Batch = tuple[Tensor, Tensor]
"""A head's input, (B, F) or (B, F, h, w), and the labels, (B,) or (B, H, W)."""


def train_probe(
    model: PreTrainedModel,
    dataset: Any,
    *,
    head_class: type[HeadT],
    num_labels: int,
    with_tokens: bool = False,
    normalizer: Normalizer | None = None,
    image_size: int | None = None,
    image_column_name: str | None = None,
    label_column_name: str | None = None,
    mask_column_name: str | None = None,
    num_epochs: int = 10,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    num_workers: int = 0,
    max_cache_bytes: int = 2 << 30,
    disable_tqdm: bool = False,
) -> HeadT:
    """Trains a linear head on frozen features, by AdamW with a cosine schedule on the cross-entropy.

    Features are computed once and kept in memory where they and their labels take at most `max_cache_bytes` (twice
    that while they are concatenated); otherwise they are computed again in every epoch, in the same order.

    Args:
        model: A `RobustnessTokenModel`, a model that `inject_tokens` was called on, or a base; it is not changed.
        dataset: A map-style `datasets` dataset: pictures with class labels, or for segmentation the columns "image"
            and "mask". Or any torch dataset of
            {"images": (3, H, W) float in [0, 1], "index": int, "labels": class, or (H, W) classes of the pixels}; a
            stream must be shuffled already.
        head_class: `ClassificationHead` or `SegmentationHead`.
        num_labels: C; labels go from 0 to C - 1, and 255 marks a pixel that doesn't count.
        with_tokens: Train on features with the tokens in place; by default without.
        normalizer: [0, 1] images -> pixel values; required unless `model` is a `RobustnessTokenModel`.
        image_size: Side in pixels that pictures are squashed to; by default they are resized as the tokens' recipe
            says, or to what the image processor makes.
        image_column_name, label_column_name, mask_column_name: Columns of pictures, class labels and masks; by default
            found by their types, and "image" and "mask".
        num_epochs, batch_size, learning_rate, weight_decay: Settings of the head's training.
        seed: Seed of the head's first weights and of the order of the images.
        num_workers: Processes that read and decode pictures.
        max_cache_bytes: 0 never keeps features.
        disable_tqdm: No progress bars.

    Returns:
        The head, on the model's device, frozen and in eval mode.

    Raises:
        ValueError: If the dataset, its labels or an argument is not as described.
        FloatingPointError: If the training diverges.
    """
    base = base_of(model)
    injector = find_injector(base) if with_tokens else None
    if with_tokens and injector is None:
        raise ValueError(f"with_tokens=True, but {type(base).__name__} has no robustness tokens: inject_tokens first")
    for name, value in (("num_epochs", num_epochs), ("batch_size", batch_size), ("learning_rate", learning_rate)):
        if not value > 0:
            raise ValueError(f"{name} must be above 0, got {value}")
    if not isinstance(dataset, Dataset | datasets.Dataset):
        raise ValueError(
            f"dataset must be a datasets.Dataset (one split) or a torch dataset, got a {type(dataset).__name__}"
        )
    images = prepare_images(
        dataset,
        task=head_class.task,
        image_size=image_size,
        recipe=getattr(getattr(model, "config", None), "training", None),
        image_processor=getattr(model, "image_processor", None),
        image_column_name=image_column_name,
        label_column_name=label_column_name,
        mask_column_name=mask_column_name,
        streams=True,
        broken_images=True,
    )
    images.check_labels(num_labels)
    normalizer = (normalizer or _normalizer_of(model)).to(base.device)

    def read(*, shuffle: bool) -> Iterator[Iterator[Batch]]:
        """Yields passes over the dataset."""
        loader = build_dataloader(
            images.dataset, batch_size=batch_size, shuffle=shuffle, seed=seed, num_workers=num_workers
        )
        broken_images = BrokenImageLog()
        while True:
            yield (
                (head_class.extract(base, normalizer(images.to(base.device))), labels)
                for images, labels in _labelled(loader, broken_images, head_class, num_labels)
            )

    with torch.no_grad(), tokens_in(base, None if injector is None else injector.state):
        first = next(next(read(shuffle=False)), None)
        if first is None:
            raise ValueError("dataset has no images, expected at least one")
        cached = _cache(next(read(shuffle=False)), images.num_images, max_cache_bytes, disable_tqdm)
        is_stream = images.num_images is None
        epochs = read(shuffle=not is_stream) if cached is None else _shuffled(*cached, batch_size, seed)
        names = getattr(images.dataset, "label_names", None)
        names = names if names is not None and len(names) == num_labels else None
        head = _build_head(head_class, base, first[0].shape[1], num_labels, with_tokens, seed, names)
        optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate, weight_decay=weight_decay)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=num_epochs)
        head.train()
        for _ in tqdm(range(num_epochs), desc=f"Training the {head.task} head", disable=disable_tqdm):
            for features, labels in next(epochs):
                _step(head, optimizer, features.to(base.device), labels.to(base.device))
            scheduler.step()
    return head.eval().requires_grad_(False)


def _step(head: ProbeHead, optimizer: torch.optim.Optimizer, features: Tensor, labels: Tensor) -> None:
    with torch.enable_grad():
        logits = resize_logits(head(features), labels.shape[1:])
        total = F.cross_entropy(logits, labels, ignore_index=head.ignore_index, reduction="sum")
        # The mean would be NaN where a batch has no labelled pixel.
        loss = total / (labels != head.ignore_index).sum().clamp(min=1)
        optimizer.zero_grad()
        loss.backward()
    if not loss.isfinite():
        raise FloatingPointError(
            f"the loss of the head is {loss.item()}: lower learning_rate={optimizer.defaults['lr']}"
        )
    optimizer.step()


def _build_head(
    head_class: type[HeadT],
    base: PreTrainedModel,
    in_features: int,
    num_labels: int,
    with_tokens: bool,
    seed: int,
    names: list[str] | None,
) -> HeadT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        fingerprint = base_fingerprint(base)
        head = head_class(
            in_features,
            num_labels,
            base_model_fingerprint=fingerprint,
            trained_with_tokens=with_tokens,
            label_names=names,
        )
    return head.to(base.device)


def _labelled(
    loader: Any, broken_images: BrokenImageLog, head_class: type[ProbeHead], num_labels: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields images (B, 3, H, W) and labels (B,) or (B, H, W), checked, of the batches that have readable images."""
    for batch in loader:
        broken_images.update(batch)
        images = batch["images"]
        if len(images) == 0:
            continue
        validate_images(images)
        if "labels" not in batch:
            raise ValueError(f"dataset has no labels for {head_class.task}: its items need 'labels'")
        labels = batch["labels"]
        check_labels(labels, images, head_class.task)
        counted = labels[labels != head_class.ignore_index]
        if counted.numel() and not (counted.min() >= 0 and counted.max() < num_labels):
            raise ValueError(
                f"labels go from {counted.min()} to {counted.max()}, expected 0 to {num_labels - 1}: num_labels is "
                f"{num_labels}, and {head_class.ignore_index} marks what doesn't count"
            )
        yield images, labels


def _cache(batches: Iterator[Batch], num_images: int | None, max_bytes: int, disable_tqdm: bool) -> Batch | None:
    """Returns all features and labels on the CPU; `None` as soon as more than `max_bytes` are to be expected."""
    features: list[Tensor] = []
    labels: list[Tensor] = []
    used = seen = 0
    with tqdm(total=num_images, desc="Computing features", unit="image", disable=disable_tqdm) as progress_bar:
        for batch_features, batch_labels in batches:
            used += batch_features.nbytes + batch_labels.nbytes
            seen += len(batch_labels)
            if used * max(1.0, (num_images or 0) / seen) > max_bytes:
                return None
            features.append(batch_features.cpu())
            labels.append(batch_labels)
            progress_bar.update(len(batch_labels))
    return torch.cat(features), torch.cat(labels)


def _shuffled(features: Tensor, labels: Tensor, batch_size: int, seed: int) -> Iterator[Iterator[Batch]]:
    """Yields passes over the cached features in the order that `build_dataloader` would give."""
    order = RandomSampler(range(len(labels)), generator=torch.Generator().manual_seed(seed))
    while True:
        yield ((features[rows], labels[rows]) for rows in BatchSampler(order, batch_size, drop_last=False))


def _normalizer_of(model: PreTrainedModel) -> Normalizer:
    if not isinstance(model, RobustnessTokenPreTrainedModel):
        raise ValueError(f"normalizer is needed: {type(model).__name__} doesn't say how its images are normalised")
    config: Any = model.config
    return Normalizer(config.image_mean, config.image_std)
