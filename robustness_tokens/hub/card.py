"""Renders an adapter's card from card.md.j2 and merges it into a card that a person has edited."""

from __future__ import annotations

import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ..configuration import RobustnessTokenConfig
from ..report import (
    ATTACKERS,
    METRICS,
    Result,
    RobustnessReport,
    code,
    format_eps,
    group_results,
    headline,
    plain,
    prose,
    results_table,
)
from ..utils import add_scalars, read_bytes, read_yaml
from .adapter_folder import CARD_FILE, is_repo_id


BEGIN = "<!-- robustness_tokens:begin -->"
END = "<!-- robustness_tokens:end -->"
PLACEHOLDER = "PATH_OR_HUB_ID"
# Marks our metrics, to tell them from those that a person adds to the same card.
EVALUATED_WITH, PACKAGE = "evaluated_with", "robustness_tokens"
LIBRARY = "robustness-tokens"  # the Hub's ids of libraries have hyphens
_MAX_CARD_BYTES = 1 << 22

_TASK_TYPES = {
    "features": "image-feature-extraction",
    "classification": "image-classification",
    "segmentation": "image-segmentation",
}
_METRIC_TYPES = {
    "cosine": "cosine_similarity",
    "accuracy": "accuracy",
    "miou": "mean_iou",
    "mean_image_miou": "mean_image_iou",
}

# The settings of a recipe that `robtok train` takes.
RECIPE_ARGUMENTS = (
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "max_grad_norm", "invariance_weight", "adversarial_weight", "attack", "attack_through", "eps"),
    *("step_size", "num_attack_steps", "eps_warmup_ratio", "objective", "image_size", "resize", "shuffle_buffer_size"),
    *("seed", "mixed_precision"),
)

# By the adapter's class: the Auto class, the task of `pipeline`, and a call.
_USES = {
    "RobustnessTokenModel": {
        "auto_class": "AutoModel",
        "pipeline_tag": "image-feature-extraction",
        "call": "features = model.get_features(pixel_values)",
    },
    "RobustnessTokenForImageClassification": {
        "auto_class": "AutoModelForImageClassification",
        "pipeline_tag": "image-classification",
        "call": "logits = model(pixel_values=pixel_values).logits",
    },
}
# By the `attack_through` of the recipe: what the attackers know.
_ATTACKERS = {"base": ("base",), "tokens": ("full",), "both": ("base", "full")}
# These describe an adapter; no other key of a person's metadata is replaced.
_OWN_KEYS = ("base_model", "base_model_relation", "library_name", "pipeline_tag", "datasets")
_MARKER_LINE = re.compile(r"^<!-- robustness_tokens:(begin|end) -->[ \t]*\r?$", re.MULTILINE)
_MAX_RECORDED = 1000


# A JSON string is a Python literal too.
_quote = partial(json.dumps, ensure_ascii=False)


class _Dumper(yaml.SafeDumper):
    """Writes lists of plain values, and metrics with their arguments, on one line to keep a card short."""

    def represent_mapping(self, tag: str, mapping: Any, flow_style: bool | None = None) -> yaml.MappingNode:
        if not self.represented_objects:  # the outermost
            flow_style = False
        elif "args" in mapping:
            flow_style = True
        return super().represent_mapping(tag, mapping, flow_style)


add_scalars(_Dumper)


def _dump(values: Mapping[str, Any]) -> str:
    dumped: str = yaml.dump(
        values, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=10**6
    )
    return dumped


def _as_text(value: object) -> object:
    """Escapes every `{{ }}` without a filter: texts of a config or a report are never markup."""
    return value if isinstance(value, Markup) else prose(value)


