"""evaluate_robustness: attacks a model at every level of knowledge and reports the numbers."""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from ..attacks import DEFAULT_EPS
from ..configuration import TOKENS, TokenState, state_digest
from ..data import Normalizer, check_label_range, check_same_classes, choose_rows, prepare_images
from ..models import ProbedModel, as_state, label_names, random_state
from ..report import RobustnessReport
from ..utils import __version__, digest, process_state
from .arguments import EvaluationArguments, override_arguments, training_settings
from .attack_suite import AttackBatch, on_8bit_grid
from .cells import CellStore, measure_outcome, merge, run_cells
from .checks import run_checks
from .figures import make_figures
from .images import load_batches, measured_images
from .measurements import Measurements, sweep_curves
from .own_tokens import describe_training, initializer_range, own_tokens_specs, shortened, train_own_tokens
from .plan import BUDGETS, apply_arguments, plan_cells
from .threat_models import EvaluatedModel, attacker_views


MAX_CACHE_BYTES = 2 << 30


def evaluate_robustness(
    model: nn.Module,
    dataset: Any,
    arguments: EvaluationArguments | None = None,
    *,
    own_tokens: Sequence[Tensor | TokenState] | None = None,
    attacker_datasets: Sequence[Any] | None = None,
    own_tokens_overrides: Mapping[str, Any] | None = None,
    surrogate: nn.Module | None = None,
    normalizer: Normalizer | None = None,
    **overrides: Any,
) -> RobustnessReport:
    """Attacks a model that has robustness tokens, at every level of attacker knowledge, and reports what holds.

    Under `accelerate launch` the processes share the images and find the same numbers as one process (except
    with own tokens, since the processes share the batches of their training too).

    Args:
        model: `RobustnessTokenModel` (features), `RobustnessTokenForImageClassification`, a `ProbedModel`, or a
            transformers model after `inject_tokens`.
        dataset: Map-style, with labels if the task needs them: a `datasets.Dataset` of pictures (with class labels,
            or for segmentation with the columns "image" and "mask"), or a torch dataset of {"images": (3, H, W) float
            in [0, 1], "labels": class, or (H, W) classes of the pixels}.
        arguments: Settings; the defaults of [`EvaluationArguments`] if None.
        own_tokens: Tokens that the attacker has trained already, each as [`inject_tokens`] takes them; trained here if
            None.
        attacker_datasets: One or more datasets that the attacker trains own tokens on; `[dataset]` if None.
        own_tokens_overrides: Training arguments of the attacker that differ from the adapter's recipe.
        surrogate: Another base for transfer attacks, as a model with tokens (which are not used) and the same
            classes. It is put into eval mode and moved to the model's device.
        normalizer: [0, 1] images -> pixel values; by default from the adapter's config.
        overrides: Fields of [`EvaluationArguments`], such as `eps=[4 / 255]`, that replace those of `arguments`.

    Returns:
        The report, the same on every process.

    Raises:
        TypeError: If an override is no field of `EvaluationArguments`.
        ValueError: If an argument is out of range or does not fit the others, or no attack fits.
    """
    start = time.perf_counter()
    arguments = override_arguments(arguments, overrides)
    was_training = model.training
    model.eval()
    state = process_state()
    if state.num_processes > 1:
        model.to(state.device)
    try:
        evaluated = EvaluatedModel(
            model,
            task=arguments.task,
            normalizer=normalizer,
            feature_view=arguments.feature_view,
            attack_precision=arguments.attack_precision,
        )
        eps = arguments.eps or [evaluated.recipe.get("eps") or DEFAULT_EPS]
        budget = apply_arguments(BUDGETS[arguments.budget], arguments)
        processor = None if evaluated.adapter is None else evaluated.adapter.image_processor
        images = prepare_images(
            dataset,
            task=evaluated.task,
            image_processor=processor,
            image_size=arguments.image_size,
            recipe=evaluated.recipe,
            image_column_name=arguments.image_column_name,
            label_column_name=arguments.label_column_name,
            mask_column_name=arguments.mask_column_name,
            label_names=label_names(model) if arguments.label_matching == "name" else None,
            broken_images=True,
        )
        assert images.num_images is not None  # streams are refused
        rows = choose_rows(images.num_images, budget.num_images, seed=arguments.seed)
        batches = load_batches(
            images.dataset, rows, evaluated, batch_size=arguments.batch_size, ignore_index=arguments.ignore_index
        )
        num_classes = _count_classes(evaluated, batches)
        other = None
        if surrogate is not None:
            if arguments.label_matching == "name":
                check_same_classes(label_names(model), label_names(surrogate), whose="model and surrogate")
            surrogate.eval().to(evaluated.device)
            other = EvaluatedModel(surrogate, task=evaluated.task, attack_precision=evaluated.attack_precision)
        with _folder(arguments.output_dir) as folder:
            training: dict[str, dict[str, Any]] = {}
            if "own_tokens" in arguments.knowledge and own_tokens is None:
                theirs = [images.dataset] if attacker_datasets is None else attacker_datasets
                changes = shortened(evaluated.recipe, arguments.own_tokens_steps)
                changes |= training_settings(arguments, of_tables=attacker_datasets is not None)
                changes |= dict(own_tokens_overrides or {})
                trained = train_own_tokens(
                    evaluated,
                    own_tokens_specs(
                        budget.num_own_tokens,
                        num_robustness_tokens=evaluated.tokens[TOKENS].shape[-2],
                        recipe_seed=evaluated.recipe.get("seed"),
                        num_datasets=len(theirs),
                    ),
                    theirs,
                    folder / "own_tokens",
                    num_adversarial_pairs=budget.num_adversarial_pairs,
                    overrides=changes,
                    disable_tqdm=arguments.disable_tqdm,
                )
                own_tokens = [own.tokens for own in trained]
                training = describe_training(
                    evaluated, trained, overrides=changes, on_evaluated=attacker_datasets is None
                )
            views = [
                view
                for level in dict.fromkeys(arguments.knowledge)
                for view in attacker_views(
                    level,  # type: ignore[arg-type]
                    evaluated,
                    own_tokens=[as_state(tokens) for tokens in own_tokens or ()],
                    surrogate=other,
                )
            ]
            cells = plan_cells(
                evaluated,
                views,
                arguments,
                budget,
                eps=eps,
                num_images=len(rows),
                num_classes=num_classes,
                on_grid=all(gather_object([on_8bit_grid(batch.images) for batch in batches.values()])),
            )
            batches = _with_base_features(evaluated, batches)
            tokens = reported_tokens(evaluated, seed=arguments.seed)
            store = CellStore(
                None if arguments.output_dir is None else folder / "cells",
                _settings(evaluated, batches, tokens, arguments),
            )
            parts = [(row, measure_outcome(evaluated, one, one.images, tokens)) for row, one in batches.items()]
            clean = merge(gather_object(parts))
            outcomes = run_cells(
                cells,
                evaluated,
                batches,
                tokens,
                clean,
                batch_size=arguments.batch_size,
                seed=arguments.seed,
                store=store,
                disable_tqdm=arguments.disable_tqdm,
            )
        measurements = Measurements(
            model=evaluated,
            batches=batches,
            clean=clean,
            cells=cells,
            outcomes=outcomes,
            eps=eps,
            seed=arguments.seed,
        )
        checks, results = run_checks(measurements), measurements.results()
        series = sweep_curves(results)
        figures = make_figures(measurements, series) if state.is_main_process else {}
    finally:
        model.train(was_training)
    config: Any = None if evaluated.adapter is None else evaluated.adapter.config
    base_model = config.base_model_name_or_path if config is not None else getattr(model, "name_or_path", "")
    return RobustnessReport(
        package_version=__version__,
        adapter=getattr(evaluated.adapter, "name_or_path", "") or type(model).__name__,
        adapter_digest=state_digest(evaluated.learned),
        base_model=base_model or type(model).__name__,
        base_model_revision=None if config is None else config.base_model_revision,
        dataset={
            "name": arguments.dataset_name or images.description.get("name") or type(dataset).__name__,
            "split": images.description.get("split"),
            "num_images": len(rows),
        },
        images=measured_images(batches, rows),
        budget=arguments.budget,
        seed=arguments.seed,
        results=results,
        checks=checks,
        series=series,
        own_tokens=training,
        base_has_own_head=isinstance(model, ProbedModel) and model.base_head is not None,
        figures=figures,
        seconds=time.perf_counter() - start,
    )


