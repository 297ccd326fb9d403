from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from robustness_tokens import RobustnessTokenForImageClassification, RobustnessTokenModel
from robustness_tokens.cli.commands import evaluate, info
from robustness_tokens.cli.parsing import CommandParser, EvaluationCommandArguments
from robustness_tokens.hub import read_config
from robustness_tokens.hub.adapter_folder import load_adapter, write_adapter
from robustness_tokens.models.heads import ClassificationHead, save_head
from robustness_tokens.report.writing import RobustnessReport
from tests.support.bases import HIDDEN_SIZE


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four pictures, in two folders that are their classes."""
    folder = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for number in range(4):
        path = folder / "test" / f"class{number % 2}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    return folder


def read(*words: str | Path) -> EvaluationCommandArguments:
    (args,), _ = CommandParser((EvaluationCommandArguments,)).parse([str(word) for word in words])
    assert isinstance(args, EvaluationCommandArguments)
    return args


def arguments(pictures: Path, output_dir: Path, *more: str | Path) -> EvaluationCommandArguments:
    small = (
        "--num_images",
        "4",
        "--num_steps",
        "2",
        "--eps",
        "8/255",
        "--eps_sweep",
        "0",
        "--no_diagnostics",
        "--disable_tqdm",
    )
    levels = ("--knowledge", "base", "full", "--attacks", "feature_cosine:base", "cross_entropy")
    return read("--dataset", pictures, "--output_dir", output_dir, "--image_size", "16", *small, *levels, *more)


def test_words_become_arguments() -> None:
    args = read("--dataset", "d", "--output_dir", "o", "--eps", "4/255", "8/255", "--budget", "full")
    assert args.eps == [4 / 255, 8 / 255]
    assert (args.budget, args.split, args.task) == ("full", "test", None)
    assert (args.num_restarts, args.num_queries) == (None, None)
    assert args.knowledge == ["none", "base", "own_tokens", "full"]
    with pytest.raises(ValueError, match="knowledge must be a list of at least one of"):
        read("--dataset", "d", "--output_dir", "o", "--knowledge", "all")
    with pytest.raises(ValueError, match="needs head"):
        read("--dataset", "d", "--output_dir", "o", "--task", "segmentation")


def test_features_of_an_adapter(adapter_folder: Path, pictures: Path, tmp_path: Path) -> None:
    report = evaluate(adapter=str(adapter_folder), args=arguments(pictures, tmp_path))
    assert {result.metric for result in report.results} == {"cosine"}
    assert report.adapter == str(adapter_folder)
    assert report.dataset == {"name": pictures.name, "split": "test", "num_images": 4}
    assert RobustnessReport.load(tmp_path) == report


def test_a_report_is_bound_to_the_adapter_that_it_measured(
    adapter_folder: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = Path(shutil.copytree(adapter_folder, tmp_path / "other"))
    state = {name: tensor + 1 for name, tensor in load_adapter(other).state.items()}
    write_adapter(other, state, {"config.json": (other / "config.json").read_bytes()})
    files = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=r"other' holds another adapter than the evaluated one"):
        evaluate(adapter=str(adapter_folder), args=arguments(pictures, other))
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == files

    report = evaluate(adapter=str(adapter_folder), args=arguments(pictures, adapter_folder))
    assert load_adapter(adapter_folder).report == report
    info(str(adapter_folder))
    assert "evaluation" in capsys.readouterr().out
    shutil.copy(adapter_folder / "evaluation.json", other)
    assert load_adapter(other).report is None
    info(str(other))
    assert "evaluation     of another adapter, or by an older package" in capsys.readouterr().out


def test_classes_under_a_probe(adapter_folder: Path, pictures: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    fingerprint = read_config(adapter_folder).base_model_fingerprint
    save_head(ClassificationHead(2 * HIDDEN_SIZE, 2, base_model_fingerprint=fingerprint), tmp_path / "head")
    report = evaluate(adapter=str(adapter_folder), args=arguments(pictures, tmp_path, "--head", tmp_path / "head"))
    assert {result.metric for result in report.results} == {"cosine", "accuracy"}


def test_transfer_from_another_base(
    adapter_folder: Path, base_folders: dict[str, Path], pictures: Path, tmp_path: Path
) -> None:
    other = RobustnessTokenModel.from_base(base_folders["vit"], num_robustness_tokens=2)
    other.save_pretrained(tmp_path / "other")
    words = ("--surrogate", tmp_path / "other", "--knowledge", "none", "full")
    report = evaluate(adapter=str(adapter_folder), args=arguments(pictures, tmp_path / "out", *words))
    check = report.checks[2]
    assert check.number == 3
    assert check.passed is not None
    assert "transfer" in check.value
    with pytest.raises(ValueError, match="surrogate_head"):
        read("--dataset", "d", "--output_dir", "o", "--surrogate", "s", "--head", "h")


def test_classes_by_the_bases_own_head(classifier_folders: dict[str, Path], pictures: Path, tmp_path: Path) -> None:
    model = RobustnessTokenForImageClassification.from_base(classifier_folders["dinov2"], num_robustness_tokens=2)
    model.save_pretrained(tmp_path / "adapter")
    args = arguments(pictures, tmp_path / "out", "--task", "classification")
    report = evaluate(adapter=str(tmp_path / "adapter"), args=args)
    assert {result.metric for result in report.results} == {"cosine", "accuracy"}
    headless = RobustnessTokenModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(headless.robustness_tokens, model.robustness_tokens)
