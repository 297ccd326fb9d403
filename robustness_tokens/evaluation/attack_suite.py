"""The named attacks, as calls of [`~robustness_tokens.attacks`] on the model that the attacker holds.

Shapes: B images, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..attacks import (
    PAPER_EPS_NORMALIZED,
    PAPER_STEP_SIZE_NORMALIZED,
    Objective,
    apgd_attack,
    auto_attack,
    cross_entropy_objective,
    example_generators,
    feature_cosine_objective,
    feature_mse_objective,
    margin_objective,
    noise_attack,
    paper_attack,
    pgd_attack,
    pgd_step_size,
    pixel_cross_entropy_objective,
    square_attack,
)
from ..configuration import TokenState
from ..report import Task
from .threat_models import AttackerView


ObjectiveFn: TypeAlias = Callable[[Tensor], Tensor]
ObjectiveKind: TypeAlias = Literal["cosine", "mse", "cross_entropy", "margin"]

MI_FGSM_MOMENTUM = 1.0  # as published
_MISCLASSIFIED = 1000.0  # more than any cross-entropy
_WRONG_ABOVE = {"cross_entropy": _MISCLASSIFIED / 2, "margin": 0.0}  # a misclassified image has a higher objective


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack and its hyper-parameters; parameters that the attack does not take stay `None`.

    Args:
        name: One of `feature_cosine`, `feature_mse`, `cross_entropy`, `margin`, `mi_fgsm`, `single_step`,
            `apgd_cross_entropy`, `apgd_targeted_dlr`, `auto_attack`, `square`, `uniform_noise`, `corner_noise`,
            `paper`, `paper_cross_entropy`.
        target: For a feature attack, the clean features to push away from: those of the `"base"` alone, or of the
            `"defended"` model with the attacker's tokens.
        num_steps: Gradient steps per restart.
        num_restarts: Restarts.
        step_size: Step in pixel units; `2.5 * eps / num_steps` if None.
        num_queries: Queries of Square.
        num_draws: Draws of noise.
        num_target_classes: Target classes of targeted APGD.

    Raises:
        ValueError: If the name is unknown, or a parameter is missing or does not belong to the attack.
    """

    name: str
    target: Literal["base", "defended"] | None = None
    num_steps: int | None = None
    num_restarts: int | None = None
    step_size: float | None = None
    num_queries: int | None = None
    num_draws: int | None = None
    num_target_classes: int | None = None

    def __post_init__(self) -> None:
        known, given = set(find_definition(self.name).parameters), set(self.parameters())
        if wrong := sorted((given - known) | (known - given - {"step_size"})):
            raise ValueError(f"attack {self.name!r} takes {sorted(known)}, got {sorted(given)}: correct {wrong}")

    @property
    def is_paper(self) -> bool:
        """Tells whether this is the published attack, which has an eps of its own."""
        return self.name in ("paper", "paper_cross_entropy")

    def parameters(self) -> dict[str, Any]:
        """Returns the hyper-parameters that are set, by name, as JSON values."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "name" and value is not None}

    def reported_parameters(self, eps: float) -> dict[str, Any]:
        """Returns the parameters that a reader needs to repeat the attack, including constants and what eps sets."""
        values = self.parameters()
        if self.is_paper:
            values |= {"eps_normalized": PAPER_EPS_NORMALIZED, "step_size_normalized": PAPER_STEP_SIZE_NORMALIZED}
        elif self.name == "single_step":
            values |= {"step_size": eps}
        elif self.name == "mi_fgsm":
            assert self.num_steps is not None
            values |= {"step_size": eps / self.num_steps, "momentum": MI_FGSM_MOMENTUM}
        elif self.num_steps is not None and "step_size" in ATTACKS[self.name].parameters:
            values = {"step_size": pgd_step_size(eps, self.num_steps), **values}
        return values


@dataclass(frozen=True, kw_only=True)
class AttackBatch:
    """A batch of images and what is known about them."""

    images: Tensor  # (B, 3, H, W) float in [0, 1]
    labels: Tensor | None  # (B,) classes, or (B, H, W), or `None` where only features are evaluated
    index: Tensor  # (B,) int64, rows of the images in the dataset, which seed their noise
    ignore_index: int = 255  # label of pixels that do not count
    base_features: Tensor | None = None  # the base's clean features, float32, if they are kept

    def first(self, count: int) -> AttackBatch:
        """Returns the first images of the batch."""
        return self if count >= len(self.images) else self.select(slice(count))

    def select(self, rows: Tensor | slice) -> AttackBatch:
        """Returns the images at these rows: a slice, or (R,) int64 on the CPU, which indexes tensors of any device."""
        parts: dict[str, Any] = {name: value[rows] for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **parts)


@dataclass(frozen=True, kw_only=True)
class AttackCall:
    """An attack on a batch, with the objectives that the attacker maximises."""

    attack: Attack
    view: AttackerView
    batch: AttackBatch
    eps: float
    seed: int

    @property
    def images(self) -> Tensor:
        return self.batch.images

    @property
    def labels(self) -> Tensor:
        if self.batch.labels is None:
            raise ValueError(f"attack {self.attack.name!r} needs labels, which the dataset doesn't have")
        return self.batch.labels

    @property
    def settings(self) -> dict[str, Any]:
        """Keyword arguments for a function of `attacks`: eps and the hyper-parameters."""
        values = self.attack.parameters()
        values.pop("target", None)
        return {"eps": self.eps, **values}

    @property
    def generators(self) -> list[torch.Generator]:
        """One generator per image, seeded by view and attack too, so that attacks start at different points."""
        stream = zlib.crc32(f"{self.view.name}/{self.attack.name}/{self.attack.target}".encode())
        return example_generators(self.seed, stream, self.batch.index)

    @property
    def batch_seed(self) -> int:
        """Seed for attacks that draw noise for a whole batch."""
        return self.generators[0].initial_seed() % 2**31

    @torch.no_grad()
    def target_features(self, tokens: TokenState | None) -> Tensor:
        if self.attack.target != "base":
            return self.view.model.features(self.images, tokens)
        if self.batch.base_features is not None and not self.view.is_surrogate:
            return self.batch.base_features
        return self.view.model.features(self.images, None)

    def objective(self, kind: ObjectiveKind) -> ObjectiveFn:
        """Returns the objective averaged over the attacker's sets of tokens."""
        objectives = [self._objective(kind, tokens) for tokens in self.view.tokens]
        if len(objectives) == 1:
            return objectives[0]
        return lambda images: torch.stack([objective(images) for objective in objectives]).mean(dim=0)  # (B,)

    def _objective(self, kind: ObjectiveKind, tokens: TokenState | None) -> Objective:
        model = self.view.model
        if kind in ("cosine", "mse"):
            features_fn, target = functools.partial(model.features, tokens=tokens), self.target_features(tokens)
            if kind == "mse":
                return feature_mse_objective(features_fn, target)
            return feature_cosine_objective(features_fn, target, similarity_axis=model.similarity_axis)
        labels = self.labels
        if model.task == "segmentation":
            logits_fn = functools.partial(model.pixel_logits, tokens=tokens, size=labels.shape[1:])
            return pixel_cross_entropy_objective(logits_fn, labels, ignore_index=self.batch.ignore_index)
        logits_fn = functools.partial(model.logits, tokens=tokens)
        if kind == "margin":
            return margin_objective(logits_fn, labels)
        # No bonus on another model: images of larger loss transfer better than images that are just misclassified.
        bonus = _MISCLASSIFIED if self.view.is_defended_model else 0.0
        return cross_entropy_objective(logits_fn, labels, misclassified_bonus=bonus)

    @property
    def score(self) -> ObjectiveKind:
        """Objective of an attacker who sees only the outputs of the task."""
        return "cosine" if self.view.model.task == "features" else "margin"

    def logits(self, images: Tensor) -> Tensor:
        """Returns (B, C) logits, averaged over the attacker's sets of tokens."""
        return torch.stack([self.view.model.logits(images, tokens) for tokens in self.view.tokens]).mean(dim=0)

    def maximize(self, function: Callable[..., Tensor], kind: ObjectiveKind) -> Tensor:
        """Attacks the batch by a function of `attacks`.

        On the measured classifier itself, the attack of an image stops once it is misclassified. Images for which it
        stopped in the attack's precision, but which are correct in float32, are attacked again, to the end.
        """
        attack = functools.partial(function, **self.settings)
        view, objective, wrong_above = self.view, self.objective(kind), _WRONG_ABOVE.get(kind)
        if wrong_above is None or view.model.task != "classification" or not view.is_defended_model:
            return attack(objective, self.images, generator=self.generators)
        assert isinstance(objective, Objective)  # of one set of tokens
        done = torch.zeros(len(self.images), dtype=torch.bool, device=self.images.device)
        objective_fn, of_images = objective.function, objective.of_images

        def watched(images: Tensor, rows: Tensor, *of_rows: Tensor) -> Tensor:
            values: Tensor = objective_fn(images, *of_rows)
            done[rows] |= values.detach() > wrong_above
            return values

        numbers = torch.arange(len(self.images), device=self.images.device)
        adversarial = attack(
            Objective(watched, numbers, *of_images), self.images, stop_above=wrong_above, generator=self.generators
        )
        with torch.no_grad():
            right = view.model.logits(adversarial, view.tokens[0], exact=True).argmax(dim=1) == self.labels
        rows = (right & done).nonzero()[:, 0]
        if len(rows):
            generators = self.generators
            adversarial[rows] = attack(
                objective.select(rows), self.images[rows], generator=[generators[row] for row in rows.tolist()]
            )
        return adversarial


