"""Adversarially robust vision transformers from a frozen backbone and a handful of learned input tokens."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .attacks import cosine_similarity, paper_attack, pgd_attack
from .configuration import RobustnessTokenConfig
from .data import (
    AdversarialPairs,
    ImageDataset,
    ImageTransform,
    Normalizer,
    load_adversarial_pairs,
    load_image_dataset,
)
from .hub import push_adversarial_pairs
from .models import (
    ProbedModel,
    RobustnessTokenForImageClassification,
    RobustnessTokenModel,
    ZeroShotHead,
    export_onnx,
    extract_features,
    extract_tokens,
    import_published_tokens,
    inject_tokens,
    load_head,
    remove_tokens,
    save_head,
)
from .report import RobustnessReport
from .utils import __version__


if TYPE_CHECKING:
    from .evaluation import EvaluationArguments, evaluate_robustness, train_probe
    from .training import (
        RobustnessTokenTrainer,
        RobustnessTokenTrainingArguments,
        SweepArguments,
        make_adversarial_pairs,
        resolve_preset,
        robustness_loss,
        run_sweep,
    )


__all__ = [
    "AdversarialPairs",
    "EvaluationArguments",
    "ImageDataset",
    "ImageTransform",
    "Normalizer",
    "ProbedModel",
    "RobustnessReport",
    "RobustnessTokenConfig",
    "RobustnessTokenForImageClassification",
    "RobustnessTokenModel",
    "RobustnessTokenTrainer",
    "RobustnessTokenTrainingArguments",
    "SweepArguments",
    "ZeroShotHead",
    "__version__",
    "cosine_similarity",
    "evaluate_robustness",
    "export_onnx",
    "extract_features",
    "extract_tokens",
    "import_published_tokens",
    "inject_tokens",
    "load_adversarial_pairs",
    "load_head",
    "load_image_dataset",
    "make_adversarial_pairs",
    "paper_attack",
    "pgd_attack",
    "push_adversarial_pairs",
    "remove_tokens",
    "resolve_preset",
    "robustness_loss",
    "run_sweep",
    "save_head",
    "train_probe",
]


def __getattr__(name: str) -> Any:
    """Imports training or evaluation when one of its names is first used (PEP 562)."""
    if name in __all__:
        for wing in ("training", "evaluation"):  # evaluation imports training
            module = import_module(f".{wing}", __name__)
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
