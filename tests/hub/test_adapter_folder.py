import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from robustness_tokens import (
    RobustnessReport,
    RobustnessTokenModel,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    load_image_dataset,
)
from robustness_tokens.configuration import TOKENS, state_digest
from robustness_tokens.data.image_processors import build_image_processor, read_image_processor
from robustness_tokens.hub.adapter_folder import (
    cached_commit,
    check_base_is_repo_id,
    check_no_other_model,
    holds_adapter,
    is_adapter,
    is_repo_id,
    load_adapter,
    normalize_subfolder,
    read_config,
    read_state,
    write_adapter,
)
from robustness_tokens.models.heads import ClassificationHead, load_head, save_head
from robustness_tokens.utils.files import read_json, write_text
from tests.support.adapters import COMMIT, cache_as_repo
from tests.support.bases import build_base
from tests.support.disks import broken_disk, full_disk
from tests.support.reports import make_report


def edit_config(folder: Path, **changes: Any) -> None:
    """Changes keys of config.json; `...` takes one out."""
    content = {**json.loads((folder / "config.json").read_text()), **changes}
    content = {key: value for key, value in content.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(content))


def read_both(folder: Path) -> Tensor:
    return read_state(folder, read_config(folder))[TOKENS]


# Finding an adapter


def test_load_a_local_folder(adapter_folder: Path) -> None:
    whole, part = load_adapter(adapter_folder), load_adapter(str(adapter_folder.parent), subfolder=adapter_folder.name)
    assert (whole.folder, whole.commit) == (part.folder, part.commit) == (adapter_folder, None)


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_load_a_folder_that_is_no_adapter(adapter_folder: Path, missing: str) -> None:
    (adapter_folder / missing).unlink()
    with pytest.raises(ValueError, match=rf"{adapter_folder.name} is not a robustness-token adapter.* no {missing}"):
        load_adapter(adapter_folder)


def test_load_names_every_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json and no model\.safetensors"):
        load_adapter(tmp_path)


