"""The folder of a run: what a resumed run takes up, what a new one replaces, and what both must have in common."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from .checkpoints import Checkpoint, find_checkpoint, is_own_checkpoint, list_checkpoints
from .configuration import RobustnessTokenConfig
from .hub import remove_report
from .training_args import RobustnessTokenTrainingArguments
from .training_log import EVAL_LOG_COLUMNS, EVAL_LOG_FILE, LOG_FILE, read_log, start_log


class RunSoFar(NamedTuple):
    """Where a run goes on: its checkpoint, None for a new run, and the rows of its logs up to there."""

    checkpoint: Checkpoint | None
    log_history: list[dict[str, float]]
    eval_history: list[dict[str, float]]


def resume_settings(
    config: RobustnessTokenConfig,
    args: RobustnessTokenTrainingArguments,
    *,
    recipe: Mapping[str, Any],
    num_images: int | None,
    adversarial_pairs: Any,
) -> dict[str, Any]:
    """What a resumed run must have in common with the one it resumes; JSON.

    Args:
        config: Of the model.
        args: Of the training.
        recipe: What determines the tokens.
        num_images: To train on, if that is known.
        adversarial_pairs: What tells these pairs from others, if there are any.
    """
    settings = {
        **recipe,
        "base_model_fingerprint": config.base_model_fingerprint,
        "feature_view": config.feature_view,
        "similarity_axis": config.similarity_axis,
        "image_mean": list(config.image_mean or ()),
        "image_std": list(config.image_std or ()),
    }
    known = {"num_images": num_images, "adversarial_pairs": adversarial_pairs}
    settings |= {name: value for name, value in known.items() if value is not None}
    if not args.schedule_depends_on_max_steps:
        del settings["max_steps"]
    return settings


def read_run(
    args: RobustnessTokenTrainingArguments, *, settings: Mapping[str, Any], shape: tuple[int, ...]
) -> RunSoFar:
    """Reads the run to go on from, as `args.resume_from_checkpoint` says.

    Args:
        args: Of the training.
        settings: From [`resume_settings`].
        shape: Of the tokens, (K, D).

    Raises:
        ValueError: If its checkpoint doesn't fit, or is beyond `args.max_steps`.
    """
    checkpoint = find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint, settings=settings, shape=shape)
    if checkpoint is None:
        return RunSoFar(None, [], [])
    if checkpoint.step > args.max_steps:
        raise ValueError(f"{checkpoint.folder} is beyond max_steps={args.max_steps}: raise it, or start anew")
    folder, step = checkpoint.folder.parent, checkpoint.step
    eval_history = read_log(folder / EVAL_LOG_FILE, last_step=step, columns=EVAL_LOG_COLUMNS)
    return RunSoFar(checkpoint, read_log(folder / LOG_FILE, last_step=step), eval_history)


def open_run(args: RobustnessTokenTrainingArguments, run: RunSoFar) -> None:
    """Makes `args.output_dir` ready: without another run's checkpoints, and with the logs up to now.

    Args:
        args: Of the training.
        run: From [`read_run`].

    Raises:
        OSError: If it can't be written.
    """
    output_dir = Path(args.output_dir)
    if not is_own_checkpoint(output_dir, args.resume_from_checkpoint):
        for _, folder in list_checkpoints(output_dir):
            shutil.rmtree(folder)
    remove_report(output_dir)
    start_log(output_dir / LOG_FILE, run.log_history)
    if run.eval_history or args.eval_steps is not None:
        start_log(output_dir / EVAL_LOG_FILE, run.eval_history, columns=EVAL_LOG_COLUMNS)
    else:
        (output_dir / EVAL_LOG_FILE).unlink(missing_ok=True)
