"""Pushes an adapter or adversarial pairs to the Hub: only their files, private by default."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, DatasetInfo, HfApi, ModelInfo
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from PIL import Image

from ..configuration import REMOTE_CODE, REMOTE_CODE_FILE, RobustnessTokenConfig
from ..data import IMAGE_COLUMNS, INFO_FILE, PAIRS_SPLIT, PairsInfo, load_adversarial_pairs, pair_features
from ..report import REPORT_FILE
from ..utils import has_cache_hash, local_path
from .adapter_folder import (
    CARD_FILE,
    CONFIG_FILE,
    PROCESSOR_FILE,
    TOKENS_FILE,
    is_repo_id,
    load_adapter,
    normalize_subfolder,
    report_of,
)
from .card import read_card, render_card, update_card


logger = logging.getLogger(__name__)

UNFINISHED_FILE = "adversarial_pairs.unfinished.json"
"""Replaces the description in a repo while pairs are uploaded."""

_HEADING = "\n# Adversarial pairs\n\n"


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
    """Uploads an adapter folder in one commit, or in none if the repo already holds the same.

    Uploads the configuration, the tokens, the image processor, the evaluation report if there is one, and a card
    rendered for this repo. A card on the Hub keeps everything outside our markers. A report on the Hub stays if it was
    measured with these tokens.

    Args:
        folder: Adapter folder written by `save_pretrained`; not changed.
        repo_id: `user/name`; created if it doesn't exist.
        base_model_id: Hub id of the base; required if the base was loaded from a folder. It is pinned to its last
            commit, unless the folder pins one of that base.
        private: Tokens are secrets: anyone who reads them can attack through them. A push to a public repo
            is refused unless this is False.
        token: Hub token; by default the saved login.
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
    path = Path(local_path(folder))
    if not path.is_dir():
        raise ValueError(f"folder must be an adapter written by save_pretrained; there is no {str(path)!r}")
    adapter = load_adapter(path)
    _ = adapter.image_processor  # reads it
    config, report, old_card = adapter.config, adapter.report, read_card(path)
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
    # If somebody else commits after this, our commit fails instead of overwriting theirs.
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
        contents[REPORT_FILE] = report.to_json_string().encode()
    elif (stored := _download(api, repo_id, prefix + REPORT_FILE, parent)) is not None:
        report = report_of(stored.parent, adapter.learned)
        if report is None:
            operations.append(CommitOperationDelete(prefix + REPORT_FILE))
    card = render_card(
        config,
        name=repo_id,
        subfolder=subfolder,
        license=_license_of_base(config, api),
        report=report,
        tags=tags,
        is_public=not repo.private,
    )
    if (downloaded := _download(api, repo_id, prefix + CARD_FILE, parent)) is not None:
        old_card = read_card(downloaded.parent)
    contents[CARD_FILE] = update_card(old_card, card).encode()
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
    """Creates a repo unless it exists and returns its info; `ValueError` if it is public and `private` is True."""
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


def push_adversarial_pairs(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    base_model_id: str | None = None,
    private: bool = True,
    token: str | bool | None = None,
) -> CommitInfo:
    """Uploads a folder of pairs as a dataset of PNG images, shard by shard.

    Pairs don't reveal the tokens, since the attack never saw any. But they hold the images, which may be private.

    Args:
        folder: Folder written by [`make_adversarial_pairs`].
        repo_id: `user/name`; created if it doesn't exist.
        base_model_id: Hub id of the base; required if the base was loaded from a folder.
        private: A push to a public repo is refused unless this is False.
        token: Hub token; by default the saved login.

    Returns:
        The last commit, which adds the description. Without it, a repo's pairs can't be loaded.

    Raises:
        ValueError: If pairs are missing, or there are none, if their base is a folder and `base_model_id` is missing,
            if the repo holds something else, or if it is public and `private` is True.
    """
    import datasets

    pairs = load_adversarial_pairs(folder)
    if not len(pairs):
        raise ValueError(f"{os.fspath(folder)!r} holds no pairs, because all images were broken: attack other images")
    info = replace(pairs.info, base_model=base_model_id or pairs.info.base_model)
    if not is_repo_id(info.base_model):
        raise ValueError(
            f"the pairs' base is the folder {info.base_model!r}, which nobody else has: pass base_model_id= with its "
            "Hub id"
        )
    api = HfApi(token=token)
    reason = "the pairs hold the images of the dataset"
    repo = create_repo(api, repo_id, private=private, reason=reason, repo_type="dataset")
    repo_id = repo.id
    files = {file.rfilename for file in repo.siblings or ()}
    others = sorted(files - {CARD_FILE, ".gitattributes"})
    if others and not files & {INFO_FILE, UNFINISHED_FILE}:
        raise ValueError(
            f"{repo_id} holds other files, such as {others[0]}, and no adversarial pairs. The upload would replace "
            "them: choose another repo_id"
        )
    # The description comes last, so that it never describes images that are not there.
    old = [CommitOperationDelete(INFO_FILE)] if INFO_FILE in files else []
    api.create_commit(
        repo_id,
        [CommitOperationAdd(UNFINISHED_FILE, info.to_json().encode()), *old],
        repo_type="dataset",
        commit_message="Begin to upload adversarial pairs",
    )
    stream = pairs.stored.to_iterable_dataset(num_shards=min(len(pairs), info.num_shards))
    features = datasets.Features({**pair_features(), **{column: datasets.Image() for column in IMAGE_COLUMNS}})
    encode = partial(_to_png, image_size=info.image_size)
    stream.map(encode, features=features).push_to_hub(repo_id, split=PAIRS_SPLIT, private=private, token=token)
    card = Path(api.hf_hub_download(repo_id, CARD_FILE, repo_type="dataset")).read_text(encoding="utf-8")
    return api.create_commit(
        repo_id,
        [
            CommitOperationAdd(INFO_FILE, info.to_json().encode()),
            CommitOperationDelete(UNFINISHED_FILE),
            CommitOperationAdd(CARD_FILE, (card.split(_HEADING)[0] + _describe_for_people(info)).encode()),
        ],
        repo_type="dataset",
        commit_message="Describe the adversarial pairs",
    )


def _to_png(row: Mapping[str, Any], image_size: list[int]) -> dict[str, Any]:
    height, width = image_size
    encoded = {}
    for column in IMAGE_COLUMNS:
        Image.frombytes("RGB", (width, height), row[column]).save(file := BytesIO(), "png")
        encoded[column] = {"bytes": file.getvalue(), "path": None}
    return encoded


def _describe_for_people(info: PairsInfo) -> str:
    attack = ", ".join(f"{name} {value}" for name, value in info.attack.items() if value is not None)
    return f"""{_HEADING}
Images and attacked versions of them, made by `robtok attack` of robustness_tokens {info.package_version} to train
robustness tokens. The attack ({attack}) used {info.base_model_class} `{info.base_model}` alone and changes no pixel by
more than {info.max_pixel_difference}/255; `{INFO_FILE}` holds all settings. The pairs reveal no tokens, since the
attack never saw any.

    robtok train --base_model {info.base_model} --dataset <this dataset> --output_dir tokens
"""
