"""The adapter folder, on disk and on the Hub: strict reading, careful writing, private by default.

An adapter is `config.json`, `model.safetensors`, `preprocessor_config.json`, `README.md`, and perhaps
`evaluation.json`. Only safetensors and JSON are read; nothing is unpickled, nothing downloaded is executed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import safetensors
import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import (
    HFValidationError,
    LocalEntryNotFoundError,
    validate_repo_id,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from .configuration import RobustnessTokenConfig
from .files import has_cache_hash, read_json, replacing
from .report.schema import MARKDOWN_FILE, REPORT_FILE, RobustnessReport


CONFIG_FILE = "config.json"
TOKENS_FILE = "model.safetensors"
PROCESSOR_FILE = "preprocessor_config.json"
CARD_FILE = "README.md"
EVALUATION_FILE = REPORT_FILE
# For people, beside it; they stay on this machine, since the card on the Hub says the same.
RENDERED_FILES = (MARKDOWN_FILE, "report.html")
ADAPTER_FILES = (CONFIG_FILE, TOKENS_FILE, PROCESSOR_FILE, CARD_FILE, EVALUATION_FILE)
TOKENS_KEY = "robustness_tokens"

_MAX_SAFETENSORS_HEADER_BYTES = 1 << 16


@dataclass(frozen=True)
class AdapterFolder:
    """An adapter on disk: where it lies, and whether it came from the Hub (then its config is less trusted)."""

    path: Path
    from_hub: bool
    commit: str | None = None


def fetch_adapter(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> AdapterFolder:
    """The folder of an adapter, downloaded from the Hub (only an adapter's files) unless it is a local folder.

    Args:
        name_or_path: Local folder or Hub repo id.
        revision: Branch, tag, commit or `refs/pr/N`.
        subfolder: Folder of the adapter inside the repo.
        token, cache_dir, local_files_only, force_download: As in `huggingface_hub.snapshot_download`.

    Raises:
        ValueError: If there is no adapter; errors of the Hub pass through.
    """
    if os.path.isdir(name_or_path):
        path, from_hub, commit = Path(name_or_path), False, None
    else:
        prefix = f"{subfolder}/" if subfolder else ""
        try:
            validate_repo_id(str(name_or_path))
        except HFValidationError as exc:
            raise ValueError(f"{str(name_or_path)!r} is neither a local folder nor the id of a Hub repo") from exc

        def download(files: Iterable[str], force: bool) -> Path:
            folder = snapshot_download(
                str(name_or_path),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force,
                allow_patterns=[prefix + file for file in files],
            )
            return Path(folder)

        try:
            snapshot = download(ADAPTER_FILES, force_download)
            if (damaged := _damaged_files(snapshot / subfolder)) and not local_files_only:
                snapshot = download(damaged, True)
        except LocalEntryNotFoundError as exc:
            raise ValueError(
                f"{name_or_path} is no folder here and not in the cache, and the Hub can't be reached: {exc}"
            ) from exc
        if damaged := _damaged_files(snapshot / subfolder):
            raise ValueError(
                f"{name_or_path}: {' and '.join(damaged)} came damaged over the network, or was damaged in the cache "
                f"({snapshot / subfolder}): load it again, with force_download=True"
            )
        path, from_hub, commit = snapshot, True, snapshot.name
    path = path / subfolder
    if missing := [file for file in (CONFIG_FILE, TOKENS_FILE, PROCESSOR_FILE) if not (path / file).is_file()]:
        raise ValueError(f"{name_or_path} is not a robustness-token adapter: it has no {' and no '.join(missing)}")
    return AdapterFolder(path, from_hub, commit)


def _damaged_files(folder: Path) -> list[str]:
    """The files that don't have the hash by which the cache names them: huggingface_hub looks at sizes alone."""
    return [file for file in ADAPTER_FILES if (folder / file).is_file() and not has_cache_hash(folder / file)]


def read_config(folder: AdapterFolder) -> RobustnessTokenConfig:
    """Reads config.json strictly. Whoever loads the base that it names first calls [`check_base_is_repo_id`].

    Raises:
        ValueError: If it is damaged, or of a newer schema.
    """
    path = folder.path / CONFIG_FILE
    config_dict = read_json(path)
    if config_dict.get("model_type") != RobustnessTokenConfig.model_type:
        raise ValueError(
            f"{path} has model_type {config_dict.get('model_type')!r}, expected "
            f"{RobustnessTokenConfig.model_type!r}: it is the config of another model, not of an adapter"
        )
    try:
        config: RobustnessTokenConfig = RobustnessTokenConfig.from_dict(config_dict)
    except ValueError as exc:
        raise ValueError(f"{path}: {exc}") from exc
    return config


def check_base_is_repo_id(name: str) -> None:
    """Raises `ValueError` unless a config that came from the Hub names its base by a plain repo id, and no folder."""
    try:
        validate_repo_id(name)
    except HFValidationError as exc:
        raise ValueError(
            f"the adapter came from the Hub, and its config names the base {name!r}, which is no repo id: "
            "pass base_model= to say where the base is"
        ) from exc
    if os.path.isdir(name):
        raise ValueError(
            f"the adapter came from the Hub, and its config names the base {name!r}, which is a folder here as well: "
            "pass base_model= with its whole path if that is the base, or work in another folder"
        )


def read_tokens(folder: AdapterFolder, config: RobustnessTokenConfig) -> Tensor:
    """Reads the tokens, strictly: one finite float32 tensor of the shape that the config announces.

    Returns:
        (K, D) float32.

    Raises:
        ValueError: If the file is damaged or holds anything else.
    """
    path, shape = folder.path / TOKENS_FILE, (config.num_robustness_tokens, config.hidden_size)
    largest = 4 * shape[0] * shape[1] + _MAX_SAFETENSORS_HEADER_BYTES
    if (size := path.stat().st_size) > largest:
        raise ValueError(f"{path} has {size:,} bytes; tokens of shape {shape} need at most {largest:,}")
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, ValueError, KeyError, OverflowError) as exc:
        raise ValueError(f"{path} is not a valid safetensors file: {exc}") from exc
    if set(tensors) != {TOKENS_KEY}:
        raise ValueError(f"{path} must hold one tensor, {TOKENS_KEY!r}, got {sorted(tensors)}")
    tokens = tensors[TOKENS_KEY]
    if tuple(tokens.shape) != shape or tokens.dtype != torch.float32:
        raise ValueError(
            f"{path} must hold float32 tokens of shape {shape} as config.json says, "
            f"got {tokens.dtype} of shape {tuple(tokens.shape)}"
        )
    if not torch.isfinite(tokens).all():
        raise ValueError(f"{path} holds tokens that are not finite: the file is damaged, or its training diverged")
    return tokens


