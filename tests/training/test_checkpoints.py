import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustness_tokens.configuration import TOKENS
from robustness_tokens.training import checkpoints
from robustness_tokens.training.checkpoints import (
    STATE_FILE,
    TENSORS_FILE,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    save_checkpoint,
)
from robustness_tokens.training.run_folder import (
    LOG_COLUMNS,
    append_to_log,
    check_output_dir,
    is_own_checkpoint,
    read_log,
    start_log,
)


SETTINGS = {"seed": 0, "learning_rate": 0.1}


def trained(steps: int, shape: tuple[int, ...] = (2, 3)) -> tuple[nn.Parameter, torch.optim.Adam]:
    tokens = nn.Parameter(torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape))
    optimizer = torch.optim.Adam([tokens], lr=0.1)
    for _ in range(steps):
        step(tokens, optimizer)
    return tokens, optimizer


def step(tokens: nn.Parameter, optimizer: torch.optim.Optimizer) -> Tensor:
    optimizer.zero_grad()
    tokens.sin().sum().backward()
    optimizer.step()
    return tokens.detach().clone()


def save(folder: Path, steps: int, **kwargs: Any) -> Path:
    tokens, optimizer = trained(steps)
    defaults = {"settings": SETTINGS, "state": {"position": [1, 2]}}
    return save_checkpoint(folder, step=steps, tokens={TOKENS: tokens}, optimizer=optimizer, **{**defaults, **kwargs})


def load(
    folder: Path, *, tokens: nn.Parameter, optimizer: torch.optim.Optimizer, settings: Any = SETTINGS
) -> tuple[int, dict[str, Any]]:
    checkpoint = read_checkpoint(folder, settings=settings, shapes={TOKENS: tuple(tokens.shape)})
    checkpoint.restore({TOKENS: tokens}, optimizer)
    return checkpoint.step, checkpoint.state


def found(folder: Path, resume_from: str | bool | None = True) -> Path | None:
    checkpoint = find_checkpoint(folder, resume_from, settings=SETTINGS, shapes={TOKENS: (2, 3)})
    return None if checkpoint is None else checkpoint.folder


def test_a_round_trip_is_bit_equal_and_so_are_the_next_steps(tmp_path: Path) -> None:
    tokens, optimizer = trained(3)
    folder = save_checkpoint(
        tmp_path, step=3, tokens={TOKENS: tokens}, optimizer=optimizer, settings=SETTINGS, state={"x": [0.1, None]}
    )
    assert folder == tmp_path / "checkpoint-3"
    fresh, fresh_optimizer = trained(0)
    done, state = load(folder, tokens=fresh, optimizer=fresh_optimizer, settings=SETTINGS)
    assert (done, state) == (3, {"x": [0.1, None]})
    assert torch.equal(fresh, tokens)
    for _ in range(3):
        assert torch.equal(step(fresh, fresh_optimizer), step(tokens, optimizer))


