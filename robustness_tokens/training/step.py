"""One optimiser step: attack the images, compare features, sum the gradient of the tokens.

Shapes: B images of a batch, N sequence, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import Tensor

from ..attacks import cosine_similarity, example_generators, paper_attack, pgd_attack
from ..data import Normalizer
from ..models import (
    MixedPrecision,
    RobustnessTokenPreTrainedModel,
    computing_faster,
    count_patches,
    run_compiled,
    runs_in_half,
)
from .arguments import RobustnessTokenTrainingArguments
from .losses import AgreementOptions, agreement, agreement_loss


_METRICS = ("loss", "invariance_cosine", "adversarial_cosine", "baseline_cosine")


class _NotFiniteError(Exception):
    """Features became infinite or NaN in the middle of an attack."""


def check_trainable(model: RobustnessTokenPreTrainedModel) -> None:
    """Raises `ValueError` unless the tokens are on, float32, and the only trainable parameters."""
    tokens = model.robustness_tokens
    if not model.injector.enabled:
        raise ValueError("the tokens are off: call train() outside of disable_adapter()")
    if tokens.dtype != torch.float32:
        raise ValueError(
            f"the tokens are {tokens.dtype}, expected torch.float32, which they are trained in whatever the base is: "
            "call model.injector.float() before train()"
        )
    advice = "call model.requires_grad_(False), then model.robustness_tokens.requires_grad_(True)"
    if not tokens.requires_grad:
        raise ValueError(f"the tokens are frozen (requires_grad is False): {advice}")
    if others := [name for name, value in model.named_parameters() if value.requires_grad and value is not tokens]:
        raise ValueError(
            f"{len(others)} parameters of the base are trainable ({others[0]}, ...), expected the tokens alone: "
            f"{advice}"
        )


def compute_features(
    model: RobustnessTokenPreTrainedModel, pixel_values: Tensor, *, mixed_precision: MixedPrecision = "no"
) -> Tensor:
    """Returns the features that the tokens are trained on, as float32; `"bf16"` uses autocast where the device has
    it.
    """
    half_precision = runs_in_half(mixed_precision, device=pixel_values.device)
    with torch.autocast(pixel_values.device.type, dtype=torch.bfloat16, enabled=half_precision):
        return model.get_features(pixel_values).float()


@torch.no_grad()
def base_features(
    model: RobustnessTokenPreTrainedModel, pixel_values: Tensor, *, mixed_precision: MixedPrecision = "no"
) -> Tensor:
    """Returns f(x), the features without tokens and without a gradient."""
    with model.disable_adapter():
        return compute_features(model, pixel_values, mixed_precision=mixed_precision)


def attack_for_training(
    model: RobustnessTokenPreTrainedModel,
    images: Tensor,
    target: Tensor,
    *,
    args: RobustnessTokenTrainingArguments,
    normalizer: Normalizer,
    step: int,
    index: Tensor,
    through_tokens: bool,
) -> Tensor:
    """Attacks images as the arguments say; the noise depends on (seed, step, index) alone.

    The attack pushes away from `target`, the features without tokens, except that `"paper"` through the tokens pushes
    away
    from the clean features with tokens. The model is not changed.

    Returns:
        (B, 3, H, W) normalised pixel values. All NaN if features were not finite: the reduced loss is then NaN on
        every
        process, and all stop at the same step.

    Raises:
        ValueError: If the images are not in [0, 1].
    """

    def features(pixel_values: Tensor) -> Tensor:
        output = compute_features(model, pixel_values, mixed_precision=args.mixed_precision)
        if not output.isfinite().all():
            raise _NotFiniteError
        return output

    def attack() -> Tensor:
        generators = example_generators(args.seed, step, index)
        if args.attack == "paper":
            assert args.step_size is not None, "the arguments set it for the paper's attack"
            return paper_attack(
                features,
                normalizer(images),
                image_mean=normalizer.image_mean.flatten().tolist(),
                image_std=normalizer.image_std.flatten().tolist(),
                target=None if through_tokens else target,
                step_size=args.step_size,
                num_steps=args.num_attack_steps,
                generator=generators,
            )
        assert args.eps is not None, "the arguments set it for pgd"
        attacked = pgd_attack(
            lambda x: -agreement(features(normalizer(x)), target, **agreement_of(model, args, images)),
            images,
            eps=args.eps,
            step_size=args.step_size,
            num_steps=args.num_attack_steps,
            generator=generators,
        )
        return normalizer(attacked)

    base = model.get_base_model()
    try:
        with nullcontext() if through_tokens else model.disable_adapter(), faster_base(model, args, images.device):
            return run_compiled(base, attack) if args.torch_compile else attack()
    except _NotFiniteError:
        return torch.full_like(images, torch.nan)


def attacked_pixel_values(
    model: RobustnessTokenPreTrainedModel,
    batch: Mapping[str, Tensor],
    target: Tensor,
    *,
    args: RobustnessTokenTrainingArguments,
    normalizer: Normalizer,
    step: int,
    through_tokens: bool,
) -> Tensor:
    """Returns the stored adversarial images of a batch, normalised, or attacks the images if it holds none."""
    if "adversarial_images" in batch:
        return normalizer(batch["adversarial_images"].to(target.device))
    return attack_for_training(
        model,
        batch["images"].to(target.device),
        target,
        args=args,
        normalizer=normalizer,
        step=step,
        index=batch["index"],
        through_tokens=through_tokens,
    )


def mean_cosine(model: RobustnessTokenPreTrainedModel, features: Tensor, target: Tensor) -> Tensor:
    """Returns the mean cosine of a batch along the model's axis, scalar."""
    return cosine_similarity(features, target, similarity_axis=model.config.similarity_axis).mean()


