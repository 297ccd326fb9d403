"""Linear probe heads on a frozen base, their two files (safetensors and JSON), and a model with such a head.

Shapes: B images, P patches in a grid of h rows and w columns, D width, F what a head reads, C classes.
"""

from __future__ import annotations

import json
import math
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..data import IGNORE_INDEX, check_same_classes
from ..utils import (
    check_bool,
    check_choice,
    check_fingerprint,
    check_finite,
    check_int,
    check_keys,
    check_list,
    check_text,
    digest,
    local_path,
    read_json,
    read_tensors,
    write_bytes,
    write_text,
)
from .features import count_patches, extract_features, head_inputs, patch_grid
from .injection import find_injector, tokens_in
from .layer_stack import check_base, headless_model
from .modeling import RobustnessTokenPreTrainedModel


HEAD_CONFIG_FILE = "head.json"
HEAD_WEIGHTS_FILE = "head.safetensors"

_SCHEMA_VERSION = 1
_CONFIG_KEYS = ("task", "in_features", "num_labels", "trained_with_tokens", "base_model_fingerprint")


class ProbeHead(nn.Module, ABC):
    """A linear head; see [`ClassificationHead`] and [`SegmentationHead`].

    Args:
        in_features: F, at least 1.
        num_labels: C, at least 1.
        base_model_fingerprint: Digests of the base that the head was trained on, as in [`RobustnessTokenConfig`];
            empty if unknown.
        trained_with_tokens: True if the base had robustness tokens while the head was trained.
        label_names: Names of the classes, in their order; None if unknown. A dataset's labels are matched by them.
    """

    task: ClassVar[str]
    ignore_index: ClassVar[int]

    def __init__(
        self,
        in_features: int,
        num_labels: int,
        *,
        base_model_fingerprint: Mapping[str, str] | None = None,
        trained_with_tokens: bool = False,
        label_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_int("in_features", in_features, 1)
        check_int("num_labels", num_labels, 1)
        self.label_names = None if label_names is None else list(label_names)
        if self.label_names is not None and len(self.label_names) != num_labels:
            raise ValueError(f"label_names must hold {num_labels} names, one per class, got {len(self.label_names)}")
        for name in self.label_names or ():
            check_text("each name in label_names", name)
        self.in_features, self.num_labels = in_features, num_labels
        self.base_model_fingerprint = dict(base_model_fingerprint or {})
        self.trained_with_tokens = trained_with_tokens

    @staticmethod
    @abstractmethod
    def extract(base: PreTrainedModel, pixel_values: Tensor) -> Tensor:
        """Computes the head's input for normalised images (B, 3, H, W), in float32: (B, F), or maps (B, F, h, w)."""

    @abstractmethod
    def forward(self, features: Tensor) -> Tensor:
        """Computes logits from what [`extract`] returns: (B, C), or maps (B, C, h, w)."""


class ClassificationHead(ProbeHead):
    """A linear layer on the CLS token and the mean of the patches, as DINOv2's linear heads.

    F is 2 D, or D in families without a CLS token (the mean alone). Takes the arguments of [`ProbeHead`].

    Source: Oquab et al., "DINOv2", arXiv 2304.07193, and its released linear heads.
    """

    task = "classification"
    ignore_index = -100  # no class has this index, so every label counts

    def __init__(self, in_features: int, num_labels: int, **provenance: Any) -> None:
        super().__init__(in_features, num_labels, **provenance)
        self.linear = nn.Linear(in_features, num_labels)
        _initialize(self.linear)

    @staticmethod
    def extract(base: PreTrainedModel, pixel_values: Tensor) -> Tensor:
        features = _cls_and_patches(base, pixel_values)
        return head_inputs(features, count_patches(base, pixel_values))  # (B, 2 D) or (B, D)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.linear(features)
        return logits


class ZeroShotHead(ProbeHead):
    """Compares image embeddings with text embeddings, one per class, as CLIP classifies without training.

    It is not saved: make it from text again.

    Args:
        text_embeddings: (C, E) floating: the text tower's projected embedding of a prompt for each class.
        logit_scale: Factor on the cosines; `model.logit_scale.exp()` of the two-tower model (CLIP: 100).
        label_names: Names of the classes, as in [`ProbeHead`].

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.
    """

    task = "classification"
    ignore_index = -100

    def __init__(
        self, text_embeddings: Tensor, logit_scale: float = 100.0, *, label_names: Sequence[str] | None = None
    ) -> None:
        logit_scale = float(torch.as_tensor(logit_scale).detach())  # a model's parameter would bring its graph
        if text_embeddings.dim() != 2 or not text_embeddings.is_floating_point():
            raise ValueError(
                f"text_embeddings must be (C, E) floating, one row per class, got {text_embeddings.dtype} of shape "
                f"{tuple(text_embeddings.shape)}"
            )
        if not (text_embeddings.isfinite().all() and text_embeddings.any(dim=1).all() and 0 < logit_scale < math.inf):
            raise ValueError(
                "text_embeddings must be finite rows that are not zero, and logit_scale finite and above 0"
            )
        super().__init__(text_embeddings.shape[1], text_embeddings.shape[0], label_names=label_names)
        self.weight: Tensor
        self.register_buffer("weight", logit_scale * F.normalize(text_embeddings.detach().float(), dim=1))  # (C, E)

    @staticmethod
    def extract(base: PreTrainedModel, pixel_values: Tensor) -> Tensor:
        return extract_features(base, pixel_values, feature_view="pooled").float()  # (B, E)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(F.normalize(features, dim=1), self.weight)


class SegmentationHead(ProbeHead):
    """Batch norm and a 1x1 convolution on the grid of patches, as in DINOv2 and the paper; F is D.

    The logits (B, C, h, w) have one value per patch; [`ProbedModel`] resizes them to the images. Takes the arguments
    of [`ProbeHead`], with at most 255 classes: 255 marks ignored pixels.
    """

    task = "segmentation"
    ignore_index = IGNORE_INDEX

    def __init__(self, in_features: int, num_labels: int, **provenance: Any) -> None:
        super().__init__(in_features, num_labels, **provenance)
        if num_labels > IGNORE_INDEX:
            raise ValueError(
                f"num_labels must be at most {IGNORE_INDEX}, the label of ignored pixels, got {num_labels}"
            )
        self.norm = nn.BatchNorm2d(in_features)
        self.convolution = nn.Conv2d(in_features, num_labels, kernel_size=1)
        _initialize(self.convolution)

    @staticmethod
    def extract(base: PreTrainedModel, pixel_values: Tensor) -> Tensor:
        patches = _cls_and_patches(base, pixel_values)[:, -count_patches(base, pixel_values) :]
        return patches.transpose(1, 2).unflatten(2, patch_grid(base, pixel_values))  # (B, P, D) -> (B, D, h, w)

    def forward(self, features: Tensor) -> Tensor:
        logits: Tensor = self.convolution(self.norm(features))
        return logits


_HEAD_CLASSES: dict[str, type[ProbeHead]] = {head.task: head for head in (ClassificationHead, SegmentationHead)}


def save_head(head: ProbeHead, folder: str | os.PathLike[str]) -> None:
    """Writes head.json and head.safetensors.

    Args:
        head: The head.
        folder: Created if needed; the two files are overwritten.

    Raises:
        ValueError: If a weight is not finite, the base of the head is unknown, or it is a `ZeroShotHead`. Nothing is
            written then.
    """
    if type(head) not in _HEAD_CLASSES.values():
        raise ValueError(f"a {type(head).__name__} is not saved: keep its class names, and make it from text again")
    _check_names_base("a head", head.base_model_fingerprint)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in head.state_dict().items()}
    check_finite("refusing to save a head", tensors)
    path = Path(local_path(folder))
    path.mkdir(parents=True, exist_ok=True)
    config = {"schema_version": _SCHEMA_VERSION, **{key: getattr(head, key) for key in _CONFIG_KEYS}}
    if head.label_names is not None:
        config["label_names"] = head.label_names
    write_bytes(path / HEAD_WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
    write_text(path / HEAD_CONFIG_FILE, json.dumps(config, indent=2) + "\n")


def _check_names_base(name: str, fingerprint: Mapping[str, str]) -> None:
    if not fingerprint:
        raise ValueError(
            f"{name} has no base_model_fingerprint, so it would be taken for a head of any base: train it by "
            "train_probe, or make it with base_model_fingerprint=base_fingerprint(base), of robustness_tokens.models"
        )


def load_head(folder: str | os.PathLike[str]) -> ProbeHead:
    """Reads a head that [`save_head`] wrote.

    Args:
        folder: Folder with head.json and head.safetensors.

    Returns:
        The head, frozen and in eval mode.

    Raises:
        ValueError: If a file is missing, damaged or of a newer schema, or if the two don't fit together.
    """
    path = Path(local_path(folder))
    if missing := [name for name in (HEAD_CONFIG_FILE, HEAD_WEIGHTS_FILE) if not (path / name).is_file()]:
        raise ValueError(f"{path} holds no probe head: it has no {' and no '.join(missing)}")
    config, file = read_json(path / HEAD_CONFIG_FILE), path / HEAD_CONFIG_FILE
    names = {"schema_version", *_CONFIG_KEYS}
    check_keys(str(file), config, names, optional={"label_names"}, schema=_SCHEMA_VERSION)
    if "label_names" in config:
        check_list(f"{file}: label_names", config["label_names"])
    check_choice(f"{file}: task", config["task"], sorted(_HEAD_CLASSES))
    check_bool(f"{file}: trained_with_tokens", config["trained_with_tokens"])
    check_fingerprint(f"{file}: base_model_fingerprint", config["base_model_fingerprint"])
    _check_names_base(str(file), config["base_model_fingerprint"])
    with torch.device("meta"):  # takes no memory until the file's size is checked
        head = _HEAD_CLASSES[config["task"]](
            **{key: config[key] for key in _CONFIG_KEYS[1:]}, label_names=config.get("label_names")
        )
    weights = read_tensors(path / HEAD_WEIGHTS_FILE, head.state_dict(), config_file=HEAD_CONFIG_FILE)
    head.load_state_dict(weights, assign=True)
    return head.eval().requires_grad_(False)


def _cls_and_patches(base: PreTrainedModel, pixel_values: Tensor) -> Tensor:
    """Computes (B, N, D) in float32: the CLS token if the family has one, then the patches."""
    if pixel_values.dim() != 4:
        raise ValueError(f"pixel_values must have shape (B, 3, H, W), got {tuple(pixel_values.shape)}")
    return extract_features(base, pixel_values.to(base.dtype), feature_view="cls_and_patches").float()


def _initialize(layer: nn.Linear | nn.Conv2d) -> None:
    nn.init.normal_(layer.weight, std=0.01)  # as DINOv2's linear heads
    assert layer.bias is not None
    nn.init.zeros_(layer.bias)


class ProbedModel(nn.Module):
    """A frozen model with a probe head: maps pixel values to logits.

    The same head is used with the tokens on and off, unless `base_head` is given. The heads are frozen, and the model
    is always in eval mode.

    Args:
        model: A `RobustnessTokenModel`, a model that `inject_tokens` was called on, or a base without tokens.
        head: Head on the features; it is moved to the base's device.
        base_head: Head to use while the tokens are off; by default `head`.
        ignore_base_mismatch: Accept heads that were trained on another base.

    Raises:
        ValueError: If a head was trained on another base, or the heads differ in task or number of classes.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        head: ProbeHead,
        *,
        base_head: ProbeHead | None = None,
        ignore_base_mismatch: bool = False,
    ) -> None:
        super().__init__()
        heads = [head] if base_head is None else [head, base_head]
        if len({(type(one), one.num_labels) for one in heads}) > 1:
            raise ValueError(
                f"head and base_head must be of one task and number of classes, got {head.task} of {head.num_labels} "
                f"and {heads[1].task} of {heads[1].num_labels}"
            )
        check_same_classes(heads[0].label_names, heads[-1].label_names, whose="head and base_head")
        self.model = model
        base = base_of(model)
        for one in heads:
            check_head(one, base, ignore_base_mismatch=ignore_base_mismatch)
            one.to(base.device).requires_grad_(False)
        self.head, self.base_head, self.task = head, base_head, head.task
        self.eval()

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Maps (B, 3, H, W) normalised images to (B, C) float32 logits, or (B, C, H, W) for segmentation."""
        base = base_of(self.model)
        injector = find_injector(base)
        is_plain = injector is None or not injector.enabled
        head = self.base_head if is_plain and self.base_head is not None else self.head
        return resize_logits(head(head.extract(base, pixel_values)), pixel_values.shape[-2:]).float()

    def disable_adapter(self) -> AbstractContextManager[None]:
        """Turns the tokens off inside a `with` block; a base without tokens stays unchanged."""
        return tokens_in(self, None)

    def train(self, mode: bool = True) -> Self:
        """Ignores `mode` and stays in eval mode: the batch norm's statistics must not change."""
        return super().train(False)


def check_head(head: ProbeHead, base: PreTrainedModel, *, ignore_base_mismatch: bool = False) -> None:
    """Raises `ValueError` unless this is a head that was trained on this base, or on an unknown one."""
    if not isinstance(head, ProbeHead):
        raise ValueError(f"head is a {type(head).__name__}, expected a probe head or a ZeroShotHead")
    if head.base_model_fingerprint and not ignore_base_mismatch:
        check_base(
            base,
            head.base_model_fingerprint,
            expected_name="the head's own base",
            made=f"the {head.task} head was trained on",
            fix="train a head on this base",
        )


def label_names(model: nn.Module) -> list[str] | None:
    """Returns the names of the classes of a head or a model, in their order; None if unknown."""
    if isinstance(model, ProbeHead | ProbedModel):
        return model.label_names if isinstance(model, ProbeHead) else model.head.label_names
    base: Any = base_of(model) if isinstance(model, PreTrainedModel) else model
    names = getattr(getattr(base, "config", None), "id2label", None)
    if not names or all(re.fullmatch(r"LABEL_\d+", str(name)) for name in names.values()):
        return None  # transformers' placeholders
    return [str(names[number]) for number in sorted(names)]


def head_digest(base: PreTrainedModel, head: ProbeHead | None) -> str:
    """Returns a digest of a head's weights; None means the base's own head."""
    if head is not None:
        return digest(head.state_dict())
    inside = {id(tensor) for tensor in headless_model(base).parameters()}
    own = {name: tensor for name, tensor in base.named_parameters() if id(tensor) not in inside}
    # timm's wrapper has its head inside, so all weights count.
    return digest(own or dict(base.named_parameters()))


def resize_logits(logits: Tensor, size: torch.Size) -> Tensor:
    """Resizes logits (B, C, h, w) bilinearly to `size`; returns (B, C) logits unchanged."""
    if logits.dim() == 2:
        return logits
    return F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)


def base_of(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the base of a `RobustnessTokenModel`, or any other model itself."""
    return model.get_base_model() if isinstance(model, RobustnessTokenPreTrainedModel) else model
