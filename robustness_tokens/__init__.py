"""Adversarially robust vision transformers from a frozen backbone and a handful of learned input tokens."""

__version__ = "0.1.0"  # before the imports, since modules below write it into what they save

from .attacks import cosine_similarity, paper_attack, pgd_attack
from .configuration import RobustnessTokenConfig
from .evaluation import evaluate_robustness
from .features import extract_features
from .injection import remove_tokens
from .losses import robustness_loss
from .merging import extract_tokens
from .modeling import RobustnessTokenForImageClassification, RobustnessTokenModel, inject_tokens
from .preprocessing import Normalizer
from .trainer import RobustnessTokenTrainer
from .training_args import RobustnessTokenTrainingArguments


__all__ = [
    "Normalizer",
    "RobustnessTokenConfig",
    "RobustnessTokenForImageClassification",
    "RobustnessTokenModel",
    "RobustnessTokenTrainer",
    "RobustnessTokenTrainingArguments",
    "cosine_similarity",
    "evaluate_robustness",
    "extract_features",
    "extract_tokens",
    "inject_tokens",
    "paper_attack",
    "pgd_attack",
    "remove_tokens",
    "robustness_loss",
]