def run_attack(attack: Attack, view: AttackerView, batch: AttackBatch, *, eps: float, seed: int) -> Tensor:
    """Attacks a batch through the attacker's model and returns (B, 3, H, W) adversarial images in [0, 1].

    `eps` is in pixel units; the paper's attack has its own. The noise depends on the seed, the attack, the view and
    each image's index. `ValueError` if the attack does not fit the view or the task.
    """
    definition = ATTACKS[attack.name]
    if not view.differentiable and not definition.gradient_free:
        raise ValueError(f"attack {attack.name!r} needs gradients, which view {view.name!r} does not give")
    if view.model.task not in definition.tasks:
        raise ValueError(f"attack {attack.name!r} is for {definition.tasks}, the task is {view.model.task!r}")
    with view.model.attacked_faster():
        return definition.run(AttackCall(attack=attack, view=view, batch=batch, eps=eps, seed=seed))


def on_8bit_grid(images: Tensor) -> bool:
    """Tells whether all values of [0, 1] images are n/255, except for rounding."""
    levels = 255 * images.double()
    return bool((levels - levels.round()).abs().max() < 1e-4)


def _mi_fgsm(call: AttackCall) -> Tensor:
    reported = call.attack.reported_parameters(call.eps)
    step_size = reported["step_size"] or None  # at eps 0 there is none
    attack = functools.partial(pgd_attack, step_size=step_size, momentum=reported["momentum"], random_start=False)
    return call.maximize(attack, "cross_entropy")


