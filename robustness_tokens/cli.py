"""The command `robtok`: thin, every command a few calls of the library."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer

from . import __version__
from .data import load_image_dataset
from .hub import EVALUATION_FILE, fetch_adapter, read_config, read_json, read_tokens
from .modeling import RobustnessTokenForImageClassification, RobustnessTokenModel
from .preprocessing import processor_image_size
from .published_tokens import import_published_tokens
from .trainer import RobustnessTokenTrainer
from .training_args import DataArguments, ModelArguments, RobustnessTokenTrainingArguments, parse_arguments


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
    dataset = load_image_dataset(
        data_args.dataset, name=data_args.dataset_config, split=data_args.split, streaming=data_args.streaming
    )
    trainer = RobustnessTokenTrainer(model, training_args, dataset)
    trainer.train()
    trainer.save_model()


@app.command()
def info(
    adapter: AdapterArgument,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.")] = None,
) -> None:
    """Print what an adapter holds, without loading its base."""
    folder = fetch_adapter(adapter, revision=revision)
    config = read_config(folder)
    tokens = read_tokens(folder, config)
    rows = {
        "adapter": f"{adapter} (commit {folder.commit})" if folder.commit else adapter,
        "base": config.base_model_name_or_path,
        "base commit": config.base_model_revision or "none pinned (a folder)",
        "base class": config.base_model_class,
        "tokens": f"{config.num_robustness_tokens} of width {config.hidden_size}",
        "size": f"{sum(file.stat().st_size for file in folder.path.iterdir() if file.is_file()):,} bytes",
        "token norm": f"{torch.linalg.vector_norm(tokens, dim=1).mean():.3f} on average",
        "features": f"{config.feature_view}, cosine along the {config.similarity_axis} axis",
        "normalisation": f"mean {config.image_mean}, std {config.image_std}",
    }
    for name, value in rows.items():
        typer.echo(f"{name:<15}{value}")
    typer.echo(f"{'training':<15}" + ("" if config.training else "none: the tokens are untrained"))
    for name, value in (config.training or {}).items():
        typer.echo(f"  {name:<29}{value}")
    if (folder.path / EVALUATION_FILE).is_file():
        report = read_json(folder.path / EVALUATION_FILE)
        typer.echo(f"{'evaluation':<15}" + json.dumps(report, indent=2))


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
    except (ValueError, OSError, ImportError, FloatingPointError) as exc:
        typer.echo(f"robtok: {exc}", err=True)
        raise SystemExit(1) from exc
