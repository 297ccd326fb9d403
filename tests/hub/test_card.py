import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from robustness_tokens.cli.parsing import CommandParser, EvaluationCommandArguments
from robustness_tokens.configuration import RobustnessTokenConfig
from robustness_tokens.hub.card import RECIPE_ARGUMENTS, render_card, to_eval_results
from robustness_tokens.models.modeling import RobustnessTokenForImageClassification
from robustness_tokens.report import Check, RobustnessReport
from robustness_tokens.training.arguments import RobustnessTokenTrainingArguments
from tests.support.bases import HIDDEN_SIZE, NUM_LABELS
from tests.support.command_line import parse_arguments
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


def test_metadata_is_what_the_hub_reads() -> None:
    data = ModelCard(render_card(config(), name="user/adapter", license="apache-2.0", tags=["mine"])).data.to_dict()
    assert data == {
        "base_model": "facebook/dinov2-small",
        "base_model_relation": "adapter",
        "library_name": "robustness-tokens",
        "license": "apache-2.0",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["robustness-tokens", "adversarial-robustness", "mine"],
    }


def test_a_base_without_a_name_gives_no_empty_metadata() -> None:
    card = render_card(config(base_model_name_or_path="", base_model_revision=None), name="out")
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "# Robustness tokens for `Dinov2Model`" in card
    assert "The base is `Dinov2Model` (`Dinov2Model`, commit not pinned)." in card


def test_a_classifiers_adapter_is_one_for_the_hub_too() -> None:
    card = render_card(config(architectures=["RobustnessTokenForImageClassification"]), name="u/a")
    assert ModelCard(card).data["pipeline_tag"] == "image-classification"
    assert '`AutoModelForImageClassification` and `pipeline("image-classification", ...)`' in card


def test_a_folder_is_no_base_model_for_the_hub() -> None:
    card = render_card(config(base_model_name_or_path="/home/me/dinov2"), name="out")
    assert not {"base_model", "base_model_relation"} & ModelCard(card).data.to_dict().keys()
    assert "The base is `/home/me/dinov2` (" in card


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


def test_the_model_index_holds_clean_grey_and_white_box_of_the_main_metric() -> None:
    worst: dict[str, Any] = {"attack": "worst_case", "confidence_interval": None}
    whole: dict[str, Any] = {**worst, "knowledge": "full_worst_case"}
    of_curve = {"attacks": ["pgd (full)"], "series": "sweep"}
    features: dict[str, Any] = {"task": "features", "metric": "cosine", "confidence_interval": None}
    report = make_report(
        results=[
            make_result(value=0.9, confidence_interval=None, **CLEAN),
            make_result(value=0.1, attack_parameters={"attacks": ["pgd (full)"]}, **whole),
            make_result(value=0.01, attack_parameters={"attacks": ["pgd (full)"]}, eps=32 / 255, **whole),
            make_result(value=0.2, **worst),
            make_result(value=0.3, knowledge="own_tokens", **worst),
            make_result(value=0.4, knowledge="base", **worst),
            make_result(value=0.5, knowledge="none", **worst),
            make_result(knowledge="base"),
            make_result(tokens="none", knowledge="base", **worst),
            make_result(attack_parameters=of_curve, eps=1 / 255, value=0.05, **whole),
            make_result(knowledge="base", **features),
        ]
    )
    data: Any = ModelCard(render_card(config(), name="user/adapter", report=report)).data
    assert data.eval_results == to_eval_results(report)
    assert data.to_dict()["model-index"][0]["name"] == "user/adapter"
    found = [(r.metric_type, r.metric_value, r.metric_args["eps_in_pixels"]) for r in data.eval_results]
    assert found == [("accuracy", 0.9, 0.0), ("accuracy", 0.4, 16 / 255), ("accuracy", 0.1, 16 / 255)]


