"""An adapter folder to the Hub: one commit, private by default, nothing but the adapter's files."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
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
    """Uploads an adapter folder in one commit; none is made where the repo holds the same already.

    What is uploaded: the configuration, the tokens, the image processor, the evaluation report if there is one, and
    the card, made anew for this repo. A card that is on the Hub already keeps all that stands outside our markers,
    and a report that is there stays while the tokens are those that it tells of.

    Args:
        folder: What `save_pretrained` wrote. It is left as it is.
        repo_id: `user/name`; made if it doesn't exist.
        base_model_id: Hub id of the base, required where it was loaded from a folder. It is pinned to its last commit,
            unless the folder pins one of that base.
        private: Tokens are secrets: anyone who reads them can attack through them. A repo that is public already
            refuses the push unless this is False.
        token: Of the Hub; by default the one that is logged in.
        revision: Branch, made if it doesn't exist; or an open pull request, `refs/pr/N`.
        create_pr: Open a pull request instead of committing to the branch, which must exist then.
        commit_message: First line of the commit.
        tags: More tags for the card.
        subfolder: Folder inside the repo.

    Returns:
        The commit, or the repo's last one if there was nothing to commit.

    Raises:
        ValueError: If the folder holds no whole adapter, if its base is a folder and `base_model_id` is not given, or
            if the repo is public and `private` is True. Errors of the Hub pass through.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ValueError(f"folder must be that of an adapter, as save_pretrained writes it; there is no {str(path)!r}")
    adapter = load_adapter(path)
    _ = adapter.image_processor  # reads it
    config, report = adapter.config, adapter.report
    subfolder = normalize_subfolder(subfolder)
    prefix = f"{subfolder}/" if subfolder else ""
    api = HfApi(token=token)
    _name_base_by_id(config, base_model_id, api)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    _check_visibility(api, repo_id, private)
    if revision is not None and not create_pr and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # Whoever commits between this and our commit makes it fail, instead of being overwritten.
    parent = api.model_info(repo_id, revision=revision).sha

    contents: dict[str, str | Path | bytes] = {
        CONFIG_FILE: config.to_json_string(use_diff=False).encode(),
        TOKENS_FILE: path / TOKENS_FILE,
        PROCESSOR_FILE: path / PROCESSOR_FILE,
    }
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    if report is not None:
        report = replace(
            report,  # which names folders of this machine
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
    except RuntimeError as exc:  # which keeps its reason to itself
        raise OSError(f"nothing was pushed to {repo_id}, push again: {exc} {exc.__cause__ or ''}".rstrip()) from exc
    except HfHubHTTPError:  # which says what happened
        raise
    except HTTPError as exc:
        raise OSError(
            f"the connection broke while pushing to {repo_id}: push again, which changes nothing if all has arrived "
            f"({exc})"
        ) from exc


def _name_base_by_id(config: RobustnessTokenConfig, base_model_id: str | None, api: HfApi) -> None:
    name = config.base_model_name_or_path if base_model_id is None else base_model_id
    if not is_repo_id(name):
        what = f"the base is {name!r}" if base_model_id is None else f"base_model_id={name!r}"
        raise ValueError(f"{what}, which is no id of a Hub repo: pass base_model_id= with one, such as 'user/name'")
    if name != config.base_model_name_or_path or config.base_model_revision is None:
        config.base_model_name_or_path, config.base_model_revision = name, api.model_info(name).sha


def _check_visibility(api: HfApi, repo_id: str, private: bool) -> None:
    is_private = api.model_info(repo_id).private
    if private and not is_private:
        raise ValueError(
            f"{repo_id} exists and is public: tokens are secrets, so they are not pushed there. Make the repo "
            "private, or pass private=False if everyone may know the tokens"
        )
    if is_private and not private:
        logger.warning("%s exists and is private: it stays so. Make it public in its settings.", repo_id)
    elif not private:
        logger.warning(
            "%s is public: whoever reads the tokens there can attack through them, and against such an attacker they "
            "protect far less.",
            repo_id,
        )


def _license_of_base(config: RobustnessTokenConfig, api: HfApi) -> str | None:
    """What the base's card says; None where there is none to read."""
    try:
        card = api.model_info(config.base_model_name_or_path, revision=config.base_model_revision).card_data
    except HfHubHTTPError:
        return None
    return card.license if card is not None else None


def _download(api: HfApi, repo_id: str, file: str, commit: str | None) -> Path | None:
    """A file of the repo, as it is there; None if there is none."""
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
        raise ValueError(f"{path} is not in UTF-8, as a card on the Hub must be: save it anew ({exc})") from exc