def test_a_folder_named_like_the_weights_is_no_weights(adapter_folder: Path) -> None:
    (adapter_folder / "model.safetensors").unlink()
    (adapter_folder / "model.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"no model\.safetensors"):
        load_adapter(adapter_folder)


@pytest.mark.parametrize(
    "name", ["", "/no/such/folder", "../adapter", "a/b/c", "C:\\adapter", "user/..", "user/na me"]
)
def test_load_what_is_neither_folder_nor_repo(name: str) -> None:
    with pytest.raises(ValueError, match="neither a local folder nor the id of a Hub repo"):
        load_adapter(name)


def test_a_folder_has_no_revisions(adapter_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapter_folder.parent)
    with pytest.raises(ValueError, match=r"'adapter' is a folder here, which has no revision 'v1'"):
        load_adapter("adapter", revision="v1")


@pytest.mark.parametrize(
    ("written", "expected"), [("", ""), (".", ""), ("small", "small"), ("./a//b/", "a/b"), (" a", " a")]
)
def test_subfolders(written: str, expected: str) -> None:
    assert normalize_subfolder(written) == expected


@pytest.mark.parametrize("subfolder", ["/small", "..", "a/../b", "../../x"])
def test_a_subfolder_is_inside_the_repo(adapter_folder: Path, subfolder: str) -> None:
    with pytest.raises(ValueError, match="subfolder must be a folder inside the repo"):
        load_adapter(adapter_folder, subfolder=subfolder)


def test_load_from_the_cache_of_the_hub(adapter_folder: Path, tmp_path: Path) -> None:
    snapshot = cache_as_repo(adapter_folder, tmp_path / "cache")
    adapter = load_adapter("user/adapter", cache_dir=tmp_path / "cache", local_files_only=True)
    assert (adapter.folder.resolve(), adapter.commit) == (snapshot.resolve(), COMMIT)


def test_load_knows_its_arguments(adapter_folder: Path) -> None:
    with pytest.raises(TypeError, match="revison"):
        load_adapter(adapter_folder, revison="main")  # type: ignore[call-arg]


def test_an_adapter_is_read_in_one_call(adapter_folder: Path) -> None:
    make_report().save(adapter_folder)
    adapter = load_adapter(adapter_folder)
    assert (adapter.folder, adapter.commit) == (adapter_folder, None)
    assert adapter.config.to_dict() == read_config(adapter_folder).to_dict()
    assert torch.equal(adapter.tokens, load_file(adapter_folder / "model.safetensors")["robustness_tokens"])
    assert (
        adapter.image_processor.to_dict()
        == read_image_processor(adapter_folder / "preprocessor_config.json").to_dict()
    )
    assert adapter.report is None, "it measured another adapter"
    own = make_report(adapter_digest=state_digest(adapter.state))
    own.save(adapter_folder)
    assert load_adapter(adapter_folder).report == own


def test_an_adapter_loads_beside_a_report_of_an_older_package(
    adapter_folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = adapter_folder / "evaluation.json"
    path.write_text('{"schema_version": 1, "package_version": "0.0.1", "a_key_of_the_past": 1}')
    assert load_adapter(adapter_folder).report is None
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path} is ignored: the report has schema_version 1, of an older package")
    RobustnessTokenModel.from_pretrained(adapter_folder).save_pretrained(adapter_folder)
    with pytest.raises(ValueError, match="evaluate again with `robtok evaluate`"):
        RobustnessReport.load(adapter_folder)


def test_another_programs_evaluation_is_not_removed(adapter_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    files = {adapter_folder / name: f"{{}}{name}" for name in ("evaluation.json", "evaluation.md", "report.html")}
    for path, text in files.items():
        path.write_text(text)
    with pytest.raises(ValueError, match=r"evaluation\.json is not valid JSON"):
        _ = load_adapter(adapter_folder).report
    model = RobustnessTokenModel.from_pretrained(adapter_folder)
    for _ in range(2):
        model.robustness_tokens.data += 1
        model.save_pretrained(adapter_folder)
    assert "the card leaves out a report that can't be read" in caplog.text
    assert {path: path.read_text() for path in files} == files


def test_errors_come_in_the_order_of_reading(adapter_folder: Path) -> None:
    files = ("config.json", "model.safetensors", "preprocessor_config.json", "evaluation.json")
    whole = {file: (adapter_folder / file).read_bytes() for file in files[:3]}
    for file in files:
        (adapter_folder / file).write_text('{"package_version": ')

    def read() -> None:
        adapter = load_adapter(adapter_folder)
        _ = adapter.image_processor, adapter.report

    for file in files:
        with pytest.raises(ValueError, match=re.escape(str(adapter_folder / file))):
            read()
        (adapter_folder / file).write_bytes(whole.get(file, make_report().to_json_string().encode()))
    read()


def test_the_commit_of_a_base(adapter_folder: Path, tmp_path: Path) -> None:
    cache_as_repo(adapter_folder, tmp_path / "cache", "user/base")
    assert cached_commit("user/base", cache_dir=tmp_path / "cache") == COMMIT
    assert cached_commit("user/other", cache_dir=tmp_path / "cache") is None
    assert cached_commit(str(adapter_folder)) is None


# config.json


def test_read_config(adapter_folder: Path) -> None:
    config = read_config(adapter_folder)
    assert (config.num_robustness_tokens, config.hidden_size) == (3, 32)
    assert config.base_model_class == "Dinov2Model"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": ...}, r"missing keys \['hidden_size'\]"),
        ({"surprise": 1}, r"unknown keys \['surprise'\]"),
        ({"schema_version": 99}, "schema_version 99"),
        ({"model_type": "dinov2"}, "model_type 'dinov2', expected 'robustness_tokens'"),
        ({"model_type": ...}, "model_type None"),
        ({"num_robustness_tokens": -3}, "num_robustness_tokens"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"initializer_range": float("nan")}, "config.json holds nan, which is no number in JSON"),
    ],
)
def test_read_config_refuses(adapter_folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(adapter_folder, **changes)
    with pytest.raises(ValueError, match=message):
        read_config(adapter_folder)


BASE_NAMES_FROM_THE_HUB = ["/etc/passwd", "../../home", "./base", "a/b/c", "~/base", "C:\\base", "", "..", "user/../x"]


@pytest.mark.parametrize("name", [*BASE_NAMES_FROM_THE_HUB, "https://example.org/base", "user/base.git", "us er/base"])
def test_a_base_name_that_is_no_repo_id(name: str) -> None:
    assert not is_repo_id(name)
    with pytest.raises(ValueError, match="is no repo id: pass base_model="):
        check_base_is_repo_id(name)


@pytest.mark.parametrize("name", ["facebook/dinov2-small", "gpt2", "timm/vit_base.fb_in1k"])
def test_a_base_name_that_is_a_repo_id(name: str) -> None:
    check_base_is_repo_id(name)
    assert is_repo_id(name)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b"\xff\xfe{}", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1]", "must hold a JSON object, got list"),
        (b"null", "must hold a JSON object, got NoneType"),
        (b'{"a": NaN}', "holds nan, which is no number in JSON"),
        (b'{"a": [{"b": -Infinity}]}', "holds -inf, which is no number in JSON"),
        (b'{"a": 1e999}', "holds inf, which is no number in JSON"),
        (b'{"a": 1, "b": 2, "a": 1}', "an object has a key twice, 'a'"),
        (b'{"x": [{"a": 1, "\\u0061": 2}]}', "an object has a key twice, 'a'"),
        (b" " * (4 << 20) + b"{}", r"has 4,194,306 bytes, expected at most 4,194,304"),
    ],
)
def test_read_json_refuses(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value)


