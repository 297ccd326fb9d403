"""The report as Markdown, for people and for the model card.

Texts of a report or of a config may come from the Hub. They are shown as they are and never as markup: no links, no
images, no HTML, no table cell that ends early.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .schema import Check, ReportContent, Result
from .words import ATTACKERS, BASELINES, METRICS, TASKS, TOKENS, WORST_CASE, group_results


BASE_HEAD = "Results without tokens were read by a head of their own."
OWN_TOKENS = (
    "The settings in which their training departs from the recipe; an attacker who follows it may find more. Seeds "
    "always differ from the recipe's."
)
OWN_TOKENS_GIVEN = "They were given to the evaluation, so how they were trained is not known."


def render_report_markdown(report: ReportContent, *, level: int = 1) -> str:
    """The report as Markdown: the checks first, then the numbers, the strongest attacker's first.

    Args:
        report: What was found.
        level: Of its heading, 1 to 4.

    Returns:
        Markdown that ends with a line break.
    """
    dataset, hashes = report.dataset, "#" * level
    split = "" if dataset["split"] is None else f", split {code(dataset['split'])}"
    commit = "" if report.base_model_revision is None else f" at commit {code(report.base_model_revision)}"
    blocks = [
        f"{hashes} Robustness evaluation",
        f"{code(report.adapter)} on its base {code(report.base_model)}{commit}, measured on {code(dataset['name'])}"
        f"{split} ({dataset['num_images']:,} images). Budget {code(report.budget)}, seed {report.seed}, "
        f"{report.seconds:,.0f} seconds, robustness_tokens {code(report.package_version)}.",
        f"{hashes}# Checks",
        *_render_checks(report.checks),
        f"{hashes}# Results",
        *_render_results(report, hashes),
    ]
    return "\n\n".join(blocks) + "\n"


def headline(report: ReportContent) -> str | None:
    """One sentence: the report's first worst case beside the same on clean images; None if it holds no worst case."""
    worst = [r for r in report.results if r.knowledge == "full_worst_case" and r.tokens == "trained"]
    if not worst:
        return None
    first = worst[0]
    sentence = (
        f"Against an attacker who knows everything, tokens included (L-inf, eps {format_eps(first.eps)} in pixels, "
        f"worst case over all attacks), the {METRICS[first.metric]} is {_with_interval(first)}"
    )
    for r in report.results:
        if (r.knowledge, r.tokens, r.task, r.metric) == (None, "trained", first.task, first.metric):
            return f"{sentence}; on clean images it is {_with_interval(r)}."
    return f"{sentence}."


def code(text: object) -> str:
    """A text as a Markdown code span, where no renderer finds links or HTML, on one line.

    A pipe ends a table cell even in a code span, so a broken bar stands for it.
    """
    shown = plain(text).replace("|", "¦")
    if not shown:
        return "(empty)"
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if len(ticks) > 1 else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def prose(text: object) -> str:
    """A text in which nothing is markup, on one line.

    Some renderers look for bare links after they have undone the escapes: a space breaks those.
    """
    shown = re.sub(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?=@)", " ", plain(text), flags=re.IGNORECASE)
    shown = re.sub(r"([\\`*_\[\]~$#>])", r"\\\1", shown)
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")


def plain(text: object) -> str:
    """A text without line breaks, control characters and invisible characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def format_eps(eps: float) -> str:
    """A size in pixel units as people say it, and as a number: `"4/255 (0.0157)"`."""
    return f"{255 * eps:.4g}/255 ({eps:.4g})"


def format_setting(name: str, value: Any) -> str:
    """A hyper-parameter's value; a size in pixel units such as 2/255 as a fraction."""
    if isinstance(value, list):
        return f"[{', '.join(format_setting(name, element) for element in value)}]"
    if not isinstance(value, float):
        return str(value)
    if (
        name in ("eps", "step_size") and 0 < value < 1 and abs(510 * value - round(510 * value)) < 1e-9
    ):  # whole and half levels
        return f"{255 * value:g}/255"
    return f"{value:.6g}"


def own_tokens_rows(report: ReportContent) -> list[list[str]]:
    """Returns how own tokens were trained as the rows of a table, the header first; none if they were not trained."""
    if not (described := report.own_tokens):
        return []
    names = dict.fromkeys(name for settings in described.values() for name in settings)
    recipe = described.get("recipe", {})

    def cell(kind: str, name: str) -> str:
        if name in described[kind]:
            return format_setting(name, described[kind][name])
        return "as the recipe" if kind != "recipe" and name in recipe else "-"

    return [["Setting", *described], *([name, *(cell(kind, name) for kind in described)] for name in names)]


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table of cells that are safe already."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _render_checks(checks: Sequence[Check]) -> list[str]:
    if not checks:
        return ["No check was run."]
    outcomes = [check.passed for check in checks]
    counts = (
        f"{outcomes.count(True)} passed, {outcomes.count(False)} failed, {outcomes.count(None)} without a verdict."
    )
    words = {True: "pass", False: "**FAIL**", None: "-"}
    rows = [
        (str(check.number), prose(check.name), words[check.passed], prose(check.value), prose(check.explanation))
        for check in sorted(checks, key=lambda check: check.number)
    ]
    return [counts, table(("#", "Check", "Verdict", "Found", "How"), rows)]


