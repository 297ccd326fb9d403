"""The program `robtok`: what it loads, and how it ends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError

import robtok
import robustness_tokens
from robustness_tokens.cli import commands


ROOT = Path(__file__).parents[2]
HEAVY = ("matplotlib", "sklearn", "transformers.trainer", "transformers.pipelines")


def python(*words: str) -> tuple[subprocess.CompletedProcess[str], float]:
    """Runs Python on these words; returns what it did, and its seconds of processor time."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    before = os.times()
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True)
    after = os.times()
    seconds = after.children_user - before.children_user + after.children_system - before.children_system
    assert done.returncode == 0, done.stderr
    return done, seconds


def test_help_costs_less_than_importing_torch() -> None:
    torch_seconds = min(python("-c", "import torch")[1] for _ in range(2))
    runs = [python("-m", "robtok", "--help") for _ in range(2)]
    assert all(name in runs[0][0].stdout for name in robtok.COMMANDS)
    assert min(seconds for _, seconds in runs) < torch_seconds + 1


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import robtok; robtok._top_parser().format_help()", ("torch", "transformers", "robustness_tokens", *HEAVY)),
        (
            "import robustness_tokens",
            ("robustness_tokens.training", "robustness_tokens.evaluation", "datasets", "pandas", *HEAVY),
        ),
        ("from robustness_tokens.cli.commands import build_parser; build_parser('info')", HEAVY),
    ],
    ids=["help", "package", "command"],
)
def test_nothing_heavy_is_loaded_before_it_is_used(code: str, absent: tuple[str, ...]) -> None:
    done, _ = python("-c", f"import json, sys\n{code}\nprint(json.dumps(sorted(sys.modules)))")
    assert not set(absent) & set(json.loads(done.stdout.splitlines()[-1]))


def test_every_public_name_is_there() -> None:
    count_names = "print(len([getattr(r, name) for name in r.__all__]), len({*dir(r)} & {*r.__all__}))"
    done, _ = python("-c", f"import robustness_tokens as r; {count_names}")
    count = str(len(robustness_tokens.__all__))
    assert done.stdout.split() == [count, count]
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        robustness_tokens.nonsense  # noqa: B018


def test_robtok_alone_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        robtok.main([])
    assert exit_info.value.code == 0
    assert "usage: robtok" in capsys.readouterr().out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        robtok.main(["--version"])
    assert capsys.readouterr().out.strip() == robustness_tokens.__version__


def test_every_command_has_a_sentence() -> None:
    assert list(robtok.COMMANDS) == list(commands._COMMANDS)
    for name, sentence in robtok.COMMANDS.items():
        assert sentence in " ".join(commands.build_parser(name, sentence).format_help().split())


def malformed_json() -> json.JSONDecodeError:
    try:
        json.loads("{")
    except json.JSONDecodeError as exc:
        return exc
    raise AssertionError


WORDS = {
    **{name: ["--base_model", "b", "--dataset", "d", "--output_dir", "o"] for name in ("train", "attack", "sweep")},
    "evaluate": ["a", "--dataset", "d", "--output_dir", "o"],
    "info": ["a"],
    "import-tokens": ["f.pt", "o", "--base", "b"],
    "push": ["a", "u/n"],
    "merge": ["a", "o"],
}
ERRORS: list[tuple[Exception, str]] = [
    (ValueError("eps must be\n  in (0, 1]"), "eps must be in (0, 1]"),
    (FileNotFoundError(2, "No such file or directory", "x"), "No such file or directory"),
    (ImportError("needs matplotlib"), "needs matplotlib"),
    (FloatingPointError("the loss is nan"), "the loss is nan"),
    (RuntimeError("mat1 and mat2\nshapes cannot be multiplied"), "mat1 and mat2 shapes cannot be multiplied"),
    (torch.OutOfMemoryError("CUDA out of memory."), "CUDA out of memory."),
    (MemoryError(), "MemoryError: (ROBTOK_DEBUG=1 shows where)"),
    (yaml.YAMLError("mapping values are not allowed here"), "mapping values are not allowed here"),
    (malformed_json(), "Expecting property name"),
    (SafetensorError("Error while deserializing header"), "Error while deserializing header"),
    (DatasetNotFoundError("Dataset 'd' doesn't exist"), "Dataset 'd' doesn't exist"),
    (HFValidationError("Repo id must be"), "Repo id must be"),
    (KeyError("image"), "KeyError: 'image' (ROBTOK_DEBUG=1 shows where)"),
    (IndexError("list index out of range"), "IndexError: list index out of range (ROBTOK_DEBUG=1 shows where)"),
    (TypeError("unsupported operand"), "TypeError: unsupported operand"),
    (OverflowError("int too large"), "int too large"),
    (ValueError("no folder \x1b[31mred \u202eback"), r"no folder \x1b[31mred \u202eback"),
]


def raising(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setitem(commands._COMMANDS, name, commands._COMMANDS[name]._replace(run=run))


@pytest.mark.parametrize(("error", "expected"), ERRORS, ids=lambda value: type(value).__name__)
@pytest.mark.parametrize("name", robtok.COMMANDS)
def test_an_error_is_one_line(
    name: str, error: Exception, expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("ROBTOK_DEBUG", raising=False)
    raising(monkeypatch, name, error)
    with pytest.raises(SystemExit) as exit_info:
        robtok.main([name, *WORDS[name]])
    assert exit_info.value.code == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("robtok: ")
    assert expected in line


def test_the_traceback_is_there_for_whoever_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROBTOK_DEBUG", "1")
    raising(monkeypatch, "info", KeyError("image"))
    with pytest.raises(KeyError, match="image"):
        robtok.main(["info", "a"])


def test_an_interrupt_ends_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    raising(monkeypatch, "info", KeyboardInterrupt())
    with pytest.raises(SystemExit) as exit_info:
        robtok.main(["info", "a"])
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", robtok.COMMANDS)
@pytest.mark.parametrize("wrong", [["--nonsense", "1"], ["more", "and", "more"]], ids=["option", "word"])
def test_words_that_are_not_understood(name: str, wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        robtok.main([name, *WORDS[name], *wrong])
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert f"usage: robtok {name} " in error
    assert "unrecognized arguments" in error


@pytest.mark.parametrize("words", [["nonsense"], ["--nonsense"], ["trai"]])
def test_a_command_that_does_not_exist(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        robtok.main(words)
    assert exit_info.value.code == 2
    assert "usage: robtok" in capsys.readouterr().err
