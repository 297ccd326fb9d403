"""Checks that probe the model: its gradients, its determinism, and whether our attack works on it.

Shapes: B images, R random directions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ...attacks import (
    cross_entropy_objective,
    example_generators,
    feature_cosine_objective,
    pgd_attack,
    pixel_cross_entropy_objective,
)
from ..attack_suite import AttackBatch, ObjectiveFn
from ..measurements import Measurements
from ..threat_models import EvaluatedModel
from .parts import Finding, NotRunError, check, eps_in_words


NUM_PROBED_IMAGES = 16
NUM_DIRECTIONS = 16
DIFFERENCE_STEP = 0.5 / 255  # float32 rounds a ViT's output by far less than it changes within half a level
SMALLEST_COSINE = 0.9
PLANTED_STEPS = 20
SMALLEST_SHARE_FOUND = 0.99

_START_STREAM, _DIRECTION_STREAM, _PLANTED_STREAM = range(3)


@check(
    10,
    "gradients",
    "At a random point of the ball around each image: no gradient of the white box may be zero; two passes must give "
    "the same output, bit for bit; and the mean cosine of the gradients with finite differences must exceed 0.9. Both "
    "are taken along the same random directions (each pixel half a level up or down), which gives the cosine of the "
    "full vectors. Where attacks run in half precision, so does this gradient; its mean cosine with that of float32 "
    "must then exceed 0.9 too, and the share of equal signs, which are all that PGD reads, is reported. If it fails, "
    "gradients are masked or spoilt, or the model is random, and gradient attacks say little.",
)
def gradients(measurements: Measurements) -> Finding:
    model, batch, eps = _probe(measurements)
    points = _around(batch, eps, measurements.seed)
    with torch.no_grad():
        first, second = (_output(model, batch, points) for _ in range(2))
    is_deterministic = torch.equal(first, second)
    with model.attacked_faster():
        gradient = input_gradients(_objective(model, batch, exact=False), points)
    zeros = (gradient.flatten(1) == 0).all(dim=1).double().mean().item()
    directions = _signs(batch, _DIRECTION_STREAM, measurements.seed, NUM_DIRECTIONS)
    cosine = difference_cosines(_objective(model, batch, exact=True), points, gradient, directions).mean().item()
    words = (
        f"{100 * zeros:.1f}% of {len(points)} gradients zero; outputs {'' if is_deterministic else 'not '}the same "
        f"twice; cosine with finite differences {cosine:.3f}"
    )
    passed = zeros == 0 and is_deterministic and cosine > SMALLEST_COSINE
    if model.attack_precision == "no":
        return passed, words
    exact = input_gradients(_objective(model, batch, exact=True), points)
    agreement = F.cosine_similarity(gradient.flatten(1), exact.flatten(1), dim=1, eps=1e-30).mean().item()
    signs = (gradient.sign() == exact.sign()).double().mean().item()
    words += f"; {model.attack_precision} against float32: cosine {agreement:.3f}"
    return passed and agreement > SMALLEST_COSINE, f"{words}, {100 * signs:.1f}% of the signs equal"


@check(
    12,
    "attack unit test",
    "A weakness is planted: a head that changes its answer once the output has moved half as far as it moves for a "
    "known point of the ball, a random corner. PGD must find it for 99% of the images. If it fails, our attack "
    "doesn't work on this model, whatever the other numbers say.",
)
def attack_unit_test(measurements: Measurements) -> Finding:
    model, batch, eps = _probe(measurements)
    (signs,) = _signs(batch, _PLANTED_STREAM, measurements.seed, 1)
    with torch.no_grad():
        clean = _output(model, batch, batch.images)
        moved = _output(model, batch, (batch.images + eps * signs).clamp(0, 1)) - clean
    squared = moved.flatten(1).square().sum(dim=1).clamp(min=torch.finfo(moved.dtype).tiny)  # (B,)
    unit = moved / squared.view(-1, *[1] * (moved.dim() - 1))  # 0, and so never found, where nothing moved

    def logits(images: Tensor, *, exact: bool = True) -> Tensor:
        output = _output(model, batch, images, exact=exact)
        crossed = ((output - clean) * unit).flatten(1).sum(dim=1)  # 1 at the known point
        return torch.stack([0.5 - crossed, crossed - 0.5], dim=1)  # (B, 2)

    labels = torch.zeros(len(clean), dtype=torch.int64, device=clean.device)
    with model.attacked_faster():  # as all attacks run, in their precision
        adversarial = pgd_attack(
            cross_entropy_objective(lambda images: logits(images, exact=False), labels),
            batch.images,
            eps=eps,
            num_steps=PLANTED_STEPS,
            generator=example_generators(measurements.seed, _START_STREAM, batch.index),
        )
    with torch.no_grad():
        found = (logits(adversarial).argmax(dim=1) == 1).double().mean().item()
    words = f"found for {100 * found:.1f}% of {len(labels)} images at {eps_in_words(eps)}, in {PLANTED_STEPS} steps"
    return found >= SMALLEST_SHARE_FOUND, words


def input_gradients(objective: ObjectiveFn, images: Tensor) -> Tensor:
    """Returns the gradient of each image's objective, zero where it does not depend on the images."""
    with torch.enable_grad():
        images = images.detach().clone().requires_grad_()
        value = objective(images).sum()
        if not value.requires_grad:
            return torch.zeros_like(images)
        (gradient,) = torch.autograd.grad(value, images, allow_unused=True)
    return torch.zeros_like(images) if gradient is None else gradient


