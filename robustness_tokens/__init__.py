"""Adversarially robust vision transformers from a frozen backbone and a handful of learned input tokens."""

from .attacks import cosine_similarity, paper_attack, pgd_attack
from .configuration import RobustnessTokenConfig
from .data import Normalizer
from .evaluation import evaluate_robustness
from .models import (
    RobustnessTokenForImageClassification,
    RobustnessTokenModel,
    export_onnx,
    extract_features,
    extract_tokens,
    inject_tokens,
    remove_tokens,
)
from .training import RobustnessTokenTrainer, RobustnessTokenTrainingArguments, robustness_loss
from .utils import __version__


__all__ = [
    "Normalizer",
    "RobustnessTokenConfig",
    "RobustnessTokenForImageClassification",
    "RobustnessTokenModel",
    "RobustnessTokenTrainer",
    "RobustnessTokenTrainingArguments",
    "__version__",
    "cosine_similarity",
    "evaluate_robustness",
    "export_onnx",
    "extract_features",
    "extract_tokens",
    "inject_tokens",
    "paper_attack",
    "pgd_attack",
    "remove_tokens",
    "robustness_loss",
]
