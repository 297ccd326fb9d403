"""Reads an adapter from disk or from the Hub, strictly, and writes what it learned.

An adapter is `config.json`, `model.safetensors`, `preprocessor_config.json`, `README.md`, and perhaps
`evaluation.json`. Only safetensors and JSON are read; nothing is unpickled, nothing downloaded is executed.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub import snapshot_download, try_to_load_from_cache
from huggingface_hub.utils import HFValidationError, LocalEntryNotFoundError, validate_repo_id
from safetensors.torch import save
from torch import Tensor
from transformers import BaseImageProcessor

from ..configuration import HEAD_PREFIX, TOKENS, RobustnessTokenConfig, TokenState, state_digest
from ..data import read_image_processor
from ..report import REPORT_FILE, OlderReportError, RobustnessReport
from ..utils import check_finite, has_cache_hash, local_path, read_json, read_tensors, write_together


logger = logging.getLogger(__name__)

CONFIG_FILE = "config.json"
TOKENS_FILE = "model.safetensors"
PROCESSOR_FILE = "preprocessor_config.json"
CARD_FILE = "README.md"
ADAPTER_FILES = (CONFIG_FILE, TOKENS_FILE, PROCESSOR_FILE, CARD_FILE, REPORT_FILE)

# Names of gains and shifts; whether a base has them, and in which shape, is checked where they are put into it.
_GAIN_OR_SHIFT = r"[A-Za-z0-9_.]{1,200}\.(gain|shift)|patch_embedding\.(weight|bias)"
_HEAD = re.escape(HEAD_PREFIX) + r"[A-Za-z0-9_.]{1,200}"
_MAX_OTHER_BYTES = 1 << 26


@dataclass(frozen=True, eq=False)
class Adapter:
    """An adapter that was read strictly. A config from the Hub is less trusted: see [`check_base_is_repo_id`]."""

    folder: Path
    config: RobustnessTokenConfig
    state: dict[str, Tensor]  # float32, finite, see TokenState
    head: dict[str, Tensor]  # of a classifier, if it was trained: by name in the base, after HEAD_PREFIX
    commit: str | None  # on the Hub; None for a local folder

    @property
    def tokens(self) -> Tensor:
        """Its tokens, (K, D) or (depth, K, D)."""
        return self.state[TOKENS]

    @property
    def learned(self) -> dict[str, Tensor]:
        """All that its tensor file holds: what a report measures."""
        return self.state | self.head

    @cached_property
    def image_processor(self) -> BaseImageProcessor:
        """Its image processor; `ValueError` if the file is damaged or names code."""
        return read_image_processor(self.folder / PROCESSOR_FILE)

    @cached_property
    def report(self) -> RobustnessReport | None:
        """Its evaluation.json, None if there is none or it measured another adapter; `ValueError` if it is damaged."""
        return report_of(self.folder, self.learned)


def load_adapter(
    name_or_path: str | os.PathLike[str],
    *,
    revision: str | None = None,
    subfolder: str = "",
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    force_download: bool = False,
) -> Adapter:
    """Reads an adapter from a folder or from the Hub; downloads only its own files, not the base.

    `ValueError` if there is none, its config or its tokens are damaged, or a folder is given a `revision`. Errors of
    the Hub pass through.
    """
    name, subfolder, commit = local_path(name_or_path), normalize_subfolder(subfolder), None
    if os.path.isdir(name):
        if revision is not None:
            raise ValueError(
                f"{name!r} is a folder here, which has no revision {revision!r}: leave revision= out, or work in "
                "another folder if the Hub repo of that name is meant"
            )
        folder = Path(name) / subfolder
    else:
        if not is_repo_id(name):
            raise ValueError(f"{name!r} is neither a local folder nor the id of a Hub repo")
        options: dict[str, Any] = {"token": token, "cache_dir": cache_dir}
        options |= {"local_files_only": local_files_only, "force_download": force_download}
        prefix = f"{subfolder}/" if subfolder else ""
        try:
            # The config comes first: it tells an adapter from a model with gigabytes of weights.
            snapshot = _download(name, [prefix + CONFIG_FILE], revision=revision, **options)
            _check_files(snapshot / subfolder, [CONFIG_FILE], name)
            _read_config_dict(snapshot / subfolder / CONFIG_FILE)
            snapshot = _download(name, [prefix + file for file in ADAPTER_FILES], revision=snapshot.name, **options)
        except LocalEntryNotFoundError as exc:
            raise ValueError(
                f"{name} is no folder here and not in the cache, and the Hub can't be reached: {exc}"
            ) from exc
        folder, commit = snapshot / subfolder, snapshot.name
    _check_files(folder, [CONFIG_FILE, TOKENS_FILE, PROCESSOR_FILE], name)
    config = read_config(folder)
    tensors = read_state(folder, config)
    head = {name: tensors.pop(name) for name in list(tensors) if name.startswith(HEAD_PREFIX)}
    return Adapter(folder, config, tensors, head, commit)


def normalize_subfolder(subfolder: str) -> str:
    """Returns `"a/b"` for `"./a/b/"`; `ValueError` if it leads out of the repo."""
    path = PurePosixPath(subfolder)
    if path.is_absolute() or ".." in path.parts:
        raise ValueError(f"subfolder must be a folder inside the repo, such as 'small', got {subfolder!r}")
    return "/".join(path.parts)


def _download(repo_id: str, files: Iterable[str], *, revision: str | None, **options: Any) -> Path:
    """Downloads the files that a repo has and checks their hashes; huggingface_hub checks only sizes."""
    snapshot = Path(snapshot_download(repo_id, revision=revision, allow_patterns=list(files), **options))
    damaged = [file for file in files if (snapshot / file).is_file() and not has_cache_hash(snapshot / file)]
    if damaged and (options["force_download"] or options["local_files_only"]):
        raise ValueError(
            f"{repo_id}: {' and '.join(damaged)} was damaged on the network or in the cache ({snapshot}): load it "
            "again, with force_download=True"
        )
    if damaged:
        return _download(repo_id, damaged, revision=snapshot.name, **{**options, "force_download": True})
    return snapshot


def _check_files(folder: Path, files: Iterable[str], name: str) -> None:
    if missing := [file for file in files if not (folder / file).is_file()]:
        was_stopped = CONFIG_FILE in missing and (folder / TOKENS_FILE).exists()
        raise ValueError(
            f"{name} is not a robustness-token adapter: it has no {' and no '.join(missing)}"
            + (" (perhaps a save was stopped: save again)" if was_stopped else "")
        )


def read_config(folder: Path) -> RobustnessTokenConfig:
    """Reads config.json; `ValueError` if it is damaged, or of a newer schema."""
    config_dict = _read_config_dict(folder / CONFIG_FILE)
    try:
        config: RobustnessTokenConfig = RobustnessTokenConfig.from_dict(config_dict)
    except ValueError as exc:
        raise ValueError(f"{folder / CONFIG_FILE}: {exc}") from exc
    return config


def _read_config_dict(path: Path) -> dict[str, Any]:
    config_dict = read_json(path)
    if config_dict.get("model_type") != RobustnessTokenConfig.model_type:
        raise ValueError(
            f"{path} has model_type {config_dict.get('model_type')!r}, expected "
            f"{RobustnessTokenConfig.model_type!r}: it is the config of another model, not of an adapter (for new "
            "tokens on that model: RobustnessTokenModel.from_base)"
        )
    return config_dict


def check_base_is_repo_id(name: str) -> None:
    """Raises `ValueError` unless the base that a config from the Hub names is a repo id and no local folder."""
    if not is_repo_id(name):
        raise ValueError(
            f"the adapter came from the Hub, and its config names the base {name!r}, which is no repo id: "
            "pass base_model= to say where the base is"
        )
    if os.path.isdir(name):
        raise ValueError(
            f"the adapter came from the Hub, and its config names the base {name!r}, which is also a local folder: "
            "pass base_model= with its whole path if that is the base, or work in another folder"
        )


def read_state(folder: Path, config: RobustnessTokenConfig) -> dict[str, Tensor]:
    """Reads what an adapter learned; `ValueError` unless it is float32, finite, and tokens have the config's shape."""
    is_classifier = "RobustnessTokenForImageClassification" in (config.architectures or ())
    others = "|".join([_GAIN_OR_SHIFT] * bool(config.gains_and_shifts) + [_HEAD] * is_classifier)
    expected = {TOKENS: torch.empty(config.tokens_shape, dtype=torch.float32, device="meta")}
    return read_tensors(
        folder / TOKENS_FILE,
        expected,
        config_file=CONFIG_FILE,
        others=others or None,
        max_other_bytes=_MAX_OTHER_BYTES if others else 0,
    )


