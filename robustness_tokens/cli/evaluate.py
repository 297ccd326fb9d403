"""The command `robtok evaluate`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from torch import nn

from ..data import load_image_dataset
from ..evaluation import EvaluationArguments, evaluate_robustness, training_figures
from ..models import ProbedModel, RobustnessTokenForImageClassification, RobustnessTokenModel, load_head
from ..report import RobustnessReport
from ..utils import process_state


@dataclass(kw_only=True)
class EvaluationCommandArguments(EvaluationArguments):
    """The arguments of `robtok evaluate`: the settings of an evaluation, and where its models and images are.

    Raises:
        ValueError: If a value is unknown or out of range, or does not fit the others.
    """

    dataset: str = field(metadata={"help": "Hub id, folder of images, or parquet file of the images to attack."})
    output_dir: str = field(
        metadata={"help": "Folder for the report; it keeps finished parts too, which are not run again."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    split: str = field(default="test", metadata={"help": "Split of the dataset."})
    attacker_dataset: str | None = field(
        default=None,
        metadata={"help": "Images that the attacker trains own tokens on; by default the evaluated ones."},
    )
    attacker_split: str = field(default="train", metadata={"help": "Split of attacker_dataset."})
    head: str | None = field(
        default=None,
        metadata={"help": "Folder of a probe's head to evaluate under, which decides the task; none by default."},
    )
    surrogate: str | None = field(
        default=None,
        metadata={"help": "Adapter on another base for transfer attacks, whose tokens are not used; none by default."},
    )
    surrogate_head: str | None = field(
        default=None, metadata={"help": "Folder of the surrogate's head, needed where head is given."}
    )
    base_model: str | None = field(
        default=None, metadata={"help": "Folder or Hub id of the base; by default what the adapter names."}
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention of the base: eager, sdpa, flash_attention_2, ...; by default transformers'."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.head is None and self.task == "segmentation":
            raise ValueError('task="segmentation" needs head, the folder of a probe\'s head')
        if (self.surrogate_head is not None) != (self.surrogate is not None and self.head is not None):
            raise ValueError(
                "surrogate_head is for surrogate where head is given, and needed there, got "
                f"surrogate={self.surrogate!r}, head={self.head!r}, surrogate_head={self.surrogate_head!r}"
            )


def run_evaluation(adapter: str, args: EvaluationCommandArguments) -> RobustnessReport:
    """Evaluates an adapter, a folder or Hub id, and writes the report to `args.output_dir`."""
    name = args.dataset_name
    if name is None:
        # A report is published, so it does not name the folders above the dataset's.
        name = Path(args.dataset).resolve().name if Path(args.dataset).exists() else args.dataset
    attacker_datasets = None
    if args.attacker_dataset is not None:
        attacker_datasets = [load_image_dataset(args.attacker_dataset, split=args.attacker_split)]
    report = evaluate_robustness(
        _load_model(adapter, args, head=args.head, base_model=args.base_model),
        load_image_dataset(args.dataset, name=args.dataset_config, split=args.split),
        dataclasses.replace(args, dataset_name=name, task=args.task if args.head is None else None),
        attacker_datasets=attacker_datasets,
        surrogate=None if args.surrogate is None else _load_model(args.surrogate, args, head=args.surrogate_head),
    )
    if process_state().is_main_process:
        report.figures |= training_figures(adapter)
        report.save(args.output_dir)
    return report


def _load_model(
    adapter: str, args: EvaluationCommandArguments, *, head: str | None, base_model: str | None = None
) -> nn.Module:
    with_own_head = args.task == "classification" and head is None
    model_class = RobustnessTokenForImageClassification if with_own_head else RobustnessTokenModel
    model = model_class.from_pretrained(adapter, base_model=base_model, attn_implementation=args.attn_implementation)
    model.to(process_state().device)
    return model if head is None else ProbedModel(model, load_head(head))
