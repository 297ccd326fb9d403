"""The command `robtok`."""

from .commands import main
from .parsing import ModelArguments, load_eval_dataset, load_train_dataset, parse_arguments


__all__ = [
    "ModelArguments",
    "load_eval_dataset",
    "load_train_dataset",
    "main",
    "parse_arguments",
]
