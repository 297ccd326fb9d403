"""Parses command lines and YAML files into the dataclasses of a command."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoConfig, HfArgumentParser

from ..configuration import FeatureView, SimilarityAxis
from ..data import PAIRS_SPLIT, find_pairs, load_adversarial_pairs, load_image_dataset
from ..evaluation import EvaluationArguments
from ..models import AUTO, BASE
from ..report import format_setting
from ..training import PAPER, RobustnessTokenTrainingArguments, resolve_preset
from ..utils import local_path, read_yaml


# How the help groups arguments; one name is in one group, whichever command takes it.
GROUPS = {
    "base and tokens": (
        *("base", "base_model", "base_model_revision", "preset", "num_robustness_tokens", "token_depth"),
        *("gains_and_shifts", "initializer_range"),
        *("feature_view", "similarity_axis", "image_mean", "image_std", "classifier"),
        *("head", "surrogate", "surrogate_head"),
    ),
    "data": (
        *("dataset", "dataset_config", "dataset_name", "split", "streaming", "eval_dataset", "eval_split"),
        *("attacker_dataset", "attacker_split", "image_column_name", "label_column_name", "mask_column_name"),
        *("label_matching", "image_size", "resize", "ignore_index"),
        *("num_images", "num_eval_pairs", "shuffle_buffer_size", "max_broken_images"),
    ),
    "attack": (
        *("attack", "attack_through", "eps", "eps_warmup_ratio", "step_size", "num_attack_steps"),
        *("task", "budget", "knowledge", "attacks", "eps_sweep", "num_steps", "num_restarts", "num_queries"),
        *("num_own_tokens", "own_tokens_steps", "diagnostics"),
    ),
    "optimisation": (
        *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate"),
        *("lr_scheduler_type", "warmup_steps", "max_grad_norm", "seed"),
        *("invariance_weight", "adversarial_weight", "objective"),
        *("sweep_num_tokens", "sweep_learning_rates", "sweep_seeds"),
    ),
    "precision and speed": (
        *("mixed_precision", "attack_precision", "torch_compile", "onednn", "attn_implementation"),
        *("train_attn_implementation", "dataloader_num_workers", "batch_size", "per_device_eval_batch_size"),
    ),
    "saving": (
        *("output_dir", "overwrite_output_dir", "save_steps", "save_total_limit", "resume_from_checkpoint"),
        *("ignore_images_mismatch", "images_per_shard"),
    ),
    "logging": ("logging_steps", "eval_steps", "report_to", "disable_tqdm"),
    "Hub": (
        *("push_to_hub", "public", "base_model_id", "revision", "subfolder", "create_pr", "commit_message", "tag"),
    ),
}


def finish_training_arguments(data_args: DataArguments, training_args: RobustnessTokenTrainingArguments) -> None:
    """Measures an `eval_dataset` at the end unless `eval_steps` is given; `ValueError` for `eval_steps` alone."""
    if training_args.eval_steps is not None and data_args.eval_dataset is None:
        raise ValueError(
            f"eval_steps={training_args.eval_steps} needs an eval_dataset: give one, or leave eval_steps out"
        )
    if training_args.eval_steps is None and data_args.eval_dataset is not None:
        training_args.eval_steps = training_args.max_steps


class CommandParser(HfArgumentParser):
    """The parser of one command: dataclasses in groups, both spellings of a name, presets, fractions such as `8/255`.

    A YAML file of names and plain values may precede the options, which override it. `ValueError` for a bad file or a
    value out of range; `SystemExit` for an unknown word, and after `--help`.
    """

    def __init__(self, groups: Sequence[type] = (), **kwargs: Any) -> None:
        self._groups: dict[str, Any] = {}
        super().__init__(groups, formatter_class=_HelpFormatter, allow_abbrev=False, **kwargs)  # type: ignore[arg-type]
        self.register("type", float, _as_number)

    def add_argument(self, *names: Any, **kwargs: Any) -> Any:
        """Adds an argument to its group, under both spellings of its name."""
        if kwargs.get("type") == str | bool | None:  # a string or a flag; argparse can't call this type
            kwargs["type"] = str
        spellings = dict.fromkeys([*names, *(name.replace("_", "-") for name in names if name.startswith("--"))])
        name = kwargs.get("dest") or names[0].removeprefix("--")
        title = next((title for title, members in GROUPS.items() if name in members and "--" in names[0]), None)
        if title is None:
            return super().add_argument(*spellings, **kwargs)
        if not self._groups:
            self._groups = {title: self.add_argument_group(title) for title in GROUPS}
        return self._groups[title].add_argument(*spellings, **kwargs)

    def parse(self, words: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Returns an instance per dataclass, and the values of the other arguments by name."""
        groups: Any = self.dataclass_types
        positionals = [action.dest.upper() for action in self._actions if not action.option_strings]
        options = [action for action in self._actions if action.option_strings]
        if groups:
            required = [f"{option.option_strings[0]} {option.dest.upper()}" for option in options if option.required]
            self.usage = " ".join(["%(prog)s", *positionals, "[FILE.yaml]", *required, "[options]"])
            self.epilog = "FILE.yaml holds names and values of these options; words after it override them."
            words, place = list(words), len(positionals)
            if len(words) > place and words[place].endswith((".yaml", ".yml")):
                words[place : place + 1] = self._words_of_file(Path(words[place]))
        values = vars(self.parse_args(words))
        if values.get("preset") is not None:
            model_type = None
            if values["preset"] == PAPER:
                revision = values["base_model_revision"]
                model_type = AutoConfig.from_pretrained(values["base_model"], revision=revision).model_type
            self.set_defaults(**resolve_preset(values["preset"], model_type))
            values = vars(self.parse_args(words))  # once more: the user's words override the preset
        if values.get("attn_implementation") is not None and values.get("train_attn_implementation") == AUTO:
            values["train_attn_implementation"] = BASE  # the user's choice
        # A shell leaves the ~ of --output_dir=~/out, and a YAML file has none to expand it.
        values = {name: type(v)(local_path(v)) if isinstance(v, str | Path) else v for name, v in values.items()}
        instances = tuple(group(**{f.name: values.pop(f.name) for f in dataclasses.fields(group)}) for group in groups)
        return instances, values

    def _words_of_file(self, path: Path) -> list[str]:
        try:
            # Each value as it is written: a commit of digits, a folder named 2026.10 or `no` is a text.
            content = read_yaml(path.read_text(encoding="utf-8"), as_written=True)
        except (OSError, ValueError) as exc:
            raise ValueError(f"{path} can't be read as YAML: {exc}") from exc
        if not isinstance(content, dict):
            raise ValueError(f"{path} must hold a mapping of argument names to values, got {type(content).__name__}")
        fields = [field for group in self.dataclass_types for field in dataclasses.fields(group)]
        lists = {field.name for field in fields if "list[" in str(field.type)}
        words: list[str] = []
        for name, value in content.items():
            if isinstance(value, dict) or (isinstance(value, list) and name not in lists):
                raise ValueError(f"{path}: {name} must be a plain value, got a {type(value).__name__}")
            if isinstance(value, list):
                words += [f"--{name}", *map(str, value)]
            elif value is not None:
                words.append(f"--{name}={value}")
        return words


