"""Many trainings on the same pairs and the same base."""

import csv
import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors.torch import load_file, save_file

from robustness_tokens.cli.commands import run_command
from robustness_tokens.cli.parsing import CommandParser, DataArguments, ModelArguments
from robustness_tokens.data.adversarial_pairs import load_adversarial_pairs
from robustness_tokens.data.image_datasets import choose_rows
from robustness_tokens.hub.adapter_folder import load_adapter, read_config
from robustness_tokens.models.modeling import RobustnessTokenModel
from robustness_tokens.report import plots
from robustness_tokens.training import sweep, trainer
from robustness_tokens.training.arguments import RobustnessTokenTrainingArguments
from robustness_tokens.training.make_pairs import make_adversarial_pairs
from robustness_tokens.training.run_folder import EVAL_LOG_FILE, LOG_FILE, to_csv
from robustness_tokens.training.step import TrainingStep
from robustness_tokens.training.sweep import (
    CSV_FILE,
    FIGURE_FILE,
    PAIRS_FOLDER,
    SweepArguments,
    _folder_name,
    run_sweep,
)
from robustness_tokens.training.trainer import RobustnessTokenTrainer


SIDE, MAX_STEPS, BATCH, NUM_EVAL = 16, 3, 2, 4
GRID: dict[str, Any] = {
    "sweep_num_tokens": [1, 4],
    "sweep_learning_rates": [0.02],
    "sweep_seeds": [0, 1],
    "num_eval_pairs": NUM_EVAL,
}

BaseFactory = Callable[..., Any]
Rows = list[dict[str, float]]


def pictures(count: int = 20, *, seed: int = 11, side: int = SIDE) -> datasets.Dataset:
    pixels = np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    images = [Image.fromarray(one) for one in pixels]
    return datasets.Dataset.from_dict({"image": images}, features=datasets.Features({"image": datasets.Image()}))


def arguments(output_dir: Path, **kwargs: Any) -> RobustnessTokenTrainingArguments:
    settings = {"per_device_train_batch_size": BATCH, "max_steps": MAX_STEPS, "image_size": SIDE, "disable_tqdm": True}
    attack = {"attack": "pgd", "eps": 8 / 255, "num_attack_steps": 2}
    return RobustnessTokenTrainingArguments(output_dir=str(output_dir), **{**settings, **attack, **kwargs})


def new_model(base: Any, num_tokens: int = 1) -> RobustnessTokenModel:
    return RobustnessTokenModel.from_base(base, num_robustness_tokens=num_tokens)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Rows]:
    """Folder and rows of a sweep over two numbers of tokens and two seeds. Read only."""
    from tests.support.bases import build_base

    folder = tmp_path_factory.mktemp("sweep")
    return folder, run_sweep(new_model(build_base("dinov2")), arguments(folder), pictures(), SweepArguments(**GRID))


def test_the_folder_holds_an_adapter_per_combination(swept: tuple[Path, Rows]) -> None:
    folder, rows = swept
    members = {f"tokens-{count}_lr-0.02_seed-{seed}": count for count in (1, 4) for seed in (0, 1)}
    assert {path.name for path in folder.iterdir()} == {*members, CSV_FILE, FIGURE_FILE, PAIRS_FOLDER}
    assert [(row["num_robustness_tokens"], row["seed"]) for row in rows] == [(1, 0), (1, 1), (4, 0), (4, 1)]
    for name, count in members.items():
        config = read_config(folder / name)
        assert config.num_robustness_tokens == count
        assert config.training is not None
        assert config.training["dataset"]["num_images"] == MAX_STEPS * BATCH


def test_as_many_images_are_attacked_as_a_run_sees(swept: tuple[Path, Rows]) -> None:
    pairs = load_adversarial_pairs(swept[0] / PAIRS_FOLDER)
    assert pairs.stored["index"][:] == choose_rows(20, MAX_STEPS * BATCH + NUM_EVAL, seed=0)


def test_the_csv_holds_the_rows(swept: tuple[Path, Rows]) -> None:
    folder, rows = swept
    with (folder / CSV_FILE).open(newline="", encoding="utf-8") as file:
        read = [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]
    assert read == rows
    assert all(row["seconds_per_step"] > 0 for row in rows)
    assert len({row["baseline_cosine"] for row in rows}) == 1, "without tokens all are the same"
    assert len({row["adversarial_cosine"] for row in rows}) == 4


