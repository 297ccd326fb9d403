"""An adapter folder to the Hub: one commit, private by default, nothing but the adapter's files."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import HfHubHTTPError

from .configuration import RobustnessTokenConfig
from .hub import (
    CARD_FILE,
    CONFIG_FILE,
    EVALUATION_FILE,
    PROCESSOR_FILE,
    TOKENS_FILE,
    AdapterFolder,
    is_repo_id,
    read_config,
    read_report,
    read_tokens,
)
from .model_card import render_card, update_card
from .source_files import source_files


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
    the card, made anew for this repo. A card that is on the Hub already keeps all that stands outside our markers.

    Args:
        folder: What `save_pretrained` wrote. It is left as it is.
        repo_id: `user/name`; made if it doesn't exist.
        base_model_id: Hub id of the base; required where it was loaded from a folder.
        private: Tokens are secrets: anyone who reads them can attack through them. A repo that is public already
            refuses the push unless this is False.
        token: Of the Hub; by default the one that is logged in.
        revision: Branch; made if it doesn't exist.
        create_pr: Open a pull request instead of committing to the branch.
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
    adapter = AdapterFolder(path, from_hub=False)
    config = read_config(adapter)
    read_tokens(adapter, config)
    report = read_report(adapter)
    api = HfApi(token=token)
    _name_base_by_id(config, base_model_id, api)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    _check_visibility(api, repo_id, private)
    if revision is not None and not revision.startswith("refs/"):
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # Whoever commits between this and our commit makes it fail, instead of being overwritten.
    parent = api.model_info(repo_id, revision=revision).sha

    prefix = f"{subfolder}/" if subfolder else ""
    card = render_card(
        config, name=repo_id, subfolder=subfolder, license=_license_of_base(config, api), report=report, tags=tags
    )
    local_card = path / CARD_FILE
    existing = _read_remote(api, repo_id, prefix + CARD_FILE, parent)
    if existing is None and local_card.exists():
        existing = _read_card(local_card)
    contents: dict[str, str | Path | bytes] = {
        CONFIG_FILE: config.to_json_string(use_diff=False).encode(),
        TOKENS_FILE: path / TOKENS_FILE,
        PROCESSOR_FILE: path / PROCESSOR_FILE,
        CARD_FILE: update_card(existing, card).encode(),
    }
    operations: list[CommitOperationAdd | CommitOperationDelete] = []
    if report is not None:
        contents[EVALUATION_FILE] = path / EVALUATION_FILE
    elif api.file_exists(repo_id, prefix + EVALUATION_FILE, revision=parent):
        operations.append(CommitOperationDelete(prefix + EVALUATION_FILE))  # it tells of other tokens
    operations += [CommitOperationAdd(prefix + name, content) for name, content in contents.items()]
    if config.auto_map:
        # transformers looks for code at the root of a repo, whatever folder the adapter is in.
        operations += [CommitOperationAdd(name, code.encode()) for name, code in source_files("modeling").items()]
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


def _name_base_by_id(config: RobustnessTokenConfig, base_model_id: str | None, api: HfApi) -> None:
    if base_model_id is not None:
        if not is_repo_id(base_model_id):
            raise ValueError(f"base_model_id={base_model_id!r} is not the id of a Hub repo, such as 'user/name'")
        config.base_model_name_or_path = base_model_id
        config.base_model_revision = api.model_info(base_model_id).sha
    elif not is_repo_id(config.base_model_name_or_path):
        raise ValueError(
            f"the base is the folder {config.base_model_name_or_path!r}, which nobody else has: pass base_model_id= "
            "with its id on the Hub"
        )


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


def _read_remote(api: HfApi, repo_id: str, file: str, commit: str | None) -> str | None:
    if not api.file_exists(repo_id, file, revision=commit):
        return None
    return _read_card(Path(api.hf_hub_download(repo_id, file, revision=commit)))


def _read_card(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # with its own line breaks
    except UnicodeDecodeError as exc:
        raise ValueError(f"{path} is not in UTF-8, as a card on the Hub must be: save it anew ({exc})") from exc
