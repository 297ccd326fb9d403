"""Attacks as pure functions of an objective and images; nothing here knows a model class."""

from .autoattack import apgd_attack, auto_attack
from .noise import noise_attack
from .objectives import (
    Objective,
    cosine_similarity,
    cross_entropy_objective,
    feature_cosine_objective,
    feature_mse_objective,
    margin_objective,
    pixel_cross_entropy_objective,
)
from .paper import paper_attack
from .pgd import pgd_attack
from .square import square_attack


__all__ = [
    "Objective",
    "apgd_attack",
    "auto_attack",
    "cosine_similarity",
    "cross_entropy_objective",
    "feature_cosine_objective",
    "feature_mse_objective",
    "margin_objective",
    "noise_attack",
    "paper_attack",
    "pgd_attack",
    "pixel_cross_entropy_objective",
    "square_attack",
]
