"""The commands that make an adapter and its evaluation again, for a reader to paste into a shell.

A config or a report may come from the Hub: what it says gets there as the quoted value of an option we chose.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import Any

from .configuration import RobustnessTokenConfig
from .report import RobustnessReport
from .report.markdown import plain


UNKNOWN_DATASET = "PATH_OR_HUB_ID"

# What of a recipe `robtok train` is told.
RECIPE_ARGUMENTS = (
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "max_grad_norm", "invariance_weight", "adversarial_weight", "attack", "attack_through", "eps"),
    *("step_size", "num_attack_steps", "head_distance_weight", "image_size", "resize", "shuffle_buffer_size"),
    *("seed", "mixed_precision"),
)


def train_command(config: RobustnessTokenConfig, training: Mapping[str, Any], trained_on: str | None) -> str:
    """The `robtok train` that makes such tokens.

    Args:
        config: The adapter's configuration.
        training: Its recipe.
        trained_on: Hub id of the training data, if they are there.

    Returns:
        Lines for a shell.
    """
    num_processes = training.get("num_processes")
    program = "robtok train"
    if isinstance(num_processes, int) and num_processes > 1:
        program = f"accelerate launch --num_processes {num_processes} -m robustness_tokens train"
    options: dict[str, Any] = {
        "base_model": config.base_model_name_or_path or "BASE_MODEL",
        "base_model_revision": config.base_model_revision,
        "dataset": trained_on or UNKNOWN_DATASET,
        "output_dir": "outputs/adapter",
        "num_robustness_tokens": config.num_robustness_tokens,
        "initializer_range": config.initializer_range,
        "feature_view": config.feature_view,
        "similarity_axis": config.similarity_axis,
        "image_mean": config.image_mean,
        "image_std": config.image_std,
    }
    if trained_on is not None:
        entry = training["dataset"]
        options |= _plain_values({"dataset_config": entry.get("config"), "split": entry.get("split")})
    options |= _plain_values({key: training.get(key) for key in RECIPE_ARGUMENTS})
    if training.get("resize") == "processor":
        options.pop("image_size", None)  # it came of the processor, and was not asked for
    return _command(program, options)


def evaluate_command(report: RobustnessReport, *, name: str) -> str:
    """The `robtok evaluate` that makes such a report of the adapter of that name."""
    options = {
        "dataset": report.dataset["name"],
        "split": report.dataset["split"],
        "output_dir": "outputs/evaluation",
        "task": "classification" if any(result.task == "classification" for result in report.results) else None,
        "budget": report.budget,
        "seed": report.seed,
    }
    return _command(f"robtok evaluate {_word(name)}", options)


def _plain_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """A list would be several words, and a word of its own may be an option."""
    return {key: value for key, value in options.items() if isinstance(value, str | int | float)}


def _command(program: str, options: Mapping[str, Any]) -> str:
    words = [_option(key, value) for key, value in options.items() if value is not None]
    return " \\\n    ".join([program, *words])


def _option(key: str, value: Any) -> str:
    is_like_option = plain(value).startswith("-") and not isinstance(value, int | float)
    return f"--{key}{'=' if is_like_option else ' '}{_words(value)}"


def _words(value: Any) -> str:
    if isinstance(value, float) and 0 < value < 1 and value == round(255 * value) / 255:
        return f"{round(255 * value)}/255"
    return " ".join(map(_word, value)) if isinstance(value, list) else _word(value)


def _word(value: object) -> str:
    return shlex.quote(plain(value))
