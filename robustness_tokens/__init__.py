"""Adversarially robust vision transformers from a frozen backbone and a handful of learned input tokens."""

from .attacks import cosine_similarity, paper_attack, pgd_attack
from .configuration import RobustnessTokenConfig
from .features import extract_features
from .injection import remove_tokens
from .losses import robustness_loss
from .merging import extract_tokens
from .modeling import RobustnessTokenForImageClassification, RobustnessTokenModel, inject_tokens
from .preprocessing import Normalizer
from .trainer import RobustnessTokenTrainer
from .training_args import RobustnessTokenTrainingArguments


__version__ = "0.1.0"

__all__ = [
    "Normalizer",
    "RobustnessTokenConfig",
    "RobustnessTokenForImageClassification",
    "RobustnessTokenModel",
    "RobustnessTokenTrainer",
    "RobustnessTokenTrainingArguments",
    "cosine_similarity",
    "extract_features",
    "extract_tokens",
    "inject_tokens",
    "paper_attack",
    "pgd_attack",
    "remove_tokens",
    "robustness_loss",
]
