"""The commands of `robtok`; the program itself is `robtok.py`, beside the package."""

from .commands import run_command
