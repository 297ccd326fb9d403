"""Projected gradient descent in the L-infinity ball, in pixel space, with or without momentum.

Shapes: B images.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .common import DEFAULT_EPS, Generators, Search, check_attack, draw_noise, input_gradient


def pgd_step_size(eps: float, num_steps: int) -> float:
    """Returns the default step of [`pgd_attack`], in pixel units: `num_steps` of them can cross the whole ball."""
    return 2.5 * eps / num_steps


@torch.inference_mode(False)
@torch.enable_grad()
def pgd_attack(
    objective: Callable[[Tensor], Tensor],
    images: Tensor,
    *,
    eps: float = DEFAULT_EPS,
    step_size: float | None = None,
    num_steps: int = 20,
    num_restarts: int = 1,
    random_start: bool = True,
    momentum: float = 0.0,
    stop_above: float = math.inf,
    keep_best: bool = True,
    generator: Generators = None,
) -> Tensor:
    """Returns adversarial images that maximise an objective within `eps` of the originals.

    Each image keeps its iterate with the highest objective over all steps of all restarts, the last one included,
    unless `keep_best` is False. One restart costs `num_steps` gradients and `num_steps + 1` evaluations of the
    objective, less what `stop_above` saves. Models are used as they are: put them in eval mode first. Gradients are
    taken with respect to the images alone and no `.grad` is touched.

    Args:
        objective: Maps images (B, ...) to one number per image (B,), which is maximised. Normalisation belongs in it.
        images: (B, ...) float32 or float64 in [0, 1].
        eps: Radius of the L-infinity ball in pixel units, at least 0; 0 returns the images exactly.
        step_size: Length of a step in pixel units; `None` is `2.5 * eps / num_steps`, which can cross the whole ball.
        num_steps: Steps per restart, at least 1.
        num_restarts: Runs from fresh random starts, at least 1.
        random_start: Start uniformly in the ball, clipped to [0, 1], or else at the images themselves.
        momentum: A step follows the signs of `momentum` times the previous direction plus the image's gradient divided
            by its L1 norm. 0 is PGD; 1 with `step_size=eps / num_steps` and no random start is MI-FGSM, except that
            the best iterate is returned, not the last.
        stop_above: An image is done once its objective exceeds this, and costs nothing more: with a margin as the
            objective, 0 stops at misclassification. Needs an [`Objective`], as this package's factories return.
        keep_best: False returns the last iterate, as adversarial training does, and saves the last evaluation. It
            allows neither restarts nor `stop_above`.
        generator: Source of the random starts, on any device. A sequence holds one generator per image, so that an
            image's noise doesn't depend on how images are batched. `None` is torch's default generator.

    Returns:
        (B, ...) detached images in [0, 1], at most `eps` from `images`, of their dtype and on their device.

    Raises:
        ValueError: If an argument is out of range, or the objective doesn't return one finite number per image that
            is differentiable in the images.

    Source: Madry et al., "Towards Deep Learning Models Resistant to Adversarial Attacks", ICLR 2018, arXiv 1706.06083.
    Momentum: Dong et al., "Boosting Adversarial Attacks with Momentum", CVPR 2018, arXiv 1710.06081.
    """
    eps = check_attack(images, eps=eps, step_size=step_size, num_steps=num_steps, num_restarts=num_restarts)
    if num_restarts > 1 and not random_start:
        raise ValueError(f"num_restarts={num_restarts} would repeat one run without random_start=True")
    if not keep_best and (num_restarts > 1 or stop_above < math.inf):
        raise ValueError(
            "keep_best=False returns the last iterate, without restarts and stop_above, got "
            f"num_restarts={num_restarts} and stop_above={stop_above:g}: leave them out"
        )
    if not 0 <= momentum < math.inf:
        raise ValueError(f"momentum must be a finite number of at least 0, got {momentum}")
    if step_size is None:
        step_size = pgd_step_size(eps, num_steps)

    images = images.detach().clone()
    lower, upper = (images - eps).clamp(min=0), (images + eps).clamp(max=1)
    search = Search(objective, images, stop_above=stop_above)
    for _ in range(num_restarts):
        iterate = images
        if random_start:
            offset = eps * (2 * draw_noise(images, torch.rand, generator) - 1)
            iterate = torch.clamp(images + offset, lower, upper)
        iterate = iterate[search.rows]
        direction = torch.zeros_like(iterate)
        for step in range(num_steps + keep_best):
            is_last = step == num_steps
            iterate = iterate.detach().requires_grad_(not is_last)
            with torch.set_grad_enabled(not is_last):
                values = search.evaluate(iterate)
            goes_on = search.drop_done()
            if not goes_on.any():
                return search.best_images
            if not is_last:
                gradient = input_gradient(values.sum(), iterate, source="objective")[goes_on]
                # Without momentum the norm does not matter, but dividing by it could round a gradient to zero.
                direction = momentum * direction[goes_on] + _l1_normalized(gradient) if momentum else gradient
                iterate = iterate.detach()[goes_on] + step_size * direction.sign()
                iterate = torch.clamp(iterate, lower[search.rows], upper[search.rows])
    return search.best_images if keep_best else iterate


def _l1_normalized(gradient: Tensor) -> Tensor:
    """Returns the gradient of each image, (R, ...), divided by its L1 norm; a gradient of zero stays zero."""
    if not gradient.isfinite().all():
        raise ValueError(
            "objective has a gradient with respect to the images that is not finite, which momentum can't use: give "
            "an objective with finite gradients, or momentum=0"
        )
    flat = gradient.reshape(len(gradient), -1)
    return F.normalize(flat, p=1, dim=1, eps=torch.finfo(flat.dtype).tiny).view_as(gradient)