def test_files_and_permissions(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2"}
    assert {path.name for path in folder.iterdir()} == {STATE_FILE, TENSORS_FILE}
    assert (folder / TENSORS_FILE).stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_checkpoint_is_small(tmp_path: Path) -> None:
    tokens, optimizer = trained(1, shape=(10, 384))
    folder = save_checkpoint(
        tmp_path, step=1, tokens={TOKENS: tokens}, optimizer=optimizer, settings=SETTINGS, state={}
    )
    assert sum(path.stat().st_size for path in folder.iterdir()) < 3 * 4 * 10 * 384 + 2_000


def test_a_checkpoint_before_the_first_step(tmp_path: Path) -> None:
    folder = save(tmp_path, 0)
    tokens, optimizer = trained(2)
    load(folder, tokens=tokens, optimizer=optimizer, settings=SETTINGS)
    assert torch.equal(tokens, trained(0)[0])
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize("limit", [1, 2, None])
def test_save_total_limit(tmp_path: Path, limit: int | None) -> None:
    for steps in (2, 10, 9, 100):
        save(tmp_path, steps, save_total_limit=limit)
    # By number, 100 last; but what is beyond a step that is saved was of a run that went another way.
    expected = [2, 9, 10, 100] if limit is None else [9, 100][-limit:]
    assert [steps for steps, _ in list_checkpoints(tmp_path)] == expected
    assert len(list(tmp_path.iterdir())) == len(expected)


@pytest.mark.parametrize(("limit", "kept"), [(1, [4]), (2, [2, 4]), (3, [2, 4, 8])])
def test_the_checkpoint_just_saved_is_never_over_the_limit(tmp_path: Path, limit: int, kept: list[int]) -> None:
    for steps in (2, 4, 6, 8):
        save(tmp_path, steps)
    assert save(tmp_path, 4, save_total_limit=limit).is_dir()
    assert [steps for steps, _ in list_checkpoints(tmp_path)] == kept


def test_saving_again_replaces(tmp_path: Path) -> None:
    save(tmp_path, 2, state={"x": 1})
    folder = save(tmp_path, 2, state={"x": 2})
    tokens, optimizer = trained(0)
    assert load(folder, tokens=tokens, optimizer=optimizer, settings=SETTINGS) == (2, {"x": 2})


@pytest.mark.parametrize("moment", ["_write", "flush_to_disk"])
def test_a_save_that_is_cut_off_leaves_the_checkpoint_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(tmp_path, 2)

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, moment, killed)
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 4)
    assert [steps for steps, _ in list_checkpoints(tmp_path)] == [2]
    assert found(tmp_path) == tmp_path / "checkpoint-2"
    save(tmp_path, 6)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-6"}


def test_an_error_of_the_disk_is_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 2)
    assert list_checkpoints(tmp_path) == []


def test_an_error_while_replacing_puts_the_checkpoint_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (save(tmp_path, 1) / STATE_FILE).stat().st_ino
    real = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self.name == ".checkpoint-1.part":
            raise OSError(5, "Input/output error")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="checkpoints are unchanged"):
        save(tmp_path, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / STATE_FILE).stat().st_ino == before


