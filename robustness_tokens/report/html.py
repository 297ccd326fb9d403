"""The report as one HTML page that needs nothing else: no network, no script, figures inline.

Texts of a report may come from the Hub. The template escapes all of them, and the page's Content-Security-Policy lets
nothing run or load.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from . import words
from .schema import ReportContent, Result


# CSS class, symbol and word of a verdict; each identifies it.
_VERDICTS = {True: ("pass", "✓", "pass"), False: ("fail", "✗", "FAIL"), None: ("none", "○", "no verdict")}

# File name of a figure -> title, explanation, whether it takes the whole width.
FIGURES: dict[str, tuple[str, str, bool]] = {
    **{
        f"{metric}_by_eps.png": (
            f"{words.capitalize(name)} against the size of the attack",
            "Worst case over the sweep's one or two attacks of each attacker, from no change to a visible one. "
            "The results above use more attacks. The black box uses only noise. With budget quick or standard "
            "an attacker with own tokens uses the first set of them. Bands are 95% confidence intervals; higher is "
            "better. The table of the sweep holds the numbers.",
            False,
        )
        for metric, name in words.METRICS.items()
    },
    "layer_maxima.png": (
        "Largest absolute activation per layer",
        "Maximum over the base's own sequence, without the robustness tokens; mean over the images shown below. "
        "Where the curve of attacked images with tokens follows that of clean ones, the attack does not reach the "
        "layer.",
        False,
    ),
    "training_curves.png": (
        "Training of the tokens",
        "Cosine of the features with the features of clean images without tokens, step by step.",
        False,
    ),
    "attacked_images.png": (
        "Clean images, attacked images, and their difference",
        "The difference is amplified by the factor beside it. For a classifier, each image shows the prediction.",
        True,
    ),
    "feature_maps.png": (
        "Features of the patches as colours",
        "Red, green and blue are the first three principal components of the last layer's patches of clean images "
        "without tokens, so the same colour means the same feature in all columns. With a good defence the columns of "
        "attacked images look like those of clean images.",
        True,
    ),
}


_ENVIRONMENT = Environment(
    loader=PackageLoader("robustness_tokens.report", ""),
    autoescape=True,
    undefined=StrictUndefined,
    # Applied to every `{{ }}` before it is escaped.
    finalize=lambda value: value if isinstance(value, Markup) else words.plain(value),
    trim_blocks=True,
    keep_trailing_newline=True,
)
_ENVIRONMENT.filters |= {
    "number": words.format_number,
    "unit": words.format_unit,
    "interval": words.format_interval,
    "sha256": lambda text: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode(),
}
_ENVIRONMENT.globals |= {"line_break": Markup("<br>"), "verdicts": _VERDICTS, "words": words}


def render_report_html(report: ReportContent) -> str:
    """Returns the report as a whole HTML document that needs no other file and no network."""
    outcomes = [check.passed for check in report.checks]
    kinds = {False: "failed", True: "passed", None: "without a verdict"}
    return _ENVIRONMENT.get_template("page.html.j2").render(
        report=report,
        written_by=words.WRITTEN_BY,
        headline=_headline(report.results),
        checks=sorted(report.checks, key=lambda check: check.number),
        counts=[(key, f"{outcomes.count(key)} {word}") for key, word in kinds.items() if key in outcomes],
        groups=_groups(report.results),
        has_own_tokens=any(result.knowledge == "own_tokens" for result in report.results),
        own_tokens=words.own_tokens_rows(report),
        figures=_figures(report.figures),
    )


def _headline(results: Sequence[Result]) -> dict[str, Any] | None:
    """Returns the results of the first reported metric: clean images, grey box and worst case."""
    suite = [r for r in results if not words.is_sweep(r)]
    ours = [r for r in suite if r.tokens == "trained"]
    if not ours:
        return None
    attacked = [r for r in ours if r.attack is not None]
    worst = next((r for r in attacked if r.knowledge == "full_worst_case"), None)
    main = worst or (attacked or ours)[0]
    same = [r for r in suite if (r.task, r.metric) == (main.task, main.metric)]
    grey_box = [r for r in same if r.knowledge == "base" and r.eps == main.eps]
    grey_box = [r for r in grey_box if r.attack == words.WORST_CASE] or grey_box
    return {
        "metric": words.capitalize(words.METRICS[main.metric]),
        "eps": None if main.attack is None else words.format_levels(main.eps),
        "is_white_box": worst is not None,
        "cards": [
            _card(None, [r for r in same if r.attack is None]),
            _card("base", grey_box),
            _card("full_worst_case", [worst] if worst else []),
        ],
    }


def _card(knowledge: str | None, results: Sequence[Result]) -> dict[str, Any]:
    name, knows = words.ATTACKERS[knowledge]

    def lowest(tokens: str) -> Result | None:
        return min((r for r in results if r.tokens == tokens), key=lambda r: r.value, default=None)

    return {
        "name": words.capitalize(name),
        "attacker": f"the attacker knows {knows}" if knows else "no attacker",
        "ours": lowest("trained"),
        "without": lowest("none"),
        "is_strongest": knowledge == "full_worst_case",
    }


def _groups(results: Sequence[Result]) -> list[dict[str, Any]]:
    """Returns for each metric the tables of attackers, of every attack, of the baselines and of the sweep."""
    tables = []
    for (task, metric), groups in words.group_results(results).items():
        baseline_rows = {_row_key(r) for r in groups.baselines}
        shown = (*groups.leading, *groups.single, *groups.baselines)
        baselines = [r for r in shown if r.tokens != "none" and _row_key(r) in baseline_rows]
        tables.append(
            {
                "title": f"{words.TASKS[task]}: {words.METRICS[metric]}",
                "caption": words.capitalize(words.METRICS[metric]) + ("" if metric == "cosine" else ", in %"),
                "leading": _table(groups.leading),
                "single": _table(groups.single),
                "baselines": _table(baselines),
                "sweep": _table(groups.sweep),
            }
        )
    return tables


def _table(results: Sequence[Result]) -> dict[str, Any] | None:
    """Returns a row per attack, in the order of the attackers; several numbers of one kind of tokens share a cell."""
    kinds = [kind for kind in ("trained", "none", *words.BASELINES) if any(r.tokens == kind for r in results)]
    rows: dict[tuple[Any, ...], list[Result]] = {}
    for r in results:
        rows.setdefault(_row_key(r), []).append(r)
    levels = [
        (words.describe_attacker(level), [_row(row, kinds) for row in rows.values() if row[0].knowledge == level])
        for level in words.ATTACKERS
        if any(r.knowledge == level for r in results)
    ]
    return {"kinds": [words.TOKENS[kind] for kind in kinds], "levels": levels} if levels else None


def _row(group: Sequence[Result], kinds: Sequence[str]) -> dict[str, Any]:
    first = group[0]
    settings = {k: v for k, v in first.attack_parameters.items() if k != "series" and v is not None}
    attacks = settings.get("attacks") if first.attack == words.WORST_CASE else None
    if isinstance(attacks, list):
        del settings["attacks"]
    return {
        "attack": first.attack,
        "attacks": attacks if isinstance(attacks, list) else None,
        "settings": ", ".join(f"{words.plain(k)} = {words.format_setting(k, v)}" for k, v in settings.items()),
        "cells": [[r for r in group if r.tokens == kind] for kind in kinds],
        "eps": "0" if first.attack is None else words.format_levels(first.eps),
        "num_images": f"{first.num_images:,}",
        "seed": first.seed,
        "is_strongest": first.knowledge == "full_worst_case",
    }


def _row_key(result: Result) -> tuple[Any, ...]:
    parameters = tuple((name, str(value)) for name, value in result.attack_parameters.items())
    return (result.knowledge, result.attack, parameters, result.eps, result.num_images, result.seed)


def _figures(figures: dict[str, bytes]) -> list[dict[str, Any]]:
    """Returns the figures in the order of `FIGURES`, then all others by name."""
    order = [name for name in FIGURES if name in figures] + sorted(set(figures) - set(FIGURES))
    half = [name for name in order if name in FIGURES and not FIGURES[name][2]]
    alone = half[-1] if len(half) % 2 else None
    shown = []
    for name in order:
        title, explanation, _ = FIGURES.get(name, (name, "", True))
        look = "wide alone" if name == alone else "half" if name in half else "wide"
        data = Markup(base64.b64encode(figures[name]).decode())
        shown.append({"title": title, "explanation": explanation, "look": look, "data": data})
    return shown
