"""Checkpoints of a training run: tensors in safetensors, progress in JSON, whole or not there at all.

No random state is stored: the order of the images and the attack's noise follow from (seed, step, example).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .hub import check_no_other_model, holds_adapter, read_json
from .training_args import LAST_CHECKPOINT


STATE_FILE = "trainer_state.json"
TENSORS_FILE = "training_tensors.safetensors"

_TOKENS = "robustness_tokens"


def save_checkpoint(
    output_dir: Path,
    *,
    step: int,
    tokens: Tensor,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    state: Mapping[str, Any],
    save_total_limit: int | None = None,
) -> Path:
    """Writes `output_dir/checkpoint-<step>`: aside first, then renamed, so that it is never seen half-written.

    Args:
        output_dir: Folder of the run.
        step: Optimiser steps done.
        tokens: (K, D).
        optimizer: Holds the tokens as its only parameter.
        settings: What a resumed run must have in common with this one; must be JSON.
        state: What else a resumed run needs; must be JSON.
        save_total_limit: Keep only so many checkpoints, the newest.

    Returns:
        The checkpoint's folder.
    """
    for leftover in output_dir.glob(".checkpoint-*.part"):  # of a run that was killed
        shutil.rmtree(leftover)
    final, partial = output_dir / f"checkpoint-{step}", _partial(output_dir, step)
    output_dir.mkdir(parents=True, exist_ok=True)
    partial.mkdir(mode=0o700)  # tokens are secrets
    tensors = {_TOKENS: tokens.detach().cpu().clone()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value).cpu() for name, value in values.items()}
    save_file(tensors, partial / TENSORS_FILE)
    (partial / TENSORS_FILE).chmod(0o600)
    content = {"step": step, "settings": dict(settings), "state": dict(state)}
    (partial / STATE_FILE).write_text(json.dumps(content, indent=1), encoding="utf-8")
    for path in (partial / TENSORS_FILE, partial / STATE_FILE, partial):
        _flush_to_disk(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush_to_disk(output_dir)
    if save_total_limit is not None:
        for old_step, old in list_checkpoints(output_dir)[:-save_total_limit]:
            # Hidden first, so that a run killed in between leaves no half of it under its own name.
            shutil.rmtree(old.rename(_partial(output_dir, old_step)))
    return final


def load_checkpoint(
    folder: Path, *, tokens: nn.Parameter, optimizer: torch.optim.Optimizer, settings: Mapping[str, Any]
) -> tuple[int, dict[str, Any]]:
    """Puts a checkpoint's tensors back into the tokens and the optimiser; nothing is changed if it doesn't fit.

    Args:
        folder: The checkpoint's.
        tokens: (K, D), written in place.
        optimizer: Holds the tokens as its only parameter.
        settings: Of this run; they must be those that were given to [`save_checkpoint`].

    Returns:
        Optimiser steps done, and the state that was given to [`save_checkpoint`].

    Raises:
        ValueError: If the checkpoint is not whole, or was made with other settings or other tokens.
    """
    if not _is_whole(folder):
        raise ValueError(f"{folder} is not a checkpoint: expected {STATE_FILE} and {TENSORS_FILE} in it")
    content = read_json(folder / STATE_FILE)
    if missing := sorted({"step", "settings", "state"} - set(content)):
        raise ValueError(f"{folder / STATE_FILE} has no {missing}: it is no checkpoint of this package, or damaged")
    _check_settings(folder, stored=content["settings"], found=settings)
    try:
        tensors = load_file(folder / TENSORS_FILE)
        stored = tensors.pop(_TOKENS)
    except (SafetensorError, KeyError) as exc:
        raise ValueError(f"{folder / TENSORS_FILE} is damaged ({exc}): resume from an earlier checkpoint") from exc
    if stored.shape != tokens.shape:
        raise ValueError(f"{folder} holds tokens of shape {tuple(stored.shape)}, the model has {tuple(tokens.shape)}")
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        _, index, name = key.split(".", 2)
        optimizer_state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": optimizer_state})
    with torch.no_grad():
        tokens.copy_(stored)
    return content["step"], content["state"]


def check_output_dir(output_dir: Path, *, overwrite: bool, resume_from_checkpoint: str | None) -> None:
    """Refuses a folder that a run can't write to, or that holds what it must not replace; nothing is written.

    Args:
        output_dir: Folder of the run, there or not.
        overwrite: Whether an adapter and checkpoints of an earlier run may be replaced.
        resume_from_checkpoint: A run that goes on from a checkpoint in this folder may replace them too.

    Raises:
        ValueError: If it is no folder or not writable, or holds another model, an adapter or checkpoints.
    """
    resolved = output_dir.resolve()
    existing = next(path for path in (resolved, *resolved.parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        problem = "not writable" if existing.is_dir() else "no folder"
        raise ValueError(
            f"output_dir={str(output_dir)!r} can't be used, because {existing} is {problem}: choose another"
        )
    check_no_other_model(output_dir)
    used = holds_adapter(output_dir) or list_checkpoints(output_dir)
    if used and not overwrite and not is_own_checkpoint(output_dir, resume_from_checkpoint):
        raise ValueError(
            f"{output_dir} holds an adapter or checkpoints already: choose another output_dir, or set "
            "overwrite_output_dir=True to replace them, or resume_from_checkpoint='last' to go on"
        )


def is_own_checkpoint(output_dir: Path, name: str | None) -> bool:
    """Whether a checkpoint given as to [`find_checkpoint`] lies in the run's folder; None is no checkpoint."""
    return name == LAST_CHECKPOINT or (name is not None and Path(name).resolve().parent == output_dir.resolve())


def find_checkpoint(output_dir: Path, name: str) -> Path:
    """The folder of a checkpoint given by path, or `"last"`: the last whole one in the run's folder.

    Raises:
        ValueError: If there is none.
    """
    if name != LAST_CHECKPOINT:
        return Path(name)
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        raise ValueError(
            f"resume_from_checkpoint={LAST_CHECKPOINT!r}, but {output_dir} holds no checkpoint: leave it out"
        )
    return checkpoints[-1][1]


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the whole checkpoints in a run's folder, in order."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and _is_whole(path):
            found.append((int(match[1]), path))
    return sorted(found)


def _check_settings(folder: Path, *, stored: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    differing = sorted(key for key in {*stored, *found} if stored.get(key) != found.get(key))
    if differing:
        changes = ", ".join(f"{key}: {stored.get(key)!r} -> {found.get(key)!r}" for key in differing)
        raise ValueError(f"{folder} was made by another run ({changes}): resume with the same settings")


def _is_whole(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file() and (folder / TENSORS_FILE).is_file()


def _partial(output_dir: Path, step: int) -> Path:
    return output_dir / f".checkpoint-{step}.part"


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
