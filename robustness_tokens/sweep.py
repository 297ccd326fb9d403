"""The paper's ablation over the number of tokens, with learning rates and seeds: attacked once, trained many times."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from .acceleration import build_accelerator
from .adversarial_pairs import AdversarialPairs
from .attack_once import make_adversarial_pairs
from .configuration import RobustnessTokenConfig
from .files import write_text
from .held_out import measure_held_out
from .hub import AdapterFolder, holds_adapter, read_config, read_tokens
from .modeling import RobustnessTokenPreTrainedModel
from .plots import plot_sweep
from .preprocessing import Normalizer
from .trainer import RobustnessTokenTrainer
from .training_args import RobustnessTokenTrainingArguments
from .training_data import describe_dataset, take_pairs
from .training_log import LOG_FILE, read_log


CSV_FILE = "sweep.csv"
FIGURE_FILE = "sweep.png"
PAIRS_FOLDER = "pairs"


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
        for name, smallest in (("sweep_num_tokens", 1), ("sweep_learning_rates", 0), ("sweep_seeds", 0)):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values) or min(values) < smallest:
                raise ValueError(f"{name} must hold different numbers of at least {smallest}, got {values!r}")
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
    none. Run again, it goes on with what is not there yet. A combination ends with the tokens that
    `robtok train --dataset <pairs>` with its numbers gives, but for the pairs held out.

    Args:
        model: Gives its base and its settings. Its tokens are taken out: it is of no more use.
        args: Of every training, but for the number of tokens, the learning rate and the seed.
        dataset: Pairs, as [`RobustnessTokenTrainer`] takes them, or images, of which as many are attacked as the
            steps of a run take, and those held out.
        num_tokens, learning_rates, seeds: To combine.
        num_eval_pairs: The last so many pairs are held out and measured on.

    Returns:
        A row per combination.

    Raises:
        ValueError: As [`RobustnessTokenTrainer`], or if there are too few pairs.
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
    folder = Path(args.output_dir)
    pairs, args = take_pairs(dataset, args=args, config=model.config)
    if not isinstance(pairs, AdversarialPairs):
        pairs = _attack(model, args, pairs, num_eval_pairs)
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
    rows: list[SweepRow] = []
    combinations = itertools.product(
        sweep_args.sweep_num_tokens, sweep_args.sweep_learning_rates, sweep_args.sweep_seeds
    )
    for count, learning_rate, seed in combinations:
        with torch.random.fork_rng():
            torch.manual_seed(seed)  # of the new tokens, as `robtok train` does
            member = model_class(_config_of(template, count), base)
        member.image_processor = image_processor
        member_folder = folder / f"tokens-{count}_lr-{learning_rate:g}_seed-{seed}"
        member_args = dataclasses.replace(
            args,
            output_dir=str(member_folder),
            learning_rate=learning_rate,
            seed=seed,
            resume_from_checkpoint=True if args.save_steps and not args.overwrite_output_dir else None,
        )
        rows.append(_train(member, member_args, train_pairs, eval_pairs))
        base = member.unload()
        if PartialState().is_main_process:
            write_text(folder / CSV_FILE, to_csv(rows))
            plot_sweep([dataclasses.asdict(row) for row in rows], folder / FIGURE_FILE)
    return rows


def to_csv(rows: Sequence[SweepRow]) -> str:
    """The rows as comma-separated values, with a header."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [one.name for one in dataclasses.fields(SweepRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return file.getvalue()


def _attack(
    model: RobustnessTokenPreTrainedModel, args: RobustnessTokenTrainingArguments, dataset: Any, num_eval_pairs: int
) -> AdversarialPairs:
    """Pairs of as many images as a run sees when it sees none twice, and of those held out."""
    images_per_step = (
        args.per_device_train_batch_size * args.gradient_accumulation_steps * PartialState().num_processes
    )
    pairs_args = dataclasses.replace(args, output_dir=str(Path(args.output_dir) / PAIRS_FOLDER))
    num_images = args.max_steps * images_per_step + num_eval_pairs
    return make_adversarial_pairs(model, pairs_args, dataset, num_images=num_images)


def _config_of(template: RobustnessTokenConfig, num_tokens: int) -> RobustnessTokenConfig:
    values = {**template.to_dict(), "num_robustness_tokens": num_tokens, "training": {}}
    config: RobustnessTokenConfig = RobustnessTokenConfig.from_dict(values)
    return config


def _train(
    member: RobustnessTokenPreTrainedModel,
    args: RobustnessTokenTrainingArguments,
    train_pairs: AdversarialPairs,
    eval_pairs: AdversarialPairs,
) -> SweepRow:
    """Trains one combination, unless that was done before, and measures it."""
    folder = AdapterFolder(Path(args.output_dir), from_hub=False)
    accelerator = build_accelerator(args)
    if _is_finished(folder, member.config, args, train_pairs):
        with torch.no_grad():
            member.robustness_tokens.copy_(read_tokens(folder, member.config))
        member.to(accelerator.device)
        log = read_log(folder.path / LOG_FILE, last_step=args.max_steps)
    else:
        trainer = RobustnessTokenTrainer(member, args, train_pairs)
        trainer.train()
        trainer.save_model()
        log = trainer.log_history
    normalizer = Normalizer(train_pairs.info.image_mean, train_pairs.info.image_std).to(accelerator.device)
    measured = measure_held_out(member, eval_pairs, args=args, accelerator=accelerator, normalizer=normalizer)
    last_tenth = [row for row in log if row["step"] > 0.9 * args.max_steps]
    first, last = log[0], log[-1]
    # The first step is slower than the others, where there are others.
    seconds, steps = last["seconds"] - first["seconds"], last["step"] - first["step"]
    return SweepRow(
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


def _is_finished(
    folder: AdapterFolder,
    config: RobustnessTokenConfig,
    args: RobustnessTokenTrainingArguments,
    pairs: AdversarialPairs,
) -> bool:
    """Whether the folder holds the tokens that this training would give."""
    if args.overwrite_output_dir or not holds_adapter(folder.path) or not (folder.path / LOG_FILE).is_file():
        return False
    stored = read_config(folder)
    expected = {**args.recipe(), "num_steps_done": args.max_steps, "dataset": describe_dataset(pairs)}
    del expected["image_size"]  # which is the pairs' own, and not an argument
    trained = stored.training or {}
    return (
        stored.base_model_fingerprint == config.base_model_fingerprint
        and stored.num_robustness_tokens == config.num_robustness_tokens
        and stored.similarity_axis == config.similarity_axis
        and stored.initializer_range == config.initializer_range
        and all(trained.get(name) == value for name, value in expected.items())
    )
