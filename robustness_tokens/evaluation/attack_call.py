"""What an attack of the suite maximises on a batch, by what the attacker holds.

Shapes: B images, C classes.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
from torch import Tensor

from ..attacks import (
    Objective,
    cross_entropy_objective,
    feature_cosine_objective,
    feature_mse_objective,
    margin_objective,
    pgd_attack,
    pixel_cross_entropy_objective,
)
from ..losses import example_generators
from .threat_models import AttackerView


if TYPE_CHECKING:
    from .attack_suite import Attack


ObjectiveFn: TypeAlias = Callable[[Tensor], Tensor]

_MISCLASSIFIED = 1000.0  # more than any cross-entropy


@dataclass(frozen=True, kw_only=True)
class AttackBatch:
    """A batch of images and what is known about them.

    Attributes:
        images: (B, 3, H, W) float in [0, 1].
        labels: (B,) classes, or (B, H, W), or `None` where only features are evaluated.
        index: (B,) int64, of the images in the dataset: an image's noise depends on it.
        ignore_index: Label of pixels that don't count.
        base_features: The base's clean features, float32, where they are kept.
    """

    images: Tensor
    labels: Tensor | None
    index: Tensor
    ignore_index: int = 255
    base_features: Tensor | None = None

    def first(self, count: int) -> AttackBatch:
        """The first images of the batch."""
        return self if count >= len(self.images) else self.select(slice(count))

    def select(self, rows: Tensor | slice) -> AttackBatch:
        """Some of the images of the batch; (R,) int64 rows on the CPU, which index tensors of any device."""
        parts: dict[str, Any] = {
            field.name: value[rows]
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **parts)


@dataclass(frozen=True, kw_only=True)
class AttackCall:
    """An attack on a batch, with what the attacker maximises.

    Attributes:
        attack: Which, and how hard.
        view: What the attacker holds.
        batch: To attack.
        eps: Radius in pixel units.
        seed: Of the evaluation.
    """

    attack: Attack
    view: AttackerView
    batch: AttackBatch
    eps: float
    seed: int

    @property
    def stream(self) -> int:
        """So that attacks don't start where others did."""
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
        """For what draws its noise for a whole batch."""
        return self.generators[0].initial_seed() % 2**31

    def mean(self, objective_of: Callable[[Tensor | None], ObjectiveFn]) -> ObjectiveFn:
        """The objective through each set of tokens that the attacker has, averaged."""
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
        """What an attacker who only sees answers goes by: of the task's own output."""
        if self.view.model.task == "features":
            return self.feature_objective("cosine")
        return self.label_objective("margin")

    def logits(self, images: Tensor) -> Tensor:
        """(B, C), averaged over the sets of tokens that the attacker has."""
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
        """Attacks the batch; of the model that is measured, each image until it is misclassified and no further.

        What ended by the attack's own precision, and float32 still classifies right, is attacked to the end.

        Args:
            attack: Such as [`~robustness_tokens.attacks.pgd_attack`].
            objective: Exceeds the threshold where an image is misclassified.
            threshold: Of the objective.
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
