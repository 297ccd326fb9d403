"""What the tokens are trained for, and the noise that belongs to an example.

Shapes: B images, N sequence, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .attacks import cosine_similarity
from .configuration import SimilarityAxis


@dataclass(frozen=True)
class RobustnessLoss:
    """The training objective on one batch, each a mean over its images.

    Attributes:
        loss: Scalar to minimise, minus the weighted sum of the two cosines.
        invariance: cos(f([r, x]), f(x)), scalar.
        adversarial: cos(f([r, x_adv]), f(x)), scalar.
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
) -> RobustnessLoss:
    """The paper's two losses, in one forward pass of clean and attacked images together (paper, section 3).

    Args:
        features: (2B, 3, H, W) pixel values -> (2B, N, D) or (2B, D), with the tokens active.
        pixel_values: (B, 3, H, W) normalised clean images.
        attacked: (B, 3, H, W) normalised attacked images.
        target: Features of the clean images without tokens, (B, N, D) or (B, D).
        similarity_axis: See `RobustnessTokenConfig`.
        invariance_weight, adversarial_weight: Of the two cosines.

    Returns:
        The losses, with gradients to the tokens.
    """
    clean, adversarial = features(torch.cat([pixel_values, attacked])).chunk(2)  # (2B, ...) -> (B, ...) each
    invariance_cosine = cosine_similarity(clean, target, similarity_axis=similarity_axis).mean()
    adversarial_cosine = cosine_similarity(adversarial, target, similarity_axis=similarity_axis).mean()
    loss = -(invariance_weight * invariance_cosine + adversarial_weight * adversarial_cosine)
    return RobustnessLoss(loss, invariance_cosine, adversarial_cosine)


def example_generators(seed: int, step: int, index: Tensor) -> list[torch.Generator]:
    """One CPU generator per example, from (seed, step, global index): noise that no batching or process changes.

    Args:
        seed, step: Of the run.
        index: (B,) int64 global example indices.
    """
    seeds = (np.random.SeedSequence([seed, step, i]).generate_state(1, np.uint64)[0] for i in index.tolist())
    return [torch.Generator().manual_seed(int(value >> np.uint64(1))) for value in seeds]
