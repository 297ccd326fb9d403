"""Runs the quickstart's longer scripts to their end, on few images and for few steps."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from robustness_tokens import RobustnessTokenModel, load_image_dataset


QUICKSTART = Path(__file__).parents[2] / "examples" / "quickstart"
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("data")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with 2,100 training images, the last 2,000 of which the scripts hold out, and test images."""
    folder = tmp_path_factory.mktemp("data")
    for split, size in (("train", 2100), ("test", 300)):
        images = load_image_dataset(QUICKSTART / "data", split=split).select(range(size))
        images.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def run(script: str, *words: str | Path) -> str:
    """Runs a script; returns what it printed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(QUICKSTART / script), *map(str, words)]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr[-2000:]
    return found.stdout


def test_the_search_goes_on_where_it_stopped(data: Path, tmp_path: Path) -> None:
    words = ("--data", data, "--output", tmp_path, "--max_steps", "2", "--num_images", "10", "--variants")
    run("trade_off.py", *words, "norm alone")
    first = (tmp_path / "trade_off.csv").read_text()
    printed = run("trade_off.py", *words, "norm alone", "bias alone")
    rows = list(csv.DictReader((tmp_path / "trade_off.csv").read_text().splitlines()))
    assert (tmp_path / "trade_off.csv").read_text().startswith(first)
    assert [row["variant"] for row in rows] == ["norm alone", "bias alone"]
    assert printed.count("'variant'") == 1, "a finished row is not measured again"
    assert len({row["settings"] for row in rows}) == 2
    assert (tmp_path / "trade_off.png").stat().st_size > 10_000
    folder = next(tmp_path.glob("norm_alone-*"))
    run("trade_off.py", *words, "norm alone", "--num_images", "12", "--adapters", f"the same={folder}")
    rows = list(csv.DictReader((tmp_path / "trade_off.csv").read_text().splitlines()))
    assert [row["variant"] for row in rows] == ["norm alone", "bias alone", "norm alone", "the same"]
    assert rows[2]["white_box"] == rows[3]["white_box"]
    (tmp_path / "trade_off.csv").write_text("way,clean\nnorm alone,0.9\n")
    with pytest.raises(AssertionError, match="has other columns"):
        run("trade_off.py", *words, "norm alone")


@pytest.mark.parametrize("word", ["other", "other=nowhere", "robust=examples/quickstart/robust-adapter"])
def test_what_is_no_other_adapter_is_refused(word: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="expected a new name"):
        run("trade_off.py", "--data", data, "--output", tmp_path, "--variants", "--adapters", word)


def test_the_ceiling_is_trained_at_the_best_learning_rate(data: Path, tmp_path: Path) -> None:
    words = ("--data", data, "--output", tmp_path, "--search_steps", "2", "--max_steps", "3", "--num_images", "10")
    printed = run("train_ceiling.py", *words, "--learning_rates", "1e-3", "3e-4")
    found = {folder.name: json.loads((folder / "accuracies.json").read_text()) for folder in tmp_path.iterdir()}
    best = max(("0.001", "0.0003"), key=lambda rate: found[f"2_steps_{rate}"]["white_box"])
    assert found.keys() == {"2_steps_0.001", "2_steps_0.0003", f"3_steps_{best}"}
    adapter = RobustnessTokenModel.from_pretrained(tmp_path / f"3_steps_{best}" / "adapter")
    assert all(not tensor.any() for tensor in adapter.injector.state.values()), "the adapter changes nothing"
    assert run("train_ceiling.py", *words, "--learning_rates", "1e-3", "3e-4").splitlines()[-3:] == [
        line for line in printed.splitlines() if line.startswith(str(tmp_path))
    ]


def test_new_heads_read_features_with_and_without_tokens(data: Path) -> None:
    printed = run(
        "new_heads.py",
        *(QUICKSTART / "robust-adapter", "--data", data, "--num_training_images", "200", "--num_images", "10"),
        *("--attacks", "single_step", "--eps", "16/255"),
    )
    rows = re.findall(
        r"^(linear|nearest neighbours), (with|without) tokens +([\d.]+) +([\d.]+)$", printed, re.MULTILINE
    )
    assert len(rows) == 4
    assert all(0 <= float(attacked) <= float(clean) <= 1 for *_, clean, attacked in rows)


def test_what_lies_beyond_the_training_is_measured(data: Path) -> None:
    printed = run("beyond.py", QUICKSTART / "robust-adapter", "--data", data, "--num_images", "10", "--num_steps", "2")
    rows = re.findall(r"^(.{40}) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    assert len(rows) == 15
    clean = [float(value) for value in rows[0][1:]]
    assert all(0 <= float(value) <= 1 for _, *values in rows for value in values)
    attacked = [row for row in rows if row[0].startswith(("L-inf", "L2"))]
    assert len(attacked) == 7
    for _, *values in attacked:
        assert all(float(value) <= before for value, before in zip(values, clean, strict=True))
    assert float(rows[-1][1]) < clean[0], "APGD changes classes of the base even in two steps"