class _HelpFormatter(argparse.HelpFormatter):
    """Shows one spelling of each name, and the default unless the help text states it."""

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if len(action.option_strings) < 2 or "-h" in action.option_strings:
            return super()._format_action_invocation(action)
        shown, action.option_strings = action.option_strings, action.option_strings[:1]
        try:
            return super()._format_action_invocation(action)
        finally:
            action.option_strings = shown

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        if not action.option_strings or action.default == argparse.SUPPRESS:
            return text
        if isinstance(action, argparse._StoreFalseAction):
            return f"The opposite of --{action.dest}."
        if action.required:
            return f"{text} Required."
        if action.default is None or "default" in text:
            return text
        values = action.default if isinstance(action.default, list) else [action.default]
        return f"{text} Default: {' '.join(format_setting('eps', value) for value in values) or 'none'}."


def _as_number(word: str) -> float:
    numerator, slash, denominator = word.partition("/")
    try:
        return float(numerator) / (float(denominator) if slash else 1.0)
    except ZeroDivisionError as exc:
        raise ValueError(f"{word} divides by zero") from exc


def load_eval_dataset(data_args: DataArguments) -> Any:
    """Loads the held-out images; returns None without `eval_dataset`."""
    name = data_args.eval_dataset
    return None if name is None else load_image_dataset(name, split=data_args.eval_split)


