"""Between files and backbones: pictures to images in [0, 1], and [0, 1] images to a backbone's pixel values."""

import copy
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, BitImageProcessorPil, TimmWrapperImageProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


logger = logging.getLogger(__name__)

ResizeMode = Literal["squash", "processor"]


class Normalizer(nn.Module):
    """Maps images in [0, 1] to the pixel values a backbone was trained on: `(images - mean) / std` per channel.

    The statistics stay float32 whatever dtype the module is moved to: rounded to bfloat16 they would shift every
    image by up to a thousandth. They are no part of the state dict.

    Args:
        image_mean: one mean per channel, in [0, 1] image units.
        image_std: one standard deviation per channel, in the same units, above zero.

    Raises:
        ValueError: the two differ in length, are empty, not finite, or a deviation is not positive.
    """

    image_mean: Tensor
    image_std: Tensor

    def __init__(self, image_mean: Sequence[float], image_std: Sequence[float]) -> None:
        super().__init__()
        self._statistics = dict(
            zip(("image_mean", "image_std"), _check_statistics(image_mean, image_std), strict=True)
        )
        for name, values in self._statistics.items():
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)  # (C, 1, 1)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Normalizer":
        super()._apply(fn, recurse)
        for name, values in self._statistics.items():
            device = getattr(self, name).device
            setattr(self, name, torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1))
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Normalises images.

        Args:
            images: (B, C, H, W) float in [0, 1].

        Returns:
            pixel_values: (B, C, H, W), float32 or wider.

        Raises:
            ValueError: another rank or number of channels.
        """
        self._check_shape(images, "images")
        return (images - self.image_mean) / self.image_std

    def inverse(self, pixel_values: Tensor) -> Tensor:
        """Undoes `forward`.

        Args:
            pixel_values: (B, C, H, W) float, normalised.

        Returns:
            images: (B, C, H, W), float32 or wider; in [0, 1] where the pixel values came from there, never clamped.

        Raises:
            ValueError: another rank or number of channels.
        """
        self._check_shape(pixel_values, "pixel_values")
        return pixel_values * self.image_std + self.image_mean

    def _check_shape(self, tensor: Tensor, name: str) -> None:
        channels = len(self.image_mean)
        # One channel would broadcast against three without a word.
        if tensor.ndim != 4 or tensor.shape[1] != channels:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, expected (B, {channels}, H, W): "
                f"image_mean and image_std have {channels} channels."
            )


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a picture of any mode to 8-bit RGB.

    Transparency is laid on white, as transformers does; 16-bit grey is scaled to 8 bits, where Pillow would clip it
    to white. An EXIF orientation is not applied: the pixels stay as stored, as in the paper's data loading.

    Raises:
        ValueError: a mode with no known range (32-bit integers beyond 16 bits, floating point) or no way to RGB.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"image of mode {image.mode!r} holds values from {values.min()} to {values.max()}, "
                "expected 16 bits (0 to 65535): convert it to 8 bits first."
            )
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")  # 65535 = 257 * 255
    if image.mode == "F":
        raise ValueError("image of mode 'F' (floating point) has no known range: convert it to 8 bits first.")
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        white = Image.new("RGBA", transparent.size, "white")
        return Image.alpha_composite(white, transparent).convert("RGB")
    return image.convert("RGB")


class ImageTransform:
    """Turns a picture into an image in [0, 1]; picklable, so it works in data loader workers.

    `resize="squash"` is the paper's: bilinear to a square, without a crop, whatever the aspect ratio; equal to
    torchvision's `Resize((image_size, image_size))` and `ToTensor`. `resize="processor"` leaves resizing and cropping
    to the backbone's image processor. Both convert to RGB by `to_rgb` first.

    Args:
        resize: "squash" or "processor".
        image_size: side of the square in pixels; for "squash" alone.
        image_processor: the backbone's image processor (see `load_image_processor`); for "processor" alone.

    Raises:
        ValueError: an unknown mode, or an argument that is missing or belongs to the other mode.
    """

    def __init__(
        self,
        *,
        resize: ResizeMode = "squash",
        image_size: int | None = None,
        image_processor: BaseImageProcessor | None = None,
    ) -> None:
        if resize not in get_args(ResizeMode):
            raise ValueError(f"resize={resize!r}, expected one of {', '.join(map(repr, get_args(ResizeMode)))}.")
        if (resize == "squash") == (image_size is None):
            raise ValueError(
                f"image_size={image_size} with resize={resize!r}: 'squash' needs it, 'processor' has its own."
            )
        if image_size is not None and image_size < 1:
            raise ValueError(f"image_size={image_size}, expected at least 1 pixel.")
        if (resize == "processor") == (image_processor is None):
            raise ValueError(
                f"image_processor is {type(image_processor).__name__} with resize={resize!r}: "
                "'processor' needs one (see load_image_processor), 'squash' takes none."
            )
        self.resize = resize
        self.image_size = image_size
        self.image_processor = image_processor

    def __call__(self, image: Image.Image) -> Tensor:
        """Transforms one picture.

        Args:
            image: of any mode and size.

        Returns:
            (3, H, W) float32 in [0, 1].

        Raises:
            ValueError: a mode that has no way to RGB, or an image processor that yields no image (SigLIP2's patches).
        """
        image = to_rgb(image)
        if self.image_processor is None:
            assert self.image_size is not None
            resized = image.resize((self.image_size, self.image_size), Image.Resampling.BILINEAR)
            values = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()  # (H, W, 3) -> (3, H, W)
            return values.float().div_(255)
        batch = self.image_processor(
            images=image, do_rescale=True, rescale_factor=1 / 255, do_normalize=False, return_tensors="pt"
        )
        values = batch["pixel_values"]
        if values.ndim != 4 or values.shape[:2] != (1, 3):
            raise ValueError(
                f"image_processor ({type(self.image_processor).__name__}) made pixel_values of shape "
                f"{tuple(values.shape)}, expected (1, 3, H, W): use resize='squash' with an image_size."
            )
        # Processors that resize floats overshoot with bicubic weights.
        return values[0].float().clamp(0, 1)


def build_image_processor(
    *,
    image_size: int,
    image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> BaseImageProcessor:
    """Makes an image processor that squashes to a square as `ImageTransform` does, then normalises.

    Args:
        image_size: side in pixels.
        image_mean: per channel, in [0, 1] units; ImageNet's by default.
        image_std: likewise.

    Returns:
        A processor that can be saved.

    Raises:
        ValueError: statistics that `Normalizer` would refuse, or `image_size` below 1.
    """
    if image_size < 1:
        raise ValueError(f"image_size={image_size}, expected at least 1 pixel.")
    mean, std = _check_statistics(image_mean, image_std)
    return BitImageProcessorPil(
        size={"height": image_size, "width": image_size},
        crop_size={"height": image_size, "width": image_size},
        resample=Image.Resampling.BILINEAR,
        do_center_crop=False,
        image_mean=mean,
        image_std=std,
    )


def load_image_processor(
    base_model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool | None = None,
    trust_remote_code: bool = False,
    image_size: int | None = None,
    image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> BaseImageProcessor:
    """Loads a base model's image processor, or builds one where the base has none.

    The PIL backend is asked for, since pixels differ slightly between the backends. A timm model's processor, which
    can't be saved, is translated; its centre crop may lie one pixel beside timm's where the margin is odd.

    Args:
        base_model: a Hub id or a folder.
        revision: commit, tag or branch of a Hub id.
        token: for private repositories.
        cache_dir: where downloads are kept.
        local_files_only: never download.
        trust_remote_code: run the code of an image processor that the repository brings; never asked, never guessed.
        image_size: side in pixels; used, like `image_mean` and `image_std`, only where the base has no image
            processor of its own, for `build_image_processor`.
        image_mean: see `image_size`.
        image_std: see `image_size`.

    Returns:
        A processor that can be saved and knows `do_normalize`.

    Raises:
        ValueError: the processor can't be read, or there is none and `image_size` is not given.
    """
    options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        processor = AutoImageProcessor.from_pretrained(
            base_model, backend="pil", trust_remote_code=trust_remote_code, **given
        )
    except OSError as exc:
        # transformers says the same of a file that is missing and of one that it couldn't fetch or parse, and another
        # processor than the base's own must never be made up because the network was down.
        if not _is_without_processor(base_model, revision=revision, cache_dir=cache_dir):
            raise ValueError(
                f"base_model={str(base_model)!r}: its image processor can't be read, and nothing says that it has "
                "none. Check the name or folder, the network or the cache."
            ) from exc
        if image_size is None:
            raise ValueError(
                f"base_model={str(base_model)!r} has no image processor ({IMAGE_PROCESSOR_NAME}): give image_size "
                "(and image_mean, image_std unless they are ImageNet's) to build one."
            ) from exc
        logger.warning("%s has no image processor: building one for %d pixels.", base_model, image_size)
        return build_image_processor(image_size=image_size, image_mean=image_mean, image_std=image_std)
    if isinstance(processor, TimmWrapperImageProcessor):
        return _translate_timm(processor.data_config)
    return processor


def processor_image_size(image_processor: Any) -> int:
    """The side in pixels of the square images that an image processor makes: its crop, or else its size.

    Raises:
        ValueError: it makes no square images of a known size.
    """
    names = ["crop_size", "size"] if getattr(image_processor, "do_center_crop", False) else ["size"]
    for name in names:
        size = dict(getattr(image_processor, name, None) or {})
        sides = {size.get("height"), size.get("width")} if "height" in size else {size.get("shortest_edge")}
        if len(sides) == 1 and isinstance(side := sides.pop(), int):
            return side
    raise ValueError(
        f"image_processor ({type(image_processor).__name__}) names no square size: set image_size (in pixels)."
    )


def with_normalization(
    image_processor: BaseImageProcessor, image_mean: Sequence[float], image_std: Sequence[float]
) -> BaseImageProcessor:
    """Copies an image processor with other statistics: those that the tokens were trained with.

    Args:
        image_processor: left as it was.
        image_mean: per channel, in [0, 1] units.
        image_std: likewise.

    Returns:
        A copy that divides by 255 and normalises with these.

    Raises:
        ValueError: statistics that `Normalizer` would refuse, or a processor that does not normalise by `image_mean`.
    """
    mean, std = _check_statistics(image_mean, image_std)
    if not hasattr(image_processor, "image_mean") or not hasattr(image_processor, "image_std"):
        raise ValueError(
            f"image_processor ({type(image_processor).__name__}) has no image_mean and image_std to set: "
            "load it with load_image_processor or build one with build_image_processor."
        )
    normalizing = copy.deepcopy(image_processor)
    statistics = {"image_mean": list(mean), "image_std": list(std)}
    for name, value in {**statistics, "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True}.items():
        setattr(normalizing, name, value)
    return normalizing


def _check_statistics(
    image_mean: Sequence[float], image_std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean, std = tuple(map(float, image_mean)), tuple(map(float, image_std))
    if len(mean) != len(std) or not mean:
        raise ValueError(f"image_mean={mean} and image_std={std}, expected one number per channel in each.")
    if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError(f"image_mean={mean} and image_std={std}, expected finite numbers, and deviations above zero.")
    return mean, std


def _is_without_processor(
    base_model: str | os.PathLike[str], *, revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> bool:
    if Path(base_model).is_dir():
        return not (Path(base_model) / IMAGE_PROCESSOR_NAME).exists()
    # The cache remembers which files the Hub was asked for and did not have.
    folder = None if cache_dir is None else Path(cache_dir)
    known = try_to_load_from_cache(str(base_model), IMAGE_PROCESSOR_NAME, cache_dir=folder, revision=revision)
    return known is _CACHED_NO_EXIST


def _translate_timm(data_config: Mapping[str, Any]) -> BaseImageProcessor:
    channels, height, width = data_config["input_size"]
    crop_mode, interpolation = data_config["crop_mode"], data_config["interpolation"]
    scaled_height, scaled_width = (math.floor(side / data_config["crop_pct"]) for side in (height, width))
    if crop_mode == "squash":
        size = {"height": scaled_height, "width": scaled_width}
    elif crop_mode == "center" and height == width:
        size = {"shortest_edge": scaled_height}
    else:
        size = {}
    if channels != 3 or not size or interpolation.upper() not in Image.Resampling.__members__:
        raise ValueError(
            f"base_model is a timm model whose preprocessing can't be translated: {dict(data_config)}. Expected three "
            "channels, a fixed interpolation and crop_mode 'squash', or 'center' with a square input: put a "
            f"{IMAGE_PROCESSOR_NAME} of your choice beside the model."
        )
    return BitImageProcessorPil(
        size=size,
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[interpolation.upper()],
        image_mean=data_config["mean"],
        image_std=data_config["std"],
    )
