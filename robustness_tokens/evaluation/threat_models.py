"""Threat models: what the attacker knows, and so which functions of the image the attacker may differentiate.

Shapes: B images, N sequence, K robustness tokens, D width, C classes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..configuration import FeatureView, GainsAndShifts, SimilarityAxis, TokenState
from ..data import Normalizer
from ..models import (
    MixedPrecision,
    ProbedModel,
    RobustnessTokenForImageClassification,
    RobustnessTokenPreTrainedModel,
    computing_faster,
    default_feature_view,
    depth_of,
    extract_features,
    find_injector,
    find_layer_stack,
    kinds_of,
    model_digest,
    resize_logits,
    runs_in_half,
    size_inputs,
    tokens_in,
)
from ..report import Knowledge, Task
from ..training import check_recipe
from ..utils import check_choice


class EvaluatedModel:
    """A model as functions of [0, 1] images and of the tokens to put into it.

    Arguments are those of [`evaluate_robustness`]; normalizer, features and precision come from the adapter's config
    by default. A model after `inject_tokens` has no config and uses the paper's features for its family. The precision
    of the attacks' forward passes is `"no"` on devices without bfloat16; `exact` results are float32. `ValueError` if
    the model has no tokens, or a value is unknown or can't be derived.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        task: Task | None = None,
        normalizer: Normalizer | None = None,
        feature_view: FeatureView | None = None,
        attack_precision: MixedPrecision | None = None,
    ) -> None:
        injector = find_injector(model)
        if injector is None:
            raise ValueError(
                f"model is a {type(model).__name__} without robustness tokens: load an adapter, or call inject_tokens"
            )
        adapter = next((m for m in model.modules() if isinstance(m, RobustnessTokenPreTrainedModel)), None)
        config: Any = None if adapter is None else adapter.config
        if task is None:
            task = _task_of(model)
        check_choice("task", task, get_args(Task))
        if task != "features" and model is adapter and _task_of(model) == "features":
            raise ValueError(
                f"task={task!r}, but {type(model).__name__} has no head: load it as "
                "RobustnessTokenForImageClassification, put a probe on it, or inject_tokens into a model with a head"
            )
        self.model, self.task, self.injector, self.adapter = model, task, injector, adapter
        if normalizer is None:
            if config is None or config.image_mean is None:
                raise ValueError("normalizer is not given, and there is no adapter config to take it from: give one")
            normalizer = Normalizer(config.image_mean, config.image_std)
        if feature_view is None and config is not None:
            feature_view = config.feature_view
        elif feature_view is None and task != "segmentation":
            feature_view = default_feature_view(self.base)
        self.device = next(model.parameters()).device
        self.normalizer = normalizer.to(self.device)
        self.feature_view = feature_view
        self.similarity_axis: SimilarityAxis = config.similarity_axis if config else "token"
        if attack_precision is not None:
            check_choice("attack_precision", attack_precision, get_args(MixedPrecision))
        asked = attack_precision or self.recipe.get("mixed_precision", "no")
        self.attack_precision: MixedPrecision = "bf16" if runs_in_half(asked, device=self.device) else "no"

    @property
    def tokens(self) -> dict[str, Tensor]:
        """The tokens in the model, with their gains and shifts: the secret of the defence."""
        return {name: tensor.detach() for name, tensor in self.injector.state.items()}

    @property
    def learned(self) -> dict[str, Tensor]:
        """The tokens, and a head that is saved with them."""
        return self.tokens if self.adapter is None else self.adapter.learned_state()

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """Tells which model it is and how it is attacked, as JSON values."""
        return {
            "model": model_digest(self.model),
            "normalizer": repr(self.normalizer.image_mean.tolist() + self.normalizer.image_std.tolist()),
            "task": self.task,
            "features": [self.feature_view, self.similarity_axis],
            "attack_precision": self.attack_precision,
        }

    @property
    def token_depth(self) -> int:
        """The number of layers with tokens of their own."""
        return depth_of(self.injector.robustness_tokens)

    @property
    def gains_and_shifts(self) -> list[GainsAndShifts]:
        """The kinds of gains and shifts in the model."""
        return kinds_of(self.model, find_layer_stack(self.model), self.injector.names)

    @property
    def recipe(self) -> dict[str, Any]:
        """The `training` of the adapter's config; empty without one. `ValueError` if a value has a wrong type."""
        recipe = dict((None if self.adapter is None else self.adapter.config.training) or {})
        check_recipe(recipe)
        return recipe

    @property
    def base(self) -> nn.Module:
        """The model of transformers with the tokens in it, without an adapter or a module of the user around it."""
        if self.adapter is not None:
            return self.adapter.get_base_model()
        inside = (m for m in self.model.modules() if isinstance(m, PreTrainedModel) and find_injector(m) is not None)
        return next(inside, self.model)

    def features(self, images: Tensor, tokens: TokenState | None, *, exact: bool = False) -> Tensor:
        """Returns the features that the tokens were trained to keep, float32 (B, N, D) or (B, D).

        `tokens` are a state with any number of tokens, `None` for the base alone; `exact` computes in float32 whatever
        the attacks' precision. `ValueError` if the features of this model are not known.
        """
        if self.feature_view is None:
            raise ValueError(f"feature_view is not given, and a {type(self.model).__name__} has no default: give one")
        view = self.feature_view
        base: Any = self.base
        return self._run(lambda x: extract_features(base, x, feature_view=view), images, tokens, exact)

    def logits(self, images: Tensor, tokens: TokenState | None, *, exact: bool = False) -> Tensor:
        """Returns the head's logits, float32 (B, C) or (B, C, h, w); arguments as in [`features`]."""

        def run(pixel_values: Tensor) -> Tensor:
            output: Any
            if isinstance(self.model, PreTrainedModel):
                output = self.model(pixel_values=pixel_values, **size_inputs(self.model, pixel_values))
            else:  # a user's module may call its argument as it likes
                output = self.model(pixel_values)
            logits = getattr(output, "logits", output)
            if not isinstance(logits, Tensor):
                raise ValueError(
                    f"{type(self.model).__name__} must return logits, a tensor or an output with `logits`, got a "
                    f"{type(output).__name__}: wrap it in a module that does"
                )
            return logits

        return self._run(run, images, tokens, exact)

    def pixel_logits(
        self, images: Tensor, tokens: TokenState | None, size: Sequence[int], *, exact: bool = False
    ) -> Tensor:
        """Returns the logits of a segmentation, resized bilinearly to the labels' (H, W): (B, C, H, W)."""
        logits = self.logits(images, tokens, exact=exact)
        if logits.dim() != 4:
            raise ValueError(f"logits of a segmentation must have shape (B, C, h, w), got {tuple(logits.shape)}")
        if logits.shape[2:] == tuple(size):
            return logits
        return resize_logits(logits, torch.Size(size))

    def attacked_faster(self) -> AbstractContextManager[None]:
        """Returns a context in which the base computes as in training: faster, and equal except for rounding."""
        return computing_faster(self.base, device=self.device, half_precision=self.attack_precision == "bf16")

    def _run(
        self, function: Callable[[Tensor], Tensor], images: Tensor, tokens: TokenState | None, exact: bool
    ) -> Tensor:
        half = self.attack_precision == "bf16" and not exact
        with tokens_in(self.model, tokens), torch.autocast(self.device.type, torch.bfloat16, enabled=half):
            pixel_values = self.normalizer(images)
            return function(pixel_values.to(getattr(self.base, "dtype", pixel_values.dtype))).float()


