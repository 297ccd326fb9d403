"""The card of an adapter: what it is, how to load it, what was measured, what it does not promise."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from huggingface_hub import ModelCardData

from ..configuration import RobustnessTokenConfig
from ..report import RobustnessReport, code, format_eps, format_setting, headline, plain, render_report_markdown, table
from .adapter_folder import is_repo_id
from .card_update import BEGIN, END
from .eval_results import to_eval_results


UNKNOWN_DATASET = "PATH_OR_HUB_ID"

# What of a recipe `robtok train` is told.
RECIPE_ARGUMENTS = (
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate", "lr_scheduler_type"),
    *("warmup_steps", "max_grad_norm", "invariance_weight", "adversarial_weight", "attack", "attack_through", "eps"),
    *("step_size", "num_attack_steps", "head_distance_weight", "image_size", "resize", "shuffle_buffer_size"),
    *("seed", "mixed_precision"),
)

# By the adapter's class: the Auto class, the task of `pipeline`, and what to do with an image.
_USES = {
    "RobustnessTokenModel": (
        "AutoModel",
        "image-feature-extraction",
        "features = model.get_features(pixel_values)",
    ),
    "RobustnessTokenForImageClassification": (
        "AutoModelForImageClassification",
        "image-classification",
        "logits = model(pixel_values=pixel_values).logits",
    ),
}
# By the `attack_through` of the recipe.
_ATTACKERS = {
    "base": "They were trained against an attacker who knows the backbone but not the tokens (grey box)",
    "tokens": "They were trained against an attacker who knows the backbone and the tokens (white box)",
    "both": "They were trained against attackers who know the backbone, with and without the tokens",
}

_MAX_SETTING = 1000

_BODY = """\
{begin}
<!-- robustness_tokens writes anew what stands from here to its end mark; text outside stays as it is. -->

# Robustness tokens for {base}

{count} learned input tokens (width {width}) that make the frozen backbone {base} more robust to adversarial images.
The backbone's weights are not changed, and not in this repository: they are loaded from where they are.
{headline}
## Use

`pip install robustness-tokens`, then:

```python
from robustness_tokens import {model_class}
from PIL import Image

model = {model_class}.from_pretrained({arguments})
image = Image.new("RGB", (224, 224))  # yours: Image.open("picture.jpg")
pixel_values = model.image_processor(image, return_tensors="pt")["pixel_values"]
{call}
```

With the package imported, `{auto_class}` and `pipeline("{pipeline_tag}", ...)` work on this folder or repository
too. A model that has a head of its own on this backbone keeps it: {inject}.

{evaluation}
## Threat model

{threat}

## Limits

{limits}

## Base

{base_table}

Another base is refused on loading.

## Training

{training}

## How to reproduce

{reproduction}

