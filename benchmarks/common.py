"""Shared by the benchmarks of training steps: the work, the clock, the table's machine and the file."""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from robustness_tokens import RobustnessTokenTrainingArguments
from robustness_tokens.models import has_bfloat16


PUBLISHED = "published"
IMAGENET: dict[str, Any] = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def work_parser(description: str, *, output: str) -> argparse.ArgumentParser:
    """Arguments of the work that every step does; by default the published one."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--num_attack_steps", type=int, default=30)
    parser.add_argument("--num_layers", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--num_threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu_time", action="store_true", help="Processor time: with one thread, on a busy machine.")
    parser.add_argument("--output", type=Path, default=Path("outputs/benchmarks") / output)
    return parser


def build_backbone(args: argparse.Namespace, attn_implementation: str) -> Dinov2Model:
    """DINOv2-S/14 with the weights of torch's present seed."""
    settings: dict[str, Any] = {"hidden_size": 384, "num_attention_heads": 6, "num_hidden_layers": args.num_layers}
    settings |= {"image_size": 518, "patch_size": 14, "attn_implementation": attn_implementation}
    backbone: Dinov2Model = Dinov2Model(Dinov2Config(**settings)).eval()
    return backbone


def random_images(args: argparse.Namespace) -> Tensor:
    """(B, 3, H, W) float on the 8-bit grid."""
    return (torch.rand(args.batch_size, 3, args.image_size, args.image_size) * 255).floor() / 255


def training_arguments(args: argparse.Namespace, folder: Path, **settings: Any) -> RobustnessTokenTrainingArguments:
    """Arguments of a quiet run that may be repeated in the same folder."""
    return RobustnessTokenTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=args.batch_size,
        overwrite_output_dir=True,
        disable_tqdm=True,
        **settings,
    )


def possible_here(settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Names of the settings that this processor computes as they say; tells which it can't."""
    left_out = [name for name, one in settings.items() if one.get("mixed_precision") == "bf16"]
    if not left_out or has_bfloat16("cpu"):
        return list(settings)
    print(f"left out, as {_processor()} has no bfloat16 instructions: {'; '.join(left_out)}")
    return [name for name in settings if name not in left_out]


def seconds(args: argparse.Namespace, step: Callable[[], object]) -> float:
    """Seconds that a step takes, by the wall's clock or the processor's."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    start = clock()
    step()
    return clock() - start


def ratios(rounds: list[dict[str, float]]) -> dict[str, list[float]]:
    """By name, its time over that of the published step in the same round."""
    return {name: [one[name] / one[PUBLISHED] for one in rounds] for name in rounds[0]}


def work_in_words(args: argparse.Namespace) -> str:
    """The table's first line."""
    return (
        f"DINOv2-S/14, {args.image_size} px, batch {args.batch_size}, {args.num_attack_steps} attack steps; "
        f"{args.rounds} interleaved rounds on {args.num_threads} threads of {_processor()}"
    )


def write_result(args: argparse.Namespace, rounds: list[dict[str, float]], **more: Any) -> None:
    """Writes what was measured, and on what, as JSON."""
    result = {
        "arguments": {name: value for name, value in vars(args).items() if name != "output"},
        "machine": {"processor": _processor(), "torch": torch.__version__},
        "seconds": {name: [one[name] for one in rounds] for name in rounds[0]},
        "ratios": ratios(rounds),
        **more,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=2), encoding="utf-8")


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor()
    lines = [line.partition(":") for line in cpuinfo.read_text(encoding="utf-8").splitlines()]
    known = {key.strip(): value.strip() for key, _, value in lines}
    kinds = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in known.get("flags", "").split()]
    return f"{known.get('model name', platform.processor())} ({', '.join(kinds)})"
