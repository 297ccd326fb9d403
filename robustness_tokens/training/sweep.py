"""The paper's ablation over the number of tokens, with learning rates and seeds: attacked once, trained many times."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import logging
import math
import shutil
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from ..configuration import RobustnessTokenConfig
from ..data import AdversarialPairs, Normalizer, prepare_images
from ..hub import holds_adapter, load_adapter, read_config
from ..models import RobustnessTokenPreTrainedModel
from ..report import plot_sweep
from ..utils import share_from_main, write_text
from .accelerator import build_accelerator
from .arguments import RobustnessTokenTrainingArguments
from .checkpoints import list_checkpoints
from .dataset import take_pairs
from .held_out import measure_held_out
from .make_pairs import make_adversarial_pairs
from .run_folder import LOG_FILE, read_log
from .trainer import RobustnessTokenTrainer


logger = logging.getLogger(__name__)

CSV_FILE = "sweep.csv"
FIGURE_FILE = "sweep.png"
PAIRS_FOLDER = "pairs"


class Combination(NamedTuple):
    """What distinguishes one training of a sweep."""

    num_tokens: int
    learning_rate: float
    seed: int

    @property
    def folder_name(self) -> str:
        """Where it lies in the folder of the sweep."""
        learning_rate = repr(float(self.learning_rate)).removesuffix(".0")  # no two have the same
        return f"tokens-{self.num_tokens}_lr-{learning_rate}_seed-{self.seed}"


def config_of(template: RobustnessTokenConfig, num_tokens: int) -> RobustnessTokenConfig:
    """The config of a training's model before it is trained: that of the sweep's model, with so many tokens."""
    values = {**template.to_dict(), "num_robustness_tokens": num_tokens, "training": {}}
    config: RobustnessTokenConfig = RobustnessTokenConfig.from_dict(values)
    return config


def arguments_of(args: RobustnessTokenTrainingArguments, combination: Combination) -> RobustnessTokenTrainingArguments:
    """The arguments of one training of a sweep, by those of all; it goes on where it was cut."""
    folder = Path(args.output_dir) / combination.folder_name
    return dataclasses.replace(
        args,
        output_dir=str(folder),
        learning_rate=combination.learning_rate,
        seed=combination.seed,
        # Whatever save_steps says: SIGTERM leaves a checkpoint too.
        resume_from_checkpoint=True if list_checkpoints(folder) and not args.overwrite_output_dir else None,
    )


def find_finished(
    args: RobustnessTokenTrainingArguments,
    wanted: Sequence[Combination],
    template: RobustnessTokenConfig,
    pairs: AdversarialPairs,
    *,
    num_processes: int,
) -> list[Combination]:
    """The combinations that need no training; says which of an earlier sweep's were trained otherwise.

    Args:
        args: Of the sweep.
        wanted: What is asked for now.
        template: Of the model that gives the sweep its base.
        pairs: To train on.
        num_processes: To train with, on which the images of a step depend.

    Returns:
        Those of earlier sweeps, then those wanted, unless `args.overwrite_output_dir` trains these anew.

    Raises:
        ValueError: If an adapter in the folder is damaged.
    """
    images = prepare_images(pairs)
    known = {"num_processes": num_processes, "image_size": images.image_size, "dataset": images.description}
    found = []
    for path in sorted(Path(args.output_dir).glob("tokens-*_lr-*_seed-*")):
        if not holds_adapter(path):
            continue
        config = read_config(path)
        training = config.training or {}
        learning_rate, seed = training.get("learning_rate"), training.get("seed")
        if isinstance(learning_rate, int | float) and isinstance(seed, int):
            combination = Combination(config.num_robustness_tokens, learning_rate, seed)
            found += [combination] if combination.folder_name == path.name else []
    others = [one for one in found if one not in wanted]
    candidates = others if args.overwrite_output_dir else [*others, *wanted]
    finished = [
        one for one in candidates if _is_finished(config_of(template, one.num_tokens), arguments_of(args, one), known)
    ]
    if left_out := [one.folder_name for one in others if one not in finished]:
        logger.warning(
            "The sweep leaves out what was trained on other pairs, or by another recipe: %s", ", ".join(left_out)
        )
    return finished


def _is_finished(
    config: RobustnessTokenConfig, args: RobustnessTokenTrainingArguments, known: Mapping[str, Any]
) -> bool:
    """Whether the folder holds the tokens that this training would give; `known` is what no argument says of it."""
    folder = Path(args.output_dir)
    log = read_log(folder / LOG_FILE, last_step=args.max_steps)
    if not holds_adapter(folder) or not log or log[-1]["step"] != args.max_steps:
        return False
    stored = read_config(folder)
    expected = {**args.recipe(), **known, "num_steps_done": args.max_steps}
    trained = stored.training or {}
    return (
        stored.base_model_fingerprint == config.base_model_fingerprint
        and stored.num_robustness_tokens == config.num_robustness_tokens
        and stored.feature_view == config.feature_view
        and stored.similarity_axis == config.similarity_axis
        and stored.initializer_range == config.initializer_range
        and all(trained.get(name) == value for name, value in expected.items())
    )


def read_finished(
    member: RobustnessTokenPreTrainedModel, args: RobustnessTokenTrainingArguments
) -> list[dict[str, float]]:
    """Gives the model the tokens of its folder; returns the log of their training."""
    folder = Path(args.output_dir)
    with torch.no_grad():
        member.robustness_tokens.copy_(load_adapter(folder).tokens)
    return read_log(folder / LOG_FILE, last_step=args.max_steps)


@dataclass(kw_only=True)
class SweepArguments:
    """What `robtok sweep` is told beside the arguments of `robtok train`; the defaults are the paper's ablation.

    Raises:
        ValueError: If a list is empty or names a value twice, or a value is out of range.
    """

    sweep_num_tokens: list[int] = field(
        default_factory=lambda: [1, 10, 20, 50], metadata={"help": "Numbers of tokens."}
    )
    sweep_learning_rates: list[float] = field(default_factory=lambda: [1e-3], metadata={"help": "Learning rates."})
    sweep_seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of tokens and order."})
    num_eval_pairs: int = field(
        default=64, metadata={"help": "The last so many pairs are not trained on, and what is reported is theirs."}
    )

    def __post_init__(self) -> None:
        for name, smallest in (("sweep_num_tokens", 1), ("sweep_seeds", 0)):
            values = getattr(self, name)
            are_whole = all(type(value) is int and value >= smallest for value in values)
            if not values or len(set(values)) < len(values) or not are_whole:
                raise ValueError(f"{name} must hold different whole numbers of at least {smallest}, got {values!r}")
        rates = self.sweep_learning_rates
        if not rates or len(set(rates)) < len(rates) or not all(0 < rate < math.inf for rate in rates):
            raise ValueError(f"sweep_learning_rates must hold different finite numbers above 0, got {rates!r}")
        if type(self.num_eval_pairs) is not int or self.num_eval_pairs < 1:
            raise ValueError(f"num_eval_pairs must be a whole number of at least 1, got {self.num_eval_pairs!r}")


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One training of a sweep.

    Attributes:
        num_robustness_tokens, learning_rate, seed: What distinguishes it.
        invariance_cosine, adversarial_cosine: Features with tokens of clean and of attacked held-out images, against
            those of the clean ones without.
        baseline_cosine: Features of attacked held-out images without tokens, likewise.
        train_invariance_cosine, train_adversarial_cosine: Mean over the last tenth of the steps, as logged.
        seconds_per_step: Of the training.
    """

    num_robustness_tokens: int
    learning_rate: float
    seed: int
    invariance_cosine: float
    adversarial_cosine: float
    baseline_cosine: float
    train_invariance_cosine: float
    train_adversarial_cosine: float
    seconds_per_step: float


