"""One measurement each: an attack through a model that the attacker holds, at an eps; run, stored and found again."""

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

from ..acceleration import process_state, share_from_main
from ..files import write_bytes
from ..onednn import packed_once
from .attack_call import AttackBatch
from .attack_suite import Attack, run_attack
from .outcomes import measure_outcome
from .threat_models import AttackerView, EvaluatedModel


logger = logging.getLogger(__name__)

FORMAT = 3
"""Of the files: those of another are not looked for."""

Series = Literal["suite", "sweep", "steps", "restarts", "single_step", "unbounded"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """A measurement to make.

    Attributes:
        series: What it belongs to: the suite of attacks, the sweep over eps, or a series that a check looks at.
        view: What the attacker holds.
        attack: Which.
        eps: Budget in pixel units.
        num_images: The first so many of the evaluation's images.
    """

    series: Series
    view: AttackerView
    attack: Attack
    eps: float
    num_images: int

    @property
    def name(self) -> str:
        target = f"-{self.attack.target}" if self.attack.target else ""
        return f"{self.series}-{self.view.name}-{self.attack.name}{target}-eps{255 * self.eps:g}"

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

    def load(self, cell: Cell) -> dict[str, Tensor] | None:
        """The outcome of a cell that was measured before with the same settings, or `None`.

        A file that is damaged, as a crash or a full disk may leave it, counts as missing, and a warning says so.

        Raises:
            ValueError: If the file is whole, and another cell's.
        """
        path, key = self._path(cell), self._key(cell)
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

    def save(self, cell: Cell, outcome: Mapping[str, Tensor]) -> None:
        """Stores an outcome, from the main process."""
        path = self._path(cell)
        if path is not None:
            metadata = {"key": self._key(cell), "digest": _digest(outcome)}
            write_bytes(path, save({k: v.contiguous() for k, v in outcome.items()}, metadata=metadata))

    def _key(self, cell: Cell) -> str:
        return json.dumps({"format": FORMAT, **self.settings, **cell.settings()}, sort_keys=True)

    def _path(self, cell: Cell) -> Path | None:
        if self.folder is None:
            return None
        sha = hashlib.sha256(self._key(cell).encode()).hexdigest()[:16]
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
        batch_size: Images per batch; the last may have fewer.
        seed: Of the attacks' noise.
        store: Of finished cells.
        disable_tqdm: No progress bar.

    Returns:
        The outcome of each cell, of all processes together, in the order of the images.
    """
    state = process_state()
    covered = [_find_covering(cells[:row], cell, tokens) for row, cell in enumerate(cells)]
    # What others cover has no file.
    found = [store.load(cell) if other is None else {} for cell, other in zip(cells, covered, strict=True)]
    # A process may see a file that another doesn't see yet.
    known = [all(flags) for flags in zip(*gather_object([[one is not None for one in found]]), strict=True)]
    outcomes: list[dict[str, Tensor]] = []
    with (
        packed_once(),
        tqdm(
            total=sum(cell.cost for cell in cells),
            initial=sum(cell.cost for cell, is_known in zip(cells, known, strict=True) if is_known),
            desc="Attacking",
            unit="pass",
            unit_scale=True,
            disable=disable_tqdm or not state.is_local_main_process,
        ) as progress_bar,
    ):
        for cell, other, stored, is_known in zip(cells, covered, found, known, strict=True):
            if other is not None:
                outcomes.append(_first_rows(outcomes[other], cell, tokens))
                continue
            if is_known:
                assert stored is not None
                outcomes.append(stored)
                continue
            progress_bar.set_postfix_str(cell.name, refresh=True)
            mine, counted = [], 0
            for number, batch in batches.items():
                count = min(len(batch.images), cell.num_images - number * batch_size)
                if count <= 0:
                    continue
                part = batch.first(count)
                adversarial = run_attack(cell.attack, cell.view, part, eps=cell.eps, seed=seed)
                measured = {name: tokens[name] for name in _measured_with(cell, tokens)}
                mine.append((number, measure_outcome(model, part, adversarial, measured)))
                # The others do as much meanwhile.
                share = min(cell.cost * count * state.num_processes // cell.num_images, cell.cost - counted)
                counted += share
                progress_bar.update(share)
            progress_bar.update(cell.cost - counted)
            outcome = merge(gather_object(mine))
            share_from_main(functools.partial(store.save, cell, outcome), state)
            outcomes.append(outcome)
    return outcomes


def _find_covering(cells: Sequence[Cell], cell: Cell, tokens: Mapping[str, Tensor | None]) -> int | None:
    """The row of a cell whose outcome holds that of another cell, if there is one."""
    wanted = set(_measured_with(cell, tokens))
    for row, other in enumerate(cells):
        same = (other.view.name, other.attack, other.eps) == (cell.view.name, cell.attack, cell.eps)
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
    return list(tokens) if cell.series == "suite" else ["trained", "none"]


def merge(parts: Sequence[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The outcomes of numbered batches as one, in the order of the images."""
    ordered = [outcome for _, outcome in sorted(parts, key=lambda part: part[0])]
    return {name: torch.cat([outcome[name] for outcome in ordered]) for name in ordered[0]}
