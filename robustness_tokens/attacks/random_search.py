"""Random search: attacks that need scores and no gradients.

Shapes: B images, C channels, H and W pixels, Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from .common import DEFAULT_EPS, Generators, Search, check_attack, draw_noise


NoiseKind = Literal["uniform", "corners"]

# (share of the queries spent, divisor of the squares' area): table of the authors' code for 10,000 queries.
_SCHEDULE = ((0.001, 2), (0.005, 4), (0.02, 8), (0.05, 16), (0.1, 32), (0.2, 64), (0.4, 128), (0.6, 256), (0.8, 512))


@torch.no_grad()
def noise_attack(
    objective: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    kind: NoiseKind = "uniform",
    eps: float = DEFAULT_EPS,
    num_draws: int = 10,
    generator: Generators = None,
) -> Tensor:
    """Draws noise in the L-infinity ball and keeps, for each image, the draw with the highest objective.

    It is the baseline that any attack must beat.

    Args:
        objective, images, eps, generator: As in [`~robustness_tokens.attacks.pgd_attack`]; no gradient is needed.
        kind: `"uniform"` draws in the ball, `"corners"` are plus or minus `eps` in every pixel.
        num_draws: Draws, at least 1.

    Returns:
        (B, ...) images in [0, 1], within `eps` of the originals.

    Raises:
        ValueError: If an argument is out of range.
    """
    if kind not in get_args(NoiseKind):
        raise ValueError(f"kind must be one of {get_args(NoiseKind)}, got {kind!r}")
    eps = check_attack(images, eps=eps, num_draws=num_draws)
    search = Search(objective, images)
    for _ in range(num_draws):
        uniform = draw_noise(images, torch.rand, generator)
        search.evaluate(_move(images, _signs(uniform) if kind == "corners" else 2 * uniform - 1, eps))
    return search.best_images


@torch.no_grad()
def square_attack(
    objective: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    eps: float = DEFAULT_EPS,
    num_queries: int = 1000,
    initial_area: float = 0.8,
    stop_above: float = math.inf,
    generator: Generators = None,
) -> Tensor:
    """Runs the Square attack in the L-infinity ball on any score, not only a classifier's.

    Starts from vertical stripes of `eps` and sets one square at a time to a random corner of the ball, where that
    raises the objective. The places and signs of the squares are drawn per image.

    Args:
        objective, eps, stop_above, generator: As in [`~robustness_tokens.attacks.pgd_attack`], without gradients.
        images: (B, C, H, W) float32 or float64 in [0, 1].
        num_queries: Q, calls of the objective, at least 1.
        initial_area: Share of the image that the first squares cover, in (0, 1].

    Returns:
        (B, C, H, W) images in [0, 1], within `eps` of the originals.

    Raises:
        ValueError: If an argument is out of range or the objective doesn't return one number per image.

    Source: Andriushchenko et al., "Square Attack", ECCV 2020, arXiv 1912.00049, with the schedule of the authors' code
    stretched to `num_queries`.
    """
    eps = check_attack(images, eps=eps, num_queries=num_queries)
    search = Search(objective, images, stop_above=stop_above)
    if images.dim() != 4:
        raise ValueError(f"images must have shape (B, C, H, W), got {tuple(images.shape)}")
    if not 0 < initial_area <= 1:
        raise ValueError(f"initial_area must be in (0, 1], the share of the image in a square, got {initial_area}")
    count, channels, height, width = images.shape
    numbers = channels * width + (num_queries - 1) * (2 + channels)
    noise = draw_noise(images.new_empty(count, numbers), torch.rand, generator)
    stripes, noise = noise[:, : channels * width], noise[:, channels * width :]
    search.evaluate(_move(images, _signs(stripes).view(count, channels, 1, width), eps))
    ys, xs = (torch.arange(size, device=images.device) for size in (height, width))
    for query, draws in enumerate(noise.split(2 + channels, dim=1), start=1):  # draws: (B, 2 + C)
        if not search.drop_done().any():
            break
        rows = search.rows
        draws = draws[rows]
        side = _side(query / num_queries, initial_area, height, width)
        top, left = ((draws[:, i] * (size - side + 1)).long() for i, size in enumerate((height, width)))  # (B,) each
        in_rows = (ys >= top[:, None]) & (ys < top[:, None] + side)  # (B, H)
        in_columns = (xs >= left[:, None]) & (xs < left[:, None] + side)  # (B, W)
        square = (in_rows[:, :, None] & in_columns[:, None])[:, None]  # (B, 1, H, W)
        corner = _move(images[rows], _signs(draws[:, 2:])[:, :, None, None], eps)
        search.evaluate(torch.where(square, corner, search.best_images[rows]))
    return search.best_images


def _side(spent: float, initial_area: float, height: int, width: int) -> int:
    """Returns the side of the squares in pixels, given the share of the queries that is spent."""
    shrunk = max((factor for share, factor in _SCHEDULE if spent > share), default=1)
    return min(max(round(math.sqrt(initial_area / shrunk * height * width)), 1), height, width)


def _signs(uniform: Tensor) -> Tensor:
    """Maps numbers in [0, 1) to -1 or 1."""
    return torch.where(uniform < 0.5, -1.0, 1.0).to(uniform.dtype)


def _move(images: Tensor, direction: Tensor, eps: float) -> Tensor:
    return (images + eps * direction).clamp(0, 1)
