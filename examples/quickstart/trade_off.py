"""Measures clean, grey-box and white-box accuracy for several ways of adaptive training.

    python examples/quickstart/trade_off.py

Trains tokens in ten ways on the quickstart's base and attacks each with cross-entropy and margin, once through the
base only (grey box) and once through the tokens (white box). The images are held out from the training split; the test
split stays untouched to evaluate the choice. Writes `trade_off.csv` and `trade_off.png`; rows in the CSV are not run
again.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from matplotlib.figure import Figure

from robustness_tokens import (
    RobustnessTokenForImageClassification,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    evaluate_robustness,
    load_image_dataset,
)


HERE = Path(__file__).parent
EPS = 16 / 255  # pixel units of [0, 1] images
COMMON: dict[str, Any] = {
    "max_steps": 80,
    "per_device_train_batch_size": 64,
    "learning_rate": 5e-2,
    "lr_scheduler_type": "cosine",
    "attack": "pgd",
    "eps": EPS,
    "step_size": 4 / 255,
    "num_attack_steps": 10,
    "mixed_precision": "bf16",
}
# By name: the differences from the paper's losses and from 20 tokens.
WAYS: dict[str, dict[str, Any]] = {
    "paper's losses": {},
    "through the tokens": {"attack_through": "tokens"},
    "head 1": {"head_distance_weight": 1.0},
    "head 1, through the tokens": {"head_distance_weight": 1.0, "attack_through": "tokens"},
    "head 4": {"head_distance_weight": 4.0},
    "head 16": {"head_distance_weight": 16.0},
    "head 4, attacked x3": {"head_distance_weight": 4.0, "adversarial_weight": 3.0},
    "head 4, both": {"head_distance_weight": 4.0, "attack_through": "both"},
    "head 4, 50 tokens": {"head_distance_weight": 4.0, "num_robustness_tokens": 50},
    "head 4, [CLS] alone": {"head_distance_weight": 4.0, "feature_view": "cls"},
}
_OF_THE_MODEL = ("num_robustness_tokens", "feature_view")
COLUMNS = ("way", "clean", "grey_box", "white_box", "num_images", "seed", "seconds")


def measure(way: str, *, seed: int, num_images: int) -> dict[str, Any]:
    """Trains tokens in one way; returns accuracies on clean images and in the worst case of two attacks."""
    start = time.perf_counter()
    transformers.set_seed(seed)
    settings = {"num_robustness_tokens": 20, **COMMON, **WAYS[way]}
    of_the_model = {name: settings.pop(name) for name in _OF_THE_MODEL if name in settings}
    model = RobustnessTokenForImageClassification.from_base(HERE / "base", **of_the_model)
    images = load_image_dataset(HERE / "data")
    num_training = len(images) - num_images
    with tempfile.TemporaryDirectory() as folder:
        args = RobustnessTokenTrainingArguments(output_dir=folder, seed=seed, **settings)
        RobustnessTokenTrainer(model, args, images.select(range(num_training))).train()
    report = evaluate_robustness(
        model,
        images.select(range(num_training, len(images))),
        task="classification",
        knowledge=("base", "full"),
        attacks=("cross_entropy", "margin"),
        eps=(EPS,),
        eps_sweep=(),
        num_images=num_images,
        num_steps=20,
        diagnostics=False,
        attack_precision="bf16",
        batch_size=250,
    )

    def accuracy(knowledge: str | None, attack: str | None) -> float:
        wanted = ("accuracy", "trained", knowledge, attack)
        (value,) = (r.value for r in report.results if (r.metric, r.tokens, r.knowledge, r.attack) == wanted)
        return value

    return {
        "way": way,
        "clean": accuracy(None, None),
        "grey_box": accuracy("base", "worst_case"),
        "white_box": accuracy("full", "worst_case"),
        "num_images": num_images,
        "seed": seed,
        "seconds": round(time.perf_counter() - start),
    }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots accuracy under attack against clean accuracy, with a number per way; averages over seeds."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    panels = (("grey_box", "grey box: knows the base"), ("white_box", "white box: knows the tokens"))
    figure = Figure(figsize=(8.4, 4.6), layout="constrained")
    all_axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (key, title) in zip(all_axes, panels, strict=True):
        numbers: dict[tuple[float, float], list[str]] = {}  # several ways may end at the same point
        for number, way in enumerate(ways, start=1):
            of_way = [row for row in rows if row["way"] == way]
            clean, attacked = (float(np.mean([float(row[name]) for row in of_way])) for name in ("clean", key))
            axes.plot(clean, attacked, "o", color="#1b4965", markersize=5, label=f"{number}  {way}")
            numbers.setdefault((round(clean, 3), round(attacked, 3)), []).append(str(number))
        for point, there in numbers.items():
            # Place a longer label away from those of its neighbours.
            place: dict[str, Any] = {"xytext": (4, 4)}
            if len(there) > 1:
                place = {"xytext": (-4, -5), "ha": "right", "va": "top"}
            axes.annotate(", ".join(there), point, textcoords="offset points", fontsize=9, **place)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_xlabel("accuracy on clean images")
        axes.margins(0.12)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel(f"accuracy under attack, eps {255 * EPS:g}/255 in pixels")
    all_axes[0].set_ylim(bottom=0)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3, fontsize=8, handlelength=0)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/trade_off"))
    parser.add_argument(
        "--num_images", type=int, default=500, help="number of images to attack, held out from training"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    file = args.output / "trade_off.csv"
    rows: list[dict[str, Any]] = []
    if file.exists():
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
    for seed in args.seeds:
        for way in args.ways:
            wanted = (way, seed, args.num_images)
            if any((row["way"], int(row["seed"]), int(row["num_images"])) == wanted for row in rows):
                continue
            rows.append(measure(way, seed=seed, num_images=args.num_images))
            print(rows[-1], flush=True)
            with file.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
    rows = [row for row in rows if int(row["num_images"]) == args.num_images]
    draw(rows, args.output / "trade_off.png")
    print(f"wrote {file} and trade_off.png beside it")


if __name__ == "__main__":
    main()
