"""Pictures -> images in [0, 1] -> the pixel values of a base."""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers.image_processing_utils import BaseImageProcessor

from ..utils import check_choice, check_int


ResizeMode = Literal["squash", "processor"]

LARGEST_SIDE = 4096
"""Of an image in pixels, far above those of real bases; an image of this side is 200 MB of float32."""


class Normalizer(nn.Module):
    """Maps images in [0, 1] to the pixel values that a base was trained on: `(images - mean) / std` per channel.

    The statistics stay float32 when the module is cast, since rounding them to bfloat16 would shift every image by up
    to a thousandth. They are not in the state dict.

    Args:
        image_mean: One mean per channel, in [0, 1] image units.
        image_std: One standard deviation per channel, in [0, 1] image units, above zero.

    Raises:
        ValueError: If the two are empty, differ in length or hold a number that is not finite, or a deviation is not
            positive.
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
        """Returns the pixel values, (B, C, H, W) float32 or wider, of images, (B, C, H, W) float in [0, 1]."""
        self._check_shape(images, "images")
        return (images - self.image_mean) / self.image_std

    def inverse(self, pixel_values: Tensor) -> Tensor:
        """Undoes `forward`; returns images, (B, C, H, W) float32 or wider, not clamped to [0, 1]."""
        self._check_shape(pixel_values, "pixel_values")
        return pixel_values * self.image_std + self.image_mean

    def _check_shape(self, tensor: Tensor, name: str) -> None:
        channels = len(self.image_mean)
        # One channel would silently broadcast against three.
        if tensor.ndim != 4 or tensor.shape[1] != channels:
            raise ValueError(
                f"{name} must have shape (B, {channels}, H, W), as image_mean and image_std have {channels} channels, "
                f"got {tuple(tensor.shape)}"
            )


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts a picture of any mode to 8-bit RGB; `ValueError` for a mode without a known range.

    Transparent pixels are laid on white, as in transformers; 16-bit grey is scaled to 8 bits, where Pillow would clip
    it to white. EXIF orientations are not applied: pixels stay as stored, as in the paper's data loading.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                f"a picture of mode {image.mode!r} must hold 16 bits (0 to 65535), got values from {values.min()} to "
                f"{values.max()}: convert it to 8 bits first"
            )
        return Image.fromarray(np.round(values / 257).astype(np.uint8)).convert("RGB")  # 65535 = 257 * 255
    if image.mode == "F":
        raise ValueError("a picture of mode 'F' (floating point) has no known range: convert it to 8 bits first")
    if image.has_transparency_data:
        transparent = image.convert("RGBA")
        white = Image.new("RGBA", transparent.size, "white")
        return Image.alpha_composite(white, transparent).convert("RGB")
    return image.convert("RGB")


class ImageTransform:
    """Turns a picture into an image in [0, 1]; can be pickled for a data loader's workers.

    `resize="squash"` is the paper's: bilinear to one size, whatever the aspect ratio, without a crop; it equals
    torchvision's `Resize((height, width))` and `ToTensor`. `resize="processor"` leaves resizing and cropping
    to the base's image processor. Both convert to 8-bit RGB first.

    Args:
        resize: "squash" or "processor".
        image_size: Side of the square, or height and width, in pixels; for "squash" alone.
        image_processor: Image processor of the base; for "processor" alone.

    Raises:
        ValueError: If the mode is unknown, or an argument is missing or belongs to the other mode.
    """

    def __init__(
        self,
        *,
        resize: ResizeMode = "squash",
        image_size: int | Sequence[int] | None = None,
        image_processor: BaseImageProcessor | None = None,
    ) -> None:
        check_choice("resize", resize, get_args(ResizeMode))
        if (resize == "squash") == (image_size is None):
            raise ValueError(
                f"image_size={image_size} with resize={resize!r}: 'squash' needs it, 'processor' has its own"
            )
        if (resize == "processor") == (image_processor is None):
            raise ValueError(
                f"image_processor is a {type(image_processor).__name__} with resize={resize!r}: "
                "'processor' needs one, 'squash' takes none"
            )
        self.resize = resize
        self.image_size = None if image_size is None else height_and_width(image_size)
        self.image_processor = image_processor

    @property
    def settings(self) -> dict[str, Any]:
        """Tells what the images depend on besides the pictures, as JSON values."""
        processor = self.image_processor
        return {
            "resize": self.resize,
            "image_size": self.image_size,
            "image_processor": None if processor is None else processor.to_json_string(),
        }

    def __call__(self, image: Image.Image) -> Tensor:
        """Transforms a picture of any mode and size to an image, (3, H, W) float32 in [0, 1].

        `ValueError` if its mode can't be converted to RGB, or the image processor makes patches, as SigLIP 2's does.
        """
        image = to_rgb(image)
        if self.image_processor is None:
            assert self.image_size is not None
            height, width = self.image_size
            resized = image.resize((width, height), Image.Resampling.BILINEAR)
            values = torch.from_numpy(np.array(resized)).permute(2, 0, 1).contiguous()  # (H, W, 3) -> (3, H, W)
            return values.float().div_(255)
        batch = self.image_processor(
            images=image, do_rescale=True, rescale_factor=1 / 255, do_normalize=False, return_tensors="pt"
        )
        values = batch["pixel_values"]
        if values.ndim != 4 or values.shape[:2] != (1, 3):
            raise ValueError(
                f"image_processor must make pixel_values of shape (1, 3, H, W), got {tuple(values.shape)} from a "
                f"{type(self.image_processor).__name__}: use resize='squash' with an image_size"
            )
        # Image processors that resize floats with bicubic weights overshoot.
        return values[0].float().clamp(0, 1)


def height_and_width(image_size: int | Sequence[int]) -> tuple[int, int]:
    """Returns height and width in pixels of a size, given as one side or as both; `ValueError` if it is neither."""
    sides = [image_size, image_size] if isinstance(image_size, int) else list(image_size)
    if len(sides) != 2:
        raise ValueError(f"image_size must be a side, or height and width, in pixels, got {image_size!r:.200}")
    for side in sides:
        check_int("image_size", side, 1, LARGEST_SIDE)
    return sides[0], sides[1]


def check_statistics(
    image_mean: Sequence[float], image_std: Sequence[float]
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns both as tuples; `ValueError` unless they are one finite number per channel, the deviations above 0."""
    mean, std = tuple(map(float, image_mean)), tuple(map(float, image_std))
    if len(mean) != len(std) or not mean:
        raise ValueError(f"image_mean and image_std must be one number per channel each, got {mean} and {std}")
    if not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise ValueError(f"image_mean and image_std must be finite, and image_std above 0, got {mean} and {std}")
    return mean, std