def test_a_combination_that_diverges_is_left_out_each_time(
    make_base: BaseFactory, swept: tuple[Path, Rows], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = load_adversarial_pairs(swept[0] / PAIRS_FOLDER)
    grid = {**GRID, "sweep_num_tokens": [4], "sweep_seeds": [0]}
    found = []
    for _ in range(2):
        caplog.clear()
        both = {**grid, "sweep_learning_rates": [1e30, 0.02]}  # the first gives tokens that overflow in the base
        rows = run_sweep(new_model(make_base("dinov2")), arguments(tmp_path), pairs, SweepArguments(**both))
        assert [row["learning_rate"] for row in rows] == [0.02]
        assert "goes on without tokens-4_lr-1e+30_seed-0" in caplog.text
        assert "leaves out members" not in caplog.text
        found.append({path.name for path in tmp_path.iterdir()})
    expected = {"tokens-4_lr-0.02_seed-0", "tokens-4_lr-1e+30_seed-0.diverged", CSV_FILE, FIGURE_FILE}
    assert found == [expected, expected]
    with pytest.raises(FloatingPointError, match="every training of the sweep diverged"):
        run_sweep(
            new_model(make_base("dinov2")),
            arguments(tmp_path / "b"),
            pairs,
            SweepArguments(**grid | {"sweep_learning_rates": [1e30]}),
        )


def test_a_combination_ends_as_a_training_on_the_same_pairs(
    swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path
) -> None:
    folder, rows = swept
    pairs = load_adversarial_pairs(folder / PAIRS_FOLDER)
    torch.manual_seed(1)
    trainer = RobustnessTokenTrainer(
        new_model(make_base("dinov2"), num_tokens=4),
        arguments(tmp_path, learning_rate=0.02, seed=1),
        pairs.select(range(MAX_STEPS * BATCH)),
    )
    trainer.train()
    adapter = load_adapter(folder / "tokens-4_lr-0.02_seed-1")
    assert torch.equal(adapter.tokens, trainer.model.robustness_tokens)

    assert rows[3]["train_adversarial_cosine"] == pytest.approx(
        trainer.log_history[-1]["adversarial_cosine"], abs=1e-6
    )
    items = [pairs[row] for row in range(MAX_STEPS * BATCH, len(pairs))]
    images, attacked = (
        trainer.normalizer(torch.stack([item[key] for item in items])) for key in ("images", "adversarial_images")
    )
    target = trainer.training_step.base_outputs(images)
    for pixel_values, measured in ((images, rows[3]["invariance_cosine"]), (attacked, rows[3]["adversarial_cosine"])):
        with torch.no_grad():
            features = trainer.model.get_features(pixel_values)
        # Along the tokens, as published.
        cosine = torch.nn.functional.cosine_similarity(features, target, dim=1).mean().item()
        assert measured == pytest.approx(cosine, abs=1e-5)


def test_a_sweep_goes_on_with_what_is_missing(
    swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(swept[0], tmp_path / "sweep"))
    shutil.rmtree(folder / "tokens-4_lr-0.02_seed-0")
    trained: list[str] = []
    real = RobustnessTokenTrainer.train

    def counted(self: RobustnessTokenTrainer) -> Any:
        trained.append(self.output_dir.name)
        return real(self)

    monkeypatch.setattr(RobustnessTokenTrainer, "train", counted)
    monkeypatch.setattr(TrainingStep, "attack", lambda *_, **__: pytest.fail("attacked"))
    rows = run_sweep(new_model(make_base("dinov2")), arguments(folder), pictures(), SweepArguments(**GRID))
    assert trained == ["tokens-4_lr-0.02_seed-0"]
    for row, expected in zip(rows, swept[1], strict=True):
        assert {**row, "seconds_per_step": 0} == {**expected, "seconds_per_step": 0}


def test_a_sweep_that_sigterm_ended_goes_on(
    swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = load_adversarial_pairs(swept[0] / PAIRS_FOLDER)
    grid = {**GRID, "sweep_num_tokens": [4], "sweep_seeds": [0]}
    steps: list[int] = []
    real = TrainingStep.accumulate_gradient

    def terminated(*args: Any, step: int, **kwargs: Any) -> dict[str, float]:
        steps.append(step)
        if steps == [0, 1]:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, step=step, **kwargs)

    monkeypatch.setattr(TrainingStep, "accumulate_gradient", terminated)
    with pytest.raises(SystemExit):
        run_sweep(new_model(make_base("dinov2")), arguments(tmp_path), pairs, SweepArguments(**grid))
    (row,) = run_sweep(new_model(make_base("dinov2")), arguments(tmp_path), pairs, SweepArguments(**grid))
    assert steps == [0, 1, 2]
    assert {**row, "seconds_per_step": 0} == {**swept[1][2], "seconds_per_step": 0}


def test_a_training_killed_before_it_saved_its_tokens_is_measured_and_saved(
    swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path
) -> None:
    pairs = load_adversarial_pairs(swept[0] / PAIRS_FOLDER)
    grid = SweepArguments(**{**GRID, "sweep_num_tokens": [4], "sweep_seeds": [0]})
    args = arguments(tmp_path, save_steps=1)
    (expected,) = run_sweep(new_model(make_base("dinov2")), args, pairs, grid)
    (member,) = tmp_path.glob("tokens-*")
    for name in ("config.json", "model.safetensors", EVAL_LOG_FILE):
        (member / name).unlink()
    assert run_sweep(new_model(make_base("dinov2")), args, pairs, grid) == [expected]


OTHER: dict[str, Any] = GRID | {"sweep_num_tokens": [2], "sweep_seeds": [0]}


def combinations(rows: Rows) -> list[tuple[float, float, float]]:
    return [(row["num_robustness_tokens"], row["learning_rate"], row["seed"]) for row in rows]


def test_other_combinations_are_added_to_those_before(
    swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(swept[0], tmp_path / "sweep"))
    drawn: list[Any] = []

    def draw(rows: Any) -> bytes:
        drawn.append(rows)
        return b"PNG"

    monkeypatch.setattr(sweep, "plot_sweep", draw)
    with monkeypatch.context() as patch:
        patch.setattr(RobustnessTokenTrainer, "train", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_sweep(new_model(make_base("dinov2")), arguments(folder), pictures(), SweepArguments(**OTHER))
    assert (folder / CSV_FILE).read_bytes() == (swept[0] / CSV_FILE).read_bytes(), "killed before it had a row"

    rows = run_sweep(new_model(make_base("dinov2")), arguments(folder), pictures(), SweepArguments(**OTHER))
    assert combinations(rows) == [(1, 0.02, 0), (1, 0.02, 1), (2, 0.02, 0), (4, 0.02, 0), (4, 0.02, 1)]
    assert [row for row in rows if row["num_robustness_tokens"] != 2] == swept[1]
    assert (folder / CSV_FILE).read_text(encoding="utf-8") == to_csv(rows)
    assert drawn[-1] == rows


def test_a_new_start_replaces_what_is_asked_for_and_keeps_the_rest(
    swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(swept[0], tmp_path / "sweep"))
    trained: list[str] = []
    real = RobustnessTokenTrainer.train

    def counted(self: RobustnessTokenTrainer) -> Any:
        trained.append(self.output_dir.name)
        return real(self)

    monkeypatch.setattr(RobustnessTokenTrainer, "train", counted)
    args = arguments(folder, overwrite_output_dir=True)
    rows = run_sweep(
        new_model(make_base("dinov2")), args, pictures(), SweepArguments(**OTHER | {"sweep_num_tokens": [4]})
    )
    assert trained == ["tokens-4_lr-0.02_seed-0"]
    assert combinations(rows) == combinations(swept[1])


def test_what_was_trained_by_another_recipe_is_left_out_and_said(
    swept: tuple[Path, Rows],
    make_base: BaseFactory,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = Path(shutil.copytree(swept[0], tmp_path / "sweep"))
    args = arguments(folder, invariance_weight=2.0)
    rows = run_sweep(new_model(make_base("dinov2")), args, pictures(), SweepArguments(**OTHER))
    assert combinations(rows) == [(2, 0.02, 0)]
    assert "tokens-1_lr-0.02_seed-0, tokens-1_lr-0.02_seed-1, tokens-4_lr-0.02_seed-0" in caplog.text


@pytest.mark.parametrize("changed", [{"seed": 12}, {"side": 2 * SIDE}], ids=["other images", "another size"])
def test_what_was_trained_on_other_pairs_is_trained_again(
    swept: tuple[Path, Rows],
    make_base: BaseFactory,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    changed: dict[str, int],
) -> None:
    folder = Path(shutil.copytree(swept[0], tmp_path / "sweep", ignore=shutil.ignore_patterns(PAIRS_FOLDER)))
    side = changed.get("side", SIDE)
    pairs = make_adversarial_pairs(
        new_model(make_base("dinov2")), arguments(tmp_path / "pairs", image_size=side), pictures(10, **changed)
    )
    rows = run_sweep(
        new_model(make_base("dinov2")), arguments(folder, image_size=side), pairs, SweepArguments(**OTHER)
    )
    assert combinations(rows) == [(2, 0.02, 0)]
    assert "tokens-1_lr-0.02_seed-0, tokens-1_lr-0.02_seed-1, tokens-4_lr-0.02_seed-0" in caplog.text
    with pytest.raises(ValueError, match="holds an adapter"):
        run_sweep(new_model(make_base("dinov2")), arguments(folder, image_size=side), pairs, SweepArguments(**GRID))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_processes", 2),
        ("image_size", 32),
        ("num_steps_done", MAX_STEPS - 1),
        ("eps", 4 / 255),
        ("previous", {"seed": 0}),
        ("feature_view", "cls"),
        ("initializer_range", 0.5),
        ("image_mean", [0.1, 0.1, 0.1]),
        ("base_model_fingerprint", {"layer": "0" * 64}),
        ("base_digest", "0" * 64),
        ("images_digest", "0" * 64),
    ],
)
def test_what_differs_in_the_config_is_no_finished_training(
    swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path, name: str, value: Any
) -> None:
    folder = Path(shutil.copytree(swept[0], tmp_path / "sweep"))
    path = folder / "tokens-1_lr-0.02_seed-0" / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    (config if name in config else config["training"])[name] = value
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ValueError, match=r"tokens-1_lr-0\.02_seed-0 holds an adapter"):
        run_sweep(new_model(make_base("dinov2")), arguments(folder), pictures(), SweepArguments(**GRID))