@contextmanager
def _folder(output_dir: str | os.PathLike[str] | None) -> Iterator[Path]:
    """Yields the folder to work in, the same on every process; a temporary one if none is given."""
    if output_dir is not None:
        yield Path(output_dir)
        return
    state = process_state()
    with tempfile.TemporaryDirectory() as own:
        (name,) = broadcast_object_list([own])
        yield Path(name)
        state.wait_for_everyone()  # before the folder that all processes used is deleted


def reported_tokens(model: EvaluatedModel, *, seed: int) -> dict[str, TokenState | None]:
    """Returns the tokens to measure clean and grey-box images with, by name; `None` for the base alone.

    If untrained, random, zero or averaged tokens defend as well as the trained ones, the defence was not learned.
    Untrained and zero tokens have no gains and shifts, averaged ones keep the trained ones. Random has the norms of
    what was learned, per token and per tensor of gains and shifts, in random directions.
    """
    state = model.tokens
    trained = state[TOKENS]
    # Another seed than a training's, whose first tokens would be the same random numbers.
    noise = torch.randn(trained.shape, generator=torch.Generator().manual_seed(~seed)).to(trained)
    return {
        "trained": state,
        "none": None,
        "untrained": {TOKENS: noise * initializer_range(model)},
        "random": random_state(state, seed=~seed),
        "zero": {TOKENS: torch.zeros_like(trained)},
        "mean": state | {TOKENS: trained.mean(dim=-2, keepdim=True).expand_as(trained).contiguous()},
    }


