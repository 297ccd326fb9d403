"""Trains tokens for a backbone of real size, and measures how far attacks move its features.

    python examples/real_backbone/prepare.py   # first: the backbone and the photographs
    python examples/real_backbone/train.py

Trains the paper's tokens, and without labels tokens for each layer, with and without gains and shifts, and these
alone. Then attacks held-out photographs: by the paper's attack, and by PGD that raises the head distance, through the
base (grey box) and through all that was learned (white box). Features are compared with the base's of the clean image.
Finished trainings and measurements are kept in `--output`, and a training goes on from its last checkpoint, so the
same command continues where it stopped. Prints a table and writes it as `table.csv`.

The base is not `facebook/dinov2-small`, so the released tokens (`--released_tokens`) meet weights that they were not
trained on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load, save
from torch import Tensor
from transformers import AutoModel, PreTrainedModel

from robustness_tokens import (
    ImageDataset,
    ImageTransform,
    Normalizer,
    RobustnessTokenModel,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    cosine_similarity,
    extract_features,
    import_published_tokens,
    inject_tokens,
    load_image_dataset,
    paper_attack,
    pgd_attack,
    remove_tokens,
    resolve_preset,
)
from robustness_tokens.attacks import example_generators
from robustness_tokens.data import collate_images, load_image_processor, processor_image_size
from robustness_tokens.hub import load_adapter
from robustness_tokens.models import random_state
from robustness_tokens.training import head_distance, split_settings, to_csv
from robustness_tokens.utils import read_json, write_bytes, write_text


PAPER, DEEP, BOTH, GAINS = "the paper's recipe", "deep tokens", "deep tokens, gains and shifts", "gains and shifts"
NONE, RANDOM, RELEASED = "without tokens", "random deep tokens", "released dinov2_small tokens"
ROWS = (NONE, RANDOM, RELEASED, PAPER, DEEP, BOTH, GAINS)

# The preset's distillation needs a head, which this backbone lacks, and its learning rate is too large here: of 1e-4,
# 3e-4, 1e-3, 3e-3 and 1.5e-2, ten steps of tokens, gains and shifts went best with 3e-4. Tokens alone were tried with
# 5e-3 only.
OURS = {
    **resolve_preset("robust"),
    "objective": "head_distance",
    "eps": 4 / 255,
    "per_device_train_batch_size": 8,
    "learning_rate": 3e-4,
}
RECIPES: dict[str, dict[str, Any]] = {
    PAPER: {**resolve_preset("dinov2"), "mixed_precision": "bf16"},
    DEEP: {**OURS, "num_robustness_tokens": 20, "gains_and_shifts": [], "learning_rate": 5e-3},
    BOTH: OURS,
    GAINS: {**OURS, "num_robustness_tokens": 0, "token_depth": 1},
}
BATCH_SIZE = 8  # of the attacks; the range of the paper's attack depends on the batch
_PROBE_STEPS = 3  # to find how long a step takes; the first one is slower


@dataclass(frozen=True)
class Condition:
    """A measurement of each row: without an attack, by the paper's, or by PGD within `eps`."""

    name: str
    eps: float | None = None  # pixel units of [0, 1] images
    sees_tokens: bool = False


CLEAN, PAPERS = Condition("clean"), Condition("paper's attack")
CONDITIONS = (
    *(CLEAN, PAPERS),
    *(Condition(f"grey box {levels}/255", levels / 255) for levels in (1, 2, 4)),
    *(Condition(f"white box {levels}/255", levels / 255, sees_tokens=True) for levels in (1, 2, 4)),
)


@dataclass(frozen=True)
class Settings:
    """What the numbers depend on; an output folder holds results of one setting."""

    minutes: float
    learning_rate: float | None
    paper_steps: int
    num_images: int
    num_attack_steps: int
    seed: int


