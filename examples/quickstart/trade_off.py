"""Compares variants of `--preset robust`: trains each, and attacks it in the white box and in the grey box.

    python examples/quickstart/prepare_data.py --all --output outputs/fashion-mnist
    python examples/quickstart/trade_off.py --data outputs/fashion-mnist

Each variant differs from the preset by what VARIANTS says. It is trained on the quickstart's base and attacked through
what it learned (white box) and through the base alone (grey box). The attacked images are among the last 2,000 of the
training split, held out from training; `--test` attacks the test split instead, to measure a choice after it was made:

    python examples/quickstart/trade_off.py --data outputs/fashion-mnist --output outputs/proof --max_steps 2000 \
        --variants robust "gains and shifts alone" "tokens alone" "head distance" \
        --test --num_images 1000 --attacks auto_attack

Writes `trade_off.csv` and `trade_off.png`, and keeps the adapters and finished attacks, so the same command continues
a stopped run. Rows of other settings stay in the CSV and are not drawn.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from matplotlib.figure import Figure
from measuring import BASE, accuracy, fingerprints, load_training_images

from robustness_tokens import (
    RobustnessTokenForImageClassification,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    __version__,
    evaluate_robustness,
    load_image_dataset,
    resolve_preset,
)
from robustness_tokens.models import random_state
from robustness_tokens.training import split_settings, to_csv
from robustness_tokens.utils import write_text


EPS = (16 / 255, 8 / 255)  # pixel units of [0, 1] images; the first is trained with
# More tokens than the preset, and less weight on clean images.
TOKENS_ALONE: dict[str, Any] = {"num_robustness_tokens": 20, "gains_and_shifts": [], "invariance_weight": 0.25}
WITHOUT_TOKENS: dict[str, Any] = {"num_robustness_tokens": 0, "token_depth": 1}
RANDOM = "random, with the norms of robust"
ADAPTER_FILES = ("config.json", "model.safetensors")
# By name: the differences from the preset and from `--max_steps`.
VARIANTS: dict[str, dict[str, Any]] = {
    "robust": {},
    "gains and shifts alone": WITHOUT_TOKENS,
    "tokens alone": TOKENS_ALONE,
    "tokens alone, 3 layers": {**TOKENS_ALONE, "token_depth": 3},
    "tokens alone, input": {**TOKENS_ALONE, "token_depth": 1},
    "the paper's losses": {
        "num_robustness_tokens": 10,
        "token_depth": 1,
        "gains_and_shifts": [],
        "objective": "cosine",
        "attack_through": "base",
    },
    "head distance": {"objective": "head_distance"},
    "head distance, gains and shifts alone": {"objective": "head_distance", **WITHOUT_TOKENS},
    "head distance, tokens alone": {"objective": "head_distance", **TOKENS_ALONE},
    "norm alone": {**WITHOUT_TOKENS, "gains_and_shifts": ["norm"]},
    "linear alone": {**WITHOUT_TOKENS, "gains_and_shifts": ["linear"]},
    "bias alone": {**WITHOUT_TOKENS, "gains_and_shifts": ["bias"]},
    "patch embedding alone": {**WITHOUT_TOKENS, "gains_and_shifts": ["patch_embedding"]},
    "norm and patch embedding": {**WITHOUT_TOKENS, "gains_and_shifts": ["norm", "patch_embedding"]},
    "without linear": {"gains_and_shifts": ["norm", "bias", "patch_embedding"]},
    "20 tokens": {"num_robustness_tokens": 20},
    "labels": {"objective": "cross_entropy"},
    "100 steps": {"max_steps": 100},
    "400 steps": {"max_steps": 400},
    "800 steps": {"max_steps": 800},
    "1 attack step": {"num_attack_steps": 1},
    "4 attack steps": {"num_attack_steps": 4},
    "no eps warm-up": {"eps_warmup_ratio": 0.0},
    "eps warm-up over half": {"eps_warmup_ratio": 0.5},
    "no clipping": {"max_grad_norm": None},
    "clean weight 0.5": {"invariance_weight": 0.5},
    "clean weight 2": {"invariance_weight": 2.0},
    "learning rate 5e-3": {"learning_rate": 5e-3},
    "learning rate 2e-2": {"learning_rate": 2e-2},
    RANDOM: {},
}
# The panels of the figure that show one number of the recipe: its column, and the variants.
PANELS = {
    "tokens alone: layers with tokens": (
        "token_depth",
        ("tokens alone, input", "tokens alone, 3 layers", "tokens alone"),
    ),
    "robust: optimiser steps": ("max_steps", ("100 steps", "robust", "400 steps", "800 steps")),
}
COLUMNS = (
    *("variant", "parameters", "clean", "grey_box", "white_box", "white_box_8", "clean_base", "white_box_base"),
    *("token_depth", "max_steps", "seed", "attacked", "num_images", "settings", "seconds"),
)


class Comparison:
    """Trains and measures variants on the same images.

    Args:
        data: Folder with the images.
        output: Folder for the adapters and the CSV.
        max_steps: Optimiser steps of each variant, unless the variant says otherwise.
        attacks: Names of the attacks.
        num_images: Number of images to attack.
        test: Attack images of the test split, not those held out from the training split.
    """

    def __init__(
        self, data: Path, output: Path, *, max_steps: int, attacks: Sequence[str], num_images: int, test: bool
    ) -> None:
        self.output, self.max_steps = output, max_steps
        self.training_images, held_out = load_training_images(data)
        self.attacked_images = load_image_dataset(data, split="test") if test else held_out
        self.attacked = "test" if test else "held out"
        self.trained_on = fingerprints(self.training_images, BASE / "model.safetensors")
        self.measured: dict[str, Any] = {
            "attacks": list(attacks),
            "eps": list(EPS),
            "num_steps": 20,  # of PGD
            "num_images": num_images,
            # APGD and AutoAttack stop once the class changes in their own precision, so they need the measurement's.
            "attack_precision": "no" if any(name.startswith(("apgd", "auto")) for name in attacks) else "bf16",
        }

    def settings(self, variant: str, seed: int) -> dict[str, Any]:
        """Returns what the training of a variant depends on, besides the images."""
        settings = {**resolve_preset("robust"), "max_steps": self.max_steps, "eps": EPS[0], "seed": seed}
        settings |= VARIANTS[variant]
        return {**settings, "warmup_steps": settings["max_steps"] // 10}

    def folder(self, variant: str, seed: int) -> Path:
        """Returns the folder of a variant's adapter, another one for other settings, images or another base."""
        digest = _digest([variant, self.settings(variant, seed), self.trained_on, __version__])
        return self.output / f"{variant.replace(' ', '_').replace(',', '')}-seed{seed}-{digest}"

    def key(self, variant: str, seed: int, adapter: Path | None) -> str:
        """Returns a digest of all that a row depends on."""
        if adapter is None:
            trained = [self.folder(variant, seed).name]
        else:  # its config tells its base by digests
            trained = fingerprints(*(adapter / file for file in ADAPTER_FILES))
        return _digest([variant, trained, self.measured, fingerprints(self.attacked_images), __version__])

    def train(self, variant: str, seed: int) -> Path:
        """Trains a variant, from the last checkpoint if there is one; returns the folder of the adapter."""
        settings, folder = self.settings(variant, seed), self.folder(variant, seed)
        if (folder / "config.json").exists():
            return folder
        if variant == RANDOM:
            model = RobustnessTokenForImageClassification.from_pretrained(self.train("robust", seed), base_model=BASE)
            with torch.no_grad():
                for name, tensor in random_state(model.injector.state, seed=~seed).items():
                    model.injector.state[name].copy_(tensor)
            model.save_pretrained(folder)
        else:
            transformers.set_seed(seed)
            of_the_model, of_the_training = split_settings(settings)
            model = RobustnessTokenForImageClassification.from_base(BASE, **of_the_model)
            args = RobustnessTokenTrainingArguments(
                output_dir=str(folder),
                save_steps=100,
                save_total_limit=1,
                resume_from_checkpoint=True,
                **of_the_training,
            )
            trainer = RobustnessTokenTrainer(model, args, self.training_images)
            trainer.train()
            trainer.save_model()
        return folder

    def measure(self, variant: str, seed: int, adapter: Path | None) -> dict[str, Any]:
        """Returns a row: accuracies on clean and on attacked images, of an adapter or, if it is None, of a variant."""
        start = time.perf_counter()
        folder = adapter or self.train(variant, seed)
        model = RobustnessTokenForImageClassification.from_pretrained(
            folder, base_model=BASE if adapter is None else None
        )
        report = evaluate_robustness(
            model,
            self.attacked_images,
            task="classification",
            knowledge=("base", "full"),
            eps_sweep=(),
            diagnostics=False,
            batch_size=100,
            output_dir=str(folder if adapter is None else self.output / variant),
            **self.measured,
        )
        return {
            "variant": variant,
            "parameters": model.num_parameters(only_trainable=True),
            "clean": accuracy(report),
            "grey_box": accuracy(report, knowledge="base", eps=EPS[0]),
            "white_box": accuracy(report, knowledge="full", eps=EPS[0]),
            "white_box_8": accuracy(report, knowledge="full", eps=EPS[1]),
            "clean_base": accuracy(report, tokens="none"),
            "white_box_base": accuracy(report, tokens="none", knowledge="base", eps=EPS[0]),
            "token_depth": model.config.token_depth,
            "max_steps": (model.config.training or {}).get("max_steps", ""),
            "seed": seed,
            "attacked": f"{self.attacked}: {' '.join(self.measured['attacks'])}",
            "num_images": self.measured["num_images"],
            "settings": self.key(variant, seed, adapter),
            "seconds": round(time.perf_counter() - start),
        }


