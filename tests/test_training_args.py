import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from robustness_tokens.training_args import RobustnessTokenTrainingArguments, parse_arguments


REQUIRED = ["--base_model", "base", "--dataset", "data", "--output_dir", "out"]


def arguments(**kwargs: Any) -> RobustnessTokenTrainingArguments:
    return RobustnessTokenTrainingArguments(output_dir="out", **kwargs)


def test_defaults_are_the_papers() -> None:
    args = arguments()
    assert (args.max_steps, args.per_device_train_batch_size, args.learning_rate, args.seed) == (50, 8, 1e-3, 0)
    assert (args.attack, args.attack_through, args.num_attack_steps, args.step_size) == ("paper", "base", 30, 0.01)
    assert (args.lr_scheduler_type, args.max_grad_norm, args.mixed_precision) == ("constant", None, "no")
    assert (args.invariance_weight, args.adversarial_weight, args.resize) == (1.0, 1.0, "squash")
    model_args, data_args, parsed = parse_arguments(REQUIRED)
    assert parsed == args
    assert (model_args.num_robustness_tokens, model_args.initializer_range) == (10, 0.01)
    assert model_args.similarity_axis == "token"
    assert data_args.split == "train"


def test_the_papers_attack_has_no_eps() -> None:
    assert arguments().eps is None
    with pytest.raises(ValueError, match=r'eps=0\.03.*attack="pgd"'):
        arguments(eps=0.03)


def test_pgd_takes_eps_in_pixels() -> None:
    args = arguments(attack="pgd")
    assert (args.eps, args.step_size) == (4 / 255, None)
    assert arguments(attack="pgd", eps=8 / 255).eps == 8 / 255


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"eps": -1 / 255, "attack": "pgd"}, r"eps must be in \(0, 1\]"),
        ({"eps": 0.0, "attack": "pgd"}, r"eps must be in \(0, 1\]"),
        ({"eps": 8, "attack": "pgd"}, r"such as 8/255, got 8"),
        ({"eps": math.nan, "attack": "pgd"}, "eps must be"),
        ({"max_steps": 0}, "max_steps must be a whole number of at least 1, got 0"),
        ({"max_steps": 1.5}, "max_steps must be a whole number"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps"),
        ({"num_attack_steps": 0}, "num_attack_steps"),
        ({"save_steps": 0}, "save_steps"),
        ({"save_total_limit": 0}, "save_total_limit"),
        ({"eval_steps": 0}, "eval_steps must be a whole number of at least 1"),
        ({"per_device_eval_batch_size": 0}, "per_device_eval_batch_size"),
        ({"report_to": ["wandb", "mlflow"]}, r"report_to must be of .*'none', got \['mlflow'\]"),
        ({"image_size": 0}, "image_size"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"max_broken_images": -1}, "max_broken_images"),
        ({"learning_rate": 0.0}, "learning_rate must be finite and above 0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate"),
        ({"learning_rate": 1e38}, r"learning_rate must be at most 1e\+37"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size"),
        ({"step_size": -0.1}, "step_size"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"invariance_weight": -1.0}, "invariance_weight and adversarial_weight"),
        ({"invariance_weight": math.nan}, "invariance_weight and adversarial_weight"),
        ({"invariance_weight": 0.0, "adversarial_weight": 0.0}, "not both 0"),
        ({"attack": "fgsm"}, r"attack must be one of \('paper', 'pgd'\), got 'fgsm'"),
        ({"attack_through": "all"}, "attack_through must be one of"),
        ({"mixed_precision": "fp16"}, "mixed_precision must be one of"),
        ({"resize": "crop"}, "resize must be one of"),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, "lr_scheduler_type must be one of"),
        ({"warmup_steps": 5}, "constant_with_warmup"),
        ({"resize": "processor", "image_size": 224}, "image_size=224 has no effect"),
    ],
)
def test_values_that_make_no_sense_are_errors(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        arguments(**kwargs)


@pytest.mark.parametrize(
    "name", ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]
)
def test_every_schedule_but_the_constant_one_takes_a_warmup(name: str) -> None:
    args = arguments(lr_scheduler_type=name, warmup_steps=0 if name == "constant" else 3)
    assert args.schedule_depends_on_max_steps == (not name.startswith("constant"))


@pytest.mark.parametrize(
    ("given", "stored"),
    [(True, True), ("True", True), ("true", True), (False, None), ("false", None), (None, None), ("x", "x")],
)
def test_resume_from_checkpoint(given: Any, stored: str | bool | None) -> None:
    assert arguments(resume_from_checkpoint=given).resume_from_checkpoint == stored
    if isinstance(given, str):
        _, _, args = parse_arguments([*REQUIRED, "--resume_from_checkpoint", given])
        assert args.resume_from_checkpoint == stored


@pytest.mark.parametrize(
    ("given", "stored"),
    [([], []), ("none", []), ("wandb", ["wandb"]), (["tensorboard", "trackio"], ["tensorboard", "trackio"])],
)
def test_report_to(given: str | list[str], stored: list[str]) -> None:
    assert arguments(report_to=given).trackers == stored
    words = [given] if isinstance(given, str) else given
    assert parse_arguments([*REQUIRED, *(["--report_to", *words] if words else [])])[2].trackers == stored
    assert arguments().trackers == []


def test_the_recipe_is_what_determines_the_tokens() -> None:
    plain = arguments(attack="pgd", seed=3).recipe()
    elsewhere = dataclasses.replace(
        arguments(attack="pgd", seed=3), output_dir="other", save_steps=7, disable_tqdm=True
    )
    assert plain == elsewhere.recipe()
    assert plain["eps"] == 4 / 255
    assert plain != arguments(attack="pgd", seed=4).recipe()
    assert "output_dir" not in plain


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"attack": "paper"}, 0.01),
        ({"attack": "pgd", "eps": 8 / 255, "num_attack_steps": 10}, 2 / 255),
        ({"attack": "pgd", "step_size": 0.5}, 0.5),
    ],
)
def test_the_recipe_says_the_step_size_that_the_attack_takes(kwargs: dict[str, Any], expected: float) -> None:
    assert arguments(**kwargs).recipe()["step_size"] == pytest.approx(expected)


