"""Noise as an attack, the baseline that any attack must beat.

Shapes: B images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from .common import Generators, check_pixels, check_steps, draw_noise, evaluate_objective, keep_best


NoiseKind = Literal["uniform", "corners"]


@torch.no_grad()
def noise_attack(
    objective: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    kind: NoiseKind = "uniform",
    eps: float = 4 / 255,
    num_draws: int = 10,
    generator: Generators = None,
) -> Tensor:
    """Draws noise in the L-infinity ball and keeps, for each image, the draw with the highest objective.

    Args:
        objective: Maps (B, ...) images in [0, 1] to (B,) numbers; no gradient is asked for.
        images: (B, ...) float32 or float64 in [0, 1].
        kind: `"uniform"` draws in the ball, `"corners"` are plus or minus `eps` in every pixel.
        eps: Radius in pixel units.
        num_draws: At least 1.
        generator: Source of the noise, on any device; a sequence holds one generator per image.

    Returns:
        (B, ...) images in [0, 1], within `eps` of the originals.

    Raises:
        ValueError: If an argument is out of range.
    """
    if kind not in get_args(NoiseKind):
        raise ValueError(f"kind must be one of {get_args(NoiseKind)}, got {kind!r}")
    check_pixels("images", images)
    check_steps(eps=eps, step_size=None, num_steps=num_draws)
    best, best_values = images.clone(), images.new_full((len(images),), -torch.inf)
    rows = torch.arange(len(images), device=images.device)
    for _ in range(num_draws):
        offset = 2 * draw_noise(images, torch.rand, generator) - 1  # in [-1, 1)
        if kind == "corners":
            offset = torch.where(offset < 0, -1.0, 1.0).to(images.dtype)
        noisy = (images + eps * offset).clamp(0, 1)
        best_values = keep_best(best, best_values, rows, noisy, evaluate_objective(objective, noisy))
    return best
