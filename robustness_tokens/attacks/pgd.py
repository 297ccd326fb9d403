"""Projected gradient descent in the L-infinity ball, in pixel space.

Shapes: B images.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from .objectives import Objective


Generators: TypeAlias = torch.Generator | Sequence[torch.Generator] | None


@torch.inference_mode(False)
@torch.enable_grad()
def pgd_attack(
    objective: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    eps: float = 4 / 255,
    step_size: float | None = None,
    num_steps: int = 20,
    num_restarts: int = 1,
    random_start: bool = True,
    stop_above: float = math.inf,
    generator: Generators = None,
) -> Tensor:
    """Adversarial images that maximise an objective within `eps` of the originals.

    Every iterate of every restart counts, the last one too: each image keeps the one with its highest objective.
    One restart costs `num_steps` gradients and `num_steps + 1` evaluations of the objective, less what `stop_above`
    saves. Models are used as they are: put them in eval mode first. Gradients are taken with respect to the images
    alone and no `.grad` is touched.

    Args:
        objective: Maps images (B, ...) to one number per image (B,), which is maximised. Normalisation belongs in it.
        images: (B, ...) float32 or float64 in [0, 1].
        eps: Radius of the L-infinity ball in pixel units, at least 0; 0 returns the images exactly.
        step_size: Length of a step in pixel units; `None` is `2.5 * eps / num_steps`, which can cross the whole ball.
        num_steps: Steps per restart, at least 1.
        num_restarts: Runs from fresh random starts, at least 1.
        random_start: Start uniformly in the ball, clipped to [0, 1], or else at the images themselves.
        stop_above: An image is done once its objective exceeds this, and costs nothing more: 0 ends with a
            misclassification where the objective is a margin. Needs an objective that can be taken of some of the
            images, as those of this package.
        generator: Source of the random starts, on any device. A sequence holds one generator per image, so that an
            image's noise doesn't depend on how images are batched. `None` is torch's default generator.

    Returns:
        (B, ...) detached images in [0, 1], at most `eps` from `images`, of their dtype and on their device.

    Raises:
        ValueError: If an argument is out of range, or the objective doesn't return one finite number per image that
            is differentiable in the images.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, arXiv 1706.06083.
    """
    check_pixels("images", images)
    lowest, highest = images.aminmax()
    if not (lowest >= 0 and highest <= 1):
        raise ValueError(
            f"images must lie in [0, 1], got values from {lowest:g} to {highest:g}: undo the normalisation first and "
            "apply it inside the objective"
        )
    check_steps(eps=eps, step_size=step_size, num_steps=num_steps)
    if eps > 1:
        raise ValueError(f"eps must be at most 1, in pixel units of [0, 1] images such as 8/255, got {eps}")
    if num_restarts < 1:
        raise ValueError(f"num_restarts must be at least 1, got {num_restarts}")
    if num_restarts > 1 and not random_start:
        raise ValueError(f"num_restarts={num_restarts} would repeat one run without random_start=True")
    check_can_stop(objective, stop_above)
    if step_size is None:
        step_size = 2.5 * eps / num_steps

    images = images.detach().clone()
    lower, upper = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
    best_images, best_values = images.clone(), images.new_full((len(images),), -math.inf)
    rows = torch.arange(len(images), device=images.device)  # of the images that are not done
    for _ in range(num_restarts):
        iterate = images
        if random_start:
            offset = eps * (2 * draw_noise(images, torch.rand, generator) - 1)
            iterate = torch.clamp(images + offset, lower, upper)
        iterate, of_rows = iterate[rows], select_rows(objective, rows, len(images))
        for step in range(num_steps + 1):
            is_last = step == num_steps
            iterate = iterate.detach().requires_grad_(not is_last)
            with torch.set_grad_enabled(not is_last):
                values = evaluate_objective(of_rows, iterate)
            best_values = keep_best(best_images, best_values, rows, iterate.detach(), values.detach())
            goes_on = values.detach() <= stop_above
            if not goes_on.any():
                return best_images
            if not is_last:
                gradient = input_gradient(values.sum(), iterate, source="objective")
                iterate = torch.clamp(iterate.detach() + step_size * gradient.sign(), lower[rows], upper[rows])
            if not goes_on.all():
                rows, iterate = rows[goes_on], iterate[goes_on]
                of_rows = select_rows(objective, rows, len(images))
    return best_images


def evaluate_objective(objective: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The objective's values, (B,); raises a `ValueError` unless they are one finite number per image."""
    values = objective(images)
    if values.shape != (len(images),):
        raise ValueError(
            f"objective must return one number per image, shape ({len(images)},), got shape {tuple(values.shape)}: "
            "reduce every dimension but the first"
        )
    finite = values.isfinite()
    if not finite.all():
        raise ValueError(f"objective must be finite, got {values[~finite][0]:g} for image {(~finite).nonzero()[0, 0]}")
    return values


