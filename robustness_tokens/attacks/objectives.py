"""Objectives that an attack maximises: callables from images to one number per image.

The factories share their arguments: a function of images in [0, 1], which normalises them and runs the model, and the
constants to push its output away from, in the order of the batch that will be attacked.

    features_fn: Maps (B, ...) images to (B, N, D) or (B, D) features.
    logits_fn: Maps (B, ...) images to (B, C) logits, or to an output of transformers with `logits`.
    target: Same shape as the features, usually those of the clean images.
    labels: (B,) classes, integers from 0 to C - 1.

Each returns an [`Objective`], which maps (B, ...) images to (B,) and raises a `ValueError` if the shapes don't fit.

Shapes: B images, N sequence, D width, C classes, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


class Objective:
    """Maps images to one number each, which may depend on constants of the image, such as its label.

    Args:
        function: Maps (B, ...) images in [0, 1] and their constants to (B,).
        of_images: Constants, (B, ...) each, in the order of the images.
    """

    def __init__(self, function: Callable[..., Tensor], *of_images: Tensor) -> None:
        self.function = function
        self.of_images = tuple(map(detached_copy, of_images))

    def __call__(self, images: Tensor) -> Tensor:
        return self.function(images, *self.of_images)

    def select(self, rows: Tensor) -> Objective:
        """Returns the objective of the images in `rows`, (R,) int64; it maps (R, ...) images to (R,)."""
        return Objective(self.function, *(one[rows] for one in self.of_images))


def cosine_similarity(
    features: Tensor, target: Tensor, *, similarity_axis: Literal["token", "feature"] = "token"
) -> Tensor:
    """Computes the mean cosine of each example's features with its target.

    Args:
        features: (B, N, D) or (B, D) floating.
        target: Same shape.
        similarity_axis: For (B, N, D): `"token"` takes one cosine per feature, along the tokens, as the published
            code does; `"feature"` one per token, along the features, as the paper's formula says. For (B, D) both
            take the cosine along the features.

    Returns:
        (B,) cosines in [-1, 1].

    Raises:
        ValueError: If the shapes differ or are neither, or the axis is unknown.

    Source: L_inv and L_adv of Pulfer et al., ECCV 2024, arXiv 2503.10191.
    """
    if similarity_axis not in ("token", "feature"):
        raise ValueError(f'similarity_axis must be "token" or "feature", got {similarity_axis!r}')
    _check_same_shape(features, target)
    if features.dim() == 2:
        return F.cosine_similarity(features, target, dim=1)  # (B,)
    if features.dim() != 3:
        raise ValueError(f"features must have shape (B, N, D) or (B, D), got {tuple(features.shape)}")
    return F.cosine_similarity(features, target, dim=1 if similarity_axis == "token" else 2).mean(dim=1)  # (B,)


def feature_cosine_objective(
    features_fn: Callable[[Tensor], Tensor],
    target: Tensor,
    *,
    similarity_axis: Literal["token", "feature"] = "token",
) -> Objective:
    """Returns minus the mean cosine with target features, as an objective; see [`cosine_similarity`].

    Where the features equal the target, the gradient is rounding noise: start the attack at random.
    """

    def objective(images: Tensor, target: Tensor) -> Tensor:
        return -cosine_similarity(as_tensor(features_fn(images), "features"), target, similarity_axis=similarity_axis)

    return Objective(objective, target)


def feature_mse_objective(features_fn: Callable[[Tensor], Tensor], target: Tensor) -> Objective:
    """Returns the mean squared difference from target features, as an objective.

    Where the features equal the target, the gradient is zero: start the attack at random.
    """

    def objective(images: Tensor, target: Tensor) -> Tensor:
        features = as_tensor(features_fn(images), "features")
        _check_same_shape(features, target)
        return (features - target).square().flatten(1).mean(dim=1)  # (B,)

    return Objective(objective, target)


def cross_entropy_objective(
    logits_fn: Callable[[Tensor], Tensor], labels: Tensor, *, misclassified_bonus: float = 0.0
) -> Objective:
    """Returns a classifier's cross-entropy with the true labels, as an objective.

    `misclassified_bonus` is added where the image is misclassified and does not change the gradient. With a large one,
    an attack that keeps its best iterate prefers misclassified iterates to those with a larger loss.
    """
    labels, highest_label = class_labels(labels)

    def objective(images: Tensor, labels: Tensor) -> Tensor:
        logits = as_tensor(logits_fn(images), "logits")
        check_logits(logits, labels, highest_label)
        loss = F.cross_entropy(logits, labels, reduction="none")  # (B,)
        return loss + misclassified_bonus * (logits.argmax(dim=1) != labels)

    return Objective(objective, labels)


def margin_objective(logits_fn: Callable[[Tensor], Tensor], labels: Tensor) -> Objective:
    """Returns the largest wrong logit minus the true one, as an objective: above 0 where an image is misclassified.

    Unlike the cross-entropy it doesn't saturate where the classifier is sure. It needs at least two classes.

    Source: untargeted and unclipped form of the loss f_6 of Carlini & Wagner, "Towards Evaluating the Robustness of
    Neural Networks", IEEE S&P 2017, arXiv 1608.04644.
    """
    labels, highest_label = class_labels(labels)

    def objective(images: Tensor, labels: Tensor) -> Tensor:
        logits = as_tensor(logits_fn(images), "logits")
        check_logits(logits, labels, highest_label)
        if logits.shape[1] < 2:
            raise ValueError(f"logits_fn must return at least two classes, got shape {tuple(logits.shape)}")
        index = labels[:, None]  # (B, 1)
        true = logits.gather(1, index)[:, 0]
        return logits.scatter(1, index, -torch.inf).amax(dim=1) - true  # (B,)

    return Objective(objective, labels)


def pixel_cross_entropy_objective(
    logits_fn: Callable[[Tensor], Tensor], labels: Tensor, *, ignore_index: int = 255
) -> Objective:
    """Returns a segmentation's cross-entropy, averaged over each image's labelled pixels, as an objective.

    Logits are (B, C, H, W), labels (B, H, W) of the same size. Pixels with the label `ignore_index` (255 as in
    transformers) don't count; an image without any labelled pixel scores 0.
    """
    labels, highest_label = class_labels(labels, ignore_index=ignore_index)

    def objective(images: Tensor, labels: Tensor, num_labelled: Tensor) -> Tensor:
        logits = as_tensor(logits_fn(images), "logits")
        check_logits(logits, labels, highest_label, num_dims=4)
        per_pixel = F.cross_entropy(logits, labels, ignore_index=ignore_index, reduction="none")  # (B, H, W)
        return per_pixel.flatten(1).sum(dim=1) / num_labelled.clamp(min=1)  # (B,)

    return Objective(objective, labels, (labels != ignore_index).flatten(1).sum(dim=1))


def detached_copy(tensor: Tensor) -> Tensor:
    """Returns a detached copy that autograd can save, even of a tensor made in inference mode."""
    with torch.inference_mode(False):
        return tensor.detach().clone()


def _check_same_shape(features: Tensor, target: Tensor) -> None:
    if features.shape != target.shape:
        raise ValueError(
            f"features and target must have the same shape, got {tuple(features.shape)} and {tuple(target.shape)}"
        )


def as_tensor(output: object, name: Literal["logits", "features"]) -> Tensor:
    """Returns a function's output, or the logits of an output of transformers."""
    tensor = getattr(output, "logits", output) if name == "logits" else output
    if not isinstance(tensor, Tensor):
        raise ValueError(
            f"{name}_fn must return a tensor, got a {type(output).__name__}: give a function that returns the tensor "
            "in it, such as lambda images: model(images).last_hidden_state"
        )
    return tensor


