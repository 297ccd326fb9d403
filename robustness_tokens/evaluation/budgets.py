"""How much an evaluation spends: which attacks, how hard, on how many images."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from .attack_suite import ATTACKS, Attack
from .threat_models import Knowledge


BudgetName = Literal["quick", "standard", "full"]


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What is spent on an evaluation.

    Attributes:
        name: `"quick"`, `"standard"` or `"full"`.
        num_images: How many images are attacked.
        num_steps: Gradient steps of PGD.
        num_restarts: Of PGD.
        num_apgd_steps: Gradient steps of APGD.
        num_queries: Of Square.
        num_draws: Of noise.
        num_own_tokens: How many sets of tokens the attacker trains.
        num_adversarial_pairs: How many images the attacker trains them on.
        num_sweep_images: How many images the sweep over eps takes, with `num_sweep_steps`, and the published attack.
        num_sweep_steps: Gradient steps of PGD there.
        num_diagnostic_images: How many images more steps, more restarts and the unbounded attack are tried on.
    """

    name: BudgetName
    num_images: int
    num_steps: int
    num_restarts: int
    num_apgd_steps: int
    num_queries: int
    num_draws: int
    num_own_tokens: int
    num_adversarial_pairs: int
    num_sweep_images: int
    num_sweep_steps: int
    num_diagnostic_images: int


BUDGETS: Mapping[str, Budget] = {
    "quick": Budget(
        name="quick",
        num_images=200,
        num_steps=10,
        num_restarts=1,
        num_apgd_steps=10,
        num_queries=100,
        num_draws=5,
        num_own_tokens=2,
        num_adversarial_pairs=1000,
        num_sweep_images=50,
        num_sweep_steps=10,
        num_diagnostic_images=30,
    ),
    "standard": Budget(
        name="standard",
        num_images=500,
        num_steps=20,
        num_restarts=1,
        num_apgd_steps=30,
        num_queries=150,
        num_draws=10,
        num_own_tokens=5,
        num_adversarial_pairs=2500,
        num_sweep_images=100,
        num_sweep_steps=10,
        num_diagnostic_images=50,
    ),
    "full": Budget(
        name="full",
        num_images=5000,
        num_steps=100,
        num_restarts=1,
        num_apgd_steps=100,
        num_queries=1500,
        num_draws=100,
        num_own_tokens=5,
        num_adversarial_pairs=10000,
        num_sweep_images=1000,
        num_sweep_steps=50,
        num_diagnostic_images=500,
    ),
}

# By level: the attacks of every budget, what "standard" adds, what "full" adds; with the target of feature attacks.
_SUITE: Mapping[Knowledge, tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]] = {
    "none": (
        ("uniform_noise", "corner_noise", "square", "feature_cosine:base", "cross_entropy"),
        (),
        ("feature_mse:base", "margin"),
    ),
    "base": (
        ("feature_cosine:base", "cross_entropy", "paper"),
        ("feature_mse:base", "margin", "apgd_cross_entropy"),
        ("paper_cross_entropy", "apgd_targeted_dlr", "auto_attack"),
    ),
    "own_tokens": (
        ("feature_cosine:base", "cross_entropy"),
        (),
        ("feature_cosine:defended", "margin", "apgd_cross_entropy"),
    ),
    "full": (
        ("feature_cosine:base", "feature_cosine:defended", "cross_entropy", "margin"),
        ("feature_mse:base", "apgd_cross_entropy", "apgd_targeted_dlr"),
        ("feature_mse:defended", "auto_attack"),
    ),
}

_TARGET_CLASSES = {"quick": 3, "standard": 3, "full": 9}


def budget_attacks(budget: Budget, knowledge: Knowledge) -> list[Attack]:
    """The attacks that a budget runs at a level; those that don't fit the task or the view are left to the caller."""
    groups = _SUITE[knowledge][: list(BUDGETS).index(budget.name) + 1]
    return [build_attack(name, budget) for group in groups for name in group]


def build_attack(name: str, budget: Budget) -> Attack:
    """An attack with the budget's hyper-parameters.

    Args:
        name: A key of `ATTACKS`; of a feature attack with its target, such as `"feature_cosine:defended"`
            (`"base"` by default).
        budget: Whose hyper-parameters.

    Returns:
        The attack.

    Raises:
        ValueError: If there is no such attack.
    """
    name, _, target = name.partition(":")
    if name not in ATTACKS:
        raise ValueError(f"attack {name!r} is unknown, expected one of {', '.join(sorted(ATTACKS))}")
    values: dict[str, Any] = {
        "target": target or "base",
        "num_steps": budget.num_steps,
        "num_restarts": budget.num_restarts,
        "num_queries": budget.num_queries,
        "num_draws": budget.num_draws,
        "num_target_classes": _TARGET_CLASSES[budget.name],
    }
    if name.startswith("apgd"):
        values |= {"num_steps": budget.num_apgd_steps}
    if name.startswith("paper"):
        values |= {"num_steps": 30}
    known = ATTACKS[name].parameters
    if target and "target" not in known:
        raise ValueError(f"attack {name!r} has no target, got {target!r}")
    return Attack(name=name, **{key: value for key, value in values.items() if key in known})


def with_overrides(budget: Budget, **overrides: Any) -> Budget:
    """The budget with other numbers, where they are not `None`; subsets never exceed the images."""
    budget = dataclasses.replace(budget, **{key: value for key, value in overrides.items() if value is not None})
    for field in dataclasses.fields(budget):
        value = getattr(budget, field.name)
        if field.name != "name" and (type(value) is not int or value < 1):
            raise ValueError(f"{field.name} must be a whole number of at least 1, got {value!r}")
    return budget


def select_attacks(attacks: Sequence[str | Attack] | None, budget: Budget, knowledge: Knowledge) -> list[Attack]:
    """The attacks that the user named, or else the budget's."""
    if attacks is None:
        return budget_attacks(budget, knowledge)
    return [attack if isinstance(attack, Attack) else build_attack(attack, budget) for attack in attacks]