The method is that of [Robustness Tokens](https://arxiv.org/abs/2503.10191) (ECCV 2024).

{end}
"""


def train_command(config: RobustnessTokenConfig, training: Mapping[str, Any], trained_on: str | None) -> str:
    """The `robtok train` that makes such tokens.

    Args:
        config: The adapter's configuration.
        training: Its recipe.
        trained_on: Hub id of the training data, if they are there.

    Returns:
        Lines for a shell.
    """
    num_processes = training.get("num_processes")
    program = "robtok train"
    if isinstance(num_processes, int) and num_processes > 1:
        program = f"accelerate launch --num_processes {num_processes} -m robustness_tokens train"
    options: dict[str, Any] = {
        "base_model": config.base_model_name_or_path or "BASE_MODEL",
        "base_model_revision": config.base_model_revision,
        "dataset": trained_on or UNKNOWN_DATASET,
        "output_dir": "outputs/adapter",
        "num_robustness_tokens": config.num_robustness_tokens,
        "initializer_range": config.initializer_range,
        "feature_view": config.feature_view,
        "similarity_axis": config.similarity_axis,
        "image_mean": config.image_mean,
        "image_std": config.image_std,
    }
    if trained_on is not None:
        entry = training["dataset"]
        options |= _plain_values({"dataset_config": entry.get("config"), "split": entry.get("split")})
    options |= _plain_values({key: training.get(key) for key in RECIPE_ARGUMENTS})
    if training.get("resize") == "processor":
        options.pop("image_size", None)  # it came of the processor, and was not asked for
    return _command(program, options)


def evaluate_command(report: RobustnessReport, *, name: str) -> str:
    """The `robtok evaluate` that makes such a report of the adapter of that name."""
    options = {
        "dataset": report.dataset["name"],
        "split": report.dataset["split"],
        "output_dir": "outputs/evaluation",
        "task": "classification" if any(result.task == "classification" for result in report.results) else None,
        "budget": report.budget,
        "seed": report.seed,
    }
    return _command(f"robtok evaluate {_word(name)}", options)


def _plain_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """A list would be several words, and a word of its own may be an option."""
    return {key: value for key, value in options.items() if isinstance(value, str | int | float)}


def _command(program: str, options: Mapping[str, Any]) -> str:
    words = [_option(key, value) for key, value in options.items() if value is not None]
    return " \\\n    ".join([program, *words])


def _option(key: str, value: Any) -> str:
    is_like_option = plain(value).startswith("-") and not isinstance(value, int | float)
    return f"--{key}{'=' if is_like_option else ' '}{_words(value)}"


def _words(value: Any) -> str:
    if isinstance(value, float) and 0 < value < 1 and value == round(255 * value) / 255:
        return f"{round(255 * value)}/255"
    return " ".join(map(_word, value)) if isinstance(value, list) else _word(value)


def _word(value: object) -> str:
    return shlex.quote(plain(value))


def render_card(
    config: RobustnessTokenConfig,
    *,
    name: str,
    subfolder: str = "",
    license: str | None = None,
    datasets: Sequence[str] | None = None,
    report: RobustnessReport | None = None,
    tags: Sequence[str] = (),
) -> str:
    """The README.md of an adapter. What config and report say is shown as text, never as markup.

    Args:
        config: The adapter's configuration, with its training recipe.
        name: Folder or repo id that the load lines name.
        subfolder: Folder of the adapter inside the repo.
        license: Of the base, which goes for its adapter too.
        datasets: Hub ids of the training data; by default that of the recipe, if it is one.
        report: What was measured.
        tags: More tags for the Hub.

    Returns:
        Markdown with the metadata that the Hub reads; all but the metadata stands between our markers.
    """
    training = config.training or {}
    base_id = config.base_model_name_or_path if is_repo_id(config.base_model_name_or_path) else None
    trained_on = _dataset_of_recipe(training)
    datasets = [trained_on] if datasets is None and trained_on else datasets
    model_class = next((name for name in config.architectures or () if name in _USES), "RobustnessTokenModel")
    auto_class, pipeline_tag, call = _USES[model_class]
    eval_results = [] if report is None else to_eval_results(report)
    arguments = _literal(name) + (f", subfolder={_literal(subfolder)}" if subfolder else "")
    data = ModelCardData(
        base_model=base_id,
        base_model_relation="adapter" if base_id else None,
        datasets=list(datasets) if datasets else None,
        library_name="robustness_tokens",
        license=license,
        pipeline_tag=pipeline_tag,
        tags=["robustness-tokens", "adversarial-robustness", *tags],
        model_name=plain(name) if eval_results else None,
        eval_results=eval_results or None,
    )
    body = _BODY.format(
        begin=BEGIN,
        end=END,
        base=code(config.base_model_name_or_path or config.base_model_class),
        count=config.num_robustness_tokens,
        width=config.hidden_size,
        headline=f"\n{sentence}\n" if report is not None and (sentence := headline(report)) else "",
        model_class=model_class,
        arguments=arguments,
        auto_class=auto_class,
        pipeline_tag=pipeline_tag,
        call=call,
        inject=code(f"inject_tokens(model, {arguments})"),
        evaluation=(
            "## Evaluation\n\nHow far these tokens protect has not been measured yet: `robtok evaluate` does that.\n"
            if report is None
            else render_report_markdown(report, level=2)
        ),
        threat=_render_threat_model(config, training),
        limits=_render_limits(training),
        base_table=_render_base(config),
        training=_render_training(training),
        reproduction=_render_reproduction(config, training, trained_on, name=name, report=report),
    )
    return f"---\n{data.to_yaml()}\n---\n\n{body}"


def _dataset_of_recipe(training: Mapping[str, Any]) -> str | None:
    """The Hub id of the training data; without a namespace it may be a folder's name, and nothing is known."""
    entry = training.get("dataset")
    name = entry.get("name") if isinstance(entry, dict) else None
    return name if isinstance(name, str) and "/" in name and is_repo_id(name) else None


def _render_threat_model(config: RobustnessTokenConfig, training: Mapping[str, Any]) -> str:
    if str(training.get("secrecy")).startswith("none"):
        secret = (
            "The defence rests on tokens that the attacker doesn't know, and these are published: whoever reads them "
            "can attack through them (white box), and then they protect far less."
        )
    else:
        secret = (
            "The tokens are a secret, and the defence rests on it. Whoever can read this repository can attack "
            "through them (white box), and then they protect far less. Keep the repository private."
        )
    attacker = _ATTACKERS.get(str(training.get("attack_through")))
    if attacker is None:
        return secret
    return f"{secret}\n\n{attacker}{_attack_in_words(config, training)}."


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


def _render_limits(training: Mapping[str, Any]) -> str:
    limits = [
        "Nothing is proven: a number says what the attacks that were tried achieved. A better attack does more.",
        "Only small changes of every pixel (L-inf) count here. Patches, rotations, blur and the like are other "
        "threats.",
        "A change larger than that of the training is another threat too.",
        "On loading, the base is known by its first and its last layer. A base that was changed only between them is "
        "taken for the right one, and the tokens may not protect it.",
    ]
    if (size := training.get("image_size")) is not None:
        limits.append(f"Trained on images of {code(size)} pixels a side; at another size measure anew.")
    if training.get("resize") == "squash":
        limits.append(
            "In training, whole pictures were squashed to a square. The image processor beside the tokens is the "
            "base's own and may crop instead."
        )
    return "\n".join(f"- {limit}" for limit in limits)


def _render_base(config: RobustnessTokenConfig) -> str:
    rows = {
        "model": code(config.base_model_name_or_path or "not named"),
        "class": code(config.base_model_class),
        "commit": code(config.base_model_revision) if config.base_model_revision else "not pinned",
        "features": f"{config.feature_view}, cosine along the {config.similarity_axis} axis",
        "normalisation": f"mean {config.image_mean}, std {config.image_std}",
    }
    return table(("", ""), rows.items())


def _render_training(training: Mapping[str, Any]) -> str:
    if not training:
        return "The tokens have not been trained."
    rows = []
    for key, value in sorted(training.items()):
        if value is not None:
            is_word, is_number = re.fullmatch(r"[a-z]+(_[a-z]+)*", key), type(value) in (int, float)
            shown = (
                format_setting(key, value) if is_number else code(json.dumps(value, ensure_ascii=False)[:_MAX_SETTING])
            )
            rows.append((key if is_word else code(key), shown))
    return table(("setting", "value"), rows)


def _literal(text: str) -> str:
    """A string as Python code, in double quotes as formatters have it: JSON's are Python's."""
    return json.dumps(text, ensure_ascii=False)


def _render_reproduction(
    config: RobustnessTokenConfig,
    training: Mapping[str, Any],
    trained_on: str | None,
    *,
    name: str,
    report: RobustnessReport | None,
) -> str:
    blocks = []
    if "max_steps" in training:
        blocks.append(f"```bash\n{train_command(config, training, trained_on)}\n```")
        if trained_on is None:
            blocks.append(f"`{UNKNOWN_DATASET}` stands for the training images: a folder, a parquet file or a Hub id.")
        if training.get("previous"):
            blocks.append("This was the last of several trainings; the table above holds those before it.")
    elif training:
        blocks.append("These tokens were not trained by this package: the table above says where they come from.")
    if report is not None:
        blocks.append(f"```bash\n{evaluate_command(report, name=name)}\n```")
    return "\n\n".join(blocks) or "There is nothing to reproduce."
