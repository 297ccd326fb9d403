"""One optimiser step: attack the images, compare outputs, sum the gradient of the tokens.

Shapes: B images of a batch, N sequence, D width.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from ..attacks import cosine_similarity, example_generators, paper_attack, pgd_attack
from ..data import Normalizer
from ..models import (
    ProbeHead,
    RobustnessTokenForImageClassification,
    RobustnessTokenPreTrainedModel,
    check_head,
    computing_faster,
    count_patches,
    head_digest,
    run_compiled,
    runs_in_half,
)
from .arguments import RobustnessTokenTrainingArguments
from .losses import LOGITS_OBJECTIVES, METRICS, ObjectiveOptions, objective_values, weighted_loss


class _NotFiniteError(Exception):
    """Features became infinite or NaN in the middle of an attack."""


def check_trainable(model: RobustnessTokenPreTrainedModel) -> None:
    """Raises `ValueError` unless tokens, gains and shifts are on, float32, and the only trainable parameters."""
    if not model.injector.enabled:
        raise ValueError("the tokens are off: call train() outside of disable_adapter()")
    advice = "call model.requires_grad_(False), then model.injector.requires_grad_(True)"
    for tensor in model.injector.parameters():
        if tensor.dtype != torch.float32:
            raise ValueError(
                f"the tokens are {tensor.dtype}, and they, gains and shifts must be torch.float32 for any base: "
                "call model.injector.float() before train()"
            )
        if not tensor.requires_grad:
            raise ValueError(f"the tokens are frozen (requires_grad is False): {advice}")
    own = {id(tensor) for tensor in model.injector.parameters()}
    if others := [name for name, value in model.named_parameters() if value.requires_grad and id(value) not in own]:
        raise ValueError(
            f"{len(others)} parameters of the base are trainable ({others[0]}, ...), expected the tokens alone: "
            f"{advice}"
        )


def head_settings(
    args: RobustnessTokenTrainingArguments, base: PreTrainedModel, head: ProbeHead | None
) -> dict[str, Any]:
    """Returns what a recipe says of the head that the objective reads, None for the base's own: its digest, and whose.

    Nothing for an objective that compares features.
    """
    if args.objective not in LOGITS_OBJECTIVES:
        return {}
    return {"head": head_digest(base, head), "head_of_base": head is None}


@dataclass(frozen=True, eq=False)
class TrainingStep:
    """Computes the outputs, attacks and losses of a training.

    `normalizer` maps images to pixel values. `head` maps features to logits, for an objective of logits; None for the
    base's own head. `ValueError` if the objective needs a head and has none, or is given one that it does not read.
    """

    model: RobustnessTokenPreTrainedModel
    args: RobustnessTokenTrainingArguments
    normalizer: Normalizer
    head: ProbeHead | None = None

    def __post_init__(self) -> None:
        objective = self.args.objective
        if self.head is not None:
            check_head(self.head, self.model.get_base_model())
            if objective == "cross_entropy" and self.head.task != "classification":
                raise ValueError(f"objective='cross_entropy' needs a head for classification, got {self.head.task}")
        if not self.reads_logits and self.head is not None:
            raise ValueError(f"objective={objective!r} compares features and reads no head: leave head out")
        if (
            self.reads_logits
            and self.head is None
            and not isinstance(self.model, RobustnessTokenForImageClassification)
        ):
            raise ValueError(
                f"objective={objective!r} compares predictions, but {type(self.model).__name__} has no head: load the "
                "base as RobustnessTokenForImageClassification, or give head= (a probe head, or ZeroShotHead)"
            )

    @property
    def reads_logits(self) -> bool:
        """Tells whether the objective compares logits; otherwise it compares features."""
        return self.args.objective in LOGITS_OBJECTIVES

    @functools.cached_property
    def head_settings(self) -> dict[str, Any]:
        """What a recipe says of the head, see [`head_settings`]; the head is frozen."""
        return head_settings(self.args, self.model.get_base_model(), self.head)

    def labels_of(self, batch: Mapping[str, Tensor], target: Tensor) -> Tensor | None:
        """Returns the labels of a batch for the objective "cross_entropy", checked; None for the others."""
        if self.args.objective != "cross_entropy":
            return None
        labels, classes = batch.get("labels"), target.shape[-1]
        if labels is None:
            raise ValueError('objective="cross_entropy" needs images with labels, got none')
        if not 0 <= labels.min() <= labels.max() < classes:
            raise ValueError(
                f"labels go from {labels.min()} to {labels.max()}, expected classes of the head, 0 to {classes - 1}"
            )
        return labels.to(target.device)

    def outputs(self, pixel_values: Tensor) -> Tensor:
        """Returns the features or logits that the objective compares, float32; in bf16 if asked for and available."""
        half_precision = runs_in_half(self.args.mixed_precision, device=pixel_values.device)
        with torch.autocast(pixel_values.device.type, dtype=torch.bfloat16, enabled=half_precision):
            if not self.reads_logits:
                return self.model.get_features(pixel_values).float()
            if self.head is None:
                logits: Tensor = self.model(pixel_values=pixel_values).logits
            else:
                logits = self.head(self.head.extract(self.model.get_base_model(), pixel_values))
            logits = logits.float()
        return logits.flatten(2).transpose(1, 2) if logits.dim() == 4 else logits  # (B, C, h, w) -> (B, P, C)

    @torch.no_grad()
    def base_outputs(self, pixel_values: Tensor) -> Tensor:
        """Returns the outputs without tokens and without a gradient."""
        with self.model.disable_adapter():
            return self.outputs(pixel_values)

    def cosine(self, outputs: Tensor, target: Tensor) -> Tensor:
        """Returns the mean cosine of a batch along the model's axis, scalar."""
        return cosine_similarity(outputs, target, similarity_axis=self.model.config.similarity_axis).mean()

    def objective_options(self, pixel_values: Tensor, labels: Tensor | None = None) -> ObjectiveOptions:
        """Returns the options of [`objective_values`] for the outputs of these images."""
        objective = self.args.objective
        return {
            "objective": objective,
            "similarity_axis": self.model.config.similarity_axis,
            # Only the head distance needs the patches, and not every base can tell their number.
            "num_patches": (
                count_patches(self.model.get_base_model(), pixel_values) if objective == "head_distance" else 0
            ),
            "labels": labels,
        }

    def computing_faster(self) -> AbstractContextManager[None]:
        """Returns a context in which the base computes as `train_attn_implementation` and `onednn` say."""
        device = self.normalizer.image_mean.device
        return computing_faster(
            self.model.get_base_model(),
            device=device,
            half_precision=runs_in_half(self.args.mixed_precision, device=device),
            attn_implementation=self.args.train_attn_implementation,
            onednn=self.args.onednn,
        )

    def attack(
        self,
        images: Tensor,
        target: Tensor,
        *,
        step: int,
        index: Tensor,
        through_tokens: bool,
        labels: Tensor | None = None,
        eps_share: float = 1.0,
    ) -> Tensor:
        """Attacks [0, 1] images; returns normalised pixel values. The noise depends on (seed, step, index) alone.

        `"pgd"` raises the objective: it pushes away from `target`, the outputs without tokens, or from the labels.
        `"paper"` pushes away from `target`, or through the tokens from the clean features with tokens. The budget is
        `eps_share` of `eps`. If outputs are not finite, returns NaN: the reduced loss is then NaN on every process,
        and all stop at the same step.
        """
        args, normalizer, base = self.args, self.normalizer, self.model.get_base_model()

        def outputs(pixel_values: Tensor) -> Tensor:
            output = self.outputs(pixel_values)
            if not output.isfinite().all():
                raise _NotFiniteError
            return output

        def attack() -> Tensor:
            generators = example_generators(args.seed, step, index)
            if args.attack == "paper":
                assert args.step_size is not None, "the arguments set it for the paper's attack"
                return paper_attack(
                    outputs,
                    normalizer(images),
                    image_mean=normalizer.image_mean.flatten().tolist(),
                    image_std=normalizer.image_std.flatten().tolist(),
                    target=None if through_tokens else target,
                    step_size=args.step_size,
                    num_steps=args.num_attack_steps,
                    generator=generators,
                )
            assert args.eps is not None, "the arguments set it for pgd"
            options = self.objective_options(images, labels)
            attacked = pgd_attack(
                lambda x: objective_values(outputs(normalizer(x)), target, **options),
                images,
                eps=eps_share * args.eps,
                step_size=None if args.step_size is None else eps_share * args.step_size,
                num_steps=args.num_attack_steps,
                keep_best=False,  # the loss is computed on the attacked images anyway
                generator=generators,
            )
            return normalizer(attacked)

        try:
            with nullcontext() if through_tokens else self.model.disable_adapter(), self.computing_faster():
                return run_compiled(base, attack) if args.torch_compile else attack()
        except _NotFiniteError:
            return torch.full_like(images, torch.nan)

    def attacked(
        self,
        batch: Mapping[str, Tensor],
        target: Tensor,
        *,
        labels: Tensor | None,
        step: int,
        through_tokens: bool,
        eps_share: float = 1.0,
    ) -> Tensor:
        """Returns the stored adversarial images of a batch, normalised, or attacks the images if it holds none."""
        if "adversarial_images" in batch:
            return self.normalizer(batch["adversarial_images"].to(target.device))
        return self.attack(
            batch["images"].to(target.device),
            target,
            step=step,
            index=batch["index"],
            through_tokens=through_tokens,
            labels=labels,
            eps_share=eps_share,
        )

    def accumulate_gradient(
        self,
        outputs: Callable[[Tensor], Tensor],
        batches: Sequence[Mapping[str, Tensor]],
        *,
        accelerator: Accelerator,
        step: int,
    ) -> dict[str, float]:
        """Adds the gradient of the mean loss, over the images of all batches and processes, to the injector's `.grad`.

        `outputs` is the model wrapped by `accelerator.prepare`: (B, 3, H, W) pixel values -> outputs. A batch is
        `{"images": (B, 3, H, W) float in [0, 1], "index": (B,) int64}`, with `"labels"` (B,) int64 for the objective
        `"cross_entropy"`; adversarial pairs also hold `"adversarial_images"`, and `"baseline_cosine"` (B,) if it is
        known. Returns `loss` and the three cosines, each a mean over the same images. `FloatingPointError`, on every
        process, if the loss or its gradient is not finite.
        """
        args, device = self.args, accelerator.device
        num_images = torch.tensor(float(sum(len(batch["images"]) for batch in batches)), device=device)
        num_images = accelerator.reduce(num_images, reduction="mean")
        totals = {name: torch.zeros((), device=device) for name in METRICS}

        def add_gradient(
            pixel_values: Tensor, target: Tensor, labels: Tensor | None, *, weight: Tensor, is_last: bool
        ) -> Tensor:
            """Adds the gradient of a weighted loss to `.grad`; returns the mean cosine."""
            with nullcontext() if is_last else accelerator.no_sync(outputs):
                options = self.objective_options(pixel_values, labels)
                loss, cosine = weighted_loss(outputs(pixel_values), target, weight=weight, **options)
                loss.backward()  # accelerator.backward would divide by the launcher's accumulation steps
            totals["loss"] += loss.detach()
            return cosine

        with self.computing_faster():
            for batch in batches:
                images, share = batch["images"].to(device), len(batch["images"]) / num_images
                pixel_values = self.normalizer(images)
                target = self.base_outputs(pixel_values)
                labels = self.labels_of(batch, target)
                # Clean and attacked images separately: together they would take twice the memory.
                weight = args.invariance_weight * share
                invariance = add_gradient(pixel_values, target, labels, weight=weight, is_last=False)
                totals["invariance_cosine"] += share * invariance
                share_of_route = share / len(args.attack_routes)
                for through_tokens in args.attack_routes:
                    attacked = self.attacked(
                        batch,
                        target,
                        labels=labels,
                        step=step,
                        through_tokens=through_tokens,
                        eps_share=args.eps_share(step),
                    )
                    adversarial = add_gradient(
                        attacked,
                        target,
                        labels,
                        weight=args.adversarial_weight * share_of_route,
                        is_last=batch is batches[-1] and through_tokens == args.attack_routes[-1],
                    )
                    totals["adversarial_cosine"] += share_of_route * adversarial
                    if through_tokens:
                        continue
                    totals["baseline_cosine"] += share * (
                        batch["baseline_cosine"].to(device).mean()
                        if "baseline_cosine" in batch
                        else self.cosine(self.base_outputs(attacked), target)
                    )
        if all(args.attack_routes):
            totals["baseline_cosine"].fill_(torch.nan)
        means = accelerator.reduce(torch.stack(list(totals.values())), reduction="mean")
        gradients = [tensor.grad for tensor in self.model.injector.parameters()]
        compared = means[:-1]  # the baseline may be nan
        if not (compared.isfinite().all() and all(one is not None and one.isfinite().all() for one in gradients)):
            raise FloatingPointError(f"the loss ({means[0].item():g}) or its gradient is not finite")
        return dict(zip(METRICS, means.tolist(), strict=True))


