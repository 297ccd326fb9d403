"""evaluate_robustness: every attacker, every attack, image by image, and then the numbers."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from ..configuration import FeatureView
from ..data import Normalizer, choose_rows, describe_dataset
from ..models import MixedPrecision
from ..report import RobustnessReport
from ..utils import __version__, process_state
from .attack_suite import Attack, AttackBatch, on_8bit_grid
from .cells import CellStore, digest, merge, model_settings, run_cells
from .checks.run import run_checks
from .figures import make_figures
from .images import load_batches, prepare_dataset
from .measurements import Measurements, sweep_curves
from .outcomes import measure_outcome
from .own_tokens import OwnTokens, describe_training, own_tokens_specs, train_own_tokens
from .plan import BUDGETS, Budget, BudgetName, plan_cells, with_overrides
from .threat_models import AttackerView, EvaluatedModel, Knowledge, Task, attacker_views


ALL_KNOWLEDGE: tuple[Knowledge, ...] = get_args(Knowledge)
SWEEP_EPS = tuple(level / 255 for level in (0, 0.5, 1, 2, 4, 8, 16, 32))
DEFAULT_EPS = 4 / 255

MAX_CACHE_BYTES = 2 << 30


def evaluate_robustness(
    model: nn.Module,
    dataset: Any,
    *,
    task: Task | None = None,
    knowledge: Sequence[Knowledge] = ALL_KNOWLEDGE,
    attacks: Sequence[str | Attack] | None = None,
    eps: Sequence[float] | None = None,
    eps_sweep: Sequence[float] = SWEEP_EPS,
    budget: BudgetName = "quick",
    num_images: int | None = None,
    num_steps: int | None = None,
    num_restarts: int | None = None,
    num_queries: int | None = None,
    num_own_tokens: int | None = None,
    own_tokens: Sequence[Tensor] | None = None,
    attacker_datasets: Sequence[Any] | None = None,
    own_tokens_overrides: Mapping[str, Any] | None = None,
    surrogate: nn.Module | None = None,
    diagnostics: bool = True,
    seed: int = 0,
    batch_size: int = 100,
    output_dir: str | os.PathLike[str] | None = None,
    normalizer: Normalizer | None = None,
    feature_view: FeatureView | None = None,
    image_size: int | None = None,
    ignore_index: int = 255,
    attack_precision: MixedPrecision | None = None,
    dataset_name: str | None = None,
    disable_tqdm: bool = False,
) -> RobustnessReport:
    """Attacks a model with its tokens by all that an attacker may know, and reports what holds.

    Under `accelerate launch` the processes share the images, and the numbers stay the same (but for tokens that the
    attacker trains, whose batches they share too). What is finished is kept in `output_dir` and not run again.

    Args:
        model: `RobustnessTokenModel` (features), `RobustnessTokenForImageClassification`, a `ProbedModel`, or a
            transformers model that `inject_tokens` was called on.
        dataset: Map-style, with labels for a task that has them; see
            [`~robustness_tokens.evaluation.images.prepare_dataset`].
        task: `"features"`, `"classification"` or `"segmentation"`; by default what the model says.
        knowledge: Levels of the attacker: `"none"`, `"base"`, `"own_tokens"`, `"full"`.
        attacks: Names (a feature attack with its target, such as `"feature_cosine:defended"`) or `Attack`s, tried at
            every level that they fit, each on all images; by default the budget's, of which some take the images that
            those before them left right.
        eps: Budgets in pixel units at which all attacks run; by default that of the adapter's training if it was
            trained with `attack="pgd"`, else 4/255.
        eps_sweep: Budgets in pixel units for the curve, on fewer images with the main attack alone; empty for none.
        budget: `"quick"`, `"standard"` or `"full"`: how many images, steps and attacks.
        num_images: Instead of the budget's; at most what the dataset has are taken.
        num_steps: Of PGD, instead of the budget's.
        num_restarts: Of PGD and APGD, instead of the budget's.
        num_queries: Of Square, instead of the budget's.
        num_own_tokens: How many sets of tokens the attacker trains, instead of the budget's.
        own_tokens: (K, D) each, already trained by the attacker; then none are trained here.
        attacker_datasets: Images that the attacker trains on, one or more datasets; by default the evaluated one.
        own_tokens_overrides: Training arguments in which the attacker departs from the recipe.
        surrogate: Another model with tokens (they are not used) for transfer attacks, of the same classes; it is left
            in eval mode, on the model's device.
        diagnostics: Also run what the checks look at: more steps and restarts, a single step, an unbounded attack.
        seed: Of the choice of images, the attacks and the intervals.
        batch_size: Images attacked together, at most.
        output_dir: Where finished parts are kept, in `cells/` and `own_tokens/`; `None` keeps nothing.
        normalizer: [0, 1] images -> pixel values; by default from the adapter's config.
        feature_view: What the features are; by default from the adapter's config.
        image_size: Side in pixels that pictures are squashed to; by default what the image processor makes.
        ignore_index: Label of the pixels that don't count.
        attack_precision: `"bf16"` lets attacks run under autocast, by default where the tokens were trained so, and
            never where the device has no bfloat16; what is measured is always float32.
        dataset_name: For the report; by default what the dataset says.
        disable_tqdm: No progress bars.

    Returns:
        The report, the same on every process.

    Raises:
        ValueError: If an argument is out of range or doesn't fit the others, or no attack fits.
    """
    start = time.perf_counter()
    was_training = model.training
    model.eval()
    state = process_state()
    if state.num_processes > 1:
        model.to(state.device)
    try:
        evaluated = EvaluatedModel(
            model, task=task, normalizer=normalizer, feature_view=feature_view, attack_precision=attack_precision
        )
        spent = with_overrides(
            _budget(budget),
            num_images=num_images,
            num_steps=num_steps,
            num_restarts=num_restarts,
            num_queries=num_queries,
            num_own_tokens=num_own_tokens,
        )
        processor = None if evaluated.adapter is None else evaluated.adapter.image_processor
        prepared = prepare_dataset(dataset, task=evaluated.task, image_processor=processor, image_size=image_size)
        rows = choose_rows(len(prepared), spent.num_images, seed=seed)  # type: ignore[arg-type]  # it can be counted
        batches = load_batches(prepared, rows, evaluated, batch_size=batch_size, ignore_index=ignore_index)
        with _folder(output_dir) as folder:
            training = ["elsewhere, so that how is not known"]
            if "own_tokens" in knowledge and own_tokens is None:
                theirs = [prepared] if attacker_datasets is None else attacker_datasets
                trained = _train(
                    evaluated,
                    theirs,
                    folder / "own_tokens",
                    spent,
                    overrides=own_tokens_overrides,
                    disable_tqdm=disable_tqdm,
                )
                own_tokens = [own.tokens for own in trained]
                training = describe_training(
                    evaluated, trained, overrides=own_tokens_overrides, on_evaluated=attacker_datasets is None
                )
            measurements = measure(
                evaluated,
                batches,
                num_images=len(rows),
                views=_views(evaluated, knowledge, own_tokens or (), surrogate),
                training=training,
                attacks=attacks,
                eps=_default_eps(evaluated) if eps is None else eps,
                eps_sweep=eps_sweep,
                budget=spent,
                diagnostics=diagnostics,
                seed=seed,
                batch_size=batch_size,
                cells_folder=None if output_dir is None else folder / "cells",
                disable_tqdm=disable_tqdm,
            )
        checks, results = run_checks(measurements), measurements.results()
        series = sweep_curves(results)
        figures = make_figures(measurements, series) if state.is_main_process else {}
    finally:
        model.train(was_training)
    described = describe_dataset(dataset)
    config: Any = None if evaluated.adapter is None else evaluated.adapter.config
    base_model = config.base_model_name_or_path if config is not None else getattr(model, "name_or_path", "")
    return RobustnessReport(
        package_version=__version__,
        adapter=getattr(evaluated.adapter, "name_or_path", "") or type(model).__name__,
        base_model=base_model or type(model).__name__,
        base_model_revision=None if config is None else config.base_model_revision,
        dataset={
            "name": dataset_name or described.get("name") or type(dataset).__name__,
            "split": described.get("split"),
            "num_images": len(rows),
        },
        budget=budget,
        seed=seed,
        results=results,
        checks=checks,
        series=series,
        figures=figures,
        seconds=time.perf_counter() - start,
    )


def _train(
    model: EvaluatedModel,
    attacker_datasets: Sequence[Any],
    folder: Path,
    budget: Budget,
    *,
    overrides: Mapping[str, Any] | None,
    disable_tqdm: bool,
) -> list[OwnTokens]:
    if model.feature_view is None:
        raise ValueError(
            'knowledge "own_tokens" needs the features that tokens are trained on: give feature_view or own_tokens, '
            "or leave the level out"
        )
    recipe = (None if model.adapter is None else model.adapter.config.training) or {}
    specs = own_tokens_specs(
        budget.num_own_tokens,
        num_robustness_tokens=len(model.tokens),
        recipe_seed=recipe.get("seed"),
        num_datasets=len(attacker_datasets),
    )
    return train_own_tokens(
        model,
        specs,
        attacker_datasets,
        folder,
        num_adversarial_pairs=budget.num_adversarial_pairs,
        overrides=overrides,
        disable_tqdm=disable_tqdm,
    )


def _views(
    model: EvaluatedModel, knowledge: Sequence[Knowledge], own_tokens: Sequence[Tensor], surrogate: nn.Module | None
) -> list[AttackerView]:
    if isinstance(knowledge, str) or not knowledge:
        raise ValueError(f"knowledge must be a list of at least one of {ALL_KNOWLEDGE}, got {knowledge!r}")
    other = None
    if surrogate is not None:
        surrogate.eval().to(model.device)
        other = EvaluatedModel(surrogate, task=model.task, attack_precision=model.attack_precision)
    return [
        view
        for level in dict.fromkeys(knowledge)
        for view in attacker_views(level, model, own_tokens=own_tokens, surrogate=other)
    ]


def _budget(name: str) -> Budget:
    if name not in BUDGETS:
        raise ValueError(f"budget must be one of {list(BUDGETS)}, got {name!r}")
    return BUDGETS[name]


def _default_eps(model: EvaluatedModel) -> list[float]:
    recipe = (None if model.adapter is None else model.adapter.config.training) or {}
    return [recipe.get("eps") or DEFAULT_EPS]


@contextmanager
def _folder(output_dir: str | os.PathLike[str] | None) -> Iterator[Path]:
    """The folder to work in, the same on every process; one that goes afterwards if none is given."""
    if output_dir is not None:
        yield Path(output_dir)
        return
    state = process_state()
    with tempfile.TemporaryDirectory() as own:
        (name,) = broadcast_object_list([own])
        yield Path(name)
        state.wait_for_everyone()  # before the one that all have used goes


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
