import csv
import math
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from accelerate import tracking
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]
from torch import Tensor
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from robustness_tokens.attacks.objectives import cosine_similarity
from robustness_tokens.cli.parsing import load_eval_dataset
from robustness_tokens.training.checkpoints import list_checkpoints
from robustness_tokens.training.run_folder import EVAL_LOG_COLUMNS, EVAL_LOG_FILE
from robustness_tokens.training.trainer import RobustnessTokenTrainer
from tests.support.command_line import parse_arguments
from tests.support.training_runs import SIDE, build_trainer, images, tokens_of


Make = Callable[..., RobustnessTokenTrainer]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(name, **arguments)`: a trainer with new, always equal tokens on a tiny DINOv2."""

    def build(name: str = "run", **kwargs: Any) -> RobustnessTokenTrainer:
        return build_trainer(tmp_path / name, **{"max_steps": 4, **kwargs})

    return build


# Callbacks


class Recorder(TrainerCallback):
    """Notes every event with its step."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.kwargs: dict[str, dict[str, Any]] = {}

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.events.append((name.removeprefix("on_"), state.global_step))
            self.kwargs[name.removeprefix("on_")] = kwargs

        return note


def test_the_events_come_in_their_order(make: Make) -> None:
    recorder = Recorder()
    trainer = make(callbacks=[recorder], max_steps=3, logging_steps=2, save_steps=2, eval_steps=2, eval_images=2)
    trainer.train()
    assert recorder.events == [
        ("train_begin", 0),
        ("step_begin", 0),
        ("step_end", 1),
        ("step_begin", 1),
        ("step_end", 2),
        ("log", 2),
        ("log", 2),
        ("evaluate", 2),
        ("save", 2),
        ("step_begin", 2),
        ("step_end", 3),
        ("log", 3),
        ("log", 3),
        ("evaluate", 3),
        ("train_end", 3),
    ]
    assert recorder.kwargs["step_end"]["model"] is trainer.model
    assert recorder.kwargs["step_end"]["optimizer"].param_groups[0]["lr"] == 0.02
    assert recorder.kwargs["evaluate"]["metrics"] == trainer.eval_history[-1]
    assert trainer.state.log_history == [
        trainer.log_history[0],
        trainer.eval_history[0],
        trainer.log_history[1],
        trainer.eval_history[1],
    ]


class Decide(TrainerCallback):
    """Sets a flag of the control after a step."""

    def __init__(self, flag: str, step: int) -> None:
        self.flag, self.step = flag, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == self.step:
            setattr(control, self.flag, True)
        return control


def test_a_callback_that_stops_the_training_before_its_first_step_measures_nothing(make: Make) -> None:
    stop = TrainerCallback()
    stop.on_train_begin = lambda *args, **_: setattr(args[2], "should_training_stop", True)  # type: ignore[method-assign]
    trainer = make(max_steps=3, eval_steps=1, eval_images=2, callbacks=[stop])
    trainer.train()
    assert (trainer.state.global_step, trainer.eval_history) == (0, [])


def test_a_callback_stops_the_training(make: Make) -> None:
    expected = make("short", max_steps=2)
    expected.train()
    trainer = make("long", max_steps=9, callbacks=[Decide("should_training_stop", 2)])
    assert trainer.train().global_step == 2
    assert torch.equal(tokens_of(trainer), tokens_of(expected))
    assert trainer.model.config.training is not None
    assert trainer.model.config.training["num_steps_done"] == 2


@pytest.mark.parametrize(
    ("flag", "steps"), [("should_save", [3]), ("should_log", [2, 3, 4]), ("should_evaluate", [3])]
)
def test_a_callback_saves_logs_and_measures(make: Make, flag: str, steps: list[int]) -> None:
    trainer = make(logging_steps=2, eval_images=2, callbacks=[Decide(flag, 3)])
    trainer.train()
    found = {
        "should_save": [step for step, _ in list_checkpoints(trainer.output_dir)],
        "should_log": [row["step"] for row in trainer.log_history],
        "should_evaluate": [row["step"] for row in trainer.eval_history],
    }
    assert found[flag] == steps


class StopAfter(TrainerCallback, ExportableState):
    """Stops after `count` evaluations, including those before a resume."""

    def __init__(self, count: int) -> None:
        self.count, self.losses = count, list[float]()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.losses.append(kwargs["metrics"]["eval_loss"])
        control.should_training_stop |= len(self.losses) >= self.count

    def state(self) -> dict[str, Any]:
        return {"args": {"count": self.count}, "attributes": {"losses": self.losses}}


def test_the_state_of_a_callback_is_resumed(make: Make) -> None:
    settings: dict[str, Any] = {"max_steps": 9, "eval_steps": 1, "eval_images": 2, "save_steps": 1}
    whole = make("whole", callbacks=[StopAfter(4)], **settings)
    assert whole.train().global_step == 4
    make("cut", callbacks=[StopAfter(4), Decide("should_training_stop", 2)], **settings).train()
    resumed = make("cut", callbacks=[StopAfter(4)], resume_from_checkpoint=True, **settings)
    assert resumed.train().global_step == 4
    assert torch.equal(tokens_of(resumed), tokens_of(whole))
    assert resumed.eval_history == whole.eval_history


def test_other_callbacks_than_before_are_said(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"eval_steps": 1, "eval_images": 2, "save_steps": 2}
    make(callbacks=[StopAfter(9)], **settings).train()
    make(resume_from_checkpoint=True, **settings).train()
    assert "holds the state of a StopAfter, which is not among the callbacks" in caplog.text


def test_a_callback_of_transformers_works(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    make(callbacks=[PrinterCallback], max_steps=2).train()
    assert capsys.readouterr().out.count("'adversarial_cosine': ") == 2


def test_what_is_no_callback_is_refused(make: Make) -> None:
    with pytest.raises(ValueError, match=r"callbacks has a dict, expected a transformers\.TrainerCallback"):
        make(callbacks=[{}])


# Held-out images


def independent(trainer: RobustnessTokenTrainer, count: int, *, through_tokens: bool) -> list[float]:
    step = trainer.training_step
    rows = []
    for index, item in enumerate(images(count, seed=5)):
        image = item["images"][None]
        clean = trainer.normalizer(image)
        target = step.base_outputs(clean)
        attacked = step.attack(image, target, step=0, index=torch.tensor([index]), through_tokens=through_tokens)
        with torch.no_grad():
            cosines = [
                cosine_similarity(features, target, similarity_axis="token").item()
                for features in (step.outputs(clean), step.outputs(attacked), step.base_outputs(attacked))
            ]
        rows.append([-cosines[0] - cosines[1], *cosines])
    return torch.tensor(rows).mean(dim=0).tolist()


@pytest.mark.parametrize("through", ["base", "tokens", "both"])
def test_the_measure_is_the_mean_over_the_images(make: Make, through: str) -> None:
    trainer = make(eval_images=5, per_device_eval_batch_size=2, attack_through=through, max_steps=2)
    trainer.train()
    noise = torch.get_rng_state()
    found = trainer.evaluate()
    assert torch.equal(torch.get_rng_state(), noise)
    routes = {"base": [False], "tokens": [True], "both": [False, True]}[through]
    rows = torch.tensor([independent(trainer, 5, through_tokens=route) for route in routes])
    *means, _ = rows.mean(dim=0).tolist()
    baseline = math.nan if through == "tokens" else rows[0, -1].item()  # of the attack on the base alone
    assert list(found.values()) == pytest.approx([*means, baseline, 5], abs=1e-6, nan_ok=True)
    assert list(found) == list(EVAL_LOG_COLUMNS[1:])
    assert trainer.evaluate() == pytest.approx(found, abs=0, nan_ok=True)


def test_measuring_changes_nothing_in_the_training(make: Make) -> None:
    plain, measured = make("plain"), make("measured", eval_steps=1, eval_images=3)
    plain.train()
    measured.train()
    assert torch.equal(tokens_of(plain), tokens_of(measured))


def test_the_log_of_the_measures(make: Make) -> None:
    trainer = make(max_steps=5, eval_steps=2, eval_images=3)
    trainer.train()
    with (trainer.output_dir / EVAL_LOG_FILE).open(newline="", encoding="utf-8") as file:
        rows = [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]
    assert rows == trainer.eval_history
    assert [row["step"] for row in rows] == [2, 4, 5]
    assert len({row["eval_baseline_cosine"] for row in rows}) == 1  # without tokens, nothing changes
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]


def test_held_out_images_that_can_not_be_measured_on_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="eval_steps=2 needs an eval_dataset"):
        make(eval_steps=2)
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        make().evaluate()
    trainer = make()
    stream = datasets.Dataset.from_dict({"x": [1]}).to_iterable_dataset()
    other_size = [{"images": torch.zeros(3, SIDE, 2 * SIDE)}]
    for dataset, message in (
        (stream, "eval_dataset is a stream"),
        ([], "eval_dataset can't be used: .*no rows"),
        ("pairs", "eval_dataset is a str, expected a dataset of images"),
        (other_size, r"eval_dataset has images of \(16, 32\) pixels, those to train on have \(16, 16\)"),
    ):
        with pytest.raises(ValueError, match=message):
            RobustnessTokenTrainer(trainer.model, trainer.args, images(4), dataset)


def test_held_out_images_are_measured_with_the_attention_of_the_training(make: Make) -> None:
    trainer = make(eval_images=2, train_attn_implementation="eager")
    base: Any = trainer.model.get_base_model()
    seen = []
    hook = base.register_forward_hook(lambda *_: seen.append(base.config._attn_implementation))
    assert base.config._attn_implementation == "sdpa"
    trainer.evaluate()
    hook.remove()
    assert set(seen) == {"eager"}


def test_the_command_line_names_held_out_images(tmp_path: Path) -> None:
    words = ["--base_model", "base", "--dataset", "data", "--output_dir", "out"]
    assert load_eval_dataset(parse_arguments(words)[1]) is None
    table = datasets.DatasetDict({"test": datasets.Dataset.from_dict({"x": [1, 2]})})
    table.save_to_disk(str(tmp_path / "data"))
    data_args = parse_arguments([*words, "--eval_dataset", str(tmp_path / "data")])[1]
    assert load_eval_dataset(data_args)["x"] == [1, 2]
    with pytest.raises(ValueError, match="split='other' is not in"):
        load_eval_dataset(
            parse_arguments([*words, "--eval_dataset", str(tmp_path / "data"), "--eval_split", "other"])[1]
        )


# Trackers


def test_tensorboard_gets_the_log_and_no_token(make: Make) -> None:
    trainer = make(report_to="tensorboard", eval_steps=2, eval_images=2)
    trainer.train()
    events = EventAccumulator(str(trainer.output_dir / "logs" / "robustness_tokens"))
    events.Reload()
    tags = events.Tags()
    assert set(tags["scalars"]) == {*trainer.log_history[0], *trainer.eval_history[0]} - {"step"}
    assert tags["tensors"] == tags["images"] == tags["histograms"] == []
    for name, history in (("adversarial_cosine", trainer.log_history), ("eval_loss", trainer.eval_history)):
        found = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in found] == [row["step"] for row in history]
        assert [value for _, value in found] == pytest.approx([row[name] for row in history], abs=1e-6)


class Terminate(TrainerCallback):
    """Sends SIGTERM to its own process."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def fake_trackers(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Installs fake packages wandb and trackio; returns the calls that each receives."""
    given: dict[str, list[Any]] = {}
    for name in ("wandb", "trackio"):
        calls: list[Any] = []
        given[name] = calls
        module: Any = ModuleType(name)
        run = SimpleNamespace(
            log=lambda values, calls=calls, **kwargs: calls.append(("log", values, kwargs)),
            finish=lambda calls=calls: calls.append(("finish",)),
        )

        def init(calls: list[Any] = calls, run: Any = run, **kwargs: Any) -> Any:
            calls.append(("init", kwargs))
            return run

        module.init = init
        module.config = SimpleNamespace(update=lambda values, calls=calls, **_: calls.append(("config", values)))
        monkeypatch.setitem(sys.modules, name, module)
    available = [tracking.LoggerType.WANDB, tracking.LoggerType.TRACKIO]
    monkeypatch.setattr(tracking, "_available_trackers", available)
    return given


def test_sigterm_while_the_trackers_end_saves_and_exits(
    make: Make, fake_trackers: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make("whole")
    whole.train()
    seen: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(signum))
    monkeypatch.setattr(tracking.WandBTracker, "finish", lambda self: os.kill(os.getpid(), signal.SIGTERM))
    trainer = make("cut", report_to=["wandb"])
    try:
        with pytest.raises(SystemExit) as exit_info:
            trainer.train()
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert exit_info.value.code == 143
    assert seen == [], "it is answered"
    assert [step for step, _ in list_checkpoints(trainer.output_dir)] == [4]
    assert not trainer.model.training
    resumed = make("cut", resume_from_checkpoint=True)
    resumed.train()
    assert torch.equal(tokens_of(resumed), tokens_of(whole))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_other_trackers_are_told_the_recipe_and_the_log(
    make: Make, fake_trackers: dict[str, list[Any]], name: str
) -> None:
    trainer = make("pets", report_to=[name], max_steps=2)
    trainer.train()
    (_, init), (_, config), *logged, last = fake_trackers[name]
    assert (init["project"], init["name"]) == ("robustness_tokens", "pets")
    assert (config["seed"], config["attack"], config["num_attack_steps"]) == (0, "pgd", 1)
    assert [(kwargs["step"], values) for _, values, kwargs in logged] == [
        (row["step"], {key: value for key, value in row.items() if key != "step"}) for row in trainer.log_history
    ]
    assert last == ("finish",)
    assert not any(isinstance(value, Tensor) for _, values, _ in logged for value in values.values())


def test_a_tracker_is_ended_where_the_training_fails(make: Make, fake_trackers: dict[str, list[Any]]) -> None:
    trainer = make(report_to=["wandb"], learning_rate=1e30)
    with pytest.raises(FloatingPointError):
        trainer.train()
    assert fake_trackers["wandb"][-1] == ("finish",)
    assert trainer.accelerator.trackers == []


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"learning_rate": 1e30}, FloatingPointError),
        ({"callbacks": [Terminate()]}, SystemExit),
    ],
)
def test_the_error_of_a_tracker_does_not_replace_that_of_the_training(
    make: Make,
    fake_trackers: dict[str, list[Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kwargs: dict[str, Any],
    error: type[BaseException],
) -> None:
    trainer = make(report_to=["wandb", "trackio"], **kwargs)

    def refuse(self: Any) -> None:
        raise RuntimeError("no connection")

    monkeypatch.setattr(tracking.WandBTracker, "finish", refuse)
    with pytest.raises(error):
        trainer.train()
    assert "no connection" in caplog.text
    assert fake_trackers["trackio"][-1] == ("finish",), "the others are ended all the same"
    assert trainer.accelerator.trackers == []
    assert not trainer.model.training
    assert trainer.model.robustness_tokens.grad is None


def test_the_error_of_a_tracker_at_the_end_is_raised(
    make: Make, fake_trackers: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any) -> None:
        raise RuntimeError("no connection")

    monkeypatch.setattr(tracking.WandBTracker, "finish", refuse)
    trainer = make(report_to=["wandb", "trackio"])
    with pytest.raises(RuntimeError, match="no connection"):
        trainer.train()
    assert fake_trackers["trackio"][-1] == ("finish",)
    assert not trainer.model.training


def test_the_error_of_a_tracker_is_not_hidden(
    make: Make, fake_trackers: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**kwargs: Any) -> None:
        raise RuntimeError("not logged in")

    monkeypatch.setattr(sys.modules["wandb"], "init", refuse)
    trainer = make(report_to=["wandb"])
    with pytest.raises(RuntimeError, match="not logged in"):
        trainer.train()
    assert trainer.log_history == []


def test_a_missing_tracker_names_the_extra(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ImportError, match=r"report_to=\['wandb'\].*robustness-tokens\[trackers\]"):
        make(report_to="wandb")


def test_no_tracker_by_default(make: Make) -> None:
    trainer = make()
    trainer.train()
    assert trainer.accelerator.log_with == []
    assert [path.name for path in (trainer.output_dir / "logs").iterdir()] == ["training_log.csv"]