def test_what_cannot_be_deleted_is_said_and_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def busy(path: Path, ignore_errors: bool = False) -> None:
        raise OSError(16, "Device or resource busy")

    save(tmp_path, 2)
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", busy)
        assert save(tmp_path, 2, state={"x": 2}, save_total_limit=1) == tmp_path / "checkpoint-2"
        assert save(tmp_path, 4, save_total_limit=1) == tmp_path / "checkpoint-4"
    assert f"{tmp_path / '.checkpoint-2.old.part'} could not be deleted" in caplog.text
    assert f"{tmp_path / 'checkpoint-2'} could not be deleted" in caplog.text
    assert [steps for steps, _ in list_checkpoints(tmp_path)] == [4]
    save(tmp_path, 6, save_total_limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        (
            ["x" * 2**22],
            r"would have 4,194,\d+ bytes, 4,194,\d+ of them for 'callbacks', and at most 4,194,304 can be read",
        ),
        (nested(40), "nested more than 32 deep"),
        ("\x07", "characters that are no text"),
    ],
    ids=["large", "deep", "no text"],
)
def test_what_could_not_be_read_again_is_not_kept(tmp_path: Path, callbacks: Any, message: str) -> None:
    save(tmp_path, 2)
    with pytest.raises(ValueError, match=rf"checkpoint-4 could not be read back.*{message}"):
        save(tmp_path, 4, state={"position": [1, 2], "callbacks": callbacks}, save_total_limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert found(tmp_path) == tmp_path / "checkpoint-2"


@pytest.mark.parametrize("missing", [STATE_FILE, TENSORS_FILE])
def test_a_checkpoint_with_a_file_missing_is_not_whole(tmp_path: Path, missing: str) -> None:
    save(tmp_path, 2)
    (save(tmp_path, 4) / missing).unlink()
    (tmp_path / "checkpoint-x").mkdir()
    assert [steps for steps, _ in list_checkpoints(tmp_path)] == [2]
    tokens, optimizer = trained(0)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        load(tmp_path / "checkpoint-4", tokens=tokens, optimizer=optimizer, settings=SETTINGS)


def test_find_checkpoint(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert found(tmp_path, None) is None
    assert caplog.messages == []
    assert found(tmp_path) is None
    assert caplog.messages == [f"{tmp_path} holds no checkpoint yet: training starts from the beginning"]
    first, second = save(tmp_path, 2), save(tmp_path, 4)
    assert found(tmp_path) == second
    assert found(tmp_path, str(first)) == first
    with pytest.raises(ValueError, match="some/folder is not a checkpoint"):
        found(tmp_path, "some/folder")


def test_the_last_undamaged_checkpoint_is_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folders = [save(tmp_path, steps) for steps in (2, 4, 6)]
    damage_tensors(folders[2])
    assert found(tmp_path) == folders[1]
    damage_state(folders[1])
    assert found(tmp_path) == folders[0]
    assert [message.split(" is damaged")[0] for message in caplog.messages] == [
        str(folders[step]) for step in (2, 2, 1)
    ]
    damage_state(folders[0])
    with pytest.raises(ValueError, match="checkpoint-2 is damaged"):
        found(tmp_path)
    with pytest.raises(ValueError, match="checkpoint-6 is damaged"):
        found(tmp_path, str(folders[2]))


def damage_tensors(folder: Path) -> None:
    path = folder / TENSORS_FILE
    path.write_bytes(path.read_bytes()[:-8])


def damage_state(folder: Path) -> None:
    (folder / STATE_FILE).write_text("{", encoding="utf-8")


def empty_state(folder: Path) -> None:
    (folder / STATE_FILE).write_text(json.dumps({"step": 1}), encoding="utf-8")


def zero_tensors(folder: Path) -> None:
    content = bytearray((folder / TENSORS_FILE).read_bytes())
    content[-16:] = bytes(16)
    (folder / TENSORS_FILE).write_bytes(content)


def edit_state(folder: Path) -> None:
    content = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    content["state"]["position"] = [0, 0]
    (folder / STATE_FILE).write_text(json.dumps(content), encoding="utf-8")


def other_tensors(folder: Path) -> None:
    shutil.copy(save(folder.parent / "other", 3) / TENSORS_FILE, folder)


DAMAGES = [
    (damage_tensors, "damaged"),
    (damage_state, "not valid JSON"),
    (empty_state, "'settings', 'state'"),
    (zero_tensors, "its digest does not match"),
    (edit_state, "its digest does not match"),
    (other_tensors, "its digest does not match"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_the_checkpoint_before_a_damaged_one_is_taken(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Any, message: str
) -> None:
    before, last = save(tmp_path / "run", 1), save(tmp_path / "run", 2)
    damage(last)
    assert found(tmp_path / "run") == before
    assert f"{last} is damaged" in caplog.text


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damage_is_an_error_that_changes_nothing(tmp_path: Path, damage: Any, message: str) -> None:
    folder = save(tmp_path, 2)
    damage(folder)
    tokens, optimizer = trained(0)
    with pytest.raises(ValueError, match=message):
        load(folder, tokens=tokens, optimizer=optimizer, settings=SETTINGS)
    assert torch.equal(tokens, trained(0)[0])
    assert optimizer.state_dict()["state"] == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({**SETTINGS, "seed": 1}, "seed: 0 -> 1"),
        ({"seed": 0}, r"learning_rate: 0\.1 -> None"),
        ({**SETTINGS, "new": 5}, "new: None -> 5"),
    ],
)
def test_other_settings_are_refused(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    folder = save(tmp_path, 2)
    tokens, optimizer = trained(0)
    with pytest.raises(ValueError, match=message):
        load(folder, tokens=tokens, optimizer=optimizer, settings=settings)
    assert torch.equal(tokens, trained(0)[0])


def test_tokens_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 2)
    tokens, optimizer = trained(0, shape=(4, 3))
    with pytest.raises(ValueError, match=r"shapes .*\(2, 3\).*, the model has .*\(4, 3\)"):
        load(folder, tokens=tokens, optimizer=optimizer, settings=SETTINGS)


# The log


def row(number: int) -> dict[str, float]:
    return {**dict.fromkeys(LOG_COLUMNS, number + 1 / 3), "step": number}


def test_the_log_reads_back_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "log.csv"
    start_log(path)
    assert path.read_text(encoding="utf-8").strip() == ",".join(LOG_COLUMNS)
    for number in (1, 2, 3):
        append_to_log(path, row(number))
    assert read_log(path, last_step=3) == [row(1), row(2), row(3)]
    assert read_log(path, last_step=2) == [row(1), row(2)]
    start_log(path, read_log(path, last_step=1))
    assert read_log(path, last_step=9) == [row(1)]
    assert [file.name for file in path.parent.iterdir()] == ["log.csv"]


@pytest.mark.parametrize("rest", ["", "4", "4,0.1,0.", "4,0.1,0.2,0.3,0.4,0.5,"])
def test_a_row_cut_in_the_middle_is_left_out(tmp_path: Path, rest: str) -> None:
    path = tmp_path / "log.csv"
    start_log(path, [row(1)])
    with path.open("a", encoding="utf-8") as file:
        file.write(rest)
    assert read_log(path, last_step=9) == [row(1)]


def test_a_missing_log_is_empty(tmp_path: Path) -> None:
    assert read_log(tmp_path / "log.csv", last_step=9) == []


@pytest.mark.parametrize("write", [lambda path: append_to_log(path, row(1)), lambda path: start_log(path, [row(1)])])
def test_a_log_that_can_not_be_written_is_a_clear_error(tmp_path: Path, write: Callable[[Path], None]) -> None:
    (tmp_path / "log.csv").mkdir()
    with pytest.raises(OSError, match=r"log\.csv could not be written \(Is a directory\)"):
        write(tmp_path / "log.csv")


# The folder of a run


def test_a_checkpoint_is_the_runs_own_only_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not is_own_checkpoint(Path("run"), True)
    save(Path("run"), 2)
    assert is_own_checkpoint(Path("run"), True)
    assert is_own_checkpoint(Path("run"), str(tmp_path / "run" / "checkpoint-2"))
    assert is_own_checkpoint(Path("run"), "other/../run/checkpoint-2/")
    assert not is_own_checkpoint(Path("run"), "other/checkpoint-2")
    assert not is_own_checkpoint(Path("run"), "run/older/checkpoint-2")
    assert not is_own_checkpoint(Path("run"), None)


def test_what_a_run_must_not_replace_is_refused(tmp_path: Path) -> None:
    own, other = save(tmp_path / "run", 2), save(tmp_path / "other", 2)
    for name in (None, str(other)):
        with pytest.raises(ValueError, match="overwrite_output_dir=True"):
            check_output_dir(tmp_path / "run", overwrite=False, resume_from=name)
        check_output_dir(tmp_path / "run", overwrite=True, resume_from=name)
        check_output_dir(tmp_path / "new", overwrite=False, resume_from=name)
    check_output_dir(tmp_path / "run", overwrite=False, resume_from=True)
    check_output_dir(tmp_path / "run", overwrite=False, resume_from=str(own))
    assert {path.name for path in tmp_path.iterdir()} == {"run", "other"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_another_model_is_refused(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}', encoding="utf-8")
    with pytest.raises(ValueError, match="holds another model, of model_type 'dinov2'"):
        check_output_dir(tmp_path, overwrite=overwrite, resume_from=None)


@pytest.mark.parametrize("name", ["file", "file/run", "file/deep/run"])
def test_a_file_is_no_folder_for_a_run(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match=r"output_dir=.*file is not a folder"):
        check_output_dir(tmp_path / name, overwrite=False, resume_from=None)


@pytest.mark.parametrize("name", ["run", "run/below"])
def test_a_folder_without_write_permission_is_refused(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run").mkdir()
    # The superuser may write anywhere, whatever the mode.
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path / "run")
    with pytest.raises(ValueError, match=r"output_dir=.*run is not writable"):
        check_output_dir(tmp_path / name, overwrite=False, resume_from=None)
