import dataclasses
import inspect
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image
from transformers import (
    AutoConfig,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2ForImageClassification,
    PreTrainedModel,
)

from robustness_tokens import RobustnessTokenModel, RobustnessTokenTrainingArguments
from robustness_tokens.cli.parsing import ModelArguments
from robustness_tokens.configuration import GainsAndShifts
from robustness_tokens.training.arguments import PRESETS, resolve_preset


# The table "What the published code does" of the paper's implementation.
PUBLISHED: dict[str, dict[str, Any]] = {
    "dinov2": {"max_steps": 50, "feature_view": "cls_and_patches"},
    "deit3": {"max_steps": 300, "feature_view": "cls_and_patches"},
    "openclip": {"max_steps": 300, "feature_view": "pooled"},
}
TRAINING_FIELDS = {field.name for field in dataclasses.fields(RobustnessTokenTrainingArguments)}
MODEL_FIELDS = {field.name for field in dataclasses.fields(ModelArguments)}


def training_settings(preset: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in preset.items() if name in TRAINING_FIELDS}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_preset_is_the_published_recipe(name: str) -> None:
    assert resolve_preset(name) == {
        "num_robustness_tokens": 10,
        "initializer_range": 0.01,
        "similarity_axis": "token",
        "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225],
        "image_size": 224,
        "resize": "squash",
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "attack": "paper",
        "num_attack_steps": 30,
        **PUBLISHED[name],
    }


def test_the_presets_are_the_three_families_and_our_own() -> None:
    assert set(PRESETS) == {*PUBLISHED, "robust"}


def test_the_robust_preset_distils_through_tokens_of_every_layer(tmp_path: Path) -> None:
    preset = resolve_preset("robust")
    from_base = set(inspect.signature(RobustnessTokenModel.from_base).parameters)
    assert set(preset) <= TRAINING_FIELDS | from_base
    assert preset["token_depth"] == "all"
    assert preset["gains_and_shifts"] == list(get_args(GainsAndShifts))
    args = RobustnessTokenTrainingArguments(output_dir=str(tmp_path), **training_settings(preset))
    assert (args.objective, args.attack, args.attack_through) == ("distillation", "pgd", "tokens")
    assert resolve_preset("robust")["gains_and_shifts"] is not preset["gains_and_shifts"]


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_setting_is_an_argument_and_reaches_it(name: str, tmp_path: Any) -> None:
    preset = resolve_preset(name)
    assert set(preset) <= TRAINING_FIELDS | MODEL_FIELDS | set(
        inspect.signature(RobustnessTokenModel.from_base).parameters
    )
    args = RobustnessTokenTrainingArguments(output_dir=str(tmp_path), **training_settings(preset))
    assert args.max_steps == PUBLISHED[name]["max_steps"]
    # What a preset leaves alone is the paper's by default; it leaves alone what depends on the attack.
    assert (args.step_size, args.eps, args.attack_through) == (0.01, None, "base")
    assert (args.lr_scheduler_type, args.warmup_steps, args.max_grad_norm, args.seed) == ("constant", 0, None, 0)
    assert (args.invariance_weight, args.adversarial_weight) == (1.0, 1.0)


def test_another_attack_laid_over_a_preset_is_accepted(tmp_path: Any) -> None:
    settings = {**training_settings(resolve_preset("dinov2")), "attack": "pgd"}
    args = RobustnessTokenTrainingArguments(output_dir=str(tmp_path), **settings)
    assert (args.eps, args.step_size) == (4 / 255, None)


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("dinov2", "dinov2"),
        ("dinov2_with_registers", "dinov2"),
        ("timm_wrapper", "deit3"),
        ("clip", "openclip"),
        ("clip_vision_model", "openclip"),
    ],
)
def test_paper_picks_by_family(model_type: str, name: str) -> None:
    assert resolve_preset("paper", model_type) == resolve_preset(name)


def test_an_explicit_preset_goes_before_the_family() -> None:
    assert resolve_preset("deit3", "dinov2") == resolve_preset("deit3")


@pytest.mark.parametrize("model_type", ["vit", "siglip", None])
def test_paper_refuses_a_family_it_has_no_recipe_for(model_type: str | None) -> None:
    with pytest.raises(ValueError, match=rf"no recipe for model_type={model_type!r}.*'deit3', 'dinov2', .*'openclip'"):
        resolve_preset("paper", model_type)


def test_an_unknown_preset_is_an_error_that_lists_them() -> None:
    with pytest.raises(ValueError, match=r"preset must be one of .*'paper', 'dinov2', 'deit3', 'openclip'.*'dino'"):
        resolve_preset("dino")


def test_a_resolved_preset_is_a_copy() -> None:
    changed = resolve_preset("openclip")
    changed["max_steps"] = 1
    changed["image_mean"][0] = 9.0
    assert resolve_preset("openclip")["max_steps"] == 300
    assert resolve_preset("deit3")["image_mean"] == [0.485, 0.456, 0.406]


