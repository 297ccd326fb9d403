"""Trains the quickstart's base: a 1.2 M parameter DINOv2 classifier, on the 60,000 images of Fashion-MNIST.

Run once by the maintainers; its output is committed in `base/`:

    apt-get install dataset-fashion-mnist
    python examples/quickstart/train_base.py

The accuracy in the card is that of the stored float16 file, loaded as float32, on all 10,000 test images.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from fashion_mnist import LABELS, SOURCE, load_split
from torch import Tensor, nn
from transformers import BitImageProcessor, Dinov2Config, Dinov2ForImageClassification
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from robustness_tokens.models import runs_in_half


CARD = """---
license: mit
library_name: transformers
pipeline_tag: image-classification
datasets: [zalando-datasets/fashion_mnist]
---
# DINOv2-tiny for Fashion-MNIST

A `Dinov2ForImageClassification` of {parameters:,} parameters (28 px, patch 4, width {width}, {depth} layers), so small
that it ships with the quickstart of `robustness_tokens`. Trained from scratch with labels (not by DINOv2's
self-supervision) on the 60,000 training images of [Fashion-MNIST](https://github.com/zalandoresearch/fashion-mnist)
(MIT licence), grey repeated to three channels.

**Accuracy: {accuracy:.2%}** on the 10,000 test images, measured on the stored float16 file loaded as float32.
The test images were not used to choose the epoch or a hyper-parameter.

Made by `examples/quickstart/train_base.py`: {epochs} epochs, batch {batch_size}, AdamW (learning rate
{lr:g}, weight decay {weight_decay:g}, one cycle), {precision}, random flips and shifts by one pixel,
seed {seed}, {minutes:.0f} minutes on a CPU.

It has no defence of its own, so the quickstart can show that small adversarial changes of an image mislead it.
"""


def augment(images: Tensor) -> Tensor:
    """Flips each image at random and shifts it by at most one pixel. Images (B, 3, 28, 28) in [0, 1]."""
    batch = images.shape[0]
    flipped = torch.where(torch.rand(batch, 1, 1, 1) < 0.5, images.flip(-1), images)
    windows = nn.functional.pad(flipped, (1, 1, 1, 1)).unfold(2, 28, 1).unfold(3, 28, 1)  # (B, 3, 3, 3, 28, 28)
    dy, dx = torch.randint(0, 3, (2, batch))
    return windows[torch.arange(batch), :, dy, dx]


def as_rgb(images: Tensor) -> Tensor:
    """Converts grey uint8 (B, 28, 28) to float (B, 3, 28, 28) in [0, 1]."""
    return images.float().div(255).unsqueeze(1).expand(-1, 3, -1, -1)


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, normalise: nn.Module) -> float:
    model.eval()
    hits = [
        (model(pixel_values=normalise(as_rgb(x))).logits.argmax(-1) == y).sum().item()
        for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    return sum(hits) / len(labels)


class Normalise(nn.Module):
    """Maps images in [0, 1] to the pixel values that the base reads (ImageNet's mean and standard deviation)."""

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
        return (images - mean) / std


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, default=SOURCE)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--weight_decay", type=float, default=0.05)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    images, labels = (torch.from_numpy(array.copy()) for array in load_split("train", args.source))
    normalise = Normalise()
    in_half = runs_in_half("bf16", device=torch.device("cpu"))
    config = Dinov2Config(
        image_size=28,
        patch_size=4,
        hidden_size=args.width,
        num_hidden_layers=args.depth,
        num_attention_heads=args.width // 32,
        id2label=dict(enumerate(LABELS)),
        label2id={label: i for i, label in enumerate(LABELS)},
        initializer_range=0.06,  # transformers' 0.02 is meant for wider models: at this width it learns far slower
    )
    config._attn_implementation = "eager"  # the faster one on a CPU at this size
    model = Dinov2ForImageClassification(config)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=args.weight_decay)
    steps_per_epoch = len(images) // args.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, args.lr, total_steps=args.epochs * steps_per_epoch, pct_start=0.15
    )

    start = time.time()
    for epoch in range(args.epochs):
        model.train()
        mean_loss = 0.0
        for index in torch.randperm(len(images))[: steps_per_epoch * args.batch_size].split(args.batch_size):
            pixel_values = normalise(augment(as_rgb(images[index])))
            with torch.autocast("cpu", torch.bfloat16, enabled=in_half):
                logits = model(pixel_values=pixel_values).logits
            loss = nn.functional.cross_entropy(logits.float(), labels[index].long())
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            mean_loss += loss.item() / steps_per_epoch
        minutes = (time.time() - start) / 60
        print(f"epoch {epoch + 1}/{args.epochs}  loss {mean_loss:.4f}  {minutes:.1f} min", flush=True)

    model.half().save_pretrained(args.output)
    model.config.dtype = torch.float32  # what from_pretrained loads the float16 file as
    model.config.save_pretrained(args.output)
    BitImageProcessor(
        size={"height": 28, "width": 28},
        do_center_crop=False,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        do_convert_rgb=True,
    ).save_pretrained(args.output)

    stored = Dinov2ForImageClassification.from_pretrained(args.output)
    assert stored.dtype == torch.float32
    test_images, test_labels = (torch.from_numpy(array.copy()) for array in load_split("t10k", args.source))
    score = accuracy(stored, test_images, test_labels, normalise)
    print(f"stored file: {score:.2%} of {len(test_labels):,} test images")
    precision = "bfloat16 autocast" if in_half else "float32"
    recipe = {k: getattr(args, k) for k in ("epochs", "batch_size", "lr", "weight_decay", "width", "depth", "seed")}
    card = CARD.format(
        parameters=stored.num_parameters(), accuracy=score, minutes=minutes, precision=precision, **recipe
    )
    (args.output / "README.md").write_text(card)


if __name__ == "__main__":
    main()