def test_tokens_that_break_in_the_last_step_are_left_out(
    swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path
) -> None:
    pairs = load_adversarial_pairs(swept[0] / PAIRS_FOLDER)
    grid = {**GRID, "sweep_num_tokens": [4], "sweep_seeds": [0], "sweep_learning_rates": [1e30, 0.02]}
    rows = run_sweep(new_model(make_base("dinov2")), arguments(tmp_path, max_steps=1), pairs, SweepArguments(**grid))
    assert [row["learning_rate"] for row in rows] == [0.02]
    assert (tmp_path / "tokens-4_lr-1e+30_seed-0.diverged").is_dir()


def test_cosines_that_are_not_finite_are_no_result(
    swept: tuple[Path, Rows],
    make_base: BaseFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pairs = load_adversarial_pairs(swept[0] / PAIRS_FOLDER)
    real = trainer.measure_held_out

    def measured(step: TrainingStep, *args: Any, **kwargs: Any) -> dict[str, float]:
        found = real(step, *args, **kwargs)
        return found | ({"eval_adversarial_cosine": math.nan} if step.model.config.num_robustness_tokens == 1 else {})

    monkeypatch.setattr(trainer, "measure_held_out", measured)
    grid = SweepArguments(**{**GRID, "sweep_seeds": [0]})
    rows = run_sweep(new_model(make_base("dinov2")), arguments(tmp_path), pairs, grid)
    assert [row["num_robustness_tokens"] for row in rows] == [4]
    assert "goes on without tokens-1_lr-0.02_seed-0" in caplog.text


@pytest.mark.parametrize("file", [LOG_FILE, EVAL_LOG_FILE])
def test_a_log_without_the_last_step_is_no_finished_training(
    swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path, file: str
) -> None:
    folder = Path(shutil.copytree(swept[0], tmp_path / "sweep"))
    log = folder / "tokens-1_lr-0.02_seed-0" / file
    log.write_text(log.read_text(encoding="utf-8").splitlines()[0] + "\n", encoding="utf-8")
    with pytest.raises(ValueError, match="seed-0 holds an adapter"):
        run_sweep(new_model(make_base("dinov2")), arguments(folder), pictures(), SweepArguments(**GRID))


def test_damaged_tokens_are_no_result(swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(swept[0], tmp_path / "sweep"))
    path = folder / "tokens-1_lr-0.02_seed-0" / "model.safetensors"
    tensors = {name: torch.full_like(value, torch.nan) for name, value in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="finite"):
        run_sweep(new_model(make_base("dinov2")), arguments(folder), pictures(), SweepArguments(**GRID))


def test_learning_rates_that_differ_little_have_folders_of_their_own(
    swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path
) -> None:
    close = (0.1, 0.1000000001)
    rows = run_sweep(
        new_model(make_base("dinov2")),
        arguments(tmp_path, attack=None, eps=None, num_attack_steps=None),
        swept[0] / PAIRS_FOLDER,
        SweepArguments(**OTHER | {"sweep_learning_rates": list(close)}),
    )
    assert [row["learning_rate"] for row in rows] == list(close)
    assert len(list(tmp_path.glob("tokens-*"))) == 2


@pytest.mark.parametrize(
    ("learning_rate", "name"),
    [
        (0.02, "0.02"),
        (1e-5, "1e-05"),
        (1e-3, "0.001"),
        (1.0, "1"),
        (1, "1"),
        (1e30, "1e+30"),
        (0.1, "0.1"),
        (0.10000000000000002, "0.10000000000000002"),
    ],
)
def test_the_folder_of_a_combination_names_its_learning_rate(learning_rate: float, name: str) -> None:
    assert _folder_name(4, learning_rate, 0) == f"tokens-4_lr-{name}_seed-0"
    assert float(name) == learning_rate


def test_a_missing_matplotlib_is_said_before_anything_is_attacked(
    make_base: BaseFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"robustness-tokens\[plots\]"):
        run_sweep(new_model(make_base("dinov2")), arguments(tmp_path), pictures(), SweepArguments(**GRID))
    assert list(tmp_path.iterdir()) == []


def test_a_sweep_with_other_settings_replaces_nothing_unasked(
    swept: tuple[Path, Rows], make_base: BaseFactory
) -> None:
    args = arguments(swept[0], invariance_weight=2.0)
    with pytest.raises(ValueError, match="overwrite_output_dir"):
        run_sweep(new_model(make_base("dinov2")), args, pictures(), SweepArguments(**GRID))


def test_an_adapter_without_its_log_is_not_taken_for_a_finished_training(
    swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(swept[0], tmp_path / "sweep"))
    shutil.rmtree(folder / "tokens-1_lr-0.02_seed-0" / "logs")
    with pytest.raises(ValueError, match="seed-0 holds an adapter"):
        run_sweep(new_model(make_base("dinov2")), arguments(folder), pictures(), SweepArguments(**GRID))


def test_measures_on_the_way_are_refused_before_anything_is_attacked(make_base: BaseFactory, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_steps has no meaning for a sweep"):
        run_sweep(
            new_model(make_base("dinov2")), arguments(tmp_path, eval_steps=2), pictures(), SweepArguments(**GRID)
        )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_pairs_is_taken_whoever_attacked(
    swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "make_adversarial_pairs", lambda *_, **__: pytest.fail("attacked"))
    loads: list[Any] = []
    monkeypatch.setattr(RobustnessTokenModel, "_load_base", lambda *args: loads.append(args))
    args = arguments(tmp_path, attack=None, eps=None, num_attack_steps=None)
    rows = run_sweep(new_model(make_base("dinov2")), args, swept[0] / PAIRS_FOLDER, SweepArguments(**GRID))
    assert [row["adversarial_cosine"] for row in rows] == [row["adversarial_cosine"] for row in swept[1]]
    assert loads == [], "one base serves all"


def test_too_few_pairs_are_refused(swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_eval_pairs=10 of 10 pairs"):
        run_sweep(
            new_model(make_base("dinov2")),
            arguments(tmp_path),
            swept[0] / PAIRS_FOLDER,
            SweepArguments(**GRID | {"num_eval_pairs": 10}),
        )


@pytest.mark.parametrize(
    "given",
    [
        {"sweep_num_tokens": []},
        {"sweep_num_tokens": [0, 1]},
        {"sweep_seeds": [1, 1]},
        {"sweep_seeds": [-1]},
        {"sweep_learning_rates": [-1e-3]},
        {"sweep_learning_rates": [0.0]},
        {"sweep_learning_rates": [float("nan")]},
        {"sweep_num_tokens": [2.5]},
        {"sweep_seeds": [0.5]},
        {"num_eval_pairs": 0},
    ],
)
def test_lists_that_make_no_sense_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(given))):
        SweepArguments(**given)


@pytest.mark.parametrize("from_file", [False, True])
def test_the_command_line_reads_lists(tmp_path: Path, from_file: bool) -> None:
    words = ["--base_model", "b", "--dataset", "d", "--output_dir", "o"]
    if from_file:
        (tmp_path / "run.yaml").write_text("sweep_num_tokens: [1, 2]\nsweep_learning_rates: [1/100, 1]\n")
        words = [str(tmp_path / "run.yaml"), *words]
    else:
        words += ["--sweep_num_tokens", "1", "2", "--sweep_learning_rates", "1/100", "1"]
    groups = (ModelArguments, DataArguments, RobustnessTokenTrainingArguments, SweepArguments)
    (*_, sweep_args), _ = CommandParser(groups).parse(words)
    assert sweep_args == SweepArguments(sweep_num_tokens=[1, 2], sweep_learning_rates=[0.01, 1.0])


def test_the_figure_shows_means_and_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(plots, "_png", figures.append)
    rows = [
        {
            "num_robustness_tokens": count,
            "learning_rate": learning_rate,
            "seed": seed,
            "invariance_cosine": 0.9,
            "adversarial_cosine": 0.5 + 0.001 * count + 0.1 * seed,
            "baseline_cosine": 0.25,
        }
        for count in (1, 10, 50)
        for learning_rate in (1e-3, 1e-2)
        for seed in (0, 1)
    ]
    plots.plot_sweep(rows)
    panels = figures[0].get_axes()
    assert [axes.get_title(loc="left") for axes in panels] == ["learning rate 0.001", "learning rate 0.01"]
    for axes in panels:
        assert axes.get_xlabel() == "number of tokens"
        assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "10", "50"]
        _, attacked = axes.containers
        assert list(attacked[0].get_ydata()) == pytest.approx([0.551, 0.56, 0.6])
        (bars,) = attacked[2]
        assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [
            pytest.approx([0.501 + 0.009 * place, 0.601 + 0.009 * place]) for place in (0, 1, 49 / 9)
        ]
    assert len({line.get_linestyle() for line in panels[0].lines if line.get_linestyle() != "None"}) == 3


