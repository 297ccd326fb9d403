"""Reproduces the paper's table row by row with the real weights, with our numbers beside the published ones.

    python examples/reproduce_paper.py --list
    python examples/reproduce_paper.py --rows dinov2-small openclip-base-16 --dataset ILSVRC/imagenet-1k

Each row trains tokens with the paper's preset for the family, then attacks features and, if the base has a
classification head, classes as in the paper. Finished rows are kept in `--output`, so the same command continues
where it stopped. A row without its weights or data is listed with what is missing, and the exit status is 1; the table
with the published numbers is printed in any case.

How to read the numbers. Features: cosine of f([r, x]) with f([r, x_adv]), not with f(x), as the paper reports it,
along the tokens for (B, N, D) features, along the features for OpenCLIP. The attack works in normalised space, where
its "8/255" is about 1.8/255 in pixels, and never sees the tokens (grey box). Segmentation is not measured: the paper's
ADE20k heads are not in a format that transformers can load.

Source: Pulfer et al., "Robustness Tokens: Towards Adversarial Robustness of Transformers", ECCV 2024,
arXiv 2503.10191.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from tqdm.auto import tqdm

from robustness_tokens import (
    ImageDataset,
    ImageTransform,
    Normalizer,
    RobustnessTokenForImageClassification,
    RobustnessTokenModel,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    cosine_similarity,
    load_image_dataset,
    paper_attack,
    resolve_preset,
)
from robustness_tokens.attacks import example_generators
from robustness_tokens.data import IterableImageDataset, build_dataloader
from robustness_tokens.hub import holds_adapter
from robustness_tokens.models import RobustnessTokenPreTrainedModel


FEATURES = "features attacked (cosine)"
CLASSES, CLASSES_ATTACKED = "classes clean (%)", "classes attacked (%)"
SEGMENTS, SEGMENTS_ATTACKED = "segments clean (mIoU %)", "segments attacked (mIoU %)"
SHUFFLE_BUFFER = 1000  # encoded images of a stream held in memory

_Model = TypeVar("_Model", bound=RobustnessTokenPreTrainedModel)
Pair = tuple[float | None, float | None]  # without and with tokens; None where the paper gives no number


@dataclass(frozen=True)
class Row:
    """One backbone of the paper.

    Attributes:
        name: Its name in `--rows`.
        model_id: Hub id of the base.
        preset: The paper's recipe for it.
        published: The paper's numbers by metric, without and with tokens.
        head_id: Hub id of that base with the paper's linear head on [CLS, mean patch], if there is one.
    """

    name: str
    model_id: str
    preset: str
    published: Mapping[str, Pair]
    head_id: str | None = None

    @property
    def metrics(self) -> list[str]:
        """Metrics that are reported for this row."""
        return list(self.published) or [FEATURES]


def _dinov2(name: str, *numbers: float) -> Row:
    metrics = (CLASSES, SEGMENTS, FEATURES, CLASSES_ATTACKED, SEGMENTS_ATTACKED)
    published = dict(zip(metrics, zip(numbers[:5], numbers[5:], strict=True), strict=True))
    return Row(name, f"facebook/{name}", "dinov2", published, f"facebook/{name}-imagenet1k-1-layer")


def _deit3(name: str, architecture: str, published: Pair | None) -> Row:
    return Row(name, f"timm/{architecture}.fb_in1k", "deit3", {FEATURES: published} if published else {})


def _openclip(name: str, model: str, published: Pair | None) -> Row:
    return Row(name, f"laion/CLIP-ViT-{model}", "openclip", {FEATURES: published} if published else {})


# DINOv2: classes, segments, features, classes attacked, segments attacked; without tokens, then with.
ROWS = (
    _dinov2("dinov2-small", 80.0, 41.0, 0.09, 0.0, 2.8, 78.5, 40.6, 0.93, 31.9, 24.6),
    _dinov2("dinov2-base", 83.4, 45.1, 0.05, 0.0, 3.1, 83.1, 45.0, 0.92, 50.0, 23.4),
    _dinov2("dinov2-large", 85.5, 45.1, 0.06, 0.3, 4.5, 84.2, 45.5, 0.89, 62.9, 21.2),
    _dinov2("dinov2-giant", 85.2, 46.6, 0.12, 0.3, 4.7, 85.6, 47.2, 0.89, 63.1, 23.3),
    _dinov2("dinov2-with-registers-small", 79.8, 40.4, 0.01, 0.0, 2.1, 79.2, 40.9, 0.93, 30.5, 22.7),
    _dinov2("dinov2-with-registers-base", 83.7, 45.8, 0.03, 0.1, 3.0, 83.1, 45.8, 0.92, 49.7, 25.9),
    _dinov2("dinov2-with-registers-large", 86.1, 46.6, 0.03, 0.6, 4.6, 85.9, 46.7, 0.83, 58.7, 16.2),
    _dinov2("dinov2-with-registers-giant", 86.3, 46.8, 0.08, 0.9, 4.2, 86.1, 47.5, 0.90, 69.9, 25.7),
    _deit3("deit3-small", "deit3_small_patch16_224", None),
    _deit3("deit3-base", "deit3_base_patch16_224", (None, 0.74)),
    _deit3("deit3-large", "deit3_large_patch16_224", (0.22, 0.78)),
    _deit3("deit3-huge", "deit3_huge_patch14_224", (0.23, 0.77)),
    _openclip("openclip-base-32", "B-32-laion2B-s34B-b79K", None),
    _openclip("openclip-base-16", "B-16-laion2B-s34B-b88K", (-0.02, 0.86)),
    _openclip("openclip-large-14", "L-14-laion2B-s32B-b82K", (0.13, 0.91)),
    _openclip("openclip-huge-14", "H-14-laion2B-s32B-b79K", (0.10, 0.89)),
)


@dataclass(frozen=True)
class Settings:
    """Settings that the numbers of every row depend on; an output folder holds results of one setting.

    Attributes:
        dataset: ImageNet: a Hub id or a folder.
        train_split, eval_split: Its splits for training and for evaluation.
        num_images: Images of the evaluation, drawn with seed 0.
        streaming: Stream the dataset instead of downloading it whole.
        max_steps: Training steps; None uses the preset's, and any other number is not a reproduction.
    """

    dataset: str
    train_split: str
    eval_split: str
    num_images: int
    streaming: bool
    max_steps: int | None


def lacks(row: Row, settings: Settings) -> list[str]:
    """Downloads a row's weights; returns what is not available, with the reason."""
    found = []
    for what, repo_id in (("base", row.model_id), ("head", row.head_id)):
        if repo_id is None:
            continue
        try:
            folder = snapshot_download(repo_id, allow_patterns=["*.json", "model*.safetensors"])
            if not any(Path(folder).glob("*.safetensors")):
                found.append(f"the {what} {repo_id}: no model*.safetensors in {folder}")
        except OSError as exc:
            found.append(f"the {what} {repo_id}: {_first_line(exc)}")
    for split in (settings.train_split, settings.eval_split):
        try:
            load_image_dataset(settings.dataset, split=split, streaming=settings.streaming)
        except (OSError, ValueError) as exc:
            found.append(f"the data: {_first_line(exc)}")
            break
    return found


