"""What `robtok evaluate` is told, and what it does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from ..data import load_image_dataset
from ..evaluation import EvaluationArguments, evaluate_robustness, training_figures
from ..models import ProbedModel, RobustnessTokenForImageClassification, RobustnessTokenModel, load_head
from ..report import RobustnessReport
from ..utils import process_state


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
