"""Code that the attacks share: checks of arguments, noise, the best iterate, the gradient of the images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Integral
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .objectives import Objective


DEFAULT_EPS = 4 / 255

Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


def example_generators(seed: int, step: int, index: Tensor) -> list[torch.Generator]:
    """Returns one CPU generator per example, seeded by (seed, step, global index) and so independent of batching."""
    seeds = (np.random.SeedSequence([seed, step, i]).generate_state(1, np.uint64)[0] for i in index.tolist())
    return [torch.Generator().manual_seed(int(value >> np.uint64(1))) for value in seeds]


class Search:
    """An attack in progress: the best images so far, and `rows`, (R,) int64, the indices of those not done.

    An image is done once its value exceeds `stop_above`.
    """

    def __init__(self, objective: Callable[[Tensor], Tensor], images: Tensor, *, stop_above: float = math.inf) -> None:
        if stop_above < math.inf and not isinstance(objective, Objective):
            raise ValueError(
                "stop_above needs an objective that can be restricted to some of the images, got a "
                f"{type(objective).__name__}: make an Objective, for instance with margin_objective"
            )
        self.objective, self.objective_of_rows, self.stop_above = objective, objective, stop_above
        self.best_images, self.best_values = images.clone(), images.new_full((len(images),), -math.inf)
        self.rows = torch.arange(len(images), device=images.device)

    def evaluate(self, images: Tensor) -> Tensor:
        """Returns the objective's values, (R,), of one candidate per row, (R, ...); keeps the best candidates."""
        values = self.objective_of_rows(images.clone())  # which may work in place
        if not isinstance(values, Tensor) or values.shape != (len(images),):
            came = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else f"a {type(values).__name__}"
            raise ValueError(
                f"objective must return one number per image, shape ({len(images)},), got {came}: reduce every "
                "dimension but the first"
            )
        finite = values.isfinite()
        if not finite.all():
            index = (~finite).nonzero()[0, 0]
            raise ValueError(f"objective must be finite, got {values[index]:g} for image {index}")
        self.best_values = self.best_values.to(values.dtype)
        better = values.detach() > self.best_values[self.rows]
        self.best_images[self.rows[better]] = images.detach()[better]
        self.best_values[self.rows[better]] = values.detach()[better]
        return values

    def drop_done(self) -> Tensor:
        """Drops the rows that are done; returns a mask of the others, (R,) bool."""
        goes_on = self.best_values[self.rows] <= self.stop_above
        if not goes_on.all():
            assert isinstance(self.objective, Objective)
            self.rows = self.rows[goes_on]
            self.objective_of_rows = self.objective.select(self.rows)
        return goes_on


def check_attack(images: Tensor, *, eps: Any, step_size: float | None = None, **counts: Any) -> float:
    """Returns eps as a float; `ValueError` unless images and eps are in [0, 1], and each count is at least 1."""
    check_pixels("images", images)
    lowest, highest = images.aminmax()
    if not (lowest >= 0 and highest <= 1):
        raise ValueError(
            f"images must lie in [0, 1], got values from {lowest:g} to {highest:g}: undo the normalisation first and "
            "apply it inside the objective"
        )
    eps = check_steps(eps=eps, step_size=step_size, **counts)
    if eps > 1:
        raise ValueError(f"eps must be at most 1, in pixel units of [0, 1] images such as 8/255, got {eps}")
    return eps


def check_pixels(name: str, pixels: Tensor) -> None:
    """Raises `ValueError` unless the images are a batch in float32 or float64."""
    # Half precision is coarser than 8 bits near 1 (bfloat16) or breaks the budget by rounding (float16).
    if pixels.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be float32 or float64, got {pixels.dtype}: convert first (8-bit images: `.float() / 255`); "
            "a model in half precision can cast inside its own function"
        )
    if pixels.dim() == 0 or pixels.numel() == 0:
        raise ValueError(f"{name} must hold at least one image, shape (B, ...), got shape {tuple(pixels.shape)}")


def check_steps(*, eps: Any, step_size: float | None = None, **counts: Any) -> float:
    """Returns eps as a float; `ValueError` if it, the step or a count such as `num_steps` is out of range."""
    try:
        radius = float(eps)
    except (TypeError, ValueError, RuntimeError) as exc:
        came = f"a tensor of shape {tuple(eps.shape)}" if hasattr(eps, "shape") else repr(eps)
        raise ValueError(f"eps must be one number for all images, got {came}: attack each eps in a call") from exc
    if not 0 <= radius < math.inf:
        raise ValueError(f"eps must be a finite number of at least 0, got {eps}")
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"step_size must be a finite number above 0, got {step_size}")
    for name, count in counts.items():
        if not isinstance(count, Integral) or count < 1:
            raise ValueError(f"{name} must be a whole number of at least 1, got {count}")
    return radius


def draw_noise(like: Tensor, sample: Callable[..., Tensor], generator: Generators) -> Tensor:
    """Draws noise like `like` (B, ...) by `torch.rand` or `torch.randn`, from one generator or one per example."""
    if generator is None:
        return sample(like.shape, dtype=like.dtype, device=like.device)
    if isinstance(generator, torch.Generator):
        return sample(like.shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)
    if len(generator) != len(like):
        raise ValueError(f"generator must hold one generator per image, {len(like)}, got {len(generator)}")
    noise = [sample(like.shape[1:], generator=one, dtype=like.dtype, device=one.device) for one in generator]
    return torch.stack(noise).to(like.device)  # (B, ...)


def input_gradient(value: Tensor, images: Tensor, *, source: str) -> Tensor:
    """Returns the gradient with respect to the images; `ValueError` names `source` if there is none or it is NaN."""
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, images, allow_unused=True)
    if gradient is None:
        raise ValueError(
            f"{source} has no gradient with respect to the images: compute it from the tensor it is given, without "
            "detach, no_grad or rounding"
        )
    if gradient.isnan().any():
        raise ValueError(f"{source} has a gradient with respect to the images that is NaN")
    return gradient
