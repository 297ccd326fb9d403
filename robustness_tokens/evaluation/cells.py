"""One measurement each: an attack through a model that the attacker holds, at an eps; stored and found again."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..acceleration import process_state
from ..files import write_bytes
from .attack_suite import Attack
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
            [`~robustness_tokens.evaluation.cell_runs.find_standing`]: all that the worst
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
