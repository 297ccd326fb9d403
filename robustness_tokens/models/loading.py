"""Loads the frozen base and its image processor; code of a repo runs only with `trust_remote_code=True`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, PreTrainedConfig, PreTrainedModel

from ..configuration import HEAD_PREFIX
from ..data import build_image_processor, load_image_processor
from .layer_stack import vision_config


HUB_KWARGS = ("token", "cache_dir", "local_files_only", "force_download")


def headless_class_name(name: str, revision: str | None, base_kwargs: Mapping[str, Any]) -> str:
    """Returns the name of a base's headless class: AutoModel's choice, or the vision model of two towers."""
    hub_kwargs = {key: base_kwargs[key] for key in HUB_KWARGS if key in base_kwargs}
    trust_remote_code = base_kwargs.get("trust_remote_code", False)
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code, **hub_kwargs)
    except OSError as exc:
        raise ValueError(f"the base {name!r} can't be loaded, and is no local folder with a model: {exc}") from exc
    two_towers = vision_class(config)
    if two_towers is not None:
        return two_towers.__name__
    projected = next((n for n in config.architectures or () if n.endswith("VisionModelWithProjection")), None)
    if projected is not None and getattr(getattr(transformers, projected, None), "config_class", None) is type(config):
        return projected  # AutoModel would leave out the projection
    try:
        auto_class: Any = AutoModel._model_mapping[type(config)]
    except KeyError as exc:
        raise ValueError(f"transformers has no AutoModel for {type(config).__name__} of {name}") from exc
    return str((auto_class[0] if isinstance(auto_class, list | tuple) else auto_class).__name__)


def load_base(
    name: str, base_class: str, revision: str | None, base_kwargs: Mapping[str, Any], head: Collection[str] = ()
) -> PreTrainedModel:
    """Loads a base by the name of its class in transformers; `ValueError` if it has no safetensors weights."""
    # The class comes from transformers only: a name in a config never reaches any other code.
    loader = getattr(transformers, base_class, None)
    if not (isinstance(loader, type) and issubclass(loader, PreTrainedModel)):
        raise ValueError(
            f"base_model_class {base_class!r} is no model class of transformers {transformers.__version__}"
        )
    base: PreTrainedModel = _load(loader, name, revision, base_kwargs)
    return base


def load_classifier(
    name: str, revision: str | None, base_kwargs: Mapping[str, Any], head: Collection[str] = ()
) -> PreTrainedModel:
    """Loads a base with its classification head; `ValueError` if weights are missing that the adapter's head lacks."""
    options = {"trust_remote_code": False, **base_kwargs, "output_loading_info": True}
    base, info = _load(AutoModelForImageClassification, name, revision, options)
    if missing := sorted(key for key in info["missing_keys"] if HEAD_PREFIX + key not in head):
        raise no_head_error(f"{name} ({missing} are missing and would be random)")
    return base


def no_head_error(name: str) -> ValueError:
    """Returns the error for a base that is no classifier."""
    return ValueError(
        f"{name}: there is no classification head on this base. Load a classifier that stands on it, and "
        "inject_tokens(classifier, adapter)"
    )


def processor_of(base: PreTrainedModel, name: str, *, revision: str | None, base_kwargs: Mapping[str, Any]) -> Any:
    """Loads the image processor beside a base, or builds one from the base's image size."""
    image_size = getattr(vision_config(base), "image_size", None)
    if name:
        wanted = (*HUB_KWARGS[:3], "trust_remote_code")
        options = {key: base_kwargs[key] for key in wanted if key in base_kwargs}
        return load_image_processor(name, revision=revision, image_size=image_size, **options)
    if image_size is None:
        raise ValueError(f"{type(base).__name__} was made in memory and names no image_size: pass image_processor=")
    return build_image_processor(image_size=image_size)


def vision_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """Returns the vision model of two towers (CLIP, SigLIP), with projection if there is such a class; else None."""
    if not hasattr(config, "vision_config") or not hasattr(config, "text_config"):
        return None
    stem = type(config).__name__.removesuffix("Config")
    names = (f"{stem}VisionModelWithProjection", f"{stem}VisionModel")
    return next((getattr(transformers, name) for name in names if hasattr(transformers, name)), None)


def _load(loader: Any, name: str, revision: str | None, base_kwargs: Mapping[str, Any]) -> Any:
    if base_kwargs.get("use_safetensors") is False:
        raise ValueError("use_safetensors=False can't be used: only safetensors weights are read")
    try:
        # Weights that a checkpoint lacks, such as the pooler of a classifier's ViT, are the same at each load, since
        # resumed runs and caches depend on all weights.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(0)  # the CPU's alone, which is restored
            return loader.from_pretrained(name, revision=revision, **{**base_kwargs, "use_safetensors": True})
    except FileNotFoundError as exc:  # safetensors raises it for a file without read permission
        raise PermissionError(f"{name}: its weights can't be opened, they may be another user's: {exc}") from exc
    except OSError as exc:
        if "safetensors" in str(exc):
            raise ValueError(
                f"{name} has no safetensors weights, and nothing else is read: convert it with "
                "`model.save_pretrained(folder)` where you trust its source"
            ) from exc
        raise