@pytest.mark.parametrize(
    ("own_tokens", "said"),
    [
        ({"recipe": {"max_steps": 50}, "own_tokens_0": {"max_steps": 20}, "own_tokens_1": {"max_steps": 10}}, True),
        ({"recipe": {"max_steps": 50}, "own_tokens_0": {"num_images": 8}}, False),
        ({"recipe": {"max_steps": "50"}, "own_tokens_0": {"max_steps": 10}}, False),
        ({"own_tokens_0": {"max_steps": 10}}, False),
        ({}, False),
    ],
)
def test_shorter_trainings_of_own_tokens_are_said(own_tokens: dict[str, Any], said: bool) -> None:
    card = render_card(config(), name="user/adapter", report=make_report(own_tokens=own_tokens))
    assert ("\nThe attacker trained own tokens for 10 steps; the recipe has 50.\n" in card) is said
    assert ("own tokens for" in card) is said


def test_without_worst_cases_the_strongest_attack_stands_for_them() -> None:
    attacks = [make_result(value=value, attack=name) for value, name in ((0.3, "square"), (0.25, "pgd"))]
    report = make_report(results=[*attacks, make_result(value=0.2, eps=32 / 255)])
    (found,) = to_eval_results(report)
    assert found.metric_name == (
        "accuracy under attack pgd (L-inf, eps 16/255 (0.06275) in pixels), the attacker knows everything, tokens "
        "included"
    )
    assert (found.metric_value, found.dataset_split) == (0.25, "test")
    assert found.metric_args == {
        "evaluated_with": "robustness_tokens 0.1.0",
        "knowledge": "full",
        "norm": "Linf",
        "eps_in_pixels": 16 / 255,
        "attack": "pgd",
        "num_images": 500,
        "seed": 3,
        "confidence_interval_95": [0.2, 0.3],
    }


def test_a_report_without_numbers_of_the_adapter_makes_no_model_index() -> None:
    card = render_card(config(), name="u/a", report=make_report(results=[make_result(tokens="none")]))
    assert not {"model-index", "model_name"} & ModelCard(card).data.to_dict().keys()


CHECK: dict[str, Any] = {"name": "steps", "value": "3% to 2%", "explanation": "More steps must change nothing."}


def test_the_card_shows_the_main_metric_and_the_failed_checks() -> None:
    results = [make_result(knowledge="full_worst_case", attack="worst_case"), make_result(value=0.9, **CLEAN)]
    checks = [Check(number=i, passed=passed, **CHECK) for i, passed in enumerate((True, False, None, True), start=8)]
    report = make_report(results=results, checks=checks)
    card = render_card(config(), name="u/a", report=report)
    assert "Measured on `user/pictures`, split `test`, 500 images, with budget `standard`, seed 3, by" in card
    assert "Checks of the attacks: 2 passed, 1 failed, 1 without a verdict.\n" in card
    assert re.findall("^- Failed: .*$", card, flags=re.MULTILINE) == [
        "- Failed: 9, steps: 3% to 2%. More steps must change nothing."
    ]
    rows = [line for line in card.splitlines() if line.startswith("| ")]
    assert rows[2:] == [
        "| White box, worst case: knows everything, tokens included | worst case `num_steps=20, step_size=2/255, "
        "seeds=[1, 2], random_start=True, p=None` | 16/255 (0.06275) | 500 | 3 | 25.0% [20.0, 30.0] |",
        "| Clean images | no attack | 0 | 500 | 3 | 90.0% [20.0, 30.0] |",
    ]
    introduction = card.partition("## Use")[0]
    assert "Against an attacker who knows everything, tokens included" in introduction
    assert "`robtok evaluate` does that" not in card
    assert "`robtok evaluate` does that" in render_card(config(), name="u/a")


