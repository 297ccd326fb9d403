"""The trainings of a sweep in its folder: where each lies, and which of them are done."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .adversarial_pairs import AdversarialPairs
from .checkpoints import list_checkpoints
from .configuration import RobustnessTokenConfig
from .hub import AdapterFolder, holds_adapter, read_config, read_tokens
from .modeling import RobustnessTokenPreTrainedModel
from .training_args import RobustnessTokenTrainingArguments
from .training_data import describe_dataset, describe_image_size
from .training_log import LOG_FILE, read_log


logger = logging.getLogger(__name__)


class Combination(NamedTuple):
    """What distinguishes one training of a sweep."""

    num_tokens: int
    learning_rate: float
    seed: int

    @property
    def folder_name(self) -> str:
        """Where it lies in the folder of the sweep."""
        learning_rate = repr(float(self.learning_rate)).removesuffix(".0")  # no two have the same
        return f"tokens-{self.num_tokens}_lr-{learning_rate}_seed-{self.seed}"


def config_of(template: RobustnessTokenConfig, num_tokens: int) -> RobustnessTokenConfig:
    """The config of a training's model before it is trained: that of the sweep's model, with so many tokens."""
    values = {**template.to_dict(), "num_robustness_tokens": num_tokens, "training": {}}
    config: RobustnessTokenConfig = RobustnessTokenConfig.from_dict(values)
    return config


def arguments_of(args: RobustnessTokenTrainingArguments, combination: Combination) -> RobustnessTokenTrainingArguments:
    """The arguments of one training of a sweep, by those of all; it goes on where it was cut."""
    folder = Path(args.output_dir) / combination.folder_name
    return dataclasses.replace(
        args,
        output_dir=str(folder),
        learning_rate=combination.learning_rate,
        seed=combination.seed,
        # Whatever save_steps says: SIGTERM leaves a checkpoint too.
        resume_from_checkpoint=True if list_checkpoints(folder) and not args.overwrite_output_dir else None,
    )


def find_finished(
    args: RobustnessTokenTrainingArguments,
    wanted: Sequence[Combination],
    template: RobustnessTokenConfig,
    pairs: AdversarialPairs,
    *,
    num_processes: int,
) -> list[Combination]:
    """The combinations that need no training; says which of an earlier sweep's were trained otherwise.

    Args:
        args: Of the sweep.
        wanted: What is asked for now.
        template: Of the model that gives the sweep its base.
        pairs: To train on.
        num_processes: To train with, on which the images of a step depend.

    Returns:
        Those of earlier sweeps, then those wanted, unless `args.overwrite_output_dir` trains these anew.

    Raises:
        ValueError: If an adapter in the folder is damaged.
    """
    known = {
        "num_processes": num_processes,
        "image_size": describe_image_size(pairs.info.image_size),
        "dataset": describe_dataset(pairs),
    }
    found = []
    for path in sorted(Path(args.output_dir).glob("tokens-*_lr-*_seed-*")):
        if not holds_adapter(path):
            continue
        config = read_config(AdapterFolder(path, from_hub=False))
        training = config.training or {}
        learning_rate, seed = training.get("learning_rate"), training.get("seed")
        if isinstance(learning_rate, int | float) and isinstance(seed, int):
            combination = Combination(config.num_robustness_tokens, learning_rate, seed)
            found += [combination] if combination.folder_name == path.name else []
    others = [one for one in found if one not in wanted]
    candidates = others if args.overwrite_output_dir else [*others, *wanted]
    finished = [
        one for one in candidates if _is_finished(config_of(template, one.num_tokens), arguments_of(args, one), known)
    ]
    if left_out := [one.folder_name for one in others if one not in finished]:
        logger.warning(
            "The sweep leaves out what was trained on other pairs, or by another recipe: %s", ", ".join(left_out)
        )
    return finished


def _is_finished(
    config: RobustnessTokenConfig, args: RobustnessTokenTrainingArguments, known: Mapping[str, Any]
) -> bool:
    """Whether the folder holds the tokens that this training would give; `known` is what no argument says of it."""
    folder = AdapterFolder(Path(args.output_dir), from_hub=False)
    log = read_log(folder.path / LOG_FILE, last_step=args.max_steps)
    if not holds_adapter(folder.path) or not log or log[-1]["step"] != args.max_steps:
        return False
    stored = read_config(folder)
    expected = {**args.recipe(), **known, "num_steps_done": args.max_steps}
    trained = stored.training or {}
    return (
        stored.base_model_fingerprint == config.base_model_fingerprint
        and stored.num_robustness_tokens == config.num_robustness_tokens
        and stored.feature_view == config.feature_view
        and stored.similarity_axis == config.similarity_axis
        and stored.initializer_range == config.initializer_range
        and all(trained.get(name) == value for name, value in expected.items())
    )


def read_finished(
    member: RobustnessTokenPreTrainedModel, args: RobustnessTokenTrainingArguments
) -> list[dict[str, float]]:
    """Gives the model the tokens of its folder; returns the log of their training."""
    folder = AdapterFolder(Path(args.output_dir), from_hub=False)
    with torch.no_grad():
        member.robustness_tokens.copy_(read_tokens(folder, member.config))
    return read_log(folder.path / LOG_FILE, last_step=args.max_steps)