def read_report(folder: Path) -> RobustnessReport | None:
    """Reads evaluation.json; None if there is none or it is of an older schema, `ValueError` if it is damaged."""
    path = folder / REPORT_FILE
    if not path.is_file():
        return None
    try:
        return RobustnessReport.from_dict(read_json(path))
    except OlderReportError as exc:
        logger.warning("%s is ignored: %s", path, exc)
        return None
    except ValueError as exc:
        raise ValueError(f"{path}: {exc}") from exc


def report_of(folder: Path, state: TokenState) -> RobustnessReport | None:
    """Reads the report in a folder; None, with a warning, if it measured another state; `ValueError` if damaged."""
    report = read_report(folder)
    if report is not None and report.adapter_digest != state_digest(state):
        logger.warning(
            "%s is ignored: it measured another adapter than this one, or an older package wrote it: evaluate again "
            "with `robtok evaluate`",
            folder / REPORT_FILE,
        )
        return None
    return report


def check_no_other_adapter(folder: Path, state: TokenState) -> None:
    """Raises `ValueError` if a folder holds another adapter than this state, beside which a report would be wrong."""
    if is_adapter(folder) and state_digest(load_adapter(folder).learned) != state_digest(state):
        raise ValueError(
            f"output_dir {str(folder)!r} holds another adapter than the evaluated one: its report would be taken for "
            "that one's; choose another output_dir"
        )


