"""The commands of `robtok`, each a few calls of the library; `robtok.COMMANDS` describes them."""

from __future__ import annotations

import dataclasses
import logging
from argparse import BooleanOptionalAction
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from torch import nn

from robtok import printable

from ..data import load_image_dataset, processor_image_size
from ..evaluation import evaluate_robustness, training_figures
from ..hub import check_no_other_adapter, load_adapter, push_adapter, push_adversarial_pairs, to_eval_results
from ..models import (
    ProbedModel,
    RobustnessTokenForImageClassification,
    RobustnessTokenModel,
    RobustnessTokenPreTrainedModel,
    import_published_tokens,
    load_head,
)
from ..report import REPORT_FILE, RobustnessReport, headline
from ..training import (
    LOGITS_OBJECTIVES,
    PairsArguments,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    SweepArguments,
    make_adversarial_pairs,
    run_sweep,
    to_csv,
)
from ..utils import process_state
from .parsing import (
    TRAINING_GROUPS,
    CommandParser,
    DataArguments,
    EvaluationCommandArguments,
    ModelArguments,
    finish_training_arguments,
    load_eval_dataset,
    load_train_dataset,
)


class _LineFormatter(logging.Formatter):
    """Writes a log's message with the lines that this package put into it, each printable."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).splitlines()))


def _say(line: str) -> None:
    """Prints one line; parts of it may come from an adapter, a dataset or the Hub."""
    print(printable(line))


def train(
    model_args: ModelArguments, data_args: DataArguments, training_args: RobustnessTokenTrainingArguments
) -> None:
    finish_training_arguments(data_args, training_args)
    transformers.set_seed(training_args.seed)
    model = _new_model(model_args, training_args)
    trainer = RobustnessTokenTrainer(
        model,
        training_args,
        load_train_dataset(data_args),
        load_eval_dataset(data_args),
        head=None if model_args.head is None else load_head(model_args.head),
    )
    if trainer.accelerator.is_main_process:
        model.print_trainable_parameters()
    result = trainer.train()
    trainer.save_model()
    trainer.accelerator.print(f"trained for {result.global_step} steps, adapter in {training_args.output_dir}")
    trainer.accelerator.end_training()  # save_model has waited for the others


def _new_model(
    model_args: ModelArguments, training_args: RobustnessTokenTrainingArguments
) -> RobustnessTokenModel | RobustnessTokenForImageClassification:
    """Returns the base with new tokens; with its own head if the objective compares that head's predictions."""
    with_head = training_args.objective in LOGITS_OBJECTIVES and model_args.head is None
    model_class = RobustnessTokenForImageClassification if with_head else RobustnessTokenModel
    return model_class.from_base(model_args.base_model, **model_args.from_base_kwargs())


def _check_no_head(model_args: ModelArguments) -> None:
    if model_args.head is not None:
        raise ValueError("head can't be used for pairs, which are made through the base's own head: leave it out")


def attack(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: RobustnessTokenTrainingArguments,
    pairs_args: PairsArguments,
) -> None:
    _check_no_head(model_args)
    model = _new_model(model_args, training_args)
    pairs = make_adversarial_pairs(
        model,
        training_args,
        load_train_dataset(data_args),
        num_images=pairs_args.num_images,
        images_per_shard=pairs_args.images_per_shard,
    )
    if not process_state().is_main_process:
        return
    _say(
        f"{len(pairs):,} pairs in {training_args.output_dir}, no pixel changed by more than "
        f"{pairs.info.max_pixel_difference}/255; they reveal no tokens, since the attack did not use any"
    )
    if pairs_args.push_to_hub is not None:
        commit = push_adversarial_pairs(
            training_args.output_dir,
            pairs_args.push_to_hub,
            base_model_id=pairs_args.base_model_id,
            private=not pairs_args.public,
        )
        _say(commit.commit_url)


def sweep(
    model_args: ModelArguments,
    data_args: DataArguments,
    training_args: RobustnessTokenTrainingArguments,
    sweep_args: SweepArguments,
) -> None:
    if data_args.eval_dataset is not None:
        raise ValueError(
            "eval_dataset has no meaning for a sweep, which holds out num_eval_pairs of its pairs: leave it out"
        )
    _check_no_head(model_args)
    model = _new_model(model_args, training_args)
    rows = run_sweep(model, training_args, load_train_dataset(data_args), sweep_args)
    if process_state().is_main_process:
        for line in to_csv(rows).splitlines():
            _say(line)


