"""What an evaluation can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from ..models import MixedPrecision
from .evaluate import SWEEP_EPS
from .plan import BudgetName
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
