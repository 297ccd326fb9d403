"""The adapter's configuration: which base it belongs to, the tokens' size, and the recipe that trained them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from .utils import (
    check_choice,
    check_dict,
    check_fingerprint,
    check_int,
    check_keys,
    check_list,
    check_number,
    check_numbers,
    check_pattern,
    check_schema,
    check_text,
    digest,
    json_values,
)


SCHEMA_VERSION = 2

TOKENS = "robustness_tokens"

HEAD_PREFIX = "backbone."
"""Begins the names of a trained head's tensors in an adapter's file, as in the model's state dict."""

TokenState = Mapping[str, Tensor]
"""What an adapter learned: its tokens under `TOKENS`, (K, D), or (depth, K, D) where several layers have tokens of
their own; and its gains and shifts by name, such as `"norm1.gain"`, (L, D) for L layers."""


def state_digest(state: TokenState) -> str:
    """Returns the sha256 of what an adapter learned, as its file holds it: a report names what it measured by this."""
    return digest({name: tensor.detach().float() for name, tensor in state.items()})


FeatureView = Literal["cls_and_patches", "cls", "patches", "pooled"]
SimilarityAxis = Literal["token", "feature"]
GainsAndShifts = Literal["norm", "linear", "bias", "patch_embedding"]

# `register_for_auto_class` writes this code beside an adapter; a config may name no other. Only transformers runs it,
# with trust_remote_code=True and as long as the package is not imported.
AUTO_MAP = {
    "AutoConfig": "modeling.RobustnessTokenConfig",
    "AutoModel": "modeling.RobustnessTokenModel",
    "AutoModelForImageClassification": "modeling.RobustnessTokenForImageClassification",
}
REMOTE_CODE_FILE = "modeling.py"
REMOTE_CODE = '''"""Loads this adapter by the package robustness-tokens: pip install robustness-tokens."""

from robustness_tokens import RobustnessTokenConfig, RobustnessTokenForImageClassification, RobustnessTokenModel


__all__ = ["RobustnessTokenConfig", "RobustnessTokenForImageClassification", "RobustnessTokenModel"]
'''

# An adapter that needs none of these is written as schema 1, without them, so that older releases read it.
_SCHEMA_2_DEFAULTS: dict[str, Any] = {"token_depth": 1, "gains_and_shifts": []}

# transformers writes these keys into every config.json, or accepts them; all others must be fields of ours.
_TRANSFORMERS_KEYS = {"architectures", "auto_map", "dtype", "model_type", "transformers_version"}
# transformers passes these when it makes a config; they are not saved.
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
    "torch_dtype",
}
# What a caller may ask of the base by an Auto class, which hands it to the adapter's config.
_FOR_THE_BASE = ("id2label", "label2id", "num_labels", "output_attentions", "output_hidden_states", "problem_type")


