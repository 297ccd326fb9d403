"""One measurement each: an attack through a model that the attacker holds, at an eps; stored and found again."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ..models import packed_once
from ..utils import process_state, share_from_main, write_bytes
from .attack_suite import Attack, AttackBatch, run_attack
from .outcomes import Outcome, measure_outcome
from .threat_models import AttackerView, EvaluatedModel


logger = logging.getLogger(__name__)

FORMAT = 5
"""Of the files: those of another are not looked for."""

Series = Literal["suite", "published", "sweep", "steps", "restarts", "single_step", "unbounded"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A measurement to make.

    Attributes:
        series: What it belongs to: the suite of attacks, the published attack, the sweep over eps, or a series that
            a check looks at.
        view: What the attacker holds.
        attack: Which.
        eps: Budget in pixel units.
        num_images: The first so many of the evaluation's images.
        standing_only: Of these attack those alone that are still right, see
            [`~robustness_tokens.evaluation.cells.find_standing`]: all that the worst
            case of an accuracy needs.
    """

    series: Series
    view: AttackerView
    attack: Attack
    eps: float
    num_images: int
    standing_only: bool = False

    @property
    def name(self) -> str:
        target = f"-{self.attack.target}" if self.attack.target else ""
        return f"{self.series}-{self.view.name}-{self.attack.name}{target}-eps{255 * self.eps:g}"

    def is_beside(self, other: Cell) -> bool:
        """Whether both belong to one worst case: of a level, at an eps."""
        return (self.series, self.view.knowledge, self.eps) == (other.series, other.view.knowledge, other.eps)

    @property
    def cost(self) -> int:
        """Forward and backward passes of an image, roughly; a forward alone is a third."""
        attack = self.attack
        passes = (attack.num_steps or 1) * (attack.num_restarts or 1) * (attack.num_target_classes or 1)
        if attack.name == "auto_attack":
            passes = 1000  # far more for an image that holds, far fewer for one that falls at once
        passes = max(passes, (attack.num_queries or 0) // 3, (attack.num_draws or 0) // 3)
        return self.num_images * (passes * len(self.view.tokens) + 1)

    def settings(self) -> dict[str, Any]:
        """What the outcome depends on, beside what all cells of an evaluation have in common; JSON values."""
        return {
            "series": self.series,
            "view": self.view.name,
            "tokens": [None if tokens is None else digest([tokens]) for tokens in self.view.tokens],
            "attack": self.attack.name,
            "parameters": self.attack.parameters(),
            "eps": self.eps,
            "num_images": self.num_images,
            "standing_only": self.standing_only,
            "surrogate": model_settings(self.view.model) if self.view.is_surrogate else None,
        }


def model_settings(model: EvaluatedModel) -> dict[str, Any]:
    """What tells a model from others, and how it is attacked; JSON values."""
    return {
        "weights": digest([value for _, value in sorted(model.model.state_dict().items())]),
        "normalizer": repr(model.normalizer.image_mean.tolist() + model.normalizer.image_std.tolist()),
        "task": model.task,
        "features": [model.feature_view, model.similarity_axis],
        "attack_precision": model.attack_precision,
    }


def digest(tensors: Sequence[Tensor]) -> str:
    """sha256 over shapes, dtypes and bytes."""
    sha = hashlib.sha256()
    for tensor in tensors:
        tensor = tensor.detach().cpu().contiguous()
        sha.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


class CellStore:
    """Finished cells in a folder, each whole or not there.

    Args:
        folder: Made if needed; `None` stores nothing.
        settings: What all cells of the evaluation have in common; a cell that was measured with others is not found.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, dict(settings)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def load(self, cell: Cell, standing: Tensor | None = None) -> dict[str, Tensor] | None:
        """The outcome of a cell that was measured before with the same settings, or `None`.

        A file that is damaged, as a crash or a full disk may leave it, counts as missing, and a warning says so.

        Args:
            cell: To look for.
            standing: (n,) bool, the images that it attacks, where it attacks some alone: others, other outcome.

        Raises:
            ValueError: If the file is whole, and another cell's.
        """
        path, key = self._path(cell, standing), self._key(cell, standing)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                outcome = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            if metadata.get("digest") != _digest(outcome):
                raise ValueError("its numbers are not those that were written")
        except (SafetensorError, ValueError, KeyError, OverflowError) as exc:
            if process_state().is_main_process:
                logger.warning("%s is damaged, so it is measured again and replaced: %s", path, exc)
            return None
        if metadata.get("key") != key:
            raise ValueError(f"{path} was measured with other settings than its name says: delete it")
        return outcome

    def save(self, cell: Cell, outcome: Mapping[str, Tensor], standing: Tensor | None = None) -> None:
        """Stores an outcome, from the main process; arguments as for [`load`]."""
        path = self._path(cell, standing)
        if path is not None:
            metadata = {"key": self._key(cell, standing), "digest": _digest(outcome)}
            write_bytes(path, save({k: v.contiguous() for k, v in outcome.items()}, metadata=metadata))

    def _key(self, cell: Cell, standing: Tensor | None) -> str:
        settings = {"format": FORMAT, **self.settings, **cell.settings()}
        if standing is not None:
            settings["standing"] = digest([standing])
        return json.dumps(settings, sort_keys=True)

    def _path(self, cell: Cell, standing: Tensor | None) -> Path | None:
        if self.folder is None:
            return None
        sha = hashlib.sha256(self._key(cell, standing).encode()).hexdigest()[:16]
        return self.folder / f"{cell.name}-{sha}.safetensors"


def _digest(outcome: Mapping[str, Tensor]) -> str:
    """Of the values, by their names; the format itself has no checksum."""
    return hashlib.sha256(
        "".join(f"{name}={digest([outcome[name]])};" for name in sorted(outcome)).encode()
    ).hexdigest()


def run_cells(
    cells: Sequence[Cell],
    model: EvaluatedModel,
    batches: Mapping[int, AttackBatch],
    tokens: Mapping[str, Tensor | None],
    clean: Outcome,
    *,
    batch_size: int,
    seed: int,
    store: CellStore,
    disable_tqdm: bool = False,
) -> list[dict[str, Tensor]]:
    """Runs the cells that are not stored; all processes call it, each with its own batches.

    A batch is the same images whatever the number of processes, so the outcome doesn't depend on it. A cell that
    attacks some of the images as one before it attacked more of them takes its outcome from there.

    Args:
        cells: To run.
        model: The defended model.
        batches: Of this process, by their number: batch b holds the images from b * batch_size on.
        tokens: By name, the tokens to measure with.
        clean: Outcome on all images of all processes, before any attack.
        batch_size: Images per batch; the last may have fewer.
        seed: Of the attacks' noise.
        store: Of finished cells.
        disable_tqdm: No progress bar.

    Returns:
        The outcome of each cell, of all processes together, in the order of the images. A cell that attacks some of
        them alone leaves the others as they were, and `attacked` says which it did.
    """
    state = process_state()
    outcomes: list[dict[str, Tensor]] = []
    with (
        packed_once(),
        tqdm(
            total=sum(cell.cost for cell in cells),
            desc="Attacking",
            unit="pass",
            unit_scale=True,
            disable=disable_tqdm or not state.is_local_main_process,
        ) as progress_bar,
    ):
        for row, cell in enumerate(cells):
            other = _find_covering(cells[:row], cell, tokens)
            if other is not None:
                outcomes.append(_first_rows(outcomes[other], cell, tokens))
                progress_bar.total -= cell.cost  # so that it isn't taken for speed
                continue
            measured_with = _measured_with(cell, tokens)
            standing = find_standing(cell, cells[:row], outcomes, clean, measured_with) if cell.standing_only else None
            stored = store.load(cell, standing)
            # A process may see a file that another doesn't see yet.
            if all(gather_object([stored is not None])):
                assert stored is not None
                outcomes.append(stored)
                progress_bar.total -= cell.cost
                continue
            progress_bar.set_postfix_str(cell.name, refresh=True)
            cost = cell.cost if standing is None else int(cell.cost * standing.sum()) // cell.num_images
            progress_bar.total -= cell.cost - cost
            mine, counted = [], 0
            for number, batch in batches.items():
                first = number * batch_size
                count = min(len(batch.images), cell.num_images - first)
                if count <= 0:
                    continue
                before = {name: clean[name][first : first + count] for name in clean}
                rows = torch.arange(count) if standing is None else standing[first : first + count].nonzero()[:, 0]
                attacked = {name: tokens[name] for name in measured_with}
                mine.append((number, _attack_rows(cell, model, batch.first(count), rows, attacked, before, seed=seed)))
                # The others do as much meanwhile.
                share = min(cost * count * state.num_processes // cell.num_images, cost - counted)
                counted += share
                progress_bar.update(share)
            progress_bar.update(cost - counted)
            outcome = merge(gather_object(mine))
            share_from_main(functools.partial(store.save, cell, outcome, standing), state)
            outcomes.append(outcome)
    return outcomes


def find_standing(
    cell: Cell, before: Sequence[Cell], outcomes: Sequence[Outcome], clean: Outcome, tokens: Sequence[str]
) -> Tensor:
    """The images that a classifier gets right, clean and after every attack before this one at its level and eps.

    Args:
        cell: That is to attack.
        before: The cells before it.
        outcomes: Of these.
        clean: Outcome before any attack.
        tokens: Names of the tokens to measure with: an image stands if it does with any of these.

    Returns:
        (n,) bool, for the cell's images.
    """
    earlier = [outcome for other, outcome in zip(before, outcomes, strict=True) if other.is_beside(cell)]
    right = [
        torch.stack([outcome[f"{name}.correct"][: cell.num_images] for outcome in (clean, *earlier)]).all(dim=0)
        for name in tokens
    ]
    return torch.stack(right).any(dim=0)


def _attack_rows(
    cell: Cell,
    model: EvaluatedModel,
    batch: AttackBatch,
    rows: Tensor,
    tokens: Mapping[str, Tensor | None],
    clean: Outcome,
    *,
    seed: int,
) -> dict[str, Tensor]:
    """The outcome on a batch of which these rows are attacked, and the others are as they were."""
    if len(rows) == len(batch.images):
        adversarial = run_attack(cell.attack, cell.view, batch, eps=cell.eps, seed=seed)
        outcome = measure_outcome(model, batch, adversarial, tokens)
    else:
        outcome = {
            name: value.clone() for name, value in clean.items() if "." not in name or name.partition(".")[0] in tokens
        }
        if len(rows):
            part = batch.select(rows)
            adversarial = run_attack(cell.attack, cell.view, part, eps=cell.eps, seed=seed)
            for name, value in measure_outcome(model, part, adversarial, tokens).items():
                outcome[name][rows] = value
    if cell.standing_only:
        # A worst case of the cosine is of all images, right or wrong.
        outcome = {name: value for name, value in outcome.items() if not name.endswith(".cosine")}
        outcome["attacked"] = torch.zeros(len(batch.images), dtype=torch.bool).index_fill(0, rows, True)
    return outcome


def _find_covering(cells: Sequence[Cell], cell: Cell, tokens: Mapping[str, Tensor | None]) -> int | None:
    """The row of a cell whose outcome holds that of another cell, if there is one."""
    wanted = set(_measured_with(cell, tokens))
    for row, other in enumerate(cells):
        same = (other.view.name, other.attack, other.eps) == (cell.view.name, cell.attack, cell.eps)
        same &= not (other.standing_only or cell.standing_only)
        if same and other.num_images >= cell.num_images and wanted <= set(_measured_with(other, tokens)):
            return row
    return None


def _first_rows(outcome: Mapping[str, Tensor], cell: Cell, tokens: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
    """Of the outcome of a cell that covers another, what the other would have measured."""
    others = set(tokens) - set(_measured_with(cell, tokens))
    return {name: value[: cell.num_images] for name, value in outcome.items() if name.partition(".")[0] not in others}


def _measured_with(cell: Cell, tokens: Mapping[str, Tensor | None]) -> Sequence[str]:
    """The tokens whose outcome on the images of a cell means something: grey-box images also attack the base alone."""
    if cell.view.knowledge != "base":
        return ["trained"]
    return list(tokens) if cell.series in ("suite", "published") else ["trained", "none"]


def merge(parts: Sequence[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The outcomes of numbered batches as one, in the order of the images."""
    ordered = [outcome for _, outcome in sorted(parts, key=lambda part: part[0])]
    return {name: torch.cat([outcome[name] for outcome in ordered]) for name in ordered[0]}
