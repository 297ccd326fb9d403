"""Runs that are killed, and what is left of them."""

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from robustness_tokens.configuration import TOKENS
from robustness_tokens.training import checkpoints, run_folder
from robustness_tokens.training.checkpoints import list_checkpoints, read_checkpoint, save_checkpoint
from robustness_tokens.utils import files
from tests.support.disks import full_disk
from tests.support.training_runs import build_trainer, fork_server, start, tokens_of


WRITERS = {module.__file__ for module in (checkpoints, run_folder, files)}
READERS = {"read_json", "json_values"}  # of the same modules, thousands of lines a run: they leave the disk as it is
LONG: dict[str, Any] = {"max_steps": 400, "save_steps": 1, "save_total_limit": 2, "eval_steps": 3, "eval_images": 2}


def kill_at_line(number: int) -> None:
    """Kills this process before that line, counted from now, of what writes to the disk."""
    remaining = number

    def at_line(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal remaining
        if event == "line":
            remaining -= 1
            if remaining == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return at_line

    def at_call(frame: FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        return at_line if code.co_filename in WRITERS and code.co_name not in READERS else None

    sys.settrace(at_call)


class Announce(TrainerCallback):
    """Tells of every step, and after the first sets the line to be killed at."""

    def __init__(self, connection: Connection, line: int | None) -> None:
        self.connection, self.line = connection, line

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.connection.send(state.global_step)
        if self.line is not None:
            kill_at_line(self.line)
            self.line = None


def train_until_killed(output_dir: Path, connection: Connection, line: int | None, settings: dict[str, Any]) -> None:
    callbacks = [Announce(connection, line)]
    build_trainer(output_dir, resume_from_checkpoint=True, callbacks=callbacks, **settings).train()


def kill_once(output_dir: Path, chance: random.Random, settings: dict[str, Any]) -> int:
    """Kills a run by SIGKILL, at a random line of what writes, or at a random time; returns the last step it told."""
    receiver, sender = fork_server().Pipe(duplex=False)
    line = chance.randint(1, 600) if chance.random() < 0.5 else None
    process = start(train_until_killed, output_dir, sender, line, settings)
    sender.close()
    last = first = receiver.recv()
    steps = chance.randint(0, 2)
    try:
        while line is not None or last < first + steps:
            last = receiver.recv()
    except EOFError:  # it is dead
        pass
    if line is None:
        time.sleep(chance.uniform(0, 0.05))
        process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return int(last)


def kill_and_resume(tmp_path: Path, *, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    cut, whole = tmp_path / "cut", tmp_path / "whole"
    told = [kill_once(cut, chance, LONG) for _ in range(kills)]
    assert max(told) > kills // 2
    # A few steps more than the last kill are enough, and the schedule is the same for any max_steps.
    settings = {**LONG, "max_steps": max(told) + 5}
    resumed = build_trainer(cut, resume_from_checkpoint=True, **settings)
    resumed.train()
    uninterrupted = build_trainer(whole, **settings)
    uninterrupted.train()
    assert torch.equal(tokens_of(resumed), tokens_of(uninterrupted))
    assert resumed.eval_history == uninterrupted.eval_history
    assert [row["step"] for row in resumed.log_history] == list(range(1, settings["max_steps"] + 1))
    assert {path.name for path in cut.iterdir()} == {path.name for path in whole.iterdir()}


def test_a_run_killed_three_times_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=3, seed=1)


@pytest.mark.slow
def test_a_run_killed_thirty_times_ends_as_the_uninterrupted_one(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, kills=30, seed=0)


# In the middle of a save


def save(folder: Path, step: int) -> None:
    tokens = nn.Parameter(torch.full((2, 3), float(step)))
    optimizer = torch.optim.Adam([tokens])
    save_checkpoint(
        folder,
        step=step,
        tokens={TOKENS: tokens},
        optimizer=optimizer,
        settings={},
        state={"step": step},
        save_total_limit=1,
    )


def in_a_fork(function: Callable[[], None]) -> int:
    """The exit status of a process of its own."""
    child = os.fork()
    if child == 0:
        function()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_every_line(folder: Path, connection: Connection) -> None:
    """Tells, for each line of a save in turn, which checkpoints are left when it is killed there."""
    line, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        line += 1
        run = folder / str(line)
        save(run, 2)

        def killed(run: Path = run, line: int = line) -> None:
            kill_at_line(line)
            save(run, 4)

        status = in_a_fork(killed)
        left = [step for step, _ in list_checkpoints(run)]
        contents = [read_checkpoint(path, settings={}, shapes={TOKENS: (2, 3)}) for _, path in list_checkpoints(run)]
        whole = all((c.tokens[TOKENS] == c.step).all() and c.state == {"step": c.step} for c in contents)
        save(run, 6)
        connection.send((status, left, whole, sorted(path.name for path in run.iterdir())))
    connection.close()


def test_killed_at_any_line_of_a_save_a_whole_checkpoint_is_left(tmp_path: Path) -> None:
    receiver, sender = fork_server().Pipe(duplex=False)
    process = start(kill_at_every_line, tmp_path, sender)
    sender.close()
    found = []
    try:
        while True:
            found.append(receiver.recv())
    except EOFError:
        process.join()
    assert process.exitcode == 0
    assert len(found) > 30
    assert [status for status, *_ in found] == [-signal.SIGKILL] * (len(found) - 1) + [0]
    left = [left for _, left, *_ in found]
    assert {tuple(steps) for steps in left} == {(2,), (2, 4), (4,)}
    assert left == sorted(left, key=[[2], [2, 4], [4]].index)
    assert all(whole for _, _, whole, _ in found)
    assert all(names == ["checkpoint-6"] for *_, names in found)


# SIGTERM


class Terminate(TrainerCallback):
    """Sends SIGTERM to this process within a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("save_steps", [None, 3])
@pytest.mark.parametrize("step", [0, 2, 4])
def test_sigterm_saves_and_exits(tmp_path: Path, step: int, save_steps: int | None) -> None:
    handler = signal.getsignal(signal.SIGTERM)
    settings: dict[str, Any] = {"max_steps": 5, "save_steps": save_steps}
    trainer = build_trainer(tmp_path / "cut", callbacks=[Terminate(step)], **settings)
    with pytest.raises(SystemExit) as exit_info:
        trainer.train()
    assert exit_info.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert list_checkpoints(tmp_path / "cut")[-1][0] == step + 1
    assert not trainer.model.training

    resumed = build_trainer(tmp_path / "cut", resume_from_checkpoint=True, **settings)
    resumed.train()
    whole = build_trainer(tmp_path / "whole", **settings)
    whole.train()
    assert torch.equal(tokens_of(resumed), tokens_of(whole))


def test_sigterm_before_the_first_step_of_a_resumed_run_leaves_its_checkpoint_alone(tmp_path: Path) -> None:
    # Saved once more it would for a moment be hidden, and there is no other.
    settings: dict[str, Any] = {"save_steps": 2, "save_total_limit": 1}
    build_trainer(tmp_path, max_steps=2, **settings).train()
    files = [path.stat().st_ino for path in sorted((tmp_path / "checkpoint-2").iterdir())]
    terminate = TrainerCallback()
    terminate.on_train_begin = lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM)  # type: ignore[method-assign]
    resumed = build_trainer(tmp_path, resume_from_checkpoint=True, callbacks=[terminate], max_steps=4, **settings)
    with pytest.raises(SystemExit):
        resumed.train()
    assert [path.stat().st_ino for path in sorted((tmp_path / "checkpoint-2").iterdir())] == files


def test_the_handler_of_sigterm_is_the_users_again(tmp_path: Path) -> None:
    seen: list[int] = []
    previous = signal.signal(signal.SIGTERM, lambda signum, frame: seen.append(signum))
    try:
        build_trainer(tmp_path / "run", max_steps=1).train()
        os.kill(os.getpid(), signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, previous)


WITH_WORKERS = """
import sys
from pathlib import Path
from tests.support.training_runs import build_trainer
from transformers import TrainerCallback

class Announce(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        print(state.global_step, flush=True)

if __name__ == "__main__":
    build_trainer(
        Path(sys.argv[1]), max_steps=100_000, num_images=80, num_attack_steps=50, dataloader_num_workers=2,
        callbacks=[Announce()],
    ).train()
"""


def test_sigterm_to_all_processes_of_a_run_saves_too(tmp_path: Path) -> None:
    # As a scheduler sends it: the loader's workers get it as well. Torch's guard over them needs an ordinary process.
    script = tmp_path / "train.py"
    script.write_text(WITH_WORKERS, encoding="utf-8")
    command = [sys.executable, str(script), str(tmp_path / "run")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        os.killpg(process.pid, signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 143, errors
    assert "SIGTERM: saved checkpoint-" in errors
    assert len(list_checkpoints(tmp_path / "run")) == 1


def test_in_another_thread_sigterm_is_left_alone(tmp_path: Path) -> None:
    trainer = build_trainer(tmp_path / "run", max_steps=2)
    thread = threading.Thread(target=trainer.train)  # where Python allows no handler
    thread.start()
    thread.join()
    assert trainer.state.global_step == 2


# A full disk


def save_on_a_full_disk(folder: Path) -> None:
    save(folder, 2)
    try:
        with full_disk():
            save(folder, 4)
    except OSError as exc:
        (folder / "error").write_text(str(exc), encoding="utf-8")


def test_a_full_disk_is_a_clear_error_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    process = start(save_on_a_full_disk, tmp_path)
    process.join(timeout=60)
    assert process.exitcode == 0
    assert "resume with resume_from_checkpoint=True" in (tmp_path / "error").read_text(encoding="utf-8")
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "error"}
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2]


def train_on_a_full_disk(folder: Path) -> None:
    trainer = build_trainer(folder, max_steps=4, save_steps=2)
    real = checkpoints.save_checkpoint

    class FillDisk(TrainerCallback):
        def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))

    assert real is save_checkpoint
    trainer.callback_handler.add_callback(FillDisk())
    try:
        trainer.train()
    except OSError as exc:
        message = f"{exc.strerror}"
    tokens = tokens_of(trainer)
    (folder.parent / "found").write_text(f"{tokens.isfinite().all().item()} {message}"[:900], encoding="utf-8")


def test_training_on_a_full_disk(tmp_path: Path) -> None:
    process = start(train_on_a_full_disk, tmp_path / "run")
    process.join(timeout=60)
    assert process.exitcode == 0
    found = (tmp_path / "found").read_text(encoding="utf-8")
    assert found.startswith(f"True {tmp_path / 'run' / 'checkpoint-4'} could not be written (File too large)")
    whole, cut = (build_trainer(tmp_path / name, max_steps=4, save_steps=2) for name in ("whole", "never"))
    whole.train()
    resumed = build_trainer(tmp_path / "run", max_steps=4, save_steps=2, resume_from_checkpoint=True)
    resumed.train()
    assert torch.equal(tokens_of(resumed), tokens_of(whole))
    assert not torch.equal(tokens_of(cut), tokens_of(whole))