@torch.no_grad()
def _with_base_features(model: EvaluatedModel, batches: Mapping[int, AttackBatch]) -> dict[int, AttackBatch]:
    """Returns the batches with the base's clean features, which every measurement needs, if memory allows."""
    kept = dict(batches)
    if model.feature_view is not None and batches:
        first = next(iter(batches.values()))
        size = model.features(first.images[:1], None, exact=True).nbytes
        if size * sum(len(batch.images) for batch in batches.values()) <= MAX_CACHE_BYTES:
            for number, batch in batches.items():
                features = model.features(batch.images, None, exact=True)
                kept[number] = dataclasses.replace(batch, base_features=features)
    return kept


@torch.no_grad()
def _count_classes(model: EvaluatedModel, batches: Mapping[int, AttackBatch]) -> int | None:
    """Returns the number of classes, None if there are none; `ValueError` unless all labels are classes."""
    if model.task == "features":
        return None
    counts = gather_object([model.logits(batch.images[:1], None).shape[1] for batch in list(batches.values())[:1]])
    labels = set()
    for batch in batches.values():
        assert batch.labels is not None
        labels |= set(batch.labels.unique().tolist()) - (
            {batch.ignore_index} if model.task == "segmentation" else set()
        )
    check_label_range(gather_object(list(labels)), counts[0])
    return int(counts[0]) if model.task == "classification" else None


def _settings(
    model: EvaluatedModel,
    batches: Mapping[int, AttackBatch],
    tokens: Mapping[str, TokenState | None],
    arguments: EvaluationArguments,
) -> dict[str, Any]:
    """Returns the settings on which the outcome of every cell depends, as JSON values."""
    parts = gather_object(  # a process may have no batch
        [
            (number, digest([batch.images, batch.index, *([] if batch.labels is None else [batch.labels])]))
            for number, batch in batches.items()
        ]
    )
    return {
        "model": model.identity,
        "measured_with": {name: None if state is None else digest(state) for name, state in tokens.items()},
        "images": [sha for _, sha in sorted(parts)],
        "ignore_index": [arguments.ignore_index],
        "batch_size": arguments.batch_size,
        "seed": arguments.seed,
        "versions": {"package": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