def run_sweep(
    model: RobustnessTokenPreTrainedModel,
    args: RobustnessTokenTrainingArguments,
    dataset: Any,
    *,
    num_tokens: Sequence[int] = (1, 10, 20, 50),
    learning_rates: Sequence[float] = (1e-3,),
    seeds: Sequence[int] = (0, 1, 2),
    num_eval_pairs: int = 64,
) -> list[SweepRow]:
    """Trains every combination on the same pairs and the same base, which is loaded once.

    `args.output_dir` gets an adapter per combination, `sweep.csv`, `sweep.png`, and the pairs, where `dataset` is
    none. Run again, it goes on with what is not there yet; run with other combinations, it adds them to those that
    were trained on the same pairs by the same recipe. A combination ends with the tokens that
    `robtok train --dataset <pairs>` with its numbers gives, but for the pairs held out.

    Args:
        model: Gives its base and its settings. Its tokens are taken out: it is of no more use.
        args: Of every training, but for the number of tokens, the learning rate and the seed.
        dataset: Pairs, as [`RobustnessTokenTrainer`] takes them, or images, of which as many are attacked as the
            steps of a run take, and those held out: a random choice, by `args.seed`, of more.
        num_tokens, learning_rates, seeds: To combine.
        num_eval_pairs: The last so many pairs are held out and measured on.

    Returns:
        A row per combination, those of earlier sweeps too, in order. One that diverges is left out, with a warning,
        and its folder renamed to `<combination>.diverged`.

    Raises:
        ValueError: As [`RobustnessTokenTrainer`], or if there are too few pairs.
        FloatingPointError: If all diverge.
        ImportError: If matplotlib is missing.
    """
    sweep_args = SweepArguments(
        sweep_num_tokens=list(num_tokens),
        sweep_learning_rates=list(learning_rates),
        sweep_seeds=list(seeds),
        num_eval_pairs=num_eval_pairs,
    )
    if args.resume_from_checkpoint is not None:
        raise ValueError("resume_from_checkpoint belongs to one run: run the sweep again, it keeps what is finished")
    if args.eval_steps is not None:
        raise ValueError(
            "eval_steps has no meaning for a sweep, which measures on num_eval_pairs at the end: unset it"
        )
    if find_spec("matplotlib") is None:
        raise ImportError("the figure of a sweep needs matplotlib: pip install 'robustness-tokens[plots]'")
    accelerator = build_accelerator(args)
    folder = Path(args.output_dir)
    pairs, args = take_pairs(dataset, args=args, config=model.config)
    if not isinstance(pairs, AdversarialPairs):
        pairs = _attack(model, args, pairs, num_eval_pairs, num_processes=accelerator.num_processes)
        pairs, args = take_pairs(pairs, args=args, config=model.config)
    if len(pairs) <= num_eval_pairs:
        raise ValueError(
            f"num_eval_pairs={num_eval_pairs} of {len(pairs)} pairs leaves none to train on: make more, or hold out "
            "fewer"
        )
    num_train = len(pairs) - num_eval_pairs
    train_pairs, eval_pairs = pairs.select(range(num_train)), pairs.select(range(num_train, len(pairs)))

    template, model_class, image_processor = model.config, type(model), model.image_processor
    base = model.unload()
    wanted = [
        Combination(*values)
        for values in itertools.product(
            sweep_args.sweep_num_tokens, sweep_args.sweep_learning_rates, sweep_args.sweep_seeds
        )
    ]
    finished = share_from_main(
        lambda: find_finished(args, wanted, template, train_pairs, num_processes=accelerator.num_processes),
        accelerator,
    )
    rows: list[SweepRow] = []
    # What is finished comes first, so that the CSV is never without it for longer than it takes to measure.
    for combination in [*finished, *(one for one in wanted if one not in finished)]:
        with torch.random.fork_rng():
            torch.manual_seed(combination.seed)  # of the new tokens, as `robtok train` does
            member = model_class(config_of(template, combination.num_tokens), base)
        member.image_processor = image_processor
        member_args = arguments_of(args, combination)
        try:
            log = (
                read_finished(member, member_args)
                if combination in finished
                else _train(member, member_args, train_pairs)
            )
            row = _measure(member, member_args, eval_pairs, log, accelerator)
        except FloatingPointError as exc:
            share_from_main(partial(_put_aside, Path(member_args.output_dir), exc), accelerator)
            continue
        finally:
            base = member.unload()
        rows = sorted([*rows, row], key=dataclasses.astuple)
        if combination not in finished[:-1]:
            share_from_main(partial(_write, folder, rows), accelerator)
    if not rows:
        raise FloatingPointError(f"every training of the sweep diverged, see {folder}: lower sweep_learning_rates")
    return rows


