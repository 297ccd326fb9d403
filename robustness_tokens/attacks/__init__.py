"""Attacks as pure functions of an objective and images; nothing here knows a model class."""

from .autoattack import apgd_attack, auto_attack
from .common import DEFAULT_EPS, example_generators
from .objectives import (
    Objective,
    cosine_similarity,
    cross_entropy_objective,
    feature_cosine_objective,
    feature_mse_objective,
    margin_objective,
    pixel_cross_entropy_objective,
)
from .paper import PAPER_EPS_NORMALIZED, PAPER_NUM_STEPS, PAPER_STEP_SIZE_NORMALIZED, paper_attack, paper_attack_eps
from .pgd import pgd_attack, pgd_step_size
from .random_search import noise_attack, square_attack