class LastGoodTokens:
    """Keeps a copy of the tokens, gains and shifts with the last finite loss."""

    def __init__(self, training_step: TrainingStep) -> None:
        self._step = training_step
        self._state = training_step.model.injector.state
        self._kept: tuple[dict[str, Tensor], int] | None = None

    def keep(self, step: int) -> None:
        """Keeps a copy of the tokens, which are those after `step` steps."""
        self._kept = ({name: tensor.detach().clone() for name, tensor in self._state.items()}, step)

    @torch.no_grad()
    def are_broken(self, pixel_values: Tensor, accelerator: Accelerator) -> bool:
        """Tells, the same on every process, whether the tokens break features that are finite without them."""
        broken = not self._step.outputs(pixel_values).isfinite().all()
        if broken:
            broken = bool(self._step.base_outputs(pixel_values).isfinite().all())
        return bool(accelerator.reduce(torch.tensor(float(broken), device=pixel_values.device)) > 0)

    @torch.no_grad()
    def go_back(self, pixel_values: Tensor, accelerator: Accelerator, *, step: int) -> int | None:
        """Restores the kept tokens if those after `step` are broken.

        Returns the step of the tokens that the model holds now; None if they are broken and none were kept.
        """
        is_finite = all(tensor.isfinite().all() for tensor in self._state.values())
        if not self.are_broken(pixel_values, accelerator) and is_finite:
            return step
        if self._kept is None:
            return None
        kept, step_of_kept = self._kept
        for name, tensor in self._state.items():
            tensor.copy_(kept[name])
        return step_of_kept
