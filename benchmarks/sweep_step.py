"""Time of a step of a sweep, which reads its attacks from stored pairs, against the published implementation's step.

    python -m benchmarks.sweep_step
    python -m benchmarks.sweep_step --rounds 1 --num_threads 1 --cpu_time    # on a busy machine

DINOv2-S/14 at 224 px with 10 tokens and random weights. In every round the published step is taken once, with its 30
attack steps, and then each of ours a few times; what is printed are ratios of the rounds, median and range. The time
of ours is that of the whole training, reading the pairs included, over its steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import Dinov2Config, Dinov2Model

from benchmarks.published_step import PublishedStep
from robustness_tokens import RobustnessTokenModel, RobustnessTokenTrainer, RobustnessTokenTrainingArguments
from robustness_tokens.adversarial_pairs import AdversarialPairs
from robustness_tokens.attack_once import make_adversarial_pairs


PUBLISHED = "published"
PRECISIONS = {"fp32": "no", "bf16": "bf16"}
IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--num_attack_steps", type=int, default=30)
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="Of ours in a round.")
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu_time", action="store_true", help="Processor time: with one thread, on a busy machine.")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/sweep_step.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    torch.manual_seed(0)
    clock = time.process_time if args.cpu_time else time.perf_counter
    images = (torch.rand(args.batch_size, 3, args.image_size, args.image_size) * 255).floor() / 255
    published = PublishedStep(build_backbone(args, "eager"), num_attack_steps=args.num_attack_steps)
    model = RobustnessTokenModel.from_base(build_backbone(args, "sdpa"), num_robustness_tokens=10, **IMAGENET)

    with tempfile.TemporaryDirectory() as folder:
        pairs_args = arguments(args, Path(folder) / "pairs", num_attack_steps=1)  # what it reads has the same size
        pairs = make_adversarial_pairs(model, pairs_args, [{"images": image} for image in images])
        for precision in args.precisions:
            train(model, pairs, args, Path(folder), precision=precision, num_steps=1)  # warms up
        rounds = []
        for _ in range(args.rounds):
            times = {PUBLISHED: seconds(lambda: published(images), clock)}
            for precision in args.precisions:
                ours = partial(train, model, pairs, args, Path(folder), precision=precision, num_steps=args.steps)
                times[precision] = seconds(ours, clock) / args.steps
            rounds.append(times)
    times_of = {name: [one[name] for one in rounds] for name in rounds[0]}
    ratios_of = {name: [one[PUBLISHED] / one[name] for one in rounds] for name in rounds[0]}
    print(
        f"DINOv2-S/14, {args.image_size} px, batch {args.batch_size}, {args.num_attack_steps} attack steps; "
        f"{args.rounds} rounds on {args.num_threads} threads"
    )
    for name, ratios in ratios_of.items():
        print(
            f"{name:<12}{statistics.median(times_of[name]):>9.2f} s a step, 1/{statistics.median(ratios):.1f} of the "
            f"published step (1/{max(ratios):.1f} to 1/{min(ratios):.1f})"
        )
    result = {
        "arguments": {name: value for name, value in vars(args).items() if name != "output"},
        "torch": torch.__version__,
        "seconds": times_of,
        "ratios": ratios_of,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2), encoding="utf-8")


def build_backbone(args: argparse.Namespace, attn_implementation: str) -> Dinov2Model:
    settings: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": args.num_layers}
    settings |= {"image_size": 518, "patch_size": 14, "attn_implementation": attn_implementation}
    backbone: Dinov2Model = Dinov2Model(Dinov2Config(**settings)).eval()
    return backbone


def arguments(args: argparse.Namespace, folder: Path, **settings: Any) -> RobustnessTokenTrainingArguments:
    return RobustnessTokenTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=args.batch_size,
        overwrite_output_dir=True,
        disable_tqdm=True,
        **settings,
    )


def train(
    model: RobustnessTokenModel,
    pairs: AdversarialPairs,
    args: argparse.Namespace,
    folder: Path,
    *,
    precision: str,
    num_steps: int,
) -> None:
    training_args = arguments(args, folder / "run", max_steps=num_steps, mixed_precision=PRECISIONS[precision])
    RobustnessTokenTrainer(model, training_args, pairs).train()


def seconds(step: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    step()
    return clock() - start


if __name__ == "__main__":
    main()
