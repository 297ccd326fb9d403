"""How the attacker's own tokens were trained, in words: what their number says depends on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..report.markdown import format_setting
from ..report.strict import MAX_NAME
from ..training_args import RobustnessTokenTrainingArguments
from .own_tokens import OwnTokens, defenders_recipe
from .threat_models import EvaluatedModel


_NOTED = ("image_size", "num_processes", "num_steps_done")  # by the trainer, beside its arguments


def describe_training(
    model: EvaluatedModel,
    trained: Sequence[OwnTokens],
    *,
    overrides: Mapping[str, Any] | None = None,
    on_evaluated: bool = False,
) -> list[str]:
    """How the attacker's tokens were trained, in words: where that departs from the defender's recipe, and on what.

    An attacker who trains otherwise than the defender may well find less than one who doesn't.

    Args:
        model: The defended model, in whose config the recipe is.
        trained: From [`train_own_tokens`].
        overrides: That were given there; other settings that the recipe doesn't name are defaults.
        on_evaluated: Whether the images are of the evaluated dataset itself.
    """
    recipe = defenders_recipe(model)
    words = [
        word
        for own in trained
        for word in (*_differences(recipe, own.training, overrides or {}), _images(recipe, own.training, on_evaluated))
    ]
    return [word[:MAX_NAME] for word in dict.fromkeys(words)]


def _differences(recipe: Mapping[str, Any], training: Mapping[str, Any], overrides: Mapping[str, Any]) -> list[str]:
    """Where a training, as its adapter's config describes it, departs from the recipe; no set has the others' seed."""
    defaults = RobustnessTokenTrainingArguments(output_dir="").recipe()
    names = [name for name in defaults if name not in ("seed", "image_size")]
    unnamed = [name for name in names if name not in recipe and name not in overrides]
    if not recipe:
        words = ["by the package's defaults, as the recipe is not known"]
    elif unnamed:
        words = [f"by the recipe, which leaves {len(unnamed)} of {len(names)} settings to the package's defaults"]
    else:
        words = ["by the recipe"]
    stated = {name: recipe.get(name, defaults[name]) for name in names if name in recipe or name in overrides}
    # Nothing has checked these, of a config from the Hub.
    stated |= {name: recipe[name] for name in _NOTED if name in recipe and _is_size(recipe[name])}
    if recipe.get("num_steps_done") == recipe.get("max_steps"):
        stated.pop("num_steps_done", None)  # of which max_steps says all
    for name, value in stated.items():
        if name in training and training[name] != value:
            was, instead = format_setting(name, value), format_setting(name, training[name])
            words.append(f"but with {name}={instead} instead of {was}")
    if "num_processes" in stated and (size := _batch_size(training)) != (other := _batch_size({**training, **stated})):
        words.append(f"so with {size:,} images per step instead of {other:,}")
    if recipe.get("previous"):
        words.append("but from new tokens, where the defender's had been trained before")
    return words


def _is_size(value: Any) -> bool:
    return all(type(side) is int for side in (value if isinstance(value, list) else [value]))


def _batch_size(training: Mapping[str, Any]) -> int:
    names = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps")
    return math.prod(int(training[name]) for name in names)


def _images(recipe: Mapping[str, Any], training: Mapping[str, Any], on_evaluated: bool) -> str:
    """What the attacker trained on, and how much the defender did where that is known to be something else."""
    own, theirs = training.get("dataset", {}), recipe.get("dataset")
    count = own.get("num_images")
    defenders = theirs.get("num_images") if isinstance(theirs, dict) else None
    words = "on a stream of images" if count is None else f"on {count:,} images"
    if on_evaluated:
        words += " of the evaluated dataset itself"
    if "adversarial_pairs" in own:
        words += " attacked once for all sets"
    if type(defenders) is int and defenders != count:
        words += f", the defender on {defenders:,}"
    return words
