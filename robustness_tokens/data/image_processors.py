"""Image processors: the base's own, or one built where it has none, with the statistics of the tokens' training."""

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
from .preprocessing import check_statistics


logger = logging.getLogger(__name__)

# Sides, patches and statistics of real image processors are far below; a picture resized to it is 200 MB of float32.
_LARGEST_NUMBER = 4096


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
    mean, std = check_statistics(image_mean, image_std)
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
    mean, std = check_statistics(image_mean, image_std)
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


def read_image_processor(path: Path) -> BaseImageProcessor:
    """Reads the image processor of an adapter; no code is run but transformers' own, whatever the file names.

    Args:
        path: The adapter's preprocessor_config.json.

    Raises:
        ValueError: If it is damaged, names code or another class, or holds numbers that no image processor has.
    """
    content = read_json(path)
    if "auto_map" in content:
        raise ValueError(
            f"{path} names code of its own, {content['auto_map']!r}: that of an adapter is never run, "
            "not even with trust_remote_code=True. Save the adapter with an image processor of transformers"
        )
    name = content.get("image_processor_type")
    processor_class = getattr(transformers, name, None) if isinstance(name, str) and name.isidentifier() else None
    if not (isinstance(processor_class, type) and issubclass(processor_class, BaseImageProcessor)):
        raise ValueError(
            f"{path} has image_processor_type {name!r}, which is no image processor of transformers "
            f"{transformers.__version__}, and trust_remote_code doesn't reach an adapter"
        )
    # transformers sets every key as an attribute, whatever it hides.
    if hidden := sorted(key for key in content if _hides(processor_class, key)):
        raise ValueError(f"{path} has keys {hidden}, which are no settings of {name}: it is damaged")
    for _, value in json_values(content):
        if isinstance(value, int | float) and not abs(value) <= _LARGEST_NUMBER:  # NaN compares false
            raise ValueError(f"{path} holds {value!r}, expected numbers from -{_LARGEST_NUMBER} to {_LARGEST_NUMBER}")
    try:
        return load_image_processor(path)
    # The values' types are checked by transformers alone, with whatever error they lead to.
    except Exception as exc:
        raise ValueError(f"{path} makes no {name}, so it is damaged: {exc}") from exc


def _hides(processor_class: type[BaseImageProcessor], key: str) -> bool:
    is_private = key.startswith("_") and key != "_valid_processor_keys"  # which old versions wrote
    return is_private or callable(getattr(processor_class, key, None))
