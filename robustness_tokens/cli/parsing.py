"""From a command line, or a YAML file, to the dataclasses that say what a command is told."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from transformers import AutoConfig, HfArgumentParser

from ..configuration import FeatureView, SimilarityAxis
from ..data import PAIRS_SPLIT, find_pairs, load_adversarial_pairs, load_image_dataset
from ..models import AUTO, BASE
from ..training import PAPER, RobustnessTokenTrainingArguments, resolve_preset


def parse_arguments(
    argv: Sequence[str] | None = None, *, prog: str | None = None
) -> tuple[ModelArguments, DataArguments, RobustnessTokenTrainingArguments]:
    """Reads a command line: `--name value` pairs, and first, if wanted, a YAML file with the same names.

    Args:
        argv: Words of the command line without the program's name; `sys.argv[1:]` if None.
        prog: Name of the program in the help.

    Returns:
        The three groups of arguments. Numbers may be fractions such as `8/255`; later words win over the file. With
        an `eval_dataset` and no `eval_steps` these are `max_steps`: it is measured once, at the end.

    Raises:
        ValueError: If a value is out of range, or the file can't be read or is no mapping of names to plain values,
            or there are `eval_steps` without an `eval_dataset`.
        SystemExit: On a word that is not understood, and after `--help`.
    """
    groups = (ModelArguments, DataArguments, RobustnessTokenTrainingArguments)
    model_args, data_args, training_args = parse_groups(argv, groups, prog=prog)
    if training_args.eval_steps is not None and data_args.eval_dataset is None:
        raise ValueError(
            f"eval_steps={training_args.eval_steps} needs an eval_dataset: give one, or leave eval_steps out"
        )
    if training_args.eval_steps is None and data_args.eval_dataset is not None:
        training_args.eval_steps = training_args.max_steps
    return model_args, data_args, training_args


def parse_groups(argv: Sequence[str] | None, groups: Sequence[type], *, prog: str | None = None) -> tuple[Any, ...]:
    """Reads a command line as [`parse_arguments`] does, for a command with arguments of its own.

    Args:
        argv: As there.
        groups: Dataclasses, whose fields are the arguments; only `ModelArguments` has presets.
        prog: As there.

    Returns:
        An instance per group.

    Raises:
        ValueError, SystemExit: As there.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    if words and words[0].endswith((".yaml", ".yml")):
        lists = {field.name for group in groups for field in dataclasses.fields(group) if "list[" in str(field.type)}
        words = [*_words_of_file(Path(words[0]), lists), *words[1:]]
    parser = _ArgumentParser(groups, prog=prog, allow_abbrev=False)  # type: ignore[arg-type]
    parser.register("type", float, _as_number)
    values = vars(parser.parse_args(words))
    if values.get("preset") is not None:
        model_type = None
        if values["preset"] == PAPER:
            revision = values["base_model_revision"]
            model_type = AutoConfig.from_pretrained(values["base_model"], revision=revision).model_type
        parser.set_defaults(**resolve_preset(values["preset"], model_type))
        values = vars(parser.parse_args(words))  # once more: what the user says wins over the preset
    if values["attn_implementation"] is not None and values.get("train_attn_implementation") == AUTO:
        values["train_attn_implementation"] = BASE  # which is then what the user asked for
    return tuple(group(**{f.name: values[f.name] for f in dataclasses.fields(group)}) for group in groups)


class _ArgumentParser(HfArgumentParser):
    def add_argument(self, *names: Any, **kwargs: Any) -> Any:
        """Reads as a word what may be a word or a flag, a type that argparse can't call."""
        if kwargs.get("type") == str | bool | None:
            kwargs["type"] = str
        return super().add_argument(*names, **kwargs)


def _words_of_file(path: Path, lists: Collection[str]) -> list[str]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as exc:
        raise ValueError(f"{path} can't be read as YAML: {exc}") from exc
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a mapping of argument names to values, got {type(content).__name__}")
    for name, value in content.items():
        if isinstance(value, dict) or (isinstance(value, list) and name not in lists):
            raise ValueError(f"{path}: {name} must be a plain value, got a {type(value).__name__}")
    words: list[str] = []
    for name, value in content.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None:
            words.append(f"--{name}={value}")
    return words


def _as_number(word: str) -> float:
    numerator, slash, denominator = word.partition("/")
    try:
        return float(numerator) / (float(denominator) if slash else 1.0)
    except ZeroDivisionError as exc:
        raise ValueError(f"{word} divides by zero") from exc


def load_eval_dataset(data_args: DataArguments) -> Any:
    """The held-out images that the command line names, if it does.

    Raises:
        ValueError: If they can't be loaded.
    """
    if data_args.eval_dataset is None:
        return None
    return load_image_dataset(data_args.eval_dataset, split=data_args.eval_split)


@dataclass(kw_only=True)
class ModelArguments:
    """The base and its new tokens."""

    base_model: str = field(metadata={"help": "Hub id or folder of the frozen base."})
    base_model_revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit of the base."})
    preset: str | None = field(
        default=None,
        metadata={"help": "Start from a recipe: paper (by family), dinov2, deit3, openclip; or adaptive."},
    )
    num_robustness_tokens: int = field(default=10, metadata={"help": "How many tokens to learn (paper: 10)."})
    initializer_range: float = field(default=0.01, metadata={"help": "Standard deviation of the new tokens."})
    feature_view: FeatureView | None = field(
        default=None, metadata={"help": "What the features are; by default what the paper takes for the family."}
    )
    similarity_axis: SimilarityAxis = field(
        default="token", metadata={"help": "Axis of the cosine: token (published code) or feature (paper's formula)."}
    )
    image_mean: list[float] | None = field(default=None, metadata={"help": "Normalisation; the base's own if None."})
    image_std: list[float] | None = field(default=None, metadata={"help": "Normalisation; the base's own if None."})
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})

    def from_base_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for `RobustnessTokenModel.from_base(model_args.base_model, ...)`."""
        kwargs = dataclasses.asdict(self)
        del kwargs["base_model"], kwargs["preset"]
        kwargs["revision"] = kwargs.pop("base_model_revision")
        return {name: value for name, value in kwargs.items() if value is not None}


@dataclass(kw_only=True)
class DataArguments:
    """The images to train on. No labels are needed."""

    dataset: str = field(metadata={"help": "Hub id, folder of images, or parquet file."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    streaming: bool = field(default=False, metadata={"help": "Stream the dataset instead of downloading it."})
    eval_dataset: str | None = field(
        default=None,
        metadata={"help": "Held-out images, measured every eval_steps or once at the end: Hub id, folder, parquet."},
    )
    eval_split: str = field(default="test", metadata={"help": "Its split, or a slice such as validation[:64]."})


def load_train_dataset(data_args: DataArguments) -> Any:
    """What the command line names: adversarial pairs, where `robtok attack` made it, or else a dataset of images.

    Raises:
        ValueError: If it can't be loaded, or an argument has no meaning for pairs.
    """
    if find_pairs(data_args.dataset) is None:
        return load_image_dataset(
            data_args.dataset, name=data_args.dataset_config, split=data_args.split, streaming=data_args.streaming
        )
    if data_args.streaming or data_args.dataset_config is not None or data_args.split != PAIRS_SPLIT:
        raise ValueError(
            f"dataset {data_args.dataset!r} holds adversarial pairs, which are one split, {PAIRS_SPLIT!r}, read from "
            "the disk as they are needed: leave streaming, dataset_config and split out"
        )
    return load_adversarial_pairs(data_args.dataset)
