"""The commands of `robtok`; the program itself is `robtok.py`, beside the package."""

from .commands import run_command
from .parsing import ModelArguments, load_eval_dataset, load_train_dataset, parse_arguments