@dataclass(kw_only=True)
class ModelArguments:
    """The base and its new tokens."""

    base_model: str = field(metadata={"help": "Hub id or folder of the frozen base."})
    base_model_revision: str | None = field(
        default=None, metadata={"help": "Branch, tag or commit of the base; by default its main branch."}
    )
    preset: str | None = field(
        default=None,
        metadata={
            "help": "Recipe to start from: paper (by the base's family), dinov2, deit3, openclip, or robust; by "
            "default none. Arguments that are given override it."
        },
    )
    head: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a probe head whose predictions objective=distillation or cross_entropy compares; by "
            "default the base's own classification head."
        },
    )
    num_robustness_tokens: int = field(
        default=10, metadata={"help": "Number of tokens to learn, for each layer that gets some (paper: 10)."}
    )
    token_depth: str = field(
        default="1",
        metadata={"help": "Number of first layers that get tokens of their own, or all (paper: 1, the input alone)."},
    )
    gains_and_shifts: list[str] = field(
        default_factory=list,
        metadata={
            "help": "What to learn beside the tokens, as differences to the base: norm (gains and shifts of LayerNorm "
            "and LayerScale), linear (gains of linear layers that have a bias), bias (their shifts), "
            "patch_embedding; none, the default, for nothing (paper)."
        },
    )
    initializer_range: float = field(default=0.01, metadata={"help": "Standard deviation of the new tokens."})
    feature_view: FeatureView | None = field(
        default=None, metadata={"help": "Features to train on; by default what the paper uses for the base's family."}
    )
    similarity_axis: SimilarityAxis = field(
        default="token", metadata={"help": "Axis of the cosine: token (published code) or feature (paper's formula)."}
    )
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean per channel of the normalisation; by default the base's own."}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Standard deviation per channel; by default the base's own."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of the base: eager, sdpa, flash_attention_2, ...; by default transformers'."},
    )

    def from_base_kwargs(self) -> dict[str, Any]:
        """Returns the keyword arguments for `RobustnessTokenModel.from_base(model_args.base_model, ...)`."""
        kwargs = dataclasses.asdict(self)
        del kwargs["base_model"], kwargs["preset"], kwargs["head"]
        kwargs["revision"] = kwargs.pop("base_model_revision")
        if self.gains_and_shifts == ["none"]:
            kwargs["gains_and_shifts"] = []
        kwargs["token_depth"] = int(self.token_depth) if self.token_depth.isdecimal() else self.token_depth
        return {name: value for name, value in kwargs.items() if value is not None}


@dataclass(kw_only=True)
class DataArguments:
    """The images to train on. No labels are needed."""

    dataset: str = field(metadata={"help": "Hub id, folder or parquet file of images, or folder of stored pairs."})
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset on the Hub; by default the dataset's own."}
    )
    split: str = field(default="train", metadata={"help": "Split of the dataset."})
    streaming: bool = field(default=False, metadata={"help": "Stream the dataset instead of downloading it."})
    eval_dataset: str | None = field(
        default=None,
        metadata={
            "help": "Hub id, folder or parquet file of held-out images, measured every eval_steps or once at the end; "
            "by default none."
        },
    )
    eval_split: str = field(
        default="test", metadata={"help": "Split of eval_dataset, or a slice such as validation[:64]."}
    )


def load_train_dataset(data_args: DataArguments) -> Any:
    """Loads the dataset of the command line: adversarial pairs from `robtok attack`, or images."""
    if find_pairs(data_args.dataset) is None:
        return load_image_dataset(
            data_args.dataset, name=data_args.dataset_config, split=data_args.split, streaming=data_args.streaming
        )
    if data_args.streaming or data_args.dataset_config is not None or data_args.split != PAIRS_SPLIT:
        raise ValueError(
            f"dataset {data_args.dataset!r} holds adversarial pairs, which have only the split {PAIRS_SPLIT!r} and "
            "are read from disk on demand: leave streaming, dataset_config and split out"
        )
    return load_adversarial_pairs(data_args.dataset)


@dataclass(kw_only=True)
class EvaluationCommandArguments(EvaluationArguments):
    """The settings of an evaluation, and where its models and images are; `ValueError` if two conflict."""

    dataset: str = field(metadata={"help": "Hub id, folder or parquet file of the images to attack."})
    output_dir: str = field(
        metadata={"help": "Folder for the report and for finished parts, which are not run again."}
    )
    dataset_config: str | None = field(
        default=None, metadata={"help": "Configuration of the dataset on the Hub; by default the dataset's own."}
    )
    split: str = field(default="test", metadata={"help": "Split of the dataset."})
    attacker_dataset: str | None = field(
        default=None,
        metadata={"help": "Images that the attacker trains own tokens on; by default the evaluated ones."},
    )
    attacker_split: str = field(default="train", metadata={"help": "Split of attacker_dataset."})
    head: str | None = field(
        default=None,
        metadata={"help": "Folder of a probe head to evaluate, which decides the task; by default none."},
    )
    surrogate: str | None = field(
        default=None,
        metadata={"help": "Adapter on another base for transfer attacks; its tokens are not used. By default none."},
    )
    surrogate_head: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the surrogate's head, required if surrogate and head are given; by default none."
        },
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the base; by default the one in the adapter's config."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of the base: eager, sdpa, flash_attention_2, ...; by default transformers'."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head is None and self.task == "segmentation":
            raise ValueError('task="segmentation" needs head, the folder of a probe head')
        if (self.surrogate_head is not None) != (self.surrogate is not None and self.head is not None):
            raise ValueError(
                "give surrogate_head exactly if both surrogate and head are given, got "
                f"surrogate={self.surrogate!r}, head={self.head!r}, surrogate_head={self.surrogate_head!r}"
            )


TRAINING_GROUPS: tuple[type, ...] = (ModelArguments, DataArguments, RobustnessTokenTrainingArguments)
