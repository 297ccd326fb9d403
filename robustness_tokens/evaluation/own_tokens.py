"""The attacker who knows the recipe but not the tokens: trains its own with the package's trainer."""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..configuration import RobustnessTokenConfig
from ..data import choose_rows, describe_dataset, find_image_shape
from ..hub import holds_adapter, load_adapter
from ..models import RobustnessTokenModel, base_fingerprint, headless_model, remove_tokens
from ..report import format_setting
from ..training import (
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    make_adversarial_pairs,
    max_pixel_difference,
    prepare_train_dataset,
)
from ..utils import MAX_NAME, process_state, share_from_main
from .cells import digest
from .threat_models import EvaluatedModel


_NUM_DIGESTED = 64

_NOTED = ("image_size", "num_processes", "num_steps_done")  # by the trainer, beside its arguments


@dataclass(frozen=True, kw_only=True)
class OwnTokensSpec:
    """One training run of the attacker.

    Attributes:
        seed: Of the tokens, the order of the images and the noise; never the defender's, which is a secret.
        num_robustness_tokens: How many tokens the attacker guesses.
        dataset: Which of the attacker's datasets.
    """

    seed: int
    num_robustness_tokens: int
    dataset: int = 0


@dataclass(frozen=True, kw_only=True)
class OwnTokens:
    """What a training run of the attacker gave.

    Attributes:
        tokens: (K, D).
        training: How they were trained, as in the `training` of an adapter's config.
    """

    tokens: Tensor
    training: dict[str, Any]