def test_the_command_line_attacks_once_and_trains_many(
    base_folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures(12).save_to_disk(str(tmp_path / "images"))
    common = ["--base_model", str(base_folders["dinov2"]), "--image_size", "16", "--disable_tqdm", "true"]
    common += ["--max_steps", "2", "--per_device_train_batch_size", "4"]

    def robtok(command: str, dataset: str, output: str, *more: str) -> str:
        folders = ["--dataset", str(tmp_path / dataset), "--output_dir", str(tmp_path / output)]
        run_command(command, [*common, *folders, *more])
        return capsys.readouterr().out

    attacked = robtok("attack", "images", "pairs", "--attack", "pgd", "--eps", "8/255", "--num_attack_steps", "2")
    assert "12 pairs" in attacked
    assert "8/255; they reveal no tokens" in attacked
    assert load_adversarial_pairs(tmp_path / "pairs").info.attack["eps"] == 8 / 255

    robtok("train", "pairs", "run")
    training = read_config(tmp_path / "run").training or {}
    assert (training["attack"], training["eps"], training["num_attack_steps"]) == ("pgd", 8 / 255, 2)
    assert "adversarial_pairs" in training["dataset"]
    with pytest.raises(ValueError, match="attack='paper'"):
        robtok("train", "pairs", "other", "--attack", "paper")
    with pytest.raises(ValueError, match="not attacked yet"):
        robtok("attack", "pairs", "again")

    lists = ["--sweep_num_tokens", "1", "2", "--sweep_seeds", "0", "--num_eval_pairs", "4"]
    printed = robtok("sweep", "pairs", "sweep", *lists)
    assert (tmp_path / "sweep" / CSV_FILE).read_text(encoding="utf-8") in printed
    assert (tmp_path / "sweep" / FIGURE_FILE).stat().st_size > 10_000


def test_held_out_pairs_are_of_the_attack_of_the_training(
    swept: tuple[Path, Rows], make_base: BaseFactory, tmp_path: Path
) -> None:
    pairs = load_adversarial_pairs(swept[0] / PAIRS_FOLDER)
    unstated: dict[str, Any] = {"attack": None, "eps": None, "num_attack_steps": None}
    for changed, message in (({"eps": 4 / 255}, "eps=.*but the pairs were made"), (unstated, "of another attack")):
        args = arguments(tmp_path, eval_steps=1, **changed)
        with pytest.raises(ValueError, match=message):
            RobustnessTokenTrainer(new_model(make_base("dinov2")), args, pictures(), pairs)
