"""Arguments of a training run, named as in transformers.TrainingArguments where it has them, and presets."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, get_args, get_type_hints

from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..attacks import DEFAULT_EPS, PAPER_NUM_STEPS, PAPER_STEP_SIZE_NORMALIZED, pgd_step_size
from ..data import ATTACK_ARGUMENTS, LabelMatching, ResizeMode
from ..models import AUTO, MixedPrecision
from ..utils import check_choice, check_fields, check_type, local_path
from .losses import LOGITS_OBJECTIVES, ObjectiveName


logger = logging.getLogger(__name__)

AttackName = Literal["paper", "pgd"]
AttackThrough = Literal["base", "tokens", "both"]

Tracker = Literal["trackio", "tensorboard", "wandb"]

# Schedules that need only the number of steps; those of the second group do not depend on max_steps.
_SCHEDULES_TO_MAX_STEPS = ("linear", "cosine", "cosine_with_restarts", "polynomial")
_ENDLESS_SCHEDULES = ("constant", "constant_with_warmup", "inverse_sqrt")
SPEEDUP_ARGUMENTS = ("torch_compile", "train_attn_implementation", "onednn")
"""Arguments that change the tokens only by rounding."""

_MAY_BE_ZERO = {"warmup_steps", "seed", "dataloader_num_workers", "max_broken_images"}  # other integers: from 1

# Adam's first step divides it by 1 - 0.9, and the quotient must fit into float32.
_LARGEST_LEARNING_RATE = 1e37

# The published code takes ImageNet's mean and std for OpenCLIP too, which was trained with others.
_COMMON: dict[str, Any] = {
    "num_robustness_tokens": 10,
    "initializer_range": 0.01,
    "similarity_axis": "token",
    "image_mean": list(IMAGENET_DEFAULT_MEAN),
    "image_std": list(IMAGENET_DEFAULT_STD),
    "image_size": 224,
    "resize": "squash",
    "per_device_train_batch_size": 8,
    "learning_rate": 1e-3,
    "attack": "paper",
    "num_attack_steps": PAPER_NUM_STEPS,
}

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "dinov2": MappingProxyType({**_COMMON, "max_steps": 50, "feature_view": "cls_and_patches"}),
        "deit3": MappingProxyType({**_COMMON, "max_steps": 300, "feature_view": "cls_and_patches"}),
        "openclip": MappingProxyType({**_COMMON, "max_steps": 300, "feature_view": "pooled"}),
        # eps is left to the user.
        "robust": MappingProxyType(
            {
                "num_robustness_tokens": 8,
                "token_depth": "all",
                "gains_and_shifts": ["norm", "linear", "bias", "patch_embedding"],
                "objective": "distillation",
                "attack": "pgd",
                "attack_through": "tokens",
                "num_attack_steps": 2,
                "eps_warmup_ratio": 0.25,
                "per_device_train_batch_size": 64,
                "max_steps": 2000,
                "learning_rate": 1e-2,
                "lr_scheduler_type": "cosine",
                "warmup_steps": 200,
                "max_grad_norm": 1.0,  # without it, a long training at this learning rate can collapse
                "mixed_precision": "bf16",
            }
        ),
    }
)

PAPER = "paper"

_PRESET_OF_MODEL_TYPE = {
    "dinov2": "dinov2",
    "dinov2_with_registers": "dinov2",
    "timm_wrapper": "deit3",  # the only family of the paper that timm provides
    "clip": "openclip",
    "clip_vision_model": "openclip",
}


@dataclass(kw_only=True)
class RobustnessTokenTrainingArguments:
    """Hyper-parameters of [`RobustnessTokenTrainer`]; the defaults are the paper's for DINOv2.

    The `help` in the metadata of a field gives its meaning and unit; `robtok train --help` prints it.

    Raises:
        ValueError: If a value is out of range or has no effect, such as `eps` with the paper's attack.
    """

    output_dir: str = field(metadata={"help": "Folder for the adapter, with subfolders for checkpoints and logs."})
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Replace the adapter and the checkpoints that output_dir holds."}
    )
    max_steps: int = field(
        default=50,
        metadata={"help": "Number of optimiser steps (paper: 50 for DINOv2, 300 for DeiT-III and OpenCLIP)."},
    )
    per_device_train_batch_size: int = field(default=8, metadata={"help": "Images per process in one forward pass."})
    gradient_accumulation_steps: int = field(
        default=1, metadata={"help": "Batches per process in one optimiser step."}
    )
    learning_rate: float = field(default=1e-3, metadata={"help": "Learning rate of Adam."})
    lr_scheduler_type: str = field(
        default="constant", metadata={"help": "Learning rate schedule, by its name in transformers."}
    )
    warmup_steps: int = field(default=0, metadata={"help": "Optimiser steps of linear warm-up of the learning rate."})
    max_grad_norm: float | None = field(
        default=None,
        metadata={"help": "Clip the gradient of the tokens to this L2 norm; by default it is not clipped."},
    )
    invariance_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on clean images."})
    adversarial_weight: float = field(default=1.0, metadata={"help": "Weight of the loss on attacked images."})
    objective: ObjectiveName = field(
        default=None,  # type: ignore[arg-type]
        metadata={
            "help": "Distance from the base's clean outputs that both losses lower and attack=pgd raises: cosine "
            "(minus the cosine of the features; paper, the default); head_distance, between inputs of a linear head; "
            "distillation, between predictions (no labels); cross_entropy, with labels. The last two need a head."
        },
    )

    # None: not stated by the user, so that stored pairs can decide; __post_init__ sets the default.
    attack: AttackName = field(
        default=None,  # type: ignore[arg-type]
        metadata={"help": "paper: the published attack (1.8/255 in pixels), the default; pgd: L-inf PGD within eps."},
    )
    attack_through: AttackThrough = field(
        default="base",
        metadata={
            "help": "Model to attack: base (paper), tokens (the base with its tokens), or both, one after the other."
        },
    )
    eps: float | None = field(
        default=None,
        metadata={"help": "Budget of pgd in pixel units of [0, 1] images; by default 4/255. Not for attack=paper."},
    )
    eps_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of max_steps in which eps grows from 0 to its full size (pgd)."}
    )
    step_size: float | None = field(
        default=None,
        metadata={
            "help": "Step size of the attack; by default 0.01 in normalised units (paper) or 2.5 eps / steps in "
            "pixels (pgd)."
        },
    )
    num_attack_steps: int = field(
        default=None,  # type: ignore[assignment]
        metadata={"help": "Gradient steps of the attack; by default 30."},
    )

    image_column_name: str | None = field(
        default=None, metadata={"help": "Column with the images; by default found by its type."}
    )
    label_column_name: str | None = field(
        default=None,
        metadata={
            "help": "Column with the labels, for objective=cross_entropy; by default the one of class labels, or "
            "label, labels or cls."
        },
    )
    label_matching: LabelMatching = field(
        default="name",
        metadata={
            "help": "How labels refer to the classes of the head: by name where both sides have names, or by index."
        },
    )
    image_size: int | None = field(
        default=None, metadata={"help": "Side of the images in pixels; by default that of the image processor."}
    )
    resize: ResizeMode = field(
        default="squash",
        metadata={"help": "squash: bilinear, without a crop (paper); processor: as the image processor does."},
    )
    shuffle_buffer_size: int = field(
        default=1000,
        metadata={"help": "Size, in images, of the buffer that shuffles a stream; shards are shuffled too."},
    )
    max_broken_images: int = field(
        default=10, metadata={"help": "Number of unreadable images that a process skips before it raises an error."}
    )
    dataloader_num_workers: int = field(
        default=0, metadata={"help": "Processes that decode images; 0 decodes in the training process."}
    )

    seed: int = field(
        default=0,
        metadata={"help": "Seed of the initial tokens, the order of the images and the noise of the attack."},
    )
    mixed_precision: MixedPrecision = field(
        default="no",
        metadata={
            "help": "Precision of the forward passes: no (that of the weights), or bf16 on devices that support it."
        },
    )
    torch_compile: bool = field(
        default=False,
        metadata={"help": "Compile the layers of the base for the attack; if that fails, the run continues without."},
    )
    train_attn_implementation: str = field(
        default=AUTO,
        metadata={
            "help": "Attention while training: eager, sdpa, ..., base (as loaded), or auto (eager for bf16 on a CPU)."
        },
    )
    onednn: bool = field(
        default=True,
        metadata={"help": "On a CPU, compute the linear layers of the base with oneDNN if that is faster."},
    )
    logging_steps: int = field(default=1, metadata={"help": "Optimiser steps between two rows of the log."})
    save_steps: int | None = field(
        default=None, metadata={"help": "Optimiser steps between two checkpoints; by default none is saved."}
    )
    save_total_limit: int | None = field(
        default=None, metadata={"help": "Number of newest checkpoints to keep; by default all."}
    )
    eval_steps: int | None = field(
        default=None,
        metadata={"help": "Optimiser steps between two measurements on eval_dataset; by default one at the end."},
    )
    per_device_eval_batch_size: int = field(
        default=8, metadata={"help": "Images per process in one forward pass on eval_dataset."}
    )
    report_to: str | list[str] = field(
        default_factory=list, metadata={"help": "Trackers: trackio, tensorboard, wandb; by default none."}
    )
    resume_from_checkpoint: str | bool | None = field(
        default=None,
        metadata={
            "help": "True to resume from the last checkpoint in output_dir, if any, or the folder of a checkpoint; by "
            "default False."
        },
    )
    ignore_images_mismatch: bool = field(
        default=False,
        metadata={
            "help": "Go on with images that can't be told to be those before, as after a folder of pictures was moved."
        },
    )
    disable_tqdm: bool = field(default=False, metadata={"help": "Show no progress bar."})

    def __post_init__(self) -> None:
        self.output_dir = local_path(self.output_dir)
        if isinstance(self.resume_from_checkpoint, str | os.PathLike):
            self.resume_from_checkpoint = local_path(self.resume_from_checkpoint)
        if (word := str(self.resume_from_checkpoint).lower()) in ("true", "false"):  # from the command line
            self.resume_from_checkpoint = True if word == "true" else None
        names = [self.report_to] if isinstance(self.report_to, str) else self.report_to
        self.report_to = [name for name in names if name != "none"]
        if unknown := sorted(set(self.report_to) - set(get_args(Tracker))):
            raise ValueError(f"report_to must be among {get_args(Tracker)}, or 'none', got {unknown}")
        self.stated_attack = {name: value for name in ATTACK_ARGUMENTS if (value := getattr(self, name)) is not None}
        self.attack = self.stated_attack.get("attack", "paper")
        self.num_attack_steps = self.stated_attack.get("num_attack_steps", PAPER_NUM_STEPS)
        self.objective = self.stated_attack.get("objective", "cosine")
        check_fields(self, from_zero=_MAY_BE_ZERO)
        check_choice("lr_scheduler_type", self.lr_scheduler_type, _ENDLESS_SCHEDULES + _SCHEDULES_TO_MAX_STEPS)
        if self.warmup_steps > 0 and self.lr_scheduler_type == "constant":
            raise ValueError(
                f'warmup_steps={self.warmup_steps} has no effect with lr_scheduler_type="constant": '
                'set lr_scheduler_type="constant_with_warmup", or leave it out'
            )
        if self.warmup_steps >= self.max_steps > 1:
            logger.warning(
                "warmup_steps=%d is no less than max_steps=%d, so the learning rate never reaches %g",
                self.warmup_steps,
                self.max_steps,
                self.learning_rate,
            )
        if self.resize == "processor" and self.image_size is not None:
            raise ValueError(
                f'image_size={self.image_size} has no effect with resize="processor", which takes the size of '
                "the image processor: leave one of them out"
            )
        if self.attack == "paper" and self.eps is not None:
            raise ValueError(
                f'eps={self.eps:g} has no meaning with attack="paper", whose budget is fixed in normalised units '
                '(about 1.8/255 in pixels): set attack="pgd" too, or leave eps out'
            )
        if self.attack == "pgd" and self.eps is None:
            self.eps = DEFAULT_EPS
        if self.eps is not None and not 0 < self.eps <= 1:
            raise ValueError(f"eps must be in (0, 1], in pixel units of [0, 1] images such as 8/255, got {self.eps}")
        if self.step_size is None and self.attack == "paper":
            self.step_size = PAPER_STEP_SIZE_NORMALIZED
        for name in ("learning_rate", "step_size", "max_grad_norm"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")
        if self.learning_rate > _LARGEST_LEARNING_RATE:
            raise ValueError(
                f"learning_rate must be at most {_LARGEST_LEARNING_RATE:g}, or Adam overflows, got "
                f"{self.learning_rate}"
            )
        weights = (self.invariance_weight, self.adversarial_weight)
        if min(weights) < 0 or sum(weights) == 0:
            raise ValueError(
                "invariance_weight and adversarial_weight must be at least 0 and not both 0, "
                f"got {self.invariance_weight} and {self.adversarial_weight}"
            )
        if not 0 <= self.eps_warmup_ratio <= 1:
            raise ValueError(
                f"eps_warmup_ratio must be from 0 to 1, a share of max_steps, got {self.eps_warmup_ratio}"
            )
        if self.attack == "paper":
            if self.eps_warmup_ratio > 0:
                raise ValueError(
                    f'eps_warmup_ratio={self.eps_warmup_ratio:g} has no effect with attack="paper", whose budget is '
                    'fixed: set attack="pgd", or leave it out'
                )
            if self.objective in LOGITS_OBJECTIVES:
                raise ValueError(
                    f'objective={self.objective!r} needs attack="pgd", which raises it; "paper" attacks features'
                )

    @property
    def trackers(self) -> list[str]:
        """`report_to` as a list."""
        return [self.report_to] if isinstance(self.report_to, str) else list(self.report_to)

    @property
    def attack_routes(self) -> tuple[bool, ...]:
        """One entry per attack on an image: True if it goes through the tokens."""
        return {"base": (False,), "tokens": (True,), "both": (False, True)}[self.attack_through]

    def eps_share(self, step: int) -> float:
        """Returns the share of `eps` that the attack of a step uses."""
        return min(1.0, (step + 1) / max(1.0, self.eps_warmup_ratio * self.max_steps))

    @property
    def schedule_depends_on_max_steps(self) -> bool:
        """Tells whether the learning rate or the eps of a step depends on `max_steps`."""
        return self.lr_scheduler_type in _SCHEDULES_TO_MAX_STEPS or self.eps_warmup_ratio > 0

    def recipe(self) -> dict[str, Any]:
        """Returns the arguments that determine the tokens, for its config: all but folders, logging and workers."""
        recipe = {key: value for key, value in dataclasses.asdict(self).items() if key not in _NOT_RECIPE}
        if self.step_size is None:
            assert self.eps is not None, "only pgd has no step_size, and it has an eps"
            recipe["step_size"] = pgd_step_size(self.eps, self.num_attack_steps)
        return recipe


_NOT_RECIPE = {
    "output_dir",
    "overwrite_output_dir",
    "image_column_name",
    "label_column_name",
    "label_matching",
    "max_broken_images",
    "dataloader_num_workers",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "per_device_eval_batch_size",
    "report_to",
    "resume_from_checkpoint",
    "ignore_images_mismatch",
    "disable_tqdm",
    *SPEEDUP_ARGUMENTS,
}


# Limits for the recipe of an adapter that anyone may have made; a user's own arguments have none.
_RECIPE_LIMITS = {
    "max_steps": 100_000,
    "num_attack_steps": 1_000,
    "per_device_train_batch_size": 4_096,
    "gradient_accumulation_steps": 4_096,
    "shuffle_buffer_size": 1_000_000,
}


def check_recipe(training: Mapping[str, Any], *, limited: bool = False) -> None:
    """Refuses values of wrong types in the `training` of an adapter's config, which may hold other keys too.

    `limited` also refuses a recipe that takes more steps or memory than a training of somebody else's should.
    """
    hints = get_type_hints(RobustnessTokenTrainingArguments)
    for name in training.keys() & hints.keys() - {"image_size"}:  # of the images, perhaps a rectangle; not used
        where, value = f"{name} in the training of the adapter's config.json", training[name]
        check_type(where, value, hints[name])
        if limited and value is not None and value > _RECIPE_LIMITS.get(name, value):
            raise ValueError(
                f"{where} is {value:,}, and own tokens are trained by it with at most {_RECIPE_LIMITS[name]:,}: give "
                "own_tokens_steps, or own_tokens_overrides, to train them otherwise"
            )


def resolve_preset(name: str, model_type: str | None = None) -> dict[str, Any]:
    """Returns the settings of a preset; the user's own settings override them.

    Args:
        name: `"dinov2"`, `"deit3"` or `"openclip"`; `"paper"`, which picks one of these by the base's family; or
            `"robust"`, trained to resist an attacker who knows all: tokens in each layer, gains and shifts, attacked
            through, and distilled from the base's own predictions.
        model_type: `config.model_type` of the base, needed for `"paper"` alone. Every timm model counts as DeiT-III:
            name the preset for a timm copy of another family.

    Returns:
        A new dict by argument name: fields of `RobustnessTokenTrainingArguments`, and the arguments of
        `RobustnessTokenModel.from_base` that the preset sets. [`split_settings`] tells them apart.

    Raises:
        ValueError: If there is no such preset, or `"paper"` has no recipe for the family.
    """
    if name == PAPER:
        if model_type not in _PRESET_OF_MODEL_TYPE:
            raise ValueError(
                f"preset='paper' has no recipe for model_type={model_type!r}, only for "
                f"{sorted(_PRESET_OF_MODEL_TYPE)}: name one of {sorted(PRESETS)}, or set no preset"
            )
        name = _PRESET_OF_MODEL_TYPE[model_type]
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {[PAPER, *PRESETS]}, got {name!r}")
    return {argument: list(value) if isinstance(value, list) else value for argument, value in PRESETS[name].items()}


def split_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits settings, such as a preset's, into the arguments of `from_base` and those of the training.

    Args:
        settings: By argument name, see [`resolve_preset`].

    Returns:
        The arguments of `RobustnessTokenModel.from_base`, and the fields of `RobustnessTokenTrainingArguments`.
    """
    fields = RobustnessTokenTrainingArguments.__dataclass_fields__
    of_the_model = {name: value for name, value in settings.items() if name not in fields}
    return of_the_model, {name: value for name, value in settings.items() if name in fields}
