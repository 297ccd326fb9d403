"""The data of a report, checked strictly, since a report may come from the Hub."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, Self, get_args

import numpy as np
import torch
from torch import Tensor

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
    check_pattern,
    check_schema,
    check_text,
)


SCHEMA_VERSION = 4
_OLDEST_VERSION = 2
_ADDED = {"images", "correct_bits", "adapter_digest"}  # keys that older versions may not have

Task = Literal["features", "classification", "segmentation"]
Metric = Literal["cosine", "accuracy", "miou", "mean_image_miou"]
TokensInPlace = Literal["none", "trained", "untrained", "random", "zero", "mean"]
Knowledge = Literal["none", "base", "own_tokens", "full"]
ReportedKnowledge = Literal[Knowledge, "full_worst_case"]
"""`"full_worst_case"` is the worst case over the attacks of all levels."""

NUM_CHECKS = 12
_SHARE_ROUNDING = 1e-9  # an accuracy equals the share of correct images, except for this
_ROUNDING = 1e-3  # a cosine in half precision, or an interval, may leave its range by this


class OlderReportError(ValueError):
    """The report was written by a package that is too old; the adapter beside it is not affected."""


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
    num_images: int  # the first ones of the report's `images`
    seed: int  # of the attack and of the choice of images
    # Of an accuracy: which images were correct, as `pack_correct` returns it. Other metrics have no bit for an image.
    correct_bits: str | None = None

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
        if self.correct_bits is not None and self.metric != "accuracy":
            raise ValueError(f"correct_bits belong to the metric accuracy, got {self.metric}: leave them out")
        if (correct := self.correct) is not None:
            found = int(correct.sum())
            if abs(found / self.num_images - self.value) > _SHARE_ROUNDING:
                raise ValueError(
                    f"correct_bits tell that {found:,} of {self.num_images:,} images are correct, expected the share "
                    f"{self.value}: the report is damaged, load it again or evaluate again"
                )

    @property
    def correct(self) -> Tensor | None:
        """Tells for each image whether it was correct, (num_images,) bool; `None` if the report doesn't tell.

        If an attack ran only on images that earlier ones had left correct, this counts all of them, as the value does.
        """
        return None if self.correct_bits is None else _unpack_correct(self.correct_bits, self.num_images)


def pack_correct(correct: Tensor) -> str:
    """Returns (n,) bool, on the CPU, as base64 of a bit for each image, from the highest bit of the first byte on."""
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()


def _unpack_correct(bits: str, num_images: int) -> Tensor:
    """Returns the (num_images,) bool of which `pack_correct` made the text; `ValueError` if it made another one."""
    num_bytes = -(-num_images // 8)
    try:
        if len(bits) == 4 * -(-num_bytes // 3):  # before anything of that size is made
            packed = np.frombuffer(base64.b64decode(bits, validate=True), dtype=np.uint8)
            correct = torch.from_numpy(np.unpackbits(packed, count=num_images).astype(bool))
            if pack_correct(correct) == bits:
                return correct
    except (ValueError, TypeError):
        pass  # no base64, or no text
    raise ValueError(
        f"correct_bits must be base64 of {num_bytes:,} bytes, a bit for each of {num_images:,} images and zeros after "
        f"them, got {bits!r:.200}: the report is damaged, load it again or evaluate again"
    )


@dataclass(frozen=True, kw_only=True)
class MeasuredImages:
    """The images of an evaluation in their order; reports with equal ones can be compared image by image."""

    rows: list[int]  # in the dataset, each once
    sha256: str  # over the pixels and labels, after resizing

    def __post_init__(self) -> None:
        check_list("rows", self.rows)
        for i, row in enumerate(self.rows):
            check_int(f"rows[{i}]", row, 0)
        if len(set(self.rows)) < len(self.rows):
            twice = next(row for row, count in Counter(self.rows).items() if count > 1)
            raise ValueError(f"rows must hold each row once, got {twice} more than once")
        check_pattern("sha256", self.sha256, "[0-9a-f]{64}", "64 hexadecimal digits")


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
    adapter_digest: str | None = None  # sha256 of what was measured; None in a report of schema 2 or 3
    base_model: str  # Hub id or folder
    base_model_revision: str | None = None  # commit
    dataset: dict[str, Any]  # name, split (or None) and num_images
    images: MeasuredImages | None = None  # None in a report of schema 2
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
        if self.adapter_digest is not None:
            check_pattern("adapter_digest", self.adapter_digest, "[0-9a-f]{64}", "64 hexadecimal digits")
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
        self._check_images()
        numbers = [check.number for check in self.checks]
        if twice := sorted({number for number in numbers if numbers.count(number) > 1}):
            raise ValueError(f"checks must hold each check once, got more of number {twice}")
        check_dict("series", self.series)
        for name, values in self.series.items():
            check_text("the name of a series", name, MAX_NAME)
            check_numbers(f"series[{name!r}]", values)

    def _check_images(self) -> None:
        if self.images is None:
            return
        if not isinstance(self.images, MeasuredImages):
            raise ValueError(f"images must be MeasuredImages or None, got {self.images!r:.200}")
        count = self.dataset["num_images"]
        if len(self.images.rows) != count:
            raise ValueError(
                f"images must have a row for each of the dataset's {count:,} images, got {len(self.images.rows):,}"
            )
        for i, result in enumerate(self.results):
            if result.num_images > count:
                raise ValueError(
                    f"results[{i}] is on {result.num_images:,} images, expected at most the dataset's {count:,}"
                )

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
            OlderReportError: On a schema that is too old.
            ValueError: On a newer schema, a missing or an unknown key, or a bad value, which it names.
        """
        if isinstance(content, Mapping):
            _check_schema_version(content.get("schema_version"))
        _check_keys("the report", content, cls)
        lists = {name: _read(name, kind, content[name]) for name, kind in _LISTS.items()}
        images = _read_images(content.get("images"))
        return cls(**{**content, **lists, "schema_version": SCHEMA_VERSION, "images": images})


def _check_keys(name: str, content: Any, kind: type[Any]) -> None:
    names = {f.name for f in fields(kind)} - {"figures"}
    check_keys(name, content, names - _ADDED, optional=names & _ADDED)


def _read(name: str, kind: type[Any], entries: Any) -> list[Any]:
    check_list(name, entries)
    read = []
    for i, entry in enumerate(entries):
        _check_keys(f"{name}[{i}]", entry, kind)
        interval = entry.get("confidence_interval")
        if isinstance(interval, list):  # JSON has no tuples
            entry = {**entry, "confidence_interval": tuple(interval)}
        try:
            read.append(kind(**entry))
        except ValueError as exc:
            raise ValueError(f"{name}[{i}]: {exc}") from exc
    return read


def _read_images(content: Any) -> MeasuredImages | None:
    if content is None:
        return None
    _check_keys("images", content, MeasuredImages)
    try:
        return MeasuredImages(**content)
    except ValueError as exc:
        raise ValueError(f"images: {exc}") from exc


def _check_schema_version(version: Any) -> None:
    check_schema("the report", version, SCHEMA_VERSION)
    if version < _OLDEST_VERSION:
        raise OlderReportError(
            f"the report has schema_version {version}, of an older package, this one reads {_OLDEST_VERSION} to "
            f"{SCHEMA_VERSION}: evaluate again with `robtok evaluate`"
        )