def test_a_card_is_short_whatever_it_has_to_say() -> None:
    attackers = ("full_worst_case", "full", "own_tokens", "base", "none")
    results = [make_result(knowledge=attacker, attack="worst_case") for attacker in attackers]
    results += [make_result(tokens=tokens, **CLEAN) for tokens in ("none", "trained")]
    checks = [Check(number=number, passed=False, **CHECK) for number in range(1, 13)]
    dataset = {"name": "user/pictures", "config": "small", "split": "train"}
    training = recipe(attack="pgd", eps=0.03, max_grad_norm=1.5) | {"dataset": dataset, "previous": {"max_steps": 3}}
    stored = config(training=training)
    report = make_report(results=results, checks=checks)
    card = render_card(stored, name="user/adapter", license="mit", report=report)
    assert card.count("- Failed: ") == 12
    assert len(card.splitlines()) <= 120


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
    assert "It learned 11 tokens of width 384 at the input, by" in card
    assert "The base is `facebook/dinov2-small` (`Dinov2Model`, commit `0123456789abcdef`)." in card
    assert "mean `[0.1, 0.2, 0.3]`, std `[0.4, 0.5, 0.6]`" in card
    assert "The defence relies on the tokens being secret" in card
    assert "The tokens have not been trained." in card
    assert "robtok train" not in card


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (
            {"attack": "pgd", "eps": 4 / 255},
            "(grey box), by PGD in 30 steps, L-inf, at eps 4/255 (0.01569) in pixels.",
        ),
        ({}, "by the published attack in 30 steps: its eps is 8/255 of normalised images, about 4.0/255 in pixels."),
        ({"attack_through": "tokens"}, "who knows everything, tokens included (white box), by"),
        (
            {"attack_through": "both"},
            "(grey box) and an attacker who knows everything, tokens included (white box)",
        ),
    ],
)
def test_the_card_says_against_whom_the_tokens_were_trained(training: dict[str, Any], said: str) -> None:
    card = render_card(config(training=recipe(**training)), name="x")
    assert said in card.partition("## Threat model")[2].partition("## Training")[0]


def test_the_card_of_untrained_tokens_claims_no_training() -> None:
    assert "were trained against" not in render_card(RobustnessTokenConfig(base_model_name_or_path="u/b"), name="x")


def test_published_tokens_are_not_called_a_secret() -> None:
    card = render_card(config(training={"secrecy": "none: these tokens are published", "file": "x.pt"}), name="x")
    assert "The defence relies on the tokens being secret" not in card
    assert "these are published" in card
    assert "were not trained by this package" in card


@pytest.mark.parametrize(
    ("training", "said", "unsaid"),
    [
        (recipe(), "Trained on images of `224` pixels a side", "no limit"),
        (recipe(), "squashed to a square", "no limit"),
        (recipe(resize="processor"), "Only small changes", "squashed to a square"),
        ({}, "only the first and the last layer", "Trained on images of"),
    ],
)
def test_the_limits_are_those_of_the_recipe(training: dict[str, Any], said: str, unsaid: str) -> None:
    limits = (
        render_card(config(training=training), name="x").partition("## Threat model")[2].partition("## Training")[0]
    )
    assert said in limits
    assert unsaid not in limits


def test_what_else_the_config_records_is_shown() -> None:
    card = render_card(config(training={"learning_rate": 0.001, "file": "a|b\n", "step_size": None}), name="u/a")
    assert 'not trained by this package. Also recorded: `{"file": "a¦b\\n", "learning_rate": 0.001}`.\n' in card
    training = recipe() | {"num_processes": 4, "previous": {"max_steps": 3}, "dataset": {"name": "imagefolder"}}
    card = render_card(config(training=training), name="user/adapter")
    assert (
        "`accelerate launch --num_processes 4 -m robustness_tokens train recipe.yaml --output_dir outputs/adapter`"
        in card
    )
    assert "`PATH_OR_HUB_ID` stands for the training images" in card
    assert "the last of several trainings" in card
    assert '`{"dataset": {"name": "imagefolder"}, "num_processes": 4, "num_steps_done": 50, "previous": {' in card


