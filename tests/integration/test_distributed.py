"""Two processes that train together, by gloo."""

import dataclasses
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from robustness_tokens.models.modeling import RobustnessTokenModel
from robustness_tokens.training import held_out, make_pairs
from robustness_tokens.training import trainer as trainer_module
from robustness_tokens.training.accelerator import build_accelerator
from robustness_tokens.training.arguments import RobustnessTokenTrainingArguments
from robustness_tokens.training.checkpoints import list_checkpoints
from robustness_tokens.training.make_pairs import make_adversarial_pairs
from robustness_tokens.training.run_folder import to_csv
from robustness_tokens.training.step import TrainingStep
from robustness_tokens.training.sweep import CSV_FILE, SweepArguments, run_sweep
from tests.support.bases import build_base
from tests.support.training_runs import (
    build_robust_trainer,
    build_trainer,
    images,
    run_together,
    state_of,
    tokens_of,
)


# Twelve images in steps of eight: an epoch has one whole step. Five held out: three for one, two for the other.
TOGETHER: dict[str, Any] = {"num_images": 12, "eval_images": 5, "eval_steps": 2, "max_steps": 4, "save_steps": 2}


ROBUST_TOGETHER: dict[str, Any] = {"num_images": 12, "max_steps": 3, "eps_warmup_ratio": 0.5, "learning_rate": 1e-3}


