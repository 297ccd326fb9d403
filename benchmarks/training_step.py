"""Time and memory of a training step, against the published implementation's step on the same work.

    python -m benchmarks.training_step                                    # 30 attack steps, as published
    python -m benchmarks.training_step --num_attack_steps 3 --rounds 3    # a short one

DINOv2-S/14 at 224 px with 10 tokens and random weights. The variants take their steps in turn, round after round in
one process, so that whatever else the machine does hits all alike; what is printed are ratios of the rounds, median
and range. Ours are calls of `RobustnessTokenTrainer.train()` for a few steps, with all that it does around them. Peak
memory is measured in a process per variant: resident memory at its peak, above that after imports and building the
model. Compilation is done before the rounds, and its time printed. The bfloat16 variants are left out on a processor
without such instructions.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

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
from robustness_tokens import RobustnessTokenModel, RobustnessTokenTrainer


VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, compiled": {"torch_compile": True},
    "bf16": {"mixed_precision": "bf16"},
    "bf16, compiled": {"mixed_precision": "bf16", "torch_compile": True},
    "fp32, no speed-ups": {"onednn": False, "train_attn_implementation": "base"},
    "bf16, no speed-ups": {"mixed_precision": "bf16", "onednn": False, "train_attn_implementation": "base"},
}
DEFAULT_VARIANTS = ["fp32", "fp32, compiled", "bf16", "bf16, compiled"]
MIB = 2**20


def main() -> None:
    parser = work_parser(__doc__.splitlines()[0], output="training_step.json")
    parser.add_argument("--steps", type=int, default=2, help="Of ours in a round.")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=DEFAULT_VARIANTS)
    parser.add_argument(
        "--published_attn_implementation",
        choices=["eager", "sdpa"],
        default="eager",
        help="eager, as DINOv2's own code without xFormers, or torch's fused kernel.",
    )
    parser.add_argument("--no_memory", action="store_true", help="Leave the memory out.")
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # what the process per variant is started with
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    args.variants = possible_here({name: VARIANTS[name] for name in args.variants})
    if args.memory_of:
        args.num_attack_steps = 1  # each of them takes the same
        print(json.dumps(peak_memory(args, args.memory_of)))
        return
    del args.memory_of

    with tempfile.TemporaryDirectory() as folder:
        steps = {name: build_step(args, name, Path(folder)) for name in (PUBLISHED, *args.variants)}
        first_seconds = {name: seconds(args, partial(step, 1)) for name, step in steps.items()}  # compiles, warms up
        counts = {name: 1 if name == PUBLISHED else args.steps for name in steps}
        rounds = [
            {name: seconds(args, partial(step, counts[name])) / counts[name] for name, step in steps.items()}
            for _ in range(args.rounds)
        ]
    memory = {} if args.no_memory else {name: memory_in_a_process(name) for name in steps}
    write_result(args, rounds, first_seconds=first_seconds, memory=memory)
    print_table(args, rounds, first_seconds, memory)


def build_step(args: argparse.Namespace, name: str, folder: Path) -> Callable[[int], object]:
    """Returns a function that takes so many steps of a variant; all have the same weights and images."""
    torch.manual_seed(0)
    images = random_images(args)
    backbone = build_backbone(args, args.published_attn_implementation if name == PUBLISHED else "sdpa")
    if name == PUBLISHED:
        step = PublishedStep(backbone, num_attack_steps=args.num_attack_steps)
        return lambda count: [step(images) for _ in range(count)]
    model = RobustnessTokenModel.from_base(backbone, num_robustness_tokens=10, **IMAGENET)
    dataset = [{"images": image} for image in images]
    settings = {"num_attack_steps": args.num_attack_steps, **VARIANTS[name]}

    def train(count: int) -> None:
        training_args = training_arguments(args, folder / "run", max_steps=count, **settings)
        RobustnessTokenTrainer(model, training_args, dataset).train()

    return train


def peak_memory(args: argparse.Namespace, name: str) -> dict[str, float]:
    """MiB of resident memory of this process at its peak, and what of it the steps took."""
    with tempfile.TemporaryDirectory() as folder:
        step = build_step(args, name, Path(folder))
        before = peak_resident_mib()
        for _ in range(2):  # compilation is over in the second, but its memory counts: it is needed
            step(1)
    peak = peak_resident_mib()
    return {"before": before, "peak": peak, "steps": peak - before}


def peak_resident_mib() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss it starts at zero with a program, whatever its parent took
        (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB  # bytes on macOS


def memory_in_a_process(name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.training_step", *sys.argv[1:], "--memory_of", name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def print_table(
    args: argparse.Namespace,
    rounds: list[dict[str, float]],
    first_seconds: dict[str, float],
    memory: dict[str, dict[str, float]],
) -> None:
    print(work_in_words(args))
    print(f"{'':<22}{'s a step':>10}{'ratio':>9}   {'range':<18}{'first':>8}", end="")
    print(f"{'peak MiB':>11}{'ratio':>8}{'of it steps':>13}{'ratio':>8}" if memory else "")
    for name, of_rounds in ratios(rounds).items():
        median = statistics.median(one[name] for one in rounds)
        row = f"{name:<22}{median:>10.2f}{statistics.median(of_rounds):>9.3f}   "
        row += f"{f'{min(of_rounds):.3f} to {max(of_rounds):.3f}':<18}{first_seconds[name]:>8.1f}"
        for key, width in (("peak", 11), ("steps", 13)) if memory else ():
            row += f"{memory[name][key]:>{width}.0f}{memory[name][key] / memory[PUBLISHED][key]:>8.3f}"
        print(row)


if __name__ == "__main__":
    main()
