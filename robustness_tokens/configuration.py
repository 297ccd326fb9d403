"""The adapter's configuration: which base it belongs to, the tokens' size, and the recipe that trained them."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Literal, get_args

import torch
from transformers import PreTrainedConfig

from .utils import json_values


SCHEMA_VERSION = 1

FeatureView = Literal["cls_and_patches", "cls", "patches", "pooled"]
SimilarityAxis = Literal["token", "feature"]

# The code that `register_for_auto_class` writes beside an adapter, and the only code that a config may name. This
# package never runs it: transformers does, where nothing has imported the package and trust_remote_code=True.
AUTO_MAP = {
    "AutoConfig": "modeling.RobustnessTokenConfig",
    "AutoModel": "modeling.RobustnessTokenModel",
    "AutoModelForImageClassification": "modeling.RobustnessTokenForImageClassification",
}
REMOTE_CODE_FILE = "modeling.py"
REMOTE_CODE = '''"""Loads this adapter by the package robustness-tokens: pip install robustness-tokens."""

from robustness_tokens import (
    RobustnessTokenConfig,
    RobustnessTokenForImageClassification,
    RobustnessTokenModel,
)


__all__ = ["RobustnessTokenConfig", "RobustnessTokenForImageClassification", "RobustnessTokenModel"]
'''

# What transformers itself writes into (or accepts in) every config.json; everything else must be a field of ours.
_TRANSFORMERS_KEYS = {"architectures", "auto_map", "dtype", "model_type", "transformers_version"}
_TRANSIENT_KEYS = {
    "attn_implementation",
    "experts_implementation",
    "id2label",
    "label2id",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "output_hidden_states",
    "problem_type",
    "return_dict",
}


class RobustnessTokenConfig(PreTrainedConfig):
    """Configuration of a [`RobustnessTokenModel`].

    Args:
        schema_version (`int`): Version of this layout.
        base_model_name_or_path (`str`): Hub id or folder of the frozen base.
        base_model_revision (`str`, *optional*): Commit of the base on the Hub.
        base_model_class (`str`): The transformers class that loads the base, such as `"Dinov2Model"`.
        base_model_fingerprint (`dict[str, str]`): sha256 of the base's first and last layer by floating dtype, see
            [`~robustness_tokens.models.layer_stack.base_fingerprint`].
        num_robustness_tokens (`int`): K, the number of tokens.
        hidden_size (`int`): D, the width of the base.
        initializer_range (`float`): Standard deviation of the tokens before training (paper: 0.01).
        feature_view (`str`): What "the features" are: `"cls_and_patches"` (paper), `"cls"`, `"patches"`, `"pooled"`.
        similarity_axis (`str`): `"token"` (what the published code computes) or `"feature"` (the paper's formula).
        image_mean, image_std (`list[float]`): Normalisation of [0, 1] images that the tokens were trained with.
        training (`dict`): The recipe the tokens were trained with; empty before training.

    Raises:
        ValueError: If a value is out of range, or a key is unknown.
    """

    model_type: ClassVar[str] = "robustness_tokens"

    schema_version: int = SCHEMA_VERSION
    base_model_name_or_path: str = ""
    base_model_revision: str | None = None
    base_model_class: str = ""
    base_model_fingerprint: dict[str, str] | None = None
    num_robustness_tokens: int = 10
    hidden_size: int = 384
    initializer_range: float = 0.01
    feature_view: FeatureView = "cls_and_patches"
    similarity_axis: SimilarityAxis = "token"
    image_mean: list[float] | None = None
    image_std: list[float] | None = None
    training: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if unknown := sorted(set(kwargs) - _TRANSFORMERS_KEYS - _TRANSIENT_KEYS):
            raise ValueError(f"RobustnessTokenConfig got unknown keys {unknown}; it knows {sorted(own_keys())}")
        self.auto_map = _checked_auto_map(kwargs.pop("auto_map", {}))
        _check_transformers_keys(self)
        self.base_model_fingerprint = self.base_model_fingerprint or {}
        self.training = self.training or {}
        super().__post_init__(**kwargs)
        self.validate()

    def validate(self) -> None:
        """Checks every field. Raises `ValueError` with the field, what it holds and what it may hold."""
        check_schema_version(self.schema_version)
        for name in ("num_robustness_tokens", "hidden_size"):
            value = getattr(self, name)
            if type(value) is not int or not 1 <= value <= 2**20:
                raise ValueError(f"{name} must be a whole number from 1 to {2**20}, got {value!r}")
        if not _is_finite(self.initializer_range) or self.initializer_range < 0:
            raise ValueError(
                f"initializer_range must be a finite number of at least 0, got {self.initializer_range!r}"
            )
        for name, allowed in (("feature_view", FeatureView), ("similarity_axis", SimilarityAxis)):
            if getattr(self, name) not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {getattr(self, name)!r}")
        for name in ("base_model_name_or_path", "base_model_class"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name} must be a string, got {getattr(self, name)!r}")
        revision = self.base_model_revision
        # It becomes part of a path in the cache.
        if revision is not None and not (isinstance(revision, str) and re.fullmatch(r"[0-9a-f]{7,40}", revision)):
            raise ValueError(
                f"base_model_revision must be a commit (7 to 40 hexadecimal digits) or null, got {revision!r}"
            )
        if self.base_model_class and not re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", self.base_model_class):
            raise ValueError(f"base_model_class must be the name of a class, got {self.base_model_class!r}")
        for name in ("base_model_fingerprint", "training"):
            if not isinstance(getattr(self, name), dict):
                raise ValueError(f"{name} must be a dictionary, got {getattr(self, name)!r}")
        for _, value in json_values(self.training):
            # transformers takes any "dtype", wherever it stands, for that of a model, and fails for others.
            if isinstance(value, dict) and not isinstance(value.get("dtype", ""), str):
                raise ValueError(f"a dtype in training must be a string, got {value['dtype']!r}")
        for dtype, digest in (self.base_model_fingerprint or {}).items():
            if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
                raise ValueError(f"base_model_fingerprint[{dtype!r}] must be 64 hexadecimal digits, got {digest!r}")
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("image_mean and image_std go together: give both, or neither")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if values is not None and not (
                isinstance(values, list | tuple) and values and all(_is_finite(v) for v in values)
            ):
                raise ValueError(f"{name} must be a list of finite numbers, one per channel, got {values!r}")
        if self.image_mean is not None and len(self.image_mean) != len(self.image_std or []):
            raise ValueError(
                f"image_mean and image_std must hold as many numbers, got {self.image_mean!r} and {self.image_std!r}"
            )
        if self.image_std is not None and min(self.image_std) <= 0:
            raise ValueError(f"image_std must be positive, got {self.image_std!r}")

    def to_dict(self) -> dict[str, Any]:
        """Only the adapter's own keys: labels and such belong to the base and are read from it."""
        kept = own_keys() | _TRANSFORMERS_KEYS - {"dtype"}
        return {key: value for key, value in super().to_dict().items() if key in kept and (key != "auto_map" or value)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Strict: a key that is missing, or that nobody knows, is an error (see [`check_config_dict`])."""
        check_config_dict(config_dict)
        return super().from_dict(config_dict, **kwargs)


def own_keys() -> set[str]:
    """The names of the fields that the adapter's config.json must hold, all of them."""
    return {field.name for field in fields(RobustnessTokenConfig)} - {field.name for field in fields(PreTrainedConfig)}


def check_config_dict(config_dict: Mapping[str, Any]) -> None:
    """Refuses a config.json with missing or unknown keys, or of a newer schema.

    Raises:
        ValueError: With the keys in question.
    """
    if not isinstance(config_dict, Mapping):
        raise ValueError(f"the adapter's config.json must hold an object, got {type(config_dict).__name__}")
    check_schema_version(config_dict.get("schema_version", SCHEMA_VERSION))
    known = own_keys()
    missing = sorted(known - set(config_dict))
    unknown = sorted(set(config_dict) - known - _TRANSFORMERS_KEYS)
    if missing or unknown:
        raise ValueError(
            f"the adapter's config.json has missing keys {missing} and unknown keys {unknown}: it is damaged, or was "
            "not written by robustness_tokens"
        )


def check_schema_version(version: object) -> None:
    """Raises `ValueError` unless this package can read that schema version."""
    if type(version) is not int or version < 1:
        raise ValueError(f"schema_version must be a whole number of at least 1, got {version!r}")
    if version > SCHEMA_VERSION:
        raise ValueError(
            f"the adapter has schema_version {version}, this package reads up to {SCHEMA_VERSION}: "
            "pip install --upgrade robustness-tokens"
        )


def check_same_base(
    found: Mapping[str, str], expected: Mapping[str, str], *, found_name: str, expected_name: str, made: str, fix: str
) -> None:
    """Raises `ValueError` unless two fingerprints belong to one base: each digest that both hold must be equal.

    `made` says what depends on the expected base, such as "the tokens were trained on"; `fix` what to do.
    """
    shared = sorted(set(found) & set(expected))
    if not shared:
        raise ValueError(
            f"cannot tell whether {found_name} is {expected_name}: it has fingerprints for {sorted(found)}, expected "
            f"one for {sorted(expected)}: load the base in float32, or {fix}"
        )
    for dtype in shared:
        if found[dtype] != expected[dtype]:
            raise ValueError(
                f"{made} {expected_name}, but the base given is {found_name}, with other weights "
                f"({dtype} fingerprint {found[dtype][:12]}, not {expected[dtype][:12]}): {fix}"
            )


def _checked_auto_map(auto_map: object) -> dict[str, str]:
    if not isinstance(auto_map, dict) or not auto_map.items() <= AUTO_MAP.items():
        raise ValueError(
            f"auto_map must name no code but the package's own, {AUTO_MAP}, got {auto_map!r}: "
            "the code of an adapter is never run"
        )
    return auto_map


def _check_transformers_keys(config: PreTrainedConfig) -> None:
    architectures, version, dtype = config.architectures, config.transformers_version, config.dtype
    if architectures is not None and not (
        isinstance(architectures, list) and all(isinstance(name, str) for name in architectures)
    ):
        raise ValueError(f"architectures must be a list of names or null, got {architectures!r}")
    if version is not None and not isinstance(version, str):
        raise ValueError(f"transformers_version must be a string or null, got {version!r}")
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype, dtype)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype must be the name of a data type of torch or null, got {config.dtype!r}")


def _is_finite(value: object) -> bool:
    # Compared, since math.isfinite fails for whole numbers beyond the range of floats.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