class StopOnTheLast(TrainerCallback):
    """Stops and saves after step 3, as only the last process decides."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.rank == 1 and state.global_step == 3:
            control.should_training_stop = control.should_save = True


def train_two(rank: int, folder: Path) -> None:
    """All that is asked of two processes, in one start of them."""
    attacked: dict[str, list[list[int]]] = {"training_step": [], "held_out": []}
    real = TrainingStep.attacked

    def watched(self: TrainingStep, batch: Any, *args: Any, step: int, **kwargs: Any) -> Tensor:
        caller = sys._getframe(1).f_code.co_filename
        attacked["held_out" if caller == held_out.__file__ else "training_step"].append(batch["index"].tolist())
        return real(self, batch, *args, step=step, **kwargs)

    TrainingStep.attacked = watched  # type: ignore[method-assign]
    trainer = build_trainer(folder / "two", report_to="tensorboard", **TOGETHER)
    trainer.train()
    trainer.save_model()
    TrainingStep.attacked = real  # type: ignore[method-assign]
    found: dict[str, Any] = {"attacked": attacked, "log": trainer.log_history, "eval": trainer.eval_history}
    save_file({"tokens": tokens_of(trainer)}, folder / f"tokens-{rank}.safetensors")

    try:
        build_trainer(
            folder / "other", resume_from_checkpoint=str(folder / "one" / "checkpoint-2"), **TOGETHER
        ).train()
    except ValueError as exc:
        found["world size"] = str(exc)

    stopped = build_trainer(folder / "stopped", callbacks=[StopOnTheLast(rank)], max_steps=9, num_images=12)
    found["stopped"] = stopped.train().global_step

    robust = build_robust_trainer(folder / "robust-two", **ROBUST_TOGETHER)
    robust.train()
    save_file(state_of(robust), folder / f"robust-{rank}.safetensors")

    # Only the main process sees its folder, as on machines that share none.
    own = folder / f"resumed-{rank}"
    resumed = build_trainer(own, resume_from_checkpoint=str(folder / f"two-of-{rank}" / "checkpoint-2"), **TOGETHER)
    resumed.train()
    save_file({"tokens": tokens_of(resumed)}, folder / f"resumed-tokens-{rank}.safetensors")
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    one = build_trainer(folder / "one", per_device_train_batch_size=8, **TOGETHER)
    one.train()
    save_file({"tokens": tokens_of(one)}, folder / "tokens.safetensors")
    (folder / "found.json").write_text(json.dumps({"log": one.log_history, "eval": one.eval_history}))
    robust = build_robust_trainer(folder / "robust", per_device_train_batch_size=8, **ROBUST_TOGETHER)
    robust.train()
    save_file(state_of(robust), folder / "robust.safetensors")
    (folder / "two-of-0").symlink_to(folder / "two", target_is_directory=True)
    run_together(2, train_two, folder)
    return folder


def read(folder: Path, rank: int | None = None) -> dict[str, Any]:
    name = "found.json" if rank is None else f"found-{rank}.json"
    content: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return content


def test_the_robust_recipe_gives_the_same_on_both_and_what_one_process_gives(folder: Path) -> None:
    one, *two = (load_file(folder / f"{name}.safetensors") for name in ("robust", "robust-0", "robust-1"))
    for name, tensor in one.items():
        assert torch.equal(two[0][name], two[1][name]), name
        # Adam's steps are as long whatever the gradient, so a sign that rounding flips moves by the learning rate.
        moved = (two[0][name] - tensor).abs()
        assert moved.max() <= 2 * 3 * ROBUST_TOGETHER["learning_rate"], name
        assert (moved < 1e-4).float().mean() > 0.95 or name.endswith("k_proj.shift"), name


def tokens(folder: Path, name: str) -> Tensor:
    return load_file(folder / f"{name}.safetensors")["tokens"]


def assert_same_rows(rows: Sequence[dict[str, float]], expected: Sequence[dict[str, float]]) -> None:
    assert len(rows) == len(expected)
    for row, other in zip(rows, expected, strict=True):
        assert {k: v for k, v in row.items() if k != "seconds"} == pytest.approx(
            {k: v for k, v in other.items() if k != "seconds"}, abs=1e-5
        )


def test_two_processes_give_the_tokens_of_one(folder: Path) -> None:
    torch.testing.assert_close(tokens(folder, "tokens-0"), tokens(folder, "tokens"), rtol=0, atol=1e-5)
    assert torch.equal(tokens(folder, "tokens-0"), tokens(folder, "tokens-1"))
    for rank in (0, 1):
        assert_same_rows(read(folder, rank)["log"], read(folder)["log"])


def test_each_process_attacks_its_own_images(folder: Path) -> None:
    attacked = [read(folder, rank)["attacked"] for rank in (0, 1)]
    assert [len(found["training_step"]) for found in attacked] == [4, 4]
    for first, second in zip(*(found["training_step"] for found in attacked), strict=True):
        assert len({*first, *second}) == 8
    assert [found["held_out"] for found in attacked] == [[[0, 2, 4], [0, 2, 4]], [[1, 3], [1, 3]]]


def test_held_out_images_are_measured_once_each(folder: Path) -> None:
    expected = read(folder)["eval"]
    assert [(row["step"], row["eval_num_images"]) for row in expected] == [(2, 5), (4, 5)]
    for rank in (0, 1):
        assert_same_rows(read(folder, rank)["eval"], expected)


def test_only_the_main_process_writes(folder: Path) -> None:
    run = folder / "two"
    assert {path.name for path in run.iterdir() if path.is_dir()} == {"checkpoint-2", "checkpoint-4", "logs"}
    for name, steps in (("training_log.csv", 4), ("eval_log.csv", 2)):
        assert len((run / "logs" / name).read_text(encoding="utf-8").splitlines()) == 1 + steps
    assert len(list((run / "logs" / "robustness_tokens").glob("events.*"))) == 1


def test_another_number_of_processes_is_refused_on_all(folder: Path) -> None:
    for rank in (0, 1):
        assert "num_processes: 1 -> 2" in read(folder, rank)["world size"]
    assert list_checkpoints(folder / "other") == []


def test_what_one_process_decides_holds_on_all(folder: Path) -> None:
    assert [read(folder, rank)["stopped"] for rank in (0, 1)] == [3, 3]
    assert [step for step, _ in list_checkpoints(folder / "stopped")] == [3]


def test_a_process_without_access_to_the_checkpoint_resumes_with_the_others(folder: Path) -> None:
    assert not (folder / "two-of-1").exists()
    for rank in (0, 1):
        assert torch.equal(tokens(folder, f"resumed-tokens-{rank}"), tokens(folder, "tokens-0"))
    assert not (folder / "resumed-1").exists()


class DecideLate(TrainerCallback):
    """On the main process alone, an evaluation after the log, a save after that, and the end after that."""

    def __init__(self, rank: int) -> None:
        self.is_main = rank == 0

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_evaluate |= self.is_main and state.global_step == 2

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_save |= self.is_main

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop |= self.is_main


def decide_late(rank: int, folder: Path) -> None:
    run = build_trainer(folder / "run", callbacks=[DecideLate(rank)], eval_images=2, max_steps=9)
    assert run.train().global_step == 2
    assert [row["step"] for row in run.eval_history] == [2]
    run.accelerator.wait_for_everyone()


def test_what_one_process_decides_after_a_log_an_evaluation_or_a_save_holds_on_all(tmp_path: Path) -> None:
    run_together(2, decide_late, tmp_path)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]


class TerminateAtTheEnd(TrainerCallback):
    """SIGTERM to the last process, after the last step and all that it decides."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def terminate_at_the_end(rank: int, folder: Path) -> None:
    run = build_trainer(folder / "run", callbacks=[TerminateAtTheEnd(rank)], max_steps=2)
    with pytest.raises(SystemExit) as exit_info:
        run.train()
    assert exit_info.value.code == 143
    run.accelerator.wait_for_everyone()


