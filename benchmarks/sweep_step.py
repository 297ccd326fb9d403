"""Time of a step of a sweep, which reads its attacks from stored pairs, against the published implementation's step.

    python -m benchmarks.sweep_step
    python -m benchmarks.sweep_step --rounds 1 --num_threads 1 --cpu_time    # on a busy machine

DINOv2-S/14 at 224 px with 10 tokens and random weights. In every round the published step is taken once, with its 30
attack steps, and then each of ours a few times; what is printed are ratios of the rounds, median and range. The time
of ours is that of the whole training, reading the pairs included, over its steps.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch

from benchmarks.common import (
    IMAGENET,
    PUBLISHED,
    build_backbone,
    possible_here,
    random_images,
    ratios,
    seconds,
    training_arguments,
    work_in_words,
    work_parser,
    write_result,
)
from benchmarks.published_step import PublishedStep
from robustness_tokens import AdversarialPairs, RobustnessTokenModel, RobustnessTokenTrainer, make_adversarial_pairs


PRECISIONS = {"fp32": {"mixed_precision": "no"}, "bf16": {"mixed_precision": "bf16"}}


def main() -> None:
    parser = work_parser(__doc__.splitlines()[0], output="sweep_step.json")
    parser.add_argument("--steps", type=int, default=4, help="Of ours in a round.")
    parser.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=list(PRECISIONS))
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    args.precisions = possible_here({name: PRECISIONS[name] for name in args.precisions})
    torch.manual_seed(0)
    images = random_images(args)
    published = PublishedStep(build_backbone(args, "eager"), num_attack_steps=args.num_attack_steps)
    model = RobustnessTokenModel.from_base(build_backbone(args, "sdpa"), num_robustness_tokens=10, **IMAGENET)

    with tempfile.TemporaryDirectory() as folder:
        # One attack step: what is read has the same size.
        pairs_args = training_arguments(args, Path(folder) / "pairs", num_attack_steps=1)
        pairs = make_adversarial_pairs(model, pairs_args, [{"images": image} for image in images])
        for precision in args.precisions:
            train(model, pairs, args, Path(folder), precision=precision, num_steps=1)  # warms up
        rounds = []
        for _ in range(args.rounds):
            times = {PUBLISHED: seconds(args, lambda: published(images))}
            for precision in args.precisions:
                ours = partial(train, model, pairs, args, Path(folder), precision=precision, num_steps=args.steps)
                times[precision] = seconds(args, ours) / args.steps
            rounds.append(times)
    print(work_in_words(args))
    for name, of_rounds in ratios(rounds).items():
        low, middle, high = (1 / value for value in (max(of_rounds), statistics.median(of_rounds), min(of_rounds)))
        median = statistics.median(one[name] for one in rounds)
        print(f"{name:<12}{median:>9.2f} s a step, 1/{middle:.1f} of the published step (1/{low:.1f} to 1/{high:.1f})")
    write_result(args, rounds)


def train(
    model: RobustnessTokenModel,
    pairs: AdversarialPairs,
    args: argparse.Namespace,
    folder: Path,
    *,
    precision: str,
    num_steps: int,
) -> None:
    settings = {"max_steps": num_steps, **PRECISIONS[precision]}
    RobustnessTokenTrainer(model, training_arguments(args, folder / "run", **settings), pairs).train()


if __name__ == "__main__":
    main()