class Progress:
    """What is finished, in `progress.json`: steps and seconds of the trainings, and the numbers of each image."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self.file = folder / "progress.json"
        self.content: dict[str, Any] = {"settings": dataclasses.asdict(settings), "trained": {}, "measured": {}}
        if self.file.exists():
            self.content = read_json(self.file)
            if self.content["settings"] != dataclasses.asdict(settings):
                raise ValueError(
                    f"{folder} holds results of other settings, {self.content['settings']}: choose another --output"
                )
        folder.mkdir(parents=True, exist_ok=True)

    def note(self, part: str, key: str, values: Mapping[str, Any]) -> None:
        """Adds values to those of a key and writes the file."""
        self.content[part].setdefault(key, {}).update(values)
        write_text(self.file, json.dumps(self.content) + "\n")


def train(name: str, images: Any, base: Path, folder: Path, settings: Settings, progress: Progress) -> None:
    """Trains in one way for `minutes`, unless that is done; saves the adapter in `folder`."""
    done = progress.content["trained"].get(name, {})
    if "seconds" in done:
        return
    recipe = {**RECIPES[name], "seed": settings.seed}
    recipe.pop("image_size", None)  # the base's image processor names it
    if name == PAPER:
        recipe["max_steps"] = settings.paper_steps
    else:
        recipe["learning_rate"] = settings.learning_rate or recipe["learning_rate"]
        if "steps" not in done:  # kept, since the schedule of a resumed training depends on it
            recipe |= {"max_steps": _PROBE_STEPS, "warmup_steps": 0}
            with tempfile.TemporaryDirectory() as probe:
                log = trained(recipe, images, base, Path(probe)).log_history
            seconds_per_step = (log[-1]["seconds"] - log[0]["seconds"]) / (len(log) - 1)
            done = {"steps": max(1, int(60 * settings.minutes / seconds_per_step))}
            progress.note("trained", name, done)
        recipe |= {"max_steps": done["steps"], "warmup_steps": done["steps"] // 10}
    print(f"training {name}: {recipe['max_steps']} steps", flush=True)
    trainer = trained(recipe, images, base, folder)
    trainer.save_model()
    seconds = round(trainer.log_history[-1]["seconds"], 1)
    parameters = trainer.model.num_parameters(only_trainable=True)
    progress.note("trained", name, {"steps": recipe["max_steps"], "parameters": parameters, "seconds": seconds})


def trained(recipe: Mapping[str, Any], images: Any, base: Path, folder: Path) -> RobustnessTokenTrainer:
    """Trains new tokens, gains and shifts, from the last checkpoint in `folder` if there is one."""
    transformers.set_seed(recipe["seed"])
    of_the_model, of_the_training = split_settings(recipe)
    model = RobustnessTokenModel.from_base(base, **of_the_model)
    args = RobustnessTokenTrainingArguments(
        output_dir=str(folder),
        resume_from_checkpoint=True,
        save_steps=max(1, recipe["max_steps"] // 20),
        save_total_limit=1,
        **of_the_training,
    )
    trainer = RobustnessTokenTrainer(model, args, images)
    trainer.train()
    return trainer


class HeldOut:
    """Held-out images and the base, whose clean features and grey-box attacks serve all rows.

    Args:
        base: The backbone; tokens are put into it for one row at a time.
        images: (n, 3, H, W) in [0, 1].
        normalizer: From images to pixel values.
        num_attack_steps: Steps of PGD.
        seed: Seed of the noise of the attacks.
        folder: For the images that were attacked through the base.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        images: Tensor,
        normalizer: Normalizer,
        *,
        num_attack_steps: int,
        seed: int,
        folder: Path,
    ) -> None:
        self.base, self.images, self.normalizer = base, images, normalizer
        self.num_attack_steps, self.seed, self.folder = num_attack_steps, seed, folder
        with torch.no_grad():
            self.target = torch.cat([self.features(batch) for batch in images.split(BATCH_SIZE)])  # (n, 1 + P, D)

    def features(self, images: Tensor) -> Tensor:
        """Returns the features, (B, 1 + P, D), with the tokens that are in the base now."""
        return extract_features(self.base, self.normalizer(images), feature_view="cls_and_patches")

    def distance(self, images: Tensor, target: Tensor) -> Tensor:
        """Returns the head distance of each image's features, (B,)."""
        return head_distance(self.features(images), target, num_patches=target.shape[1] - 1)

    def attacked(self, condition: Condition) -> Tensor:
        """Returns the images, attacked through the base as it is now, (n, 3, H, W) in [0, 1]."""
        if condition == CLEAN:
            return self.images
        batches = zip(
            *(tensor.split(BATCH_SIZE) for tensor in (torch.arange(len(self.images)), self.images, self.target)),
            strict=True,
        )
        return torch.cat([self._attack(condition, *batch) for batch in batches])

    def attacked_through_base(self, condition: Condition) -> Tensor:
        """Returns the same, from the disk if it was computed before; the base must have no tokens."""
        file = self.folder / f"{condition.name.replace('/', ' of ')}.safetensors"
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(file, save({"images": self.attacked(condition)}))
        return load(file.read_bytes())["images"]

    def _attack(self, condition: Condition, index: Tensor, images: Tensor, target: Tensor) -> Tensor:
        generators = example_generators(self.seed, 0, index)
        if condition.eps is not None:
            return pgd_attack(
                lambda x: self.distance(x, target),
                images,
                eps=condition.eps,
                num_steps=self.num_attack_steps,
                generator=generators,
            )
        mean, std = self.normalizer.image_mean, self.normalizer.image_std
        attacked = paper_attack(
            lambda pixel_values: extract_features(self.base, pixel_values, feature_view="cls_and_patches"),
            self.normalizer(images),
            image_mean=mean.flatten().tolist(),
            image_std=std.flatten().tolist(),
            target=target,
            generator=generators,
        )
        return (attacked * std + mean).clamp(0, 1)

    @torch.no_grad()
    def compare(self, images: Tensor) -> dict[str, list[float]]:
        """Returns cosine and head distance of each image's features with the base's clean ones."""
        cosines, distances = [], []
        for batch, target in zip(images.split(BATCH_SIZE), self.target.split(BATCH_SIZE), strict=True):
            features = self.features(batch)
            cosines += cosine_similarity(features, target).tolist()
            distances += head_distance(features, target, num_patches=target.shape[1] - 1).tolist()
        return {"cosine": cosines, "distance": distances}


