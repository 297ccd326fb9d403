"""The objectives: what training lowers on clean and on attacked images, and `attack="pgd"` raises.

Shapes: B images, N sequence, D width, C classes. Outputs are features, (B, N, D) or (B, D), or logits, (B, C), or
(B, P, C) for each of P patches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypedDict, Unpack, get_args

from torch import Tensor
from torch.nn import functional as F

from ..attacks import cosine_similarity
from ..configuration import SimilarityAxis
from ..models import head_inputs
from ..utils import check_choice


METRICS = ("loss", "invariance_cosine", "adversarial_cosine", "baseline_cosine")
"""The loss of a step, and the cosines of its outputs with the base's clean ones: of clean images, of attacked images,
and of attacked images without tokens (nan where the attack goes through the tokens alone)."""

ObjectiveName = Literal["cosine", "head_distance", "distillation", "cross_entropy"]

LOGITS_OBJECTIVES = ("distillation", "cross_entropy")
"""Objectives of logits; the others are of features."""


class ObjectiveOptions(TypedDict, total=False):
    """Keyword arguments of [`objective_values`]."""

    objective: ObjectiveName
    similarity_axis: SimilarityAxis
    num_patches: int
    labels: Tensor | None


@dataclass(frozen=True)
class RobustnessLoss:
    """The losses of one batch, means over its images.

    Attributes:
        loss: Scalar to minimise: the weighted sum of the objective on clean and on attacked images.
        invariance: cos(f([r, x]), f(x)), scalar without a gradient.
        adversarial: cos(f([r, x_adv]), f(x)), scalar without a gradient.
    """

    loss: Tensor
    invariance: Tensor
    adversarial: Tensor


def robustness_loss(
    outputs: Callable[[Tensor], Tensor],
    pixel_values: Tensor,
    attacked: Tensor,
    target: Tensor,
    *,
    invariance_weight: float = 1.0,
    adversarial_weight: float = 1.0,
    **options: Unpack[ObjectiveOptions],
) -> RobustnessLoss:
    """Computes an objective on clean and on attacked images; by default the two losses of the paper, section 3.

    Args:
        outputs: (B, 3, H, W) pixel values -> features (B, N, D) or (B, D), or logits (B, C), with the tokens active.
            Called with the clean images, then with the attacked ones.
        pixel_values: (B, 3, H, W) normalised clean images.
        attacked: (B, 3, H, W) normalised attacked images.
        target: Outputs of the clean images without tokens, of the same shape.
        invariance_weight: Weight of the loss on clean images.
        adversarial_weight: Weight of the loss on attacked images.
        options: `objective`, `similarity_axis`, `num_patches` and `labels` of [`objective_values`].

    Returns:
        The losses, with gradients to the tokens.
    """
    clean_loss, invariance = weighted_loss(outputs(pixel_values), target, weight=invariance_weight, **options)
    attacked_loss, adversarial = weighted_loss(outputs(attacked), target, weight=adversarial_weight, **options)
    return RobustnessLoss(clean_loss + attacked_loss, invariance, adversarial)


def weighted_loss(
    outputs: Tensor, target: Tensor, *, weight: float | Tensor, **options: Unpack[ObjectiveOptions]
) -> tuple[Tensor, Tensor]:
    """Returns two scalars: the weighted mean of the objective, and the mean cosine without a gradient."""
    loss = weight * objective_values(outputs, target, **options).mean()
    axis = options.get("similarity_axis", "token")
    return loss, cosine_similarity(outputs.detach(), target, similarity_axis=axis).mean()


def objective_values(
    outputs: Tensor,
    target: Tensor,
    *,
    objective: ObjectiveName = "cosine",
    similarity_axis: SimilarityAxis = "token",
    num_patches: int = 0,
    labels: Tensor | None = None,
) -> Tensor:
    """Returns the objective, one number per image: a distance from the base's clean outputs, or the cross-entropy.

    Args:
        outputs: Features, or logits for `"distillation"` and `"cross_entropy"`.
        target: The base's clean outputs, of the same shape.
        objective: `"cosine"` (paper): minus the cosine. `"head_distance"`: see [`head_distance`]. `"distillation"`:
            the Kullback-Leibler divergence from the base's clean prediction, in nats. `"cross_entropy"`: with labels.
        similarity_axis: Axis of the cosine, see `RobustnessTokenConfig`.
        num_patches: P, the number of patches among the N tokens; for `"head_distance"`.
        labels: (B,) int64 classes; for `"cross_entropy"`.

    Returns:
        (B,) numbers; at least 0, except for the cosine (-1 to 1).

    Raises:
        ValueError: If the objective is unknown, or `"cross_entropy"` has no labels.
    """
    if objective == "cosine":
        return -cosine_similarity(outputs, target, similarity_axis=similarity_axis)
    if objective == "head_distance":
        return head_distance(outputs, target, num_patches=num_patches)
    if objective == "distillation":
        divergence = F.kl_div(outputs.log_softmax(-1), target.log_softmax(-1), log_target=True, reduction="none")
        return divergence.sum(dim=-1).flatten(1).mean(dim=1) if divergence.dim() > 2 else divergence.sum(dim=-1)
    check_choice("objective", objective, get_args(ObjectiveName))
    if labels is None:
        raise ValueError('objective="cross_entropy" needs labels, the classes of the images')
    return F.cross_entropy(outputs, labels, reduction="none")


def head_distance(features: Tensor, target: Tensor, *, num_patches: int) -> Tensor:
    """Returns the squared distance between the inputs of a linear head, relative to the target's squared length, (B,).

    It sees what the cosine along the tokens does not: a feature that is scaled by a positive factor in all tokens
    keeps its cosine, but can change the class.
    """
    found, expected = head_inputs(features, num_patches), head_inputs(target, num_patches)  # (B, 2 D) or (B, D)
    return (found - expected).square().sum(dim=1) / expected.square().sum(dim=1)
