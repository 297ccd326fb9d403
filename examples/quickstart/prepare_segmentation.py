"""Makes segmentation data from the quickstart's pictures: one or two clothes on a canvas, and each pixel's class.

Needs no download, and the same seed makes the same images. Writes parquet files and a sheet to look at:

    python examples/quickstart/prepare_segmentation.py --output outputs/quickstart/segmentation
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from robustness_tokens import load_image_dataset


HERE = Path(__file__).parent
NUM_IMAGES = {"train": 2000, "test": 500}
IMAGE_SIZE = 28
"""Side of a canvas in pixels, the same as the base's images."""

SIDES = (20, 28)
"""Smallest and largest side that a picture is scaled to."""

NUM_LABELS = 11
"""The background and the ten classes of Fashion-MNIST."""

BACKGROUND, IGNORED = 0, 255
CLOTH_FROM = 32
"""Smallest grey value of cloth. The background is exactly 0; values between are a blurred edge."""

# Dark to bright; the first is the background, the others are the ten classes.
_SHEET_COLORS = ["#000000", "#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#bbbbbb", "#ee7733"]
_SHEET_COLORS += ["#882255", "#999933"]


def compose(pictures: np.ndarray, labels: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Puts one or two pictures on an empty canvas, each scaled and placed at random, the second in front.

    Args:
        pictures: (n, 28, 28) uint8 grey.
        labels: (n,) classes from 0.
        generator: Draws the pictures, their sizes and their positions.

    Returns:
        The canvas (S, S) uint8 grey, and its mask (S, S) uint8: `BACKGROUND`, 1 + the class, or `IGNORED`.
    """
    canvas = np.zeros((IMAGE_SIZE, IMAGE_SIZE), dtype=np.uint8)
    mask = np.full_like(canvas, BACKGROUND)
    for chosen in generator.integers(len(pictures), size=generator.integers(1, 3)):
        side = int(generator.integers(SIDES[0], SIDES[1], endpoint=True))
        top, left = generator.integers(0, IMAGE_SIZE - side, size=2, endpoint=True)
        place = (slice(top, top + side), slice(left, left + side))
        picture = np.asarray(Image.fromarray(pictures[chosen]).resize((side, side), Image.Resampling.BILINEAR))
        is_cloth = picture >= CLOTH_FROM
        is_drawn = is_cloth | (picture > canvas[place])  # a faint edge doesn't darken the cloth behind it
        mask[place] = np.where(is_drawn, np.where(is_cloth, labels[chosen] + 1, IGNORED), mask[place])
        canvas[place] = np.where(is_drawn, picture, canvas[place])
    return canvas, mask


def load_segmentation(split: str, *, num_images: int | None = None, seed: int = 0) -> datasets.Dataset:
    """Returns composites of the pictures in `data/`.

    Args:
        split: "train" or "test"; they share no pictures.
        num_images: Number of images; by default 2,000 (train) and 500 (test).
        seed: Seed of the pictures, their sizes and their positions.

    Returns:
        A dataset with the columns "image" (grey) and "mask" (11 classes, 0 the background, 255 ignored).
    """
    source = load_image_dataset(HERE / "data", split=split)
    pictures = np.stack([np.asarray(picture.convert("L")) for picture in source["image"]])
    labels = np.array(source["label"])
    generator = np.random.default_rng([seed, sorted(NUM_IMAGES).index(split)])
    pairs = [compose(pictures, labels, generator) for _ in range(num_images or NUM_IMAGES[split])]
    columns = {"image": [_as_png(canvas) for canvas, _ in pairs], "mask": [_as_png(mask) for _, mask in pairs]}
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    return datasets.Dataset.from_dict(columns, features=features)


def _as_png(pixels: np.ndarray) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def draw_sheet(dataset: datasets.Dataset, path: Path, *, columns: int = 8, scale: int = 4) -> None:
    """Draws the first images with their masks in colours below them; ignored pixels are white."""
    side, gap = IMAGE_SIZE * scale, 2 * scale
    palette = np.full((256, 3), 255, dtype=np.uint8)
    palette[: len(_SHEET_COLORS)] = [tuple(bytes.fromhex(color[1:])) for color in _SHEET_COLORS]
    sheet = Image.new("RGB", (columns * (side + gap), 4 * (side + gap)), "dimgray")
    for index in range(2 * columns):
        row, left = divmod(index, columns)
        mask = Image.fromarray(palette[np.asarray(dataset[index]["mask"])])
        for below, picture in enumerate((dataset[index]["image"].convert("RGB"), mask)):
            enlarged = picture.resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left * (side + gap), (2 * row + below) * (side + gap)))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart/segmentation"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for split in NUM_IMAGES:
        dataset = load_segmentation(split, seed=args.seed)
        path = args.output / f"{split}-00000-of-00001.parquet"
        dataset.to_parquet(path)
        print(f"{path}: {len(dataset)} images, {path.stat().st_size:,} bytes")
        draw_sheet(dataset, args.output / f"{split}_sheet.png")


if __name__ == "__main__":
    main()
