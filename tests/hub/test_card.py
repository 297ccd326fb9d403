import math
import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from robustness_tokens.cli.parsing import parse_arguments, parse_groups
from robustness_tokens.configuration import RobustnessTokenConfig
from robustness_tokens.evaluation.arguments import EvaluationArguments
from robustness_tokens.hub.card import RECIPE_ARGUMENTS, render_card
from robustness_tokens.hub.eval_results import to_eval_results
from robustness_tokens.models.modeling import RobustnessTokenForImageClassification
from robustness_tokens.training.arguments import RobustnessTokenTrainingArguments
from tests.support.bases import HIDDEN_SIZE, NUM_LABELS
from tests.support.reports import CLEAN, HOSTILE, make_report, make_result


# What the trainer and the importer of published tokens add to a recipe; no arguments of `robtok train`.
NO_ARGUMENTS = {"num_processes", "num_steps_done", "dataset", "previous"}


def config(**changes: Any) -> RobustnessTokenConfig:
    values: dict[str, Any] = {
        "base_model_name_or_path": "facebook/dinov2-small",
        "base_model_revision": "0123456789abcdef",
        "base_model_class": "Dinov2Model",
        "num_robustness_tokens": 11,
        "hidden_size": 384,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    return RobustnessTokenConfig(**{**values, **changes})


def recipe(**changes: Any) -> dict[str, Any]:
    added = {"num_processes": 1, "num_steps_done": 50, "image_size": 224}
    return {**RobustnessTokenTrainingArguments(output_dir="out", **changes).recipe(), **added}


def blocks(card: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", card, flags=re.DOTALL | re.MULTILINE)


def words_of(command: str) -> list[str]:
    """As a shell reads them: it takes a line break after a backslash away, which shlex doesn't."""
    return shlex.split(command.replace("\\\n", " "))


def test_metadata_is_what_the_hub_reads() -> None:
    data = ModelCard(render_card(config(), name="user/adapter", license="apache-2.0", tags=["mine"])).data.to_dict()
    assert data == {
        "base_model": "facebook/dinov2-small",
        "base_model_relation": "adapter",
        "library_name": "robustness_tokens",
        "license": "apache-2.0",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["robustness-tokens", "adversarial-robustness", "mine"],
    }


def test_a_base_without_a_name_gives_no_empty_metadata() -> None:
    card = render_card(config(base_model_name_or_path="", base_model_revision=None), name="out")
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "# Robustness tokens for `Dinov2Model`" in card
    assert "| commit | not pinned |" in card


def test_a_classifiers_adapter_is_one_for_the_hub_too() -> None:
    card = render_card(config(architectures=["RobustnessTokenForImageClassification"]), name="u/a")
    assert ModelCard(card).data["pipeline_tag"] == "image-classification"
    assert '`AutoModelForImageClassification` and `pipeline("image-classification", ...)`' in card


def test_a_folder_is_no_base_model_for_the_hub() -> None:
    card = render_card(config(base_model_name_or_path="/home/me/dinov2"), name="out")
    assert not {"base_model", "base_model_relation"} & ModelCard(card).data.to_dict().keys()
    assert "| model | `/home/me/dinov2` |" in card


@pytest.mark.parametrize(
    ("dataset", "datasets", "expected"),
    [
        ({"name": "user/pictures"}, None, ["user/pictures"]),
        ({"name": "imagefolder"}, None, None),
        ({"name": "../data/pictures"}, None, None),
        ({"name": 5}, None, None),
        ("user/pictures", None, None),
        ({"name": "user/pictures"}, ["user/other"], ["user/other"]),
        ({"name": "user/pictures"}, [], None),
    ],
)
def test_datasets_of_the_hub_are_named(dataset: Any, datasets: list[str] | None, expected: list[str] | None) -> None:
    card = render_card(config(training={"dataset": dataset}), name="u/a", datasets=datasets)
    assert ModelCard(card).data.get("datasets") == expected


def test_what_leads_the_report_is_in_the_model_index_and_no_details() -> None:
    worst: dict[str, Any] = {"attack": "worst_case", "value": 0.1, "confidence_interval": None}
    sweep = {"attacks": ["pgd (full)"], "series": "sweep"}
    report = make_report(
        results=[
            make_result(value=0.9, confidence_interval=None, **CLEAN),
            make_result(attack_parameters={"attacks": ["pgd (full)"]}, **worst),
            make_result(),
            make_result(attack_parameters=sweep, eps=1 / 255, **worst),
        ]
    )
    found = [(result.metric_value, (result.metric_args or {})["eps_in_pixels"]) for result in to_eval_results(report)]
    assert found == [(0.9, 0.0), (0.1, 16 / 255)]


def test_every_number_of_the_adapter_is_in_the_model_index() -> None:
    report = make_report(
        results=[
            make_result(),
            make_result(tokens="none"),
            make_result(tokens="zero"),
            make_result(value=0.9, confidence_interval=None, **CLEAN),
            make_result(task="features", metric="cosine", knowledge="base", confidence_interval=None),
        ]
    )
    data: Any = ModelCard(render_card(config(), name="user/adapter", report=report)).data
    assert data.eval_results == to_eval_results(report)
    assert len(data.eval_results) == 3
    assert data.to_dict()["model-index"][0]["name"] == "user/adapter"
    first = next(r for r in data.eval_results if r.metric_type == "accuracy")
    assert first.metric_name == (
        "accuracy under attack pgd_cross_entropy (L-inf, eps 16/255 (0.06275) in pixels), the attacker knows "
        "everything, tokens included"
    )
    assert first.metric_value == 0.25
    assert first.dataset_split == "test"
    assert first.metric_args == {
        "evaluated_with": "robustness_tokens 0.1.0",
        "knowledge": "full",
        "norm": "Linf",
        "eps_in_pixels": 16 / 255,
        "attack": "pgd_cross_entropy",
        "attack_parameters": {"num_steps": 20, "step_size": 2 / 255, "seeds": [1, 2], "random_start": True},
        "num_images": 500,
        "seed": 3,
        "confidence_interval_95": [0.2, 0.3],
    }


def test_a_report_without_numbers_of_the_adapter_makes_no_model_index() -> None:
    card = render_card(config(), name="u/a", report=make_report(results=[make_result(tokens="none")]))
    assert not {"model-index", "model_name"} & ModelCard(card).data.to_dict().keys()


def test_the_report_stands_in_the_card() -> None:
    results = [make_result(knowledge="full_worst_case", attack="all")]
    card = render_card(config(), name="u/a", report=make_report(results=results))
    assert "\n## Robustness evaluation\n" in card
    assert "| 4 | white box | pass |" in card
    introduction = card.partition("## Use")[0]
    assert "Against an attacker who knows everything, tokens included" in introduction
    assert "`robtok evaluate` does that" not in card
    assert "`robtok evaluate` does that" in render_card(config(), name="u/a")


@pytest.mark.parametrize("classifier", [False, True])
def test_the_code_of_the_card_runs(
    adapter_folder: Path, classifier_folders: dict[str, Path], tmp_path: Path, classifier: bool
) -> None:
    if classifier:
        adapter_folder = tmp_path / "classifier's adapter"
        RobustnessTokenForImageClassification.from_base(classifier_folders["vit"]).save_pretrained(adapter_folder)
    stored = RobustnessTokenConfig.from_pretrained(adapter_folder)
    (code,) = blocks(render_card(stored, name=str(adapter_folder)), "python")
    names: dict[str, Any] = {}
    exec(code, names)
    result = names["logits" if classifier else "features"]
    assert result.shape == ((1, NUM_LABELS) if classifier else (1, 1 + 4, HIDDEN_SIZE))  # 16 pixels, patches of 8
    assert result.isfinite().all()


def test_the_first_line_of_code_is_the_import_and_the_subfolder_is_named() -> None:
    (code,) = blocks(render_card(config(), name="user/adapter", subfolder="a/b"), "python")
    assert code.startswith("from robustness_tokens import RobustnessTokenModel\n")
    assert '\nmodel = RobustnessTokenModel.from_pretrained("user/adapter", subfolder="a/b")\n' in code


def test_the_card_says_what_it_is() -> None:
    card = render_card(config(), name="user/adapter")
    assert "11 learned input tokens (width 384)" in card
    assert "| commit | `0123456789abcdef` |" in card
    assert "mean [0.1, 0.2, 0.3], std [0.4, 0.5, 0.6]" in card
    assert "The tokens are a secret" in card
    assert "The tokens have not been trained." in card
    assert "There is nothing to reproduce." in card


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (
            {"attack": "pgd", "eps": 4 / 255},
            "(grey box), by PGD in 30 steps, L-inf, at eps 4/255 (0.01569) in pixels.",
        ),
        ({}, "by the published attack in 30 steps: its eps is 8/255 of normalised images, about 4.0/255 in pixels."),
        ({"attack_through": "tokens"}, "who knows the backbone and the tokens (white box), by"),
        ({"attack_through": "both"}, "with and without the tokens, by"),
    ],
)
def test_the_card_says_against_whom_the_tokens_were_trained(training: dict[str, Any], said: str) -> None:
    card = render_card(config(training=recipe(**training)), name="x")
    assert said in card.partition("## Threat model")[2].partition("## Limits")[0]