def class_labels(labels: Tensor, *, ignore_index: int | None = None) -> tuple[Tensor, int]:
    """Returns labels as int64, and the highest class; `ValueError` unless they are integers of at least 0."""
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers, one class per image or pixel, got {labels.dtype}")
    labels = labels.long()
    counted = labels if ignore_index is None else labels[labels != ignore_index]
    lowest, highest = map(int, counted.aminmax()) if counted.numel() else (0, 0)
    if lowest < 0:
        raise ValueError(f"labels must be classes from 0, got {lowest}: leave images without a label out")
    return labels, highest


def check_logits(logits: Tensor, labels: Tensor, highest_label: int, *, num_dims: int = 2) -> None:
    """Raises `ValueError` unless the logits fit the labels, of which the highest is known."""
    if logits.dim() != num_dims or labels.shape != (logits.shape[0], *logits.shape[2:]):
        expected, fix = "(B, C) and labels (B,)", ""
        if num_dims == 4:
            expected, fix = "(B, C, H, W) and labels (B, H, W)", ": resize the logits to the labels in logits_fn"
        raise ValueError(
            f"logits must have shape {expected}, got {tuple(logits.shape)} and {tuple(labels.shape)}{fix}"
        )
    if highest_label >= logits.shape[1]:
        raise ValueError(
            f"labels must be from 0 to {logits.shape[1] - 1}, since the logits have {logits.shape[1]} classes, got "
            f"{highest_label}"
        )
