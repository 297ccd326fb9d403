"""`examples/real_backbone` on a tiny random ViT in the layout of the ONNX export; no network."""

import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor
from transformers import Dinov2Config, Dinov2Model

from robustness_tokens import RobustnessTokenTrainer


EXAMPLE = Path(__file__).parents[2] / "examples" / "real_backbone"
SIDE, WIDTH, PATCH_SIZE = 28, 64, 14
NEW_NAMES = {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"} | {
    "o_proj": "output.dense"
}


@pytest.fixture(scope="module")
def prepare() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE / "prepare.py"))


def tiny_vit() -> Dinov2Model:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = Dinov2Config(
            hidden_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=1,
            mlp_ratio=2,
            patch_size=PATCH_SIZE,
            image_size=SIDE,
            use_mask_token=False,
            initializer_range=0.2,
        )
        return Dinov2Model(config).eval()


def hub_name(name: str) -> str:
    """Returns the name of a weight in DINOv2's checkpoints on the Hub."""
    for new, old in NEW_NAMES.items():
        name = name.replace(f"attention.{new}", f"attention.{old}")
    return name


def export(model: Dinov2Model) -> onnx.GraphProto:
    """Returns a graph with the weights in the layout of the export: linear ones without a name, and a decoder."""
    tensors: dict[str, np.ndarray] = {"decoder.final_conv.weight": np.zeros((1, 4, 1, 1), np.float32)}
    nodes: list[onnx.NodeProto] = []
    for name, value in model.state_dict().items():
        name, array = hub_name(name), value.numpy()
        if name.endswith("position_embeddings"):
            tensors["onnx::Concat_1"], tensors["onnx::Reshape_2"] = array[:, :1], array[:, 1:]
        elif value.dim() == 2:
            number, bias = len(nodes), f"backbone.{name.removesuffix('weight')}bias"
            tensors[f"onnx::MatMul_{number}"] = np.ascontiguousarray(array.T)
            nodes.append(helper.make_node("MatMul", [f"x{number}", f"onnx::MatMul_{number}"], [f"y{number}"]))
            nodes.append(helper.make_node("Add", [bias, f"y{number}"], [f"z{number}"]))
        else:
            tensors[f"backbone.{name}"] = array
    initializers = [numpy_helper.from_array(value, name) for name, value in tensors.items()]
    output = helper.make_tensor_value_info("z0", TensorProto.FLOAT, None)
    return helper.make_graph(nodes, "tiny", [], [output], initializers)