def test_the_card_of_untrained_tokens_claims_no_training() -> None:
    assert "were trained against" not in render_card(RobustnessTokenConfig(base_model_name_or_path="u/b"), name="x")


def test_published_tokens_are_not_called_a_secret() -> None:
    card = render_card(config(training={"secrecy": "none: these tokens are published", "file": "x.pt"}), name="x")
    assert "The tokens are a secret" not in card
    assert "these are published" in card
    assert "were not trained by this package" in card


@pytest.mark.parametrize(
    ("training", "said", "unsaid"),
    [
        (recipe(), "Trained on images of `224` pixels a side", "no limit"),
        (recipe(), "squashed to a square", "no limit"),
        (recipe(resize="processor"), "Only small changes", "squashed to a square"),
        ({}, "by its first and its last layer", "Trained on images of"),
    ],
)
def test_the_limits_are_those_of_the_recipe(training: dict[str, Any], said: str, unsaid: str) -> None:
    limits = render_card(config(training=training), name="x").partition("## Limits")[2].partition("## Base")[0]
    assert said in limits
    assert unsaid not in limits


def test_the_recipe_is_a_table() -> None:
    training = {"learning_rate": 0.001, "attack": "paper", "eps": 4 / 255, "step_size": None, "a|b": "c|d"}
    card = render_card(config(training=training), name="user/adapter")
    assert '| attack | `"paper"` |\n| `a¦b` | `"c¦d"` |\n| eps | 4/255 |\n| learning_rate | 0.001 |\n\n' in card


