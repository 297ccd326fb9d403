"""Image processors: the base's own, or a new one if it has none, with the statistics that tokens were trained with."""

from __future__ import annotations

import copy
import logging
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache
from PIL import Image
from transformers import AutoImageProcessor, BaseImageProcessor, BitImageProcessorPil, TimmWrapperImageProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..utils import json_values, read_json
from .preprocessing import LARGEST_SIDE, check_statistics, height_and_width


logger = logging.getLogger(__name__)


def build_image_processor(
    *,
    image_size: int | Sequence[int],
    image_mean: Sequence[float] = IMAGENET_DEFAULT_MEAN,
    image_std: Sequence[float] = IMAGENET_DEFAULT_STD,
) -> BaseImageProcessor:
    """Makes an image processor that squashes to a size as `ImageTransform` does, normalises, and can be saved."""
    size = dict(zip(("height", "width"), height_and_width(image_size), strict=True))
    mean, std = check_statistics(image_mean, image_std)
    return BitImageProcessorPil(
        size=size,
        crop_size=size,
        resample=Image.Resampling.BILINEAR,
        do_center_crop=False,
        image_mean=mean,
        image_std=std,
    )


def load_image_processor(
    base_model: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    image_size: int | Sequence[int] | None = None,
    trust_remote_code: bool = False,
    **hub_kwargs: Any,
) -> BaseImageProcessor:
    """Loads the image processor of a base; if it has none, builds one for `image_size` with ImageNet's statistics.

    The backend is PIL, since pixels differ slightly between backends. A timm model's processor can't be saved, so it
    is translated; its centre crop may lie one pixel beside timm's if the margin is odd. `ValueError` if the
    processor can't be read, or if there is none and no `image_size`.
    """
    options = {"revision": revision, "cache_dir": cache_dir, "trust_remote_code": trust_remote_code, **hub_kwargs}
    given = {name: value for name, value in options.items() if value is not None}
    try:
        processor = AutoImageProcessor.from_pretrained(base_model, backend="pil", **given)
    except OSError as exc:
        # transformers raises the same error for a missing file and for one that it can't fetch or parse. A failing
        # network must not replace the base's own processor.
        if not _is_without_processor(base_model, revision=revision, cache_dir=cache_dir):
            raise ValueError(
                f"base_model={str(base_model)!r}: its image processor can't be read, and it may have one: check "
                "the name or folder, the network and the cache"
            ) from exc
        if image_size is None:
            raise ValueError(
                f"base_model={str(base_model)!r} has no image processor ({IMAGE_PROCESSOR_NAME}), and its config "
                "names no image_size to build one for: pass image_processor="
            ) from exc
        logger.warning("%s has no image processor: building one for %s pixels.", base_model, image_size)
        return build_image_processor(image_size=image_size)
    if isinstance(processor, TimmWrapperImageProcessor):
        return _translate_timm(processor.data_config)
    return processor


def processor_image_size(image_processor: Any) -> tuple[int, int]:
    """Returns height and width in pixels of the images that an image processor makes; `ValueError` if they vary."""
    names = ["crop_size", "size"] if getattr(image_processor, "do_center_crop", False) else ["size"]
    for name in names:
        size = dict(getattr(image_processor, name, None) or {})
        side = size.get("shortest_edge")
        height, width = size.get("height", side), size.get("width", side)
        if isinstance(height, int) and isinstance(width, int):
            return height, width
    raise ValueError(
        f"image_processor must name the size of its images, got a {type(image_processor).__name__} without one: set "
        "image_size, in pixels"
    )


