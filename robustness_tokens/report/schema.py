"""The data of a report, checked strictly, since a report may come from the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

from ..utils import (
    MAX_NAME,
    check_bool,
    check_choice,
    check_dict,
    check_int,
    check_keys,
    check_list,
    check_number,
    check_numbers,
    check_parameters,
    check_schema,
    check_text,
)


SCHEMA_VERSION = 2

Task = Literal["features", "classification", "segmentation"]
Metric = Literal["cosine", "accuracy", "miou", "mean_image_miou"]
TokensInPlace = Literal["none", "trained", "untrained", "zero", "mean"]
Knowledge = Literal["none", "base", "own_tokens", "full"]
ReportedKnowledge = Literal[Knowledge, "full_worst_case"]
"""`"full_worst_case"` is the worst case over the attacks of all levels."""

NUM_CHECKS = 12
_ROUNDING = 1e-3  # a cosine in half precision, or an interval, may leave its range by this


class OlderReportError(ValueError):
    """The report was written by an older package; the adapter beside it is not affected."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """A number with everything that it depends on; `ValueError` if a value is of the wrong type or out of range."""

    task: Task
    metric: Metric
    value: float  # in [0, 1]; a cosine with the clean images' features without tokens in [-1, 1]
    confidence_interval: tuple[float, float] | None = None  # 95%
    tokens: TokensInPlace
    knowledge: ReportedKnowledge | None = None  # the attacker's; None for clean images
    attack: str | None = None  # None for clean images
    attack_parameters: dict[str, Any] = field(default_factory=dict)  # plain values, or lists of them
    norm: Literal["Linf"] = "Linf"
    eps: float = 0.0  # in pixel units of [0, 1] images
    num_images: int
    seed: int  # of the attack and of the choice of images

    def __post_init__(self) -> None:
        check_choice("task", self.task, get_args(Task))
        check_choice("metric", self.metric, get_args(Metric))
        lowest, highest = (-1.0 if self.metric == "cosine" else 0.0) - _ROUNDING, 1.0 + _ROUNDING
        check_number("value", self.value, lowest, highest)
        if self.confidence_interval is not None:
            interval = self.confidence_interval
            if not isinstance(interval, tuple) or len(interval) != 2:
                raise ValueError(f"confidence_interval must be a pair (low, high) or None, got {interval!r:.200}")
            check_number("confidence_interval[0]", interval[0], lowest, highest)
            check_number("confidence_interval[1]", interval[1], interval[0], highest)
        check_choice("tokens", self.tokens, get_args(TokensInPlace))
        check_choice("norm", self.norm, ("Linf",))
        check_number("eps", self.eps, 0.0, 1.0)
        check_int("num_images", self.num_images, 1)
        check_int("seed", self.seed, 0)
        check_parameters("attack_parameters", self.attack_parameters)
        if self.knowledge is not None:
            check_choice("knowledge", self.knowledge, get_args(ReportedKnowledge))
        if self.attack is not None:
            check_text("attack", self.attack, MAX_NAME)
        if (self.knowledge is None) != (self.attack is None):
            raise ValueError(
                "knowledge and attack go together, both None for clean images, got "
                f"{self.knowledge!r} and {self.attack!r}"
            )
        if self.attack is None and (self.eps or self.attack_parameters):
            raise ValueError(
                f"clean images (attack=None) have no eps and no attack_parameters, got {self.eps} and "
                f"{self.attack_parameters!r:.200}"
            )


@dataclass(frozen=True, kw_only=True)
class Check:
    """One of the 12 checks that an evaluation must pass before its numbers can be trusted."""

    number: int
    name: str
    passed: bool | None  # None if the check, or a part of it that `value` names, was not run
    value: str  # the finding
    explanation: str  # the comparison, and its meaning

    def __post_init__(self) -> None:
        check_int("number", self.number, 1, NUM_CHECKS)
        check_text("name", self.name, MAX_NAME)
        if self.passed is not None:
            check_bool("passed", self.passed)
        check_text("value", self.value)
        check_text("explanation", self.explanation)


_LISTS: dict[str, type[Any]] = {"results": Result, "checks": Check}


@dataclass(kw_only=True)
class ReportContent:
    """The data of a [`RobustnessReport`]; separate, since `save` imports the renderers, which import this."""

    schema_version: int = SCHEMA_VERSION  # of the JSON
    package_version: str
    adapter: str  # folder or repo id
    base_model: str  # Hub id or folder
    base_model_revision: str | None = None  # commit
    dataset: dict[str, Any]  # name, split (or None) and num_images
    budget: str  # effort of the attacks: quick, standard, full, or another word
    seed: int
    results: list[Result]
    checks: list[Check]  # each at most once
    series: dict[str, list[float]] = field(default_factory=dict)  # the numbers behind the figures, by name
    # How each set of the attacker's own tokens was trained: its number of tokens and images, and the settings that
    # differ from the recipe; under "recipe" the recipe's values of these settings. Empty if none were trained.
    own_tokens: dict[str, dict[str, Any]] = field(default_factory=dict)
    base_has_own_head: bool = False  # the results without tokens use another head than those with tokens
    seconds: float  # duration of the evaluation
    figures: dict[str, bytes] = field(default_factory=dict, compare=False, repr=False)  # PNG by name; not in the JSON

    def __post_init__(self) -> None:
        _check_schema_version(self.schema_version)
        for name in ("package_version", "adapter", "base_model", "budget"):
            check_text(name, getattr(self, name))
        if self.base_model_revision is not None:
            check_text("base_model_revision", self.base_model_revision, MAX_NAME)
        check_keys("dataset", self.dataset, {"name", "split", "num_images"})
        check_text("dataset.name", self.dataset["name"])
        if self.dataset["split"] is not None:
            check_text("dataset.split", self.dataset["split"], MAX_NAME)
        check_int("dataset.num_images", self.dataset["num_images"], 1)
        check_int("seed", self.seed, 0)
        check_number("seconds", self.seconds, 0.0)
        for name, kind in _LISTS.items():
            value = getattr(self, name)
            if not isinstance(value, list) or not all(isinstance(element, kind) for element in value):
                raise ValueError(f"{name} must be a list of {kind.__name__}, got {value!r:.200}")
        check_dict("own_tokens", self.own_tokens)
        for name, settings in self.own_tokens.items():
            check_text("the name of a set of own tokens", name, MAX_NAME)
            check_parameters(f"own_tokens[{name!r}]", settings)
        check_bool("base_has_own_head", self.base_has_own_head)
        numbers = [check.number for check in self.checks]
        if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
            raise ValueError(f"checks must hold each check once, got more of number {twice}")
        check_dict("series", self.series)
        for name, values in self.series.items():
            check_text("the name of a series", name, MAX_NAME)
            check_numbers(f"series[{name!r}]", values)

    def to_dict(self) -> dict[str, Any]:
        """Returns everything but the figures, as plain values for JSON."""
        return {key: value for key, value in asdict(self).items() if key != "figures"}

    def to_json_string(self) -> str:
        """Returns the text of evaluation.json."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Self:
        """Returns the report from the result of [`to_dict`], or from its JSON.

        Raises:
            OlderReportError: On an older schema.
            ValueError: On a newer schema, a missing or an unknown key, or a bad value, which it names.
        """
        if isinstance(content, Mapping):
            _check_schema_version(content.get("schema_version"))
        check_keys("the report", content, {f.name for f in fields(cls)} - {"figures"})
        return cls(**{**content, **{name: _read(name, kind, content[name]) for name, kind in _LISTS.items()}})


def _read(name: str, kind: type[Any], entries: Any) -> list[Any]:
    check_list(name, entries)
    read = []
    for i, entry in enumerate(entries):
        check_keys(f"{name}[{i}]", entry, {f.name for f in fields(kind)})
        interval = entry.get("confidence_interval")
        if isinstance(interval, list):  # JSON has no tuples
            entry = {**entry, "confidence_interval": tuple(interval)}
        try:
            read.append(kind(**entry))
        except ValueError as exc:
            raise ValueError(f"{name}[{i}]: {exc}") from exc
    return read


def _check_schema_version(version: Any) -> None:
    check_schema("the report", version, SCHEMA_VERSION)
    if version < SCHEMA_VERSION:
        raise OlderReportError(
            f"the report has schema_version {version}, of an older package, this one reads {SCHEMA_VERSION}: evaluate "
            "again with `robtok evaluate`"
        )
