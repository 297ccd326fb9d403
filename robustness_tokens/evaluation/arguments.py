"""The settings of an evaluation."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Literal, get_args

from ..configuration import FeatureView
from ..data import LabelMatching
from ..models import MixedPrecision
from ..report import Knowledge, Task
from ..utils import check_fields, local_path
from .attack_suite import find_definition


BudgetName = Literal["quick", "standard", "full"]

SWEEP_EPS = tuple(level / 255 for level in (0, 0.5, 1, 2, 4, 8, 16, 32))


@dataclass(kw_only=True)
class EvaluationArguments:
    """The settings of [`evaluate_robustness`]; the help of each field gives its unit and default.

    Raises:
        ValueError: If a value is unknown or out of range.
    """

    task: Task | None = field(
        default=None,
        metadata={"help": "features, classification or segmentation; by default the task of the model."},
    )
    knowledge: list[str] = field(
        default_factory=lambda: list(get_args(Knowledge)),
        metadata={"help": "What the attacker knows: none, base, own_tokens, full; by default all four."},
    )
    attacks: list[str] | None = field(
        default=None,
        metadata={
            "help": "Attacks, such as cross_entropy feature_cosine:defended (in Python also Attack objects), each run "
            "on all images at every level that it fits; by default the budget's, some of which run only on images "
            "that earlier attacks left correct."
        },
    )
    eps: list[float] | None = field(
        default=None,
        metadata={
            "help": "L-inf budgets of all attacks, in pixel units of [0, 1] images, such as 4/255; by default the eps "
            "that the tokens were trained with if attack=pgd, else 4/255."
        },
    )
    eps_sweep: list[float] = field(
        default_factory=lambda: list(SWEEP_EPS),
        metadata={
            "help": "L-inf budgets in pixel units for the curve over eps, with one or two attacks on fewer images; "
            "by default 0 to 32/255."
        },
    )
    budget: BudgetName = field(
        default="quick", metadata={"help": "Size of the evaluation (images, steps, attacks): quick, standard or full."}
    )
    num_images: int | None = field(
        default=None, metadata={"help": "Number of images, at most the size of the dataset; by default the budget's."}
    )
    num_steps: int | None = field(default=None, metadata={"help": "Steps of PGD; by default the budget's."})
    num_restarts: int | None = field(
        default=None, metadata={"help": "Random starts of PGD and APGD; by default the budget's."}
    )
    num_queries: int | None = field(default=None, metadata={"help": "Queries of Square; by default the budget's."})
    num_own_tokens: int | None = field(
        default=None, metadata={"help": "Sets of tokens that the attacker trains; by default the budget's."}
    )
    own_tokens_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimiser steps of each training of own tokens; by default as many as the adapter's training had."
        },
    )
    diagnostics: bool = field(
        default=True,
        metadata={"help": "Run the attacks that only checks need: more steps, more restarts, one step, unbounded."},
    )
    seed: int = field(
        default=0, metadata={"help": "Seed of the selection of images, the attacks and the confidence intervals."}
    )
    batch_size: int = field(default=100, metadata={"help": "Largest number of images that are attacked together."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Folder to store finished parts in, which are not run again; by default none."},
    )
    image_column_name: str | None = field(
        default=None, metadata={"help": "Column with the images; by default found by its type."}
    )
    label_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column with the class labels; by default the one of class labels, or label, labels or cls."
        },
    )
    mask_column_name: str | None = field(
        default=None, metadata={"help": "Column with the masks of a segmentation; by default mask."}
    )
    label_matching: LabelMatching = field(
        default="name",
        metadata={
            "help": "How labels refer to the classes of the model: by name where both sides have names, or by index."
        },
    )
    feature_view: FeatureView | None = field(
        default=None, metadata={"help": "Features to measure; by default those in the adapter's config."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Side in pixels that images are squashed to; by default they are resized as in training."},
    )
    ignore_index: int = field(default=255, metadata={"help": "Label of pixels that a segmentation ignores."})
    attack_precision: MixedPrecision | None = field(
        default=None,
        metadata={
            "help": "Precision of the attacks' forward passes: no (float32) or bf16, on devices that support it; by "
            "default the training's. Results are always measured in float32."
        },
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "Name of the dataset in the report; by default its own."}
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress bars."})

    def __post_init__(self) -> None:
        if self.output_dir is not None:
            self.output_dir = local_path(self.output_dir)
        for name in ("knowledge", "attacks", "eps", "eps_sweep"):
            value = getattr(self, name)
            if value is not None:
                is_one = isinstance(value, str) or not isinstance(value, Iterable)
                setattr(self, name, [value] if is_one else list(value))
        if not self.knowledge or set(self.knowledge) - set(get_args(Knowledge)):
            raise ValueError(
                f"knowledge must be a list of at least one of {get_args(Knowledge)}, got {self.knowledge!r}"
            )
        check_fields(self, from_zero=("seed",), free=("ignore_index", "attacks", "eps", "eps_sweep"))
        if self.eps is not None and not self.eps:
            raise ValueError("eps must hold at least one budget, got none")
        budgets: list[Any] = [*(self.eps or ()), *self.eps_sweep]
        for eps in budgets:
            if not isinstance(eps, Real) or not 0 <= float(eps) <= 1:
                raise ValueError(f"eps must lie in [0, 1], in pixel units of [0, 1] images such as 4/255, got {eps!r}")
        for attack in self.attacks or ():
            if isinstance(attack, str):
                find_definition(attack)


def training_settings(arguments: EvaluationArguments, *, of_tables: bool) -> dict[str, Any]:
    """Returns the settings of labels, and `of_tables` of columns, for the attacker's training; no defaults."""
    names = ("label_matching", *(("image_column_name", "label_column_name") if of_tables else ()))
    defaults = {field.name: field.default for field in dataclasses.fields(EvaluationArguments)}
    return {name: value for name in names if (value := getattr(arguments, name)) != defaults[name]}


def override_arguments(arguments: EvaluationArguments | None, overrides: Mapping[str, Any]) -> EvaluationArguments:
    """Returns the arguments, or the defaults, with the overrides; `TypeError` for a name that is no field."""
    arguments = arguments or EvaluationArguments()
    known = [field.name for field in dataclasses.fields(arguments)]
    for name in overrides:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
            raise TypeError(f"evaluate_robustness has no argument {name!r}: did you mean {close[0]!r}?")
    return dataclasses.replace(arguments, **overrides)