def read_report(folder: AdapterFolder) -> RobustnessReport | None:
    """Reads evaluation.json, strictly; None if the adapter has none.

    Raises:
        ValueError: If it is damaged.
    """
    if not (folder.path / EVALUATION_FILE).is_file():
        return None
    path = folder.path / EVALUATION_FILE
    try:
        return RobustnessReport.from_dict(read_json(path))
    except ValueError as exc:
        raise ValueError(f"{path}: {exc}") from exc


def report_of(folder: Path, tokens: Tensor) -> RobustnessReport | None:
    """The report that lies in a folder, if it is about these tokens; `ValueError` if it is damaged."""
    return read_report(AdapterFolder(folder, from_hub=False)) if _holds_tokens(folder / TOKENS_FILE, tokens) else None


def remove_report(folder: Path) -> None:
    """Takes away what tells of other tokens than the folder is going to hold."""
    for file in (EVALUATION_FILE, *RENDERED_FILES):
        (folder / file).unlink(missing_ok=True)


def write_tokens(folder: Path, tokens: Tensor) -> None:
    """Writes the tokens as float32, readable by their owner alone (they are the secret of the defence).

    Raises:
        ValueError: If they are not finite.
    """
    tokens = tokens.detach().to("cpu", torch.float32).contiguous()
    if not torch.isfinite(tokens).all():
        raise ValueError("refusing to save tokens that are not finite: the training diverged")
    if not _holds_tokens(folder / TOKENS_FILE, tokens):
        remove_report(folder)
    with replacing(folder / TOKENS_FILE) as partial:
        save_file({TOKENS_KEY: tokens}, partial, metadata={"format": "pt"})
        partial.chmod(0o600)


def _holds_tokens(path: Path, tokens: Tensor) -> bool:
    try:
        stored = load_file(path)
    except (safetensors.SafetensorError, OSError):
        return False
    return set(stored) == {TOKENS_KEY} and torch.equal(stored[TOKENS_KEY], tokens.detach().cpu())


def holds_adapter(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder holds an adapter's files that saving would overwrite."""
    return any((Path(folder) / file).exists() for file in (CONFIG_FILE, TOKENS_FILE))


def is_repo_id(name: str) -> bool:
    """Whether the Hub could have a repo of this name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def check_no_other_model(folder: Path) -> None:
    """Raises `ValueError` if saving would overwrite the config and the weights of another model, such as the base."""
    if not (folder / CONFIG_FILE).exists():
        return
    model_type = read_json(folder / CONFIG_FILE).get("model_type")
    if model_type != RobustnessTokenConfig.model_type:
        raise ValueError(
            f"save_directory {str(folder)!r} holds another model, of model_type {model_type!r}: saving would "
            "overwrite its weights with the tokens; choose another folder"
        )


def cached_commit(repo_id: str, *, revision: str | None = None, cache_dir: str | Path | None = None) -> str | None:
    """The commit of a repo as it lies in the local cache, so the one just loaded; None for a path or no name."""
    if os.path.isdir(repo_id) or not is_repo_id(repo_id):
        return None
    cached = try_to_load_from_cache(repo_id, CONFIG_FILE, revision=revision, cache_dir=cache_dir)
    return Path(cached).parent.name if isinstance(cached, str) else None