# The command line


@pytest.mark.parametrize(
    "words",
    [["--eps", "8/255"], ["--eps=8/255"], ["--eps", repr(8 / 255)]],
    ids=["two words", "one word", "decimal"],
)
def test_fractions_are_numbers(words: list[str]) -> None:
    _, _, args = parse_arguments([*REQUIRED, "--attack", "pgd", "--step_size", "1/255", *words])
    assert args.eps == 8 / 255
    assert args.step_size == 1 / 255


def test_a_folder_that_looks_like_a_fraction_stays_a_folder() -> None:
    model_args, data_args, args = parse_arguments(
        ["--base_model", "1/2", "--dataset", "3/4", "--output_dir", "2026/11"]
    )
    assert (model_args.base_model, data_args.dataset, args.output_dir) == ("1/2", "3/4", "2026/11")


@pytest.mark.parametrize("word", ["8/0", "eight", "1/2/3", "/255"])
def test_what_is_no_number_is_an_error(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([*REQUIRED, "--attack", "pgd", "--eps", word])
    assert "--eps" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["--learning", "--lr", "--nonsense"])
def test_unknown_and_abbreviated_names_are_errors(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([*REQUIRED, word, "1"])
    assert word in capsys.readouterr().err


def test_out_of_range_values_are_errors_there_too() -> None:
    with pytest.raises(ValueError, match='attack="pgd"'):
        parse_arguments([*REQUIRED, "--eps", "8/255"])


def write_yaml(folder: Path, text: str) -> str:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_a_yaml_file_and_words_that_win_over_it(tmp_path: Path) -> None:
    file = write_yaml(
        tmp_path,
        "base_model: base\n"
        "dataset: data\n"
        "output_dir: -odd- folder\n"
        "attack: pgd\n"
        "eps: 8/255\n"
        "learning_rate: 5e-2\n"
        "streaming: true\n"
        "overwrite_output_dir: false\n"
        "max_grad_norm:\n"
        "max_steps: 7\n",
    )
    model_args, data_args, args = parse_arguments([file, "--max_steps", "9", "--learning_rate", "0.5"])
    assert model_args.base_model == "base"
    assert (data_args.dataset, data_args.streaming) == ("data", True)
    assert (args.output_dir, args.attack, args.eps) == ("-odd- folder", "pgd", 8 / 255)
    assert (args.max_steps, args.learning_rate) == (9, 0.5)
    assert args.overwrite_output_dir is False
    assert args.max_grad_norm is None
    assert parse_arguments([file])[2].max_steps == 7
    assert parse_arguments([file])[2].learning_rate == 0.05


def test_an_unknown_key_in_the_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments([write_yaml(tmp_path, "learning: 0.1\n"), *REQUIRED])
    assert "learning=0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold a mapping.*got list"),
        ("", "must hold a mapping.*got NoneType"),
        ("a: [1\n", "can't be read as YAML"),
        ("dataset:\n  name: x\n", "dataset must be a plain value, got a dict"),
        ("dataset: [x, y]\n", "dataset must be a plain value, got a list"),
    ],
)
def test_a_file_that_is_no_mapping_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_arguments([write_yaml(tmp_path, text), *REQUIRED])


def test_a_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml can't be read"):
        parse_arguments([str(tmp_path / "none.yaml"), *REQUIRED])


def test_help_names_every_argument(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        parse_arguments(["--help"], prog="robtok train")
    assert exit_info.value.code == 0
    text = capsys.readouterr().out
    assert "usage: robtok train" in text
    assert all(f"--{field.name}" in text for field in dataclasses.fields(RobustnessTokenTrainingArguments))


def test_from_base_kwargs_are_from_bases_own() -> None:
    model_args, _, _ = parse_arguments([*REQUIRED, "--base_model_revision", "abc", "--num_robustness_tokens", "3"])
    assert model_args.from_base_kwargs() == {
        "num_robustness_tokens": 3,
        "initializer_range": 0.01,
        "similarity_axis": "token",
        "revision": "abc",
    }


def test_a_preset_sets_what_the_user_does_not() -> None:
    model_args, _, args = parse_arguments([*REQUIRED, "--preset", "openclip", "--learning_rate", "0.5"])
    assert (args.max_steps, args.learning_rate, args.image_size) == (300, 0.5, 224)
    assert (model_args.feature_view, model_args.image_mean) == ("pooled", [0.485, 0.456, 0.406])
    assert model_args.from_base_kwargs()["image_std"] == [0.229, 0.224, 0.225]


@pytest.mark.parametrize(("model_type", "max_steps"), [("dinov2", 50), ("clip_vision_model", 300)])
def test_the_preset_paper_goes_by_the_family_of_the_base(model_type: str, max_steps: int, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    words = ["--base_model", str(tmp_path), *REQUIRED[2:], "--preset", "paper"]
    assert parse_arguments(words)[2].max_steps == max_steps


def test_an_unknown_preset_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of.*got 'papers'"):
        parse_arguments([*REQUIRED, "--preset", "papers"])


def test_lists_in_a_file(tmp_path: Path) -> None:
    model_args, _, _ = parse_arguments([write_yaml(tmp_path, "image_mean: [0.5, 0.4, 0.3]\n"), *REQUIRED])
    assert model_args.image_mean == [0.5, 0.4, 0.3]