def own_tokens_specs(
    num_seeds: int, *, num_robustness_tokens: int, recipe_seed: int | None, num_datasets: int = 1
) -> list[OwnTokensSpec]:
    """The attacker's training runs: most of the defender's length, every fourth half and every fifth twice as long.

    Args:
        num_seeds: How many, at least 1.
        num_robustness_tokens: Of the defender: how many there are can be seen from the adapter's size.
        recipe_seed: Of the defender's training, which the attacker doesn't have and so never takes.
        num_datasets: Of the attacker, taken in turn.

    Returns:
        `num_seeds` specs.

    Raises:
        ValueError: If `num_seeds` is below 1.
    """
    if num_seeds < 1:
        raise ValueError(f"num_seeds must be at least 1, got {num_seeds}")
    seeds = (seed for seed in range(1, num_seeds + 2) if seed != recipe_seed)
    lengths = {3: max(1, num_robustness_tokens // 2), 4: 2 * num_robustness_tokens}
    return [
        OwnTokensSpec(
            seed=next(seeds),
            num_robustness_tokens=lengths.get(i % 5, num_robustness_tokens),
            dataset=i % num_datasets,
        )
        for i in range(num_seeds)
    ]


def train_own_tokens(
    model: EvaluatedModel,
    specs: Sequence[OwnTokensSpec],
    datasets: Sequence[Any],
    output_dir: Path,
    *,
    num_adversarial_pairs: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    disable_tqdm: bool = False,
) -> list[OwnTokens]:
    """Trains tokens by the defender's recipe, on a copy of the base; what is there already is not trained again.

    All processes call it, and train together.

    Args:
        model: The defended model; its base is copied and its tokens are not looked at.
        specs: Training runs.
        datasets: Of images, as `RobustnessTokenTrainer` takes them.
        output_dir: Runs that differ in anything get different folders in it.
        num_adversarial_pairs: Attack so many images of each dataset once, for all the runs on it; `None` lets each run
            attack its own, as runs do that attack through the tokens, and those on a stream.
        overrides: Training arguments in which the attacker departs from the recipe, such as `max_steps`.
        disable_tqdm: No progress bars.

    Returns:
        For each spec its tokens.

    Raises:
        ValueError: If what the features of the model are is not known, so that nothing can be trained on them.
    """
    if model.feature_view is None:
        raise ValueError(
            'knowledge "own_tokens" trains tokens on the features of the base, and what they are is not known: give '
            "feature_view, or own_tokens, or leave the level out"
        )
    base: Any = remove_tokens(copy.deepcopy(headless_model(_base_of(model))))
    values = _recipe(model) | dict(overrides or {}) | {"disable_tqdm": disable_tqdm}
    folder = output_dir / _key(model, base, values, datasets, num_adversarial_pairs)
    prepared: dict[int, Any] = {}
    trained = []
    state = process_state()
    for spec in specs:
        run = folder / f"seed-{spec.seed}-tokens-{spec.num_robustness_tokens}-dataset-{spec.dataset}"
        # A process may see a file that another doesn't see yet, and would train alone.
        stored = share_from_main(functools.partial(_read_run, run), state)
        if stored is not None:
            trained.append(stored)
            continue
        args = RobustnessTokenTrainingArguments(
            **{**values, "output_dir": str(run), "overwrite_output_dir": True, "seed": spec.seed}
        )
        if spec.dataset not in prepared:
            prepared[spec.dataset] = dataset = datasets[spec.dataset]
            count = _count_pairs(model, dataset, num_adversarial_pairs, args)
            if count is not None:
                # Whichever set is the first that is not there yet.
                seed = next(other.seed for other in specs if other.dataset == spec.dataset)
                pairs_args = dataclasses.replace(args, output_dir=str(folder / f"pairs-{spec.dataset}"), seed=seed)
                with _attacker(model, base, spec) as attacker:
                    prepared[spec.dataset] = make_adversarial_pairs(attacker, pairs_args, dataset, num_images=count)
        if hasattr(prepared[spec.dataset], "__len__"):  # each process needs a batch
            most = max(1, len(prepared[spec.dataset]) // state.num_processes)
            size = min(args.per_device_train_batch_size, most)
            args = dataclasses.replace(args, per_device_train_batch_size=size)
        with _attacker(model, base, spec) as attacker:
            trainer = RobustnessTokenTrainer(attacker, args, prepared[spec.dataset])
            trainer.train()
            trainer.save_model()
            tokens = attacker.robustness_tokens.detach().clone()
            trained.append(OwnTokens(tokens=tokens, training=dict(attacker.config.training or {})))
    return trained


def _read_run(folder: Path) -> OwnTokens | None:
    """What a run left, or None if it isn't over: its adapter is written last."""
    if not holds_adapter(folder):
        return None
    adapter = load_adapter(folder)
    return OwnTokens(tokens=adapter.tokens, training=dict(adapter.config.training or {}))


def _count_pairs(
    model: EvaluatedModel, dataset: Any, num_adversarial_pairs: int | None, args: RobustnessTokenTrainingArguments
) -> int | None:
    """How many images of a dataset are attacked once, for all the runs on it; None if each run attacks its own."""
    if num_adversarial_pairs is None or args.attack_through != "base" or not hasattr(dataset, "__len__"):
        return None
    try:
        max_pixel_difference(args, model.normalizer.image_std.flatten().tolist())
    except ValueError:
        return None  # pairs are stored in 8 bits, which can't hold so small an attack
    processor = None if model.adapter is None else model.adapter.image_processor
    if find_image_shape(prepare_train_dataset(dataset, args=args, image_processor=processor)) is None:
        return None  # each picture keeps a shape of its own, and pairs have one
    return min(num_adversarial_pairs, len(dataset))


@contextmanager
def _attacker(model: EvaluatedModel, base: Any, spec: OwnTokensSpec) -> Iterator[RobustnessTokenModel]:
    """The base with new tokens, and without them afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        attacker = RobustnessTokenModel.from_base(
            base,
            num_robustness_tokens=spec.num_robustness_tokens,
            initializer_range=_initializer_range(model),
            feature_view=model.feature_view,
            similarity_axis=model.similarity_axis,
            image_mean=model.normalizer.image_mean.flatten().tolist(),
            image_std=model.normalizer.image_std.flatten().tolist(),
            image_processor=None if model.adapter is None else model.adapter.image_processor,
        )
        try:
            yield attacker
        finally:
            attacker.unload()


def _initializer_range(model: EvaluatedModel) -> float:
    """That the defender's tokens began with."""
    return (
        RobustnessTokenConfig().initializer_range if model.adapter is None else model.adapter.config.initializer_range
    )


def _base_of(model: EvaluatedModel) -> Any:
    return model.model if model.adapter is None else model.adapter.get_base_model()


def defenders_recipe(model: EvaluatedModel) -> dict[str, Any]:
    """All that the config of the defender's adapter says of its training."""
    return dict((None if model.adapter is None else model.adapter.config.training) or {})


def _recipe(model: EvaluatedModel) -> dict[str, Any]:
    """The defender's training arguments, which are in every adapter's config; the package's own if there are none."""
    # And nothing else that a config from the Hub may name, such as a folder to resume from or a tracker to report to.
    known = RobustnessTokenTrainingArguments(output_dir="").recipe().keys()
    # The image size that a recipe names may be that of ready images, which take none; the image processor knows it.
    return {key: value for key, value in defenders_recipe(model).items() if key in known - {"image_size"}}


def _identity(dataset: Any) -> str | None:
    """The fingerprint of a `datasets` dataset, of another the digest of some of its images; None of a stream."""
    if isinstance(fingerprint := getattr(dataset, "_fingerprint", None), str):
        return fingerprint
    if not hasattr(dataset, "__len__") or len(dataset) == 0:
        return None
    rows = choose_rows(len(dataset), _NUM_DIGESTED, seed=0)
    return digest([item["images"] for item in map(dataset.__getitem__, rows) if "images" in item])


def _key(
    model: EvaluatedModel,
    base: Any,
    values: Mapping[str, Any],
    datasets: Sequence[Any],
    num_adversarial_pairs: int | None,
) -> str:
    """A name for everything that the attacker's tokens depend on, but for the spec."""
    content = {
        "base": base_fingerprint(base),
        "features": [model.feature_view, model.similarity_axis],
        "initializer_range": _initializer_range(model),
        "normalizer": repr(model.normalizer.image_mean.tolist() + model.normalizer.image_std.tolist()),
        "arguments": {key: value for key, value in values.items() if key not in ("seed", "disable_tqdm")},
        "datasets": [[describe_dataset(dataset), _identity(dataset)] for dataset in datasets],
        "pairs": num_adversarial_pairs,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


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
