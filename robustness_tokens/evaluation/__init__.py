"""Honest robustness evaluation: what holds, against whom, how sure."""

from .arguments import EvaluationArguments
from .attack_suite import Attack
from .evaluate import evaluate_robustness
from .figures import training_figures
from .probe_training import train_probe
