"""The adapter folder, on disk and on the Hub: strict reading, careful writing, private by default.

An adapter is `config.json`, `model.safetensors`, `preprocessor_config.json`, `README.md`, and perhaps
`evaluation.json`. Only safetensors and JSON are read; nothing is unpickled, nothing downloaded is executed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RevisionNotFoundError,
    validate_repo_id,
)
from safetensors.torch import load_file, save_file
from torch import Tensor

from .configuration import RobustnessTokenConfig, check_config_dict
from .model_card import is_generated


CONFIG_FILE = "config.json"
TOKENS_FILE = "model.safetensors"
PROCESSOR_FILE = "preprocessor_config.json"
CARD_FILE = "README.md"
EVALUATION_FILE = "evaluation.json"
ADAPTER_FILES = (CONFIG_FILE, TOKENS_FILE, PROCESSOR_FILE, CARD_FILE, EVALUATION_FILE)
TOKENS_KEY = "robustness_tokens"

_MAX_JSON_BYTES = 1 << 20
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
        try:
            snapshot = snapshot_download(
                str(name_or_path),
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                local_files_only=local_files_only,
                force_download=force_download,
                allow_patterns=[prefix + file for file in ADAPTER_FILES],
            )
        except LocalEntryNotFoundError as exc:
            raise ValueError(
                f"{name_or_path} is no folder here and not in the cache, and the Hub can't be reached: {exc}"
            ) from exc
        path, from_hub, commit = Path(snapshot), True, Path(snapshot).name
    path = path / subfolder
    if missing := [file for file in (CONFIG_FILE, TOKENS_FILE, PROCESSOR_FILE) if not (path / file).is_file()]:
        raise ValueError(f"{name_or_path} is not a robustness-token adapter: it has no {' and no '.join(missing)}")
    return AdapterFolder(path, from_hub, commit)


def read_config(folder: AdapterFolder) -> RobustnessTokenConfig:
    """Reads config.json strictly. Whoever loads the base that it names first calls [`check_base_is_repo_id`].

    Raises:
        ValueError: If it is damaged, or of a newer schema.
    """
    config_dict = read_json(folder.path / CONFIG_FILE)
    if config_dict.get("model_type") != RobustnessTokenConfig.model_type:
        raise ValueError(
            f"{folder.path / CONFIG_FILE} has model_type {config_dict.get('model_type')!r}, expected "
            f"{RobustnessTokenConfig.model_type!r}: it is the config of another model, not of an adapter"
        )
    check_config_dict(config_dict)
    config: RobustnessTokenConfig = RobustnessTokenConfig.from_dict(config_dict)
    return config


def check_base_is_repo_id(name: str) -> None:
    """Raises `ValueError` unless a config that came from the Hub names its base by a plain repo id."""
    try:
        validate_repo_id(name)
    except HFValidationError as exc:
        raise ValueError(
            f"the adapter came from the Hub, and its config names the base {name!r}, which is no repo id: "
            "pass base_model= to say where the base is"
        ) from exc


def read_json(path: Path) -> dict[str, Any]:
    """Reads a small JSON object; `ValueError` names the file if it is damaged or too large."""
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, expected at most {_MAX_JSON_BYTES:,}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as exc:
        raise ValueError(f"{path} is not valid JSON, so it is damaged (load it again, or delete it): {exc}") from exc
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


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


def write_tokens(folder: Path, tokens: Tensor) -> None:
    """Writes the tokens as float32, readable by their owner alone (they are the secret of the defence).

    Raises:
        ValueError: If they are not finite.
    """
    tokens = tokens.detach().to("cpu", torch.float32).contiguous()
    if not torch.isfinite(tokens).all():
        raise ValueError("refusing to save tokens that are not finite: the training diverged")
    report = folder / EVALUATION_FILE
    if report.exists() and not _holds_tokens(folder / TOKENS_FILE, tokens):
        report.unlink()  # it tells of other tokens
    with _replacing(folder / TOKENS_FILE) as partial:
        save_file({TOKENS_KEY: tokens}, partial, metadata={"format": "pt"})
        partial.chmod(0o600)


def write_text(path: Path, text: str) -> None:
    """Writes a small text file, whole or not at all."""
    with _replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")
        partial.chmod(0o644)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """A file beside the target, renamed to it at the end, so that no reader ever sees half a file."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        partial = Path(file.name)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _holds_tokens(path: Path, tokens: Tensor) -> bool:
    try:
        stored = load_file(path)
    except (safetensors.SafetensorError, OSError):
        return False
    return set(stored) == {TOKENS_KEY} and torch.equal(stored[TOKENS_KEY], tokens)


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


def push_adapter(
    save: Callable[[Path], Any],
    repo_id: str,
    *,
    private: bool = True,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload robustness tokens",
) -> Any:
    """Uploads an adapter in one commit.

    Args:
        save: Writes the adapter into the folder it is given.
        repo_id: `user/name`.
        private: Tokens are secrets: anyone who reads them can attack through them. A repo that is public already
            refuses the push unless this is False.
        token, revision, create_pr, commit_message: As in `huggingface_hub.HfApi.upload_folder`.

    Returns:
        What `HfApi.upload_folder` returns.

    Raises:
        ValueError: If the repo is public and `private` is True.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(
            f"{repo_id} exists and is public: tokens are secrets, so they are not pushed there. Make the repo "
            "private, or pass private=False if everyone may know the tokens"
        )
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder))
        if _has_card_of_a_person(api, repo_id, revision):
            (Path(folder) / CARD_FILE).unlink()
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(ADAPTER_FILES),
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
        )


def _has_card_of_a_person(api: HfApi, repo_id: str, revision: str | None) -> bool:
    try:
        card = api.hf_hub_download(repo_id, CARD_FILE, revision=revision)
    except (EntryNotFoundError, RevisionNotFoundError):
        return False
    return not is_generated(Path(card).read_text(encoding="utf-8", errors="replace"))