def test_every_setting_of_a_recipe_can_be_told_to_the_command_line() -> None:
    assert set(recipe()) - NO_ARGUMENTS == set(RECIPE_ARGUMENTS), "new settings go into card_commands.RECIPE_ARGUMENTS"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attack": "pgd", "eps": 16 / 255, "step_size": 4 / 255, "num_attack_steps": 10, "mixed_precision": "bf16"},
        {"attack": "pgd", "eps": 0.03, "max_grad_norm": 1.5, "lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"resize": "processor", "attack_through": "both", "seed": 7, "learning_rate": 0.05},
    ],
)
def test_the_command_of_the_card_is_understood_and_means_the_same_recipe(changes: dict[str, Any]) -> None:
    dataset = {"name": "user/pictures", "config": "small", "split": "train[:10%]", "num_images": 12}
    stored = config(
        training=recipe(**changes) | {"dataset": dataset}, initializer_range=0.02, similarity_axis="feature"
    )
    (command,) = blocks(render_card(stored, name="user/adapter"), "bash")
    program, subcommand, *words = words_of(command)
    assert (program, subcommand) == ("robtok", "train")
    model_args, data_args, training_args = parse_arguments(words)
    expected = RobustnessTokenTrainingArguments(output_dir="out", **changes).recipe()
    assert training_args.recipe() == expected | {"image_size": None if "resize" in changes else 224}
    assert (data_args.dataset, data_args.dataset_config, data_args.split) == ("user/pictures", "small", "train[:10%]")
    assert model_args.base_model == "facebook/dinov2-small"
    assert model_args.from_base_kwargs() == {
        "revision": "0123456789abcdef",
        "num_robustness_tokens": 11,
        "initializer_range": 0.02,
        "feature_view": "cls_and_patches",
        "similarity_axis": "feature",
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }


def test_what_the_command_can_not_say_the_card_does() -> None:
    training = recipe() | {"num_processes": 4, "previous": {"max_steps": 3}, "dataset": {"name": "imagefolder"}}
    card = render_card(config(training=training), name="user/adapter")
    assert "accelerate launch --num_processes 4 -m robustness_tokens train \\" in card
    assert "`PATH_OR_HUB_ID` stands for the training images" in card
    assert "the last of several trainings" in card


