"""What `robtok evaluate` is told, and what it does."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from torch import nn

from ..acceleration import process_state
from ..dataset_loading import load_image_dataset
from ..modeling import RobustnessTokenForImageClassification, RobustnessTokenModel
from ..probe_heads import load_head
from ..probes import ProbedModel
from ..report.schema import RobustnessReport
from ..training_args import MixedPrecision
from .budgets import BudgetName
from .evaluate import SWEEP_EPS, evaluate_robustness
from .figures import training_figures
from .threat_models import Knowledge, Task


@dataclass(kw_only=True)
class EvaluationArguments:
    """The arguments of `robtok evaluate`; see [`evaluate_robustness`].

    Raises:
        ValueError: If a value is unknown.
    """

    dataset: str = field(metadata={"help": "Hub id, folder of images, or parquet file; images to attack."})
    output_dir: str = field(
        metadata={"help": "Folder for the report; what is finished is kept in it, and not run again."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the dataset on the Hub."})
    split: str = field(default="test", metadata={"help": "Split of the dataset."})
    attacker_dataset: str | None = field(
        default=None, metadata={"help": "Images that the attacker trains own tokens on; the evaluated ones if None."}
    )
    attacker_split: str = field(default="train", metadata={"help": "Split of attacker_dataset."})
    task: Task = field(
        default="features", metadata={"help": "features, or classification by the base's own head; see head."}
    )
    head: str | None = field(
        default=None, metadata={"help": "Folder of a probe's head to evaluate under: it says the task."}
    )
    surrogate: str | None = field(
        default=None, metadata={"help": "Adapter on another base, for transfer attacks; its tokens are not used."}
    )
    surrogate_head: str | None = field(default=None, metadata={"help": "Its head, where head is given."})
    base_model: str | None = field(default=None, metadata={"help": "Take the base from this folder or Hub id."})
    budget: BudgetName = field(
        default="quick", metadata={"help": "How many images, steps and attacks: quick, standard or full."}
    )
    knowledge: list[str] = field(
        default_factory=lambda: list(get_args(Knowledge)),
        metadata={"help": "What the attacker knows: none, base, own_tokens, full."},
    )
    attacks: list[str] | None = field(
        default=None, metadata={"help": "Names, such as cross_entropy feature_cosine:defended; the budget's if None."}
    )
    eps: list[float] | None = field(
        default=None, metadata={"help": "Budgets in pixel units, such as 4/255; that of the training, or 4/255."}
    )
    eps_sweep: list[float] = field(
        default_factory=lambda: list(SWEEP_EPS), metadata={"help": "Budgets in pixel units of the curve."}
    )
    num_images: int | None = field(default=None, metadata={"help": "Instead of the budget's."})
    num_steps: int | None = field(default=None, metadata={"help": "Of PGD, instead of the budget's."})
    num_restarts: int | None = field(
        default=None, metadata={"help": "Random starts of PGD and APGD, instead of the budget's."}
    )
    num_queries: int | None = field(default=None, metadata={"help": "Of Square, instead of the budget's."})
    num_own_tokens: int | None = field(
        default=None, metadata={"help": "Sets of tokens that the attacker trains, instead of the budget's."}
    )
    diagnostics: bool = field(
        default=True, metadata={"help": "Also run what the checks look at: more steps, restarts, an unbounded attack."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Side in pixels; the image processor's if None."})
    batch_size: int = field(default=100, metadata={"help": "Images attacked together."})
    seed: int = field(default=0, metadata={"help": "Of the choice of images and the attacks."})
    attack_precision: MixedPrecision | None = field(
        default=None, metadata={"help": "Of the attacks' forward passes: no or bf16; the training's if None."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    disable_tqdm: bool = field(default=False, metadata={"help": "No progress bars."})

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.knowledge) - set(get_args(Knowledge))):
            raise ValueError(f"knowledge must be among {get_args(Knowledge)}, got {unknown}")
        if self.head is None and self.task == "segmentation":
            raise ValueError('task="segmentation" needs head, the folder of a probe\'s head')
        if (self.surrogate_head is not None) != (self.surrogate is not None and self.head is not None):
            raise ValueError(
                "surrogate_head is for surrogate where head is given, and needed there, got "
                f"surrogate={self.surrogate!r}, head={self.head!r}, surrogate_head={self.surrogate_head!r}"
            )


def run_evaluation(adapter: str, args: EvaluationArguments) -> RobustnessReport:
    """Evaluates an adapter and writes the report to `args.output_dir`.

    Args:
        adapter: Folder or Hub id.
        args: Of the evaluation.

    Returns:
        The report.
    """
    image_loading: dict[str, Any] = {"name": args.dataset_config, "split": args.split}
    report = evaluate_robustness(
        _load_model(adapter, args, head=args.head, base_model=args.base_model),
        load_image_dataset(args.dataset, **image_loading),
        task=None if args.head is not None else args.task,
        knowledge=args.knowledge,  # type: ignore[arg-type]  # checked
        attacks=args.attacks,
        eps=args.eps,
        eps_sweep=args.eps_sweep,
        budget=args.budget,
        num_images=args.num_images,
        num_steps=args.num_steps,
        num_restarts=args.num_restarts,
        num_queries=args.num_queries,
        num_own_tokens=args.num_own_tokens,
        attacker_datasets=None
        if args.attacker_dataset is None
        else [load_image_dataset(args.attacker_dataset, split=args.attacker_split)],
        surrogate=None if args.surrogate is None else _load_model(args.surrogate, args, head=args.surrogate_head),
        diagnostics=args.diagnostics,
        seed=args.seed,
        batch_size=args.batch_size,
        output_dir=args.output_dir,
        image_size=args.image_size,
        attack_precision=args.attack_precision,
        # A report is published: what lies above a folder is nobody's business.
        dataset_name=Path(args.dataset).resolve().name if Path(args.dataset).exists() else args.dataset,
        disable_tqdm=args.disable_tqdm,
    )
    if process_state().is_main_process:
        report.figures |= training_figures(adapter)
        report.save(args.output_dir)
    return report


def _load_model(
    adapter: str, args: EvaluationArguments, *, head: str | None, base_model: str | None = None
) -> nn.Module:
    with_own_head = args.task == "classification" and head is None
    model_class = RobustnessTokenForImageClassification if with_own_head else RobustnessTokenModel
    model = model_class.from_pretrained(adapter, base_model=base_model, attn_implementation=args.attn_implementation)
    model.to(process_state().device)
    return model if head is None else ProbedModel(model, load_head(head))
