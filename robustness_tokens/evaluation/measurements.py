"""What an evaluation measured, image by image: what its results and its checks are made of."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

from torch import Tensor

from ..report import WORST_CASE, Result, TokensInPlace
from ..report import Knowledge as ReportedKnowledge
from .attack_suite import AttackBatch
from .cells import Cell
from .outcomes import Outcome, summarize, worst_outcome
from .threat_models import EvaluatedModel


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Everything that was measured, before anything is averaged.

    Attributes:
        model: The defended model.
        batches: Images of this process, by the batch's number.
        clean: Outcome on the clean images, with every set of tokens.
        cells: What was run.
        outcomes: Of each cell, on the first `cell.num_images` of the clean images, in their order.
        eps: Budgets of the suite in pixel units, the main one first.
        seed: Of the evaluation.
        training: How the attacker's own tokens were trained, in words.
    """

    model: EvaluatedModel
    batches: Mapping[int, AttackBatch]
    clean: Outcome
    cells: Sequence[Cell]
    outcomes: Sequence[Outcome]
    eps: Sequence[float]
    seed: int
    training: Sequence[str] = ()

    def select(self, **wanted: Any) -> list[tuple[Cell, Outcome]]:
        """The cells that have these values, and their outcomes.

        Args:
            wanted: Of `series`, `knowledge`, `view`, `attack`, `target`, `eps`, such as `knowledge="full"`.
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

        return [pair for pair in self._pairs() if fits(pair[0])]

    def worst(self, chosen: Sequence[tuple[Cell, Outcome]], tokens: str = "trained") -> dict[str, Tensor]:
        """The worst of these attacks on each image, and of leaving it as it is, which an attacker may do too.

        Else an image that the model gets wrong counts as held where every attack happens to put it right.

        Args:
            chosen: Cells on the same images, and their outcomes.
            tokens: Name of the tokens that were in the model.

        Raises:
            ValueError: If an attack on what others left is chosen without these: it says nothing of the other images.
        """
        for cell in (cell for cell, _ in chosen if cell.standing_only):
            before = (one for one, _ in self._up_to(cell))
            if missing := [one.name for one in before if not any(one is other for other, _ in chosen)]:
                raise ValueError(f"{cell.name} took what {', '.join(missing)} left: choose those too")
        outcomes = [outcome for _, outcome in chosen]
        count = len(outcomes[0]["pixel_difference"])
        clean = {name: value[:count] for name, value in self.clean.items()}
        parts = ([*(outcomes[row] for row in rows), clean] for rows in _parts([cell for cell, _ in chosen]))
        return worst_outcome([*outcomes, clean], tokens, parts=parts)

    def reached(self, cell: Cell, outcome: Outcome, tokens: str = "trained") -> Outcome:
        """What an attack did; if it attacked what is left, what it and those before it at its level and eps did.

        Args:
            cell: Of the attack.
            outcome: Of the cell.
            tokens: Name of the tokens that were in the model.
        """
        if not cell.standing_only:
            return {name: value for name, value in outcome.items() if name.startswith(f"{tokens}.")}
        return self.worst(self._up_to(cell), tokens)

    def _pairs(self) -> list[tuple[Cell, Outcome]]:
        return list(zip(self.cells, self.outcomes, strict=True))

    def _up_to(self, cell: Cell) -> list[tuple[Cell, Outcome]]:
        """The cells of its level and eps that were run before it, and itself, with their outcomes."""
        row = next(row for row, other in enumerate(self.cells) if other is cell)
        return [pair for pair in self._pairs()[: row + 1] if pair[0].is_beside(cell)]

    def results(self) -> list[Result]:
        """The numbers: clean, the worst cases, then each attack; the worst cases of the sweep over eps last."""
        results = self._results(self.clean, knowledge=None)
        for series in ("suite", "sweep"):
            chosen = self.select(series=series)
            levels = list(dict.fromkeys(cell.view.knowledge for cell, _ in chosen))
            for eps in self.eps if series == "suite" else sorted({cell.eps for cell, _ in chosen}):
                at_eps = [(cell, outcome) for cell, outcome in chosen if cell.eps == eps]
                if "full" in levels:
                    results += self._worst("full_worst_case", at_eps)
                for level in reversed(levels):
                    results += self._worst(level, [pair for pair in at_eps if pair[0].view.knowledge == level])
            # Of the sweep the worst cases are enough: it is a curve for each level. The published attack has an eps of
            # its own, and fewer images, and is there to be compared with the paper's tables.
            for cell, outcome in [*chosen, *self.select(series="published")] if series == "suite" else ():
                parameters = {
                    **cell.attack.reported_parameters(cell.eps),
                    **self._precision(),
                    **self._own_tokens([cell]),
                    "view": cell.view.name,
                    **_after(outcome),
                }
                found = {
                    key: value
                    for tokens in ("trained", "none")
                    if tokens in _tokens_of(outcome)
                    for key, value in self.reached(cell, outcome, tokens).items()
                    if key in outcome
                }
                results += self._results(
                    found,
                    knowledge=cell.view.knowledge,
                    attack=cell.attack.name,
                    attack_parameters=parameters,
                    eps=cell.eps,
                )
        return results

    def _worst(self, knowledge: ReportedKnowledge, chosen: Sequence[tuple[Cell, Outcome]]) -> list[Result]:
        if not chosen:
            return []
        cells, outcomes = zip(*chosen, strict=True)
        tokens = [name for name in _tokens_of(outcomes[0]) if all(name in _tokens_of(outcome) for outcome in outcomes)]
        worst = {key: value for name in tokens for key, value in self.worst(chosen, name).items()}
        results = []
        for of_cosine in (False, True):
            found = {name: value for name, value in worst.items() if name.endswith(".cosine") == of_cosine}
            # Attacks on what others left right took no part in the worst case of the cosine.
            part = [cell for cell in cells if not (of_cosine and cell.standing_only)]
            results += self._results(
                found,
                knowledge=knowledge,
                attack=WORST_CASE,
                attack_parameters={
                    "attacks": sorted({_name(cell) for cell in part}),
                    **self._precision(),
                    **(self._own_tokens(part) if knowledge == "own_tokens" else {}),
                    **_series(cells[0]),
                },
                eps=cells[0].eps,
            )
        return results

    def _own_tokens(self, cells: Sequence[Cell]) -> dict[str, list[Any]]:
        """How many tokens the attacker guessed, in each set, and how they were trained."""
        if lengths := own_token_lengths(cells):
            return {"num_robustness_tokens": lengths, "training": list(self.training)}
        return {}

    def _precision(self) -> dict[str, str]:
        """Half precision rounds the gradients, so that a reader must know of it."""
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
                **rest,
            )
            for tokens in _tokens_of(outcome)
            for task, metric, value, interval in summarize(outcome, tokens, seed=self.seed)
        ]


def sweep_curves(results: Sequence[Result]) -> dict[str, list[float]]:
    """The worst cases over eps, for figures.

    Args:
        results: Of [`Measurements.results`].

    Returns:
        `sweep/<knowledge>/<metric>/` with `eps` (in pixel units), `value`, `low` and `high` (95%); for the base
        without tokens `sweep/base, none/<metric>/`, and likewise for other tokens.
    """
    curves: dict[str, list[float]] = {}
    for result in results:
        is_sweep = result.attack_parameters.get("series") == "sweep"
        if is_sweep and result.attack == WORST_CASE and result.confidence_interval is not None:
            who = result.knowledge if result.tokens == "trained" else f"{result.knowledge}, {result.tokens}"
            low, high = result.confidence_interval
            for key, value in {"eps": result.eps, "value": result.value, "low": low, "high": high}.items():
                curves.setdefault(f"sweep/{who}/{result.metric}/{key}", []).append(value)
    return curves


def _tokens_of(outcome: Outcome) -> list[TokensInPlace]:
    """In one order, whatever that of a file."""
    measured = {name.partition(".")[0] for name in outcome}
    return [tokens for tokens in get_args(TokensInPlace) if tokens in measured]


def _parts(cells: Sequence[Cell]) -> list[list[int]]:
    """Rows of the cells of a level or a view, of one attack or of all that push features away: what has a worst case
    of its own in a report. Those of a part of the cells are parts of the cells."""
    parts: dict[tuple[str, ...], list[int]] = {}
    for row, cell in enumerate(cells):
        whose = ("", f"level {cell.view.knowledge}", f"view {cell.view.name}")
        which = ("", f"attack {cell.attack.name}", *(["targeted"] if cell.attack.target else []))
        for part in itertools.product(whose, which):
            parts.setdefault(part, []).append(row)
    return [list(rows) for rows in dict.fromkeys(map(tuple, parts.values())) if 1 < len(rows) < len(cells)]


def _name(cell: Cell) -> str:
    target = f":{cell.attack.target}" if cell.attack.target else ""
    return f"{cell.attack.name}{target} ({cell.view.name})"


def own_token_lengths(cells: Sequence[Cell]) -> list[int]:
    """How many tokens are in each set that the attacker trained and attacks through in these cells."""
    views = (cell.view for cell in cells if cell.view.knowledge == "own_tokens")
    sets = {view.name: [len(tokens) for tokens in view.tokens if tokens is not None] for view in views}
    # An ensemble is of all the sets that there are.
    return max(
        [[length for lengths in sets.values() if len(lengths) == 1 for length in lengths], *sets.values()], key=len
    )


def _after(outcome: Outcome) -> dict[str, str]:
    """What the number of an attack on what is left stands for."""
    if "attacked" not in outcome:
        return {}
    count = int(outcome["attacked"].sum())
    return {"after": f"the attacks before it, which left it {count:,} images; the number is of all together"}


def _series(cell: Cell) -> dict[str, str]:
    return {} if cell.series == "suite" else {"series": cell.series}
