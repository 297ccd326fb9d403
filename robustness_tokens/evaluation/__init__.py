"""Evaluates robustness: what holds, against which attacker, and how certain the numbers are."""

from .arguments import EvaluationArguments
from .attack_suite import Attack
from .evaluate import evaluate_robustness
from .figures import training_figures
from .probe_training import train_probe
