"""The command `robtok`: thin, every command a few calls of the library."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from accelerate import PartialState
from huggingface_hub.errors import HTTPError

from ..data import processor_image_size
from ..evaluation import EvaluationArguments
from ..hub import (
    EVALUATION_FILE,
    load_adapter,
    push_adapter,
    push_adversarial_pairs,
    to_eval_results,
)
from ..models import RobustnessTokenForImageClassification, RobustnessTokenModel, import_published_tokens
from ..report import headline
from ..training import (
    PairsArguments,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    SweepArguments,
    make_adversarial_pairs,
    run_sweep,
    to_csv,
)
from ..utils import __version__
from .evaluate import run_evaluation
from .parsing import (
    DataArguments,
    ModelArguments,
    load_eval_dataset,
    load_train_dataset,
    parse_arguments,
    parse_groups,
)


app = typer.Typer(
    help="Adversarially robust vision transformers from a frozen backbone and a handful of learned input tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback(invoke_without_command=True)
def root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    """Adversarially robust vision transformers from a frozen backbone and a handful of learned input tokens."""
    if version:
        typer.echo(__version__)


_STATES = {True: "passed", False: "FAILED", None: "reported"}

AdapterArgument = Annotated[str, typer.Argument(help="Folder or Hub id of an adapter.", show_default=False)]


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def train(context: typer.Context) -> None:
    """Train tokens: robtok train [FILE.yaml] --base_model ... --dataset ... --output_dir ... (--help lists all)."""
    run_training(*parse_arguments(context.args, prog="robtok train"))


def run_training(
    model_args: ModelArguments, data_args: DataArguments, training_args: RobustnessTokenTrainingArguments
) -> None:
    """Trains new tokens on a base and saves the adapter in `training_args.output_dir`."""
    transformers.set_seed(training_args.seed)
    model = RobustnessTokenModel.from_base(model_args.base_model, **model_args.from_base_kwargs())
    trainer = RobustnessTokenTrainer(model, training_args, load_train_dataset(data_args), load_eval_dataset(data_args))
    trainer.train()
    trainer.save_model()
    trainer.accelerator.end_training()  # save_model has waited for the others


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def attack(context: typer.Context) -> None:
    """Attack images once, for many trainings: robtok attack [FILE.yaml] --base_model ... (--help lists all).

    Takes the arguments of robtok train, so that one file serves both; those of the optimiser have no effect.
    """
    groups = (ModelArguments, DataArguments, RobustnessTokenTrainingArguments, PairsArguments)
    model_args, data_args, training_args, pairs_args = parse_groups(context.args, groups, prog="robtok attack")
    model = RobustnessTokenModel.from_base(model_args.base_model, **model_args.from_base_kwargs())
    pairs = make_adversarial_pairs(
        model,
        training_args,
        load_train_dataset(data_args),
        num_images=pairs_args.num_images,
        images_per_shard=pairs_args.images_per_shard,
    )
    if not PartialState().is_main_process:
        return
    typer.echo(
        f"{len(pairs):,} pairs in {training_args.output_dir}, no pixel changed by more than "
        f"{pairs.info.max_pixel_difference}/255; they reveal no tokens, since the attack saw none"
    )
    if pairs_args.push_to_hub is not None:
        commit = push_adversarial_pairs(
            training_args.output_dir,
            pairs_args.push_to_hub,
            base_model_id=pairs_args.base_model_id,
            private=not pairs_args.public,
        )
        typer.echo(commit.commit_url)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def sweep(context: typer.Context) -> None:
    """Train many tokens on the same attacks: robtok sweep [FILE.yaml] --base_model ... (--help lists all)."""
    groups = (ModelArguments, DataArguments, RobustnessTokenTrainingArguments, SweepArguments)
    model_args, data_args, training_args, sweep_args = parse_groups(context.args, groups, prog="robtok sweep")
    if data_args.eval_dataset is not None:
        raise ValueError("eval_dataset has no meaning for a sweep, which holds out num_eval_pairs: leave it out")
    model = RobustnessTokenModel.from_base(model_args.base_model, **model_args.from_base_kwargs())
    rows = run_sweep(
        model,
        training_args,
        load_train_dataset(data_args),
        num_tokens=sweep_args.sweep_num_tokens,
        learning_rates=sweep_args.sweep_learning_rates,
        seeds=sweep_args.sweep_seeds,
        num_eval_pairs=sweep_args.num_eval_pairs,
    )
    if PartialState().is_main_process:
        typer.echo(to_csv(rows))


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []},
    add_help_option=False,
)
def evaluate(context: typer.Context, adapter: AdapterArgument) -> None:
    """Attack an adapter by all that an attacker may know: robtok evaluate ADAPTER --dataset ... --output_dir ..."""
    words = [adapter, *context.args] if adapter.startswith("-") else context.args  # as in robtok evaluate --help
    (args,) = parse_groups(words, (EvaluationArguments,), prog="robtok evaluate ADAPTER")
    report = run_evaluation(adapter, args)
    if PartialState().is_main_process:
        typer.echo(headline(report) or f"{len(report.results)} results")
        typer.echo(f"wrote {args.output_dir}/{EVALUATION_FILE} ({report.seconds:.0f} s)")


@app.command()
def info(
    adapter: AdapterArgument,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
    subfolder: Annotated[str, typer.Option(help="Folder inside the repo.")] = "",
) -> None:
    """Print what an adapter holds, without loading its base."""
    loaded = load_adapter(adapter, revision=revision, subfolder=subfolder)
    config = loaded.config
    rows = {
        "adapter": f"{adapter} (commit {loaded.commit})" if loaded.commit else adapter,
        "base": config.base_model_name_or_path,
        "base commit": config.base_model_revision or "none pinned",
        "base class": config.base_model_class,
        "tokens": f"{config.num_robustness_tokens} of width {config.hidden_size}",
        "size": f"{sum(file.stat().st_size for file in loaded.folder.iterdir() if file.is_file()):,} bytes",
        "token norm": f"{torch.linalg.vector_norm(loaded.tokens, dim=1).mean():.3f} on average",
        "features": f"{config.feature_view}, cosine along the {config.similarity_axis} axis",
        "normalisation": f"mean {config.image_mean}, std {config.image_std}",
    }
    for name, value in rows.items():
        typer.echo(f"{name:<15}{value}")
    typer.echo(f"{'training':<15}" + ("" if config.training else "none: the tokens are untrained"))
    for name, value in (config.training or {}).items():
        typer.echo(f"  {name:<29}{value}")
    if (report := loaded.report) is not None:
        typer.echo(f"{'evaluation':<15}" + (headline(report) or f"{len(report.results)} results"))
        for result in to_eval_results(report):
            typer.echo(f"  {result.metric_name}: {result.metric_value:.4g}")
        for check in report.checks:
            typer.echo(f"  check {check.number:<23}{check.name}: {_STATES[check.passed]}, {check.value}")


@app.command()
def import_tokens(
    file: Annotated[Path, typer.Argument(help="A .pt file that the paper's authors released.", show_default=False)],
    output_dir: Annotated[Path, typer.Argument(help="Folder of the adapter to write.", show_default=False)],
    base: Annotated[str, typer.Option(help="Hub id or folder of the base they belong to.", show_default=False)],
    overwrite_output_dir: Annotated[bool, typer.Option(help="Replace an adapter that is there.")] = False,
) -> None:
    """Make an adapter of tokens that the paper's authors released."""
    model = import_published_tokens(file, base, output_dir, overwrite=overwrite_output_dir)
    count, width = model.robustness_tokens.shape
    typer.echo(f"wrote {output_dir}: {count} tokens of width {width} for {base}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of the adapter.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="user/name on the Hub.", show_default=False)],
    public: Annotated[
        bool, typer.Option("--public", help="Let everyone read the tokens, and attack through them.")
    ] = False,
    base_model_id: Annotated[str | None, typer.Option(help="Hub id of the base, if it is a folder here.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch on the Hub.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    commit_message: Annotated[str, typer.Option(help="First line of the commit.")] = "Upload robustness tokens",
    tag: Annotated[list[str] | None, typer.Option(help="Another tag for the card; may be repeated.")] = None,
    subfolder: Annotated[str, typer.Option(help="Folder inside the repo.")] = "",
) -> None:
    """Upload an adapter to the Hub in one commit, to a private repo unless --public is said."""
    commit = push_adapter(
        folder,
        repo_id,
        base_model_id=base_model_id,
        private=not public,
        revision=revision,
        create_pr=create_pr,
        commit_message=commit_message,
        tags=tag or (),
        subfolder=subfolder,
    )
    typer.echo(commit.pr_url or commit.commit_url)


@app.command()
def merge(
    adapter: AdapterArgument,
    output_dir: Annotated[Path, typer.Argument(help="Folder of the plain model to write.", show_default=False)],
    image_size: Annotated[
        int | None, typer.Option(help="Side in pixels; what the image processor makes if not given.")
    ] = None,
    classifier: Annotated[bool, typer.Option(help="Keep the base's classification head.")] = False,
) -> None:
    """Turn base and tokens into a plain model with registers, which needs no add-on. It holds the tokens."""
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists and is no empty folder: choose another")
    model_class = RobustnessTokenForImageClassification if classifier else RobustnessTokenModel
    model = model_class.from_pretrained(adapter)
    # What its images will have: the config of a DINOv2 says 518 where its image processor makes 224.
    plain = model.merge_and_unload(image_size=image_size or processor_image_size(model.image_processor))
    plain.save_pretrained(output_dir)
    if model.image_processor is not None:
        model.image_processor.save_pretrained(output_dir)
    typer.echo(f"wrote {output_dir}: {type(plain).__name__}")


def main() -> None:
    """Runs `robtok`; a user's mistake ends with its message, not with a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    try:
        app()
    except (ValueError, OSError, ImportError, FloatingPointError, HTTPError) as exc:
        typer.echo(f"robtok: {exc}", err=True)
        raise SystemExit(1) from exc
