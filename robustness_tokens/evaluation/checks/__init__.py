"""The checks that an evaluation must pass before its numbers count."""

from .run import run_checks
