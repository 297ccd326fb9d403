import dataclasses
import math
from typing import Any

import pytest

from robustness_tokens.training.arguments import RobustnessTokenTrainingArguments
from tests.support.command_line import parse_arguments


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
        ({"report_to": ["wandb", "mlflow"]}, r"report_to must be among .*'none', got \['mlflow'\]"),
        ({"image_size": 0}, "image_size"),
        ({"seed": -1}, "seed must be a whole number of at least 0"),
        ({"max_broken_images": -1}, "max_broken_images"),
        ({"learning_rate": 0.0}, "learning_rate must be above 0"),
        ({"learning_rate": math.nan}, "learning_rate"),
        ({"learning_rate": math.inf}, "learning_rate must be a finite number"),
        ({"learning_rate": "0.1"}, "learning_rate must be a finite number, got '0.1'"),
        ({"lr_scheduler_type": 3}, "lr_scheduler_type must be a text"),
        ({"onednn": 1}, "onednn must be true or false, got 1"),
        ({"learning_rate": 1e38}, r"learning_rate must be at most 1e\+37"),
        ({"shuffle_buffer_size": 0}, "shuffle_buffer_size"),
        ({"step_size": -0.1}, "step_size"),
        ({"max_grad_norm": 0.0}, "max_grad_norm"),
        ({"invariance_weight": -1.0}, "invariance_weight and adversarial_weight"),
        ({"invariance_weight": math.nan}, "invariance_weight must be a finite number"),
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
