"""Sets up Accelerate for a training run: distribution, precision, trackers."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
)
from accelerate.utils.environment import parse_flag_from_env

from ..utils import PROCESS_GROUP, share_from_main
from .arguments import RobustnessTokenTrainingArguments


logger = logging.getLogger(__name__)

LOG_FOLDER = "logs"

_PROJECT = "robustness_tokens"
_SHARDED = {
    "ACCELERATE_USE_DEEPSPEED": ("DeepSpeed", DistributedType.DEEPSPEED),
    "ACCELERATE_USE_FSDP": ("FSDP", DistributedType.FSDP),
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", DistributedType.MEGATRON_LM),
}


def build_accelerator(args: RobustnessTokenTrainingArguments) -> Accelerator:
    """Builds the Accelerator from the arguments and the launcher's environment.

    Raises:
        ValueError: If the launcher shards models (FSDP, DeepSpeed, Megatron-LM) or sets another precision.
        ImportError: If the package of a tracker is missing.
    """
    for variable, (name, _) in _SHARDED.items():
        # Checked first: Accelerate would ask for packages that this package does not use.
        if parse_flag_from_env(variable):
            raise _sharded_error(name)
    available = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in args.trackers if name not in available]:
        raise ImportError(
            f"report_to={args.trackers} needs {' and '.join(missing)}, not installed here: "
            'pip install "robustness-tokens[trackers]", or leave it out of report_to'
        )
    accelerator = Accelerator(
        # Even batches would repeat images of a dataset that is smaller than a step.
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True, data_seed=args.seed, even_batches=False),
        step_scheduler_with_optimizer=False,
        log_with=args.trackers or None,
        project_dir=str(Path(args.output_dir) / LOG_FOLDER),
        kwargs_handlers=[
            DistributedDataParallelKwargs(broadcast_buffers=False),  # the frozen base's never differ
            PROCESS_GROUP,
        ],
    )
    for name, distributed_type in _SHARDED.values():
        if accelerator.distributed_type == distributed_type:
            raise _sharded_error(name)
    if accelerator.mixed_precision not in ("no", args.mixed_precision):
        raise ValueError(
            f"accelerate was set up with mixed_precision={accelerator.mixed_precision!r}, the arguments say "
            f"{args.mixed_precision!r}: set mixed_precision in the arguments"
        )
    return accelerator


def start_trackers(accelerator: Accelerator, *, output_dir: Path, recipe: Mapping[str, Any]) -> None:
    """Starts a run in every tracker on the main process; trackers get the recipe and the log, never the tokens."""
    config = {key: value if isinstance(value, bool | int | float) else str(value) for key, value in recipe.items()}
    name = {"name": output_dir.resolve().name}
    folder = os.path.join(output_dir, LOG_FOLDER)
    init_kwargs = {"wandb": {**name, "dir": folder}, "trackio": name}
    try:
        share_from_main(lambda: accelerator.init_trackers(_PROJECT, config, init_kwargs), accelerator)
    except BaseException:
        accelerator.trackers.clear()  # a tracker that did not start can't be finished
        raise


def finish_trackers(accelerator: Accelerator) -> None:
    """Finishes the run in every tracker, which then writes its last rows; does not wait for other processes."""
    while accelerator.trackers:
        accelerator.trackers.pop(0).finish()


def abandon_trackers(accelerator: Accelerator) -> None:
    """Finishes the remaining trackers while another exception propagates; their own errors are only logged."""
    while accelerator.trackers:
        try:
            finish_trackers(accelerator)
        except Exception as exc:
            logger.warning("A tracker could not be finished: %s: %s", type(exc).__name__, exc)


def _sharded_error(name: str) -> ValueError:
    return ValueError(
        f"the processes were launched for {name}, which shards the model; here every process needs the whole frozen "
        "base, and only the few tokens are trained: run `accelerate config` again without it, or launch with "
        "torchrun, for plain data parallelism"
    )