def _single_step(call: AttackCall) -> Tensor:
    objective = call.objective("cosine" if call.view.model.task == "features" else "cross_entropy")
    # From a random start, since a feature objective has no gradient at the clean image.
    return pgd_attack(
        objective, call.images, eps=call.eps, step_size=call.eps or None, num_steps=1, generator=call.generators
    )


def _noise(call: AttackCall, kind: Literal["uniform", "corners"]) -> Tensor:
    objective = call.objective(call.score)
    return noise_attack(objective, call.images, kind=kind, generator=call.generators, **call.settings)


def _apgd(call: AttackCall, loss: Literal["cross_entropy", "targeted_dlr"]) -> Tensor:
    # On another model, images of the highest loss transfer better.
    highest_loss = loss == "cross_entropy" and call.view.knowledge != "full"
    return apgd_attack(
        call.logits,
        call.images,
        call.labels,
        loss=loss,
        highest_loss=highest_loss,
        seed=call.batch_seed,
        **call.settings,
    )


def _paper(call: AttackCall, *, with_labels: bool) -> Tensor:
    model, (tokens, *others) = call.view.model, call.view.tokens
    if others:
        raise ValueError("the paper's attack knows one model, the attacker has several: attack through each alone")
    normalizer = model.normalizer

    def model_fn(pixel_values: Tensor) -> Tensor:
        images = normalizer.inverse(pixel_values)
        return model.logits(images, tokens) if with_labels else model.features(images, tokens)

    pixel_values = paper_attack(
        model_fn,
        normalizer(call.images),
        image_mean=normalizer.image_mean.flatten().tolist(),
        image_std=normalizer.image_std.flatten().tolist(),
        labels=call.labels if with_labels else None,
        generator=call.generators,
        **{**call.settings, "eps": PAPER_EPS_NORMALIZED},
    )
    # The attack ends on the 8-bit grid; this removes the rounding errors of normalising and its inverse.
    return (normalizer.inverse(pixel_values) * 255).round().clamp(0, 255) / 255


