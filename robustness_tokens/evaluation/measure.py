"""From images and attackers to what was measured: plans the cells, runs them on all processes, joins the outcomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from .. import __version__
from .attack_call import AttackBatch
from .attack_suite import Attack, on_8bit_grid
from .budgets import Budget
from .cell_runs import merge, run_cells
from .cells import CellStore, digest, model_settings
from .measurements import Measurements
from .outcomes import measure_outcome
from .plan import plan_cells
from .threat_models import AttackerView, EvaluatedModel


MAX_CACHE_BYTES = 2 << 30


def measure(
    model: EvaluatedModel,
    batches: Mapping[int, AttackBatch],
    *,
    num_images: int,
    views: Sequence[AttackerView],
    training: Sequence[str],
    attacks: Sequence[str | Attack] | None,
    eps: Sequence[float],
    eps_sweep: Sequence[float],
    budget: Budget,
    diagnostics: bool,
    seed: int,
    batch_size: int,
    cells_folder: Path | None,
    disable_tqdm: bool,
) -> Measurements:
    """Attacks the images by all that is planned, and measures what it did to each; all processes call it.

    Args:
        model: The defended model.
        batches: Of this process, by number.
        num_images: Of all processes together.
        views: What each attacker holds.
        training: How the attacker's own tokens were trained, in words.
        attacks, eps, eps_sweep, diagnostics, seed, batch_size, disable_tqdm: As for
            [`~robustness_tokens.evaluation.evaluate.evaluate_robustness`].
        budget: How much is spent.
        cells_folder: Where finished cells are kept; `None` keeps nothing.

    Returns:
        What was measured, the same on every process but for its batches.

    Raises:
        ValueError: If an eps is out of range, or no attack fits.
    """
    _check_eps(eps, eps_sweep)
    num_classes = _count_classes(model, batches)
    cells = plan_cells(
        model,
        views,
        budget=budget,
        attacks=attacks,
        eps=eps,
        eps_sweep=eps_sweep,
        diagnostics=diagnostics,
        num_images=num_images,
        batch_size=batch_size,
        num_classes=num_classes,
        on_grid=all(gather_object([on_8bit_grid(batch.images) for batch in batches.values()])),
    )
    tokens = reported_tokens(model, seed=seed)
    batches = _with_base_features(model, batches)
    store = CellStore(cells_folder, _settings(model, batches, batch_size=batch_size, seed=seed))
    clean = merge(
        gather_object(
            [(number, measure_outcome(model, batch, batch.images, tokens)) for number, batch in batches.items()]
        )
    )
    outcomes = run_cells(
        cells, model, batches, tokens, clean, batch_size=batch_size, seed=seed, store=store, disable_tqdm=disable_tqdm
    )
    return Measurements(
        model=model,
        batches=batches,
        clean=clean,
        cells=cells,
        outcomes=outcomes,
        eps=eps,
        seed=seed,
        training=training,
    )


def reported_tokens(model: EvaluatedModel, *, seed: int) -> dict[str, Tensor | None]:
    """The tokens that clean and grey-box images are measured with, by name: (K, D), or `None` for the base alone.

    A defence that untrained tokens, or their mean, provide just as well was not learned.
    """
    trained = model.tokens
    noise = torch.randn(trained.shape, generator=torch.Generator().manual_seed(seed)).to(trained)
    scale = 0.01 if model.adapter is None else model.adapter.config.initializer_range
    return {
        "trained": trained,
        "none": None,
        "untrained": noise * scale,
        "zero": torch.zeros_like(trained),
        "mean": trained.mean(dim=0, keepdim=True).expand_as(trained).contiguous(),
    }


def _check_eps(eps: Sequence[float], eps_sweep: Sequence[float]) -> None:
    if not eps:
        raise ValueError("eps must hold at least one budget, got none")
    for one in (*eps, *eps_sweep):
        if not 0 <= one <= 1:
            raise ValueError(f"eps must lie in [0, 1], in pixel units of [0, 1] images such as 4/255, got {one}")


@torch.no_grad()
def _with_base_features(model: EvaluatedModel, batches: Mapping[int, AttackBatch]) -> dict[int, AttackBatch]:
    """The batches with the base's clean features, which every measurement needs, where memory allows."""
    if model.feature_view is None or not batches:
        return dict(batches)
    first = next(iter(batches.values()))
    size = model.features(first.images[:1], None, exact=True).nbytes
    if size * sum(len(batch.images) for batch in batches.values()) > MAX_CACHE_BYTES:
        return dict(batches)
    return {
        number: dataclasses.replace(batch, base_features=model.features(batch.images, None, exact=True))
        for number, batch in batches.items()
    }


@torch.no_grad()
def _count_classes(model: EvaluatedModel, batches: Mapping[int, AttackBatch]) -> int | None:
    if model.task != "classification":
        return None
    counts = gather_object([model.logits(batch.images[:1], None).shape[1] for batch in list(batches.values())[:1]])
    return int(counts[0])


def _settings(
    model: EvaluatedModel, batches: Mapping[int, AttackBatch], *, batch_size: int, seed: int
) -> dict[str, Any]:
    """What the outcome of every cell depends on; JSON values."""
    parts = gather_object(  # a process may have none
        [
            (
                number,
                digest([batch.images, batch.index] + ([] if batch.labels is None else [batch.labels])),
                batch.ignore_index,
            )
            for number, batch in batches.items()
        ]
    )
    return {
        "model": model_settings(model),
        "defended_tokens": digest([model.tokens]),
        "images": [sha for _, sha, _ in sorted(parts)],
        "ignore_index": sorted({ignore_index for _, _, ignore_index in parts}),
        "batch_size": batch_size,
        "seed": seed,
        "package_version": __version__,
    }
