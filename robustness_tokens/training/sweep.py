"""Trains a grid of tokens on the same pairs: numbers of tokens (the paper's ablation), learning rates and seeds."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import math
import shutil
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from ..configuration import RobustnessTokenConfig
from ..data import AdversarialPairs, prepare_images
from ..hub import is_adapter, load_adapter
from ..models import RobustnessTokenPreTrainedModel
from ..report import plot_sweep
from ..utils import check_int, check_number, share_from_main, write_bytes, write_text
from .accelerator import build_accelerator
from .arguments import RobustnessTokenTrainingArguments
from .checkpoints import list_checkpoints
from .dataset import take_pairs, trained_on
from .make_pairs import make_adversarial_pairs
from .run_folder import EVAL_LOG_COLUMNS, EVAL_LOG_FILE, LOG_FILE, read_log, to_csv
from .step import head_settings
from .trainer import RobustnessTokenTrainer


logger = logging.getLogger(__name__)

CSV_FILE, FIGURE_FILE, PAIRS_FOLDER = "sweep.csv", "sweep.png", "pairs"
_SAME_CONFIG = (
    "base_model_fingerprint",
    "token_depth",
    "gains_and_shifts",
    "feature_view",
    "similarity_axis",
    "initializer_range",
    "image_mean",
    "image_std",
)


@dataclass(kw_only=True)
class SweepArguments:
    """Grid of a sweep, by default the paper's; `ValueError` for a list that is empty or repeats a value."""

    sweep_num_tokens: list[int] = field(
        default_factory=lambda: [1, 10, 20, 50], metadata={"help": "Numbers of tokens to train."}
    )
    sweep_learning_rates: list[float] = field(
        default_factory=lambda: [1e-3], metadata={"help": "Learning rates to train with."}
    )
    sweep_seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the initial tokens and of the image order."}
    )
    num_eval_pairs: int = field(
        default=64, metadata={"help": "Number of pairs, the last ones, that are held out to measure the tokens on."}
    )

    def __post_init__(self) -> None:
        check_int("num_eval_pairs", self.num_eval_pairs, 1)
        for name in ("sweep_num_tokens", "sweep_learning_rates", "sweep_seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must hold different values, at least one, got {values!r}")
            for value in values:
                if name == "sweep_learning_rates":
                    check_number(f"each of {name}", value, math.ulp(0))
                else:
                    check_int(f"each of {name}", value, 1 if name == "sweep_num_tokens" else 0)


