"""Checkpoints of a training run: tensors in safetensors, progress in JSON, whole or not there at all.

No random state is stored: the order of the images and the attack's noise follow from (seed, step, example).
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .hub import read_json


STATE_FILE = "trainer_state.json"
TENSORS_FILE = "training_tensors.safetensors"
LAST = "last"

_TOKENS = "robustness_tokens"


def save_checkpoint(
    output_dir: Path,
    *,
    step: int,
    tokens: Tensor,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    save_total_limit: int | None = None,
) -> Path:
    """Writes `output_dir/checkpoint-<step>`: aside first, then renamed, so that it is never seen half-written.

    Args:
        output_dir: Folder of the run.
        step: Optimiser steps done.
        tokens: (K, D).
        optimizer: Holds the tokens as its only parameter.
        state: What else a resumed run needs; must be JSON.
        save_total_limit: Keep only so many checkpoints, the newest.

    Returns:
        The checkpoint's folder.
    """
    final = output_dir / f"checkpoint-{step}"
    partial = output_dir / f".checkpoint-{step}.part"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors = {_TOKENS: tokens.detach().cpu().clone()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{name}": torch.as_tensor(value).cpu() for name, value in values.items()}
    save_file(tensors, partial / TENSORS_FILE)
    (partial / TENSORS_FILE).chmod(0o600)
    (partial / STATE_FILE).write_text(json.dumps({"step": step, **state}, indent=1), encoding="utf-8")
    for path in (partial / TENSORS_FILE, partial / STATE_FILE, partial):
        _flush_to_disk(path)
    if final.exists():
        shutil.rmtree(final)
    partial.rename(final)
    _flush_to_disk(output_dir)
    if save_total_limit is not None:
        for _, old in list_checkpoints(output_dir)[:-save_total_limit]:
            shutil.rmtree(old)
    return final


def load_checkpoint(folder: Path, *, tokens: nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts a checkpoint's tensors back into the tokens and the optimiser.

    Returns:
        The state that was given to [`save_checkpoint`], with `"step"`.

    Raises:
        ValueError: If the checkpoint is not whole, or was made for other tokens.
    """
    if not (folder / STATE_FILE).is_file() or not (folder / TENSORS_FILE).is_file():
        raise ValueError(f"{folder} is not a checkpoint: expected {STATE_FILE} and {TENSORS_FILE} in it")
    state = read_json(folder / STATE_FILE)
    tensors = load_file(folder / TENSORS_FILE)
    stored = tensors.pop(_TOKENS)
    if stored.shape != tokens.shape:
        raise ValueError(f"{folder} holds tokens of shape {tuple(stored.shape)}, the model has {tuple(tokens.shape)}")
    optimizer_state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        _, index, name = key.split(".", 2)
        optimizer_state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": optimizer_state})
    with torch.no_grad():
        tokens.copy_(stored)
    return state


def find_checkpoint(output_dir: Path, name: str) -> Path:
    """The folder of a checkpoint given by path, or `"last"`: the last whole one in the run's folder.

    Raises:
        ValueError: If there is none.
    """
    if name != LAST:
        return Path(name)
    checkpoints = list_checkpoints(output_dir)
    if not checkpoints:
        raise ValueError(f"resume_from_checkpoint={LAST!r}, but {output_dir} holds no checkpoint: leave it out")
    return checkpoints[-1][1]


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """(step, folder) of the whole checkpoints in a run's folder, in order."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and (path / STATE_FILE).is_file() and (path / TENSORS_FILE).is_file():
            found.append((int(match[1]), path))
    return sorted(found)


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