_ENVIRONMENT = Environment(
    loader=FileSystemLoader(Path(__file__).parent),
    undefined=StrictUndefined,
    finalize=_as_text,
    trim_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters["code"] = lambda text: Markup(code(text))
_ENVIRONMENT.globals |= {"begin": BEGIN, "end": END, "placeholder": PLACEHOLDER}


def render_card(
    config: RobustnessTokenConfig,
    *,
    name: str,
    subfolder: str = "",
    license: str | None = None,
    datasets: Sequence[str] | None = None,
    images: str | None = None,
    report: RobustnessReport | None = None,
    tags: Sequence[str] = (),
    is_public: bool = False,
) -> str:
    """Renders the README.md of an adapter: metadata for the Hub, and the rest between our markers.

    `name` is the folder or repo id to load, `license` the base's license. `datasets` are Hub ids of the training data,
    by default the recipe's. `images` stands in the commands where recipe or report name no dataset on the Hub.
    `is_public` says that everyone can read the tokens there.
    """
    training = config.training or {}
    entry = training.get("dataset")
    trained_on = _hub_dataset(entry.get("name")) if isinstance(entry, dict) else None
    datasets = [trained_on] if datasets is None and trained_on else datasets
    model_class = next((name for name in config.architectures or () if name in _USES), "RobustnessTokenModel")
    arguments = _quote(name) + (f", subfolder={_quote(subfolder)}" if subfolder else "")
    eval_results = [] if report is None else to_eval_results(report)
    has_repo_id = is_repo_id(config.base_model_name_or_path)
    data = ModelCardData(
        base_model=config.base_model_name_or_path if has_repo_id else None,
        base_model_relation="adapter" if has_repo_id else None,
        datasets=list(datasets) if datasets else None,
        library_name=LIBRARY,
        license=license,
        pipeline_tag=_USES[model_class]["pipeline_tag"],
        tags=[LIBRARY, "adversarial-robustness", *tags],
        model_name=name if eval_results else None,
        eval_results=eval_results or None,
    )
    recipe = _recipe(config, training, trained_on, images) if "max_steps" in training else {}
    told = RECIPE_ARGUMENTS if recipe else ()
    recorded = {key: value for key, value in training.items() if key not in told and value is not None}
    body = _ENVIRONMENT.get_template("card.md.j2").render(
        config=config,
        base=config.base_model_name_or_path or config.base_model_class,
        model_class=model_class,
        arguments=arguments,
        **_USES[model_class],
        inject=f"inject_tokens(model, {arguments})",
        headline=None if report is None else headline(report),
        report=report,
        table=None if report is None or not (leading := main_results(report)) else results_table(leading),
        own_tokens_steps=None if report is None else _own_tokens_steps(report),
        evaluate_command=None if report is None else _evaluate_command(report, name, subfolder, images),
        training=training,
        is_public=is_public or str(training.get("secrecy")).startswith("none"),
        trained_against=(trained_against := _ATTACKERS.get(str(training.get("attack_through")), ())),
        attackers=[ATTACKERS[level] for level in trained_against],
        attack=_attack_in_words(config, training),
        recipe=_dump(recipe).rstrip() if recipe else None,
        recorded=_quote(recorded, sort_keys=True)[:_MAX_RECORDED] if recorded else None,
    )
    return f"---\n{_dump(_all_plain(data.to_dict())).rstrip()}\n---\n\n{body}"


def _all_plain(values: Any) -> Any:
    """Makes every text in nested values plain; people don't see what is hidden in a card's metadata."""
    if isinstance(values, dict):
        return {key: _all_plain(value) for key, value in values.items()}
    if isinstance(values, list):
        return [_all_plain(value) for value in values]
    return plain(values) if isinstance(values, str) else values


def _hub_dataset(name: object) -> str | None:
    """Returns a dataset's name if it is a Hub id; None if it has no namespace, since it may be a folder's name."""
    return name if isinstance(name, str) and "/" in name and is_repo_id(name) else None


def _recipe(
    config: RobustnessTokenConfig, training: Mapping[str, Any], trained_on: str | None, images: str | None
) -> dict[str, Any]:
    """Returns the arguments of `robtok train` that train such tokens."""
    entry = training["dataset"] if trained_on is not None else {}
    settings = {
        "base_model": config.base_model_name_or_path or "BASE_MODEL",
        "base_model_revision": config.base_model_revision,
        "dataset": trained_on or images or PLACEHOLDER,
        "dataset_config": entry.get("config"),
        "split": entry.get("split"),
        "num_robustness_tokens": config.num_robustness_tokens,
        "token_depth": config.token_depth if config.token_depth > 1 else None,
        "initializer_range": config.initializer_range,
        "feature_view": config.feature_view,
        "similarity_axis": config.similarity_axis,
        **{key: training.get(key) for key in RECIPE_ARGUMENTS},
    }
    if training.get("head_of_base") is False:
        settings["head"] = "HEAD"  # the folder of a probe head, which the adapter does not hold
    if settings["eps_warmup_ratio"] == 0:
        settings["eps_warmup_ratio"] = None  # the default
    if settings["resize"] == "processor":
        settings["image_size"] = None  # the processor decides it
    lists = {
        "gains_and_shifts": config.gains_and_shifts,
        "image_mean": config.image_mean,
        "image_std": config.image_std,
    }
    return {
        **{key: _setting(value) for key, value in settings.items() if isinstance(value, str | int | float)},
        **{key: value for key, value in lists.items() if value},
    }


def _setting(value: str | int | float) -> str | int | float:
    """Returns a text on one line, a multiple of 1/255 as a fraction, and other numbers unchanged."""
    if isinstance(value, float) and 0 < value < 1 and value == round(255 * value) / 255:
        return f"{round(255 * value)}/255"
    return plain(value) if isinstance(value, str) else value


def _own_tokens_steps(report: RobustnessReport) -> tuple[int, int] | None:
    """Returns the fewest optimiser steps of the attacker's own tokens, and the recipe's, if these are more."""
    recipe = report.own_tokens.get("recipe", {}).get("max_steps")
    if type(recipe) is not int:
        return None
    fewest = min(kind["max_steps"] for kind in report.own_tokens.values() if type(kind.get("max_steps")) is int)
    return (fewest, recipe) if fewest < recipe else None


def _evaluate_command(report: RobustnessReport, name: str, subfolder: str, images: str | None) -> str:
    """Returns the `robtok evaluate` command of a report, with placeholders for values that it does not hold."""
    tasks = {result.task for result in report.results}
    options = {
        "dataset": _hub_dataset(report.dataset["name"]) or images or PLACEHOLDER,
        "split": report.dataset["split"],
        "task": "classification" if "classification" in tasks else None,
        "head": "HEAD" if "segmentation" in tasks else None,
        "budget": report.budget,
        "seed": report.seed,
        "output_dir": "outputs/evaluation",
    }
    words = [f"--{key}={_word(value)}" for key, value in options.items() if value is not None]
    if not subfolder:
        return " ".join(["robtok evaluate", _word(name), *words])
    download = f"hf download {_word(name)} --include {_word(f'{subfolder}/*')} --local-dir adapter"
    return " ".join([download, "&& robtok evaluate", _word(f"adapter/{subfolder}"), *words])


def _word(value: object) -> str:
    return shlex.quote(plain(value))


def _attack_in_words(config: RobustnessTokenConfig, training: Mapping[str, Any]) -> str:
    eps, num_steps = training.get("eps"), training.get("num_attack_steps")
    if not isinstance(num_steps, int):
        return ""
    if training.get("attack") == "pgd" and isinstance(eps, float):
        return f", by PGD in {num_steps} steps, L-inf, at eps {format_eps(eps)} in pixels"
    if training.get("attack") == "paper":
        in_pixels = "" if config.image_std is None else f", about {8 * fmean(config.image_std):.1f}/255 in pixels"
        return f", by the published attack in {num_steps} steps: its eps is 8/255 of normalised images{in_pixels}"
    return ""


def main_results(report: RobustnessReport) -> list[Result]:
    """Returns the leading results of a report's main metric, the first that was measured."""
    groups = list(group_results(report.results).values())
    return groups[0].leading if groups else []


def to_eval_results(report: RobustnessReport) -> list[EvalResult]:
    """Returns the adapter's main metric on clean images, in the grey box and in the white box, for the model-index."""
    results = [result for result in main_results(report) if result.tokens == "trained"]
    has_worst_case = any(result.knowledge == "full_worst_case" for result in results)
    found = []
    for knowledge in (None, "base", "full_worst_case" if has_worst_case else "full"):
        of_attacker = [result for result in results if result.knowledge == knowledge]
        at_first_eps = [result for result in of_attacker if result.eps == of_attacker[0].eps]
        if at_first_eps:
            found.append(_to_eval_result(report, min(at_first_eps, key=lambda result: result.value)))
    return found


def _to_eval_result(report: RobustnessReport, result: Result) -> EvalResult:
    name, split = plain(report.dataset["name"]), report.dataset["split"]
    attack = None if result.attack is None else plain(result.attack)
    against = f"under attack {attack} (L-inf, eps {format_eps(result.eps)} in pixels), the attacker knows "
    against = "on clean images" if attack is None else against + ATTACKERS[result.knowledge].knows
    arguments = {
        EVALUATED_WITH: f"{PACKAGE} {plain(report.package_version)}",
        "knowledge": result.knowledge,
        "norm": result.norm,
        "eps_in_pixels": result.eps,
        "attack": attack,
        "num_images": result.num_images,
        "seed": result.seed,
        "confidence_interval_95": result.confidence_interval and list(result.confidence_interval),
    }
    return EvalResult(
        task_type=_TASK_TYPES[result.task],
        dataset_type=name,
        dataset_name=name,
        dataset_split=None if split is None else plain(split),
        metric_type=_METRIC_TYPES[result.metric],
        metric_value=result.value,
        metric_name=plain(f"{METRICS[result.metric]} {against}"),
        # The Hub's client drops None.
        metric_args={key: value for key, value in arguments.items() if value is not None},
    )


def read_card(folder: Path, *, errors: str = "strict") -> str | None:
    """Reads a README with its own line breaks; None if there is none. `ValueError` for a link out of the folder."""
    path = folder / CARD_FILE
    if not os.path.lexists(path):
        return None
    try:
        return read_bytes(path, max_bytes=_MAX_CARD_BYTES).decode("utf-8", errors)
    except UnicodeDecodeError as exc:
        raise ValueError(f"{path} must be in UTF-8, as every card on the Hub: save it in UTF-8 ({exc})") from exc


def is_generated(card: str) -> bool:
    """Tells whether a card holds a part that this package wrote."""
    return _find_block(card) is not None


def update_card(existing: str | None, new: str) -> str:
    """Replaces our part of a card, or appends it; what a person wrote stays byte for byte.

    In the metadata, the keys that describe an adapter are replaced, tags and evaluation results are merged, and all
    other keys stay. A second call changes nothing. `ValueError` if the metadata are not a YAML mapping.
    """
    if existing is None or not existing.strip():
        return new
    newline = "\r\n" if "\r\n" in existing else "\n"
    new_metadata, new_body = _split(new)
    old_metadata, body = _split(existing.removeprefix("\ufeff"))
    begin, end = _find_block(new_body) or (0, len(new_body))
    block = new_body[begin:end].replace("\n", newline)
    if (span := _find_block(body)) is not None:
        body = body[: span[0]] + block + body[span[1] :]
    else:
        while not body.endswith(2 * newline):
            body += newline
        body += block + newline
    metadata = _merge_metadata(old_metadata or "", read_yaml(new_metadata or "")).replace("\r\n", "\n")
    gap = newline if old_metadata is None else ""
    return "".join(line + newline for line in ("---", *metadata.split("\n"), "---")) + gap + body


def _find_block(text: str) -> tuple[int, int] | None:
    """Returns the span from a begin mark to the first end mark after it, with no other mark between."""
    begin = None
    for marker in _MARKER_LINE.finditer(text):
        if marker[1] == "begin":
            begin = marker.start()
        elif begin is not None:
            return begin, marker.end() - marker[0].endswith("\r")
    return None


def _split(card: str) -> tuple[str | None, str]:
    """Returns the YAML of a card, or None, and the rest."""
    match = REGEX_YAML_BLOCK.search(card)
    return (None, card) if match is None else (match[2], card[match.end() :])


def _merge_metadata(old_yaml: str, new: dict[str, Any]) -> str:
    """Returns the YAML with our keys in it; the lines of other keys, and comments, stay unchanged."""
    try:
        old = read_yaml(old_yaml)
    except ValueError as exc:
        raise ValueError(f"the metadata of the existing README are not valid YAML, correct them first: {exc}") from exc
    old = {} if old is None else old
    if not isinstance(old, dict):
        raise ValueError(
            "the metadata of the existing README (between the --- at its top) must be a YAML mapping, got "
            f"{type(old).__name__}: correct them first"
        )
    merged = {**old, **{key: value for key, value in new.items() if key in _OWN_KEYS or key not in old}}
    tags = _as_list(old.get("tags"))
    merged["tags"] = tags + [tag for tag in new["tags"] if tag not in tags]
    merged["model-index"] = [*(_without_ours(_as_list(old.get("model-index"))) or []), *new.get("model-index", [])]
    if not merged["model-index"]:
        del merged["model-index"]
    if merged == old:
        return old_yaml
    text, is_right = f"{old_yaml.rstrip()}\n" if old_yaml.strip() else "", True
    for key in {**old, **merged}:
        if key in old and key in merged and old[key] == merged[key]:
            continue
        lines = _dump({key: merged[key]}) if key in merged else ""
        if key not in old:
            text += lines
            continue
        # A key's lines reach to the last one that is indented or a list item.
        of_key = rf"^{re.escape(str(key))}:.*\n(?:(?:(?:#.*)?\n)*[ \t-].*\n)*"
        head, *tail = re.split(of_key, text, maxsplit=1, flags=re.MULTILINE)
        text, is_right = head + lines + "".join(tail), is_right and bool(tail)
    try:
        is_right = is_right and read_yaml(text) == merged
    except ValueError:
        is_right = False
    # Single keys can't be replaced in `{a: 1}` or among anchors: then everything is rewritten.
    return (text if is_right else _dump(merged)).rstrip("\n")


def _without_ours(part: Any) -> Any:
    """Removes our metrics from a part of a model-index, and parts that held only those; None if nothing is left."""
    if isinstance(part, list):
        kept = [element for element in map(_without_ours, part) if element is not None]
        return kept if kept or not part else None
    if not isinstance(part, dict):
        return part
    arguments = part.get("args")
    if isinstance(arguments, dict) and str(arguments.get(EVALUATED_WITH)).startswith(PACKAGE):
        return None
    lists = {key: _without_ours(value) for key, value in part.items() if isinstance(value, list)}
    return None if None in lists.values() else {**part, **lists}


def _as_list(value: object) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
