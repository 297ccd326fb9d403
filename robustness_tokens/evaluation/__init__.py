"""Honest robustness evaluation: what holds, against whom, how sure."""

from .attack_suite import Attack
from .evaluate import evaluate_robustness


__all__ = ["Attack", "evaluate_robustness"]
