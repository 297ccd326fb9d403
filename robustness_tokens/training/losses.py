"""The training objective.

Shapes: B images, N sequence, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypedDict, Unpack

from torch import Tensor

from ..attacks import cosine_similarity
from ..configuration import SimilarityAxis
from ..models import head_inputs


METRICS = ("loss", "invariance_cosine", "adversarial_cosine", "baseline_cosine")
"""The loss of a step, and the cosines of clean images, attacked images, and attacked images without tokens."""


class AgreementOptions(TypedDict):
    """Keyword arguments of [`agreement`]."""

    similarity_axis: SimilarityAxis
    head_distance_weight: float
    num_patches: int


@dataclass(frozen=True)
class RobustnessLoss:
    """The losses of one batch, means over its images.

    Attributes:
        loss: Scalar to minimise: minus the weighted sum of the two agreements, see [`agreement`].
        invariance: cos(f([r, x]), f(x)), scalar without a gradient.
        adversarial: cos(f([r, x_adv]), f(x)), scalar without a gradient.
    """

    loss: Tensor
    invariance: Tensor
    adversarial: Tensor


def robustness_loss(
    features: Callable[[Tensor], Tensor],
    pixel_values: Tensor,
    attacked: Tensor,
    target: Tensor,
    *,
    similarity_axis: SimilarityAxis = "token",
    invariance_weight: float = 1.0,
    adversarial_weight: float = 1.0,
    head_distance_weight: float = 0.0,
    num_patches: int = 0,
) -> RobustnessLoss:
    """Computes the two losses of the paper, section 3.

    Args:
        features: (B, 3, H, W) pixel values -> (B, N, D) or (B, D), with the tokens active. Called with the
            clean images, then with the attacked ones.
        pixel_values: (B, 3, H, W) normalised clean images.
        attacked: (B, 3, H, W) normalised attacked images.
        target: Features of the clean images without tokens, (B, N, D) or (B, D).
        similarity_axis: See `RobustnessTokenConfig`.
        invariance_weight: Weight of the loss on clean images.
        adversarial_weight: Weight of the loss on attacked images.
        head_distance_weight: Weight of [`head_distance`] beside the cosine; 0 (paper) leaves the cosine alone.
        num_patches: P, the number of patches among the N tokens; needed if `head_distance_weight` is above 0.

    Returns:
        The losses, with gradients to the tokens.
    """
    options: AgreementOptions = {
        "similarity_axis": similarity_axis,
        "head_distance_weight": head_distance_weight,
        "num_patches": num_patches,
    }
    clean_loss, invariance = agreement_loss(features(pixel_values), target, weight=invariance_weight, **options)
    attacked_loss, adversarial = agreement_loss(features(attacked), target, weight=adversarial_weight, **options)
    return RobustnessLoss(clean_loss + attacked_loss, invariance, adversarial)


def agreement_loss(
    features: Tensor, target: Tensor, *, weight: float | Tensor, **options: Unpack[AgreementOptions]
) -> tuple[Tensor, Tensor]:
    """Returns two scalars: minus the weighted mean [`agreement`], and the mean cosine without a gradient."""
    loss = -weight * agreement(features, target, **options).mean()
    cosine = cosine_similarity(features.detach(), target, similarity_axis=options["similarity_axis"])
    return loss, cosine.mean()


def agreement(
    features: Tensor,
    target: Tensor,
    *,
    similarity_axis: SimilarityAxis,
    head_distance_weight: float,
    num_patches: int,
) -> Tensor:
    """Returns the cosine minus the weighted [`head_distance`], (B,): training raises it, `attack="pgd"` lowers it."""
    cosine = cosine_similarity(features, target, similarity_axis=similarity_axis)
    if head_distance_weight == 0:
        return cosine
    return cosine - head_distance_weight * head_distance(features, target, num_patches=num_patches)


def head_distance(features: Tensor, target: Tensor, *, num_patches: int) -> Tensor:
    """Returns the squared distance between the inputs of a linear head, relative to the target's squared length, (B,).

    The cosine along the tokens hardly sees it: scaling a feature, or shifting it equally in all tokens, costs little
    there but changes the classes.
    """
    found, expected = head_inputs(features, num_patches), head_inputs(target, num_patches)  # (B, 2 D) or (B, D)
    return (found - expected).square().sum(dim=1) / expected.square().sum(dim=1)
