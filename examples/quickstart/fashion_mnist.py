"""Reads the original Fashion-MNIST files, as Debian's package ``dataset-fashion-mnist`` installs them."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np


SOURCE = Path("/usr/share/datasets/fashion-mnist")
LABELS = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]

_HEADER_BYTES = {"images": 16, "labels": 8}  # magic number, count and (images) rows and columns, 4 bytes each


def load_split(split: str, source: Path = SOURCE) -> tuple[np.ndarray, np.ndarray]:
    """Loads one split.

    Args:
        split: ``"train"`` (60,000 images) or ``"t10k"`` (10,000).
        source: Folder that holds the four ``*-ubyte.gz`` files.

    Returns:
        Images (n, 28, 28) uint8 and labels (n,) uint8.

    Raises:
        FileNotFoundError: If the originals are not there.
    """
    arrays = {}
    for kind, rank in (("images", 3), ("labels", 1)):
        path = source / f"{split}-{kind}-idx{rank}-ubyte.gz"
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: `apt-get install dataset-fashion-mnist`, or pass --source")
        with gzip.open(path) as file:
            arrays[kind] = np.frombuffer(file.read(), dtype=np.uint8, offset=_HEADER_BYTES[kind])
    return arrays["images"].reshape(-1, 28, 28), arrays["labels"]
