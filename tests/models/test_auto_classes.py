"""Adapters with a file beside them that imports the package (`register_for_auto_class`)."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification

import robustness_tokens
from robustness_tokens import RobustnessTokenForImageClassification, RobustnessTokenModel
from tests.support.adapters import cache_as_repo


# Run by a process that imports transformers only. Hidden: as if the package were not installed.
LOAD = """
import sys
folder, inputs, outputs, auto_class, hidden = sys.argv[1:]
if hidden == "hidden":
    sys.modules["robustness_tokens"] = None  # any import of it fails
import transformers
from safetensors.torch import load_file, save_file
model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
save_file({"output": model(**load_file(inputs))[0].contiguous()}, outputs)
print(type(model).__module__, type(model.config).__module__)
"""


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Uses one thread, as the other process does: sums over more threads would differ in the last bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def unregistered() -> Iterator[None]:
    """Restores the registration, which belongs to the class, after each test."""
    yield
    for model_class in (RobustnessTokenModel, RobustnessTokenForImageClassification):
        model_class._auto_class = None


def load_elsewhere(
    name: str | Path, pixel_values: Tensor, tmp_path: Path, auto_class: str, *, hidden: bool = False
) -> subprocess.CompletedProcess[str]:
    save_file({"pixel_values": pixel_values}, tmp_path / "inputs.safetensors")
    output = tmp_path / "outputs.safetensors"
    arguments = [str(name), str(tmp_path / "inputs.safetensors"), str(output), auto_class, "hidden" if hidden else ""]
    environment = {
        "HF_HOME": str(tmp_path / "hf_home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PATH": "",
        "PYTHONPATH": str(Path(robustness_tokens.__file__).parents[1]),
    }
    return subprocess.run(
        [sys.executable, "-c", LOAD, *arguments],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
    )


def compute(model: Any, pixel_values: Tensor) -> Tensor:
    with torch.no_grad():
        return model(pixel_values=pixel_values)[0]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "auto_class", ["AutoModel", pytest.param("AutoModelForImageClassification", marks=pytest.mark.slow)]
)
def test_an_adapter_with_code_imports_the_package(
    base_folders: dict[str, Path],
    classifier_folders: dict[str, Path],
    pixel_values: Tensor,
    tmp_path: Path,
    auto_class: str,
) -> None:
    is_classifier = auto_class == "AutoModelForImageClassification"
    model_class: Any = RobustnessTokenForImageClassification if is_classifier else RobustnessTokenModel
    folders = classifier_folders if is_classifier else base_folders
    model = model_class.from_base(folders["dinov2"], num_robustness_tokens=3, initializer_range=1.0)
    model_class.register_for_auto_class(auto_class)
    model.save_pretrained(tmp_path / "adapter")
    result = load_elsewhere(tmp_path / "adapter", pixel_values, tmp_path, auto_class)
    assert result.returncode == 0, result.stderr
    assert torch.equal(load_file(tmp_path / "outputs.safetensors")["output"], compute(model, pixel_values))
    assert all(name.startswith("robustness_tokens.") for name in result.stdout.split()[-2:])


@pytest.mark.usefixtures("one_thread")
def test_an_adapter_on_the_hub_imports_the_package(
    base_folders: dict[str, Path], pixel_values: Tensor, tmp_path: Path
) -> None:
    model = RobustnessTokenModel.from_base(base_folders["dinov2"], num_robustness_tokens=3, initializer_range=1.0)
    RobustnessTokenModel.register_for_auto_class()
    model.save_pretrained(tmp_path / "adapter", base_model_id="user/base")
    for name, folder in {"adapter": tmp_path / "adapter", "base": base_folders["dinov2"]}.items():
        cache_as_repo(folder, tmp_path / "hf_home" / "hub", f"user/{name}")
    result = load_elsewhere("user/adapter", pixel_values, tmp_path, "AutoModel")
    assert result.returncode == 0, result.stderr
    assert torch.equal(load_file(tmp_path / "outputs.safetensors")["output"], compute(model, pixel_values))


def test_where_the_package_is_missing_transformers_names_it(
    base_folders: dict[str, Path], pixel_values: Tensor, tmp_path: Path
) -> None:
    RobustnessTokenModel.register_for_auto_class()
    RobustnessTokenModel.from_base(base_folders["dinov2"]).save_pretrained(tmp_path / "adapter")
    result = load_elsewhere(tmp_path / "adapter", pixel_values, tmp_path, "AutoModel", hidden=True)
    assert result.returncode != 0
    assert "robustness_tokens" in result.stderr.splitlines()[-1]


def test_the_code_is_one_file_that_imports_the_package(tmp_path: Path, base_folders: dict[str, Path]) -> None:
    RobustnessTokenModel.register_for_auto_class()
    RobustnessTokenModel.from_base(base_folders["dinov2"]).save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.py")
    imported = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
    assert [node.module for node in imported] == ["robustness_tokens"]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "modeling.RobustnessTokenConfig",
        "AutoModel": "modeling.RobustnessTokenModel",
    }


def test_code_is_written_only_when_asked_for(base_folders: dict[str, Path], tmp_path: Path) -> None:
    model = RobustnessTokenModel.from_base(base_folders["dinov2"])
    RobustnessTokenForImageClassification.register_for_auto_class()  # another class
    model.save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    RobustnessTokenModel.register_for_auto_class()
    model.save_pretrained(tmp_path / "with_code")
    RobustnessTokenModel._auto_class = None
    loaded = RobustnessTokenModel.from_pretrained(tmp_path / "with_code")
    loaded.save_pretrained(tmp_path / "again")
    assert not list((tmp_path / "again").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "again" / "config.json").read_text())


@pytest.mark.parametrize("trust_remote_code", [None, False, True])
def test_with_the_package_the_code_is_never_run(
    base_folders: dict[str, Path], pixel_values: Tensor, tmp_path: Path, trust_remote_code: bool | None
) -> None:
    RobustnessTokenModel.register_for_auto_class("AutoModel")
    model = RobustnessTokenModel.from_base(base_folders["dinov2"])
    model.save_pretrained(tmp_path / "adapter")
    for path in (tmp_path / "adapter").glob("*.py"):
        path.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    given: dict[str, Any] = {} if trust_remote_code is None else {"trust_remote_code": trust_remote_code}
    for load in (AutoModel.from_pretrained, RobustnessTokenModel.from_pretrained):
        loaded: Any = load(tmp_path / "adapter", **given)
        assert type(loaded) is RobustnessTokenModel
        assert torch.equal(compute(loaded, pixel_values), compute(model, pixel_values))
    assert AutoConfig.from_pretrained(tmp_path / "adapter", **given).auto_map["AutoModel"]
    with pytest.raises(ValueError, match="no classification head"):
        AutoModelForImageClassification.from_pretrained(tmp_path / "adapter", **given)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("model_class", "auto_class", "expected"),
    [
        (RobustnessTokenModel, "AutoModelForImageClassification", "'AutoModel' for RobustnessTokenModel"),
        (RobustnessTokenModel, AutoConfig, "'AutoModel' for RobustnessTokenModel, got 'AutoConfig'"),
        (RobustnessTokenForImageClassification, "AutoModel", "'AutoModelForImageClassification' for"),
        (RobustnessTokenForImageClassification, "NoSuchClass", "got 'NoSuchClass'"),
    ],
)
def test_only_the_auto_class_that_fits(model_class: Any, auto_class: Any, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        model_class.register_for_auto_class(auto_class)
    assert model_class._auto_class is None


def test_a_class_of_ones_own_has_no_code_to_save() -> None:
    class Mine(RobustnessTokenModel):
        pass

    with pytest.raises(ValueError, match="auto_class must be None for Mine"):
        Mine.register_for_auto_class("AutoModel")
