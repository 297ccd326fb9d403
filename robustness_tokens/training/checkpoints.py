"""Checkpoints of a training run: tensors in safetensors, progress in JSON, each complete or absent.

No random state is stored: the order of the images and the attack's noise follow from (seed, step, example).
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..configuration import TOKENS, TokenState
from ..utils import MAX_JSON_BYTES, check_dict, check_int, check_keys, flush_to_disk, read_json, replacing


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
TENSORS_FILE = "training_tensors.safetensors"

Shapes = Mapping[str, tuple[int, ...]]

_OPTIMIZER = "optimizer."  # begins the names of its tensors


class DamagedCheckpointError(ValueError):
    """A checkpoint has its files, but they can't be read."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint as [`read_checkpoint`] returns it."""

    folder: Path
    step: int  # optimiser steps done
    tokens: dict[str, Tensor]  # float32, see TokenState
    optimizer_state: dict[int, dict[str, Tensor]]  # by the index of the parameter
    state: dict[str, Any]  # as given to save_checkpoint

    @torch.no_grad()
    def restore(self, tokens: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Writes the tensors back into the tokens and the optimizer, whose only parameters they are."""
        optimizer.load_state_dict({**optimizer.state_dict(), "state": self.optimizer_state})
        for name, parameter in tokens.items():
            parameter.copy_(self.tokens[name])


def save_checkpoint(
    output_dir: Path,
    *,
    step: int,
    tokens: TokenState,
    optimizer: torch.optim.Optimizer,
    settings: Mapping[str, Any],
    state: Mapping[str, Any],
    save_total_limit: int | None = None,
) -> Path:
    """Writes `output_dir/checkpoint-<step>` under a hidden name and renames it, so it is never seen half-written.

    A resumed run must share `settings` and needs `state`; both are JSON. Keeps the newest `save_total_limit`
    checkpoints; those beyond `step`, left when a run resumed from an earlier one, go first. `OSError` if it cannot be
    written, `ValueError` if it is larger than [`read_checkpoint`] accepts; earlier checkpoints then stay.
    """
    tensors = {name: tensor.detach().cpu().clone() for name, tensor in tokens.items()}
    for index, values in optimizer.state_dict()["state"].items():
        tensors |= {f"{_OPTIMIZER}{index}.{name}": torch.as_tensor(value).cpu() for name, value in values.items()}
    stored = safetensors.torch.save(tensors)
    # As JSON gives it back, since the digest is of that.
    content = json.loads(json.dumps({"step": step, "settings": dict(settings), "state": dict(state)}))
    text = json.dumps({**content, "digest": _digest(content, stored)}, indent=1)
    final, partial = output_dir / f"checkpoint-{step}", output_dir / f".checkpoint-{step}.part"
    replaced = output_dir / f".checkpoint-{step}.old.part"
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        for leftover in output_dir.glob(".checkpoint-*.part"):  # of a run that was killed
            _remove(leftover)
        partial.mkdir(mode=0o700)  # tokens are secrets
        _write(partial / TENSORS_FILE, stored)
        _write(partial / STATE_FILE, text.encode())
        _check_readable(partial / STATE_FILE, {**settings, **state}, final)
        flush_to_disk(partial)
        if final.exists():
            final.rename(replaced)
        partial.rename(final)
        flush_to_disk(output_dir)
    except ValueError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    except OSError as exc:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not final.exists():
            replaced.rename(final)
        raise OSError(
            exc.errno,
            f"{final} could not be written ({exc.strerror}); earlier checkpoints are unchanged: make room, or "
            "fix the permissions, and resume with resume_from_checkpoint=True",
        ) from exc
    # The new one is written, so an old one that can't be deleted must not end the run.
    if replaced.exists():
        _remove(replaced)
    if save_total_limit is not None:
        oldest_first = sorted(list_checkpoints(output_dir), key=lambda found: (found[0] <= step, found[0]))
        for _, old in oldest_first[:-save_total_limit]:
            # Hidden first, so that a kill leaves no half-deleted checkpoint under its own name.
            _remove(old, hidden_as=output_dir / f".{old.name}.part")
    return final


def read_checkpoint(folder: Path, *, settings: Mapping[str, Any], shapes: Shapes) -> Checkpoint:
    """Reads a checkpoint of a run with these settings, and tokens, gains and shifts of these shapes.

    A setting that is `...` may have been any.
    `DamagedCheckpointError` if a file can't be read; `ValueError` if one is missing, or settings or shapes differ.
    """
    if not _is_whole(folder):
        raise ValueError(f"{folder} is not a checkpoint: expected {STATE_FILE} and {TENSORS_FILE} in it")
    try:
        content, stored = read_json(folder / STATE_FILE), (folder / TENSORS_FILE).read_bytes()
        check_keys(STATE_FILE, content, {"step", "settings", "state", "digest"})
        check_int(f"{STATE_FILE}: step", content["step"], 0)
        for name in ("settings", "state"):
            check_dict(f"{STATE_FILE}: {name}", content[name])
        if content.pop("digest") != _digest(content, stored):
            raise ValueError("its digest does not match what it holds")
        tensors = safetensors.torch.load(stored)
        tokens = {name: tensor for name, tensor in tensors.items() if not name.startswith(_OPTIMIZER)}
        if TOKENS not in tokens:
            raise KeyError(f"no {TOKENS!r} in {TENSORS_FILE}")
        optimizer_state: dict[int, dict[str, Tensor]] = {}
        for key in tensors.keys() - tokens.keys():
            index, name = key.removeprefix(_OPTIMIZER).split(".", 1)
            value = tensors[key]
            optimizer_state.setdefault(int(index), {})[name] = value
    except (SafetensorError, KeyError, ValueError) as exc:
        raise DamagedCheckpointError(f"{folder} is damaged ({exc}): resume from an earlier checkpoint") from exc
    _check_settings(folder, stored=content["settings"], found=settings)
    found = {name: tuple(tensor.shape) for name, tensor in tokens.items()}
    if found != dict(shapes):
        raise ValueError(f"{folder} holds tokens of the shapes {found}, the model has {dict(shapes)}")
    return Checkpoint(folder, content["step"], tokens, optimizer_state, content["state"])


def find_checkpoint(
    output_dir: Path, resume_from: str | bool | None, *, settings: Mapping[str, Any], shapes: Shapes
) -> Checkpoint | None:
    """Reads the checkpoint that `resume_from` names; True takes the newest undamaged one in the run's folder.

    Returns None if `resume_from` is None, or, with a warning, if it is True and there is no checkpoint yet.
    `ValueError` if the checkpoint does not fit, or all are damaged.
    """
    if resume_from is None:
        return None
    if resume_from is not True:
        return read_checkpoint(Path(str(resume_from)), settings=settings, shapes=shapes)
    folders = [folder for _, folder in list_checkpoints(output_dir)]
    if not folders:
        logger.warning("%s holds no checkpoint yet: training starts from the beginning", output_dir)
        return None
    for folder in reversed(folders[1:]):
        try:
            return read_checkpoint(folder, settings=settings, shapes=shapes)
        except DamagedCheckpointError as exc:
            logger.warning("%s", exc)
    return read_checkpoint(folders[0], settings=settings, shapes=shapes)


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Returns (step, folder) of the whole checkpoints in a run's folder, in order."""
    found = []
    for path in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if match and _is_whole(path):
            found.append((int(match[1]), path))
    return sorted(found)


def _check_settings(folder: Path, *, stored: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    differing = sorted(key for key in {*stored, *found} if found.get(key) not in (stored.get(key), ...))
    if differing:
        changes = ", ".join(f"{key}: {stored.get(key)!r} -> {found.get(key)!r}" for key in differing)
        moved = " (if only the place of the images differs: ignore_images_mismatch=True)"
        hint = moved if any("images" in key for key in differing) else ""
        raise ValueError(f"{folder} was made by another run ({changes}): resume with the same settings{hint}")


def _is_whole(folder: Path) -> bool:
    return (folder / STATE_FILE).is_file() and (folder / TENSORS_FILE).is_file()


def _check_readable(path: Path, entries: Mapping[str, Any], checkpoint: Path) -> None:
    """Raises `ValueError` if the state that was just written can't be read back."""
    try:
        read_json(path)
    except ValueError as exc:
        reason = str(exc)
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            sizes = {name: len(json.dumps(value, indent=1)) for name, value in entries.items()}
            largest = max(sizes, key=lambda name: sizes[name])
            reason = (
                f"{STATE_FILE} would have {size:,} bytes, {sizes[largest]:,} of them for {largest!r}, and at most "
                f"{MAX_JSON_BYTES:,} can be read: store less in it"
            )
        raise ValueError(
            f"{checkpoint} could not be read back and is not kept; earlier checkpoints are unchanged: {reason}"
        ) from exc


def _remove(folder: Path, *, hidden_as: Path | None = None) -> None:
    """Deletes a folder, after renaming it to `hidden_as`, or warns that it can't."""
    try:
        shutil.rmtree(folder if hidden_as is None else folder.rename(hidden_as))
    except OSError as exc:
        logger.warning("%s could not be deleted (%s): delete it by hand", folder, exc)


def _digest(content: Mapping[str, Any], tensors: bytes) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode() + tensors).hexdigest()


def _write(path: Path, content: bytes) -> None:
    with replacing(path) as partial:  # readable by its owner alone
        partial.write_bytes(content)
