"""Budgets, and the cells that an evaluation runs."""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

from ..attacks import PAPER_NUM_STEPS, paper_attack_eps
from ..report import Knowledge
from .arguments import BudgetName, EvaluationArguments
from .attack_suite import ATTACKS, Attack, find_definition
from .cells import Cell, Series
from .threat_models import AttackerView, EvaluatedModel


logger = logging.getLogger(__name__)

STEPS = (10, 20, 50, 100, 200)
RESTARTS = (1, 5, 10)
UNBOUNDED_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The effort of an evaluation; `ValueError` unless all numbers are integers of at least 1."""

    name: BudgetName
    num_images: int
    num_steps: int  # of PGD
    num_restarts: int  # of PGD and APGD
    num_apgd_steps: int
    num_target_classes: int  # of targeted APGD
    num_queries: int  # of Square
    num_draws: int  # of noise
    num_own_tokens: int  # sets of tokens that the attacker trains
    num_adversarial_pairs: int  # images that the attacker trains them on
    num_sweep_images: int  # of the sweep over eps and of the published attack
    num_sweep_steps: int  # of PGD in the sweep
    num_diagnostic_images: int  # of more steps, more restarts and the unbounded attack

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name != "name" and (type(value) is not int or value < 1):
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


_EFFORTS = {  # quick, standard, full
    "num_images": (200, 500, 5000),
    "num_steps": (10, 20, 100),
    "num_restarts": (1, 1, 1),
    "num_apgd_steps": (10, 30, 100),
    "num_target_classes": (3, 3, 9),
    "num_queries": (100, 1000, 1500),
    "num_draws": (5, 10, 100),
    "num_own_tokens": (2, 5, 5),
    "num_adversarial_pairs": (1000, 2500, 10000),
    "num_sweep_images": (50, 100, 1000),
    "num_sweep_steps": (10, 10, 50),
    "num_diagnostic_images": (30, 50, 500),
}
BUDGETS: Mapping[str, Budget] = {
    name: Budget(name=name, **{effort: by_budget[row] for effort, by_budget in _EFFORTS.items()})
    for row, name in enumerate(get_args(BudgetName))
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
        ("feature_mse:base", "margin", "apgd_cross_entropy", "mi_fgsm", "apgd_targeted_dlr"),
        ("paper_cross_entropy", "auto_attack"),
    ),
    "own_tokens": (
        ("feature_cosine:base", "cross_entropy"),
        (),
        ("feature_cosine:defended", "margin", "apgd_cross_entropy"),
    ),
    "full": (
        ("feature_cosine:base", "feature_cosine:defended", "cross_entropy", "margin"),
        ("feature_mse:base", "apgd_cross_entropy", "apgd_targeted_dlr", "mi_fgsm"),
        ("feature_mse:defended", "auto_attack"),
    ),
}


def select_attacks(attacks: Sequence[str | Attack] | None, budget: Budget, knowledge: Knowledge) -> list[Attack]:
    """Returns the attacks that the user named, or else those of the budget, whether they fit the task or not."""
    if attacks is None:
        groups = _SUITE[knowledge][: list(BUDGETS).index(budget.name) + 1]
        attacks = [name for group in groups for name in group]
    return [attack if isinstance(attack, Attack) else build_attack(attack, budget) for attack in attacks]


def build_attack(name: str, budget: Budget) -> Attack:
    """Returns an attack, such as `"feature_cosine:defended"`, with the hyper-parameters of a budget."""
    known = find_definition(name).parameters
    name, _, target = name.partition(":")
    values = {**vars(budget), "target": target or "base"}
    if name.startswith("apgd"):
        values["num_steps"] = budget.num_apgd_steps
    elif name.startswith("paper"):
        values["num_steps"] = PAPER_NUM_STEPS
    return Attack(**{key: values[key] for key in known if key in values}, name=name)


def apply_arguments(budget: Budget, arguments: EvaluationArguments) -> Budget:
    """Returns the budget, with the numbers of the arguments where they are given."""
    given = {name: getattr(arguments, name, None) for name in vars(budget) if name != "name"}
    return dataclasses.replace(budget, **{name: value for name, value in given.items() if value is not None})


def main_attack(model: EvaluatedModel) -> str:
    """Returns the name of the attack that the sweep and the diagnostics run."""
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
    """Returns the cells of an evaluation, at least one, level by level; `ValueError` if no attack fits.

    `on_grid` tells whether all images lie on the 8-bit grid, which decides the eps of the paper's attack.
    """
    # Whole batches, so that the sweep at eps = 0 measures bit for bit what was measured on clean images.
    num_batches = math.ceil(budget.num_sweep_images / arguments.batch_size)
    num_fewer_images = min(num_batches * arguments.batch_size, num_images)
    paper_eps = paper_attack_eps(model.normalizer.image_std.flatten().tolist(), on_grid=on_grid)
    levels = list(dict.fromkeys(view.knowledge for view in views))
    is_named = arguments.attacks is not None
    # An ensemble costs as much as all its members together, and adds little to what each of them finds.
    main_alone, main_name = not is_named and budget.name != "full", main_attack(model).partition(":")[0]
    cells: list[Cell] = []
    for view in views:
        for attack in select_attacks(arguments.attacks, budget, view.knowledge):
            if main_alone and len(view.tokens) > 1 and attack.name != main_name:
                continue
            if not _fits(attack, view, model, num_classes=num_classes, is_named=is_named):
                continue
            if attack.num_target_classes is not None and num_classes is not None:
                num_targets = min(attack.num_target_classes, num_classes - 1)
                attack = dataclasses.replace(attack, num_target_classes=num_targets)
            # The published attack serves comparison with the paper's tables, on fewer images, unless the user names it
            # or its own eps is among the budgets.
            is_aside = attack.is_paper and not is_named and paper_eps not in eps
            cells += [
                Cell(
                    series="published" if is_aside else "suite",
                    view=view,
                    attack=attack,
                    eps=one,
                    num_images=num_fewer_images if is_aside else num_images,
                    remaining_only=not is_named and _comes_after(attack, view, views, model),
                )
                for one in ([paper_eps] if attack.is_paper else eps)
            ]
    if not cells:
        raise ValueError(
            f"no attack fits: knowledge {sorted(levels)}, task {model.task!r}, attacks "
            f"{list(arguments.attacks) if arguments.attacks is not None else 'of the budget'}"
        )
    # Attacks on all images go first: they leave fewer images to the others.
    cells.sort(key=lambda cell: (levels.index(cell.view.knowledge), cell.remaining_only))
    cells += _sweep(model, views, budget, arguments.eps_sweep, num_fewer_images)
    full = [view for view in views if view.knowledge == "full"]
    if arguments.diagnostics and full:
        cells += _diagnostics(model, full[0], budget, eps[0], min(budget.num_diagnostic_images, num_images))
    return cells


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
    if len(view.tokens) > 1 and attack.is_paper:
        return False
    if num_classes is not None and num_classes < definition.min_classes:
        logger.warning("Skipping %s: it needs more than %d classes", attack.name, num_classes)
        return False
    if definition.needs_pyautoattack and not is_named and importlib.util.find_spec("pyautoattack") is None:
        logger.warning("Skipping %s: pip install 'robustness-tokens[eval]'", attack.name)
        return False
    return True


def _comes_after(attack: Attack, view: AttackerView, views: Sequence[AttackerView], model: EvaluatedModel) -> bool:
    """Tells whether the attack runs only on images that earlier attacks left correct.

    Attacks that a check compares, or that lead a level, always run on all images.
    """
    if model.task != "classification" or view.knowledge == "none" or attack.is_paper:
        return False
    first = next(other for other in views if other.knowledge == view.knowledge)
    return view is not first or attack.name not in ("cross_entropy", "feature_cosine")


def _sweep(
    model: EvaluatedModel, views: Sequence[AttackerView], budget: Budget, eps_sweep: Sequence[float], num_images: int
) -> list[Cell]:
    names = [main_attack(model)]
    if model.task != "features" and model.feature_view is not None:
        names.append("feature_cosine:base")
    attacks = [build_attack(name, budget) for name in names]
    by_level: dict[Knowledge, AttackerView] = {}
    for view in views:
        if not view.is_surrogate and (budget.name == "full" or view.knowledge not in by_level):
            # Only "full" sweeps the ensemble of own tokens, which costs as much as all sets and finds little more.
            by_level[view.knowledge] = view
    cells = []
    for view in by_level.values():
        for attack in attacks if view.differentiable else [build_attack("corner_noise", budget)]:
            for eps in eps_sweep:
                if attack.num_steps is not None:  # one step is enough to show that images do not change at eps = 0
                    num_steps = budget.num_sweep_steps if eps else 1
                    attack = dataclasses.replace(attack, num_steps=num_steps, num_restarts=1)
                cells.append(Cell(series="sweep", view=view, attack=attack, eps=eps, num_images=num_images))
    return cells


def _diagnostics(model: EvaluatedModel, view: AttackerView, budget: Budget, eps: float, num_images: int) -> list[Cell]:
    attack = dataclasses.replace(build_attack(main_attack(model), budget), num_restarts=1)
    chosen: list[tuple[Series, Attack, float]] = [
        *(("steps", dataclasses.replace(attack, num_steps=steps), eps) for steps in STEPS),
        *(("restarts", dataclasses.replace(attack, num_restarts=restarts), eps) for restarts in RESTARTS),
        ("single_step", build_attack("single_step", budget), eps),
        ("unbounded", dataclasses.replace(attack, num_steps=UNBOUNDED_STEPS), 1.0),
    ]
    return [Cell(series=series, view=view, attack=one, eps=at, num_images=num_images) for series, one, at in chosen]