def test_read_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": "ü"}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"a": "ü"}


# model.safetensors


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1])
def test_truncated_tokens(adapter_folder: Path, keep: int) -> None:
    path = adapter_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="not a valid safetensors file") as error:
        read_both(adapter_folder)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("content", [b"garbage", b"\xff" * 64, b"\x00" * 64, b"PK\x03\x04" + b"x" * 60])
def test_tokens_that_are_something_else(adapter_folder: Path, content: bytes) -> None:
    (adapter_folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        read_both(adapter_folder)


def test_a_pickle_is_not_read(adapter_folder: Path) -> None:
    torch.save({"robustness_tokens": torch.zeros(3, 32)}, adapter_folder / "model.safetensors")
    with pytest.raises(ValueError, match="not a valid safetensors file"):
        read_both(adapter_folder)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"must hold 'robustness_tokens' \(.*\) as config.json says, got no tensors"),
        ({"tokens": torch.zeros(3, 32)}, r"got 'tokens' \("),
        ({"robustness_tokens": torch.zeros(3, 32), "z": torch.zeros(1)}, r"got 'robustness_tokens' \(.*\), 'z' \("),
        ({"robustness_tokens": torch.zeros(4, 32)}, r"shape \(3, 32\)\) as config.json says.*shape \(4, 32\)"),
        ({"robustness_tokens": torch.zeros(3, 31)}, r"shape \(3, 32\).*shape \(3, 31\)"),
        ({"robustness_tokens": torch.zeros(1, 3, 32)}, r"shape \(1, 3, 32\)"),
        ({"robustness_tokens": torch.zeros(96)}, r"shape \(96,\)"),
        ({"robustness_tokens": torch.zeros(3, 32, dtype=torch.float16)}, r"got 'robustness_tokens' \(torch.float16"),
        ({"robustness_tokens": torch.zeros(3, 32, dtype=torch.float64)}, r"got 'robustness_tokens' \(torch.float64"),
        ({"robustness_tokens": torch.zeros(3, 32, dtype=torch.int32)}, r"got 'robustness_tokens' \(torch.int32"),
        ({"robustness_tokens": torch.full((3, 32), float("nan"))}, "not finite"),
        ({"robustness_tokens": torch.full((3, 32), float("-inf"))}, "not finite"),
    ],
)
def test_tokens_that_do_not_fit(adapter_folder: Path, tensors: dict[str, Tensor], message: str) -> None:
    save_file(tensors, adapter_folder / "model.safetensors")
    with pytest.raises(ValueError, match=message):
        read_both(adapter_folder)


def test_a_huge_file_is_refused_before_it_is_read(adapter_folder: Path) -> None:
    path = adapter_folder / "model.safetensors"
    os.truncate(path, 1 << 40)  # sparse
    with pytest.raises(
        ValueError, match=r"has 1,099,511,627,776 bytes, expected at most 65,920 for .*shape \(3, 32\)"
    ):
        read_both(adapter_folder)


def test_a_huge_header_is_refused_before_it_is_read(adapter_folder: Path) -> None:
    edit_config(adapter_folder, schema_version=2, token_depth=1, gains_and_shifts=["norm"])
    tensors = {"robustness_tokens": torch.zeros(3, 32)}
    tensors |= {f"n{number:07}.gain": torch.zeros(0) for number in range(3000)}
    save_file(tensors, adapter_folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"its header has .* bytes, expected at most 65,536"):
        read_both(adapter_folder)


def test_huge_numbers_in_the_config_allocate_nothing(adapter_folder: Path) -> None:
    edit_config(adapter_folder, num_robustness_tokens=2**20, hidden_size=2**20)
    with pytest.raises(ValueError, match=r"shape \(1048576, 1048576\)\) as config.json says"):
        read_both(adapter_folder)