def _adapter(word: str) -> tuple[str, Path]:
    name, _, folder = word.partition("=")
    if name in VARIANTS or not folder or not all((Path(folder) / file).is_file() for file in ADAPTER_FILES):
        raise argparse.ArgumentTypeError(
            f"expected a new name, = and the folder of an adapter, such as other=outputs/adapter, got {word!r}"
        )
    return name, Path(folder)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots white-box accuracy against the numbers of PANELS and against clean accuracy; averages over seeds."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))

    def mean(variant: str, column: str) -> float:
        return float(np.mean([float(row[column]) for row in rows if row["variant"] == variant]))

    figure = Figure(figsize=(11, 6), layout="constrained")
    all_axes = figure.subplots(1, 3, sharey=True, width_ratios=(1, 1, 2))
    for axes, (title, (column, members)) in zip(all_axes, PANELS.items(), strict=False):
        points = sorted((mean(name, column), mean(name, "white_box")) for name in members if name in variants)
        axes.plot(*zip(*points, strict=True) if points else ((), ()), "o-", color="#1b4965", markersize=5)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xticks([x for x, _ in points], [f"{x:g}" for x, _ in points])
    axes = all_axes[-1]
    numbers: dict[tuple[float, float], list[str]] = {}  # several variants may end at the same point
    for number, variant in enumerate(variants, start=1):
        clean, attacked = mean(variant, "clean"), mean(variant, "white_box")
        axes.plot(clean, attacked, "o", color="#1b4965", markersize=5, label=f"{number}  {variant}")
        numbers.setdefault((round(clean, 3), round(attacked, 3)), []).append(str(number))
    for point, there in numbers.items():
        # Place a longer label away from those of its neighbours.
        place: dict[str, Any] = {"xytext": (4, 4)}
        if len(there) > 1:
            place = {"xytext": (-4, -5), "ha": "right", "va": "top"}
        axes.annotate(", ".join(there), point, textcoords="offset points", fontsize=9, **place)
    axes.set_title("all variants: accuracy on clean images", loc="left", fontsize=10)
    for axes in all_axes:
        axes.margins(0.12)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel(f"accuracy in the white box, eps {255 * EPS[0]:g}/255 in pixels")
    all_axes[0].set_ylim(bottom=0)
    handles, labels = all_axes[-1].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=4, fontsize=8, handlelength=0)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/trade_off"))
    parser.add_argument("--data", type=Path, required=True, help="folder with the images as parquet")
    parser.add_argument("--variants", nargs="*", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument(
        "--adapters", type=_adapter, nargs="+", default=[], metavar="NAME=FOLDER", help="adapters to measure too"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--max_steps", type=int, default=200, help="optimiser steps, where a variant names none")
    parser.add_argument("--attacks", nargs="+", default=["margin"])
    parser.add_argument("--num_images", type=int, default=500, help="number of images to attack")
    parser.add_argument("--test", action="store_true", help="attack the test split")
    args = parser.parse_args()
    comparison = Comparison(
        args.data,
        args.output,
        max_steps=args.max_steps,
        attacks=args.attacks,
        num_images=args.num_images,
        test=args.test,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "trade_off.csv"
    rows: list[dict[str, Any]] = []
    if file.exists():
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    if rows and tuple(rows[0]) != COLUMNS:
        parser.error(f"{file} has other columns, {list(rows[0])}: choose another --output")
    wanted: list[tuple[str, int, Path | None]] = [(name, seed, None) for seed in args.seeds for name in args.variants]
    wanted += [(name, 0, folder) for name, folder in args.adapters]
    keys = [comparison.key(*one) for one in wanted]
    for one, key in zip(wanted, keys, strict=True):
        if key not in {row["settings"] for row in rows}:
            rows.append(comparison.measure(*one))
            print(rows[-1], flush=True)
            write_text(file, to_csv(rows, COLUMNS))
    draw([row for row in rows if row["settings"] in keys], args.output / "trade_off.png")
    print(f"wrote {file} and trade_off.png beside it")


if __name__ == "__main__":
    main()
