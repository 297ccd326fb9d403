"""The main job on real images, with no network: train tokens, evaluate them, save, reload, compare.

    make quickstart

The backbone (1.2 M parameters, DINOv2's architecture) and the images (Fashion-MNIST) lie beside this file. What it
measures goes to a table, `outputs/quickstart/results.json` and two figures.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from robustness_tokens import (
    Normalizer,
    RobustnessTokenForImageClassification,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    cosine_similarity,
    pgd_attack,
)
from robustness_tokens.attacks import cross_entropy_objective, feature_cosine_objective
from robustness_tokens.data import ImageDataset, collate_images, load_image_dataset
from robustness_tokens.plots import plot_attacked_images, plot_training_curves
from robustness_tokens.preprocessing import ImageTransform


HERE = Path(__file__).parent
EPS = 16 / 255  # pixel units of [0, 1] images
ATTACK: dict[str, Any] = {"eps": EPS, "step_size": 2 / 255, "num_steps": 20, "num_restarts": 1, "random_start": True}
BATCH_SIZE = 250


def training_arguments(output_dir: Path) -> RobustnessTokenTrainingArguments:
    """Larger steps and a larger attack than the paper's defaults, which are made for ImageNet backbones."""
    return RobustnessTokenTrainingArguments(
        output_dir=str(output_dir),
        overwrite_output_dir=True,
        max_steps=80,
        per_device_train_batch_size=64,
        learning_rate=5e-2,
        lr_scheduler_type="cosine",
        attack="pgd",
        eps=EPS,
        step_size=4 / 255,
        num_attack_steps=10,
        mixed_precision="bf16",
        seed=0,
    )


