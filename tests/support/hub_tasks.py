"""The tasks that tests give to a client of the Hub; see `tests.support.hub_client`. Arguments and results are JSON."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from PIL import Image
from torch import Tensor
from transformers import AutoModel, AutoModelForImageClassification, pipeline

from robtok import main as run_robtok
from robustness_tokens.data.adversarial_pairs import load_adversarial_pairs
from robustness_tokens.hub.adapter_folder import load_adapter
from robustness_tokens.hub.pushing import push_adapter, push_adversarial_pairs
from robustness_tokens.models.modeling import RobustnessTokenModel, RobustnessTokenPreTrainedModel
from robustness_tokens.training.arguments import RobustnessTokenTrainingArguments
from robustness_tokens.training.trainer import RobustnessTokenTrainer


# Plain huggingface_hub


def api(method: str, *, token: str | None = None, xet: bool = True, **kwargs: Any) -> Any:
    """Calls a method of HfApi."""
    choose_upload(xet)
    return jsonable(getattr(HfApi(token=token or False), method)(**kwargs))


def jsonable(value: Any) -> Any:
    """Converts results of huggingface_hub (its own classes, generators, lists) for JSON."""
    if type(value) in (bool, int, float, str, dict, type(None)):
        return value
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [jsonable(each) for each in value]
    attributes = getattr(value, "__dict__", None)
    if attributes is None:
        return str(value)
    return {name: jsonable(each) for name, each in attributes.items() if not name.startswith("_")}


def choose_upload(xet: bool) -> None:
    """Chooses Xet or LFS for large files, as HF_HUB_DISABLE_XET in the environment does."""
    constants.HF_HUB_DISABLE_XET = not xet


def download(repo_id: str, *, token: str | None = None, **kwargs: Any) -> dict[str, str]:
    """Returns the files of a snapshot by name, in hexadecimal digits."""
    folder = Path(snapshot_download(repo_id, token=token or False, **kwargs))
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes().hex() for path in files}


# The package


def train_and_push(
    base: str,
    repo_id: str,
    *,
    output_dir: str,
    token: str,
    xet: bool,
    **push_kwargs: Any,
) -> dict[str, str]:
    """Trains tokens on a base from the Hub for two steps, and pushes them."""
    choose_upload(xet)
    os.environ["HF_TOKEN"] = token  # as somebody who has logged in
    model = RobustnessTokenModel.from_base(base, num_robustness_tokens=3)
    untrained = model.robustness_tokens.detach().clone()
    size = model.get_base_model().config.image_size
    images = [{"images": torch.rand(3, size, size)} for _ in range(4)]
    args = RobustnessTokenTrainingArguments(
        output_dir=output_dir,
        max_steps=2,
        per_device_train_batch_size=len(images),
        learning_rate=0.05,
        attack="pgd",
        num_attack_steps=1,
        disable_tqdm=True,
    )
    trainer = RobustnessTokenTrainer(model, args, images)
    trainer.train()
    assert not torch.equal(model.robustness_tokens, untrained)
    trainer.push_to_hub(repo_id, **push_kwargs)
    return described(model)


def push_pairs_and_read_them(folder: str, repo_id: str, *, token: str, **kwargs: Any) -> list[dict[str, Any]]:
    """Pushes a folder of adversarial pairs, and reads them back from the Hub."""
    choose_upload(xet=False)
    os.environ["HF_TOKEN"] = token
    push_adversarial_pairs(folder, repo_id, **kwargs)
    pairs = load_adversarial_pairs(repo_id)
    images = ("images", "adversarial_images")
    return [
        {**pair, **{key: digits(pair[key]) for key in images}, "digest": pairs.digest()}
        for pair in map(pairs.__getitem__, range(len(pairs)))
    ]


def load(
    adapter: str, *, token: str | None = None, xet: bool = True, auto: bool = False, **kwargs: Any
) -> dict[str, str]:
    """Loads an adapter and its base, by our class or by AutoModel."""
    choose_upload(xet)
    model_class: Any = AutoModel if auto else RobustnessTokenModel
    return described(model_class.from_pretrained(adapter, token=token or False, **kwargs))


def described(model: RobustnessTokenPreTrainedModel) -> dict[str, str]:
    """Returns values that must be bit-equal wherever the model is loaded, and its base."""
    size = model.get_base_model().config.image_size
    pixel_values = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        features = model.eval().get_features(pixel_values)
    return {
        "tokens": digits(model.robustness_tokens),
        "features": digits(features),
        "base": f"{model.config.base_model_name_or_path}@{model.config.base_model_revision}",
        "processor": model.image_processor.to_json_string() if model.image_processor is not None else "",
    }


def digits(tensor: Tensor) -> str:
    return tensor.detach().contiguous().numpy().tobytes().hex()


def classify(repo_id: str, *, token: str) -> list[list[dict[str, Any]]]:
    """Returns the predictions of AutoModelForImageClassification and of a pipeline for a grey picture."""
    picture = Image.new("RGB", (16, 16), "grey")
    model: Any = AutoModelForImageClassification.from_pretrained(repo_id, token=token)
    with torch.no_grad():
        logits = model(**model.image_processor(picture, return_tensors="pt")).logits[0]
    by_hand = [{"label": model.config.id2label[i], "score": float(p)} for i, p in enumerate(logits.softmax(0))]
    by_pipeline = pipeline("image-classification", model=repo_id, token=token)(picture, top_k=len(by_hand))
    return [sorted(scores, key=lambda score: str(score["label"])) for scores in (by_hand, by_pipeline)]


def load_and_save(adapter: str, folder: str, *, token: str, **save_kwargs: Any) -> None:
    """Loads an adapter, and saves it into a folder; with push_to_hub=True to the Hub too."""
    os.environ["HF_TOKEN"] = token
    RobustnessTokenModel.from_pretrained(adapter).save_pretrained(folder, **save_kwargs)


def push(folder: str, repo_id: str, *, token: str = "hf_alice", xet: bool = True, **kwargs: Any) -> Any:
    """Pushes an adapter folder."""
    choose_upload(xet)
    return jsonable(push_adapter(folder, repo_id, token=token, **kwargs))


def fetch(repo_id: str, *, token: str | None = "hf_alice", xet: bool = True, **kwargs: Any) -> dict[str, str]:
    """Downloads an adapter and reads its tokens, without its base."""
    choose_upload(xet)
    adapter = load_adapter(repo_id, token=token or False, **kwargs)
    files = {path.name: path.read_bytes().hex() for path in adapter.folder.iterdir() if path.is_file()}
    return {**files, "tokens": digits(adapter.tokens)}


def robtok(*, arguments: list[str], token: str | None, xet: bool = True) -> tuple[int, str]:
    """Runs the command line; returns its exit status and its output."""
    choose_upload(xet)
    if token is not None:
        os.environ["HF_TOKEN"] = token
    with captured_output() as output:
        try:
            run_robtok(arguments)
            status = 0
        except SystemExit as exc:
            status = int(exc.code or 0)
    return status, output.getvalue()


@contextlib.contextmanager
def captured_output() -> Iterator[io.StringIO]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        yield output
