"""Imports the authors' released tokens as adapters. Only this module reads a pickle, with `weights_only=True`."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..hub import holds_adapter
from ..utils import local_path
from .modeling import RobustnessTokenModel


SOURCE_URL = "https://github.com/BrianPulfer/robustness-tokens"
PAPER = "arXiv:2503.10191"

_KEY = "rtokens"
_LAYOUT = f'{{"{_KEY}": (1, K, D) float32}}'
# The largest of the 14 files has 63 kB; 50 tokens of width 1664 have 333 kB.
_MAX_BYTES = 4 << 20
_FIX = f"take the file from {SOURCE_URL} again, or train tokens of your own"


def read_published_tokens(file: str | os.PathLike[str]) -> Tensor:
    """Reads one of the authors' files, `{"rtokens": (1, K, D) float32}`, as (K, D) on the CPU; runs no code of it."""
    path = Path(local_path(file))
    _check_archive(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as exc:  # a damaged or hostile pickle may raise any exception
        raise ValueError(f"{path} holds more than tensors, or is damaged ({_LAYOUT} expected): {_FIX}") from exc
    if not isinstance(content, dict) or set(content) != {_KEY}:
        found = f"keys {sorted(map(str, content))[:5]}" if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path} must hold {_LAYOUT}, got {found}: {_FIX}")
    tokens = content[_KEY]
    if not isinstance(tokens, Tensor) or tokens.layout != torch.strided or tokens.dtype != torch.float32:
        found = f"{tokens.dtype}, {tokens.layout}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(f"{path} must hold {_LAYOUT}, got {found} under {_KEY!r}: {_FIX}")
    # Strides of 0 can make a small file a huge tensor.
    if tokens.dim() != 3 or tokens.shape[0] != 1 or not 0 < 4 * tokens.numel() <= _MAX_BYTES or tokens.is_meta:
        raise ValueError(f"{path} must hold {_LAYOUT}, got the shape {tuple(tokens.shape)} under {_KEY!r}: {_FIX}")
    if not torch.isfinite(tokens).all():
        raise ValueError(f"{path} holds tokens that are not finite, expected finite numbers: {_FIX}")
    return tokens.detach()[0].clone(memory_format=torch.contiguous_format)  # (1, K, D) -> (K, D)


def import_published_tokens(
    file: str | os.PathLike[str],
    base_model: str | os.PathLike[str] | PreTrainedModel,
    output_dir: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    base_model_id: str | None = None,
    image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
    **base_kwargs: Any,
) -> RobustnessTokenModel:
    """Writes an adapter from one of the authors' files, with its provenance in config and card.

    Args:
        file: One of the authors' `.pt` files, `{"rtokens": (1, K, D) float32}`, at most 4 MiB.
        base_model: The model that the tokens were trained on: Hub id, folder, or model in memory (changed in place).
        output_dir: Folder of the adapter, created if needed.
        overwrite: Replace an adapter in that folder.
        base_model_id: Hub id to name as the base if `base_model` is a folder.
        image_mean, image_std: Per-channel normalisation of [0, 1] images that the tokens were trained with; ImageNet's
            for all 14 files, OpenCLIP's too.
        base_kwargs: For [`RobustnessTokenModel.from_base`]: `revision`, `dtype`, `token`, `image_processor`, ...

    Returns:
        The model with these tokens, in eval mode.

    Raises:
        ValueError: If the file holds anything else, the base has another width, or the folder holds an adapter.

    Source: the tokens released at https://github.com/BrianPulfer/robustness-tokens.
    """
    if not overwrite and holds_adapter(output_dir):
        raise ValueError(f"output_dir={str(output_dir)!r} holds an adapter already: pass overwrite=True to replace it")
    tokens = read_published_tokens(file)
    model = RobustnessTokenModel.from_base(
        base_model, num_robustness_tokens=tokens.shape[0], image_mean=image_mean, image_std=image_std, **base_kwargs
    )
    if tokens.shape[1] != model.config.hidden_size:
        name = model.config.base_model_name_or_path or model.config.base_model_class
        model.unload()  # leaves a base in memory as it was
        raise ValueError(
            f"{file} holds tokens of width {tokens.shape[1]}, the base {name} has the width "
            f"{model.config.hidden_size}: choose the base that the file is named after"
        )
    with torch.no_grad():
        model.robustness_tokens.copy_(tokens)
    model.config.training = {
        "source": SOURCE_URL,
        "paper": PAPER,
        "license": "MIT, (c) Brian Pulfer",
        "file": Path(file).name,
        "sha256": hashlib.sha256(Path(local_path(file)).read_bytes()).hexdigest(),
        "secrecy": "none: these tokens are published",
    }
    model.save_pretrained(output_dir, base_model_id=base_model_id)
    return model


def _check_archive(path: Path) -> None:
    """Raises `ValueError` unless a file is a small zip archive, before unpacking any of it."""
    if not path.is_file():
        raise ValueError(f"{path} is no file, expected a .pt of the authors: {_FIX}")
    size = path.stat().st_size
    if size <= _MAX_BYTES:
        try:
            with zipfile.ZipFile(path) as archive:
                size = sum(entry.file_size for entry in archive.infolist())
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as exc:
            raise ValueError(f"{path} is no archive that torch.save wrote, expected {_LAYOUT}: {_FIX}") from exc
    if size > _MAX_BYTES:
        raise ValueError(f"{path} holds {size:,} bytes, expected at most {_MAX_BYTES:,} for {_LAYOUT}: {_FIX}")