# Writing


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tokens_are_written_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    tokens = torch.randn(4, 2, 6).to(dtype)[:, 1].requires_grad_()  # (4, 6), not contiguous
    write_adapter(tmp_path, {TOKENS: tokens}, {})
    written = load_file(tmp_path / "model.safetensors")
    assert set(written) == {"robustness_tokens"}
    assert written["robustness_tokens"].dtype == torch.float32
    assert torch.equal(written["robustness_tokens"], tokens.detach().float())


def test_tokens_are_readable_by_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"")
    path.chmod(0o666)
    before = os.umask(0)
    try:
        write_adapter(tmp_path, {TOKENS: torch.zeros(2, 3)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_failed_write_keeps_the_last_good_tokens(tmp_path: Path, value: float) -> None:
    write_adapter(tmp_path, {TOKENS: torch.ones(2, 3)}, {})
    with pytest.raises(ValueError, match="not finite: the training diverged"):
        write_adapter(tmp_path, {TOKENS: torch.full((2, 3), value)}, {})
    assert torch.equal(load_file(tmp_path / "model.safetensors")["robustness_tokens"], torch.ones(2, 3))
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_leaves_the_old_file_alone(tmp_path: Path) -> None:
    write_adapter(tmp_path, {TOKENS: torch.ones(2, 3)}, {})
    path, report = tmp_path / "model.safetensors", tmp_path / "evaluation.json"
    report.write_text("{}")  # of these tokens
    with full_disk(), pytest.raises(OSError, match=r"could not be written \(File too large\) and is unchanged"):
        write_adapter(tmp_path, {TOKENS: torch.zeros(2, 3)}, {})
    assert torch.equal(load_file(path)["robustness_tokens"], torch.ones(2, 3))
    assert set(tmp_path.iterdir()) == {path, report}


def test_tokens_are_on_the_disk_before_they_replace_others(tmp_path: Path) -> None:
    write_adapter(tmp_path, {TOKENS: torch.ones(2, 3)}, {})
    path, report = tmp_path / "model.safetensors", tmp_path / "evaluation.json"
    report.write_text("{}")  # of these tokens
    message = r"could not be written \(Input/output error\) and is unchanged"
    with broken_disk(), pytest.raises(OSError, match=message):
        write_adapter(tmp_path, {TOKENS: torch.zeros(2, 3)}, {})
    assert torch.equal(load_file(path)["robustness_tokens"], torch.ones(2, 3))
    assert set(tmp_path.iterdir()) == {path, report}


@pytest.mark.parametrize("first", [True, False], ids=["into an empty folder", "over another adapter"])
def test_a_save_that_is_killed_anywhere_mixes_no_adapters(
    adapter_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: bool
) -> None:
    """Kills a save before each of its changes of the folder."""
    model = RobustnessTokenModel.from_base(build_base("dinov2", num_hidden_layers=3), num_robustness_tokens=3)
    old, new = load_adapter(adapter_folder), model.injector.state
    changes, allowed = 0, 0

    def limited(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal changes
            changes += 1
            if changes > allowed:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        return call

    found = []
    while True:
        folder = tmp_path / f"killed-{allowed}"
        if not first:
            shutil.copytree(adapter_folder, folder)
        changes = 0
        with monkeypatch.context() as patch:
            for name in ("replace", "unlink", "write_bytes"):
                patch.setattr(Path, name, limited(getattr(Path, name)))
            with suppress(KeyboardInterrupt):
                model.save_pretrained(folder)
        if is_adapter(folder):
            loaded = load_adapter(folder)
            is_old = loaded.config.base_model_fingerprint == old.config.base_model_fingerprint
            assert torch.equal(loaded.tokens, old.tokens if is_old else new[TOKENS].detach())
            found.append("old" if is_old else "new")
        else:
            with pytest.raises(ValueError, match=f"{folder}"):
                load_adapter(folder)
            found.append("error")
        if changes <= allowed:
            break
        allowed += 1
    assert found[-1] == "new"
    assert found == sorted(found, key=["old", "error", "new"].index)
    assert ("old" in found) is not first


def test_a_small_file_is_on_the_disk_before_it_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "file.txt"
    write_text(path, "before")
    with broken_disk(), pytest.raises(OSError, match="Input/output error"):
        write_text(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_readers_never_see_half_a_file(adapter_folder: Path) -> None:
    config = read_config(adapter_folder)

    def write() -> None:
        for _ in range(50):
            write_adapter(adapter_folder, {TOKENS: torch.ones(3, 32)}, {})

    writer = threading.Thread(target=write)
    writer.start()
    while writer.is_alive():
        assert read_state(adapter_folder, config)[TOKENS].shape == (3, 32)
    writer.join()


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ((), False),
        (("README.md", "notes.txt"), False),
        (("config.json",), True),
        (("model.safetensors",), True),
        (("config.json", "model.safetensors", "README.md"), True),
    ],
)
def test_holds_adapter(tmp_path: Path, files: tuple[str, ...], expected: bool) -> None:
    for file in files:
        (tmp_path / file).touch()
    assert holds_adapter(tmp_path) is expected
    assert not holds_adapter(tmp_path / "no such folder")


def test_another_model_is_not_overwritten(adapter_folder: Path, base_folders: dict[str, Path], tmp_path: Path) -> None:
    check_no_other_model(tmp_path)
    check_no_other_model(adapter_folder)
    with pytest.raises(ValueError, match="holds another model, of model_type 'vit'"):
        check_no_other_model(base_folders["vit"])
    (adapter_folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        check_no_other_model(adapter_folder)


def test_a_tilde_is_the_home_folder_in_every_function_that_takes_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    base = build_base("dinov2")
    base.save_pretrained(tmp_path / "home" / "base")
    processor = build_image_processor(image_size=16)
    processor.save_pretrained(tmp_path / "home" / "base")
    RobustnessTokenModel.from_base("~/base").save_pretrained("~/adapter")
    RobustnessTokenModel.from_pretrained("~/adapter")
    RobustnessTokenModel.from_pretrained("~/adapter", base_model="~/base")
    assert load_adapter("~/adapter").folder == tmp_path / "home" / "adapter"
    assert holds_adapter("~/adapter")
    save_head(ClassificationHead(4, 2, base_model_fingerprint={"float32": "0" * 64}), "~/head")
    assert load_head("~/head").num_labels == 2
    make_report().save("~/report")
    assert RobustnessReport.load("~/report").results
    args = RobustnessTokenTrainingArguments(output_dir="~/run", max_steps=1, num_attack_steps=1, disable_tqdm=True)
    trainer = RobustnessTokenTrainer(
        RobustnessTokenModel.from_base(base, image_processor=processor), args, [{"images": torch.rand(3, 16, 16)}] * 2
    )
    trainer.train()
    trainer.save_model()
    trainer.save_model("~/copy")
    found = {path.name for path in (tmp_path / "home").iterdir()}
    assert found == {"base", "adapter", "head", "report", "run", "copy"}
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.parametrize("name", ["save", "load", "head", "run", "dataset", "report"])
def test_a_path_that_is_not_utf8_is_named(name: str, tmp_path: Path) -> None:
    path = f"{tmp_path}/a\udcff"
    uses: dict[str, Any] = {
        "save": lambda: RobustnessTokenModel.from_base(
            build_base("dinov2"), image_processor=build_image_processor(image_size=16)
        ).save_pretrained(path),
        "load": lambda: RobustnessTokenModel.from_pretrained(path),
        "head": lambda: save_head(ClassificationHead(4, 2, base_model_fingerprint={"float32": "0" * 64}), path),
        "run": lambda: RobustnessTokenTrainingArguments(output_dir=path),
        "dataset": lambda: load_image_dataset(path),
        "report": lambda: make_report().save(path),
    }
    with pytest.raises(ValueError, match=r"a\\udcff' must be valid UTF-8, .* rename the folder"):
        uses[name]()


def test_another_users_folder_is_not_taken_for_a_missing_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, closed = os.stat, str(tmp_path / "closed" / "adapter")

    def stat(path: Any, **kwargs: Any) -> os.stat_result:
        if path == closed:
            raise PermissionError(13, "Permission denied", closed)
        return real(path, **kwargs)

    monkeypatch.setattr(os, "stat", stat)
    uses: list[Any] = [RobustnessTokenModel.from_pretrained, RobustnessTokenModel.from_base, load_head]
    for load in (*uses, load_image_dataset, RobustnessReport.load):
        with pytest.raises(PermissionError, match=r"Permission denied: .*closed/adapter"):
            load(closed)


def test_weights_that_may_not_be_read_are_not_called_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build_base("dinov2").save_pretrained(tmp_path)

    def unreadable(path: Any, *_: Any, **__: Any) -> None:
        raise FileNotFoundError(f"No such file or directory: {path}")  # as safetensors says

    monkeypatch.setattr("transformers.modeling_utils.safe_open", unreadable)
    with pytest.raises(PermissionError, match=r"weights can't be opened, they may be another user's: .*safetensors"):
        RobustnessTokenModel.from_base(tmp_path)
