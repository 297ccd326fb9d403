"""An adapter may come from anyone: what its files say never becomes code, a path, or a model that nobody asked for."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, BitImageProcessorPil, pipeline

from robustness_tokens import RobustnessTokenModel, inject_tokens
from robustness_tokens.data.image_processors import read_image_processor
from robustness_tokens.hub import push_adapter
from robustness_tokens.hub.adapter_folder import check_base_is_repo_id, load_adapter
from robustness_tokens.models.injection import find_injector
from robustness_tokens.models.layer_stack import find_layer_stack
from robustness_tokens.utils.files import read_json
from tests.support.adapters import cache_as_repo


EVIL_MAP = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoModelForImageClassification": "evil.Evil"}


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# Code


@pytest.fixture
def trap(adapter_folder: Path, tmp_path: Path) -> Path:
    """A file that exists once `evil.py`, which lies beside the adapter, has been run."""
    ran = tmp_path / "ran"
    source = f"open({str(ran)!r}, 'w')\nclass Evil:\n    pass\n"
    for file in ("evil.py", "modeling.py", "configuration.py", "__init__.py", "conftest.py", "setup.py"):
        (adapter_folder / file).write_text(source)
    return ran


LOADERS: dict[str, Callable[..., Any]] = {
    "RobustnessTokenModel": RobustnessTokenModel.from_pretrained,
    "AutoConfig": AutoConfig.from_pretrained,
    "AutoModel": AutoModel.from_pretrained,
    "AutoModelForImageClassification": AutoModelForImageClassification.from_pretrained,
    "pipeline": lambda folder, **given: pipeline("image-feature-extraction", model=str(folder), **given),
}


@pytest.mark.parametrize("trust_remote_code", [None, True])
@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize(
    "auto_map",
    [
        EVIL_MAP,
        {"AutoConfig": "user/evil--evil.Evil"},
        {"AutoModel": "evil.Evil"},
        {"AutoConfig": None},
        {"AutoModelForDepthEstimation": None},
        {"AutoModel": ["a"]},
        [],
        "evil.Evil",
    ],
)
def test_code_that_a_config_names_is_refused(
    adapter_folder: Path, trap: Path, auto_map: Any, loader: str, trust_remote_code: bool | None
) -> None:
    edit_json(adapter_folder / "config.json", auto_map=auto_map)
    given = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    # transformers reads the file first, and does not check what it finds under "AutoConfig".
    is_text = isinstance(auto_map, dict) and isinstance(auto_map.get("AutoConfig", ""), str)
    with pytest.raises(ValueError if is_text else (ValueError, TypeError)) as error:
        LOADERS[loader](adapter_folder, **given)
    if is_text or loader == "RobustnessTokenModel":
        assert "auto_map must name no code but the package's own" in str(error.value)
    assert not trap.exists()


@pytest.mark.parametrize("loader", ["RobustnessTokenModel", "AutoModel", "pipeline"])
@pytest.mark.parametrize("trust_remote_code", [None, True])
def test_code_that_an_image_processor_names_is_refused(
    adapter_folder: Path, trap: Path, loader: str, trust_remote_code: bool | None
) -> None:
    edit_json(adapter_folder / "preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.Evil"})
    given = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    # A pipeline repeats the error of the model inside its own.
    with pytest.raises(ValueError, match=r"preprocessor_config\.json names code of its own"):
        LOADERS[loader](adapter_folder, **given)
    assert not trap.exists()


def test_a_pickle_beside_the_tokens_is_not_read(adapter_folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return open, (str(tmp_path / "ran"), "w")

    for file in ("pytorch_model.bin", "model.pt", "adapter_model.bin", "training_args.bin", "optimizer.pt"):
        torch.save({"robustness_tokens": Trap()}, adapter_folder / file)
    RobustnessTokenModel.from_pretrained(adapter_folder)
    assert not (tmp_path / "ran").exists()
    (adapter_folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        RobustnessTokenModel.from_pretrained(adapter_folder)
    assert not (tmp_path / "ran").exists()


# Names that would become paths or other classes


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "/etc",
        "file:///etc/passwd",
        "C:\\windows",
        "\\\\server\\share",
        "user/base\\..\\..",
        "models--user--base",
        "~root/base",
        "user/base@main",
        "user//base",
        "user/..base",
        ".",
        "%2e%2e/x",
        "user/ba se",
        "\N{FULLWIDTH LATIN SMALL LETTER U}ser/base",
        "u" * 300,
    ],
)
def test_a_base_from_the_hub_is_a_repo_id(adapter_folder: Path, tmp_path: Path, name: str) -> None:
    edit_json(adapter_folder / "config.json", base_model_name_or_path=name)
    cache_as_repo(adapter_folder, tmp_path / "cache")
    with pytest.raises(ValueError, match="no repo id: pass base_model="):
        RobustnessTokenModel.from_pretrained("user/adapter", cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("name", ["user/base", "base"])
def test_a_repo_id_is_not_taken_for_a_folder(
    adapter_folder: Path,
    base_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    edit_json(adapter_folder / "config.json", base_model_name_or_path=name)
    cache_as_repo(adapter_folder, tmp_path / "cache")
    shutil.copytree(base_folders["dinov2"], tmp_path / "here" / name)
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(ValueError, match=f"names the base '{name}', which is also a local folder"):
        RobustnessTokenModel.from_pretrained("user/adapter", cache_dir=tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    check_base_is_repo_id(name)


@pytest.mark.parametrize(
    "revision",
    ["../../../../etc/passwd", "/etc/passwd", "main", "refs/pr/1", "", "0123abc/..", "0123ABC", "a" * 41, "0\n"],
)
def test_the_base_is_pinned_to_a_commit_and_to_nothing_else(adapter_folder: Path, revision: str) -> None:
    edit_json(adapter_folder / "config.json", base_model_revision=revision)
    with pytest.raises(ValueError, match="base_model_revision must be a commit"):
        RobustnessTokenModel.from_pretrained(adapter_folder)


@pytest.mark.parametrize("text", ["a\0b", "\x1b[2Jcleared", "\x9b31m", "\ud800", "a\rb", "a\u202eb", "a\u2028b"])
@pytest.mark.parametrize("field", ["base_model_name_or_path", "feature_view", "training"])
def test_characters_that_are_no_text_are_refused(adapter_folder: Path, field: str, text: str) -> None:
    edit_json(adapter_folder / "config.json", **{field: {text: [text]} if field == "training" else text})
    with pytest.raises(ValueError, match=r"config\.json holds .* characters that are no text"):
        RobustnessTokenModel.from_pretrained(adapter_folder)


def test_the_name_of_a_tensor_does_not_steer_the_terminal(adapter_folder: Path) -> None:
    save_file({"\x1b[31mred": torch.zeros(2, 32)}, adapter_folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"\\x1b\[31mred") as caught:
        load_adapter(adapter_folder)
    assert str(caught.value).isprintable()


def test_deep_nesting_is_refused(adapter_folder: Path) -> None:
    nested: Any = 1
    for _ in range(200):
        nested = [nested]
    edit_json(adapter_folder / "config.json", training={"a": nested})
    with pytest.raises(ValueError, match=r"config\.json is nested more than 32 deep"):
        RobustnessTokenModel.from_pretrained(adapter_folder)


@pytest.mark.parametrize(
    "name", ["PreTrainedModel", "BertModel", "is_torch_available", "utils", "dynamic_module_utils"]
)
def test_a_base_class_that_is_no_vision_transformer(adapter_folder: Path, name: str) -> None:
    edit_json(adapter_folder / "config.json", base_model_class=name)
    with pytest.raises(ValueError, match=name):
        RobustnessTokenModel.from_pretrained(adapter_folder)


# The image processor


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_processor_type": "AutoModel"}, "'AutoModel', which is no image processor"),
        ({"image_processor_type": "Trainer"}, "'Trainer', which is no image processor"),
        ({"image_processor_type": "BertTokenizer"}, "'BertTokenizer', which is no image processor"),
        ({"image_processor_type": "os.system"}, "'os.system', which is no image processor"),
        ({"image_processor_type": "../x"}, "'../x', which is no image processor"),
        ({"image_processor_type": None}, "None, which is no image processor"),
        ({"image_processor_type": ["ViTImageProcessor"]}, "which is no image processor"),
        ({"auto_map": {}}, "names code of its own"),
        ({"preprocess": "x"}, r"keys \['preprocess'\], which are no settings"),
        ({"__class__": "x", "_auto_class": "AutoModel"}, r"keys \['__class__', '_auto_class'\]"),
        ({"size": {"height": 10**9, "width": 10**9}}, "holds 1000000000, expected numbers from -4096 to 4096"),
        ({"crop_size": 10**400}, "expected numbers from -4096 to 4096"),
        ({"image_mean": [float("nan")] * 3}, "holds nan"),
        ({"image_std": [float("inf")] * 3}, "holds inf"),
        ({"size": "huge"}, r"preprocessor_config\.json makes no BitImageProcessor"),
        ({"size": {"breadth": 16}}, r"preprocessor_config\.json makes no BitImageProcessor"),
    ],
)
def test_an_image_processor_that_is_none(adapter_folder: Path, changes: dict[str, Any], message: str) -> None:
    path = adapter_folder / "preprocessor_config.json"
    edit_json(path, **changes)
    with pytest.raises(ValueError, match=message) as error:
        RobustnessTokenModel.from_pretrained(adapter_folder)
    assert str(path) in str(error.value)


def test_another_file_does_not_replace_the_image_processor(adapter_folder: Path) -> None:
    evil = {"image_processor": {"image_processor_type": "ViTImageProcessor", "image_mean": [9.0] * 3}}
    (adapter_folder / "processor_config.json").write_text(json.dumps(evil))
    processor: Any = RobustnessTokenModel.from_pretrained(adapter_folder).image_processor
    assert isinstance(processor, BitImageProcessorPil)
    assert max(processor.image_mean) < 1


def test_an_image_processor_is_read_as_it_was_written(adapter_folder: Path) -> None:
    processor = read_image_processor(adapter_folder / "preprocessor_config.json")
    written = json.loads((adapter_folder / "preprocessor_config.json").read_text())
    assert json.loads(processor.to_json_string()) == written


# The fingerprint


def test_a_classifier_on_another_base_is_refused_and_both_are_named(
    adapter_folder: Path, base_folders: dict[str, Path], make_base: Callable[..., Any], tmp_path: Path
) -> None:
    other = make_base("dinov2", classifier=True)
    with torch.no_grad():
        find_layer_stack(other).layers[-1].mlp.fc2.bias[0] += 1e-2  # type: ignore[union-attr, operator, index]
    other.save_pretrained(tmp_path / "classifier")
    other = type(other).from_pretrained(tmp_path / "classifier")
    with pytest.raises(ValueError, match="the tokens were trained on") as error:
        inject_tokens(other, adapter_folder)
    assert f"Dinov2Model '{base_folders['dinov2']}'" in str(error.value)
    assert f"Dinov2ForImageClassification '{tmp_path / 'classifier'}'" in str(error.value)
    assert "ignore_base_mismatch=True" in str(error.value)
    assert find_injector(other) is None
    inject_tokens(other, adapter_folder, ignore_base_mismatch=True)
    assert find_injector(other) is not None


@pytest.mark.parametrize("fingerprint", [{}, {"int8": "0" * 64}, None])
def test_an_adapter_that_does_not_identify_its_base_is_refused(
    adapter_folder: Path, make_base: Callable[..., Any], fingerprint: Any
) -> None:
    edit_json(adapter_folder / "config.json", base_model_fingerprint=fingerprint)
    for load in (
        lambda: RobustnessTokenModel.from_pretrained(adapter_folder),
        lambda: inject_tokens(make_base("dinov2"), adapter_folder),
    ):
        with pytest.raises(ValueError, match="cannot tell whether"):
            load()


def test_an_adapter_cannot_ask_for_less_care(adapter_folder: Path) -> None:
    for key in (
        "ignore_base_mismatch",
        "trust_remote_code",
        "_attn_implementation",
        "attn_implementation",
        "quantization_config",
    ):
        content = {**read_json(adapter_folder / "config.json"), key: True}
        folder = shutil.copytree(adapter_folder, adapter_folder.parent / key)
        (folder / "config.json").write_text(json.dumps(content))
        with pytest.raises(ValueError, match=rf"unknown keys \['{key}'\]"):
            load_adapter(folder)


def test_only_the_files_of_an_adapter_are_fetched(adapter_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.update(options)
        return str(adapter_folder)

    monkeypatch.setattr("robustness_tokens.hub.adapter_folder.snapshot_download", snapshot_download)
    adapter = load_adapter("user/adapter", subfolder="")
    assert (adapter.folder, adapter.commit) == (adapter_folder, adapter_folder.name)
    allowed = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md", "evaluation.json"}
    assert set(asked["allow_patterns"]) == allowed


# Files that are no files of the folder


def secret_file(path: Path) -> None:
    """Replaces a file of an adapter by a link to a copy of it elsewhere."""
    path.parent.with_name("elsewhere").mkdir()
    shutil.move(path, path.parent.with_name("elsewhere") / path.name)
    path.symlink_to(path.parent.with_name("elsewhere") / path.name)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def device(path: Path) -> None:
    path.unlink()
    path.symlink_to("/dev/zero")


def folder_in_its_place(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("file", ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"])
@pytest.mark.parametrize("replace", [secret_file, pipe, device, folder_in_its_place])
def test_what_is_no_file_of_the_folder_is_not_pushed(
    adapter_folder: Path, file: str, replace: Callable[[Path], None]
) -> None:
    replace(adapter_folder / file)
    message = r"is a link to|regular file|is not a robustness-token adapter: it has no"
    with pytest.raises(ValueError, match=message) as error:
        push_adapter(adapter_folder, "user/adapter")
    assert file in str(error.value)


def damage_metadata(card: Path) -> None:
    card.write_text("---\na: 1\na: 2\n---\n" + card.read_text().split("---\n", 2)[2])


@pytest.mark.parametrize("replace", [secret_file, pipe, damage_metadata])
def test_a_card_that_can_not_be_read_stops_a_save_before_it_begins(
    adapter_folder: Path, replace: Callable[[Path], None]
) -> None:
    model = RobustnessTokenModel.from_pretrained(adapter_folder)
    replace(adapter_folder / "README.md")
    before = (adapter_folder / "config.json").stat().st_mtime_ns
    with pytest.raises(ValueError, match="README"):
        model.save_pretrained(adapter_folder)
    assert (adapter_folder / "config.json").stat().st_mtime_ns == before, "nothing is half saved"


def test_links_inside_a_folder_and_in_the_hubs_cache_are_followed(adapter_folder: Path, tmp_path: Path) -> None:
    (adapter_folder / "files").mkdir()
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.move(adapter_folder / file, adapter_folder / "files" / file)
        (adapter_folder / file).symlink_to(f"files/{file}")
    tokens = load_adapter(adapter_folder).tokens
    # The store that repos share, as huggingface_hub lays it out: a blob is a link too.
    snapshot = tmp_path / "hub" / "models--user--adapter" / "snapshots" / "abc"
    for blobs in (tmp_path / "hub" / "blobs", snapshot.parent.parent / "blobs", snapshot):
        blobs.mkdir(parents=True)
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        shutil.copy(adapter_folder / "files" / file, tmp_path / "hub" / "blobs" / file)
        (snapshot.parent.parent / "blobs" / file).symlink_to(f"../../blobs/{file}")
        (snapshot / file).symlink_to(f"../../blobs/{file}")
    assert torch.equal(load_adapter(snapshot).tokens, tokens)
