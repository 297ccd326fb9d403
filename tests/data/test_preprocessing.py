import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    BatchFeature,
    BitImageProcessorPil,
    EfficientNetImageProcessorPil,
    MobileViTImageProcessorPil,
    ViTImageProcessorPil,
)

from robustness_tokens.data.image_processors import (
    build_image_processor,
    load_image_processor,
    normalization_of,
    with_normalization,
)
from robustness_tokens.data.preprocessing import ImageTransform, Normalizer, to_rgb


MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def picture(width: int = 23, height: int = 17, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def timm_folder(folder: Path, **pretrained_cfg: Any) -> Path:
    data = {"input_size": [3, 32, 32], "mean": MEAN, "std": STD, "interpolation": "bicubic", "crop_pct": 0.8}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 3, "pretrained_cfg": {**data, **pretrained_cfg}}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# Normalizer


def test_normalizer_equals_torchvision() -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    images = torch.rand(2, 3, 5, 7)
    assert torch.equal(Normalizer(MEAN, STD)(images), transforms.Normalize(MEAN, STD)(images))


def test_normalizer_inverse() -> None:
    images = torch.rand(2, 3, 5, 7, dtype=torch.float64)
    normalizer = Normalizer(MEAN, STD)
    pixel_values = normalizer(images)
    assert torch.allclose(pixel_values[:, 2], (images[:, 2] - 0.6) / 0.3, atol=1e-6)
    assert torch.allclose(normalizer.inverse(pixel_values), images, atol=1e-12)


@pytest.mark.parametrize("move", [lambda module: module.to(torch.bfloat16), lambda module: module.half()])
def test_normalizer_statistics_stay_float32(move: Callable[[Normalizer], Normalizer]) -> None:
    normalizer = move(Normalizer(MEAN, STD))
    assert normalizer.image_mean.dtype == torch.float32
    assert torch.equal(normalizer.image_mean.flatten(), torch.tensor(MEAN))
    assert not normalizer.state_dict()
    assert normalizer(torch.rand(1, 3, 2, 2).to(torch.bfloat16)).dtype == torch.float32


def test_normalizer_survives_the_meta_device() -> None:
    with torch.device("meta"):
        normalizer = Normalizer(MEAN, STD)
    assert torch.equal(normalizer.to_empty(device="cpu").image_std.flatten(), torch.tensor(STD))


@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.5,), STD), ((), ()), (MEAN, (0.2, 0.0, 0.2)), (MEAN, (0.2, -0.1, 0.2)), ((0.1, 0.2, float("nan")), STD)],
)
def test_normalizer_refuses_bad_statistics(mean: tuple[float, ...], std: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="image_mean and image_std must be"):
        Normalizer(mean, std)


@pytest.mark.parametrize("shape", [(3, 4, 4), (2, 1, 4, 4), (2, 4, 4, 3)])
def test_normalizer_refuses_other_shapes(shape: tuple[int, ...]) -> None:
    normalizer = Normalizer(MEAN, STD)
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, H, W\), .*got"):
        normalizer(torch.rand(shape))
    with pytest.raises(ValueError, match="pixel_values must have shape"):
        normalizer.inverse(torch.rand(shape))


# RGB


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_to_rgb_converts_as_pillow_does(mode: str) -> None:
    image = picture().convert(mode)
    assert to_rgb(image).mode == "RGB"
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_to_rgb_lays_transparency_on_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    assert np.asarray(to_rgb(image.convert(mode))).tolist() == [[[0, 0, 0], [255, 255, 255]]]


def test_to_rgb_knows_palette_transparency() -> None:
    image = Image.new("P", (2, 1))
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.putdata([0, 1])
    image.info["transparency"] = 0
    assert np.asarray(to_rgb(image)).tolist() == [[[255, 255, 255], [200, 100, 50]]]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_to_rgb_scales_16_bits(dtype: type) -> None:
    image = Image.fromarray(np.array([[0, 257, 32768, 65535]], dtype=dtype))
    assert np.asarray(to_rgb(image))[0, :, 1].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("values", [np.array([[70000]], dtype=np.int32), np.array([[0.5]], dtype=np.float32)])