def evaluate(args: EvaluationCommandArguments, *, adapter: str) -> RobustnessReport:
    name = args.dataset_name
    if name is None:
        # Reports are published, so only the last folder of a path is named.
        name = Path(args.dataset).resolve().name if Path(args.dataset).exists() else args.dataset
    attacker_datasets = None
    if args.attacker_dataset is not None:
        attacker_datasets = [load_image_dataset(args.attacker_dataset, split=args.attacker_split)]
    model = _load_model(adapter, args, head=args.head, base_model=args.base_model)
    measured = next(one for one in model.modules() if isinstance(one, RobustnessTokenPreTrainedModel))
    check_no_other_adapter(Path(args.output_dir), measured.learned_state())
    report = evaluate_robustness(
        model,
        load_image_dataset(args.dataset, name=args.dataset_config, split=args.split),
        dataclasses.replace(args, dataset_name=name, task=args.task if args.head is None else None),
        attacker_datasets=attacker_datasets,
        surrogate=None if args.surrogate is None else _load_model(args.surrogate, args, head=args.surrogate_head),
    )
    if process_state().is_main_process:
        report.figures |= training_figures(adapter)
        report.save(args.output_dir)
        _say(headline(report) or f"{len(report.results)} results")
        _say(f"wrote {args.output_dir}/{REPORT_FILE} ({report.seconds:.0f} s)")
    return report


def _is_classifier(adapter: str) -> bool:
    """Tells whether an adapter was trained as a classifier."""
    return RobustnessTokenForImageClassification.__name__ in (load_adapter(adapter).config.architectures or ())


def _load_model(
    adapter: str, args: EvaluationCommandArguments, *, head: str | None, base_model: str | None = None
) -> nn.Module:
    classifies = args.task == "classification" or (args.task is None and _is_classifier(adapter))
    with_own_head = classifies and head is None
    model_class = RobustnessTokenForImageClassification if with_own_head else RobustnessTokenModel
    model = model_class.from_pretrained(adapter, base_model=base_model, attn_implementation=args.attn_implementation)
    model.to(process_state().device)
    return model if head is None else ProbedModel(model, load_head(head))


_STATES = {True: "passed", False: "FAILED", None: "no verdict"}


def info(adapter: str, revision: str | None = None, subfolder: str = "") -> None:
    loaded = load_adapter(adapter, revision=revision, subfolder=subfolder)
    config = loaded.config
    rows = {
        "adapter": f"{adapter} (commit {loaded.commit})" if loaded.commit else adapter,
        "base": config.base_model_name_or_path,
        "base commit": config.base_model_revision or "none pinned",
        "base class": config.base_model_class,
        "learned": config.in_words,
        "size": f"{sum(file.stat().st_size for file in loaded.folder.iterdir() if file.is_file()):,} bytes",
        "parameters": f"{sum(tensor.numel() for tensor in loaded.state.values()):,}",
        "token norm": (
            f"{torch.linalg.vector_norm(loaded.tokens, dim=-1).mean():.3f} on average"
            if loaded.tokens.numel()
            else "-"
        ),
        "features": f"{config.feature_view}, cosine along the {config.similarity_axis} axis",
        "normalisation": f"mean {config.image_mean}, std {config.image_std}",
    }
    for name, value in rows.items():
        _say(f"{name:<15}{value}")
    _say(f"{'training':<15}" + ("" if config.training else "none: the tokens are untrained"))
    for name, value in (config.training or {}).items():
        _say(f"  {name:<29}{value}")
    report = loaded.report
    if report is None and (loaded.folder / REPORT_FILE).exists():
        _say(f"{'evaluation':<15}of another adapter, or by an older package: evaluate again")
    if report is not None:
        _say(f"{'evaluation':<15}" + (headline(report) or f"{len(report.results)} results"))
        for result in to_eval_results(report):
            _say(f"  {result.metric_name}: {result.metric_value:.4g}")
        for check in report.checks:
            _say(f"  check {check.number:<23}{check.name}: {_STATES[check.passed]}, {check.value}")


def import_tokens(file: Path, output_dir: Path, base: str, overwrite_output_dir: bool = False) -> None:
    model = import_published_tokens(file, base, output_dir, overwrite=overwrite_output_dir)
    count, width = model.robustness_tokens.shape
    _say(f"wrote {output_dir}: {count} tokens of width {width} for {base}")