def _render_results(report: ReportContent, hashes: str) -> list[str]:
    if not (results := report.results):
        return ["Nothing was measured."]
    blocks = [
        "A number is worth what the attacker knew. eps is the largest change of a pixel, L-inf, of images in [0, 1]. "
        "A worst case takes for each image the attack that did the most, or none. In brackets: 95% confidence "
        "interval."
    ]
    for (task, metric), groups in group_results(results).items():
        blocks.append(f"{hashes}## {TASKS[task]}: {METRICS[metric]}")
        if groups.leading:
            blocks.append(results_table(groups.leading))
        if groups.single:
            blocks += _details("Every single attack", results_table(groups.single, in_short=False))
        if groups.baselines:
            blocks += _details(
                "Baselines: other tokens in their place", results_table(groups.baselines, BASELINES, in_short=False)
            )
        if groups.sweep:
            blocks += _details("The curve over eps: one or two attacks, fewer images", _sweep_table(groups.sweep))
    if report.base_has_own_head:
        blocks.append(BASE_HEAD)
    if any(result.knowledge == "own_tokens" for result in results):
        blocks.append(f"{hashes}## How the attacker's own tokens were trained")
        header, *rows = own_tokens_rows(report) or [[]]
        blocks.append(OWN_TOKENS if rows else OWN_TOKENS_GIVEN)
        if rows:
            blocks.append(table([code(cell) for cell in header], [[code(cell) for cell in row] for row in rows]))
    return blocks


def _details(summary: str, content: str) -> list[str]:
    """Behind a click, where HTML is let through, as on the Hub."""
    return [f"<details><summary>{summary}</summary>", content, "</details>"]


def _sweep_table(results: Sequence[Result]) -> str:
    """One row per attacker, one column per eps."""
    columns = sorted({r.eps for r in results})
    order = list(ATTACKERS)
    rows: dict[tuple[str, ...], dict[float, list[str]]] = {}
    for r in sorted(results, key=lambda r: (order.index(r.knowledge), r.tokens == "trained")):
        row = (ATTACKERS[r.knowledge], TOKENS[r.tokens], f"{r.num_images:,}", str(r.seed))
        rows.setdefault(row, {eps: [] for eps in columns})[r.eps].append(_with_interval(r))
    return table(
        ("Attacker knows", "Tokens", "Images", "Seed", *(f"{255 * eps:.4g}/255" for eps in columns)),
        [(*row, *("; ".join(cells[eps]) or "-" for eps in columns)) for row, cells in rows.items()],
    )


def results_table(
    results: Sequence[Result], tokens: Sequence[str] = ("none", "trained"), *, in_short: bool = True
) -> str:
    """One row per attack, one column per kind of tokens that occurs; in short, a worst case says over how many."""
    columns = [kind for kind in tokens if any(r.tokens == kind for r in results)]
    rows: dict[tuple[str, ...], dict[str, list[str]]] = {}
    order = list(ATTACKERS)
    for r in sorted(results, key=lambda r: (order.index(r.knowledge), r.eps)):
        attacks = r.attack_parameters.get("attacks")
        if in_short and r.attack == WORST_CASE and isinstance(attacks, list):
            attack = f"worst of {len(attacks)} for each image"
        else:
            attack = "-" if r.attack is None else code(r.attack) + _parameters(r.attack_parameters)
        eps = "0" if r.attack is None else format_eps(r.eps)
        row = (ATTACKERS[r.knowledge], attack, eps, f"{r.num_images:,}", str(r.seed))
        rows.setdefault(row, {kind: [] for kind in columns})[r.tokens].append(_with_interval(r))
    return table(
        ("Attacker knows", "Attack", "eps in pixels (L-inf)", "Images", "Seed", *(TOKENS[kind] for kind in columns)),
        [(*row, *("; ".join(cells[kind]) or "-" for kind in columns)) for row, cells in rows.items()],
    )


def _with_interval(result: Result) -> str:
    def shown(value: float) -> str:
        return f"{value:.3f}" if result.metric == "cosine" else f"{100 * value:.1f}"

    unit = "" if result.metric == "cosine" else "%"
    if result.confidence_interval is None:
        return f"{shown(result.value)}{unit}"
    low, high = result.confidence_interval
    return f"{shown(result.value)}{unit} [{shown(low)}, {shown(high)}]"


def _parameters(parameters: dict[str, Any]) -> str:
    if not parameters:
        return ""
    return " " + code(", ".join(f"{name}={format_setting(name, value)}" for name, value in parameters.items()))