@pytest.fixture(scope="module")
def prepared(prepare: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `prepare.py` leaves it, with a tiny backbone and random pictures."""
    folder = tmp_path_factory.mktemp("prepared")
    prepare["write_backbone"](prepare["read_weights"](export(tiny_vit())), folder / "backbone", image_size=SIDE)
    generator = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 2)):
        (folder / "images" / split).mkdir(parents=True)
        for number in range(count):
            pixels = generator.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / split / f"{number}.png")
    return folder


def test_each_weight_of_the_export_finds_its_place(prepare: dict[str, Any], prepared: Path) -> None:
    expected, found = tiny_vit(), Dinov2Model.from_pretrained(prepared / "backbone").eval()
    assert found.config.num_hidden_layers == 2
    pixel_values = torch.rand(2, 3, SIDE, SIDE)
    with torch.no_grad():
        first, second = (m(pixel_values=pixel_values).last_hidden_state for m in (expected, found))
    assert torch.equal(first, second)


def test_a_weight_that_is_unknown_or_missing_is_an_error(prepare: dict[str, Any], tmp_path: Path) -> None:
    graph = export(tiny_vit())
    graph.initializer.append(numpy_helper.from_array(np.zeros((2, 2), np.float32), "onnx::MatMul_99"))
    with pytest.raises(ValueError, match="not known here: \\['onnx::MatMul_99'\\]"):
        prepare["read_weights"](graph)
    weights: dict[str, Tensor] = prepare["read_weights"](export(tiny_vit()))
    del weights["layernorm.bias"]
    with pytest.raises(ValueError, match=r"layernorm\.bias"):
        prepare["write_backbone"](weights, tmp_path)
    weights |= {"layernorm.bias": torch.zeros(WIDTH), "decoder.bias": torch.zeros(WIDTH)}
    with pytest.raises(ValueError, match=r"decoder\.bias"):
        prepare["write_backbone"](weights, tmp_path)


def test_no_photograph_is_on_both_sides(prepare: dict[str, Any]) -> None:
    names = [f"{package.name}/{name}" for package in prepare["PACKAGES"] for name in package.photographs]
    assert len(set(names)) == len(names) == 66
    training, held_out = prepare["split_photographs"](names, num_held_out=32)
    assert (len(training), len(held_out)) == (34, 32)
    assert set(training) | set(held_out) == set(names)
    assert prepare["split_photographs"](names[::-1], num_held_out=32) == (training, held_out), "the order is no matter"


def write_deb(prepare: dict[str, Any], folder: Path) -> tuple[Path, Any]:
    """Writes a package of four photographs, each of one grey value."""
    package = prepare["Package"]("tiny", "1:2", "", "usr/share/{}.png", tuple("abcd"))
    root = folder / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: tiny\nVersion: 1:2\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: d\n"
    )
    for number, name in enumerate(package.photographs):
        file = root / package.path.format(name)
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 240), (50 * number,) * 3).save(file)
    subprocess.run(["dpkg-deb", "-b", root, folder / package.file], check=True, capture_output=True)
    return folder / package.file, package


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs Debian's dpkg-deb")
def test_crops_of_a_held_out_photograph_are_not_in_training(prepare: dict[str, Any], tmp_path: Path) -> None:
    file, package = write_deb(prepare, tmp_path)
    assert file.name == "tiny_1%3a2_all.deb"
    counts = prepare["write_images"]({file: package}, tmp_path / "images", num_held_out=1)
    assert counts == {"train": 3 * prepare["NUM_CROPS"], "validation": 1}
    pictures = {split: sorted((tmp_path / "images" / split).iterdir()) for split in counts}
    greys = {
        split: {Image.open(file).convert("L").getextrema() for file in files} for split, files in pictures.items()
    }
    assert len(greys["train"]) == 3
    assert len(greys["validation"]) == 1
    assert not greys["train"] & greys["validation"]
    assert {Image.open(file).size for file in pictures["train"]} == {(224, 224)}
    with pytest.raises(ValueError, match=r"has no \['usr/share/e.png'\]"):
        list(prepare["read_photographs"](file, ["usr/share/a.png", "usr/share/e.png"]))


def test_a_download_with_a_wrong_hash_is_refused(prepare: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "downloads" / "x.deb"
    command = [sys.executable, "-c", "open('x.deb', 'w').write('hello')"]
    with pytest.raises(ValueError, match=r"x\.deb has the sha256 2cf24dba.*, expected 0123: .*delete it"):
        prepare["download"](command, file, sha256="0123")
    hello = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    prepare["download"](["not a command"], file, sha256=hello)  # it is there, and not loaded again
    file.unlink()
    with pytest.raises(OSError, match=r"did not download x\.deb: \nCheck the network"):
        prepare["download"]([sys.executable, "-c", "pass"], file, sha256=hello)
    with pytest.raises(OSError, match=r"missing-command is missing"):
        prepare["download"](["missing-command"], file, sha256=hello)


def released_tokens(folder: Path) -> Path:
    file = folder / "released.pt"
    torch.save({"rtokens": torch.randn(1, 3, WIDTH, generator=torch.Generator().manual_seed(0))}, file)
    return file


def test_train_measures_every_row_once(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    example = runpy.run_path(str(EXAMPLE / "train.py"))
    options = ["--prepared", prepared, "--output", tmp_path / "out", "--minutes", 0, "--paper_steps", 1]
    options += ["--num_images", 2, "--num_attack_steps", 2, "--released_tokens", released_tokens(tmp_path)]

    def run(*more: Any) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = example["run"](example["build_parser"]().parse_args([*map(str, options), *more]))
        return rows

    def fail(self: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(RobustnessTokenTrainer, "save_model", fail)
        with pytest.raises(OSError, match="the disk is full"):
            run()
    log = tmp_path / "out" / "the_papers_recipe" / "logs" / "training_log.csv"
    before = log.read_text()
    rows = run()
    assert log.read_text() == before, "the training went on from its checkpoint, after its last step"
    assert [row["row"] for row in rows] == list(example["ROWS"])
    names = ["clean", "paper's attack", "grey box 1/255", "grey box 2/255", "grey box 4/255"]
    names += ["white box 1/255", "white box 2/255", "white box 4/255"]
    cells = [f"{name}: {metric}" for name in names for metric in ("cosine", "distance")]
    assert list(rows[0]) == ["row", "parameters", "steps", "minutes", *cells]
    assert all(isinstance(row[cell], float) for row in rows for cell in cells)
    by_name = {row["row"]: row for row in rows}
    without = by_name["without tokens"]
    assert without["clean: cosine"] == pytest.approx(1, abs=1e-3)
    assert without["clean: distance"] == pytest.approx(0, abs=1e-6)
    assert 0 < without["grey box 1/255: distance"] < without["grey box 4/255: distance"]
    assert all(without[f"grey box {e}/255: distance"] == without[f"white box {e}/255: distance"] for e in (1, 2, 4))
    assert {name: row["parameters"] for name, row in by_name.items()} == {
        "without tokens": "",
        "random deep tokens": 20 * 2 * WIDTH,
        "released dinov2_small tokens": 3 * WIDTH,
        "the paper's recipe": 10 * WIDTH,
        "deep tokens": 20 * 2 * WIDTH,
        "deep tokens, gains and shifts": 8 * 2 * WIDTH + by_name["gains and shifts"]["parameters"],
        "gains and shifts": by_name["gains and shifts"]["parameters"],
    }
    assert by_name["deep tokens"]["steps"] == 1
    lines = example["render_markdown"](rows).splitlines()
    assert len(lines) == 2 + len(rows)
    assert {line.count("|") for line in lines} == {1 + 3 + len(names)}
    assert (tmp_path / "out" / "table.csv").read_text().splitlines()[0].split(",")[:2] == ["row", "parameters"]

    capsys.readouterr()
    assert run() == rows, "a second run finds all of it finished"
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match=r"results of other settings.*choose another --output"):
        run("--seed", "1")


@pytest.mark.slow
def test_prepare_from_the_registries(tmp_path: Path) -> None:
    """Downloads 356 MB."""
    done = subprocess.run(
        [sys.executable, EXAMPLE / "prepare.py", "--output", tmp_path], capture_output=True, text=True, check=False
    )
    if "did not download" in done.stderr or "is missing, which downloads" in done.stderr:
        pytest.skip(f"no network, or not Debian 12: {done.stderr.strip()[-200:]}")
    assert done.returncode == 0, done.stderr
    assert "22,056,192 numbers" in done.stdout
    assert "612 training images, 32 held-out photographs" in done.stdout
