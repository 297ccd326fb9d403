"""preprocessor_config.json of an adapter, which may come from anyone: read strictly, before transformers sees it."""

from __future__ import annotations

from pathlib import Path

import transformers
from transformers import BaseImageProcessor

from .files import json_values, read_json
from .image_processors import load_image_processor


# Sides, patches and statistics of real image processors are far below; a picture resized to it is 200 MB of float32.
_LARGEST_NUMBER = 4096


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