def run_row(row: Row, settings: Settings, folder: Path) -> dict[str, Pair]:
    """Trains the tokens of a row, unless `folder` holds them, and measures them.

    Returns:
        Our numbers by metric, without and with tokens.
    """
    preset = resolve_preset(row.preset)
    adapter = folder / "adapter"
    if holds_adapter(adapter):
        model = RobustnessTokenModel.from_pretrained(adapter)
    else:
        model = train(row, settings, preset, adapter)
    ours = attack_features(to_device(model), eval_batches(settings, preset, f"{row.name}: features"))
    del model  # a giant and its classifier need not be in memory together
    if row.head_id is not None:
        classifier = RobustnessTokenForImageClassification.from_pretrained(adapter, base_model=row.head_id)
        ours |= attack_classes(to_device(classifier), eval_batches(settings, preset, f"{row.name}: classes"))
    return ours


def to_device(model: _Model) -> _Model:
    """Moves a model to the GPU, if there is one."""
    nn.Module.to(model, "cuda" if torch.cuda.is_available() else "cpu")
    return model


def train(row: Row, settings: Settings, preset: Mapping[str, Any], adapter: Path) -> RobustnessTokenModel:
    """Trains new tokens by the paper's recipe and saves them in `adapter`."""
    names = {field.name for field in fields(RobustnessTokenTrainingArguments)}
    arguments = {name: value for name, value in preset.items() if name in names}
    if settings.max_steps is not None:
        arguments["max_steps"] = settings.max_steps

    transformers.set_seed(0)
    model = RobustnessTokenModel.from_base(
        row.model_id, **{name: value for name, value in preset.items() if name not in names}
    )
    dataset = load_image_dataset(settings.dataset, split=settings.train_split, streaming=settings.streaming)
    if settings.streaming:
        dataset = dataset.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER)
    args = RobustnessTokenTrainingArguments(output_dir=str(adapter), overwrite_output_dir=True, seed=0, **arguments)
    trainer = RobustnessTokenTrainer(model, args, dataset)
    trainer.train()
    trainer.save_model()
    return model