def test_to_rgb_refuses_unknown_ranges(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="convert it to 8 bits first"):
        to_rgb(Image.fromarray(values))


# ImageTransform


@pytest.mark.parametrize("size", [(23, 17), (300, 40), (16, 16), (3, 5)])
def test_squash_equals_torchvision(size: tuple[int, int]) -> None:
    transforms = pytest.importorskip("torchvision.transforms")
    image = picture(*size)
    expected: Tensor = transforms.Compose([transforms.Resize((16, 16)), transforms.ToTensor()])(image)
    result = ImageTransform(image_size=16)(image)
    assert result.shape == (3, 16, 16)
    assert result.dtype == torch.float32
    assert torch.equal(result, expected)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "RGB"])
def test_squash_forces_rgb(mode: str) -> None:
    assert ImageTransform(image_size=8)(picture().convert(mode)).shape == (3, 8, 8)


def test_orientation_is_left_as_stored() -> None:
    image = picture(8, 8)
    image.getexif()[Image.ExifTags.Base.Orientation] = 3  # upside down
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    assert torch.equal(ImageTransform(image_size=8)(image), expected)


def test_processor_mode_equals_the_processor() -> None:
    processor = BitImageProcessorPil(
        size={"shortest_edge": 20}, crop_size={"height": 16, "width": 16}, image_mean=MEAN, image_std=STD
    )
    image = picture(50, 31)
    images = ImageTransform(resize="processor", image_processor=processor)(image)
    expected = processor(images=image, return_tensors="pt")["pixel_values"]
    assert images.shape == (3, 16, 16)
    assert 0 <= images.min() < images.max() <= 1
    assert torch.allclose(Normalizer(MEAN, STD)(images[None]), expected, atol=1e-6)


def test_processor_mode_gives_images_whatever_the_rescale_factor() -> None:
    processor = ViTImageProcessorPil(size={"height": 16, "width": 16}, rescale_factor=1 / 127.5, resample=2)
    transform = ImageTransform(resize="processor", image_processor=processor)
    assert torch.equal(transform(picture()), ImageTransform(image_size=16)(picture()))


class StubProcessor(ViTImageProcessorPil):
    """Makes the pixel values it was told to."""

    made: Tensor

    def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> BatchFeature:
        return BatchFeature({"pixel_values": self.made})


def test_processor_mode_clamps_overshoot() -> None:
    processor = StubProcessor()
    processor.made = torch.tensor([-0.1, 0.5, 1.1]).view(1, 3, 1, 1)
    transform = ImageTransform(resize="processor", image_processor=processor)
    assert transform(picture()).flatten().tolist() == [0, 0.5, 1]


