"""Trains tokens on real images without a network, then saves, reloads and evaluates them.

    make quickstart

The base (1.2 M parameters, DINOv2's architecture) and the images (Fashion-MNIST) are in this folder. It is trained
twice: tokens by the paper's losses, and the preset `robust`, shortened, against an attacker who knows all. Both models
are attacked in the black box, in the grey box, with own tokens and in the white box.
`outputs/quickstart/adapter/report.html` shows the results.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from robustness_tokens import (
    ImageDataset,
    ImageTransform,
    Normalizer,
    RobustnessReport,
    RobustnessTokenForImageClassification,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    evaluate_robustness,
    load_image_dataset,
    resolve_preset,
)
from robustness_tokens.data import collate_images
from robustness_tokens.evaluation import training_figures
from robustness_tokens.report import ATTACKERS, num_queries
from robustness_tokens.training import split_settings


HERE = Path(__file__).parent
EPS = 16 / 255  # pixel units of [0, 1] images
# Larger steps and a larger attack than the paper's defaults, which suit bases trained on ImageNet.
PAPER: dict[str, Any] = {
    "max_steps": 32,
    "per_device_train_batch_size": 32,
    "learning_rate": 5e-2,
    "lr_scheduler_type": "cosine",
    "attack": "pgd",
    "step_size": 4 / 255,
    "num_attack_steps": 6,
    "mixed_precision": "bf16",
}
ROBUST = {**resolve_preset("robust"), "max_steps": 60, "warmup_steps": 6}


def train(output_dir: Path, **settings: Any) -> RobustnessTokenForImageClassification:
    """Trains an adapter on the embedded base and saves it."""
    transformers.set_seed(0)
    of_the_model, of_the_training = split_settings(settings)
    model = RobustnessTokenForImageClassification.from_base(HERE / "base", **of_the_model)
    args = RobustnessTokenTrainingArguments(
        output_dir=str(output_dir), overwrite_output_dir=True, eps=EPS, seed=0, **of_the_training
    )
    trainer = RobustnessTokenTrainer(model, args, load_image_dataset(HERE / "data"))
    trainer.train()
    trainer.save_model()
    return model


def evaluate(model: RobustnessTokenForImageClassification, adapter: Path, **kwargs: Any) -> RobustnessReport:
    """Attacks the model at every level of knowledge, and writes the report into the adapter and its card."""
    model.name_or_path = adapter.name
    report = evaluate_robustness(
        model,
        load_image_dataset(HERE / "data", split="test"),
        attacker_datasets=[load_image_dataset(HERE / "data")],
        budget="quick",
        eps=[EPS],
        batch_size=50,  # the curve over eps takes whole batches
        dataset_name="Fashion-MNIST",
        **kwargs,
    )
    report.figures |= training_figures(adapter)
    report.save(adapter)
    model.save_pretrained(adapter)
    return report


def reloads_bit_equal(model: RobustnessTokenForImageClassification, adapter: Path) -> bool:
    """Tells whether a fresh process computes the same bits from the saved adapter."""
    test_set = ImageDataset(load_image_dataset(HERE / "data", split="test"), ImageTransform(image_size=28))
    images = collate_images([test_set[index] for index in range(100)])["images"]
    assert model.config.image_mean is not None
    assert model.config.image_std is not None
    pixel_values = Normalizer(model.config.image_mean, model.config.image_std)(images)
    with torch.inference_mode():
        expected = model(pixel_values=pixel_values).logits
    with tempfile.TemporaryDirectory() as folder:
        input_file, output_file = Path(folder, "input.safetensors"), Path(folder, "output.safetensors")
        save_file({"pixel_values": pixel_values.contiguous()}, input_file)
        subprocess.run([sys.executable, HERE / "reload.py", adapter, input_file, output_file], check=True)
        return torch.equal(load_file(output_file)["logits"], expected)


def print_table(reports: dict[str, RobustnessReport]) -> None:
    """Prints the worst-case accuracy for each attacker."""

    def accuracy(report: RobustnessReport, knowledge: str | None, tokens: str = "trained") -> str:
        for result in report.results:
            if (result.metric, result.knowledge, result.tokens) == ("accuracy", knowledge, tokens) and (
                result.attack in (None, "worst_case") and "series" not in result.attack_parameters
            ):
                assert result.confidence_interval is not None
                low, high = result.confidence_interval
                return f"{result.value:.3f} [{low:.2f}, {high:.2f}]"
        return "-"

    first = next(iter(reports.values()))
    num_images = first.dataset["num_images"]
    print(f"\nAccuracy on {num_images:,} held-out test images [95%]; L-inf, eps {255 * EPS:g}/255 in pixels,")
    print("worst case of each attacker's attacks. The robust adapter's attacker trains own tokens for a fifth of its")
    print("steps.")
    print(f"{'the attacker':<34}" + "".join(f"{name:>24}" for name in ("without tokens", *reports)))
    for knowledge in (None, "none", "base", "own_tokens", "full", "full_worst_case"):
        cells = [accuracy(first, knowledge, "none"), *(accuracy(report, knowledge) for report in reports.values())]
        who = ATTACKERS[knowledge].name
        if knowledge == "none":  # more queries find more
            who += f", {max(num_queries(result) or 0 for result in first.results):,} queries"
        print(f"{who:<34}" + "".join(f"{cell:>24}" for cell in cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    args = parser.parse_args()
    start = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()

    adapter, robust_adapter = args.output / "adapter", args.output / "robust-adapter"
    model = train(adapter, **PAPER)
    model.print_trainable_parameters()
    bit_equal = reloads_bit_equal(model, adapter)
    print(f"saved, reloaded in a fresh process, outputs bit-equal: {'yes' if bit_equal else 'NO'}")
    if not bit_equal:
        raise SystemExit("the outputs of the reloaded adapter differ")
    robust = train(robust_adapter, **ROBUST)
    reports = {
        "the paper's losses": evaluate(model, adapter),
        "robust": evaluate(
            robust,
            robust_adapter,
            own_tokens_steps=ROBUST["max_steps"] // 5,
            diagnostics=False,
            eps_sweep=(),
        ),
    }
    print_table(reports)
    failed = [check for report in reports.values() for check in report.checks if check.passed is False]
    for check in failed:
        print(f"check {check.number} ({check.name}) failed: {check.value}")
    print(f"\nopen {adapter}/report.html ({time.perf_counter() - start:.0f} s)")


if __name__ == "__main__":
    main()