@torch.no_grad()
def difference_cosines(
    objective: ObjectiveFn, images: Tensor, gradient: Tensor, directions: Tensor, *, step: float = DIFFERENCE_STEP
) -> Tensor:
    """Returns the (B,) cosines of gradients with central finite differences, along (R, B, ...) random signs.

    Products with random directions keep cosines, whereas the difference of a single pixel, or of a float32 objective,
    is lost in rounding. `step` is in pixel units. A cosine is 0 if the gradient or all differences are 0.
    """
    differences = torch.stack(
        [(objective(images + step * one) - objective(images - step * one)).double() for one in directions], dim=1
    )  # (B, R)
    products = torch.stack([(gradient * one).flatten(1).double().sum(dim=1) for one in directions], dim=1)  # (B, R)
    return F.cosine_similarity(differences, products, dim=1, eps=1e-100)


def _probe(measurements: Measurements) -> tuple[EvaluatedModel, AttackBatch, float]:
    """Returns the model, a few images and the main eps."""
    eps = measurements.eps[0]
    if eps == 0:
        raise NotRunError("the first eps is 0")
    first = min(measurements.batches)
    return measurements.model, measurements.batches[first].first(NUM_PROBED_IMAGES), eps


def _around(batch: AttackBatch, eps: float, seed: int) -> Tensor:
    """Returns a random point of the ball around each image, with room for a finite difference."""
    generators = example_generators(seed, _START_STREAM, batch.index)
    noise = torch.stack([torch.rand(batch.images.shape[1:], generator=one) for one in generators])
    return (batch.images + eps * (2 * noise.to(batch.images) - 1)).clamp(DIFFERENCE_STEP, 1 - DIFFERENCE_STEP)


def _signs(batch: AttackBatch, stream: int, seed: int, count: int) -> Tensor:
    """Returns (count, B, ...) random signs, seeded by the images' rows."""
    shape = (count, *batch.images.shape[1:])
    draws = [torch.rand(shape, generator=one) for one in example_generators(seed, stream, batch.index)]
    return torch.where(torch.stack(draws, dim=1) < 0.5, -1.0, 1.0).to(batch.images)


def _output(model: EvaluatedModel, batch: AttackBatch, images: Tensor, *, exact: bool = True) -> Tensor:
    """Returns the output of the task with the tokens: features, logits, or logits per pixel."""
    if model.task == "features":
        return model.features(images, model.tokens, exact=exact)
    if model.task == "segmentation":
        assert batch.labels is not None
        return model.pixel_logits(images, model.tokens, batch.labels.shape[1:], exact=exact)
    return model.logits(images, model.tokens, exact=exact)


def _objective(model: EvaluatedModel, batch: AttackBatch, *, exact: bool) -> ObjectiveFn:
    """Returns the white box's objective: in float64 of float32 outputs if `exact`, else as attacks compute it."""

    def output(images: Tensor) -> Tensor:
        found = _output(model, batch, images, exact=exact)
        return found.double() if exact else found

    if model.task == "features":
        target = batch.base_features
        if target is None:
            with torch.no_grad():
                target = model.features(batch.images, None, exact=True)
        return feature_cosine_objective(
            output, target.double() if exact else target, similarity_axis=model.similarity_axis
        )
    assert batch.labels is not None
    if model.task == "segmentation":
        return pixel_cross_entropy_objective(output, batch.labels, ignore_index=batch.ignore_index)
    return cross_entropy_objective(output, batch.labels)