@dataclass(frozen=True, kw_only=True)
class _Definition:
    run: Callable[[AttackCall], Tensor]
    parameters: tuple[str, ...] = ()
    tasks: tuple[Task, ...] = ("features", "classification", "segmentation")
    min_classes: int = 2
    gradient_free: bool = False
    needs_features: bool = False
    needs_pyautoattack: bool = False


_PGD = ("num_steps", "num_restarts", "step_size")
_WITH_LABELS: tuple[Task, ...] = ("classification", "segmentation")
_CLASSES: tuple[Task, ...] = ("classification",)

ATTACKS: Mapping[str, _Definition] = {
    "feature_cosine": _Definition(
        run=lambda call: call.maximize(pgd_attack, "cosine"), parameters=("target", *_PGD), needs_features=True
    ),
    "feature_mse": _Definition(
        run=lambda call: call.maximize(pgd_attack, "mse"), parameters=("target", *_PGD), needs_features=True
    ),
    "cross_entropy": _Definition(
        run=lambda call: call.maximize(pgd_attack, "cross_entropy"), parameters=_PGD, tasks=_WITH_LABELS
    ),
    "margin": _Definition(run=lambda call: call.maximize(pgd_attack, "margin"), parameters=_PGD, tasks=_CLASSES),
    "mi_fgsm": _Definition(run=_mi_fgsm, parameters=("num_steps",), tasks=_WITH_LABELS),
    "single_step": _Definition(run=_single_step),
    "apgd_cross_entropy": _Definition(
        run=lambda call: _apgd(call, "cross_entropy"),
        parameters=("num_steps", "num_restarts"),
        tasks=_CLASSES,
        needs_pyautoattack=True,
    ),
    "apgd_targeted_dlr": _Definition(
        run=lambda call: _apgd(call, "targeted_dlr"),
        parameters=("num_steps", "num_restarts", "num_target_classes"),
        tasks=_CLASSES,
        min_classes=4,
        needs_pyautoattack=True,
    ),
    "auto_attack": _Definition(
        run=lambda call: auto_attack(call.logits, call.images, call.labels, eps=call.eps, seed=call.batch_seed),
        tasks=_CLASSES,
        min_classes=4,
        needs_pyautoattack=True,
    ),
    "square": _Definition(
        run=lambda call: call.maximize(square_attack, call.score), parameters=("num_queries",), gradient_free=True
    ),
    "uniform_noise": _Definition(
        run=lambda call: _noise(call, "uniform"), parameters=("num_draws",), gradient_free=True
    ),
    "corner_noise": _Definition(
        run=lambda call: _noise(call, "corners"), parameters=("num_draws",), gradient_free=True
    ),
    "paper": _Definition(
        run=lambda call: _paper(call, with_labels=False), parameters=("num_steps",), needs_features=True
    ),
    "paper_cross_entropy": _Definition(
        run=lambda call: _paper(call, with_labels=True), parameters=("num_steps",), tasks=_CLASSES
    ),
}


def find_definition(name: str) -> _Definition:
    """Returns the definition of an attack such as `"square"` or `"feature_cosine:defended"`.

    `ValueError` if the name is unknown, or the attack has no target and the name gives one.
    """
    name, _, target = name.partition(":")
    if name not in ATTACKS:
        raise ValueError(f"attack {name!r} is unknown, expected one of {', '.join(sorted(ATTACKS))}")
    if target and "target" not in ATTACKS[name].parameters:
        raise ValueError(f"attack {name!r} has no target, got {target!r}")
    return ATTACKS[name]
