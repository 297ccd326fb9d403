"""Recipes by name: the paper's, and the one that held best here, in the words of the command line.

Source: Pulfer et al., "Robustness Tokens: Towards Adversarial Robustness of Transformers", ECCV 2024,
arXiv 2503.10191, and its code, https://github.com/BrianPulfer/robustness-tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


# ImageNet's mean and standard deviation for OpenCLIP too, which was trained with others: the published code does so.
_COMMON: dict[str, Any] = {
    "num_robustness_tokens": 10,
    "initializer_range": 0.01,
    "similarity_axis": "token",
    "image_mean": list(IMAGENET_DEFAULT_MEAN),
    "image_std": list(IMAGENET_DEFAULT_STD),
    "image_size": 224,
    "resize": "squash",
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "attack": "paper",
    "num_attack_steps": 30,
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "dinov2": MappingProxyType({**_COMMON, "max_steps": 50, "feature_view": "cls_and_patches"}),
        "deit3": MappingProxyType({**_COMMON, "max_steps": 300, "feature_view": "cls_and_patches"}),
        "openclip": MappingProxyType({**_COMMON, "max_steps": 300, "feature_view": "pooled"}),
        # The best of examples/quickstart/trade_off.py; the size of attack and tokens are the user's to choose.
        "adaptive": MappingProxyType({"attack": "pgd", "attack_through": "both", "head_distance_weight": 4.0}),
    }
)

PAPER = "paper"

_PRESET_OF_MODEL_TYPE = {
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "timm_wrapper": "deit3",  # the only family of the paper that comes by timm
    "clip": "openclip",
    "clip_vision_model": "openclip",
}


def resolve_preset(name: str, model_type: str | None = None) -> dict[str, Any]:
    """The settings of a preset, for the user's own to be laid over.

    Args:
        name: `"dinov2"`, `"deit3"` or `"openclip"`; or `"paper"`, which picks one of them by the base's family; or
            `"adaptive"`, which attacks with and without the tokens, and also what a linear head reads.
        model_type: `config.model_type` of the base, read for `"paper"` alone. A timm model counts as DeiT-III: name
            another preset outright for a timm copy of another family.

    Returns:
        A new dict by argument name: the fields of `ModelArguments` and `RobustnessTokenTrainingArguments`, and the
        `image_mean` and `image_std` of `from_base`.

    Raises:
        ValueError: If there is no such preset, or `"paper"` has no recipe for the family.
    """
    if name == PAPER:
        if model_type not in _PRESET_OF_MODEL_TYPE:
            raise ValueError(
                f"preset='paper' has no recipe for model_type={model_type!r}, only for "
                f"{sorted(_PRESET_OF_MODEL_TYPE)}: name one of {sorted(PRESETS)} outright, or set no preset"
            )
        name = _PRESET_OF_MODEL_TYPE[model_type]
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {[PAPER, *PRESETS]}, got {name!r}")
    return {argument: list(value) if isinstance(value, list) else value for argument, value in PRESETS[name].items()}
