"""The arguments of `robtok train`, as it reads them."""

from collections.abc import Sequence
from typing import Any

from robustness_tokens.cli.parsing import (
    TRAINING_GROUPS,
    CommandParser,
    DataArguments,
    ModelArguments,
    finish_training_arguments,
)
from robustness_tokens.training.arguments import RobustnessTokenTrainingArguments


def parse_arguments(
    words: Sequence[str], **kwargs: Any
) -> tuple[ModelArguments, DataArguments, RobustnessTokenTrainingArguments]:
    (model_args, data_args, training_args), _ = CommandParser(TRAINING_GROUPS, **kwargs).parse(words)
    finish_training_arguments(data_args, training_args)
    return model_args, data_args, training_args