class RobustnessTokenConfig(PreTrainedConfig):
    """Configuration of a [`RobustnessTokenModel`].

    Args:
        schema_version (`int`): Version of this layout: 1, or 2 for an adapter with deep tokens, gains or shifts.
        base_model_name_or_path (`str`): Hub id or folder of the frozen base.
        base_model_revision (`str`, *optional*): Commit of the base on the Hub.
        base_model_class (`str`): The transformers class that loads the base, such as `"Dinov2Model"`.
        base_model_fingerprint (`dict[str, str]`): sha256 of the base's first and last layer by floating dtype, see
            [`~robustness_tokens.models.layer_stack.base_fingerprint`].
        num_robustness_tokens (`int`): K, the number of tokens of a layer; 0 only with gains and shifts.
        token_depth (`int`): Number of first layers that have tokens of their own (paper: 1, the input alone).
        gains_and_shifts (`list[str]`): What is learned beside the tokens, as differences to the base: `"norm"` (gains
            and shifts of LayerNorm and LayerScale in the layers), `"linear"` (gains of linear layers that have a
            bias), `"bias"` (their shifts), `"patch_embedding"` (its weight and bias); empty for tokens alone (paper).
        hidden_size (`int`): D, the width of the base.
        initializer_range (`float`): Standard deviation of the tokens before training (paper: 0.01).
        feature_view (`str`): Features to train on: `"cls_and_patches"` (paper), `"cls"`, `"patches"`, `"pooled"`.
        similarity_axis (`str`): `"token"` (what the published code computes) or `"feature"` (the paper's formula).
        image_mean, image_std (`list[float]`): Normalisation of [0, 1] images that the tokens were trained with.
        training (`dict`): The recipe the tokens were trained with; empty before training.

    Raises:
        ValueError: If a value is out of range, or a key is unknown.
    """

    model_type: ClassVar[str] = "robustness_tokens"

    schema_version: int = 1
    base_model_name_or_path: str = ""
    base_model_revision: str | None = None
    base_model_class: str = ""
    base_model_fingerprint: dict[str, str] | None = None
    num_robustness_tokens: int = 10
    token_depth: int = 1
    gains_and_shifts: list[GainsAndShifts] | None = None
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
        self.auto_map = kwargs.pop("auto_map", {})
        self.asked_of_base: dict[str, Any] = {}
        self._check_transformers_keys()
        self.base_model_fingerprint = self.base_model_fingerprint or {}
        self.training = self.training or {}
        kinds: Any = self.gains_and_shifts  # in Python perhaps a tuple
        self.gains_and_shifts = list(kinds or ()) if kinds is None or isinstance(kinds, tuple) else kinds
        if any(getattr(self, name) != default for name, default in _SCHEMA_2_DEFAULTS.items()):
            self.schema_version = SCHEMA_VERSION
        super().__post_init__(**kwargs)
        self.validate()

    @property
    def tokens_shape(self) -> tuple[int, ...]:
        """Shape of the tokens: (K, D), or (depth, K, D) for a depth above 1."""
        shape = (self.num_robustness_tokens, self.hidden_size)
        return shape if self.token_depth == 1 else (self.token_depth, *shape)

    @property
    def in_words(self) -> str:
        """What the adapter learned, such as `"10 tokens of width 384 at the input"`."""
        where = "at the input" if self.token_depth == 1 else f"for each of the first {self.token_depth} layers"
        count = "1 token" if self.num_robustness_tokens == 1 else f"{self.num_robustness_tokens} tokens"
        parts = [f"{count} of width {self.hidden_size} {where}"]
        if self.gains_and_shifts:
            parts.append(f"gains and shifts ({', '.join(self.gains_and_shifts)})")
        return " and ".join(parts if self.num_robustness_tokens else parts[1:])

    def validate(self) -> None:
        """Checks every field; `ValueError` names the field, its value and the allowed ones."""
        check_schema("the adapter", self.schema_version, SCHEMA_VERSION)
        check_gains_and_shifts(self.gains_and_shifts)
        check_int("num_robustness_tokens", self.num_robustness_tokens, 0 if self.gains_and_shifts else 1, 2**20)
        check_int("token_depth", self.token_depth, 1, 2**10)
        check_int("hidden_size", self.hidden_size, 1, 2**20)
        check_number("initializer_range", self.initializer_range, 0.0)
        check_choice("feature_view", self.feature_view, get_args(FeatureView))
        check_choice("similarity_axis", self.similarity_axis, get_args(SimilarityAxis))
        check_text("base_model_name_or_path", self.base_model_name_or_path)
        if self.base_model_revision is not None:  # it becomes part of a path in the cache
            expected = "a commit (7 to 40 hexadecimal digits) or null"
            check_pattern("base_model_revision", self.base_model_revision, r"[0-9a-f]{7,40}", expected)
        if self.base_model_class != "":
            check_pattern("base_model_class", self.base_model_class, r"[A-Za-z][A-Za-z0-9_]*", "the name of a class")
        check_fingerprint("base_model_fingerprint", self.base_model_fingerprint)
        check_dict("training", self.training)
        for _, value in json_values(self.training):
            # transformers reads a "dtype" at any depth as the dtype of a model, and fails unless it is a string.
            if isinstance(value, dict) and not isinstance(value.get("dtype", ""), str):
                raise ValueError(f"a dtype in training must be a string, got {value['dtype']!r}")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"training must hold finite numbers, which JSON has, got {value}")
        if self.image_mean is None and self.image_std is None:
            return
        if self.image_mean is None or self.image_std is None:
            raise ValueError("image_mean and image_std go together: give both, or neither")
        values: Any  # a list, or in Python perhaps a tuple
        for name, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            check_numbers(name, list(values) if isinstance(values, tuple) else values)
        if not self.image_mean or len(self.image_mean) != len(self.image_std):
            raise ValueError(
                "image_mean and image_std must hold one number per channel each, "
                f"got {self.image_mean!r} and {self.image_std!r}"
            )
        if min(self.image_std) <= 0:
            raise ValueError(f"image_std must be positive, got {self.image_std!r}")

    def _check_transformers_keys(self) -> None:
        if not isinstance(self.auto_map, dict) or not self.auto_map.items() <= AUTO_MAP.items():
            raise ValueError(
                f"auto_map must name no code but the package's own, {AUTO_MAP}, got {self.auto_map!r}: "
                "the code of an adapter is never run"
            )
        if self.architectures is not None:
            check_list("architectures", self.architectures)
            for name in self.architectures:
                check_text("architectures", name)
        if self.transformers_version is not None:
            check_text("transformers_version", self.transformers_version)
        dtype = getattr(torch, self.dtype, None) if isinstance(self.dtype, str) else self.dtype
        if self.dtype is not None and not isinstance(dtype, torch.dtype):
            raise ValueError(f"dtype must be the name of a torch dtype or null, got {self.dtype!r}")

    def to_dict(self) -> dict[str, Any]:
        """Returns only the adapter's own keys; labels come from the base."""
        kept = own_keys(self.schema_version) | _TRANSFORMERS_KEYS - {"dtype"}
        return {key: value for key, value in super().to_dict().items() if key in kept and (key != "auto_map" or value)}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Reads a config strictly; `ValueError` for a missing or an unknown key, or a newer schema."""
        name, optional = "the adapter's config.json", _TRANSFORMERS_KEYS
        version = config_dict.get("schema_version") if isinstance(config_dict, dict) else None
        check_keys(name, config_dict, own_keys(version), optional=optional, schema=SCHEMA_VERSION)
        made = super().from_dict(config_dict, **kwargs)
        config = made[0] if isinstance(made, tuple) else made
        config.asked_of_base = {name: kwargs[name] for name in _FOR_THE_BASE if kwargs.get(name) is not None}
        return made


def own_keys(schema_version: Any = SCHEMA_VERSION) -> set[str]:
    """Returns the names of the fields that an adapter's config.json of this schema must hold."""
    own = {field.name for field in fields(RobustnessTokenConfig)} - {field.name for field in fields(PreTrainedConfig)}
    return own - _SCHEMA_2_DEFAULTS.keys() if schema_version == 1 else own


def check_gains_and_shifts(kinds: Any) -> None:
    """Raises `ValueError` unless this is a list of different [`GainsAndShifts`]."""
    check_list("gains_and_shifts", kinds)
    for kind in kinds:
        check_choice("gains_and_shifts", kind, get_args(GainsAndShifts))
    if len(set(kinds)) < len(kinds):
        raise ValueError(f"gains_and_shifts must name each kind once, got {kinds!r:.200}")


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