def measure(row: str, tokens: Any, held_out: HeldOut, progress: Progress) -> None:
    """Measures one row under all conditions that are not measured yet.

    Args:
        row: Its name.
        tokens: What [`inject_tokens`] takes; None for the base alone.
        held_out: The images and the base.
        progress: Where the results are kept.
    """
    for condition in CONDITIONS:
        if condition.name in progress.content["measured"].get(row, {}):
            continue
        start = time.perf_counter()
        through_base = Condition(condition.name.replace("white", "grey"), condition.eps)
        sees_tokens = condition.sees_tokens and tokens is not None
        images = held_out.images if sees_tokens or condition == CLEAN else held_out.attacked_through_base(through_base)
        if tokens is not None:
            inject_tokens(held_out.base, tokens)
        try:
            if sees_tokens:
                images = held_out.attacked(condition)
            result = held_out.compare(images)
        finally:
            if tokens is not None:
                remove_tokens(held_out.base)
        progress.note("measured", row, {condition.name: result})
        means = ", ".join(f"{key} {statistics.fmean(values):.4f}" for key, values in result.items())
        print(f"{row}, {condition.name}: {means} ({time.perf_counter() - start:.0f} s)", flush=True)


def table(progress: Mapping[str, Any], rows: Iterable[str] = ROWS) -> list[dict[str, Any]]:
    """Returns one dictionary per measured row: its parameters, its training, and the means over the images."""
    result = []
    for row in rows:
        if row not in progress["measured"]:
            continue
        done = progress["trained"].get(row, {})
        cells = {"row": row, "parameters": done.get("parameters", ""), "steps": done.get("steps", "")}
        cells["minutes"] = round(done["seconds"] / 60, 1) if "seconds" in done else ""
        for condition in CONDITIONS:
            for metric in ("cosine", "distance"):
                values = progress["measured"][row].get(condition.name, {}).get(metric)
                cells[f"{condition.name}: {metric}"] = "" if values is None else round(statistics.fmean(values), 4)
        result.append(cells)
    return result


