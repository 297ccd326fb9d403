"""Measurements: all outcomes of an evaluation, from which its results and its checks are made."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from ..configuration import TOKENS
from ..report import (
    PART_WORST_CASE,
    WORST_CASE,
    ReportedKnowledge,
    Result,
    TokensInPlace,
    is_sweep,
    num_queries,
    pack_correct,
)
from .attack_suite import AttackBatch
from .cells import Cell
from .metrics import Outcome, summarize, worst_outcome
from .threat_models import EvaluatedModel


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """All that was measured, image by image."""

    model: EvaluatedModel
    batches: Mapping[int, AttackBatch]  # images of this process, by the batch's number
    clean: Outcome  # with every kind of tokens
    cells: Sequence[Cell]
    outcomes: Sequence[Outcome]  # of each cell, on the first `cell.num_images` images in their order
    eps: Sequence[float]  # budgets of the suite in pixel units, the main one first
    seed: int

    def select(self, **wanted: Any) -> list[tuple[Cell, Outcome]]:
        """Returns the cells with these values, such as `knowledge="full"`, and their outcomes.

        `wanted` takes `series`, `knowledge`, `view`, `attack`, `target` and `eps`.
        """

        def fits(cell: Cell) -> bool:
            values = {
                "series": cell.series,
                "knowledge": cell.view.knowledge,
                "view": cell.view.name,
                "attack": cell.attack.name,
                "target": cell.attack.target,
                "eps": cell.eps,
            }
            return all(values[key] == value for key, value in wanted.items())

        return [pair for pair in zip(self.cells, self.outcomes, strict=True) if fits(pair[0])]

    def worst(self, chosen: Sequence[tuple[Cell, Outcome]], tokens: str = "trained") -> dict[str, Tensor]:
        """Returns the worst outcome of each image over these attacks and no attack, which an attacker can choose too.

        Without the latter, an image that is misclassified when clean would count as correct if all attacks correct it.
        `chosen` are cells on the same images; `ValueError` if one is `remaining_only` and those before it are missing.
        """
        for cell in (cell for cell, _ in chosen if cell.remaining_only):
            before = (one for one, _ in self._up_to(cell))
            if missing := [one.name for one in before if not any(one is other for other, _ in chosen)]:
                raise ValueError(f"{cell.name} attacked only what {', '.join(missing)} left: choose those too")
        outcomes = [outcome for _, outcome in chosen]
        count = len(outcomes[0]["pixel_difference"])
        clean = {name: value[:count] for name, value in self.clean.items()}
        parts = ([*(outcomes[row] for row in rows), clean] for rows in _parts([cell for cell, _ in chosen]))
        return worst_outcome([*outcomes, clean], tokens, parts=parts)

    def _up_to(self, cell: Cell) -> list[tuple[Cell, Outcome]]:
        """Returns the cells of the same level and eps up to and including this one, with their outcomes."""
        row = next(row for row, other in enumerate(self.cells) if other is cell)
        return [pair for pair in self.select()[: row + 1] if pair[0].is_beside(cell)]

    def results(self) -> list[Result]:
        """Returns the results: clean, worst cases, then each attack; worst cases of the sweep last."""
        suite, sweep = self.select(series="suite"), self.select(series="sweep")
        results = self._results(self.clean, knowledge=None)
        for eps in self.eps:
            results += self._worst_by_level(suite, eps)
            results += self._worst_of_parts([pair for pair in suite if pair[0].eps == eps])
        # The published attack serves comparison with the paper's tables, with its own eps and fewer images.
        for cell, outcome in [*suite, *self.select(series="published")]:
            results += self._single(cell, outcome)
        # Only the worst cases of the sweep are reported, a curve for each level.
        for eps in sorted({cell.eps for cell, _ in sweep}):
            results += self._worst_by_level(sweep, eps)
        return results

    def _single(self, cell: Cell, outcome: Outcome) -> list[Result]:
        """Returns the results of an attack; those of a `remaining_only` one cover the attacks before it too."""
        parameters = {
            **cell.attack.reported_parameters(cell.eps),
            **self._precision(),
            **_own_tokens([cell]),
            **_queries([cell]),
            "view": cell.view.name,
        }
        if "attacked" in outcome:
            left = f"which left {int(outcome['attacked'].sum()):,} images"
            parameters["after"] = f"the earlier attacks, {left}; the number covers all attacks so far"
        found: dict[str, Tensor] = {}
        for tokens in ("trained", "none"):
            reached = self.worst(self._up_to(cell), tokens) if cell.remaining_only else outcome
            found |= {key: value for key, value in reached.items() if key in outcome and key.startswith(f"{tokens}.")}
        return self._results(
            found, knowledge=cell.view.knowledge, attack=cell.attack.name, attack_parameters=parameters, eps=cell.eps
        )

    def _worst_by_level(self, series: Sequence[tuple[Cell, Outcome]], eps: float) -> list[Result]:
        """Returns the worst cases at an eps over all levels and over each of them."""
        levels = list(dict.fromkeys(cell.view.knowledge for cell, _ in series))
        at_eps = [pair for pair in series if pair[0].eps == eps]
        results = self._worst("full_worst_case", at_eps) if "full" in levels else []
        for level in reversed(levels):
            results += self._worst(level, [pair for pair in at_eps if pair[0].view.knowledge == level])
        return results

    def _worst(
        self,
        knowledge: ReportedKnowledge,
        chosen: Sequence[tuple[Cell, Outcome]],
        *,
        part: str | None = None,
        with_cosine: bool = True,
    ) -> list[Result]:
        if not chosen:
            return []
        cells, outcomes = zip(*chosen, strict=True)
        tokens = [name for name in _tokens_of(outcomes[0]) if all(name in _tokens_of(outcome) for outcome in outcomes)]
        worst = {key: value for name in tokens for key, value in self.worst(chosen, name).items()}
        results = []
        for of_cosine in (False, True) if with_cosine else (False,):
            found = {name: value for name, value in worst.items() if name.endswith(".cosine") == of_cosine}
            # Attacks on remaining images measure no cosine.
            counted = [cell for cell in cells if not (of_cosine and cell.remaining_only)]
            results += self._results(
                found,
                knowledge=knowledge,
                attack=WORST_CASE if part is None else PART_WORST_CASE,
                attack_parameters={
                    **({} if part is None else {"part": part}),
                    "attacks": sorted({f"{attack_in_words(cell)} ({cell.view.name})" for cell in counted}),
                    **self._precision(),
                    **(_queries(counted) if knowledge == "none" else {}),
                    **(_own_tokens(counted) if knowledge == "own_tokens" else {}),
                    **({} if cells[0].series == "suite" else {"series": cells[0].series}),
                },
                eps=cells[0].eps,
            )
        return results

    def _worst_of_parts(self, chosen: Sequence[tuple[Cell, Outcome]]) -> list[Result]:
        """Returns the worst cases of each set of own tokens, and of all white-box attacks on features."""
        results = []
        own = [pair for pair in chosen if pair[0].view.knowledge == "own_tokens"]
        views = list(dict.fromkeys(cell.view.name for cell, _ in own))
        for row, view in enumerate(views if len(views) > 1 else ()):
            # The result of a set that attacked only what earlier sets left covers these too.
            together = any(cell.remaining_only for cell, _ in own)
            names = views[: row + 1] if together else [view]
            part = f"{view} after {', '.join(names[:-1])}" if len(names) > 1 else view
            of_set = [pair for pair in own if pair[0].view.name in names]
            results += self._worst("own_tokens", of_set, part=part, with_cosine=len(names) == 1)
        white_box = [pair for pair in chosen if pair[0].view.knowledge == "full"]
        features = [pair for pair in white_box if pair[0].attack.target and not pair[0].remaining_only]
        if len(features) < len(white_box):
            results += self._worst("full", features, part="attacks on features")
        return results

    def _precision(self) -> dict[str, str]:
        """Returns the attack precision if it is half, which rounds the gradients."""
        return {} if self.model.attack_precision == "no" else {"attack_precision": self.model.attack_precision}

    def _results(self, outcome: Outcome, **rest: Any) -> list[Result]:
        return [
            Result(
                task=task,
                metric=metric,
                value=value,
                confidence_interval=interval,
                tokens=tokens,
                num_images=len(next(iter(outcome.values()))),
                seed=self.seed,
                correct_bits=pack_correct(outcome[f"{tokens}.correct"]) if metric == "accuracy" else None,
                **rest,
            )
            for tokens in _tokens_of(outcome)
            for task, metric, value, interval in summarize(outcome, tokens, seed=self.seed)
        ]


def sweep_curves(results: Sequence[Result]) -> dict[str, list[float]]:
    """Returns the worst cases over eps for figures, by name.

    `sweep/<knowledge>/<metric>/` with `eps` (in pixel units), `value`, `low` and `high` (95%), and `num_queries` of a
    black box; for the base without tokens `sweep/base, none/<metric>/`, and so on for other tokens.
    """
    curves: dict[str, list[float]] = {}
    for result in results:
        if is_sweep(result) and result.attack == WORST_CASE and result.confidence_interval is not None:
            who = result.knowledge if result.tokens == "trained" else f"{result.knowledge}, {result.tokens}"
            low, high = result.confidence_interval
            for key, value in {"eps": result.eps, "value": result.value, "low": low, "high": high}.items():
                curves.setdefault(f"sweep/{who}/{result.metric}/{key}", []).append(value)
            if (queries := num_queries(result)) is not None:
                curves.setdefault(f"sweep/{who}/{result.metric}/num_queries", []).append(queries)
    return curves


def _tokens_of(outcome: Outcome) -> list[TokensInPlace]:
    """Returns the kinds of tokens in an outcome, in canonical order."""
    measured = {name.partition(".")[0] for name in outcome}
    return [tokens for tokens in get_args(TokensInPlace) if tokens in measured]


def _parts(cells: Sequence[Cell]) -> list[list[int]]:
    """Returns the rows of each part of the cells that has a worst case of its own in a report.

    A part holds the cells of one level, one view or all, and of one attack, all feature attacks or all; the parts of a
    part are parts of the whole.
    """
    parts: dict[tuple[str, ...], list[int]] = {}
    for row, cell in enumerate(cells):
        views = ("", f"level {cell.view.knowledge}", f"view {cell.view.name}")
        attacks = ("", f"attack {cell.attack.name}", *(["targeted"] if cell.attack.target else []))
        for part in itertools.product(views, attacks):
            parts.setdefault(part, []).append(row)
    return [list(rows) for rows in dict.fromkeys(map(tuple, parts.values())) if 1 < len(rows) < len(cells)]


def attack_in_words(cell: Cell) -> str:
    """Returns text such as `feature_cosine:base`."""
    return f"{cell.attack.name}:{cell.attack.target}" if cell.attack.target else cell.attack.name


def _queries(cells: Sequence[Cell]) -> dict[str, int]:
    """Returns how many answers of the defended model a black box asks for, per image; nothing for other levels."""
    if any(cell.view.knowledge != "none" for cell in cells):
        return {}
    asked = (cell.attack for cell in cells if not cell.view.is_surrogate)
    return {"num_queries": sum(attack.num_queries or attack.num_draws or 0 for attack in asked)}


def _own_tokens(cells: Sequence[Cell]) -> dict[str, list[int]]:
    lengths = own_token_lengths(cells)
    return {"num_robustness_tokens": lengths} if lengths else {}


def own_token_lengths(cells: Sequence[Cell]) -> list[int]:
    """Returns the number of tokens in each set that the attacker trained and attacks through in these cells."""
    views = (cell.view for cell in cells if cell.view.knowledge == "own_tokens")
    sets = {view.name: [one[TOKENS].shape[-2] for one in view.tokens if one is not None] for view in views}
    alone = [length for lengths in sets.values() if len(lengths) == 1 for length in lengths]
    return max([alone, *sets.values()], key=len)  # an ensemble holds all sets