def test_processor_mode_refuses_patches() -> None:
    processor = StubProcessor()
    processor.made = torch.zeros(1, 256, 768)
    transform = ImageTransform(resize="processor", image_processor=processor)
    with pytest.raises(ValueError, match=r"got \(1, 256, 768\) from a StubProcessor: use resize='squash'"):
        transform(picture())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resize": "crop", "image_size": 8}, "resize must be one of .*got 'crop'"),
        ({"resize": "squash"}, "image_size=None"),
        ({"resize": "squash", "image_size": 0}, "image_size must be a whole number from 1 to 4096, got 0"),
        ({"resize": "squash", "image_size": 8, "image_processor": build_image_processor(image_size=8)}, "takes none"),
        ({"resize": "processor"}, "image_processor is a NoneType"),
        ({"resize": "processor", "image_size": 8}, "image_size=8"),
    ],
)
def test_transform_refuses_what_does_not_belong_to_the_mode(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageTransform(**options)


@pytest.mark.parametrize(
    "transform",
    [
        ImageTransform(image_size=8),
        ImageTransform(resize="processor", image_processor=build_image_processor(image_size=8)),
    ],
)
def test_transforms_can_be_pickled(transform: ImageTransform) -> None:
    assert torch.equal(pickle.loads(pickle.dumps(transform))(picture()), transform(picture()))


# Image processors


def test_built_processor_squashes_and_normalises(tmp_path: Path) -> None:
    build_image_processor(image_size=16, image_mean=MEAN, image_std=STD).save_pretrained(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["preprocessor_config.json"]
    processor = AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    expected = Normalizer(MEAN, STD)(ImageTransform(image_size=16)(picture())[None])
    assert torch.allclose(processor(images=picture(), return_tensors="pt")["pixel_values"], expected, atol=1e-6)


def test_with_normalization_changes_a_copy(tmp_path: Path) -> None:
    original = ViTImageProcessorPil(size={"height": 16, "width": 16}, do_normalize=False, rescale_factor=1 / 127.5)
    trained = with_normalization(original, MEAN, STD)
    assert original.do_normalize is False
    assert list(original.image_mean) == [0.5, 0.5, 0.5]
    trained.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_mean"] == list(MEAN)
    assert saved["image_std"] == list(STD)
    assert saved["image_processor_type"] == "ViTImageProcessor"
    expected = Normalizer(MEAN, STD)(ImageTransform(resize="processor", image_processor=original)(picture())[None])
    assert torch.allclose(trained(images=picture(), return_tensors="pt")["pixel_values"], expected, atol=1e-6)


def test_with_normalization_refuses_what_it_cannot_set(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    processor = AutoImageProcessor.from_pretrained(timm_folder(tmp_path))
    with pytest.raises(ValueError, match="TimmWrapperImageProcessor"):
        with_normalization(processor, MEAN, STD)
    with pytest.raises(ValueError, match="image_std"):
        with_normalization(build_image_processor(image_size=8), MEAN, (0, 1, 1))


def test_load_prefers_the_bases_own(tmp_path: Path) -> None:
    ViTImageProcessorPil(size={"height": 12, "width": 12}, image_mean=MEAN).save_pretrained(tmp_path)
    processor = load_image_processor(tmp_path, image_size=99)
    assert isinstance(processor, ViTImageProcessorPil)
    assert dict(processor.size) == {"height": 12, "width": 12}
    assert tuple(processor.image_mean) == MEAN


def test_load_builds_where_the_folder_has_none(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    processor = load_image_processor(tmp_path, image_size=16)
    assert processor.to_dict() == build_image_processor(image_size=16).to_dict()
    assert "has no image processor" in caplog.text
    with pytest.raises(ValueError, match=r"names no image_size to build one for: pass image_processor="):
        load_image_processor(tmp_path)


def test_load_never_replaces_a_broken_processor(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(ValueError, match="can't be read"):
        load_image_processor(tmp_path, image_size=16)


def hub_cache(cache_dir: Path) -> Path:
    """A Hub cache that holds `user/base` without an image processor; returns where the Hub's denials are kept."""
    repo, commit = cache_dir / "models--user--base", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_text(json.dumps({"model_type": "vit"}))
    (repo / ".no_exist" / commit).mkdir(parents=True)
    return repo / ".no_exist" / commit


def test_load_tells_a_base_without_from_one_out_of_reach(tmp_path: Path) -> None:
    denials = hub_cache(tmp_path)
    options: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True, "image_size": 16}
    with pytest.raises(ValueError, match=r"user/base.*it may have one"):
        load_image_processor("user/base", **options)
    (denials / "preprocessor_config.json").touch()
    assert dict(load_image_processor("user/base", **options).to_dict()["size"]) == {"height": 16, "width": 16}


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("size", [(60, 60), (44, 40), (30, 45)])
def test_timm_processor_is_translated(tmp_path: Path, crop_mode: str, size: tuple[int, int]) -> None:
    pytest.importorskip("timm")
    folder = timm_folder(tmp_path, crop_mode=crop_mode)
    expected = AutoImageProcessor.from_pretrained(folder)(picture(*size))["pixel_values"]
    processor = load_image_processor(folder)
    assert isinstance(processor, BitImageProcessorPil)
    assert torch.allclose(processor(images=picture(*size), return_tensors="pt")["pixel_values"], expected, atol=1e-5)
    processor.save_pretrained(tmp_path / "saved")
    assert load_image_processor(tmp_path / "saved").to_dict() == processor.to_dict()


def test_timm_crop_is_one_pixel_aside_where_the_margin_is_odd(tmp_path: Path) -> None:
    pytest.importorskip("timm")
    folder = timm_folder(tmp_path)
    image = picture(43, 40)  # 43 wide after resizing, 32 after cropping: 11 spare columns
    timms = AutoImageProcessor.from_pretrained(folder)(image)["pixel_values"]
    ours = load_image_processor(folder)(images=image, return_tensors="pt")["pixel_values"]
    assert torch.allclose(ours[..., 1:], timms[..., :-1], atol=1e-5)


@pytest.mark.parametrize(
    "pretrained_cfg",
    [{"crop_mode": "border"}, {"input_size": [3, 32, 48]}, {"input_size": [1, 32, 32], "mean": [0.5], "std": [0.5]}],
)
def test_timm_preprocessing_that_cannot_be_translated_is_refused(
    tmp_path: Path, pretrained_cfg: dict[str, Any]
) -> None:
    pytest.importorskip("timm")
    with pytest.raises(ValueError, match="a timm model must have three channels"):
        load_image_processor(timm_folder(tmp_path, **pretrained_cfg))


PICTURE = picture(8, 8)
AS_IT_IS: dict[str, Any] = {"do_resize": False, "do_center_crop": False}


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"do_normalize": False},
        {"do_normalize": False, "image_mean": None, "image_std": None},
        {"do_normalize": False, "do_rescale": False},
        {"do_rescale": False, "image_mean": [123.0, 116.0, 103.0], "image_std": [58.0, 57.0, 57.0]},
        {"rescale_factor": 1 / 127.5},
        {"rescale_factor": 1.0, "image_mean": [120.0, 110.0, 100.0], "image_std": [50.0, 60.0, 70.0]},
        {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ],
)
def test_the_normalizer_does_what_the_image_processor_does(settings: dict[str, Any]) -> None:
    processor = BitImageProcessorPil(**AS_IT_IS, **settings)
    expected = processor(PICTURE, return_tensors="pt")["pixel_values"].float()
    images = torch.from_numpy(np.array(PICTURE)).permute(2, 0, 1)[None].float() / 255
    statistics = normalization_of(processor)
    torch.testing.assert_close(Normalizer(*statistics)(images), expected, rtol=1e-5, atol=1e-5)
    assert with_normalization(processor, *statistics) is processor
    other = with_normalization(processor, [0.1, 0.2, 0.3], [0.4, 0.5, 0.6])
    assert normalization_of(other) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    found = other(PICTURE, return_tensors="pt")["pixel_values"].float()
    torch.testing.assert_close(found, Normalizer([0.1, 0.2, 0.3], [0.4, 0.5, 0.6])(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("processor", "setting"),
    [
        (EfficientNetImageProcessorPil(rescale_offset=True), "rescale_offset"),
        (MobileViTImageProcessorPil(do_flip_channel_order=True), "do_flip_channel_order"),
    ],
)
def test_an_image_processor_that_does_more_is_refused(processor: Any, setting: str) -> None:
    with pytest.raises(ValueError, match=f"{type(processor).__name__} has {setting}, which can't be expressed"):
        normalization_of(processor)