def eval_batches(settings: Settings, preset: Mapping[str, Any], description: str) -> Iterator[Mapping[str, Any]]:
    """Returns batches of evaluation images, the same for every row, since the attack's bounds depend on the batch."""
    dataset = load_image_dataset(settings.dataset, split=settings.eval_split, streaming=settings.streaming)
    transform = ImageTransform(resize=preset["resize"], image_size=preset["image_size"])
    images: ImageDataset | IterableImageDataset
    if settings.streaming:
        chosen = dataset.shuffle(seed=0, buffer_size=SHUFFLE_BUFFER).take(settings.num_images)
        images = IterableImageDataset(chosen, transform)
    else:
        chosen = dataset.shuffle(seed=0).select(range(min(settings.num_images, len(dataset))))
        images = ImageDataset(chosen, transform)
    loader = build_dataloader(images, batch_size=preset["per_device_train_batch_size"], shuffle=False)
    with tqdm(total=settings.num_images, desc=description) as progress_bar:
        for batch in loader:
            if batch["broken_images"]:
                raise ValueError(f"an image of the evaluation can't be read: {batch['broken_images'][0]}")
            yield batch
            progress_bar.update(len(batch["images"]))


def attack_features(model: RobustnessTokenModel, batches: Iterator[Mapping[str, Any]]) -> dict[str, Pair]:
    """Returns the cosine of clean and attacked features of the same model, without and with tokens."""
    axis, totals, count = model.config.similarity_axis, [0.0, 0.0], 0
    for batch in batches:
        pixel_values, attacked = attack(model, batch, model.get_features)
        for with_tokens in (False, True):
            clean, hit = (
                predict(model, model.get_features, values, with_tokens=with_tokens)
                for values in (pixel_values, attacked)
            )
            cosine = cosine_similarity(clean, hit, similarity_axis=axis).mean()
            totals[with_tokens] += cosine.item() * len(pixel_values)
        count += len(pixel_values)
    return {FEATURES: (totals[0] / count, totals[1] / count)}


def attack_classes(
    classifier: RobustnessTokenForImageClassification, batches: Iterator[Mapping[str, Any]]
) -> dict[str, Pair]:
    """Returns accuracy on clean images and on images attacked by cross-entropy through the token-less classifier."""

    def logits(pixel_values: Tensor) -> Tensor:
        result: Tensor = classifier(pixel_values=pixel_values).logits
        return result

    hits, count = torch.zeros(2, 2), 0  # (clean or attacked, without or with tokens)
    for batch in batches:
        labels = batch["labels"]
        both = attack(classifier, batch, logits, labels=labels)
        for i, values in enumerate(both):
            for with_tokens in (False, True):
                classes = predict(classifier, logits, values, with_tokens=with_tokens).argmax(-1).cpu()
                hits[i, int(with_tokens)] += (classes == labels).sum()
        count += len(labels)
    (clean, clean_tokens), (attacked, attacked_tokens) = (100 * hits / count).tolist()
    return {CLASSES: (clean, clean_tokens), CLASSES_ATTACKED: (attacked, attacked_tokens)}