def test_every_setting_of_a_recipe_can_be_told_to_the_command_line() -> None:
    assert set(recipe()) - NO_ARGUMENTS == set(RECIPE_ARGUMENTS), "new settings go into card.RECIPE_ARGUMENTS"


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attack": "pgd", "eps": 16 / 255, "step_size": 4 / 255, "num_attack_steps": 10, "mixed_precision": "bf16"},
        {"attack": "pgd", "eps": 0.03, "max_grad_norm": 1.5, "lr_scheduler_type": "cosine", "warmup_steps": 3},
        {"resize": "processor", "attack_through": "both", "seed": 7, "learning_rate": 0.05},
    ],
)
@pytest.mark.parametrize("changed", [{}, {"token_depth": 12, "gains_and_shifts": ["norm", "bias"]}])
def test_the_recipe_of_the_card_is_a_file_for_robtok_train(
    changes: dict[str, Any], changed: dict[str, Any], tmp_path: Path
) -> None:
    dataset = {"name": "user/pictures", "config": "small", "split": "train[:10%]", "num_images": 12}
    stored = config(
        training=recipe(**changes) | {"dataset": dataset}, initializer_range=0.02, similarity_axis="feature", **changed
    )
    card = render_card(stored, name="user/adapter")
    (written,) = blocks(card, "yaml")
    (tmp_path / "recipe.yaml").write_text(written)
    (command,) = re.findall("`(robtok train .*?)`", card)
    program, subcommand, file, *words = shlex.split(command)
    assert (program, subcommand, file) == ("robtok", "train", "recipe.yaml")
    model_args, data_args, training_args = parse_arguments([str(tmp_path / file), *words])
    expected = RobustnessTokenTrainingArguments(output_dir="out", **changes).recipe()
    assert training_args.recipe() == expected | {"image_size": None if "resize" in changes else 224}
    assert training_args.output_dir == "outputs/adapter"
    assert (data_args.dataset, data_args.dataset_config, data_args.split) == ("user/pictures", "small", "train[:10%]")
    assert model_args.base_model == "facebook/dinov2-small"
    assert model_args.from_base_kwargs() == {
        "revision": "0123456789abcdef",
        "num_robustness_tokens": 11,
        "token_depth": changed.get("token_depth", 1),
        "gains_and_shifts": changed.get("gains_and_shifts", []),
        "initializer_range": 0.02,
        "feature_view": "cls_and_patches",
        "similarity_axis": "feature",
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }


def evaluation_of(report: RobustnessReport, **kwargs: Any) -> str:
    card = render_card(config(), name="user/adapter", report=report, **kwargs)
    (line,) = re.findall("^To evaluate again with .*$", card, flags=re.MULTILINE)
    return str(line)


def test_the_evaluation_of_the_card_runs_as_printed() -> None:
    line = evaluation_of(make_report())
    assert line.endswith("`.")
    program, subcommand, adapter, *words = shlex.split(line.split("`")[1])
    assert (program, subcommand, adapter) == ("robtok", "evaluate", "user/adapter")
    (args,), _ = CommandParser((EvaluationCommandArguments,)).parse(words)
    expected = EvaluationCommandArguments(
        dataset="user/pictures", output_dir="outputs/evaluation", task="classification", budget="standard", seed=3
    )
    assert args == expected


def test_what_an_evaluation_does_not_say_is_left_to_fill_in() -> None:
    result = make_result(task="segmentation", metric="miou")
    line = evaluation_of(
        make_report(dataset={"name": "my pictures", "split": None, "num_images": 5}, results=[result])
    )
    assert " --dataset=PATH_OR_HUB_ID --head=HEAD --budget=standard " in line
    assert line.endswith("`; `PATH_OR_HUB_ID` stands for the images; `HEAD` stands for the folder of a head.")


