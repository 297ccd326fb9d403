"""The folder of a run: what a resumed run reads and a new run replaces, and the logs."""

from __future__ import annotations

import csv
import io
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..configuration import RobustnessTokenConfig
from ..hub import check_no_other_model, holds_adapter
from ..models import (
    RobustnessTokenPreTrainedModel,
    attention_configs,
    choose_attention,
    onednn_is_faster,
    runs_in_half,
)
from ..utils import LEFTOVERS, __version__, write_text
from .arguments import RobustnessTokenTrainingArguments
from .checkpoints import STATE_FILE, Checkpoint, Shapes, find_checkpoint, list_checkpoints
from .losses import METRICS


LOG_FILE = "logs/training_log.csv"
LOG_COLUMNS = ("step", *METRICS, "learning_rate", "seconds")

EVAL_LOG_FILE = "logs/eval_log.csv"
EVAL_LOG_COLUMNS = ("step", *(f"eval_{name}" for name in METRICS), "eval_num_images")

logger = logging.getLogger(__name__)

_STATE = {"rounding", "position", "previous_recipe", "scheduler", "callbacks"}  # what the trainer stores


def to_csv(rows: Sequence[Mapping[str, float]], columns: Sequence[str] = ()) -> str:
    """Returns rows as comma-separated values under a header, by default the keys of the first row."""
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=columns or list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


def start_log(path: Path, rows: Sequence[Mapping[str, float]] = (), *, columns: Sequence[str] = LOG_COLUMNS) -> None:
    """Writes a log with these rows, replacing any that is there; raises `OSError` if it cannot."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for leftover in path.parent.glob(LEFTOVERS):  # of a run that was killed
            leftover.unlink()
        write_text(path, to_csv(rows, columns))
    except OSError as exc:
        raise _unwritable(path, exc) from exc


def append_to_log(path: Path, row: Mapping[str, float]) -> None:
    """Adds a row to a log that [`start_log`] began; raises `OSError` if it cannot."""
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, fieldnames=list(row), lineterminator="\n").writerow(row)
    except OSError as exc:
        raise _unwritable(path, exc) from exc


def read_log(path: Path, *, last_step: int, columns: Sequence[str] = LOG_COLUMNS) -> list[dict[str, float]]:
    """Reads the rows up to `last_step`; later ones were written after the checkpoint. A missing file has no rows."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        whole = [row for row in csv.DictReader(file) if all(row.get(column) for column in columns)]
    rows = [{"step": int(row.pop("step")), **{key: float(value) for key, value in row.items()}} for row in whole]
    return [row for row in rows if row["step"] <= last_step]


def _unwritable(path: Path, exc: OSError) -> OSError:
    return OSError(
        exc.errno,
        f"the log {path} could not be written ({exc.strerror}); checkpoints are unchanged: make room, or fix the "
        "permissions, and resume with resume_from_checkpoint=True",
    )


