"""Time and memory of a training step, against the published implementation's step on the same work.

    python -m benchmarks.training_step                                    # 30 attack steps, as published
    python -m benchmarks.training_step --num_attack_steps 3 --rounds 3    # a short one

DINOv2-S/14 at 224 px with 10 tokens and random weights. The variants take their steps in turn, round after round in
one process, so that whatever else the machine does hits all alike; what is printed are ratios of the rounds, median
and range. Ours are calls of `RobustnessTokenTrainer.train()` for one step, with all that it does around it. Peak
memory is measured in a process per variant: resident memory at its peak, above that after imports and building the
model. Compilation is done before the rounds, and its time printed.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from benchmarks.published_step import PublishedStep
from robustness_tokens import RobustnessTokenModel, RobustnessTokenTrainer, RobustnessTokenTrainingArguments


PUBLISHED = "published"
VARIANTS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp32, compiled": {"torch_compile": True},
    "bf16": {"mixed_precision": "bf16"},
    "bf16, compiled": {"mixed_precision": "bf16", "torch_compile": True},
    "fp32, no speed-ups": {"onednn": False, "train_attn_implementation": "base"},
    "bf16, no speed-ups": {"mixed_precision": "bf16", "onednn": False, "train_attn_implementation": "base"},
}
DEFAULT_VARIANTS = ["fp32", "fp32, compiled", "bf16", "bf16, compiled"]
IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--num_attack_steps", type=int, default=30)
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu_time", action="store_true", help="Processor time: with one thread, on a busy machine.")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=DEFAULT_VARIANTS)
    parser.add_argument(
        "--published_attn_implementation",
        choices=["eager", "sdpa"],
        default="eager",
        help="eager, as DINOv2's own code without xFormers, or torch's fused kernel.",
    )
    parser.add_argument("--no_memory", action="store_true", help="Leave the memory out.")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks/training_step.json"))
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # what the process per variant is started with
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    if args.memory_of:
        args.num_attack_steps = 1  # each of them takes the same
        print(json.dumps(peak_memory(args, args.memory_of)))
        return

    with tempfile.TemporaryDirectory() as folder:
        steps = {name: build_step(args, name, Path(folder)) for name in (PUBLISHED, *args.variants)}
        clock = time.process_time if args.cpu_time else time.perf_counter
        first_seconds = {name: seconds(step, clock) for name, step in steps.items()}  # compiles, and warms up
        rounds = [{name: seconds(step, clock) for name, step in steps.items()} for _ in range(args.rounds)]
    memory = {} if args.no_memory else {name: memory_in_a_process(name) for name in steps}
    result = {
        "arguments": {name: value for name, value in vars(args).items() if name not in ("output", "memory_of")},
        "machine": {"processor": processor(), "torch": torch.__version__, "threads": torch.get_num_threads()},
        "seconds": {name: [one[name] for one in rounds] for name in steps},
        "first_seconds": first_seconds,
        "ratios": {name: [one[name] / one[PUBLISHED] for one in rounds] for name in steps},
        "memory": memory,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2), encoding="utf-8")
    print_table(result)


def build_step(args: argparse.Namespace, name: str, folder: Path) -> Callable[[], object]:
    """What a variant does in a round; the weights and the images are the same for all."""
    torch.manual_seed(0)
    images = (torch.rand(args.batch_size, 3, args.image_size, args.image_size) * 255).floor() / 255
    small: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "image_size": 518, "patch_size": 14}
    small["num_hidden_layers"] = args.num_layers
    small["attn_implementation"] = args.published_attn_implementation if name == PUBLISHED else "sdpa"
    backbone = Dinov2Model(Dinov2Config(**small)).eval()
    if name == PUBLISHED:
        step = PublishedStep(backbone, num_attack_steps=args.num_attack_steps)
        return lambda: step(images)
    model = RobustnessTokenModel.from_base(backbone, num_robustness_tokens=10, **IMAGENET)
    dataset = [{"images": image} for image in images]
    return lambda: train_one_step(model, dataset, args, VARIANTS[name], folder)


def train_one_step(
    model: RobustnessTokenModel,
    dataset: list[dict[str, Tensor]],
    args: argparse.Namespace,
    settings: dict[str, Any],
    folder: Path,
) -> None:
    arguments = RobustnessTokenTrainingArguments(
        output_dir=str(folder / "run"),
        overwrite_output_dir=True,
        max_steps=1,
        per_device_train_batch_size=args.batch_size,
        num_attack_steps=args.num_attack_steps,
        disable_tqdm=True,
        **settings,
    )
    RobustnessTokenTrainer(model, arguments, dataset).train()


def seconds(step: Callable[[], object], clock: Callable[[], float]) -> float:
    start = clock()
    step()
    return clock() - start


def peak_memory(args: argparse.Namespace, name: str) -> dict[str, float]:
    """MiB of resident memory of this process at its peak, and what of it the steps took."""
    with tempfile.TemporaryDirectory() as folder:
        step = build_step(args, name, Path(folder))
        before = peak_resident_mib()
        for _ in range(2):  # compilation is over in the second, but its memory counts: it is needed
            step()
    peak = peak_resident_mib()
    return {"before": before, "peak": peak, "steps": peak - before}


def peak_resident_mib() -> float:
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss it starts anew with a program, whatever its parent took
        (line,) = (line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024 / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / MIB  # bytes on macOS


def memory_in_a_process(name: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.training_step", *sys.argv[1:], "--memory_of", name]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found: dict[str, float] = json.loads(output.splitlines()[-1])
    return found


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = [line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines()]
    known = {key.strip(): value.strip() for key, _, value in lines}
    kinds = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in known.get("flags", "").split()]
    return f"{known.get('model name', platform.processor())} ({', '.join(kinds)})"


def print_table(result: dict[str, Any]) -> None:
    args, machine = result["arguments"], result["machine"]
    print(
        f"DINOv2-S/14, {args['image_size']} px, batch {args['batch_size']}, {args['num_attack_steps']} attack steps; "
        f"{args['rounds']} interleaved rounds on {machine['threads']} threads of {machine['processor']}"
    )
    print(f"{'':<22}{'s a step':>10}{'ratio':>9}   {'range':<18}{'first':>8}", end="")
    print(f"{'peak MiB':>11}{'of it steps':>13}{'ratio':>8}" if result["memory"] else "")
    for name, times in result["seconds"].items():
        ratios = result["ratios"][name]
        row = f"{name:<22}{statistics.median(times):>10.2f}{statistics.median(ratios):>9.3f}   "
        row += f"{f'{min(ratios):.3f} to {max(ratios):.3f}':<18}{result['first_seconds'][name]:>8.1f}"
        if result["memory"]:
            memory, published = result["memory"][name], result["memory"][PUBLISHED]
            row += f"{memory['peak']:>11.0f}{memory['steps']:>13.0f}{memory['steps'] / published['steps']:>8.3f}"
        print(row)


if __name__ == "__main__":
    main()
