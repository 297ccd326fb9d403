"""Attacks as pure functions of an objective and images; nothing here knows a model class."""

from .objectives import (
    cosine_similarity,
    cross_entropy_objective,
    feature_cosine_objective,
    feature_mse_objective,
    margin_objective,
    pixel_cross_entropy_objective,
)
from .paper import paper_attack
from .pgd import pgd_attack


__all__ = [
    "cosine_similarity",
    "cross_entropy_objective",
    "feature_cosine_objective",
    "feature_mse_objective",
    "margin_objective",
    "paper_attack",
    "pgd_attack",
    "pixel_cross_entropy_objective",
]