def check_output_dir(output_dir: Path, *, overwrite: bool, resume_from: str | bool | None) -> None:
    """Raises `ValueError` for a folder that is not writable, or holds what a run must not replace; writes nothing."""
    resolved = output_dir.resolve()
    existing = next(path for path in (resolved, *resolved.parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        problem = "not writable" if existing.is_dir() else "not a folder"
        raise ValueError(
            f"output_dir={str(output_dir)!r} can't be used, because {existing} is {problem}: choose another"
        )
    check_no_other_model(output_dir)
    used = holds_adapter(output_dir) or list_checkpoints(output_dir)
    if used and not overwrite and not is_own_checkpoint(output_dir, resume_from):
        raise ValueError(
            f"{output_dir} holds an adapter or checkpoints already: choose another output_dir, or set "
            "overwrite_output_dir=True to replace them, or, where there are checkpoints, "
            "resume_from_checkpoint=True to go on"
        )


def is_own_checkpoint(output_dir: Path, resume_from: str | bool | None) -> bool:
    """Tells whether `resume_from` means a checkpoint in the run's own folder."""
    if resume_from is True:
        return bool(list_checkpoints(output_dir))
    return resume_from is not None and Path(str(resume_from)).resolve().parent == output_dir.resolve()


class RunSoFar(NamedTuple):
    """The state to resume from: the checkpoint, None for a new run, and the rows of both logs up to it."""

    checkpoint: Checkpoint | None
    log_history: list[dict[str, float]]
    eval_history: list[dict[str, float]]


def resume_settings(
    config: RobustnessTokenConfig,
    args: RobustnessTokenTrainingArguments,
    *,
    recipe: Mapping[str, Any],
    num_images: int | None,
    eval_images_digest: str | None,
) -> dict[str, Any]:
    """Returns the settings that a resumed run must share with its checkpoint, as JSON values."""
    settings = {
        **recipe,
        "feature_view": config.feature_view,
        "similarity_axis": config.similarity_axis,
        "image_mean": list(config.image_mean or ()),
        "image_std": list(config.image_std or ()),
    }
    known = {"num_images": num_images, "eval_images_digest": eval_images_digest}
    settings |= {name: value for name, value in known.items() if value is not None}
    if not args.schedule_depends_on_max_steps:
        del settings["max_steps"]
    return settings


def rounding_settings(
    model: RobustnessTokenPreTrainedModel, args: RobustnessTokenTrainingArguments, *, device: torch.device
) -> dict[str, Any]:
    """Returns the settings that a resumed run must share with its checkpoint to be bit-equal, as JSON values."""
    base, on_cpu = model.get_base_model(), device.type == "cpu"
    half_precision = runs_in_half(args.mixed_precision, device=device)
    attention = choose_attention(args.train_attn_implementation, device=device, half_precision=half_precision)
    return {
        "half_precision": half_precision,
        "torch_compile": args.torch_compile,
        "onednn": args.onednn and onednn_is_faster(device=device, half_precision=half_precision),
        "attn_implementation": attention or _own_attention(base),
        "dtype": str(next(base.parameters()).dtype),
        "device": device.type,
        "num_threads": torch.get_num_threads() if on_cpu else None,
        "torch": torch.__version__,
        "package": __version__,
    }


def _own_attention(base: nn.Module) -> str:
    """Names the attention of all parts of a base of transformers or timm."""
    found = {str(config._attn_implementation) for config in attention_configs(base)}
    found |= {"sdpa" if module.fused_attn else "eager" for module in base.modules() if hasattr(module, "fused_attn")}
    return ", ".join(sorted(found))


def read_run(
    args: RobustnessTokenTrainingArguments,
    *,
    settings: Mapping[str, Any],
    rounding: Mapping[str, Any],
    shapes: Shapes,
) -> RunSoFar:
    """Reads the run that `args.resume_from_checkpoint` names; warns if its rounding settings differ.

    `ValueError` if its checkpoint does not fit, lacks what the trainer stores, or is beyond `args.max_steps`.
    """
    checkpoint = find_checkpoint(Path(args.output_dir), args.resume_from_checkpoint, settings=settings, shapes=shapes)
    if checkpoint is None:
        return RunSoFar(None, [], [])
    if checkpoint.step > args.max_steps:
        raise ValueError(f"{checkpoint.folder} is beyond max_steps={args.max_steps}: raise it, or start another run")
    if missing := sorted(_STATE - set(checkpoint.state)):
        raise ValueError(
            f"{checkpoint.folder} has no {missing} in {STATE_FILE}: another version of this package wrote it; resume "
            "with that version, or set overwrite_output_dir=True without resume_from_checkpoint for a new run"
        )
    stored = checkpoint.state["rounding"]
    if differing := sorted(name for name in {*stored, *rounding} if stored.get(name) != rounding.get(name)):
        changes = ", ".join(f"{name}: {stored.get(name)!r} -> {rounding.get(name)!r}" for name in differing)
        logger.warning(
            "%s was computed with other rounding settings (%s): the run goes on, but won't be bit-equal to one that "
            "was never interrupted; resume with the same settings if it must be",
            checkpoint.folder,
            changes,
        )
    folder, step = checkpoint.folder.parent, checkpoint.step
    eval_history = read_log(folder / EVAL_LOG_FILE, last_step=step, columns=EVAL_LOG_COLUMNS)
    return RunSoFar(checkpoint, read_log(folder / LOG_FILE, last_step=step), eval_history)


def open_run(args: RobustnessTokenTrainingArguments, run: RunSoFar) -> None:
    """Prepares `args.output_dir`: deletes another run's checkpoints and writes the logs up to now.

    `ValueError` if there are any and `args.overwrite_output_dir` is not set; `OSError` if it cannot be written.
    """
    output_dir = Path(args.output_dir)
    old = [] if is_own_checkpoint(output_dir, args.resume_from_checkpoint) else list_checkpoints(output_dir)
    names = ", ".join(folder.name for _, folder in old)
    if old and not args.overwrite_output_dir:
        raise ValueError(
            f"a new run would delete {names} in {output_dir} of an earlier run: train in another output_dir, or "
            "set overwrite_output_dir=True, or resume from the last of them with resume_from_checkpoint=True"
        )
    if old:
        logger.warning("overwrite_output_dir: a new run deletes %s of an earlier run in %s", names, output_dir)
    for _, folder in old:
        shutil.rmtree(folder)
    start_log(output_dir / LOG_FILE, run.log_history)
    if run.eval_history or args.eval_steps is not None:
        start_log(output_dir / EVAL_LOG_FILE, run.eval_history, columns=EVAL_LOG_COLUMNS)
    else:
        (output_dir / EVAL_LOG_FILE).unlink(missing_ok=True)
