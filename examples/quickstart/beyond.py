"""Measures an adapter on what it was not trained for: other norms, a larger eps, and common corruptions.

    python examples/quickstart/prepare_data.py --all --output outputs/fashion-mnist
    python examples/quickstart/beyond.py examples/quickstart/robust-adapter --data outputs/fashion-mnist

The attacker knows all, and runs APGD on cross-entropy, then targeted APGD (100 steps, 9 targets) on what is still
correct. The table gives accuracies on test images, of the base without tokens and with them.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from pathlib import Path

import torch
from measuring import BASE, normalizer_of
from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as transforms

from robustness_tokens import (
    ImageDataset,
    ImageTransform,
    RobustnessTokenForImageClassification,
    load_image_dataset,
)
from robustness_tokens.data import choose_rows, collate_images


# Norm, and its eps: pixel units of [0, 1] images for L-inf, the length of the change of a 28 x 28 x 3 image for L2.
BALLS = (
    ("Linf", 16 / 255),
    ("Linf", 24 / 255),
    ("Linf", 32 / 255),
    ("Linf", 64 / 255),
    ("L2", 0.5),
    ("L2", 1.0),
    ("L2", 2.0),
)
CORRUPTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Gaussian noise, 0.1": lambda x: transforms.gaussian_noise(x, sigma=0.1),
    "Gaussian noise, 0.2": lambda x: transforms.gaussian_noise(x, sigma=0.2),
    "Gaussian blur, 1 pixel": lambda x: transforms.gaussian_blur(x, [5, 5], [1.0]),
    "brightness + 0.2": lambda x: (x + 0.2).clamp(0, 1),
    "contrast x 0.5": lambda x: transforms.adjust_contrast(x, 0.5),
    "half the resolution": lambda x: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2),
    "JPEG, quality 20": lambda x: torch.stack([transforms.jpeg((255 * one).byte(), 20) for one in x]) / 255,
}
BATCH_SIZE = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("adapter", type=Path)
    parser.add_argument("--data", type=Path, required=True, help="folder with the images as parquet")
    parser.add_argument("--num_images", type=int, default=200, help="number of test images to attack or corrupt")
    parser.add_argument("--num_steps", type=int, default=100, help="steps of APGD")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    model = RobustnessTokenForImageClassification.from_pretrained(args.adapter, base_model=BASE).eval()
    normalizer = normalizer_of(model)
    test_set = ImageDataset(
        load_image_dataset(args.data, split="test"), ImageTransform(image_size=28), with_labels=True
    )
    # The same images as those of `robtok evaluate`.
    rows = choose_rows(len(test_set), args.num_images, seed=args.seed)
    batch = collate_images([test_set[int(row)] for row in rows])
    batches = list(zip(batch["images"].split(BATCH_SIZE), batch["labels"].split(BATCH_SIZE), strict=True))

    def logits(images: Tensor) -> Tensor:
        found: Tensor = model(pixel_values=normalizer(images)).logits
        return found

    @torch.no_grad()
    def accuracy(change: Callable[[Tensor, Tensor], Tensor]) -> float:
        torch.manual_seed(args.seed)  # the same noise with and without tokens
        hits = [logits(change(images, labels)).argmax(dim=1) == labels for images, labels in batches]
        return torch.cat(hits).float().mean().item()

    def corrupted(images: Tensor, labels: Tensor, corruption: Callable[[Tensor], Tensor]) -> Tensor:
        return corruption(images)

    def attacked(images: Tensor, labels: Tensor, norm: str, eps: float) -> Tensor:
        settings = {"norm": norm, "eps": eps, "n_iter": args.num_steps, "seed": args.seed}
        images = images.clone()
        for attack in (APGDAttack(logits, **settings), APGDAttack_targeted(logits, n_target_classes=9, **settings)):
            with torch.no_grad():
                remaining = logits(images).argmax(dim=1) == labels
                if remaining.any():
                    images[remaining] = attack.perturb(images[remaining], labels[remaining])
        return images

    print(f"\nAccuracy on {args.num_images} test images{'without tokens':>31}{'with tokens':>15}")

    def print_row(name: str, change: Callable[[Tensor, Tensor], Tensor]) -> None:
        with model.disable_adapter():
            without = accuracy(change)
        print(f"{name:<40}{without:>15.3f}{accuracy(change):>15.3f}", flush=True)

    print_row("clean", lambda images, labels: images)
    for name, corruption in CORRUPTIONS.items():
        print_row(name, functools.partial(corrupted, corruption=corruption))
    for norm, eps in BALLS:
        name = f"L2, {eps:g}" if norm == "L2" else f"L-inf, {255 * eps:g}/255"
        print_row(name, functools.partial(attacked, norm=norm, eps=eps))


if __name__ == "__main__":
    main()
