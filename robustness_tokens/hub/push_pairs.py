"""Pushes a folder of adversarial pairs to the Hub, as a dataset of PNG images that every viewer can show."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from PIL import Image

from ..data import INFO_FILE, PAIRS_SPLIT, PairsInfo, load_adversarial_pairs, pair_features
from .adapter_folder import CARD_FILE, is_repo_id
from .pushing import create_repo


UNFINISHED_FILE = "adversarial_pairs.unfinished.json"
"""Replaces the description in a repo while pairs are uploaded."""

_IMAGE_COLUMNS = ("image", "adversarial_image")
_HEADING = "\n# Adversarial pairs\n\n"


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
        private: A repo that is already public refuses the push unless this is False.
        token: Hub token; by default the one that is logged in.

    Returns:
        The last commit, which adds the description: no pairs are found in a repo without it.

    Raises:
        ValueError: If pairs are missing, or there are none, if their base is a folder and `base_model_id` is missing,
            if the repo holds something else, or if it is public and `private` is True.
    """
    import datasets

    pairs = load_adversarial_pairs(folder)
    if not len(pairs):
        raise ValueError(f"{os.fspath(folder)!r} holds no pairs, because all images were broken: attack other images")
    info = dataclasses.replace(pairs.info, base_model=base_model_id or pairs.info.base_model)
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
    features = datasets.Features({**pair_features(), **{column: datasets.Image() for column in _IMAGE_COLUMNS}})
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
    return {column: _encode_png(row[column], image_size) for column in _IMAGE_COLUMNS}


def _encode_png(pixels: bytes, image_size: list[int]) -> dict[str, Any]:
    height, width = image_size
    file = BytesIO()
    Image.frombytes("RGB", (width, height), pixels).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def _describe_for_people(info: PairsInfo) -> str:
    attack = ", ".join(f"{name} {value}" for name, value in info.attack.items() if value is not None)
    return f"""{_HEADING}
Images and attacked versions of them, made by `robtok attack` of robustness_tokens {info.package_version} to train
robustness tokens. The attack ({attack}) used {info.base_model_class} `{info.base_model}` alone and changes no pixel by
more than {info.max_pixel_difference}/255; `{INFO_FILE}` holds all settings. The pairs reveal no tokens, since the
attack never saw any.

    robtok train --base_model {info.base_model} --dataset <this dataset> --output_dir tokens
"""
