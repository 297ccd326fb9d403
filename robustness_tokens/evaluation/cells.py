"""Runs and stores cells: one attack through one of the attacker's models at one eps."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from tqdm.auto import tqdm

from ..attacks import cosine_similarity
from ..configuration import TokenState
from ..models import packed_once
from ..utils import digest, process_state, share_from_main, write_bytes
from .attack_suite import Attack, AttackBatch, run_attack
from .metrics import Outcome, iou_counts
from .threat_models import AttackerView, EvaluatedModel


logger = logging.getLogger(__name__)

FORMAT = 7
"""Version of the file format; other versions are ignored."""

Series = Literal["suite", "published", "sweep", "steps", "restarts", "single_step", "unbounded"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement: an attack, through one model that the attacker holds, on some images."""

    series: Series
    view: AttackerView
    attack: Attack
    eps: float  # in pixel units
    num_images: int  # to attack, the first ones of the evaluation
    remaining_only: bool = False  # attacks the images of `find_remaining`, enough for a worst case of accuracy

    @property
    def name(self) -> str:
        target = f"-{self.attack.target}" if self.attack.target else ""
        return f"{self.series}-{self.view.name}-{self.attack.name}{target}-eps{255 * self.eps:g}"

    def is_beside(self, other: Cell) -> bool:
        """Tells whether both cells count for the same worst case: the same series, level and eps."""
        return (self.series, self.view.knowledge, self.eps) == (other.series, other.view.knowledge, other.eps)

    @property
    def cost(self) -> int:
        """Estimated forward and backward passes; a forward pass alone counts as a third."""
        attack = self.attack
        passes = (attack.num_steps or 1) * (attack.num_restarts or 1) * (attack.num_target_classes or 1)
        if attack.name == "auto_attack":
            passes = 1000  # far more for an image that stays correct, far fewer for one that does not
        passes = max(passes, (attack.num_queries or 0) // 3, (attack.num_draws or 0) // 3)
        return self.num_images * (passes * len(self.view.tokens) + 1)

    def settings(self) -> dict[str, Any]:
        """Returns the settings of this cell on which its outcome depends, as JSON values."""
        return {
            "series": self.series,
            "view": self.view.name,
            "tokens": [None if tokens is None else digest(tokens) for tokens in self.view.tokens],
            "attack": self.attack.name,
            "parameters": self.attack.parameters(),
            "eps": self.eps,
            "num_images": self.num_images,
            "remaining_only": self.remaining_only,
            "surrogate": self.view.model.identity if self.view.is_surrogate else None,
        }


class CellStore:
    """Stores finished cells as files, each complete or absent; stores nothing if the folder is `None`.

    `settings` are shared by all cells of an evaluation; cells that were measured with other settings are not found.
    Batches of an unfinished cell are stored too, by number, and removed when it is finished.
    """

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        self.folder, self.settings = folder, dict(settings)
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def load(
        self, cell: Cell, remaining: Tensor | None = None, *, batch: int | None = None
    ) -> dict[str, Tensor] | None:
        """Returns the stored outcome of a cell, or `None`; `ValueError` if the file holds another cell.

        `remaining` is the (n,) bool mask of the images to attack, if not all. A damaged file, which a crash or a full
        disk may leave, counts as missing and is logged.
        """
        path, key = self._locate(cell, remaining, batch)
        if path is None or not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                outcome = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no mapping
            if metadata.get("digest") != _digest(outcome):
                raise ValueError("its digest does not match its numbers")
        except FileNotFoundError:  # removed by another evaluation in this folder
            return None
        except (SafetensorError, ValueError, KeyError, OverflowError) as exc:
            if batch is not None or process_state().is_main_process:
                logger.warning("%s is damaged, so it is measured again and replaced: %s", path, exc)
            return None
        if metadata.get("key") != key:
            raise ValueError(f"{path} was measured with other settings than its name tells: delete it")
        return outcome

    def save(
        self,
        cell: Cell,
        outcome: Mapping[str, Tensor],
        remaining: Tensor | None = None,
        *,
        batch: int | None = None,
    ) -> None:
        """Stores an outcome; of a cell only the main process, of a batch the one that attacked it."""
        path, key = self._locate(cell, remaining, batch)
        if path is not None:
            metadata = {"key": key, "digest": _digest(outcome)}
            write_bytes(path, save({k: v.contiguous() for k, v in outcome.items()}, metadata=metadata))

    def remove(self, cell: Cell, remaining: Tensor | None, *, batch: int) -> None:
        """Removes the outcome of a batch, once that of its cell is stored."""
        path, _ = self._locate(cell, remaining, batch)
        if path is not None:
            path.unlink(missing_ok=True)

    def _locate(self, cell: Cell, remaining: Tensor | None, batch: int | None) -> tuple[Path | None, str]:
        """Returns the file of a cell, `None` without a folder, and the settings that it must hold as its key."""
        settings = {"format": FORMAT, **self.settings, **cell.settings()}
        if remaining is not None:
            settings["remaining"] = digest([remaining])
        if batch is not None:
            settings["batch"] = batch
        key = json.dumps(settings, sort_keys=True)
        sha = hashlib.sha256(key.encode()).hexdigest()[:16]
        return (None if self.folder is None else self.folder / f"{cell.name}-{sha}.safetensors"), key


def _digest(outcome: Mapping[str, Tensor]) -> str:
    """Returns the sha256 of an outcome; the file format has no checksum."""
    content = "".join(f"{name}={digest([outcome[name]])};" for name in sorted(outcome))
    return hashlib.sha256(content.encode()).hexdigest()


def run_cells(
    cells: Sequence[Cell],
    model: EvaluatedModel,
    batches: Mapping[int, AttackBatch],
    tokens: Mapping[str, TokenState | None],
    clean: Outcome,
    *,
    batch_size: int,
    seed: int,
    store: CellStore,
    disable_tqdm: bool = False,
) -> list[dict[str, Tensor]]:
    """Runs the cells that are not stored and returns the outcome of each, for all images in their order.

    All processes call it, each with its own `batches` by number (batch b starts at image b * batch_size). Batches hold
    the same images whatever the number of processes, so outcomes do not depend on it. `tokens` are those to measure
    with, by name; `clean` is the outcome on all images before any attack. A cell that an earlier one covers takes over
    its outcome. A `remaining_only` cell keeps the clean outcome of other images; its `attacked` is the mask.
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
            measured_with = {name: tokens[name] for name in _measured_with(cell, tokens)}
            remaining = None
            if cell.remaining_only:
                remaining = find_remaining(cell, cells[:row], outcomes, clean, list(measured_with))
            known = _find_covered(cell, cells[:row], outcomes, tokens)
            if known is None:
                stored = store.load(cell, remaining)
                # A process may see a file that another doesn't see yet.
                known = stored if all(gather_object([stored is not None])) else None
            if known is not None:
                outcomes.append(known)
                progress_bar.total -= cell.cost  # so that the bar does not count it as speed
                continue
            progress_bar.set_postfix_str(cell.name, refresh=True)
            cost = cell.cost if remaining is None else int(cell.cost * remaining.sum()) // cell.num_images
            progress_bar.total -= cell.cost - cost
            begun_at, parts, lefts = progress_bar.n, [], {}
            for number, batch in batches.items():
                first = number * batch_size
                count = min(len(batch.images), cell.num_images - first)
                if count <= 0:
                    continue
                rows = slice(first, first + count)
                unchanged = {name: value[rows] for name, value in clean.items()}
                left = lefts[number] = None if remaining is None else remaining[rows]
                outcome = store.load(cell, left, batch=number)
                if outcome is None:
                    outcome = _run_batch(cell, model, batch.first(count), measured_with, unchanged, left, seed=seed)
                    _save_batch(store, cell, outcome, left, number)
                parts.append((number, outcome))
                # The other processes do as much at the same time.
                progress_bar.update(cost * count * state.num_processes // cell.num_images)
            progress_bar.update(begun_at + cost - progress_bar.n)
            outcome = merge(gather_object(parts))
            share_from_main(functools.partial(store.save, cell, outcome, remaining), state)
            for number, left in lefts.items():
                store.remove(cell, left, batch=number)
            outcomes.append(outcome)
    return outcomes


def _save_batch(store: CellStore, cell: Cell, outcome: Outcome, remaining: Tensor | None, number: int) -> None:
    """Stores a batch, which only saves time: an error that one process meets alone must not stop it here."""
    try:
        store.save(cell, outcome, remaining, batch=number)
    except OSError as exc:
        logger.warning("batch %d of %s is not stored, so a stopped run repeats it: %s", number, cell.name, exc)


def _run_batch(
    cell: Cell,
    model: EvaluatedModel,
    batch: AttackBatch,
    tokens: Mapping[str, TokenState | None],
    clean: Outcome,
    remaining: Tensor | None,
    *,
    seed: int,
) -> dict[str, Tensor]:
    """Attacks a batch, or the images of a (B,) bool mask, and returns the outcome; other images keep the clean one."""
    if remaining is None:
        adversarial = run_attack(cell.attack, cell.view, batch, eps=cell.eps, seed=seed)
        return measure_outcome(model, batch, adversarial, tokens)
    # No cosine: its worst case needs attacks on all images.
    kept = {name: value for name, value in _measured(clean, tokens).items() if not name.endswith(".cosine")}
    outcome = {name: value.clone() for name, value in kept.items()}
    if remaining.any():
        part = batch.select(remaining.nonzero()[:, 0])
        adversarial = run_attack(cell.attack, cell.view, part, eps=cell.eps, seed=seed)
        found = measure_outcome(model, part, adversarial, tokens)
        for name, value in outcome.items():
            value[remaining] = found[name]
    return {**outcome, "attacked": remaining}


@torch.no_grad()
def measure_outcome(
    model: EvaluatedModel, batch: AttackBatch, adversarial: Tensor, tokens: Mapping[str, TokenState | None]
) -> dict[str, Tensor]:
    """Measures a batch of attacked images, (B, 3, H, W), in float32 with each of the tokens.

    Returns on the CPU, with B rows: `pixel_difference` (the largest absolute one), `lowest_pixel` and `highest_pixel`,
    and per kind of tokens the `cosine` with the base's clean features, `correct`, or `intersections` and `unions`.
    """
    flat = adversarial.flatten(1)
    outcome = {
        "pixel_difference": (adversarial - batch.images).abs().flatten(1).amax(dim=1),
        "lowest_pixel": flat.amin(dim=1),
        "highest_pixel": flat.amax(dim=1),
    }
    target = batch.base_features
    if target is None and model.feature_view is not None:
        target = model.features(batch.images, None, exact=True)
    for name, value in tokens.items():
        if target is not None:
            features = model.features(adversarial, value, exact=True)
            outcome[f"{name}.cosine"] = cosine_similarity(features, target, similarity_axis=model.similarity_axis)
        if model.task == "features":
            continue
        assert batch.labels is not None
        if model.task == "classification":
            outcome[f"{name}.correct"] = model.logits(adversarial, value, exact=True).argmax(dim=1) == batch.labels
        else:
            logits = model.pixel_logits(adversarial, value, batch.labels.shape[1:], exact=True)
            classes, num_labels = logits.argmax(dim=1), logits.shape[1]
            counts = iou_counts(classes, batch.labels, num_labels=num_labels, ignore_index=batch.ignore_index)
            outcome[f"{name}.intersections"], outcome[f"{name}.unions"] = counts.intersections, counts.unions
    return {name: value.cpu() for name, value in outcome.items()}


def find_remaining(
    cell: Cell, before: Sequence[Cell], outcomes: Sequence[Outcome], clean: Outcome, tokens: Sequence[str]
) -> Tensor:
    """Returns the (n,) bool mask of images that are correct clean and after all earlier attacks at this level and eps.

    An image remains if it is correct with any of the named tokens.
    """
    earlier = [outcome for other, outcome in zip(before, outcomes, strict=True) if other.is_beside(cell)]
    right = [
        torch.stack([outcome[f"{name}.correct"][: cell.num_images] for outcome in (clean, *earlier)]).all(dim=0)
        for name in tokens
    ]
    return torch.stack(right).any(dim=0)


def _find_covered(
    cell: Cell, before: Sequence[Cell], outcomes: Sequence[Outcome], tokens: Mapping[str, TokenState | None]
) -> dict[str, Tensor] | None:
    """Returns the outcome of an earlier cell with the same attack and at least the same images, or `None`."""
    wanted = _measured_with(cell, tokens)
    for other, outcome in zip(before, outcomes, strict=True):
        same = (other.view.name, other.attack, other.eps) == (cell.view.name, cell.attack, cell.eps)
        same &= not (other.remaining_only or cell.remaining_only)
        if same and other.num_images >= cell.num_images and set(wanted) <= set(_measured_with(other, tokens)):
            return {name: value[: cell.num_images] for name, value in _measured(outcome, wanted).items()}
    return None


def _measured_with(cell: Cell, tokens: Mapping[str, TokenState | None]) -> Sequence[str]:
    """Returns the names of the tokens to measure with: the trained ones, and for grey-box attacks also others."""
    if cell.view.knowledge != "base":
        return ["trained"]
    return list(tokens) if cell.series in ("suite", "published") else ["trained", "none"]


def _measured(outcome: Outcome, tokens: Collection[str]) -> Outcome:
    """Returns the part of an outcome that does not depend on the tokens, or was measured with the named ones."""
    return {name: value for name, value in outcome.items() if "." not in name or name.partition(".")[0] in tokens}


def merge(parts: Sequence[tuple[int, dict[str, Tensor]]]) -> dict[str, Tensor]:
    """Concatenates the outcomes of numbered batches in the order of the images."""
    ordered = [outcome for _, outcome in sorted(parts, key=lambda part: part[0])]
    return {name: torch.cat([outcome[name] for outcome in ordered]) for name in ordered[0]}
