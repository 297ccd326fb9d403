"""Loads a saved adapter in a fresh process and writes its outputs; the quickstart compares them bit by bit.

python examples/quickstart/reload.py ADAPTER INPUT.safetensors OUTPUT.safetensors
"""

from __future__ import annotations

import sys

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

import robustness_tokens  # noqa: F401  registers the adapter with the Auto classes


def main(adapter: str, input_file: str, output_file: str) -> None:
    model = AutoModelForImageClassification.from_pretrained(adapter)
    with torch.inference_mode():
        logits = model(pixel_values=load_file(input_file)["pixel_values"]).logits
    save_file({"logits": logits}, output_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
