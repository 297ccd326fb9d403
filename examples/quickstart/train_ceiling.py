"""Trains all weights of the quickstart's base against attacks: the ceiling that `--preset robust` is compared with.

    python examples/quickstart/prepare_data.py --all --output outputs/fashion-mnist
    python examples/quickstart/train_ceiling.py --data outputs/fashion-mnist --output outputs/ceiling

Adversarial training with labels, through the model itself, with the images, batches, eps, attack and number of steps
of the preset. Its own learning rate is searched: a short training with each, attacked on held-out images. The last
2,000 training images are held out, as in `ship_robust.py`. The same command continues a stopped run.

Writes the classifier to `model/`, and to `adapter/` an adapter on it that changes nothing, so that `robtok evaluate`
can attack the ceiling as it attacks any adapter, or take it as the surrogate of a transfer attack.
"""

from __future__ import annotations

import argparse
import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import datasets
import torch
from measuring import BASE, accuracy, fingerprints, load_training_images
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoImageProcessor, Trainer, TrainingArguments
from transformers import Dinov2ForImageClassification as Classifier
from transformers.trainer_utils import get_last_checkpoint

from robustness_tokens import (
    ImageDataset,
    ImageTransform,
    Normalizer,
    RobustnessTokenForImageClassification,
    RobustnessTokenTrainingArguments,
    evaluate_robustness,
    pgd_attack,
    resolve_preset,
)
from robustness_tokens.data import collate_images
from robustness_tokens.training import split_settings
from robustness_tokens.utils import read_json, write_text


class AdversarialTrainer(Trainer):
    """Trains a classifier on clean images and on images that PGD attacks through it."""

    recipe: RobustnessTokenTrainingArguments
    normalizer: Normalizer

    def compute_loss(self, model: Any, inputs: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        images, labels, recipe = inputs["images"], inputs["labels"], self.recipe

        def losses(images: Tensor, labels: Tensor) -> Tensor:
            logits = model(pixel_values=self.normalizer(images)).logits.float()
            return F.cross_entropy(logits, labels, reduction="none")

        share = recipe.eps_share(self.state.global_step)
        attacked = pgd_attack(
            lambda x: losses(x, labels),
            images,
            eps=share * (recipe.eps or 0.0),
            num_steps=recipe.num_attack_steps,
            keep_best=False,
        )
        both = losses(torch.cat([attacked, images]), labels.repeat(2))
        on_attacked, on_clean = both.chunk(2)
        return recipe.adversarial_weight * on_attacked.mean() + recipe.invariance_weight * on_clean.mean()


def train(settings: dict[str, Any], images: datasets.Dataset, folder: Path) -> None:
    """Trains in `folder/checkpoints` and writes `model/` and `adapter/`, unless they are there."""
    trained_on = fingerprints(images, BASE / "model.safetensors")
    described, file = {**settings, "trained_on": trained_on}, folder / "settings.json"
    if file.exists() and (found := read_json(file)) != described:
        raise SystemExit(f"error: {folder} was trained with {found}, not {described}: choose another --output")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps(described, indent=2) + "\n")
    if (folder / "adapter").exists():
        return
    checkpoints = folder / "checkpoints"
    recipe = RobustnessTokenTrainingArguments(output_dir=str(checkpoints), **settings)
    processor: Any = AutoImageProcessor.from_pretrained(BASE)
    arguments = TrainingArguments(
        output_dir=recipe.output_dir,
        max_steps=recipe.max_steps,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.lr_scheduler_type,
        warmup_steps=recipe.warmup_steps,
        max_grad_norm=recipe.max_grad_norm or 0.0,
        per_device_train_batch_size=recipe.per_device_train_batch_size,
        bf16=recipe.mixed_precision == "bf16",
        use_cpu=not torch.cuda.is_available(),
        remove_unused_columns=False,
        save_steps=100,
        save_total_limit=1,
        logging_steps=50,
        report_to="none",
        disable_tqdm=True,
        seed=recipe.seed,
    )
    trainer = AdversarialTrainer(
        Classifier.from_pretrained(BASE, dtype=torch.float32),  # without dropout, so attacks see what is trained
        arguments,
        train_dataset=ImageDataset(images, ImageTransform(image_size=28)),
        data_collator=collate_images,
    )
    trainer.recipe = recipe
    trainer.normalizer = Normalizer(processor.image_mean, processor.image_std).to(trainer.args.device)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(checkpoints) if checkpoints.exists() else None)
    trainer.save_model(str(folder / "model"))
    processor.save_pretrained(folder / "model")
    same = RobustnessTokenForImageClassification.from_base(
        folder / "model", num_robustness_tokens=0, gains_and_shifts=["norm"]
    )
    same.save_pretrained(folder / "adapter")


def attack(folder: Path, images: datasets.Dataset, *, eps: float, num_images: int) -> dict[str, float]:
    """Returns the accuracy of a trained classifier on clean images, and under PGD on the margin."""
    model = RobustnessTokenForImageClassification.from_pretrained(folder / "adapter")
    report = evaluate_robustness(
        model,
        images,
        task="classification",
        knowledge=("full",),
        attacks=("margin",),
        eps=(eps,),
        eps_sweep=(),
        num_images=num_images,
        num_steps=20,
        diagnostics=False,
        attack_precision="bf16",
    )
    white_box = accuracy(report, knowledge="full")
    return {"clean": accuracy(report), "white_box": white_box, "num_images": num_images}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with the images as parquet")
    parser.add_argument("--output", type=Path, default=Path("outputs/ceiling"))
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[1e-3, 3e-3, 6e-3])
    parser.add_argument("--search_steps", type=int, default=200, help="of each training that tries a learning rate")
    parser.add_argument("--max_steps", type=int, default=resolve_preset("robust")["max_steps"])
    parser.add_argument("--eps", type=Fraction, default="16/255", help="pixel units of [0, 1] images")
    parser.add_argument("--num_images", type=int, default=500, help="number of held-out images to attack")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    images, held_out = load_training_images(args.data)
    _, preset = split_settings(resolve_preset("robust"))
    # Labels instead of the base's predictions; the attack goes through the model itself in any case.
    preset = {name: value for name, value in preset.items() if name not in ("objective", "attack_through")}

    def run(max_steps: int, learning_rate: float) -> float:
        settings = {**preset, "max_steps": max_steps, "warmup_steps": max_steps // 10}
        settings |= {"learning_rate": learning_rate, "eps": float(args.eps), "seed": args.seed}
        folder = args.output / f"{max_steps}_steps_{learning_rate:g}"
        train(settings, images, folder)
        file = folder / "accuracies.json"
        measured = read_json(file) if file.exists() else {}
        if measured.get("num_images") != args.num_images:
            measured = attack(folder, held_out, eps=float(args.eps), num_images=args.num_images)
            write_text(file, json.dumps(measured, indent=2) + "\n")
        print(f"{folder}: clean {measured['clean']:.3f}, white box {measured['white_box']:.3f}", flush=True)
        return float(measured["white_box"])

    best = max(args.learning_rates, key=lambda learning_rate: run(args.search_steps, learning_rate))
    run(args.max_steps, best)


if __name__ == "__main__":
    main()
