"""Cells run, on all processes: the images that each attacks, what comes out, and what need not be run again."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from ..acceleration import process_state, share_from_main
from ..onednn import packed_once
from .attack_call import AttackBatch
from .attack_suite import run_attack
from .cells import Cell, CellStore
from .outcomes import Outcome, measure_outcome
from .threat_models import EvaluatedModel


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