def agreement_of(
    model: RobustnessTokenPreTrainedModel, args: RobustnessTokenTrainingArguments, pixel_values: Tensor
) -> AgreementOptions:
    """Returns the options by which a training compares the features of these images."""
    return {
        "similarity_axis": model.config.similarity_axis,
        "head_distance_weight": args.head_distance_weight,
        # Only the head's distance asks where the patches are, and not every base can tell.
        "num_patches": count_patches(model.get_base_model(), pixel_values) if args.head_distance_weight > 0 else 0,
    }


def faster_base(
    model: RobustnessTokenPreTrainedModel, args: RobustnessTokenTrainingArguments, device: torch.device
) -> AbstractContextManager[None]:
    """Returns a context in which the base computes as `args.train_attn_implementation` and `args.onednn` say."""
    return computing_faster(
        model.get_base_model(),
        device=device,
        half_precision=runs_in_half(args.mixed_precision, device=device),
        attn_implementation=args.train_attn_implementation,
        onednn=args.onednn,
    )


def accumulate_gradient(
    model: RobustnessTokenPreTrainedModel,
    features: Callable[[Tensor], Tensor],
    batches: Sequence[Mapping[str, Tensor]],
    *,
    args: RobustnessTokenTrainingArguments,
    accelerator: Accelerator,
    normalizer: Normalizer,
    step: int,
) -> dict[str, float]:
    """Adds the gradient of the mean loss, over the images of all batches and processes, to the tokens' `.grad`.

    Args:
        model: Attacked, and gives the targets.
        features: The same model, wrapped by `accelerator.prepare`: (B, 3, H, W) pixel values -> features.
        batches: Batches of this process, each `{"images": (B, 3, H, W) float in [0, 1], "index": (B,) int64}`.
            Adversarial pairs also hold `"adversarial_images"`, and `"baseline_cosine"` (B,) if it is known.
        args: Arguments of the training.
        accelerator: Accelerator of the training.
        normalizer: [0, 1] images -> pixel values.
        step: Optimiser step.

    Returns:
        `loss` and the three cosines, each a mean over the same images.

    Raises:
        FloatingPointError: If the loss or its gradient is not finite, on every process.
    """
    tokens, device, precision = model.robustness_tokens, accelerator.device, args.mixed_precision
    num_images = torch.tensor(float(sum(len(batch["images"]) for batch in batches)), device=device)
    num_images = accelerator.reduce(num_images, reduction="mean")
    totals = {name: torch.zeros((), device=device) for name in _METRICS}

    def add_gradient(pixel_values: Tensor, target: Tensor, *, weight: Tensor, is_last: bool) -> Tensor:
        """Returns the mean cosine."""
        with nullcontext() if is_last else accelerator.no_sync(features):
            options = agreement_of(model, args, pixel_values)
            loss, cosine = agreement_loss(features(pixel_values), target, weight=weight, **options)
            loss.backward()  # accelerator.backward divides by an accumulation that its launcher was told of
        totals["loss"] += loss.detach()
        return cosine

    with faster_base(model, args, device):
        for batch in batches:
            images, share = batch["images"].to(device), len(batch["images"]) / num_images
            pixel_values = normalizer(images)
            target = base_features(model, pixel_values, mixed_precision=precision)
            # Clean and attacked images apart, since together they would take twice the memory.
            invariance = add_gradient(pixel_values, target, weight=args.invariance_weight * share, is_last=False)
            totals["invariance_cosine"] += share * invariance
            share = share / len(args.attack_routes)
            for through_tokens in args.attack_routes:
                attacked = attacked_pixel_values(
                    model, batch, target, args=args, normalizer=normalizer, step=step, through_tokens=through_tokens
                )
                adversarial = add_gradient(
                    attacked,
                    target,
                    weight=args.adversarial_weight * share,
                    is_last=batch is batches[-1] and through_tokens == args.attack_routes[-1],
                )
                baseline = (
                    batch["baseline_cosine"].to(device).mean()
                    if "baseline_cosine" in batch
                    else mean_cosine(model, base_features(model, attacked, mixed_precision=precision), target)
                )
                totals["adversarial_cosine"] += share * adversarial
                totals["baseline_cosine"] += share * baseline
    means = accelerator.reduce(torch.stack(list(totals.values())), reduction="mean")
    if not (means.isfinite().all() and tokens.grad is not None and tokens.grad.isfinite().all()):
        raise FloatingPointError(f"the loss ({means[0].item():g}) or its gradient is not finite")
    return dict(zip(_METRICS, means.tolist(), strict=True))


