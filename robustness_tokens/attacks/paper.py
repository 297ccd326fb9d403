"""The attack of the published implementation, bit for bit, in normalised space."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .common import Generators, check_pixels, check_steps, draw_noise, input_gradient
from .objectives import as_tensor, check_logits, class_labels, detached_copy


_MAX_MSE = 1e-4

PAPER_EPS_NORMALIZED = 8 / 255
"""Radius of the published attack in normalised units; pixel units are this times a channel's standard deviation."""

PAPER_STEP_SIZE_NORMALIZED = 0.01
PAPER_NUM_STEPS = 30


@torch.inference_mode(False)
@torch.enable_grad()
def paper_attack(
    model_fn: Callable[[Tensor], Tensor],
    pixel_values: Tensor,
    *,
    image_mean: Sequence[float],
    image_std: Sequence[float],
    labels: Tensor | None = None,
    target: Tensor | None = None,
    eps: float = PAPER_EPS_NORMALIZED,
    step_size: float = PAPER_STEP_SIZE_NORMALIZED,
    num_steps: int = PAPER_NUM_STEPS,
    generator: Generators = None,
) -> Tensor:
    """Runs the paper's attack on features, or on a classifier if labels are given.

    Minimises the mean cosine with the clean features (or minus the cross-entropy) plus the mean squared error of the
    [0, 1] images, by signed steps from `pixel_values + step_size * randn`. After each step the iterate is projected
    to the ball and clamped to the range of the clean batch. The last iterate is returned, rounded down to 8 bits.

    Before you quote its numbers:

    - `eps` is in NORMALISED units. With ImageNet's standard deviations "8/255" is about 1.8/255 in pixels, and at most
      2/255 after rounding to 8 bits. Images off the 8-bit grid can move by up to another 1/255 when rounded down.
    - The range depends on the other images of the batch.
    - The loop ends early once the batch's mean squared error reaches 1e-4, which it can't with the default `eps`.

    Use [`pgd_attack`] for a budget in pixels.

    Args:
        model_fn: Maps pixel_values to features, (B, N, D) or (B, D), or to logits, (B, C) or (B, C, H, W), where
            labels are given. The cosine is along dim 1: tokens for (B, N, D), features for (B, D).
        pixel_values: (B, C, H, W) float32 or float64, normalised images.
        image_mean, image_std: C numbers each: the normalisation of `pixel_values`; deviations are above 0.
        labels: (B,) or (B, H, W) int64 classes, where -100 is ignored, to attack a classifier; `None` attacks
            features.
        target: Clean features, `model_fn(pixel_values)`, if the caller has them already; `None` computes them.
        eps: Radius of the L-infinity ball in normalised units.
        step_size: Length of a step, and standard deviation of the starting noise, in normalised units.
        num_steps: Steps, at least 1.
        generator: Source of the noise, on any device; a sequence holds one generator per image. `None` is torch's
            default generator, so that `torch.manual_seed` reproduces the published trajectory.

    Returns:
        (B, C, H, W) detached normalised images on the 8-bit grid, of the dtype and on the device of `pixel_values`.

    Raises:
        ValueError: If an argument is out of range, if labels and target are both given, if `pixel_values` are not
            images normalised with this mean and standard deviation, or if the model's outputs are not finite and
            differentiable in them.

    Source: Pulfer et al., "Robustness Tokens: Towards Adversarial Robustness of Transformers", ECCV 2024,
    arXiv 2503.10191, https://github.com/BrianPulfer/robustness-tokens.
    """
    check_pixels("pixel_values", pixel_values)
    eps = check_steps(eps=eps, step_size=step_size, num_steps=num_steps)
    clean = pixel_values.detach().clone()
    clean_images, mean, std = _unnormalize(clean, image_mean=image_mean, image_std=image_std)
    if labels is not None and target is not None:
        raise ValueError("labels attack a classifier and target features: leave one of them out")
    if labels is not None:
        labels, highest_label = class_labels(labels, ignore_index=-100)
    given = target if labels is None else labels
    if given is None:
        with torch.no_grad():
            given = as_tensor(model_fn(clean.clone()), "features")  # it may work in place
    target = detached_copy(given)
    lower, upper = clean.aminmax()
    iterate = clean + step_size * draw_noise(clean, torch.randn, generator)
    for step in range(num_steps):
        iterate.requires_grad_()
        output = as_tensor(model_fn(iterate.clone()), "features" if labels is None else "logits")
        if labels is not None:
            check_logits(output, labels, highest_label, num_dims=2 if labels.dim() == 1 else 4)
        fit = F.cosine_similarity(output, target).mean() if labels is None else -F.cross_entropy(output, target)
        mse = F.mse_loss(iterate * std + mean, clean_images)
        loss = fit + mse
        if not loss.isfinite():
            raise ValueError(f"model_fn must return finite outputs, but the loss of step {step} is {loss:g}")
        # Two gradients, since the squared error always has one and would hide a model that has none.
        gradient = input_gradient(fit, iterate, source="model_fn") + torch.autograd.grad(mse, iterate)[0]
        iterate = clean + (iterate.detach() - step_size * gradient.sign() - clean).clamp(-eps, eps)
        iterate = iterate.clamp(lower, upper)
        if mse >= _MAX_MSE:
            break
    images_8bit = ((iterate * std + mean).clamp(0, 1) * 255).floor() / 255
    return (images_8bit - mean) / std


def _unnormalize(
    pixel_values: Tensor, *, image_mean: Sequence[float], image_std: Sequence[float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns [0, 1] images, (B, C, H, W), and mean and standard deviation, (C, 1, 1) each; checks all three."""
    if pixel_values.dim() != 4:
        raise ValueError(f"pixel_values must have shape (B, C, H, W), got {tuple(pixel_values.shape)}")
    channels = pixel_values.shape[1]
    for name, numbers in (("image_mean", image_mean), ("image_std", image_std)):
        if len(numbers) != channels:
            raise ValueError(f"{name} must hold one number per channel, {channels}, got {list(numbers)}")
    if not all(number > 0 for number in image_std):
        raise ValueError(f"image_std must be above 0, got {list(image_std)}")
    mean, std = (pixel_values.new_tensor(numbers).view(-1, 1, 1) for numbers in (image_mean, image_std))
    images = pixel_values * std + mean
    lowest, highest = images.aminmax()
    tolerance = 1e-4  # normalising and back costs a few float32 roundings
    if not (lowest >= -tolerance and highest <= 1 + tolerance):
        raise ValueError(
            f"pixel_values must be [0, 1] images normalised with image_mean and image_std, but unnormalised they go "
            f"from {lowest:g} to {highest:g}"
        )
    return images, mean, std


def paper_attack_eps(image_std: Sequence[float], *, on_grid: bool) -> float:
    """Returns the budget of the paper's attack in pixel units, after rounding to 8 bits.

    Rounding down adds up to one level; images `on_grid` move by whole 8-bit levels only.
    """
    levels = round(255 * PAPER_EPS_NORMALIZED * max(image_std), 6) + 1
    return (math.floor(levels) if on_grid else levels) / 255
