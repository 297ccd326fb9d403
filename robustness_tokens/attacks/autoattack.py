"""AutoAttack and its parts, from the external package `pyautoattack` (extra `eval`).

Its noise comes from torch's default generators, which are restored, and so depends on the batch. Shapes: B images,
C classes.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .common import DEFAULT_EPS, check_attack
from .objectives import as_tensor, check_logits, class_labels


ApgdLoss = Literal["cross_entropy", "targeted_dlr"]

logger = logging.getLogger(__name__)


@torch.inference_mode(False)
def auto_attack(
    logits_fn: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, eps: float = DEFAULT_EPS, seed: int = 0
) -> Tensor:
    """Runs standard AutoAttack: APGD on cross-entropy, targeted APGD, targeted FAB and Square (5,000 queries).

    Args:
        logits_fn: Maps (B, ...) images in [0, 1] to (B, C) logits, in any precision.
        images: (B, 3, H, W) float32 in [0, 1].
        labels: (B,) classes, integers from 0 to C - 1.
        eps: Radius of the L-infinity ball in pixel units.
        seed: Seed of the noise.

    Returns:
        (B, 3, H, W) images; an image is unchanged if its class could not be changed.

    Raises:
        ValueError: If an argument is out of range, or there are fewer than four classes.
        ImportError: If `pyautoattack` is not installed.

    Source: Croce & Hein, "Reliable evaluation of adversarial robustness with an ensemble of diverse parameter-free
    attacks", ICML 2020, arXiv 2003.01690.
    """
    eps = check_attack(images, eps=eps)
    model, images, labels, num_targets = _prepare(logits_fn, images, labels, target_classes=9)
    if eps == 0:
        return images
    with _left_as_found(images.device):
        attack = _package("pyautoattack").AutoAttack(model, eps=eps, seed=seed, device=images.device)
        attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = num_targets
        adversarial, _ = attack.run_standard_evaluation(images, labels, batch_size=len(images))
    return adversarial.detach()


@torch.inference_mode(False)
def apgd_attack(
    logits_fn: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    loss: ApgdLoss = "cross_entropy",
    eps: float = DEFAULT_EPS,
    num_steps: int = 100,
    num_restarts: int = 1,
    num_target_classes: int = 9,
    highest_loss: bool = False,
    seed: int = 0,
) -> Tensor:
    """Runs one of AutoAttack's gradient attacks: PGD that chooses its own step sizes.

    Args:
        logits_fn, images, labels, eps, seed: As in [`~robustness_tokens.attacks.auto_attack`].
        loss: `"targeted_dlr"` tries the likeliest wrong classes one after the other.
        num_steps: Steps of each restart, for each target.
        num_restarts: At least 1.
        num_target_classes: For `"targeted_dlr"` only; at most C - 1 are tried.
        highest_loss: For `"cross_entropy"` only: return each image's iterate with the highest loss, even if its class
            is unchanged, to attack another model with it.

    Returns:
        (B, 3, H, W) images; without `highest_loss`, an image is unchanged if its class could not be changed.

    Raises:
        ValueError: If an argument is out of range, or doesn't go with the loss, or there are fewer than four classes
            for `"targeted_dlr"`.
        ImportError: If `pyautoattack` is not installed.

    Source: Croce & Hein, ICML 2020, arXiv 2003.01690.
    """
    if loss not in get_args(ApgdLoss):
        raise ValueError(f"loss must be one of {get_args(ApgdLoss)}, got {loss!r}")
    counts = {"num_steps": num_steps, "num_restarts": num_restarts, "num_target_classes": num_target_classes}
    eps = check_attack(images, eps=eps, **counts)
    targeted = loss == "targeted_dlr"
    if targeted and highest_loss:
        raise ValueError('highest_loss is for loss="cross_entropy": with "targeted_dlr" each target has its own')
    model, images, labels, num_targets = _prepare(
        logits_fn, images, labels, target_classes=num_target_classes if targeted else None
    )
    if eps == 0:
        return images
    settings: dict[str, Any] = {"n_iter": num_steps, "n_restarts": num_restarts, "eps": eps, "seed": seed}
    with _left_as_found(images.device):
        parts = _package("pyautoattack.autopgd_base")
        if targeted:
            settings["n_target_classes"] = num_targets
        attack = (parts.APGDAttack_targeted if targeted else parts.APGDAttack)(
            model, norm="Linf", device=images.device, logger=logger, **settings
        )
        with torch.no_grad():  # it turns gradients on where it wants them
            if highest_loss:
                torch.manual_seed(seed)  # it does so itself only without best_loss
                adversarial: Tensor = attack.perturb(images, labels, best_loss=True)
            else:
                adversarial = attack.perturb(images, labels)
    return adversarial.detach()


def _prepare(
    logits_fn: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor, *, target_classes: int | None
) -> tuple[Callable[[Tensor], Tensor], Tensor, Tensor, int]:
    """Checks the arguments; returns float32 logits, contiguous images, int64 labels and the number of targets."""
    if images.dtype != torch.float32:
        raise ValueError(f"images must be float32, got {images.dtype}: AutoAttack knows no other precision")
    labels, highest_label = class_labels(labels)

    def model(x: Tensor) -> Tensor:
        x = x.clone()  # logits_fn may work in place
        if x.requires_grad:
            x.register_hook(lambda gradient: gradient.contiguous())  # the package can't take channels_last
        # Square writes into the logits, which the caller may keep.
        return as_tensor(logits_fn(x), "logits").float().clone()

    if labels.shape != images.shape[:1]:
        raise ValueError(f"labels must have shape {tuple(images.shape[:1])}, got {tuple(labels.shape)}")
    with torch.no_grad():
        logits = model(images[:1])
    check_logits(logits, labels[:1], highest_label)
    num_classes = logits.shape[1]
    if target_classes is not None and num_classes < 4:
        raise ValueError(f"the targeted DLR loss needs at least 4 classes, got {num_classes}: use the cross-entropy")
    images = images.detach().clone(memory_format=torch.contiguous_format)
    return model, images, labels, min(target_classes or 1, num_classes - 1)


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as exc:
        raise ImportError("AutoAttack needs pyautoattack: pip install 'robustness-tokens[eval]'") from exc


@contextmanager
def _left_as_found(device: torch.device) -> Iterator[None]:
    """Restores torch's default generators and the trace function, both of which the package changes."""
    trace = sys.gettrace()
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            sys.settrace(trace)