def render_markdown(rows: list[dict[str, Any]]) -> str:
    """Returns the table in Markdown; a cell of a condition holds cosine and head distance."""
    names = [condition.name for condition in CONDITIONS]
    lines = [["", "parameters", "steps", *names], ["---"] * (3 + len(names))]
    for row in rows:
        cells = [f"{row[f'{name}: cosine']} / {row[f'{name}: distance']}" for name in names]
        lines.append([row["row"], *(str(row[name]) for name in ("parameters", "steps")), *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Trains and measures what is not finished; returns the table."""
    settings = Settings(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Settings)})
    progress = Progress(args.output, settings)
    base_folder, pictures = args.prepared / "backbone", args.prepared / "images"
    if not base_folder.is_dir() or not pictures.is_dir():
        raise ValueError(f"{args.prepared} has no backbone/ and images/: run examples/real_backbone/prepare.py first")
    training_images = load_image_dataset(pictures, split="train")
    folders = {name: args.output / name.replace(" ", "_").replace(",", "").replace("'", "") for name in ROWS}
    for name in RECIPES:
        train(name, training_images, base_folder, folders[name], settings, progress)

    tokens: dict[str, Any] = {NONE: None, **{name: folders[name] for name in RECIPES}}
    tokens[RANDOM] = random_state(load_adapter(folders[DEEP]).state, seed=~settings.seed)  # no training starts there
    progress.note("trained", RANDOM, {"parameters": sum(tensor.numel() for tensor in tokens[RANDOM].values())})
    if args.released_tokens is not None:
        model = import_published_tokens(args.released_tokens, base_folder, folders[RELEASED], overwrite=True)
        progress.note("trained", RELEASED, {"parameters": model.num_parameters(only_trainable=True)})
        tokens[RELEASED] = folders[RELEASED]

    processor: Any = load_image_processor(base_folder)
    transform = ImageTransform(image_size=processor_image_size(processor))
    photographs = ImageDataset(load_image_dataset(pictures, split="validation"), transform)
    if settings.num_images > len(photographs):
        raise ValueError(f"num_images={settings.num_images}, but {pictures} has {len(photographs)} held-out images")
    held_out = HeldOut(
        AutoModel.from_pretrained(base_folder).eval().requires_grad_(False),
        collate_images([photographs[index] for index in range(settings.num_images)])["images"],
        Normalizer(processor.image_mean, processor.image_std),
        num_attack_steps=settings.num_attack_steps,
        seed=settings.seed,
        folder=args.output / "attacked_through_base",
    )
    for row in ROWS:
        if row in tokens:
            measure(row, tokens[row], held_out, progress)
            write_text(args.output / "table.csv", to_csv(table(progress.content)))
    return table(progress.content)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prepared", type=Path, default=Path("outputs/real_backbone"), help="output of prepare.py")
    parser.add_argument("--output", type=Path, default=Path("outputs/real_backbone/results"))
    parser.add_argument("--minutes", type=float, default=60, help="of each training without labels")
    parser.add_argument("--learning_rate", type=float, help="of these trainings; by default that of RECIPES")
    parser.add_argument(
        "--paper_steps",
        type=int,
        default=RECIPES[PAPER]["max_steps"],
        help="training steps of the paper's recipe; another number than the default only tries the script",
    )
    parser.add_argument("--num_images", type=int, default=32, help="held-out photographs to attack")
    parser.add_argument("--num_attack_steps", type=int, default=20, help="steps of PGD on them")
    parser.add_argument("--released_tokens", type=Path, help="dinov2_small.pt of the paper's authors")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads of torch; by default as many as torch takes")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        rows = run(args)
    except (OSError, ValueError, FloatingPointError) as exc:
        raise SystemExit(f"error: {exc}") from exc
    print(f"\nCosine / head distance with the base's clean features, means of {args.num_images} photographs")
    print(f"that were held out; PGD of {args.num_attack_steps} steps, eps in pixels.\n")
    print(render_markdown(rows))
    print(f"\nwrote {args.output / 'table.csv'}")


if __name__ == "__main__":
    main()