def normalization_of(image_processor: BaseImageProcessor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Returns mean and deviation per channel by which an image processor normalises images in [0, 1].

    They say all that it does to the values: 0 and 1 if it leaves them as they are, as for a base that normalises its
    images itself; and others than it names if it scales 8-bit values by another factor than 1/255. `ValueError` if it
    computes something else.
    """
    options: Any = image_processor
    for setting in ("rescale_offset", "offset", "include_top", "do_flip_channel_order"):
        if getattr(options, setting, None):
            raise ValueError(
                f"image_processor {type(options).__name__} has {setting}, which can't be expressed by image_mean and "
                "image_std: give one without"
            )
    # By which images in [0, 1] differ from what it normalises.
    scale = 255.0
    if getattr(options, "do_rescale", True):
        scale *= 1 / 255 if (factor := getattr(options, "rescale_factor", None)) is None else factor
    mean, std = getattr(options, "image_mean", None), getattr(options, "image_std", None)
    if not getattr(options, "do_normalize", True):
        mean, std = 0.0, 1.0
    if mean is None or std is None:
        raise ValueError(
            f"image_processor must have image_mean and image_std, got a {type(options).__name__} without: "
            "give one that normalises by them, such as transformers.BitImageProcessorPil"
        )
    means, stds = ([value] * 3 if isinstance(value, int | float) else list(value) for value in (mean, std))
    if math.isclose(scale, 1.0):
        return check_statistics(means, stds)
    return check_statistics([value / scale for value in means], [value / scale for value in stds])


def with_normalization(
    image_processor: BaseImageProcessor, image_mean: Sequence[float], image_std: Sequence[float]
) -> BaseImageProcessor:
    """Returns the image processor if it normalises so, as [`normalization_of`] tells, or else a copy that does."""
    mean, std = check_statistics(image_mean, image_std)
    if normalization_of(image_processor) == (mean, std):
        return image_processor
    normalizing: Any = copy.deepcopy(image_processor)
    normalizing.do_rescale, normalizing.rescale_factor, normalizing.do_normalize = True, 1 / 255, True
    normalizing.image_mean, normalizing.image_std = list(mean), list(std)
    return normalizing


def _is_without_processor(
    base_model: str | os.PathLike[str], *, revision: str | None, cache_dir: str | os.PathLike[str] | None
) -> bool:
    if Path(base_model).is_dir():
        return not (Path(base_model) / IMAGE_PROCESSOR_NAME).exists()
    # The cache records files that the Hub did not have.
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
            "a timm model must have three channels, a fixed interpolation and crop_mode 'squash', or 'center' with a "
            f"square input, to have its preprocessing translated, got {dict(data_config)}: put an "
            f"{IMAGE_PROCESSOR_NAME} of your choice beside the model"
        )
    return BitImageProcessorPil(
        size=size,
        crop_size={"height": height, "width": width},
        resample=Image.Resampling[interpolation.upper()],
        image_mean=data_config["mean"],
        image_std=data_config["std"],
    )


def read_image_processor(path: Path) -> BaseImageProcessor:
    """Reads the preprocessor_config.json of an adapter, running only transformers' own code.

    `ValueError` if it is damaged, names code or another class, or holds numbers that no image processor has.
    """
    content = read_json(path)
    if "auto_map" in content:
        raise ValueError(
            f"{path} names code of its own, {content['auto_map']!r}, and code of an adapter is never run, not even "
            "with trust_remote_code=True: save the adapter with an image processor of transformers"
        )
    name = content.get("image_processor_type")
    processor_class = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(processor_class, type) and issubclass(processor_class, BaseImageProcessor)):
        raise ValueError(
            f"{path} has image_processor_type {name!r}, which is no image processor of transformers "
            f"{transformers.__version__}, and trust_remote_code doesn't reach an adapter"
        )
    # transformers sets every key as an attribute, even one that hides a method.
    if hidden := sorted(key for key in content if _hides(processor_class, key)):
        raise ValueError(f"{path} has keys {hidden}, which are no settings of {name}: it is damaged")
    for _, value in json_values(content):
        if isinstance(value, int | float) and not abs(value) <= LARGEST_SIDE:  # NaN compares false
            raise ValueError(f"{path} holds {value!r}, expected numbers from -{LARGEST_SIDE} to {LARGEST_SIDE}")
    try:
        return load_image_processor(path)
    # transformers checks no types: a wrong value may raise anything.
    except Exception as exc:
        raise ValueError(f"{path} makes no {name}, so it is damaged: {exc}") from exc


def _hides(processor_class: type[BaseImageProcessor], key: str) -> bool:
    is_private = key.startswith("_") and key != "_valid_processor_keys"  # which old versions wrote
    return is_private or callable(getattr(processor_class, key, None))
