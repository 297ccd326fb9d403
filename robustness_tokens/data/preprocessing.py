"""Between files and backbones: pictures to images in [0, 1], and [0, 1] images to a backbone's pixel values."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.image_processing_utils import BaseImageProcessor


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
        self._statistics = dict(zip(("image_mean", "image_std"), check_statistics(image_mean, image_std), strict=True))
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


def check_statistics(
    image_mean: Sequence[float], image_std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Both as tuples; raises a `ValueError` unless they are one finite number per channel, the deviations above 0."""
    mean, std = tuple(map(float, image_mean)), tuple(map(float, image_std))
    if len(mean) != len(std) or not mean:
        raise ValueError(f"image_mean={mean} and image_std={std}, expected one number per channel in each.")
    if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError(f"image_mean={mean} and image_std={std}, expected finite numbers, and deviations above zero.")
    return mean, std