def run_sweep(
    model: RobustnessTokenPreTrainedModel,
    args: RobustnessTokenTrainingArguments,
    dataset: Any,
    sweep_args: SweepArguments | None = None,
) -> list[dict[str, float]]:
    """Trains every combination of a grid on the same pairs and the same base, which is loaded once.

    `args.output_dir` gets a folder with an adapter per combination, `sweep.csv`, `sweep.png`, and the pairs if
    `dataset` holds images. A second run trains the missing combinations and keeps those that were trained on the same
    pairs by the same recipe, even outside the grid.

    Args:
        model: Gives the base and its settings. Its tokens are removed: do not use it afterwards.
        args: Arguments of every training, apart from the number of tokens, the learning rate and the seed.
        dataset: Pairs, as [`RobustnessTokenTrainer`] takes them, or images: as many as one run sees, plus the held-out
            ones, are chosen by `args.seed` and attacked.
        sweep_args: The grid; the paper's if None.

    Returns:
        A row per combination, as in `sweep.csv`, sorted; those of earlier runs are included. On the held-out pairs,
        cosines with the clean features without tokens: `invariance_cosine` (clean, with tokens), `adversarial_cosine`
        (attacked, with tokens), `baseline_cosine` (attacked, without). `train_...` are means over the last tenth of
        the steps. A combination that diverges has no row: a warning names it, and its folder is renamed to
        `<combination>.diverged`.

    Raises:
        ValueError: As [`RobustnessTokenTrainer`], or if there are too few pairs.
        FloatingPointError: If all combinations diverge.
        ImportError: If matplotlib is missing.
    """
    grid, folder, accelerator = sweep_args or SweepArguments(), Path(args.output_dir), build_accelerator(args)
    if args.resume_from_checkpoint is not None:
        raise ValueError(
            "resume_from_checkpoint has no meaning for a sweep, which keeps what is finished: run it again without"
        )
    if args.eval_steps is not None:
        raise ValueError(
            "eval_steps has no meaning for a sweep, which measures on num_eval_pairs at the end: unset it"
        )
    if find_spec("matplotlib") is None:
        raise ImportError("the figure of a sweep needs matplotlib: pip install 'robustness-tokens[plots]'")
    pairs, args = take_pairs(dataset, args=args, config=model.config)
    if not isinstance(pairs, AdversarialPairs):
        images_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        num_images = args.max_steps * images_per_step * accelerator.num_processes + grid.num_eval_pairs
        pairs_args = dataclasses.replace(args, output_dir=str(folder / PAIRS_FOLDER))
        pairs = make_adversarial_pairs(model, pairs_args, pairs, num_images=num_images)
        pairs, args = take_pairs(pairs, args=args, config=model.config)
    if (num_train := len(pairs) - grid.num_eval_pairs) < 1:
        raise ValueError(
            f"num_eval_pairs={grid.num_eval_pairs} of {len(pairs)} pairs leaves none to train on: make more pairs, or "
            "hold out fewer"
        )
    train_pairs, eval_pairs = pairs.select(range(num_train)), pairs.select(range(num_train, len(pairs)))
    images = prepare_images(train_pairs)
    known = {"image_size": images.image_size, "dataset": images.description, "num_steps_done": args.max_steps}
    recipe = {**args.recipe(), **known, "num_processes": accelerator.num_processes}
    recipe |= head_settings(args, model.get_base_model(), None) | trained_on(model, images, accelerator)
    template, model_class, image_processor, base = model.config, type(model), model.image_processor, model.unload()
    grid_values = itertools.product(grid.sweep_num_tokens, grid.sweep_learning_rates, grid.sweep_seeds)
    members = {folder / _folder_name(*values): values for values in grid_values}

    def find_rows() -> dict[Path, dict[str, float]]:
        found = {path: _read_row(path, template, recipe) for path in folder.glob("tokens-*_lr-*_seed-*[0-9]")}
        if others := sorted(path.name for path, row in found.items() if row is None and path not in members):
            logger.warning("The sweep leaves out trainings on other pairs or by another recipe: %s", ", ".join(others))
        return {
            path: row for path, row in found.items() if row and not (args.overwrite_output_dir and path in members)
        }

    def sort_rows() -> list[dict[str, float]]:
        return sorted(rows.values(), key=lambda row: tuple(row.values()))

    def write_rows() -> None:
        write_text(folder / CSV_FILE, to_csv(sort_rows()))
        write_bytes(folder / FIGURE_FILE, plot_sweep(sort_rows()))

    rows = share_from_main(find_rows, accelerator)
    if rows:
        share_from_main(write_rows, accelerator)
    for path, (num_tokens, learning_rate, seed) in members.items():
        if path in rows:
            continue
        resume = True if list_checkpoints(path) and not args.overwrite_output_dir else None
        changed: dict[str, Any] = {"output_dir": str(path), "learning_rate": learning_rate, "seed": seed}
        changed |= {"eval_steps": args.max_steps, "resume_from_checkpoint": resume}
        if not is_adapter(path):  # perhaps a save that was stopped
            changed["overwrite_output_dir"] = True
        values = {**template.to_dict(), "num_robustness_tokens": num_tokens, "training": {}}
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # for the new tokens, as `robtok train` does
            member = model_class(RobustnessTokenConfig.from_dict(values), base)
        member.image_processor = image_processor
        try:
            trainer = RobustnessTokenTrainer(member, dataclasses.replace(args, **changed), train_pairs, eval_pairs)
            trainer.train()
            if not all(math.isfinite(value) for value in trainer.eval_history[-1].values()):
                raise FloatingPointError(
                    f"the cosines on the held-out pairs are not finite: {trainer.eval_history[-1]}"
                )
            trainer.save_model()
        except FloatingPointError as exc:
            share_from_main(partial(_put_aside, path, exc), accelerator)
        else:
            rows[path] = share_from_main(partial(_read_row, path, template, recipe), accelerator)
            share_from_main(write_rows, accelerator)
        finally:
            base = member.unload()
    if not rows:
        raise FloatingPointError(f"every training of the sweep diverged, see {folder}: lower sweep_learning_rates")
    return sort_rows()


def _folder_name(num_tokens: float, learning_rate: float, seed: float) -> str:
    """Names the folder of a combination; different learning rates give different names."""
    return f"tokens-{num_tokens}_lr-{repr(learning_rate).removesuffix('.0')}_seed-{seed}"


def _read_row(folder: Path, template: RobustnessTokenConfig, recipe: Mapping[str, Any]) -> dict[str, float] | None:
    """Returns the row of a finished training by this recipe on these pairs; None if the folder holds anything else."""
    last_step = recipe["num_steps_done"]
    log = read_log(folder / LOG_FILE, last_step=last_step)
    held_out = read_log(folder / EVAL_LOG_FILE, last_step=last_step, columns=EVAL_LOG_COLUMNS)
    if not is_adapter(folder) or not log or not held_out or not log[-1]["step"] == held_out[-1]["step"] == last_step:
        return None
    found = load_adapter(folder).config
    training = found.training or {}
    own = {name: training.get(name) for name in ("learning_rate", "seed")}
    same = training == {**recipe, **own} and all(
        getattr(found, name) == getattr(template, name) for name in _SAME_CONFIG
    )
    row: dict[str, Any] = {"num_robustness_tokens": found.num_robustness_tokens, **own}
    if not same or folder.name != _folder_name(*row.values()):
        return None
    last_tenth = [step for step in log if step["step"] > 0.9 * last_step]
    first, last = log[0], log[-1]
    # The first step is slower, so it does not count if there are others.
    seconds, steps = last["seconds"] - first["seconds"], last["step"] - first["step"]
    for name in ("invariance_cosine", "adversarial_cosine", "baseline_cosine"):
        row[name] = held_out[-1][f"eval_{name}"]
    for name in ("invariance_cosine", "adversarial_cosine"):
        row[f"train_{name}"] = statistics.fmean(step[name] for step in last_tenth)
    row["seconds_per_step"] = seconds / steps if steps else last["seconds"] / last["step"]
    return row


def _put_aside(folder: Path, reason: FloatingPointError) -> None:
    """Renames the folder of a diverged run, since a second sweep would refuse its unfinished adapter."""
    aside = folder.with_name(f"{folder.name}.diverged")
    logger.warning("The sweep goes on without %s, which is renamed to %s: %s", folder.name, aside.name, reason)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
