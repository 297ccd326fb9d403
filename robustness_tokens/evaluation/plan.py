"""Budgets, and the cells that an evaluation runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..attacks import PAPER_NUM_STEPS, paper_attack_eps
from ..report import Knowledge
from .arguments import BudgetName, EvaluationArguments
from .attack_suite import ATTACKS, Attack
from .cells import Cell, Series
from .threat_models import AttackerView, EvaluatedModel


logger = logging.getLogger(__name__)

STEPS = (10, 20, 50, 100, 200)
RESTARTS = (1, 5, 10)
UNBOUNDED_STEPS = 100

_NEEDS_PACKAGE = ("apgd_cross_entropy", "apgd_targeted_dlr", "auto_attack")
_SMALLEST_NUM_CLASSES = {"apgd_targeted_dlr": 4, "auto_attack": 4, "margin": 2}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The effort of an evaluation; its sweep and diagnostics take fewer images.

    Attributes:
        name: `"quick"`, `"standard"` or `"full"`.
        num_images: Images to attack.
        num_steps: Gradient steps of PGD.
        num_restarts: Restarts of PGD and APGD.
        num_apgd_steps: Gradient steps of APGD.
        num_queries: Queries of Square.
        num_draws: Draws of noise.
        num_own_tokens: Sets of tokens that the attacker trains.
        num_adversarial_pairs: Images that the attacker trains them on.
        num_sweep_images: Images of the sweep over eps and of the published attack.
        num_sweep_steps: Gradient steps of PGD in the sweep.
        num_diagnostic_images: Images for more steps, more restarts and the unbounded attack.

    Raises:
        ValueError: If a number is no whole number of at least 1.
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

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name != "name" and (type(value) is not int or value < 1):
                raise ValueError(f"{field.name} must be a whole number of at least 1, got {value!r}")


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
    """Returns the attacks of a budget at a level, including those that do not fit the task or the view."""
    groups = _SUITE[knowledge][: list(BUDGETS).index(budget.name) + 1]
    return [build_attack(name, budget) for group in groups for name in group]


def build_attack(name: str, budget: Budget) -> Attack:
    """Returns an attack, such as `"feature_cosine:defended"`, with the hyper-parameters of a budget."""
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
        values |= {"num_steps": PAPER_NUM_STEPS}
    known = ATTACKS[name].parameters
    if target and "target" not in known:
        raise ValueError(f"attack {name!r} has no target, got {target!r}")
    return Attack(name=name, **{key: value for key, value in values.items() if key in known})


def apply_arguments(budget: Budget, arguments: EvaluationArguments) -> Budget:
    """Returns the budget with the numbers that the arguments give."""
    names = [field.name for field in dataclasses.fields(budget) if field.name != "name"]
    given = {name: value for name in names if (value := getattr(arguments, name, None)) is not None}
    return dataclasses.replace(budget, **given)


def select_attacks(attacks: Sequence[str | Attack] | None, budget: Budget, knowledge: Knowledge) -> list[Attack]:
    """Returns the attacks that the user named, or else those of the budget."""
    if attacks is None:
        return budget_attacks(budget, knowledge)
    return [attack if isinstance(attack, Attack) else build_attack(attack, budget) for attack in attacks]


def main_attack(model: EvaluatedModel) -> str:
    """Returns the name of the attack that stands for all others in the sweep and the diagnostics."""
    return "feature_cosine:base" if model.task == "features" else "cross_entropy"


def plan_cells(
    model: EvaluatedModel,
    views: Sequence[AttackerView],
    arguments: EvaluationArguments,
    budget: Budget,
    *,
    eps: Sequence[float],
    num_images: int,
    num_classes: int | None,
    on_grid: bool,
) -> list[Cell]:
    """Returns the cells of an evaluation, at least one, cheap levels first; `ValueError` if no attack fits.

    `on_grid` tells whether all images lie on the 8-bit grid, which decides the eps of the paper's attack.
    """
    attacks = arguments.attacks
    # An ensemble costs as much as all its members together, and adds little to what each of them finds.
    main_alone = attacks is None and budget.name != "full"
    # Whole batches, so that the sweep at eps = 0 measures bit for bit what was measured on clean images.
    num_batches = math.ceil(budget.num_sweep_images / arguments.batch_size)
    num_fewer_images = min(num_batches * arguments.batch_size, num_images)
    paper_eps = paper_attack_eps(model.normalizer.image_std.flatten().tolist(), on_grid=on_grid)
    levels = list(dict.fromkeys(view.knowledge for view in views))
    cells: list[Cell] = []
    for view in views:
        for attack in select_attacks(attacks, budget, view.knowledge):
            if main_alone and len(view.tokens) > 1 and attack.name != main_attack(model).partition(":")[0]:
                continue
            if _fits(attack, view, model, num_classes=num_classes, is_named=attacks is not None):
                attack = _without_surplus(attack, num_classes)
                is_paper = attack.name.startswith("paper")
                # To be compared with the paper's tables, unless its own eps is one that is asked for, or it is named.
                is_aside = is_paper and attacks is None and paper_eps not in eps
                cells += [
                    Cell(
                        series="published" if is_aside else "suite",
                        view=view,
                        attack=attack,
                        eps=one,
                        num_images=num_fewer_images if is_aside else num_images,
                        remaining_only=attacks is None and _comes_after(attack, view, views, model),
                    )
                    for one in ([paper_eps] if is_paper else eps)
                ]
    # What attacks all images goes first: it leaves fewer to the others.
    cells.sort(key=lambda cell: (levels.index(cell.view.knowledge), cell.remaining_only))
    if not cells:
        raise ValueError(
            f"no attack fits: knowledge {sorted({view.knowledge for view in views})}, task {model.task!r}, attacks "
            f"{'of the budget' if attacks is None else list(attacks)}"
        )
    cells += _sweep(model, views, budget, arguments.eps_sweep, num_fewer_images)
    full = [view for view in views if view.knowledge == "full"]
    if arguments.diagnostics and full:
        cells += _diagnostics(model, full[0], budget, eps[0], min(budget.num_diagnostic_images, num_images))
    return cells


def _sweep(
    model: EvaluatedModel, views: Sequence[AttackerView], budget: Budget, eps_sweep: Sequence[float], num_images: int
) -> list[Cell]:
    names = [main_attack(model)]
    if model.task != "features" and model.feature_view is not None:
        names.append("feature_cosine:base")
    gradient = [
        dataclasses.replace(build_attack(name, budget), num_steps=budget.num_sweep_steps, num_restarts=1)
        for name in names
    ]
    by_level: dict[Knowledge, AttackerView] = {}
    for view in views:
        if not view.is_surrogate and (budget.name == "full" or view.knowledge not in by_level):
            # Of own tokens the first set alone, since the ensemble costs as much as all sets and finds little more.
            by_level[view.knowledge] = view
    return [
        Cell(series="sweep", view=view, attack=attack if eps else _short(attack), eps=eps, num_images=num_images)
        for view in by_level.values()
        for attack in (gradient if view.differentiable else [build_attack("corner_noise", budget)])
        for eps in eps_sweep
    ]


def _comes_after(attack: Attack, view: AttackerView, views: Sequence[AttackerView], model: EvaluatedModel) -> bool:
    """Tells whether the attack runs only on images that earlier attacks left correct.

    Attacks that a check compares, or that lead a level, always run on all images.
    """
    if model.task != "classification" or view.knowledge == "none" or attack.name.startswith("paper"):
        return False
    first = next(other for other in views if other.knowledge == view.knowledge)
    return view is not first or attack.name not in ("cross_entropy", "feature_cosine")


def _short(attack: Attack) -> Attack:
    """Returns the attack with one step, enough to show that images do not change at eps = 0."""
    return attack if attack.num_steps is None else dataclasses.replace(attack, num_steps=1)


def _diagnostics(model: EvaluatedModel, view: AttackerView, budget: Budget, eps: float, num_images: int) -> list[Cell]:
    attack = dataclasses.replace(build_attack(main_attack(model), budget), num_restarts=1)
    chosen: list[tuple[Series, Attack, float]] = [
        *(("steps", dataclasses.replace(attack, num_steps=steps), eps) for steps in STEPS),
        *(("restarts", dataclasses.replace(attack, num_restarts=restarts), eps) for restarts in RESTARTS),
        ("single_step", build_attack("single_step", budget), eps),
        ("unbounded", dataclasses.replace(attack, num_steps=UNBOUNDED_STEPS), 1.0),
    ]
    return [Cell(series=series, view=view, attack=one, eps=at, num_images=num_images) for series, one, at in chosen]


def _fits(
    attack: Attack, view: AttackerView, model: EvaluatedModel, *, num_classes: int | None, is_named: bool
) -> bool:
    definition = ATTACKS[attack.name]
    if model.task not in definition.tasks or (definition.needs_features and model.feature_view is None):
        return False
    if view.differentiable == definition.gradient_free:
        return False  # gradients without a model to differentiate, or guesses where there are gradients
    if attack.target == "defended" and view.tokens == (None,):
        return False  # the same as the base's features
    if attack.name.startswith("paper") and len(view.tokens) > 1:
        return False
    if num_classes is not None and num_classes < _SMALLEST_NUM_CLASSES.get(attack.name, 2):
        logger.warning("Skipping %s: it needs more than %d classes", attack.name, num_classes)
        return False
    if attack.name in _NEEDS_PACKAGE and not is_named and importlib.util.find_spec("pyautoattack") is None:
        logger.warning("Skipping %s: pip install 'robustness-tokens[eval]'", attack.name)
        return False
    return True


def _without_surplus(attack: Attack, num_classes: int | None) -> Attack:
    if attack.num_target_classes is None or num_classes is None:
        return attack
    return dataclasses.replace(attack, num_target_classes=min(attack.num_target_classes, num_classes - 1))
