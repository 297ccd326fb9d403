"""The command line, as a user types it, offline; in processes of its own where these can differ."""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model, Dinov2WithRegistersModel

import robtok
from robustness_tokens import RobustnessTokenModel, extract_tokens
from robustness_tokens.cli import commands
from robustness_tokens.cli.commands import run_command
from robustness_tokens.hub.adapter_folder import read_config
from robustness_tokens.report import Check
from tests.support.reports import report_on


ROOT = Path(__file__).parents[2]
ADAPTER_FILES = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny base and a folder of images."""
    folder = tmp_path_factory.mktemp("cli")
    config = Dinov2Config(image_size=28, patch_size=14, hidden_size=32, num_hidden_layers=2, num_attention_heads=2)
    Dinov2Model(config).save_pretrained(folder / "base")
    (folder / "images").mkdir()
    generator = np.random.default_rng(0)
    for index in range(12):
        pixels = generator.integers(0, 256, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
    return folder


def run(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["HF_HOME"] = str(cwd / "hf_home")
    return subprocess.run([sys.executable, *map(str, words)], cwd=cwd, env=environment, capture_output=True, text=True)


def arguments(work: Path, output: Path) -> list[str]:
    return [
        *("--base_model", str(work / "base"), "--dataset", str(work / "images"), "--output_dir", str(output)),
        *("--num_robustness_tokens", "3", "--max_steps", "2", "--per_device_train_batch_size", "4"),
        *("--attack", "pgd", "--eps", "8/255", "--num_attack_steps", "2"),
    ]


@pytest.mark.parametrize(
    "launcher",
    [
        ("accelerate.commands.launch", "--num_processes", "1"),
        ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    ],
    ids=["accelerate launch", "torchrun with two processes"],
)
def test_a_launcher_trains_from_end_to_end(
    work: Path, tmp_path: Path, launcher: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(work, tmp_path / "adapter")
    done = run("-m", *launcher, "-m", "robustness_tokens", "train", *words, cwd=work)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "adapter").iterdir() if path.is_file()} >= ADAPTER_FILES
    assert done.stdout.count("trainable params: 96") == 1, "the main process alone speaks"
    assert "without tokens" in done.stderr, "the progress bar shows the baseline"
    with (tmp_path / "adapter" / "logs" / "training_log.csv").open() as file:
        assert [row["step"] for row in csv.DictReader(file)] == ["1", "2"]

    robtok.main(["info", str(tmp_path / "adapter")])
    info = capsys.readouterr().out
    assert "3 tokens of width 32 at the input" in info
    assert "0.03137" in info, "eps 8/255, in pixels"


def test_train_command_reads_a_yaml_file_and_refuses_a_used_folder(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = arguments(work, tmp_path / "adapter")
    lines = [f"{name[2:]}: {value}" for name, value in zip(words[::2], words[1::2], strict=True)]
    (tmp_path / "run.yaml").write_text("\n".join(lines))
    command = ["train", str(tmp_path / "run.yaml"), "--max_steps", "1"]
    robtok.main(command)
    assert (read_config(tmp_path / "adapter").training or {})["max_steps"] == 1
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_info:
        robtok.main(command)
    assert exit_info.value.code == 1
    assert "overwrite_output_dir" in capsys.readouterr().err


@pytest.mark.parametrize(("eval_steps", "measured_at"), [(None, [2]), (1, [1, 2])])
def test_held_out_images_are_measured_at_the_end_at_least(
    work: Path, tmp_path: Path, eval_steps: int | None, measured_at: list[int]
) -> None:
    words = [*arguments(work, tmp_path / "run"), "--eval_dataset", str(work / "images"), "--eval_split", "train[:2]"]
    words += ["--disable_tqdm", "true"]
    if eval_steps is not None:
        words += ["--eval_steps", str(eval_steps)]
    run_command("train", words)
    with (tmp_path / "run" / "logs" / "eval_log.csv").open(newline="", encoding="utf-8") as file:
        assert [(int(row["step"]), int(row["eval_num_images"])) for row in csv.DictReader(file)] == [
            (step, 2) for step in measured_at
        ]


@pytest.mark.parametrize(
    ("command", "expected"),
    [("sweep", "eval_dataset has no meaning for a sweep"), ("train", "eval_steps=1 needs an eval_dataset")],
)
def test_what_to_measure_is_clear_before_anything_is_loaded(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, expected: str
) -> None:
    monkeypatch.setattr(RobustnessTokenModel, "from_base", lambda *_, **__: pytest.fail("loaded"))
    option = ["--eval_steps", "1"] if command == "train" else ["--eval_dataset", str(work / "images")]
    with pytest.raises(ValueError, match=expected):
        run_command(command, [*arguments(work, tmp_path / "run"), *option])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["info", "no/repo"], "no/repo"),
        (["train", "--base_model", "no/repo", "--dataset", "d", "--output_dir", "o"], "no/repo"),
        (["train", "--eps", "8/255", "--base_model", "b", "--dataset", "d", "--output_dir", "o"], "attack"),
    ],
)
def test_mistakes_end_with_a_message(
    words: list[str],
    expected: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        robtok.main(words)
    assert exit_info.value.code == 1
    assert expected in capsys.readouterr().err.splitlines()[-1]


def test_a_process_ends_with_a_message_not_a_traceback(tmp_path: Path) -> None:
    done = run("-m", "robustness_tokens", "info", "no/such/folder", cwd=tmp_path)
    assert done.returncode == 1
    assert "neither a local folder nor" in done.stderr
    assert "Traceback" not in done.stderr


def test_help_lists_the_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        robtok.main(["train", "--help"])
    assert exit_info.value.code == 0
    help_text = capsys.readouterr().out
    for name in ("--base_model", "--num_robustness_tokens", "--attack_through", "--overwrite_output_dir"):
        assert name in help_text


def test_published_tokens_come_in_and_a_plain_model_goes_out(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tokens = torch.randn(1, 3, 32)
    torch.save({"rtokens": tokens}, tmp_path / "published.pt")
    words = [str(tmp_path / "published.pt"), str(tmp_path / "adapter"), "--base", str(work / "base")]
    robtok.main(["import-tokens", *words])
    assert "3 tokens of width 32" in capsys.readouterr().out

    robtok.main(["merge", str(tmp_path / "adapter"), str(tmp_path / "plain")])
    assert "can attack through it" in caplog.text, "merging warns that the file publishes them"
    plain = Dinov2WithRegistersModel.from_pretrained(tmp_path / "plain")
    torch.testing.assert_close(extract_tokens(plain, num_robustness_tokens=3), tokens[0], rtol=0, atol=0)


@pytest.mark.parametrize("hidden", ["\nparameters     0", "\u061c", "\u200b", "\U000e0041"], ids=ascii)
def test_info_shows_what_an_adapter_hides(
    adapter_folder: Path, hidden: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config, printed = json.loads((adapter_folder / "config.json").read_text()), []
    for text in ("x", hidden):
        config |= {"base_model_name_or_path": f"base{text}", "training": {f"name{text}": f"value{text}"}}
        (adapter_folder / "config.json").write_text(json.dumps(config))
        check = Check(number=4, name=f"check{text}", passed=True, value=f"found{text}", explanation="z")
        report_on(adapter_folder, checks=[check]).save(adapter_folder)
        folder = adapter_folder.rename(adapter_folder.with_name(f"folder{text}"))
        robtok.main(["info", str(folder)])
        folder.rename(adapter_folder)
        printed.append(capsys.readouterr().out)
    assert len(printed[0].splitlines()) == len(printed[1].split("\n")) - 1, "no line of its own"
    for name in ("base", "name", "value", "check", "found", "folder"):
        assert f"{name}{ascii(hidden)[1:-1]}" in printed[1]


def test_warnings_are_printable() -> None:
    record = logging.LogRecord("x", logging.WARNING, "", 0, "%s is ignored:\n%s", ("a\x1b[31m", "b\u202e"), None)
    assert commands._LineFormatter().format(record) == "a\\x1b[31m is ignored:\nb\\u202e"