SCRIPT = Path(__file__).parents[2] / "examples" / "reproduce_paper.py"
CONFIGS = SCRIPT.parent / "paper_backbones"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_the_table_has_every_backbone_with_the_preset_of_its_family(script: dict[str, Any]) -> None:
    rows = {row.name: row for row in script["ROWS"]}
    assert set(rows) == {path.stem for path in CONFIGS.glob("*.json")}
    for name, row in rows.items():
        model_type = AutoConfig.from_pretrained(CONFIGS / f"{name}.json").model_type
        assert resolve_preset(row.preset) == resolve_preset("paper", model_type)
    # Of the 16, DeiT-III small and OpenCLIP B/32 come with the code, but not in the paper.
    assert {name for name, row in rows.items() if not row.published} == {"deit3-small", "openclip-base-32"}


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("dinov2-small", "80.0 -> 78.5, 41.0 -> 40.6, 0.09 -> 0.93, 0.0 -> 31.9, 2.8 -> 24.6"),
        ("dinov2-giant", "85.2 -> 85.6, 46.6 -> 47.2, 0.12 -> 0.89, 0.3 -> 63.1, 4.7 -> 23.3"),
        ("dinov2-with-registers-large", "86.1 -> 85.9, 46.6 -> 46.7, 0.03 -> 0.83, 0.6 -> 58.7, 4.6 -> 16.2"),
        ("deit3-base", "- -> 0.74"),
        ("openclip-base-16", "-0.02 -> 0.86"),
        ("openclip-base-32", "-"),
    ],
)
def test_the_table_shows_the_published_numbers(script: dict[str, Any], name: str, published: str) -> None:
    settings = script["Settings"]("imagenet", "train", "validation", 8, False, None)
    (row,) = (row for row in script["ROWS"] if row.name == name)
    lines = script["render_table"]((row,), {}, settings).splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert ", ".join(line[6] for line in cells) == published
    assert {line[7] for line in cells} == {"-"}
    assert {line[4] for line in cells} == {"50" if name.startswith("dinov2") else "300"}


def reproduce(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment.pop("HF_HUB_CACHE", None)
    command = [sys.executable, str(SCRIPT), "--output", str(tmp_path / "out"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_without_weights_and_data_it_says_what_it_lacks(tmp_path: Path) -> None:
    done = reproduce(tmp_path, "--rows", "dinov2-small", "openclip-base-16")
    assert done.returncode == 1
    assert "| 0.09 -> 0.93 | - |" in done.stdout
    assert "| -0.02 -> 0.86 | - |" in done.stdout
    assert "dinov2-small was not run, missing:" in done.stderr
    for lacking in (
        "the base facebook/dinov2-small: ",
        "the head facebook/dinov2-small-imagenet1k-1-layer: ",
        "the base laion/CLIP-ViT-B-16-laion2B-s34B-b88K: ",
        "the data: ",
    ):
        assert lacking in done.stderr
    assert "Traceback" not in done.stderr


def cache_as(model: PreTrainedModel, repo_id: str, home: Path) -> None:
    """Puts a model where the Hub's cache would have it."""
    repo = home / "hub" / f"models--{repo_id.replace('/', '--')}"
    commit = "0123456789" * 4
    model.save_pretrained(repo / "snapshots" / commit)
    BitImageProcessorPil(size={"height": 224, "width": 224}).save_pretrained(repo / "snapshots" / commit)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)


@pytest.mark.slow
def test_a_row_is_trained_measured_and_kept(tmp_path: Path) -> None:
    size: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 2}
    classifier = Dinov2ForImageClassification(Dinov2Config(patch_size=56, image_size=224, **size))
    cache_as(classifier.dinov2, "facebook/dinov2-small", tmp_path / "hf")
    cache_as(classifier, "facebook/dinov2-small-imagenet1k-1-layer", tmp_path / "hf")
    random = np.random.default_rng(0)
    for split in ("train", "validation"):
        for label in ("ape", "bee"):
            (tmp_path / "data" / split / label).mkdir(parents=True)
            for i in range(6):
                picture = Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8))
                picture.save(tmp_path / "data" / split / label / f"{i}.png")
    words = ("--rows", "dinov2-small", "--dataset", str(tmp_path / "data"), "--max_steps", "2", "--num_images", "10")

    done = reproduce(tmp_path, *words)
    assert done.returncode == 0, done.stderr
    ours = json.loads((tmp_path / "out" / "dinov2-small" / "result.json").read_text())["ours"]
    assert set(ours) == {"features attacked (cosine)", "classes clean (%)", "classes attacked (%)"}
    for metric, pair in ours.items():
        assert all(
            (-1 if "cosine" in metric else 0) <= number <= (1 if "cosine" in metric else 100) for number in pair
        )
    without, with_tokens = ours["features attacked (cosine)"]
    assert without != with_tokens
    assert f"| 0.09 -> 0.93 | {without:.2f} -> {with_tokens:.2f} |" in done.stdout
    assert (tmp_path / "out" / "table.md").read_text() == done.stdout

    kept = (tmp_path / "out" / "dinov2-small" / "result.json").stat().st_mtime_ns
    again = reproduce(tmp_path, *words)
    assert (again.returncode, again.stdout) == (0, done.stdout)
    assert (tmp_path / "out" / "dinov2-small" / "result.json").stat().st_mtime_ns == kept

    other = reproduce(tmp_path, *words[:-1], "12")
    assert other.returncode == 2
    assert "holds results of other settings" in other.stderr
