"""Compares variants of `--preset robust`: trains each, and attacks it in the white box and in the grey box.

    python examples/quickstart/prepare_data.py --all --output outputs/fashion-mnist
    python examples/quickstart/trade_off.py --data outputs/fashion-mnist

Each way differs from the preset by what WAYS says. It is trained on the quickstart's base and attacked through what it
learned (white box) and through the base alone (grey box), by PGD on the margin. The attacked images are the last ones
of the training split, held out from training; the test split stays untouched to evaluate the choice. Writes
`trade_off.csv` and `trade_off.png`; rows that the CSV holds are not run again, so a stopped search goes on.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import transformers
from matplotlib.figure import Figure

from robustness_tokens import (
    RobustnessTokenForImageClassification,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    evaluate_robustness,
    load_image_dataset,
    resolve_preset,
)
from robustness_tokens.training import split_settings


HERE = Path(__file__).parent
EPS = (16 / 255, 8 / 255)  # pixel units of [0, 1] images; the first is trained with
COMMON = {"max_steps": 200, "warmup_steps": 20}
# By name: the differences from the preset and from COMMON.
WAYS: dict[str, dict[str, Any]] = {
    "robust": {},
    "gains and shifts alone": {"num_robustness_tokens": 0, "token_depth": 1},
    "tokens alone": {"gains_and_shifts": []},
    "tokens alone, 3 layers": {"gains_and_shifts": [], "token_depth": 3},
    "tokens alone, input": {"gains_and_shifts": [], "token_depth": 1},
    "the paper's losses": {
        "gains_and_shifts": [],
        "token_depth": 1,
        "objective": "cosine",
        "invariance_weight": 1.0,
        "attack_through": "base",
    },
    "head distance": {"objective": "head_distance"},
    "head distance, gains and shifts alone": {
        "objective": "head_distance",
        "num_robustness_tokens": 0,
        "token_depth": 1,
    },
    "head distance, tokens alone": {"objective": "head_distance", "gains_and_shifts": []},
    "norm alone": {"num_robustness_tokens": 0, "token_depth": 1, "gains_and_shifts": ["norm"]},
    "bias alone": {"num_robustness_tokens": 0, "token_depth": 1, "gains_and_shifts": ["bias"]},
    "patch embedding alone": {"num_robustness_tokens": 0, "token_depth": 1, "gains_and_shifts": ["patch_embedding"]},
    "norm and patch embedding": {
        "num_robustness_tokens": 0,
        "token_depth": 1,
        "gains_and_shifts": ["norm", "patch_embedding"],
    },
    "labels": {"objective": "cross_entropy"},
    "100 steps": {"max_steps": 100, "warmup_steps": 10},
    "400 steps": {"max_steps": 400, "warmup_steps": 40},
    "800 steps": {"max_steps": 800, "warmup_steps": 80},
    "1 attack step": {"num_attack_steps": 1},
    "4 attack steps": {"num_attack_steps": 4},
    "no eps ramp": {"eps_warmup_ratio": 0.0},
    "eps ramp over half": {"eps_warmup_ratio": 0.5},
    "no clipping": {"max_grad_norm": None},
    "clean weight 0.5": {"invariance_weight": 0.5},
    "clean weight 2": {"invariance_weight": 2.0},
    "learning rate 5e-3": {"learning_rate": 5e-3},
    "learning rate 2e-2": {"learning_rate": 2e-2},
    "60 tokens": {"num_robustness_tokens": 60},
    "5 tokens": {"num_robustness_tokens": 5},
}
COLUMNS = (
    *("way", "parameters", "clean", "grey_box", "white_box", "white_box_8", "clean_base", "white_box_base"),
    *("num_training_images", "num_images", "seed", "seconds"),
)


def measure(way: str, images: datasets.Dataset, *, seed: int, num_images: int) -> dict[str, Any]:
    """Trains in one way; returns accuracies on clean and on attacked images."""
    start = time.perf_counter()
    transformers.set_seed(seed)
    preset = resolve_preset("robust")
    of_the_model, of_the_training = split_settings({**preset, **COMMON, "eps": EPS[0], **WAYS[way]})
    model = RobustnessTokenForImageClassification.from_base(HERE / "base", **of_the_model)
    num_training = len(images) - num_images
    with tempfile.TemporaryDirectory() as folder:
        args = RobustnessTokenTrainingArguments(output_dir=folder, seed=seed, **of_the_training)
        RobustnessTokenTrainer(model, args, images.select(range(num_training))).train()
    report = evaluate_robustness(
        model,
        images.select(range(num_training, len(images))),
        task="classification",
        knowledge=("base", "full"),
        attacks=("margin",),
        eps=EPS,
        eps_sweep=(),
        num_images=num_images,
        num_steps=20,
        diagnostics=False,
        attack_precision="bf16",
        batch_size=100,
    )

    def accuracy(knowledge: str | None, eps: float | None = None, tokens: str = "trained") -> float:
        attack = None if knowledge is None else "margin"
        wanted = ("accuracy", tokens, knowledge, attack)
        found = [r for r in report.results if (r.metric, r.tokens, r.knowledge, r.attack) == wanted]
        (value,) = (r.value for r in found if eps in (None, r.eps))
        return value

    return {
        "way": way,
        "parameters": model.num_parameters(only_trainable=True),
        "clean": accuracy(None),
        "grey_box": accuracy("base", EPS[0]),
        "white_box": accuracy("full", EPS[0]),
        "white_box_8": accuracy("full", EPS[1]),
        "clean_base": accuracy(None, tokens="none"),
        "white_box_base": accuracy("base", EPS[0], tokens="none"),
        "num_training_images": num_training,
        "num_images": num_images,
        "seed": seed,
        "seconds": round(time.perf_counter() - start),
    }


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Plots accuracy under attack against clean accuracy, with a number per way; averages over seeds."""
    ways = list(dict.fromkeys(row["way"] for row in rows))
    panels = (("grey_box", "grey box: knows the base"), ("white_box", "white box: knows all"))
    figure = Figure(figsize=(8.4, 5.4), layout="constrained")
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
    all_axes[0].set_ylabel(f"accuracy under attack, eps {255 * EPS[0]:g}/255 in pixels")
    all_axes[0].set_ylim(bottom=0)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3, fontsize=8, handlelength=0)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/trade_off"))
    parser.add_argument("--data", type=Path, default=HERE / "data", help="folder with the images as parquet")
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
    images = load_image_dataset(args.data)
    num_training = len(images) - args.num_images
    for seed in args.seeds:
        for way in args.ways:
            wanted = (way, seed, args.num_images, num_training)
            found = [(r["way"], int(r["seed"]), int(r["num_images"]), int(r["num_training_images"])) for r in rows]
            if wanted in found:
                continue
            rows.append(measure(way, images, seed=seed, num_images=args.num_images))
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
