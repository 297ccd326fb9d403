"""Strict reading of safetensors files, and digests of tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


_MAX_HEADER_BYTES = 1 << 16


def read_tensors(path: Path, expected: Mapping[str, Tensor], *, config_file: str) -> dict[str, Tensor]:
    """Reads finite tensors of exactly the names, shapes and dtypes of `expected`, which may be on the meta device.

    `config_file` names the file that says what to expect. The size is checked before anything is read.
    """
    largest = sum(tensor.nbytes for tensor in expected.values()) + _MAX_HEADER_BYTES
    if (size := path.stat().st_size) > largest:
        raise ValueError(
            f"{path} has {size:,} bytes, expected at most {largest:,} for {_describe(expected)} as {config_file} says"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, ValueError, KeyError, OverflowError) as exc:
        raise ValueError(f"{path} is not a valid safetensors file, so it is damaged (load it again): {exc}") from exc
    if (found := _describe(tensors)) != (wanted := _describe(expected)):
        raise ValueError(f"{path} must hold {wanted} as {config_file} says, got {found}: take both from one folder")
    check_finite(f"{path} holds tensors", tensors)
    return tensors


def check_finite(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Refuses tensors with a value that is not finite; `what` begins the message."""
    if broken := sorted(name for name, tensor in tensors.items() if not tensor.isfinite().all()):
        raise ValueError(f"{what} whose {' and '.join(broken)} is not finite: the training diverged, or it is damaged")


def _describe(tensors: Mapping[str, Tensor]) -> str:
    kinds = (f"{name} ({tensor.dtype} of shape {tuple(tensor.shape)})" for name, tensor in sorted(tensors.items()))
    return ", ".join(kinds) or "no tensors"


def digest(tensors: Iterable[Tensor]) -> str:
    """Returns the sha256 of shapes, dtypes and bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()
