"""The named attacks, as calls of [`~robustness_tokens.attacks`] on the model that the attacker holds.

Shapes: B images.
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
    PAPER_NUM_STEPS,
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
from ..report import Task
from .threat_models import AttackerView


ObjectiveFn: TypeAlias = Callable[[Tensor], Tensor]

_MISCLASSIFIED = 1000.0  # more than any cross-entropy


@dataclass(frozen=True, kw_only=True)
class AttackBatch:
    """A batch of images and what is known about them.

    Attributes:
        images: (B, 3, H, W) float in [0, 1].
        labels: (B,) classes, or (B, H, W), or `None` where only features are evaluated.
        index: (B,) int64, the images' rows in the dataset, on which their noise depends.
        ignore_index: Label of pixels that do not count.
        base_features: The base's clean features, float32, if they are kept.
    """

    images: Tensor
    labels: Tensor | None
    index: Tensor
    ignore_index: int = 255
    base_features: Tensor | None = None

    def first(self, count: int) -> AttackBatch:
        """Returns the first images of the batch."""
        return self if count >= len(self.images) else self.select(slice(count))

    def select(self, rows: Tensor | slice) -> AttackBatch:
        """Returns some images of the batch; (R,) int64 rows on the CPU index tensors of any device."""
        parts: dict[str, Any] = {
            field.name: value[rows]
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **parts)


@dataclass(frozen=True, kw_only=True)
class AttackCall:
    """An attack on a batch, with the objectives that the attacker maximises.

    Attributes:
        attack: The attack and its hyper-parameters.
        view: The model that the attacker holds.
        batch: The images to attack.
        eps: Radius in pixel units.
        seed: Seed of the evaluation.
    """

    attack: Attack
    view: AttackerView
    batch: AttackBatch
    eps: float
    seed: int

    @property
    def stream(self) -> int:
        """Noise stream of this view and attack, so that attacks start at different points."""
        return zlib.crc32(f"{self.view.name}/{self.attack.name}/{self.attack.target}".encode())

    @property
    def images(self) -> Tensor:
        return self.batch.images

    @property
    def labels(self) -> Tensor:
        if self.batch.labels is None:
            raise ValueError(f"attack {self.attack.name!r} needs labels, which the dataset doesn't have")
        return self.batch.labels

    @property
    def generators(self) -> list[torch.Generator]:
        return example_generators(self.seed, self.stream, self.batch.index)

    @property
    def batch_seed(self) -> int:
        """Seed for attacks that draw noise for a whole batch."""
        return self.generators[0].initial_seed() % 2**31

    def mean(self, objective_of: Callable[[Tensor | None], ObjectiveFn]) -> ObjectiveFn:
        """Returns the objective averaged over the attacker's sets of tokens."""
        objectives = [objective_of(tokens) for tokens in self.view.tokens]
        if len(objectives) == 1:
            return objectives[0]
        return lambda images: torch.stack([objective(images) for objective in objectives]).mean(dim=0)  # (B,)

    def features_fn(self, tokens: Tensor | None) -> Callable[[Tensor], Tensor]:
        return lambda images: self.view.model.features(images, tokens)

    @torch.no_grad()
    def target_features(self, tokens: Tensor | None) -> Tensor:
        if self.attack.target != "base":
            return self.view.model.features(self.images, tokens)
        if self.batch.base_features is not None and not self.view.is_surrogate:
            return self.batch.base_features
        return self.view.model.features(self.images, None)

    def feature_objective(self, kind: Literal["cosine", "mse"]) -> ObjectiveFn:
        def objective_of(tokens: Tensor | None) -> ObjectiveFn:
            target = self.target_features(tokens)
            if kind == "mse":
                return feature_mse_objective(self.features_fn(tokens), target)
            axis = self.view.model.similarity_axis
            return feature_cosine_objective(self.features_fn(tokens), target, similarity_axis=axis)

        return self.mean(objective_of)

    def label_objective(self, kind: Literal["cross_entropy", "margin"]) -> ObjectiveFn:
        model, labels = self.view.model, self.labels

        def objective_of(tokens: Tensor | None) -> ObjectiveFn:
            if model.task == "segmentation":
                size, ignore_index = labels.shape[1:], self.batch.ignore_index
                return pixel_cross_entropy_objective(
                    lambda images: model.pixel_logits(images, tokens, size), labels, ignore_index=ignore_index
                )

            def logits_fn(images: Tensor) -> Tensor:
                return model.logits(images, tokens)

            if kind == "margin":
                return margin_objective(logits_fn, labels)
            # Made for another model, an image of larger loss carries over better than one that is just misclassified.
            bonus = _MISCLASSIFIED if self.view.is_defended_model else 0.0
            return cross_entropy_objective(logits_fn, labels, misclassified_bonus=bonus)

        return self.mean(objective_of)

    def score(self) -> ObjectiveFn:
        """Returns the objective of an attacker who sees only answers: on the task's own output."""
        if self.view.model.task == "features":
            return self.feature_objective("cosine")
        return self.label_objective("margin")

    def logits(self, images: Tensor) -> Tensor:
        """Returns (B, C) logits, averaged over the attacker's sets of tokens."""
        return torch.stack([self.view.model.logits(images, tokens) for tokens in self.view.tokens]).mean(dim=0)

    def pgd(self, objective: ObjectiveFn) -> Tensor:
        return self._pgd()(objective, self.images, generator=self.generators)

    def label_pgd(self, kind: Literal["cross_entropy", "margin"]) -> Tensor:
        threshold = 0.0 if kind == "margin" else _MISCLASSIFIED / 2
        return self.until_wrong(self._pgd(), self.label_objective(kind), threshold)

    def _pgd(self) -> Callable[..., Tensor]:
        attack = self.attack
        assert attack.num_steps is not None
        assert attack.num_restarts is not None
        return functools.partial(
            pgd_attack,
            eps=self.eps,
            step_size=attack.step_size,
            num_steps=attack.num_steps,
            num_restarts=attack.num_restarts,
        )

    def until_wrong(self, attack: Callable[..., Tensor], objective: ObjectiveFn, threshold: float) -> Tensor:
        """Attacks the batch; on the measured model, each image until it is misclassified (above threshold).

        Images that ended in the attack's precision but are still correct in float32 are attacked to the end.
        """
        view = self.view
        if view.model.task != "classification" or not view.is_defended_model:
            return attack(objective, self.images, generator=self.generators)
        assert isinstance(objective, Objective)  # of one set of tokens
        done = torch.zeros(len(self.images), dtype=torch.bool, device=self.images.device)
        function, of_images = objective.function, objective.of_images

        def watched(images: Tensor, rows: Tensor, *of_rows: Tensor) -> Tensor:
            values: Tensor = function(images, *of_rows)
            done[rows] |= values.detach() > threshold
            return values

        numbers = torch.arange(len(self.images), device=self.images.device)
        adversarial = attack(
            Objective(watched, numbers, *of_images),
            self.images,
            stop_above=threshold,
            generator=self.generators,
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


@dataclass(frozen=True, kw_only=True)
class Attack:
    """An attack and its hyper-parameters; parameters that the attack does not take stay `None`.

    Args:
        name: One of `feature_cosine`, `feature_mse`, `cross_entropy`, `margin`, `single_step`, `apgd_cross_entropy`,
            `apgd_targeted_dlr`, `auto_attack`, `square`, `uniform_noise`, `corner_noise`, `paper`,
            `paper_cross_entropy`.
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
        if self.name not in ATTACKS:
            raise ValueError(f"attack {self.name!r} is unknown, expected one of {', '.join(sorted(ATTACKS))}")
        known, given = set(ATTACKS[self.name].parameters), set(self.parameters())
        if wrong := sorted((given - known) | (known - given - {"step_size"})):
            raise ValueError(f"attack {self.name!r} takes {sorted(known)}, got {sorted(given)}: correct {wrong}")

    def parameters(self) -> dict[str, Any]:
        """Returns the hyper-parameters that are set, by name, as JSON values."""
        values = {key: value for key, value in dataclasses.asdict(self).items() if key != "name"}
        return {key: value for key, value in values.items() if value is not None}

    def reported_parameters(self, eps: float) -> dict[str, Any]:
        """Returns what a reader needs to run it again, including what eps determines or never changes."""
        values = self.parameters()
        if self.name.startswith("paper"):
            values |= {"eps_normalized": PAPER_EPS_NORMALIZED, "step_size_normalized": PAPER_STEP_SIZE_NORMALIZED}
        elif self.name == "single_step":
            values |= {"step_size": eps}
        elif "step_size" in ATTACKS[self.name].parameters:
            assert self.num_steps is not None
            values = {"step_size": pgd_step_size(eps, self.num_steps), **values}
        return values


def run_attack(attack: Attack, view: AttackerView, batch: AttackBatch, *, eps: float, seed: int) -> Tensor:
    """Attacks a batch through the attacker's model and returns (B, 3, H, W) adversarial images in [0, 1].

    `eps` is in pixel units; the paper's attack has its own. The noise depends on the seed, the attack, the view and
    each image's index. `ValueError` if the attack does not fit the view or the task.
    """
    definition = ATTACKS[attack.name]
    if not view.differentiable and not definition.gradient_free:
        raise ValueError(f"attack {attack.name!r} needs gradients, which an attacker of view {view.name!r} has not")
    if view.model.task not in definition.tasks:
        raise ValueError(f"attack {attack.name!r} is for {definition.tasks}, the task is {view.model.task!r}")
    with view.model.attacked_faster():
        return definition.run(AttackCall(attack=attack, view=view, batch=batch, eps=eps, seed=seed))


def on_8bit_grid(images: Tensor) -> bool:
    """Tells whether all values of [0, 1] images are n/255, except for rounding."""
    levels = 255 * images.double()
    return bool((levels - levels.round()).abs().max() < 1e-4)


def _single_step(call: AttackCall) -> Tensor:
    features = call.view.model.task == "features"
    objective = call.feature_objective("cosine") if features else call.label_objective("cross_entropy")
    # From a random start, since a feature objective has no gradient at the clean image.
    return pgd_attack(
        objective, call.images, eps=call.eps, step_size=call.eps or None, num_steps=1, generator=call.generators
    )


def _square(call: AttackCall) -> Tensor:
    assert call.attack.num_queries is not None
    attack = functools.partial(square_attack, eps=call.eps, num_queries=call.attack.num_queries)
    return call.until_wrong(attack, call.score(), threshold=0.0)


def _noise(kind: Literal["uniform", "corners"]) -> Callable[[AttackCall], Tensor]:
    def run(call: AttackCall) -> Tensor:
        assert call.attack.num_draws is not None
        return noise_attack(
            call.score(),
            call.images,
            kind=kind,
            eps=call.eps,
            num_draws=call.attack.num_draws,
            generator=call.generators,
        )

    return run


def _apgd(loss: Literal["cross_entropy", "targeted_dlr"]) -> Callable[[AttackCall], Tensor]:
    def run(call: AttackCall) -> Tensor:
        attack = call.attack
        assert attack.num_steps is not None
        return apgd_attack(
            call.logits,
            call.images,
            call.labels,
            loss=loss,
            eps=call.eps,
            num_steps=attack.num_steps,
            num_restarts=attack.num_restarts or 1,
            num_target_classes=attack.num_target_classes or 1,
            highest_loss=loss == "cross_entropy" and call.view.knowledge != "full",  # made for another model
            seed=call.batch_seed,
        )

    return run


def _paper(with_labels: bool) -> Callable[[AttackCall], Tensor]:
    def run(call: AttackCall) -> Tensor:
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
            eps=PAPER_EPS_NORMALIZED,
            step_size=PAPER_STEP_SIZE_NORMALIZED,
            num_steps=call.attack.num_steps or PAPER_NUM_STEPS,
            generator=call.generators,
        )
        # It ends on the 8-bit grid, which normalising and back leaves by a few roundings.
        return (normalizer.inverse(pixel_values) * 255).round().clamp(0, 255) / 255

    return run


@dataclass(frozen=True, kw_only=True)
class _Definition:
    run: Callable[[AttackCall], Tensor]
    parameters: tuple[str, ...]
    tasks: tuple[Task, ...] = ("features", "classification", "segmentation")
    gradient_free: bool = False
    needs_features: bool = False


_PGD = ("num_steps", "num_restarts", "step_size")
_WITH_LABELS: tuple[Task, ...] = ("classification", "segmentation")
_CLASSES: tuple[Task, ...] = ("classification",)

ATTACKS: Mapping[str, _Definition] = {
    "feature_cosine": _Definition(
        run=lambda call: call.pgd(call.feature_objective("cosine")), parameters=("target", *_PGD), needs_features=True
    ),
    "feature_mse": _Definition(
        run=lambda call: call.pgd(call.feature_objective("mse")), parameters=("target", *_PGD), needs_features=True
    ),
    "cross_entropy": _Definition(
        run=lambda call: call.label_pgd("cross_entropy"), parameters=_PGD, tasks=_WITH_LABELS
    ),
    "margin": _Definition(run=lambda call: call.label_pgd("margin"), parameters=_PGD, tasks=_CLASSES),
    "single_step": _Definition(run=_single_step, parameters=()),
    "apgd_cross_entropy": _Definition(
        run=_apgd("cross_entropy"), parameters=("num_steps", "num_restarts"), tasks=_CLASSES
    ),
    "apgd_targeted_dlr": _Definition(
        run=_apgd("targeted_dlr"), parameters=("num_steps", "num_restarts", "num_target_classes"), tasks=_CLASSES
    ),
    "auto_attack": _Definition(
        run=lambda call: auto_attack(call.logits, call.images, call.labels, eps=call.eps, seed=call.batch_seed),
        parameters=(),
        tasks=_CLASSES,
    ),
    "square": _Definition(run=_square, parameters=("num_queries",), gradient_free=True),
    "uniform_noise": _Definition(run=_noise("uniform"), parameters=("num_draws",), gradient_free=True),
    "corner_noise": _Definition(run=_noise("corners"), parameters=("num_draws",), gradient_free=True),
    "paper": _Definition(run=_paper(with_labels=False), parameters=("num_steps",), needs_features=True),
    "paper_cross_entropy": _Definition(
        run=_paper(with_labels=True), parameters=("num_steps",), tasks=("classification",)
    ),
}