def keep_best(best_images: Tensor, best_values: Tensor, rows: Tensor, images: Tensor, values: Tensor) -> Tensor:
    """Puts the images that score higher in the place of the best ones, in `best_images` itself.

    Args:
        best_images: (B, ...), changed.
        best_values: (B,) their objectives.
        rows: (R,) int64, which of them `images` are candidates for.
        images: (R, ...).
        values: (R,) objectives of the candidates.

    Returns:
        (B,) objectives of the best images now, in the dtype of `values`.
    """
    best_values = best_values.to(values.dtype)
    better = values > best_values[rows]
    best_images[rows[better]] = images[better]
    return best_values.index_put((rows[better],), values[better])


def select_rows(objective: Callable[[Tensor], Tensor], rows: Tensor, num_images: int) -> Callable[[Tensor], Tensor]:
    """The objective of these rows of a batch alone; of all of them it is the objective itself."""
    if len(rows) == num_images:
        return objective
    assert isinstance(objective, Objective)  # see check_can_stop
    return objective.select(rows)


def check_can_stop(objective: Callable[[Tensor], Tensor], stop_above: float) -> None:
    """Raise a `ValueError` if images are to be done one by one, and the objective can't be taken of some of them."""
    if stop_above < math.inf and not isinstance(objective, Objective):
        raise ValueError(
            "stop_above needs an objective that can be taken of some of the images, got a "
            f"{type(objective).__name__}: make it as an Objective, or with margin_objective and its like"
        )


def check_pixels(name: str, pixels: Tensor) -> None:
    """Raise a `ValueError` unless this is a batch in a precision that can hold a budget."""
    # Half precision is coarser than 8 bits near 1 (bfloat16) or breaks the budget by rounding (float16).
    if pixels.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"{name} must be float32 or float64, got {pixels.dtype}: convert first (8-bit images: `.float() / 255`); "
            "a model in half precision can cast inside its own function"
        )
    if pixels.dim() == 0 or pixels.numel() == 0:
        raise ValueError(f"{name} must hold at least one image, shape (B, ...), got shape {tuple(pixels.shape)}")


def check_steps(*, eps: float, step_size: float | None, num_steps: int) -> None:
    """Raise a `ValueError` unless budget and steps make sense."""
    if not 0 <= eps < math.inf:
        raise ValueError(f"eps must be a finite number of at least 0, got {eps}")
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"step_size must be a finite number above 0, got {step_size}")
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}: without a step there is no attack")


def draw_noise(like: Tensor, sample: Callable[..., Tensor], generator: Generators) -> Tensor:
    """Noise of the shape, dtype and device of `like`.

    Args:
        like: (B, ...) floating tensor.
        sample: `torch.rand` or `torch.randn`.
        generator: One generator for all, one per example, or `None` for torch's default; on any device.

    Returns:
        (B, ...) noise.

    Raises:
        ValueError: If a sequence of generators doesn't hold one per example.
    """
    if generator is None:
        return sample(like.shape, dtype=like.dtype, device=like.device)
    if isinstance(generator, torch.Generator):
        return sample(like.shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)
    if len(generator) != len(like):
        raise ValueError(f"generator must hold one generator per image, {len(like)}, got {len(generator)}")
    noise = [sample(like.shape[1:], generator=one, dtype=like.dtype, device=one.device) for one in generator]
    return torch.stack(noise).to(like.device)  # (B, ...)


def input_gradient(value: Tensor, images: Tensor, *, source: str) -> Tensor:
    """Gradient of a scalar with respect to the images and nothing else; `source` names what was differentiated.

    Raises:
        ValueError: If there is no gradient, or it is not a number somewhere.
    """
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