def attack(
    model: RobustnessTokenPreTrainedModel,
    batch: Mapping[str, Any],
    function: Callable[[Tensor], Tensor],
    *,
    labels: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns clean pixel values of a batch, and those attacked by the paper's attack without tokens."""
    mean, std = model.config.image_mean, model.config.image_std
    assert mean is not None, "from_base sets it"
    assert std is not None, "from_base sets it"
    pixel_values = Normalizer(mean, std)(batch["images"]).to(model.device)
    with model.disable_adapter():
        attacked = paper_attack(
            function,
            pixel_values,
            image_mean=mean,
            image_std=std,
            labels=None if labels is None else labels.to(model.device),
            generator=example_generators(0, 0, batch["index"]),
        )
    return pixel_values, attacked


@torch.no_grad()
def predict(
    model: RobustnessTokenPreTrainedModel,
    function: Callable[[Tensor], Tensor],
    pixel_values: Tensor,
    *,
    with_tokens: bool,
) -> Tensor:
    if with_tokens:
        return function(pixel_values)
    with model.disable_adapter():
        return function(pixel_values)


def render_table(rows: tuple[Row, ...], results: Mapping[str, Mapping[str, Pair]], settings: Settings) -> str:
    """Returns the table in Markdown: a line per row and metric, each as without -> with tokens."""
    lines = [
        "| row | base | head | data | steps | metric | published | ours |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        preset = resolve_preset(row.preset)
        steps = settings.max_steps or preset["max_steps"]
        data = f"{settings.dataset}, {preset['image_size']} px, batch {preset['per_device_train_batch_size']}"
        for metric in row.metrics:
            published = _format(row.published.get(metric), metric)
            ours = _format(results.get(row.name, {}).get(metric), metric)
            cells = (row.name, row.model_id, row.head_id or "none", data, str(steps), metric, published, ours)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _format(pair: Pair | None, metric: str) -> str:
    if pair is None:
        return "-"
    decimals = 2 if metric == FEATURES else 1
    return " -> ".join("-" if number is None else f"{number:.{decimals}f}" for number in pair)


def _first_line(exc: BaseException) -> str:
    return str(exc).strip().splitlines()[0]


def check_settings(output: Path, settings: Settings) -> None:
    """Refuses to mix results of different settings in one folder."""
    output.mkdir(parents=True, exist_ok=True)
    file = output / "settings.json"
    if file.exists():
        before = json.loads(file.read_text(encoding="utf-8"))
        if before != vars(settings):
            raise ValueError(f"{output} holds results of other settings, {before}: choose another --output")
    file.write_text(json.dumps(vars(settings), indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [row.name for row in ROWS]
    parser.add_argument("--rows", nargs="+", choices=names, default=names, metavar="ROW", help=", ".join(names))
    parser.add_argument("--dataset", default="ILSVRC/imagenet-1k", help="ImageNet: Hub id or folder")
    parser.add_argument("--train_split", default="train")
    parser.add_argument("--eval_split", default="validation")
    parser.add_argument("--num_images", type=int, default=5000, help="images to evaluate on")
    parser.add_argument("--streaming", action="store_true", help="stream the data instead of downloading it whole")
    parser.add_argument("--max_steps", type=int, help="training steps instead of the preset's, to try the script")
    parser.add_argument("--output", type=Path, default=Path("outputs/reproduce_paper"))
    parser.add_argument(
        "--list", action="store_true", help="print the published numbers and finished rows, run nothing"
    )
    args = parser.parse_args()
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    rows = tuple(row for row in ROWS if row.name in args.rows)
    if not args.list:
        try:
            check_settings(args.output, settings)
        except ValueError as exc:
            parser.error(str(exc))

    results: dict[str, dict[str, Pair]] = {}
    failures = []
    for row in rows:
        file = args.output / row.name / "result.json"
        if file.exists():
            results[row.name] = json.loads(file.read_text(encoding="utf-8"))["ours"]
            continue
        if args.list:
            continue
        if missing := lacks(row, settings):
            failures.append(f"{row.name} was not run, missing:\n" + "\n".join(f"  {reason}" for reason in missing))
            continue
        start = time.perf_counter()
        try:
            results[row.name] = run_row(row, settings, file.parent)
        except (ValueError, OSError, FloatingPointError) as exc:  # the other rows can still run
            failures.append(f"{row.name} failed: {exc}")
            continue
        report = {"ours": results[row.name], "seconds": round(time.perf_counter() - start, 1)}
        file.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")

    table = render_table(rows, results, settings)
    print(table)
    if not args.list:
        (args.output / "table.md").write_text(table + "\n", encoding="utf-8")
    if failures:
        print("\n" + "\n".join(failures), file=sys.stderr)
        raise SystemExit(1)


if __name__ == "__main__":
    main()