class Evaluation:
    """Attacks a model's features and its classes on fixed images, seen with or without its tokens.

    Args:
        model: The classifier with tokens.
        images: (n, 3, H, W) float in [0, 1].
        labels: (n,) int64.
    """

    def __init__(self, model: RobustnessTokenForImageClassification, images: Tensor, labels: Tensor) -> None:
        assert model.config.image_mean is not None
        assert model.config.image_std is not None
        self.model, self.images, self.labels = model, images, labels
        self.normalizer = Normalizer(model.config.image_mean, model.config.image_std)
        with torch.inference_mode(), model.disable_adapter():
            self.target = self._batched(self.features, images)  # f(x), (n, N, D)

    def features(self, images: Tensor) -> Tensor:
        return self.model.get_features(self.normalizer(images))

    def logits(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=self.normalizer(images)).logits
        return logits

    def attack(self, name: str, progress_bar: tqdm) -> Tensor:
        """The feature attack (lowers the token-axis cosine with f(x)) or the cross-entropy attack, on whatever
        tokens are active. Forward passes in bfloat16 make gradients cheaper; everything is measured in float32."""
        attacked = []
        for start in range(0, len(self.images), BATCH_SIZE):
            batch = slice(start, start + BATCH_SIZE)
            objective = (
                feature_cosine_objective(self.features, self.target[batch])
                if name == "feature"
                else cross_entropy_objective(self.logits, self.labels[batch])
            )
            with torch.autocast("cpu", torch.bfloat16):
                generator = torch.Generator().manual_seed(start)
                attacked.append(pgd_attack(objective, self.images[batch], generator=generator, **ATTACK))
            progress_bar.update()
        return torch.cat(attacked)

    @torch.inference_mode()
    def measure(self, images: Tensor) -> dict[str, float]:
        """Accuracy, and the cosine of the features with f(x), of what the model makes of these images."""
        cosine = cosine_similarity(self._batched(self.features, images), self.target).mean().item()
        accuracy = (self._batched(self.logits, images).argmax(-1) == self.labels).float().mean().item()
        return {"accuracy": accuracy, "cosine": cosine}

    def _batched(self, function: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        return torch.cat([function(batch) for batch in images.split(BATCH_SIZE)])


def evaluate(evaluation: Evaluation) -> tuple[dict[str, dict[str, dict[str, float]]], dict[str, Tensor]]:
    """Results by situation, `without_tokens` and `with_tokens`; and the images of the grey-box attacks."""
    model, attacked, results = evaluation.model, {}, {}

    def measured(images: Tensor, images_with_tokens: Tensor) -> dict[str, dict[str, float]]:
        with model.disable_adapter():
            without = evaluation.measure(images)
        return {"without_tokens": without, "with_tokens": evaluation.measure(images_with_tokens)}

    results["clean"] = measured(evaluation.images, evaluation.images)
    num_batches = -(-len(evaluation.images) // BATCH_SIZE)
    with tqdm(total=4 * num_batches, desc="Attacking test images") as progress_bar:
        for name in ("feature", "cross_entropy"):
            with model.disable_adapter():
                attacked[name] = evaluation.attack(name, progress_bar)
            results[f"{name}_attack, grey box"] = measured(attacked[name], attacked[name])
            white_box = evaluation.attack(name, progress_bar)
            results[f"{name}_attack, white box"] = measured(attacked[name], white_box)
    for images in attacked.values():
        excess = (images - evaluation.images).abs().max().item() - EPS
        assert excess <= 1e-6, f"the attack left its budget by {excess}"
    return results, attacked


def reloads_bit_equal(model: RobustnessTokenForImageClassification, adapter: Path, pixel_values: Tensor) -> bool:
    """Whether a fresh process computes the same bits from the saved adapter."""
    with torch.inference_mode():
        expected = model(pixel_values=pixel_values).logits
    with tempfile.TemporaryDirectory() as folder:
        input_file, output_file = Path(folder, "input.safetensors"), Path(folder, "output.safetensors")
        save_file({"pixel_values": pixel_values.contiguous()}, input_file)
        subprocess.run([sys.executable, HERE / "reload.py", adapter, input_file, output_file], check=True)
        return torch.equal(load_file(output_file)["logits"], expected)


def print_table(results: dict[str, dict[str, dict[str, float]]], num_images: int) -> None:
    rows = [
        ("clean images: accuracy", "clean", "accuracy"),
        ("clean images: feature cosine", "clean", "cosine"),
        (None, "The attacker knows the backbone, not the tokens (grey box)", ""),
        ("feature attack: feature cosine", "feature_attack, grey box", "cosine"),
        ("feature attack: accuracy", "feature_attack, grey box", "accuracy"),
        ("cross-entropy attack: accuracy", "cross_entropy_attack, grey box", "accuracy"),
        (None, "The attacker knows the tokens too (white box)", ""),
        ("feature attack: feature cosine", "feature_attack, white box", "cosine"),
        ("feature attack: accuracy", "feature_attack, white box", "accuracy"),
        ("cross-entropy attack: accuracy", "cross_entropy_attack, white box", "accuracy"),
    ]
    print(f"\n{num_images:,} held-out test images; PGD, L-inf, eps {255 * EPS:g}/255 in pixels, 20 steps of 2/255")
    print(f"{'':<34}{'without tokens':>16}{'with tokens':>14}{'change':>10}")
    for label, situation, metric in rows:
        if label is None:
            print(situation)
            continue
        without, with_tokens = (results[situation][side][metric] for side in ("without_tokens", "with_tokens"))
        indent = "" if situation == "clean" else "  "
        print(f"{indent + label:<34}{without:>16.3f}{with_tokens:>14.3f}{with_tokens - without:>+10.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"))
    parser.add_argument("--num_images", type=int, default=1000, help="test images to evaluate on")
    args = parser.parse_args()
    start = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()
    transformers.set_seed(0)

    model = RobustnessTokenForImageClassification.from_base(
        HERE / "backbone",
        num_robustness_tokens=20,
        attn_implementation="eager",  # twice as fast as sdpa under bfloat16 on a CPU
    )
    model.print_trainable_parameters()
    adapter = args.output / "adapter"
    trainer = RobustnessTokenTrainer(model, training_arguments(adapter), load_image_dataset(HERE / "data"))
    trainer.train()
    trainer.save_model()

    test_set = ImageDataset(load_image_dataset(HERE / "data", split="test"), ImageTransform(image_size=28))
    test = collate_images([test_set[index] for index in range(args.num_images)])
    evaluation = Evaluation(model, test["images"], test["labels"])
    results, attacked = evaluate(evaluation)

    bit_equal = reloads_bit_equal(model, adapter, evaluation.normalizer(test["images"][:BATCH_SIZE]))
    print_table(results, len(test["images"]))
    print(f"\nsaved, reloaded in a fresh process, outputs bit-equal: {'yes' if bit_equal else 'NO'}")

    plot_training_curves(trainer.log_history, args.output / "training_curves.png")
    names = model.config.id2label or {}
    with torch.inference_mode():
        shown, hit = test["images"][:8], attacked["feature"][:8]
        with model.disable_adapter():
            seen = [evaluation.logits(pictures).argmax(-1).tolist() for pictures in (shown, hit)]
        defended = evaluation.logits(hit).argmax(-1).tolist()
    titles = [
        (f"seen as\n{names[clean]}", f"seen as\n{names[fooled]};\nwith tokens\n{names[saved]}")
        for clean, fooled, saved in zip(*seen, defended, strict=True)
    ]
    plot_attacked_images(shown, hit, args.output / "attacked_images.png", eps=EPS, titles=titles)

    seconds = time.perf_counter() - start
    report = {
        "attack": {**ATTACK, "norm": "L-inf", "units": "pixels of [0, 1] images"},
        "num_images": len(test["images"]),
        "reloaded_bit_equal": bit_equal,
        "results": results,
        "seconds": round(seconds, 1),
        "training": trainer.args.recipe(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    (args.output / "results.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"wrote {args.output}/results.json, training_curves.png, attacked_images.png, adapter/ ({seconds:.0f} s)")
    if not bit_equal:
        raise SystemExit("the reloaded adapter does not compute the same")


if __name__ == "__main__":
    main()
