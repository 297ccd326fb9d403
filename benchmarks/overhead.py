"""Time of a forward pass with an adapter, against the base alone and against native register tokens.

    python benchmarks/overhead.py

DINOv2-S/14 at 224 px with 10 tokens and random weights: tokens at the input, tokens for each layer, and these with all
gains and shifts. The models run in turn, round after round, so that whatever else the machine does hits all alike.
Printed are ratios of the rounds, median and quartiles.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import torch
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersConfig, Dinov2WithRegistersModel

from robustness_tokens import RobustnessTokenModel
from robustness_tokens.configuration import GainsAndShifts
from robustness_tokens.data import build_image_processor


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num_tokens", type=int, default=10)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/overhead.json"))
    args = parser.parse_args()

    torch.manual_seed(0)
    small: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    base = Dinov2Model(Dinov2Config(**small)).eval()

    def adapted(**kwargs: Any) -> RobustnessTokenModel:
        copy = Dinov2Model(Dinov2Config(**small)).eval()
        copy.load_state_dict(base.state_dict())
        processor = build_image_processor(image_size=224)
        return RobustnessTokenModel.from_base(
            copy, num_robustness_tokens=args.num_tokens, image_processor=processor, **kwargs
        )

    registers = Dinov2WithRegistersModel(
        Dinov2WithRegistersConfig(num_register_tokens=args.num_tokens, **small)
    ).eval()
    everything = list(get_args(GainsAndShifts))
    models = {
        "base": base,
        "tokens": adapted(),
        "registers": registers,
        "deep tokens": adapted(token_depth="all"),
        "deep tokens, gains and shifts": adapted(token_depth="all", gains_and_shifts=everything),
    }
    pixel_values = torch.randn(args.batch_size, 3, 224, 224)

    def seconds(forward: Callable[..., object]) -> float:
        start = time.perf_counter()
        forward(pixel_values=pixel_values)
        return time.perf_counter() - start

    rounds: list[dict[str, float]] = []
    with torch.inference_mode():
        for _ in range(args.rounds + 2):  # the first two warm up
            # Each model is the first of a round as often as the others: what runs after a pause runs slower.
            first = len(rounds) % len(models)
            order = list(models)[first:] + list(models)[:first]
            rounds.append({name: seconds(models[name]) for name in order})
    result = {
        f"{name} / {other}": statistics.quantiles([r[name] / r[other] for r in rounds[2:]], n=4)
        for name, other in [("tokens", "registers"), *((name, "base") for name in models if name != "base")]
    }
    sequence = 257
    print(f"DINOv2-S/14, 224 px, batch {args.batch_size}, {args.num_tokens} tokens, {args.rounds} interleaved rounds")
    print(f"{'time of a forward pass':<40}{'median':>8}   quartiles")
    for name, (low, median, high) in result.items():
        print(f"{name:<40}{median:>8.3f}   {low:.3f} to {high:.3f}")
    print(f"{'longer sequence alone':<40}{(sequence + args.num_tokens) / sequence:>8.3f}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps({"arguments": {**vars(args), "output": str(args.output)}, "ratios": result}))


if __name__ == "__main__":
    main()