def push(folder: Path, repo_id: str, *, public: bool, tag: Sequence[str], **kwargs: Any) -> None:
    commit = push_adapter(folder, repo_id, private=not public, tags=tag, **kwargs)
    _say(commit.pr_url or commit.commit_url)


def merge(adapter: str, output_dir: Path, image_size: int | None = None, classifier: bool = False) -> None:
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise ValueError(f"{output_dir} exists and is not an empty folder: choose another")
    model_class = RobustnessTokenForImageClassification if classifier else RobustnessTokenModel
    model = model_class.from_pretrained(adapter)
    if image_size is None and len(sides := set(processor_image_size(model.image_processor))) == 1:
        image_size = sides.pop()  # that images will have: DINOv2's config says 518, its image processor makes 224
    plain = model.merge_and_unload(image_size=image_size)
    plain.save_pretrained(output_dir)
    if model.image_processor is not None:
        model.image_processor.save_pretrained(output_dir)
    _say(f"wrote {output_dir}: {type(plain).__name__}")


def _add_adapter(parser: CommandParser) -> None:
    parser.add_argument("adapter", help="Folder or Hub id of an adapter.")


def _add_info(parser: CommandParser) -> None:
    _add_adapter(parser)
    parser.add_argument("--revision", help="Branch, tag or commit on the Hub; by default the main branch.")
    parser.add_argument("--subfolder", default="", help="Folder inside the repo; by default the repo itself.")


def _add_import_tokens(parser: CommandParser) -> None:
    parser.add_argument("file", type=Path, help="A .pt file that the paper's authors released.")
    parser.add_argument("output_dir", type=Path, help="Folder of the adapter to write.")
    parser.add_argument("--base", required=True, help="Hub id or folder of the base that the tokens were trained on.")
    parser.add_argument(
        "--overwrite_output_dir",
        action=BooleanOptionalAction,
        default=False,
        help="Replace the adapter in output_dir.",
    )


def _add_push(parser: CommandParser) -> None:
    parser.add_argument("folder", type=Path, help="Folder of the adapter.")
    parser.add_argument("repo_id", help="Repo on the Hub, user/name.")
    parser.add_argument("--public", action="store_true", help="Let everyone read the tokens and attack through them.")
    parser.add_argument("--base_model_id", help="Hub id of the base; by default the one in the config.")
    parser.add_argument("--revision", help="Branch on the Hub; by default the main branch.")
    parser.add_argument("--create_pr", action="store_true", help="Open a pull request instead of committing.")
    parser.add_argument("--commit_message", default="Upload robustness tokens", help="First line of the commit.")
    parser.add_argument("--tag", action="append", default=[], help="Extra tag for the card; can be repeated.")
    parser.add_argument("--subfolder", default="", help="Folder inside the repo; by default the repo itself.")


def _add_merge(parser: CommandParser) -> None:
    _add_adapter(parser)
    parser.add_argument("output_dir", type=Path, help="Folder of the plain model to write.")
    parser.add_argument(
        "--image_size", type=int, help="Side of the images in pixels; by default that of the image processor."
    )
    parser.add_argument(
        "--classifier", action=BooleanOptionalAction, default=False, help="Keep the base's classification head."
    )


class _Command(NamedTuple):
    """A command: called with an instance of each dataclass, and the values of the other arguments by name."""

    run: Callable[..., Any]
    groups: tuple[type, ...] = ()
    add_arguments: Callable[[CommandParser], None] | None = None


_COMMANDS = {
    "train": _Command(train, TRAINING_GROUPS),
    "attack": _Command(attack, (*TRAINING_GROUPS, PairsArguments)),
    "sweep": _Command(sweep, (*TRAINING_GROUPS, SweepArguments)),
    "evaluate": _Command(evaluate, (EvaluationCommandArguments,), _add_adapter),
    "info": _Command(info, (), _add_info),
    "import-tokens": _Command(import_tokens, (), _add_import_tokens),
    "push": _Command(push, (), _add_push),
    "merge": _Command(merge, (), _add_merge),
}


def build_parser(name: str, description: str | None = None) -> CommandParser:
    """Returns the parser of one command, such as `train`."""
    command = _COMMANDS[name]
    parser = CommandParser(command.groups, prog=f"robtok {name}", description=description)
    if command.add_arguments is not None:
        command.add_arguments(parser)
    return parser


def run_command(name: str, words: Sequence[str], description: str | None = None) -> None:
    """Runs one command of `robtok`; its errors propagate."""
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    groups, values = build_parser(name, description).parse(words)
    _COMMANDS[name].run(*groups, **values)