def write_adapter(folder: Path, state: TokenState, others: Mapping[str, bytes]) -> None:
    """Writes an adapter's files: its state as float32, readable by its owner alone, and the others by name.

    A kill leaves the adapter that was there, the new one, or one without a config, which no reader takes for an
    adapter. `OSError` leaves the one that was there.
    """
    state = {name: tensor.detach().to("cpu", torch.float32).contiguous() for name, tensor in state.items()}
    check_finite("refusing to save an adapter", state)
    # Not save_file, which maps the file: a full disk can then kill the process.
    contents = {**others, TOKENS_FILE: save(state, metadata={"format": "pt"})}
    try:
        write_together(folder, contents, last=CONFIG_FILE, secret=[TOKENS_FILE])
    except OSError as exc:
        raise OSError(
            exc.errno,
            f"the adapter in {folder} could not be written ({exc.strerror}) and is unchanged: make room, or correct "
            "the permissions, and save again",
        ) from exc


def is_adapter(folder: Path) -> bool:
    """Tells whether a folder holds a whole adapter, of which the config is written last."""
    return (folder / CONFIG_FILE).is_file() and (folder / TOKENS_FILE).is_file()


def holds_adapter(folder: str | os.PathLike[str]) -> bool:
    """Tells whether a folder holds an adapter's files that saving would overwrite."""
    return any((Path(local_path(folder)) / file).exists() for file in (CONFIG_FILE, TOKENS_FILE))


def is_repo_id(name: str) -> bool:
    """Tells whether a name has the form of a Hub repo id."""
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
    """Returns the commit of a repo in the local cache, which is the one just loaded; None for a folder."""
    if os.path.isdir(repo_id) or not is_repo_id(repo_id):
        return None
    cached = try_to_load_from_cache(repo_id, CONFIG_FILE, revision=revision, cache_dir=cache_dir)
    return Path(cached).parent.name if isinstance(cached, str) else None