def _task_of(model: nn.Module) -> Task:
    if isinstance(model, ProbedModel):
        task: Task = model.head.task  # type: ignore[assignment]  # a str there, with the same values
        return task
    if isinstance(model, RobustnessTokenPreTrainedModel):
        return "classification" if isinstance(model, RobustnessTokenForImageClassification) else "features"
    if type(model).__name__.endswith("ForImageClassification"):
        return "classification"
    raise ValueError(
        f"task is not given, and a {type(model).__name__} doesn't say whether it classifies or segments: give "
        f"one of {get_args(Task)}"
    )


@dataclass(frozen=True, kw_only=True)
class AttackerView:
    """A model that the attacker holds."""

    name: str  # unique within an evaluation
    knowledge: Knowledge
    model: EvaluatedModel  # the evaluated one, or another one for a transfer attack
    tokens: tuple[TokenState | None, ...]  # `None` for the base alone; objectives average over several
    differentiable: bool = True  # whether the attacker has gradients, or only answers
    is_surrogate: bool = False  # whether it is not the evaluated model

    @property
    def is_defended_model(self) -> bool:
        """Tells whether this is the measured model with the tokens of its defence."""
        return self.knowledge in ("none", "full") and not self.is_surrogate


def attacker_views(
    knowledge: Knowledge,
    model: EvaluatedModel,
    *,
    own_tokens: Sequence[TokenState] = (),
    surrogate: EvaluatedModel | None = None,
) -> list[AttackerView]:
    """Returns the models, at least one, through which an attacker of this level can attack.

    Black box: the defended model's answers, and the surrogate if there is one. Grey box: base and head without tokens.
    Own tokens: each set that the attacker trained, and their ensemble. White box: the defended model.
    `ValueError` if the level is unknown, or `"own_tokens"` has no sets.
    """
    view = functools.partial(AttackerView, knowledge=knowledge, model=model)
    if knowledge == "none":
        views = [view(name="queries", tokens=(model.tokens,), differentiable=False)]
        if surrogate is not None:
            views.append(view(name="transfer", model=surrogate, tokens=(None,), is_surrogate=True))
        return views
    if knowledge == "base":
        return [view(name="base", tokens=(None,))]
    if knowledge == "full":
        return [view(name="full", tokens=(model.tokens,))]
    if knowledge != "own_tokens":
        raise ValueError(f"knowledge must be among {get_args(Knowledge)}, got {knowledge!r}")
    if not own_tokens:
        raise ValueError('knowledge "own_tokens" needs own_tokens, the tokens that the attacker trained; got none')
    views = [view(name=f"own_tokens_{i}", tokens=(tokens,)) for i, tokens in enumerate(own_tokens)]
    if len(own_tokens) > 1:
        views.append(view(name="own_tokens_ensemble", tokens=tuple(own_tokens)))
    return views