def test_sigterm_to_one_process_after_the_last_step_ends_all(tmp_path: Path) -> None:
    run_together(2, terminate_at_the_end, tmp_path)
    assert [step for step, _ in list_checkpoints(tmp_path / "run")] == [2]


def look_at_the_folder(rank: int, folder: Path) -> None:
    """Only the main process sees the folder of the run, as on machines that share none."""
    used, unused = folder / "used", folder / "unused"
    build_trainer(unused if rank == 0 else used)
    with pytest.raises(ValueError, match="holds an adapter or checkpoints already"):
        build_trainer(used if rank == 0 else unused)
    PartialState().wait_for_everyone()


def test_only_the_folder_of_the_main_process_counts(tmp_path: Path) -> None:
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "model.safetensors").touch()
    run_together(2, look_at_the_folder, tmp_path)


# Six images in a step of eight: four for one process, two for the other; ten in one of sixteen: six and four.
SMALL: dict[str, dict[str, Any]] = {
    "six": {"num_images": 6, "max_steps": 3},
    "ten": {"num_images": 10, "max_steps": 3, "gradient_accumulation_steps": 2},
}


def train_on_few(rank: int, folder: Path) -> None:
    real, taken = TrainingStep.attacked, list[int]()

    def watched(self: TrainingStep, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        taken.extend(batch["index"].tolist())
        return real(self, batch, *args, **kwargs)

    TrainingStep.attacked = watched  # type: ignore[method-assign]
    found = {}
    for name, settings in SMALL.items():
        run = build_trainer(folder / name, **settings)
        run.train()
        save_file({"tokens": tokens_of(run)}, folder / f"{name}-{rank}.safetensors")
        found[name] = list(taken)
        taken.clear()
    (folder / f"found-{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    with pytest.raises(ValueError, match=r"has 4 images, which fill 1 of the 2 batches of 4 that a step"):
        build_trainer(folder / "too few", num_images=4)
    run.accelerator.wait_for_everyone()


def test_a_dataset_smaller_than_a_step_counts_each_image_once(tmp_path: Path) -> None:
    run_together(2, train_on_few, tmp_path)
    for name, settings in SMALL.items():
        batches = 2 * settings.get("gradient_accumulation_steps", 1)
        one = build_trainer(
            tmp_path / f"{name} in one",
            **settings | {"per_device_train_batch_size": 4 * batches, "gradient_accumulation_steps": 1},
        )
        one.train()
        first, second = (read(tmp_path, rank)[name] for rank in (0, 1))
        assert sorted([*first, *second]) == sorted(3 * list(range(settings["num_images"])))
        for rank in (0, 1):
            torch.testing.assert_close(tokens(tmp_path, f"{name}-{rank}"), tokens_of(one), rtol=0, atol=1e-5)


class Unstorable(TrainerCallback, ExportableState):
    """Its state is no JSON."""

    def state(self) -> dict[str, Any]:
        return {"args": {}, "attributes": {"value": {1, 2}}}


def fail_together(rank: int, folder: Path) -> None:
    trainer = build_trainer(folder / "run", callbacks=[Unstorable()], save_steps=1, max_steps=2)
    errors = []
    with pytest.raises(TypeError, match="not JSON serializable"):
        trainer.train()
    (folder / "occupied").mkdir(exist_ok=True)
    (folder / "occupied" / "file").touch()
    args = RobustnessTokenTrainingArguments(output_dir=str(folder / "occupied"), disable_tqdm=True)
    try:
        make_adversarial_pairs(trainer.model, args, images(2))
    except ValueError as exc:
        errors.append(str(exc))
    time.sleep(rank)  # whoever comes last must not find what the first has written
    trainer.save_model(str(folder / "adapter"))
    try:
        trainer.save_model(str(folder / "adapter"))
    except ValueError as exc:
        errors.append(str(exc))
    (folder / f"errors-{rank}.json").write_text(json.dumps(errors), encoding="utf-8")
    trainer.accelerator.wait_for_everyone()


def test_what_fails_on_the_main_process_fails_on_all(tmp_path: Path) -> None:
    run_together(2, fail_together, tmp_path)
    for rank in (0, 1):
        occupied, adapter = json.loads((tmp_path / f"errors-{rank}.json").read_text(encoding="utf-8"))
        assert "holds files other than adversarial pairs" in occupied
        assert "holds an adapter already" in adapter


class UnsendableError(Exception):
    """Can't be made again from its arguments, like some errors of trackers."""

    def __init__(self, part: str, *, code: int) -> None:
        super().__init__(f"{part} failed with {code}")


def fail_at(part: str) -> Callable[..., None]:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise UnsendableError(part, code=7)

    return fail


def fail_while_writing(rank: int, folder: Path) -> None:
    """Only the main process writes the log, and only its trackers do anything."""
    parts = [
        (trainer_module, "append_to_log"),
        (TensorBoardTracker, "start"),
        (TensorBoardTracker, "log"),
        (TensorBoardTracker, "finish"),
        (make_pairs, "finish_folder"),
        (make_pairs, "_check_room"),
    ]
    errors = []
    for owner, name in parts:
        run = build_trainer(folder / name, report_to="tensorboard", max_steps=2)
        pairs_args = dataclasses.replace(run.args, output_dir=str(folder / "pairs" / name))
        with pytest.MonkeyPatch.context() as patch:
            if rank == 0:
                patch.setattr(owner, name, fail_at(name))
            try:
                if owner is make_pairs:
                    make_adversarial_pairs(run.model, pairs_args, images(2))
                else:
                    run.train()
            except Exception as exc:
                errors.append(f"{type(exc).__name__}: {exc}")
    (folder / f"errors-{rank}.json").write_text(json.dumps(errors), encoding="utf-8")
    run.accelerator.wait_for_everyone()


def test_what_the_main_process_cannot_write_leaves_no_other_waiting(tmp_path: Path) -> None:
    run_together(2, fail_while_writing, tmp_path)
    parts = ["append_to_log", "start", "log", "finish", "finish_folder", "_check_room"]
    main, other = (json.loads((tmp_path / f"errors-{rank}.json").read_text(encoding="utf-8")) for rank in (0, 1))
    assert main == [f"UnsendableError: {part} failed with 7" for part in parts]
    assert other == [f"RuntimeError: the main process failed: UnsendableError: {part} failed with 7" for part in parts]


def attack_together(rank: int, folder: Path) -> None:
    model = RobustnessTokenModel.from_base(build_base("dinov2"))
    args = RobustnessTokenTrainingArguments(output_dir=str(folder / "pairs"), num_attack_steps=1, disable_tqdm=True)
    pairs = make_adversarial_pairs(model, args, images(3), images_per_shard=3)
    assert len(pairs) == 3
    assert _process_group_timeout() >= timedelta(hours=3), "a process without a shard waits for the one that attacks"
    PartialState().wait_for_everyone()


def test_a_process_without_a_shard_waits_for_hours(tmp_path: Path) -> None:
    run_together(2, attack_together, tmp_path)


def _process_group_timeout() -> timedelta:
    group = torch.distributed.distributed_c10d._get_default_group()
    timeout: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return timeout


def fail_to_end_a_tracker(rank: int, folder: Path) -> None:
    """Only the main process has a tracker, and its error must not part it from the other."""
    run = build_trainer(folder / "run", report_to="tensorboard", max_steps=2, learning_rate=1e30)
    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(TensorBoardTracker, "finish", fail_at("finish"))
        with pytest.raises(FloatingPointError):
            run.train()
    run.accelerator.wait_for_everyone()


def test_a_tracker_that_fails_after_a_divergence_parts_no_processes(tmp_path: Path) -> None:
    run_together(2, fail_to_end_a_tracker, tmp_path)


class BreakOnTheLast(TrainerCallback):
    """After the last step the features of one process alone are not finite."""

    def __init__(self, rank: int, model: Any) -> None:
        self.rank, self.model = rank, model

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == args.max_steps and self.rank == 1:
            self.model.robustness_tokens.data.fill_(1e30)


def break_together(rank: int, folder: Path) -> None:
    run = build_trainer(folder / "run", max_steps=2)
    run.callback_handler.add_callback(BreakOnTheLast(rank, run.model))
    with pytest.raises(FloatingPointError, match="tokens after step 1"):
        run.train()
    run.accelerator.wait_for_everyone()


def test_tokens_that_break_the_features_of_one_process_stop_all(tmp_path: Path) -> None:
    run_together(2, break_together, tmp_path)


def sweep_together(rank: int, folder: Path) -> None:
    model = RobustnessTokenModel.from_base(build_base("dinov2"))
    args = RobustnessTokenTrainingArguments(
        output_dir=str(folder), max_steps=2, per_device_train_batch_size=1, num_attack_steps=1, disable_tqdm=True
    )
    grid = SweepArguments(sweep_num_tokens=[2], sweep_seeds=[0], num_eval_pairs=3)
    rows = run_sweep(model, args, images(8), grid)
    (folder / f"rows-{rank}").write_text(to_csv(rows), encoding="utf-8")
    assert _process_group_timeout() >= timedelta(hours=3), (
        "a process without a last shard waits for those that attack one"
    )


def test_a_process_without_a_shard_of_a_sweep_waits_for_hours(tmp_path: Path) -> None:
    run_together(2, sweep_together, tmp_path)
    rows = [(tmp_path / f"rows-{rank}").read_text(encoding="utf-8") for rank in (0, 1)]
    assert len(rows[0].splitlines()) == 2
    assert (tmp_path / CSV_FILE).read_text(encoding="utf-8") == rows[0]
    columns = [row.splitlines()[1].rsplit(",", 1)[0] for row in rows]  # all but the time
    assert columns[0] == columns[1]


# Ways of distribution that bring nothing here


@pytest.mark.parametrize("name", ["DEEPSPEED", "FSDP", "MEGATRON_LM"])
def test_a_sharding_launch_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(ValueError, match=r"shards the model; here.*plain data parallelism"):
        build_accelerator(RobustnessTokenTrainingArguments(output_dir=str(tmp_path)))


def shard(rank: int, folder: Path) -> None:
    Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2))
    try:
        build_trainer(folder / "run")
    except ValueError as exc:
        (folder / f"error-{rank}").write_text(str(exc), encoding="utf-8")


def test_a_plugin_for_sharding_is_refused(tmp_path: Path) -> None:
    run_together(2, shard, tmp_path)
    for rank in (0, 1):
        assert "launched for FSDP" in (tmp_path / f"error-{rank}").read_text(encoding="utf-8")