class LastGoodTokens:
    """Keeps a copy of the tokens with the last finite loss."""

    def __init__(self, model: RobustnessTokenPreTrainedModel) -> None:
        self._model = model
        self._kept: tuple[Tensor, int] | None = None

    def keep(self, step: int) -> None:
        """Copies the tokens after so many steps."""
        self._kept = (self._model.robustness_tokens.detach().clone(), step)

    @torch.no_grad()
    def are_broken(self, pixel_values: Tensor, *, mixed_precision: MixedPrecision, accelerator: Accelerator) -> bool:
        """Tells, the same on every process, whether the tokens make non-finite features where the base alone does
        not.
        """
        broken = not _are_finite(compute_features(self._model, pixel_values, mixed_precision=mixed_precision))
        if broken:
            broken = _are_finite(base_features(self._model, pixel_values, mixed_precision=mixed_precision))
        return bool(accelerator.reduce(torch.tensor(float(broken), device=pixel_values.device)) > 0)

    @torch.no_grad()
    def go_back(
        self, pixel_values: Tensor, *, step: int, mixed_precision: MixedPrecision, accelerator: Accelerator
    ) -> int | None:
        """Restores the kept tokens if the current ones are broken.

        Returns:
            The step of the tokens that the model holds now; None if they are broken and none were kept.
        """
        tokens = self._model.robustness_tokens
        broken = self.are_broken(pixel_values, mixed_precision=mixed_precision, accelerator=accelerator)
        if not broken and tokens.isfinite().all():
            return step
        if self._kept is None:
            return None
        kept, step_of_kept = self._kept
        tokens.copy_(kept)
        return step_of_kept


def _are_finite(values: Tensor) -> bool:
    return bool(values.isfinite().all())