def to_csv(rows: Sequence[SweepRow]) -> str:
    """The rows as comma-separated values, with a header."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [one.name for one in dataclasses.fields(SweepRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return file.getvalue()


def _attack(
    model: RobustnessTokenPreTrainedModel,
    args: RobustnessTokenTrainingArguments,
    dataset: Any,
    num_eval_pairs: int,
    *,
    num_processes: int,
) -> AdversarialPairs:
    """Pairs of as many images as a run sees when it sees none twice, and of those held out."""
    images_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps * num_processes
    pairs_args = dataclasses.replace(args, output_dir=str(Path(args.output_dir) / PAIRS_FOLDER))
    num_images = args.max_steps * images_per_step + num_eval_pairs
    return make_adversarial_pairs(model, pairs_args, dataset, num_images=num_images)


def _train(
    member: RobustnessTokenPreTrainedModel, args: RobustnessTokenTrainingArguments, pairs: AdversarialPairs
) -> list[dict[str, float]]:
    """Trains the model and saves its adapter; returns the log."""
    trainer = RobustnessTokenTrainer(member, args, pairs)
    trainer.train()
    trainer.save_model()
    return trainer.log_history


def _put_aside(folder: Path, reason: FloatingPointError) -> None:
    """Out of the way of a rerun, which would take an unfinished adapter for one to keep."""
    aside = folder.with_name(f"{folder.name}.diverged")
    logger.warning("The sweep goes on without %s, which is now %s: %s", folder.name, aside.name, reason)
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)


def _measure(
    member: RobustnessTokenPreTrainedModel,
    args: RobustnessTokenTrainingArguments,
    pairs: AdversarialPairs,
    log: Sequence[dict[str, float]],
    accelerator: Accelerator,
) -> SweepRow:
    normalizer = Normalizer(pairs.info.image_mean, pairs.info.image_std).to(accelerator.device)
    member.to(accelerator.device)
    measured = measure_held_out(member, pairs, args=args, accelerator=accelerator, normalizer=normalizer)
    last_tenth = [row for row in log if row["step"] > 0.9 * args.max_steps]
    first, last = log[0], log[-1]
    # The first step is slower than the others, where there are others.
    seconds, steps = last["seconds"] - first["seconds"], last["step"] - first["step"]
    row = SweepRow(
        num_robustness_tokens=member.config.num_robustness_tokens,
        learning_rate=args.learning_rate,
        seed=args.seed,
        invariance_cosine=measured["eval_invariance_cosine"],
        adversarial_cosine=measured["eval_adversarial_cosine"],
        baseline_cosine=measured["eval_baseline_cosine"],
        train_invariance_cosine=statistics.fmean(row["invariance_cosine"] for row in last_tenth),
        train_adversarial_cosine=statistics.fmean(row["adversarial_cosine"] for row in last_tenth),
        seconds_per_step=seconds / steps if steps else last["seconds"] / last["step"],
    )
    if not all(math.isfinite(value) for value in dataclasses.astuple(row)):
        raise FloatingPointError(f"what was measured on the pairs held out is not finite ({row})")
    return row


def _write(folder: Path, rows: Sequence[SweepRow]) -> None:
    write_text(folder / CSV_FILE, to_csv(rows))
    plot_sweep([dataclasses.asdict(row) for row in rows], folder / FIGURE_FILE)
