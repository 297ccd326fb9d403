"""Pushes an adapter folder to the Hub: one commit, private by default, nothing but the adapter's files."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, DatasetInfo, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from ..configuration import REMOTE_CODE, REMOTE_CODE_FILE, RobustnessTokenConfig
from ..utils import has_cache_hash
from .adapter_folder import (
    CARD_FILE,
    CONFIG_FILE,
    EVALUATION_FILE,
    PROCESSOR_FILE,
    TOKENS_FILE,
    is_repo_id,
    load_adapter,
    normalize_subfolder,
    report_of,
)
from .card import render_card, update_card


logger = logging.getLogger(__name__)


def push_adapter(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    base_model_id: str | None = None,
    private: bool = True,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload robustness tokens",
    tags: Sequence[str] = (),
    subfolder: str = "",
) -> CommitInfo:
    """Uploads an adapter folder in one commit; makes none if the repo already holds the same.

    Uploads the configuration, the tokens, the image processor, the evaluation report if there is one, and a card
    rendered for this repo. A card on the Hub keeps everything outside our markers. A report on the Hub stays if it was
    measured with these tokens.

    Args:
        folder: Adapter folder written by `save_pretrained`; not changed.
        repo_id: `user/name`; created if it doesn't exist.
        base_model_id: Hub id of the base; required if the base was loaded from a folder. It is pinned to its last
            commit, unless the folder pins one of that base.
        private: Tokens are secrets: anyone who reads them can attack through them. A repo that is already public
            refuses the push unless this is False.
        token: Hub token; by default the one that is logged in.
        revision: Branch, created if it doesn't exist; or an open pull request, `refs/pr/N`.
        create_pr: Open a pull request instead of committing to the branch, which must exist.
        commit_message: First line of the commit.
        tags: More tags for the card.
        subfolder: Folder of the adapter inside the repo.

    Returns:
        The commit, or the repo's last one if there was nothing to commit.

    Raises:
        ValueError: If the folder holds no complete adapter, if its base is a folder and `base_model_id` is missing, or
            if the repo is public and `private` is True. Errors of the Hub pass through.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"folder must be that of an adapter, written by save_pretrained; there is no {str(path)!r}")
    adapter = load_adapter(path)
    _ = adapter.image_processor  # reads it
    config, report = adapter.config, adapter.report
    subfolder = normalize_subfolder(subfolder)
    prefix = f"{subfolder}/" if subfolder else ""
    api = HfApi(token=token)
    _name_base_by_id(config, base_model_id, api)
    repo = create_repo(api, repo_id, private=private, reason="tokens are secrets")
    repo_id = repo.id
    if not repo.private:
        logger.warning(
            "%s is public: whoever reads the tokens there can attack through them, and against such an attacker they "
            "protect far less.",
            repo_id,
        )
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # Our commit fails, instead of overwriting it, if somebody else commits after this.
    parent = api.model_info(repo_id, revision=revision).sha

    contents: dict[str, str | Path | bytes] = {
        CONFIG_FILE: config.to_json_string(use_diff=False).encode(),
        TOKENS_FILE: path / TOKENS_FILE,
        PROCESSOR_FILE: path / PROCESSOR_FILE,
    }
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    if report is not None:
        report = replace(
            report,  # it names local folders
            adapter=repo_id,
            base_model=config.base_model_name_or_path,
            base_model_revision=config.base_model_revision,
        )
        contents[EVALUATION_FILE] = report.to_json_string().encode()
    elif (stored := _download(api, repo_id, prefix + EVALUATION_FILE, parent)) is not None:
        _download(api, repo_id, prefix + TOKENS_FILE, parent)
        report = report_of(stored.parent, adapter.tokens)
        if report is None:
            operations.append(CommitOperationDelete(prefix + EVALUATION_FILE))
    card = render_card(
        config, name=repo_id, subfolder=subfolder, license=_license_of_base(config, api), report=report, tags=tags
    )
    old_card = _download(api, repo_id, prefix + CARD_FILE, parent) or path / CARD_FILE
    contents[CARD_FILE] = update_card(_read_card(old_card), card).encode()
    operations += [CommitOperationAdd(prefix + name, content) for name, content in contents.items()]
    if config.auto_map:
        # transformers looks for code at the root of a repo, even if the adapter is in a subfolder.
        operations.append(CommitOperationAdd(REMOTE_CODE_FILE, REMOTE_CODE.encode()))
    try:
        return api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            parent_commit=parent,
        )
    except RuntimeError as exc:  # its message leaves out the reason
        raise OSError(f"nothing was pushed to {repo_id}, push again: {exc} {exc.__cause__ or ''}".rstrip()) from exc
    except HfHubHTTPError:  # its message is clear
        raise
    except HTTPError as exc:
        raise OSError(
            f"the connection broke while pushing to {repo_id}: push again; that changes nothing if everything arrived "
            f"({exc})"
        ) from exc


def create_repo(
    api: HfApi, repo_id: str, *, private: bool, reason: str, repo_type: str = "model"
) -> ModelInfo | DatasetInfo:
    """Creates a repo unless it exists, and returns what the Hub knows of it; a public one needs `private=False`."""
    repo_id = api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True).repo_id
    repo = api.dataset_info(repo_id) if repo_type == "dataset" else api.model_info(repo_id)
    if private and not repo.private:
        raise ValueError(
            f"{repo_id} exists and is public: {reason}. Make the repo private, or pass private=False if everyone may "
            "see them"
        )
    if repo.private and not private:
        logger.warning("%s exists and stays private. Make it public in its settings.", repo_id)
    return repo


def _name_base_by_id(config: RobustnessTokenConfig, base_model_id: str | None, api: HfApi) -> None:
    name = config.base_model_name_or_path if base_model_id is None else base_model_id
    if not is_repo_id(name):
        what = f"the base is {name!r}" if base_model_id is None else f"base_model_id={name!r}"
        raise ValueError(f"{what}, which is not a Hub repo id: pass base_model_id= with one, such as 'user/name'")
    if name != config.base_model_name_or_path or config.base_model_revision is None:
        config.base_model_name_or_path, config.base_model_revision = name, api.model_info(name).sha


def _license_of_base(config: RobustnessTokenConfig, api: HfApi) -> str | None:
    """Returns the license that the base's card names; None if there is no card to read."""
    try:
        card = api.model_info(config.base_model_name_or_path, revision=config.base_model_revision).card_data
    except HfHubHTTPError:
        return None
    return card.license if card is not None else None


def _download(api: HfApi, repo_id: str, file: str, commit: str | None) -> Path | None:
    """Downloads a file of the repo; None if it has none."""
    if not api.file_exists(repo_id, file, revision=commit):
        return None
    path = Path(api.hf_hub_download(repo_id, file, revision=commit, force_download=True))
    if not has_cache_hash(path):
        raise OSError(f"nothing was pushed to {repo_id}, push again: its {file} came damaged over the network")
    return path


def _read_card(path: Path) -> str | None:
    if not path.exists():
        return None
    try:
        return path.read_bytes().decode("utf-8")  # with its own line breaks
    except UnicodeDecodeError as exc:
        raise ValueError(f"{path} must be in UTF-8, as every card on the Hub: save it in UTF-8 ({exc})") from exc
