"""Trains many sets of tokens on the same pairs: the paper's ablation over their number, with learning rates, seeds."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import logging
import math
import shutil
import statistics
from collections.abc import Sequence
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
from ..utils import check_int, share_from_main, write_text
from .accelerator import build_accelerator
from .arguments import RobustnessTokenTrainingArguments
from .checkpoints import list_checkpoints
from .dataset import take_pairs
from .held_out import measure_held_out
from .make_pairs import make_adversarial_pairs
from .run_folder import LOG_FILE, read_log
from .trainer import RobustnessTokenTrainer


logger = logging.getLogger(__name__)

CSV_FILE, FIGURE_FILE, PAIRS_FOLDER = "sweep.csv", "sweep.png", "pairs"


class Combination(NamedTuple):
    """The settings in which one training of a sweep differs from the others."""

    num_tokens: int
    learning_rate: float
    seed: int

    @property
    def folder_name(self) -> str:
        """Name of its folder; different learning rates give different names."""
        return f"tokens-{self.num_tokens}_lr-{repr(self.learning_rate).removesuffix('.0')}_seed-{self.seed}"


@dataclass(kw_only=True)
class SweepArguments:
    """Grid of a sweep; the defaults are the paper's ablation over the number of tokens.

    Args:
        sweep_num_tokens: Numbers of tokens K, each at least 1.
        sweep_learning_rates: Learning rates of Adam, each above 0.
        sweep_seeds: Seeds of the initial tokens and of the order of the images, each at least 0.
        num_eval_pairs: Number of pairs held out from all trainings; the cosines in `sweep.csv` are measured on them.

    Raises:
        ValueError: If a list is empty or holds a value twice, or a value is out of range.
    """

    sweep_num_tokens: list[int] = field(
        default_factory=lambda: [1, 10, 20, 50], metadata={"help": "Numbers of tokens to train."}
    )
    sweep_learning_rates: list[float] = field(
        default_factory=lambda: [1e-3], metadata={"help": "Learning rates to train with."}
    )
    sweep_seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of the initial tokens and of the image order."}
    )
    num_eval_pairs: int = field(
        default=64, metadata={"help": "Number of pairs, the last ones, to hold out and measure the tokens on."}
    )

    def __post_init__(self) -> None:
        for name in ("sweep_num_tokens", "sweep_learning_rates", "sweep_seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name} must hold different values, at least one, got {values!r}")
            for value in values:
                if name != "sweep_learning_rates":
                    check_int(f"each of {name}", value, 1 if name == "sweep_num_tokens" else 0)
                elif not 0 < value < math.inf:
                    raise ValueError(f"{name} must hold finite numbers above 0, got {values!r}")
        check_int("num_eval_pairs", self.num_eval_pairs, 1)


@dataclass(frozen=True, kw_only=True)
class SweepRow:
    """One training of a sweep, as `sweep.csv` holds it; cosines are with the clean features without tokens."""

    num_robustness_tokens: int
    learning_rate: float
    seed: int
    invariance_cosine: float  # of clean held-out images, with tokens
    adversarial_cosine: float  # of attacked held-out images, with tokens
    baseline_cosine: float  # of attacked held-out images, without tokens
    train_invariance_cosine: float  # means over the last tenth of the training's steps
    train_adversarial_cosine: float
    seconds_per_step: float


def run_sweep(
    model: RobustnessTokenPreTrainedModel,
    args: RobustnessTokenTrainingArguments,
    dataset: Any,
    sweep_args: SweepArguments | None = None,
) -> list[SweepRow]:
    """Trains every combination of a grid on the same pairs and the same base, which is loaded once.

    `args.output_dir` gets a folder with an adapter per combination, `sweep.csv`, `sweep.png`, and the pairs if
    `dataset` holds images. A second run trains what is missing and keeps what was trained on the same pairs by the
    same recipe, combinations outside the grid included. Each combination gets the tokens that `robtok train` gives
    on the same pairs without those held out.

    Args:
        model: Gives the base and its settings. Its tokens are removed: do not use it afterwards.
        args: Arguments of every training, apart from the number of tokens, the learning rate and the seed.
        dataset: Pairs, as [`RobustnessTokenTrainer`] takes them, or images. Of images, `args.seed` chooses as many as
            one run sees, plus the held-out ones, and these are attacked.
        sweep_args: The grid; the paper's if None.

    Returns:
        A row per combination, those of earlier runs included, sorted. A combination that diverges has none: a warning
        names it, and its folder is renamed to `<combination>.diverged`.

    Raises:
        ValueError: As [`RobustnessTokenTrainer`], or if there are too few pairs.
        FloatingPointError: If all combinations diverge.
        ImportError: If matplotlib is missing.
    """
    grid, folder = sweep_args or SweepArguments(), Path(args.output_dir)
    if args.resume_from_checkpoint is not None:
        raise ValueError("resume_from_checkpoint belongs to one run: run the sweep again, it keeps what is finished")
    if args.eval_steps is not None:
        raise ValueError(
            "eval_steps has no meaning for a sweep, which measures on num_eval_pairs at the end: unset it"
        )
    if find_spec("matplotlib") is None:
        raise ImportError("the figure of a sweep needs matplotlib: pip install 'robustness-tokens[plots]'")
    accelerator = build_accelerator(args)
    pairs, args = take_pairs(dataset, args=args, config=model.config)
    if not isinstance(pairs, AdversarialPairs):
        images_per_step = args.per_device_train_batch_size * args.gradient_accumulation_steps
        num_images = args.max_steps * images_per_step * accelerator.num_processes + grid.num_eval_pairs
        pairs_args = dataclasses.replace(args, output_dir=str(folder / PAIRS_FOLDER))
        pairs = make_adversarial_pairs(model, pairs_args, pairs, num_images=num_images)
        pairs, args = take_pairs(pairs, args=args, config=model.config)
    num_train = len(pairs) - grid.num_eval_pairs
    if num_train < 1:
        raise ValueError(
            f"num_eval_pairs={grid.num_eval_pairs} of {len(pairs)} pairs leaves none to train on: make more pairs, or "
            "hold out fewer"
        )
    train_pairs, eval_pairs = pairs.select(range(num_train)), pairs.select(range(num_train, len(pairs)))

    template, model_class, image_processor = model.config, type(model), model.image_processor
    base = model.unload()
    wanted = [
        Combination(*values)
        for values in itertools.product(grid.sweep_num_tokens, grid.sweep_learning_rates, grid.sweep_seeds)
    ]
    finished = share_from_main(
        lambda: _find_finished(args, wanted, template, train_pairs, accelerator.num_processes), accelerator
    )
    rows: list[SweepRow] = []
    # Finished ones come first, and the CSV is written once all of them are measured: a killed rerun loses no row.
    for combination in [*finished, *(one for one in wanted if one not in finished)]:
        with torch.random.fork_rng():
            torch.manual_seed(combination.seed)  # for the new tokens, as `robtok train` does
            member = model_class(_config_of(template, combination), base)
        member.image_processor = image_processor
        member_args = _arguments_of(args, combination)
        try:
            if combination in finished:
                with torch.no_grad():
                    member.robustness_tokens.copy_(load_adapter(member_args.output_dir).tokens)
            else:
                trainer = RobustnessTokenTrainer(member, member_args, train_pairs)
                trainer.train()
                trainer.save_model()
            rows.append(_measure(member, member_args, eval_pairs, accelerator))
        except FloatingPointError as exc:
            share_from_main(partial(_put_aside, Path(member_args.output_dir), exc), accelerator)
            continue
        finally:
            base = member.unload()
        rows.sort(key=dataclasses.astuple)
        if combination not in finished[:-1]:
            share_from_main(partial(_write, folder, rows), accelerator)
    if not rows:
        raise FloatingPointError(f"every training of the sweep diverged, see {folder}: lower sweep_learning_rates")
    return rows


def to_csv(rows: Sequence[SweepRow]) -> str:
    """Returns the rows as comma-separated values, with a header."""
    file = io.StringIO()
    writer = csv.DictWriter(file, [one.name for one in dataclasses.fields(SweepRow)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(dataclasses.asdict(row) for row in rows)
    return file.getvalue()


def _config_of(template: RobustnessTokenConfig, combination: Combination) -> RobustnessTokenConfig:
    values = {**template.to_dict(), "num_robustness_tokens": combination.num_tokens, "training": {}}
    config: RobustnessTokenConfig = RobustnessTokenConfig.from_dict(values)
    return config


def _arguments_of(
    args: RobustnessTokenTrainingArguments, combination: Combination
) -> RobustnessTokenTrainingArguments:
    """Returns the arguments of one training, which goes on from its last checkpoint (SIGTERM leaves one too)."""
    _, learning_rate, seed = combination
    folder = Path(args.output_dir) / combination.folder_name
    resume = True if list_checkpoints(folder) and not args.overwrite_output_dir else None
    changed: dict[str, Any] = {"learning_rate": learning_rate, "seed": seed, "resume_from_checkpoint": resume}
    return dataclasses.replace(args, output_dir=str(folder), **changed)


def _find_finished(
    args: RobustnessTokenTrainingArguments,
    wanted: Sequence[Combination],
    template: RobustnessTokenConfig,
    pairs: AdversarialPairs,
    num_processes: int,
) -> list[Combination]:
    """Returns what needs no training, combinations of earlier sweeps first; warns of those that differ."""
    images = prepare_images(pairs)
    known = {
        "num_processes": num_processes,  # on which the images of a step depend
        "image_size": images.image_size,
        "dataset": images.description,
        "num_steps_done": args.max_steps,
    }
    earlier = []
    for path in sorted(Path(args.output_dir).glob("tokens-*_lr-*_seed-*")):
        if holds_adapter(path):
            config = read_config(path)
            training = {"learning_rate": None, "seed": None, **(config.training or {})}
            found = Combination(config.num_robustness_tokens, training["learning_rate"], training["seed"])
            earlier += [found] if found.folder_name == path.name and found not in wanted else []
    candidates = earlier if args.overwrite_output_dir else [*earlier, *wanted]
    finished = [one for one in candidates if _is_finished(_arguments_of(args, one), _config_of(template, one), known)]
    if left_out := [one.folder_name for one in earlier if one not in finished]:
        logger.warning("The sweep leaves out members of other pairs or another recipe: %s", ", ".join(left_out))
    return finished


def _is_finished(args: RobustnessTokenTrainingArguments, config: RobustnessTokenConfig, known: dict[str, Any]) -> bool:
    """Tells whether a folder holds exactly the tokens that this training would give, and its whole log."""
    folder = Path(args.output_dir)
    log = read_log(folder / LOG_FILE, last_step=args.max_steps)
    if not holds_adapter(folder) or not log or log[-1]["step"] != args.max_steps:
        return False
    found, expected = read_config(folder).to_dict(), config.to_dict() | {"training": {**args.recipe(), **known}}
    names = ("base_model_fingerprint", "num_robustness_tokens", "feature_view", "similarity_axis", "initializer_range")
    return all(found[name] == expected[name] for name in (*names, "image_mean", "image_std", "training"))


def _put_aside(folder: Path, reason: FloatingPointError) -> None:
    """Renames a diverged run, since a rerun would refuse its unfinished adapter."""
    aside = folder.with_name(f"{folder.name}.diverged")
    logger.warning("The sweep goes on without %s, which is now %s: %s", folder.name, aside.name, reason)
    if aside.exists():
        shutil.rmtree(aside)
    folder.rename(aside)


def _measure(
    member: RobustnessTokenPreTrainedModel,
    args: RobustnessTokenTrainingArguments,
    pairs: AdversarialPairs,
    accelerator: Accelerator,
) -> SweepRow:
    normalizer = Normalizer(pairs.info.image_mean, pairs.info.image_std).to(accelerator.device)
    member.to(accelerator.device)
    measured = measure_held_out(member, pairs, args=args, accelerator=accelerator, normalizer=normalizer)
    log = read_log(Path(args.output_dir) / LOG_FILE, last_step=args.max_steps)
    last_tenth = [row for row in log if row["step"] > 0.9 * args.max_steps]
    first, last = log[0], log[-1]
    # The first step is slower than the others, where there are others.
    seconds, steps = last["seconds"] - first["seconds"], last["step"] - first["step"]
    row = SweepRow(
        num_robustness_tokens=member.config.num_robustness_tokens,
        learning_rate=args.learning_rate,
        seed=args.seed,
        **{name: measured[f"eval_{name}"] for name in ("invariance_cosine", "adversarial_cosine", "baseline_cosine")},
        train_invariance_cosine=statistics.fmean(row["invariance_cosine"] for row in last_tenth),
        train_adversarial_cosine=statistics.fmean(row["adversarial_cosine"] for row in last_tenth),
        seconds_per_step=seconds / steps if steps else last["seconds"] / last["step"],
    )
    if not all(math.isfinite(value) for value in dataclasses.astuple(row)):
        raise FloatingPointError(f"the cosines on the held-out pairs are not finite ({row})")
    return row


def _write(folder: Path, rows: Sequence[SweepRow]) -> None:
    write_text(folder / CSV_FILE, to_csv(rows))
    plot_sweep([dataclasses.asdict(row) for row in rows], folder / FIGURE_FILE)