def test_the_evaluation_of_an_adapter_in_a_subfolder_downloads_it() -> None:
    download, _, evaluation = evaluation_of(make_report(), subfolder="a/b").split("`")[1].partition(" && ")
    assert shlex.split(download) == shlex.split("hf download user/adapter --include 'a/b/*' --local-dir adapter")
    assert evaluation.startswith("robtok evaluate adapter/a/b --dataset=user/pictures ")


@pytest.mark.parametrize(
    "value",
    ["--overwrite_output_dir", "$(touch x)", "a; touch x", "`id`", "x\n--output_dir /", "'", "a\n```\n<b>"],
)
def test_a_config_from_the_hub_brings_nothing_into_the_recipe(value: str) -> None:
    training = recipe() | {"lr_scheduler_type": value, "output_dir": "/", "overwrite_output_dir": True, value: 1}
    training |= {"max_steps": ["1", "--overwrite_output_dir", value], "dataset": {"name": "u/d", "split": [value]}}
    stored = config(base_model_name_or_path=value, training=training)
    (written,) = blocks(render_card(stored, name="user/adapter"), "yaml")
    settings = yaml.safe_load(written)
    plain = " ".join(value.split())
    assert settings["base_model"] == plain
    assert settings["lr_scheduler_type"] == plain
    known = {"base_model", "base_model_revision", "dataset", "num_robustness_tokens", "initializer_range"}
    known |= {"feature_view", "similarity_axis", "image_mean", "image_std"}
    assert set(settings) <= known | set(RECIPE_ARGUMENTS) - {"max_steps"}


def test_a_recipe_that_leaves_settings_out_is_shown_as_it_is() -> None:
    (written,) = blocks(render_card(config(training={"max_steps": 3, "resize": "processor"}), name="u/a"), "yaml")
    assert {"max_steps": 3, "resize": "processor"}.items() <= yaml.safe_load(written).items()


@pytest.mark.parametrize("value", [1e308, 10**400, -1.5, True, [], {}, "x", None])
def test_a_strange_number_in_a_recipe_is_shown_and_breaks_nothing(value: Any) -> None:
    training = dict.fromkeys((*RECIPE_ARGUMENTS, *NO_ARGUMENTS), value)
    for attack in ("pgd", "paper"):
        card = render_card(config(training={**training, "attack": attack}), name="u/a")
        assert ("\nseed: " in card) == isinstance(value, str | int | float)


@pytest.mark.parametrize("name", ["x\n---\nlicense: mit", "a: b", "{base}", "'quoted'", *HOSTILE])
def test_names_can_not_forge_metadata_or_markup(name: str) -> None:
    training = recipe() | {name: name, "dataset": {"name": name, "split": name}, "attack_through": name}
    stored = config(base_model_name_or_path=name, training=training)
    results = [make_result(attack=name, attack_parameters={name: name})]
    checks = [Check(number=4, name=name, passed=False, value=name, explanation=name)]
    dataset = {"name": name, "split": name, "num_images": 5}
    report = make_report(adapter=name, base_model=name, dataset=dataset, results=results, checks=checks)
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
    assert script["EXAMPLE_CARD"].read_text(encoding="utf-8") == script["render_quickstart_card"](), (
        "run: python examples/quickstart/write_card.py"
    )


@pytest.mark.parametrize("hidden", ["\u202e", "\u061c", "\u200b", "\u2066", "\U000e0041", "\x1b[31m", "\n---\n"])
def test_metadata_hide_nothing(hidden: str) -> None:
    """Texts of the user, of the base's card on the Hub, and of a report."""
    text = f"a{hidden}b"
    report = make_report(adapter=text, results=[make_result(attack=text)], package_version=text)
    card = render_card(config(), name=text, license=text, tags=[text], report=report)
    front = card.split("\n---\n")[0]
    assert all(line.isprintable() for line in front.splitlines())
    assert yaml.safe_load(front.removeprefix("---\n"))["license"] == " ".join(
        f"a{hidden}b".translate({ord(c): " " for c in hidden if not c.isprintable()}).split()
    )
