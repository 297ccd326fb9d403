"""Own tokens: an attacker who knows the recipe but not the tokens trains others with the package's trainer."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from ..configuration import TOKENS, RobustnessTokenConfig
from ..data import ImageDataset, Images
from ..hub import is_adapter, load_adapter
from ..models import (
    ProbedModel,
    RobustnessTokenForImageClassification,
    RobustnessTokenModel,
    head_digest,
    headless_model,
    model_digest,
    remove_tokens,
)
from ..training import (
    LOGITS_OBJECTIVES,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    check_recipe,
    classes_of,
    make_adversarial_pairs,
    max_pixel_difference,
    prepare_train_dataset,
)
from ..utils import MAX_NAME, __version__, check_parameters, digest_json, process_state, share_from_main
from .threat_models import EvaluatedModel


_NOTED = ("image_size", "num_processes", "num_steps_done")  # what the trainer adds to its arguments


@dataclass(frozen=True, kw_only=True)
class OwnTokensSpec:
    """One training run of the attacker."""

    seed: int  # of tokens, order of the images and noise; never the defender's, which is a secret
    num_robustness_tokens: int  # a guess
    dataset: int = 0  # row in the list of the attacker's datasets


@dataclass(frozen=True, kw_only=True)
class OwnTokens:
    """The result of a training run of the attacker."""

    tokens: dict[str, Tensor]  # see TokenState
    training: dict[str, Any]  # as in an adapter's config


def own_tokens_specs(
    num_seeds: int, *, num_robustness_tokens: int, recipe_seed: int | None, num_datasets: int = 1
) -> list[OwnTokensSpec]:
    """Returns `num_seeds` training runs, which take the datasets in turn and never the recipe's seed.

    Most have as many tokens as the defender (the adapter's size gives their number away); of every five, the fourth
    has half as many and the fifth twice as many.
    """
    if num_seeds < 1:
        raise ValueError(f"num_seeds must be at least 1, got {num_seeds}")
    seeds = [seed for seed in range(1, num_seeds + 2) if seed != recipe_seed]
    lengths = {3: max(1, num_robustness_tokens // 2), 4: 2 * num_robustness_tokens}
    return [
        OwnTokensSpec(
            seed=seeds[i], num_robustness_tokens=lengths.get(i % 5, num_robustness_tokens), dataset=i % num_datasets
        )
        for i in range(num_seeds)
    ]


def shortened(recipe: Mapping[str, Any], num_steps: int | None) -> dict[str, Any]:
    """Returns the overrides for other numbers of steps, with the same share of warm-up; none for None."""
    if num_steps is None:
        return {}
    known = {name: recipe[name] for name in ("max_steps", "warmup_steps", "lr_scheduler_type") if name in recipe}
    args = RobustnessTokenTrainingArguments(output_dir="", **known)
    return {"max_steps": num_steps, "warmup_steps": math.ceil(args.warmup_steps * num_steps / args.max_steps)}


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
    """Trains a set of tokens per spec by the defender's recipe on a copy of the base; reuses stored sets.

    All processes call it and train together. `output_dir` gets a folder per combination of settings. With
    `num_adversarial_pairs`, that many images of each dataset are attacked once for all runs on it; runs that attack
    through the tokens, and runs on a stream, attack their own. `overrides` are training arguments that differ from
    the recipe.
    """
    if model.feature_view is None:
        raise ValueError(
            'knowledge "own_tokens" trains tokens on the features of the base, which are not known: give feature_view '
            "or own_tokens, or leave the level out"
        )
    overrides = dict(overrides or {}) | {"disable_tqdm": disable_tqdm}
    theirs = {name: value for name, value in _recipe(model).items() if name not in overrides}
    check_recipe(theirs, limited=True)
    values = theirs | overrides
    recipe = RobustnessTokenTrainingArguments(
        **{**values, "output_dir": str(output_dir), "overwrite_output_dir": True}
    )
    reads_logits = recipe.objective in LOGITS_OBJECTIVES
    head = model.model.head if reads_logits and isinstance(model.model, ProbedModel) else None
    if reads_logits and head is None and isinstance(model.adapter, RobustnessTokenModel):
        raise ValueError(
            f"the adapter was trained by objective={recipe.objective!r}, and own tokens need its head too: load it as "
            "RobustnessTokenForImageClassification (--task classification), put a probe head on it (--head), or leave "
            "the level 'own_tokens' out"
        )
    attacked = model.base if reads_logits and head is None else headless_model(model.base)
    base: Any = remove_tokens(copy.deepcopy(attacked))
    new_attacker = functools.partial(_attacker, model, base, has_own_head=reads_logits and head is None)
    with new_attacker(specs[0]) as attacker:
        processor, names = attacker.image_processor, attacker.injector.state.keys()
        classes = classes_of(attacker, head, recipe)
    if names != model.tokens.keys():
        raise ValueError(
            f"the model has only a part of its gains and shifts, {sorted(model.tokens)}, and own tokens are trained "
            f"with whole kinds, {sorted(names)}: give own_tokens, or leave the level out"
        )
    images = [
        prepare_train_dataset(
            dataset, args=recipe, image_processor=processor, recipe=model.recipe | dict(overrides or {}), **classes
        )
        for dataset in datasets
    ]
    # Pictures as the defender resizes them; a stream is prepared by each training.
    datasets = [
        one.dataset if isinstance(one.dataset, ImageDataset) else dataset
        for one, dataset in zip(images, datasets, strict=True)
    ]
    if head is not None or recipe.objective == "cross_entropy" or recipe.eps_warmup_ratio > 0:
        num_adversarial_pairs = None  # pairs are made through the base's own head, at full eps, and hold no labels
    compared = head_digest(base, head) if reads_logits else None
    state = process_state()
    key = functools.partial(_key, model, base, compared, values, images, num_adversarial_pairs)
    folder = output_dir / share_from_main(key, state)
    prepared: dict[int, Any] = {}
    trained = []
    for spec in specs:
        run = folder / f"seed-{spec.seed}-tokens-{spec.num_robustness_tokens}-dataset-{spec.dataset}"
        # A process may see a file that another doesn't see yet, and would train alone.
        stored = share_from_main(functools.partial(_read_run, run), state)
        if stored is not None:
            trained.append(stored)
            continue
        args = dataclasses.replace(recipe, output_dir=str(run), seed=spec.seed)
        if spec.dataset not in prepared:
            prepared[spec.dataset] = dataset = datasets[spec.dataset]
            count = _count_pairs(model, images[spec.dataset], num_adversarial_pairs, args)
            if count is not None:
                # A fixed seed, so that the pairs do not depend on which sets are stored already.
                seed = next(other.seed for other in specs if other.dataset == spec.dataset)
                pairs_args = dataclasses.replace(args, output_dir=str(folder / f"pairs-{spec.dataset}"), seed=seed)
                with new_attacker(spec) as attacker:
                    prepared[spec.dataset] = make_adversarial_pairs(attacker, pairs_args, dataset, num_images=count)
        if hasattr(prepared[spec.dataset], "__len__"):  # each process needs a batch
            most = max(1, len(prepared[spec.dataset]) // state.num_processes)
            size = min(args.per_device_train_batch_size, most)
            args = dataclasses.replace(args, per_device_train_batch_size=size)
        with new_attacker(spec) as attacker:
            trainer = RobustnessTokenTrainer(attacker, args, prepared[spec.dataset], head=copy.deepcopy(head))
            trainer.train()
            trainer.save_model()
            tokens = {name: tensor.detach().clone() for name, tensor in attacker.injector.state.items()}
            trained.append(OwnTokens(tokens=tokens, training=dict(attacker.config.training or {})))
    return trained


def _read_run(folder: Path) -> OwnTokens | None:
    """Returns a finished run, or `None`; its adapter is written last."""
    if not is_adapter(folder):
        return None
    adapter = load_adapter(folder)
    return OwnTokens(tokens=adapter.state, training=dict(adapter.config.training or {}))


def _count_pairs(
    model: EvaluatedModel, images: Images, num_adversarial_pairs: int | None, args: RobustnessTokenTrainingArguments
) -> int | None:
    """Returns the number of images to attack once for all runs on a dataset; `None` if each run attacks its own."""
    if num_adversarial_pairs is None or args.attack_through != "base" or images.num_images is None:
        return None
    if images.shape is None:
        return None  # each picture keeps its own shape, but pairs share one
    try:
        max_pixel_difference(args, model.normalizer.image_std.flatten().tolist())
    except ValueError:
        return None  # pairs are stored in 8 bits, which can't hold so small an attack
    return min(num_adversarial_pairs, images.num_images)


@contextmanager
def _attacker(
    model: EvaluatedModel, base: Any, spec: OwnTokensSpec, *, has_own_head: bool
) -> Iterator[RobustnessTokenModel | RobustnessTokenForImageClassification]:
    """Yields the base with new tokens, and removes them afterwards."""
    with torch.random.fork_rng():
        torch.manual_seed(spec.seed)
        model_class = RobustnessTokenForImageClassification if has_own_head else RobustnessTokenModel
        attacker = model_class.from_base(
            base,
            num_robustness_tokens=spec.num_robustness_tokens,
            token_depth=model.token_depth,
            gains_and_shifts=model.gains_and_shifts,
            initializer_range=initializer_range(model),
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


def initializer_range(model: EvaluatedModel) -> float:
    """Returns the standard deviation that the defender's tokens started with."""
    return (RobustnessTokenConfig() if model.adapter is None else model.adapter.config).initializer_range


def _recipe(model: EvaluatedModel) -> dict[str, Any]:
    """Returns the defender's training arguments; those that the config does not give keep the package's defaults."""
    # A config from the Hub may also name a folder to resume from or a tracker to report to: these are left out. So
    # is the image size: the image processor knows it, and ready images have theirs.
    known = RobustnessTokenTrainingArguments(output_dir="").recipe().keys() - {"image_size"}
    return {key: value for key, value in model.recipe.items() if key in known}


def _key(
    model: EvaluatedModel,
    base: Any,
    head: str | None,
    values: Mapping[str, Any],
    images: Sequence[Images],
    num_adversarial_pairs: int | None,
) -> str:
    """Returns a name for everything that the attacker's tokens depend on, except the spec."""
    content = {
        "base": model_digest(base),
        "head": head,
        "features": [model.feature_view, model.similarity_axis],
        "token_depth": model.token_depth,
        "gains_and_shifts": model.gains_and_shifts,
        "initializer_range": initializer_range(model),
        "normalizer": repr(model.normalizer.image_mean.tolist() + model.normalizer.image_std.tolist()),
        "arguments": {key: value for key, value in values.items() if key not in ("seed", "disable_tqdm")},
        # Without an identity, nothing stored is reused.
        "datasets": [one.identity or uuid.uuid4().hex for one in images],
        "pairs": num_adversarial_pairs,
        "versions": [__version__, torch.__version__, transformers.__version__],
    }
    return digest_json(content)[:12]


def describe_training(
    model: EvaluatedModel,
    trained: Sequence[OwnTokens],
    *,
    overrides: Mapping[str, Any] | None = None,
    on_evaluated: bool = False,
) -> dict[str, dict[str, Any]]:
    """Returns how the training of each set differs from the recipe, by the name of its view, as plain values.

    "recipe" holds the recipe's values of the same settings. A set that differs from the recipe may find less than one
    that follows it. `on_evaluated` tells whether the sets were trained on the evaluated dataset itself.
    """
    recipe, overrides = model.recipe, overrides or {}
    defaults = RobustnessTokenTrainingArguments(output_dir="").recipe()
    names = [name for name in defaults if name not in ("seed", "image_size")]  # seeds always differ
    stated = [name for name in names if name in recipe or name in overrides]
    expected = {name: recipe.get(name, defaults[name]) for name in stated}
    # A config from the Hub may hold anything under these names.
    expected |= {name: recipe[name] for name in _NOTED if name in recipe and _is_size(recipe[name])}
    if recipe.get("num_steps_done") == recipe.get("max_steps"):
        expected.pop("num_steps_done", None)  # max_steps says the same
    theirs: dict[str, Any] = {}
    dataset = recipe.get("dataset")
    if isinstance(dataset, dict) and type(dataset.get("num_images")) is int:
        theirs["num_images"] = dataset["num_images"]
    described = {"recipe": theirs}
    for number, own in enumerate(trained):
        images = own.training.get("dataset", {})
        found = {"num_robustness_tokens": own.tokens[TOKENS].shape[-2], "num_images": images.get("num_images")}
        if on_evaluated:
            found["on_evaluated_dataset"] = True
        if "adversarial_pairs" in images:
            found["attacked_once_for_all_sets"] = True
        if len(stated) < len(names):
            found["settings_left_to_defaults"] = len(names) - len(stated)
        if recipe.get("previous"):
            found["earlier_training"], theirs["earlier_training"] = False, True
        both = {name: (value, own.training.get(name, value)) for name, value in expected.items()}
        if "head" in recipe:
            both["head"] = (recipe["head"], own.training.get("head"))
        if type(expected.get("num_processes")) is int:
            both["images_per_step"] = (_batch_size({**own.training, **expected}), _batch_size(own.training))
        for name, (before, now) in both.items():
            if now != before:
                found[name], theirs[name] = _plain(now), _plain(before)
        described[f"own_tokens_{number}"] = found
    return described


def _is_size(value: Any) -> bool:
    return all(type(side) is int for side in (value if isinstance(value, list) else [value]))


def _batch_size(training: Mapping[str, Any]) -> int:
    names = ("num_processes", "per_device_train_batch_size", "gradient_accumulation_steps")
    return math.prod(int(training[name]) for name in names)


def _plain(value: Any) -> Any:
    """Returns a value that a report can hold."""
    try:
        check_parameters("own_tokens", {"value": value})
    except ValueError:
        return str(value)[:MAX_NAME]
    return value