def test_the_evaluation_can_be_repeated() -> None:
    report = make_report(dataset={"name": "my pictures", "split": None, "num_images": 5})
    (command,) = blocks(render_card(config(), name="user/adapter", report=report), "bash")
    program, subcommand, adapter, *words = words_of(command)
    assert (program, subcommand, adapter) == ("robtok", "evaluate", "user/adapter")
    (args,) = parse_groups(words, (EvaluationArguments,), prog="robtok evaluate")
    expected = EvaluationArguments(
        dataset="my pictures", output_dir="outputs/evaluation", task="classification", budget="standard", seed=3
    )
    assert args == expected


@pytest.mark.parametrize(
    "value",
    ["--overwrite_output_dir", "$(touch x)", "a; touch x", "`id`", "x\n--output_dir /", "'", "a\n```\n<b>"],
)
def test_a_config_from_the_hub_brings_nothing_into_the_command(value: str) -> None:
    training = recipe() | {"lr_scheduler_type": value, "output_dir": "/", "overwrite_output_dir": True, value: 1}
    training |= {"max_steps": ["1", "--overwrite_output_dir", value], "dataset": {"name": "u/d", "split": [value]}}
    stored = config(base_model_name_or_path=value, training=training)
    (command,) = blocks(render_card(stored, name="user/adapter"), "bash")
    arguments: dict[str, list[str]] = {}
    for word in words_of(command)[2:]:
        if word.startswith("--"):
            option, equals, rest = word.partition("=")
            arguments[option] = [rest] if equals else []
        else:
            arguments[option].append(word)
    plain = " ".join(value.split())
    assert arguments["--base_model"] == [plain]
    assert arguments["--lr_scheduler_type"] == [plain]
    assert arguments["--output_dir"] == ["outputs/adapter"]
    assert not {"--overwrite_output_dir", "--max_steps", "--split"} & arguments.keys()


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e308, 10**400, -1.5, True, [], {}, "x", None])
def test_a_strange_number_in_a_recipe_is_shown_and_breaks_nothing(value: Any) -> None:
    training = dict.fromkeys((*RECIPE_ARGUMENTS, *NO_ARGUMENTS), value)
    for attack in ("pgd", "paper"):
        card = render_card(config(training={**training, "attack": attack}), name="u/a")
        assert ("| seed |" in card) == (value is not None)


@pytest.mark.parametrize("name", ["x\n---\nlicense: mit", "a: b", "{base}", "'quoted'", *HOSTILE])
def test_names_can_not_forge_metadata_or_markup(name: str) -> None:
    training = recipe() | {name: name, "dataset": {"name": name, "split": name}, "attack_through": name}
    stored = config(base_model_name_or_path=name, training=training)
    results = [make_result(attack=name, attack_parameters={name: name})]
    dataset = {"name": name, "split": name, "num_images": 5}
    report = make_report(adapter=name, base_model=name, dataset=dataset, results=results)
    card = render_card(stored, name=name, subfolder=name, report=report)
    data: Any = ModelCard(card).data
    assert not {"license", "base_model", "base_model_relation", "datasets"} & data.to_dict().keys()
    assert data.eval_results == to_eval_results(report)
    markers = re.findall(r"^<!-- robustness_tokens:(\w+) -->$", card, flags=re.MULTILINE)
    assert markers == ["begin", "end"]
    body = card.partition("<!-- robustness_tokens:begin -->")[2].partition("-->\n")[2]
    html = str(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(body))
    links = re.findall(r'<a href="(.*?)"', html)
    assert links == ["https://arxiv.org/abs/2503.10191"]
    assert set(re.findall(r"<(h\d|img|script|b|em|strong)\b", html)) <= {"h1", "h2", "h3", "h4"}
    assert html.count("<h1>") == 1


def test_the_metadata_are_yaml_of_plain_types() -> None:
    card = render_card(config(), name="u/a", report=make_report())
    assert yaml.safe_load(card.split("---\n")[1])["model-index"][0]["results"]


def test_the_example_in_the_repository_is_what_its_command_writes() -> None:
    script = runpy.run_path(str(Path(__file__).parents[2] / "examples" / "quickstart" / "write_card.py"))
    assert script["MODEL_CARD"].read_text(encoding="utf-8") == script["render_quickstart_card"](), (
        "run: python examples/quickstart/write_card.py"
    )
