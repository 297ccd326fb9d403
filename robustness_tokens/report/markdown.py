"""The report as Markdown, for people and for the model card.

Texts of a report or of a config may come from the Hub. They are shown as text, never as markup: no links, no images,
no HTML, no table cell that ends early.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from . import words
from .schema import Check, ReportContent, Result


def render_report_markdown(report: ReportContent, *, level: int = 1) -> str:
    """Returns the report as Markdown under a heading of level 1 to 4: first the checks, then the numbers."""
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
    """Returns a sentence with the first worst case and its clean result; None for a report without a worst case."""
    worst = [r for r in report.results if r.knowledge == "full_worst_case" and r.tokens == "trained"]
    if not worst:
        return None
    first = worst[0]
    sentence = (
        f"Against an attacker who knows {words.ATTACKERS['full'].knows} (L-inf, eps {words.format_eps(first.eps)} in "
        f"pixels, worst case over all attacks), the {words.METRICS[first.metric]} is {_with_interval(first)}"
    )
    for r in report.results:
        if (r.knowledge, r.tokens, r.task, r.metric) == (None, "trained", first.task, first.metric):
            return f"{sentence}; on clean images it is {_with_interval(r)}."
    return f"{sentence}."


def code(text: object) -> str:
    """Returns a text as a Markdown code span on one line, in which no renderer finds links or HTML.

    A pipe ends a table cell even in a code span, so a broken bar stands for it.
    """
    shown = words.plain(text).replace("|", "¦")
    if not shown:
        return "(empty)"
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    pad = " " if len(ticks) > 1 else ""
    return f"{ticks}{pad}{shown}{pad}{ticks}"


def prose(text: object) -> str:
    """Returns a text on one line in which nothing is markup.

    Some renderers undo the escapes and then look for bare links, so a space breaks these.
    """
    shown = re.sub(r"(?<=:)(?=//)|(?<=www)(?=\.)|(?=@)", " ", words.plain(text), flags=re.IGNORECASE)
    shown = re.sub(r"([\\`*_\[\]~$#>])", r"\\\1", shown)
    return shown.replace("&", "&amp;").replace("<", "&lt;").replace("|", "&#124;")


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table of cells that are already safe."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _render_checks(checks: Sequence[Check]) -> list[str]:
    if not checks:
        return ["No check was run."]
    outcomes = [check.passed for check in checks]
    counts = (
        f"{outcomes.count(True)} passed, {outcomes.count(False)} failed, {outcomes.count(None)} without a verdict."
    )
    verdicts = {True: "pass", False: "**FAIL**", None: "-"}
    rows = [
        (str(check.number), prose(check.name), verdicts[check.passed], prose(check.value), prose(check.explanation))
        for check in sorted(checks, key=lambda check: check.number)
    ]
    return [counts, table(("#", "Check", "Verdict", "Found", "How"), rows)]


def _render_results(report: ReportContent, hashes: str) -> list[str]:
    if not (results := report.results):
        return ["Nothing was measured."]
    blocks = [
        "A number depends on what the attacker knew. eps is the largest change of a pixel (L-inf norm) of images in "
        "[0, 1]. A worst case takes, for each image, the attack that did the most damage, or the clean image if none "
        "did any. In brackets: the 95% confidence interval."
    ]
    for (task, metric), groups in words.group_results(results).items():
        blocks.append(f"{hashes}## {words.TASKS[task]}: {words.METRICS[metric]}")
        if groups.leading:
            blocks.append(results_table(groups.leading))
        if groups.single:
            blocks += _details("Every single attack", results_table(groups.single, in_short=False))
        if groups.baselines:
            content = results_table(groups.baselines, in_short=False)
            blocks += _details("Baselines: other tokens in place of the trained ones", content)
        if groups.sweep:
            blocks += _details("Sweep over eps: one or two attacks on fewer images", _sweep_table(groups.sweep))
    if report.base_has_own_head:
        blocks.append(words.BASE_HEAD)
    if any(result.knowledge == "own_tokens" for result in results):
        blocks.append(f"{hashes}## How the attacker's own tokens were trained")
        header, *rows = words.own_tokens_rows(report) or [[]]
        blocks.append(words.OWN_TOKENS if rows else words.OWN_TOKENS_GIVEN)
        if rows:
            blocks.append(table([code(cell) for cell in header], [[code(cell) for cell in row] for row in rows]))
    return blocks


def _details(summary: str, content: str) -> list[str]:
    """Hides content behind a click where HTML is rendered, as on the Hub."""
    return [f"<details><summary>{summary}</summary>", content, "</details>"]


def _sweep_table(results: Sequence[Result]) -> str:
    """Returns a table with a row per attacker and a column per eps."""
    columns = sorted({r.eps for r in results})
    order = list(words.ATTACKERS)
    rows: dict[tuple[str, ...], dict[float, list[str]]] = {}
    for r in sorted(results, key=lambda r: (order.index(r.knowledge), r.tokens == "trained")):
        row = (words.describe_attacker_of(r), words.TOKENS[r.tokens], f"{r.num_images:,}", str(r.seed))
        rows.setdefault(row, {eps: [] for eps in columns})[r.eps].append(_with_interval(r))
    return table(
        ("Attacker", "Tokens", "Images", "Seed", *map(words.format_levels, columns)),
        [(*row, *("; ".join(cells[eps]) or "-" for eps in columns)) for row, cells in rows.items()],
    )


def results_table(results: Sequence[Result], *, in_short: bool = True) -> str:
    """Returns a table with a row per attack; `in_short` counts the attacks of a worst case instead of naming them."""
    columns = [kind for kind in words.TOKENS if any(r.tokens == kind for r in results)]
    order = list(words.ATTACKERS)
    rows: dict[tuple[str, ...], dict[str, list[str]]] = {}
    for r in sorted(results, key=lambda r: (order.index(r.knowledge), r.eps)):
        attack = words.ATTACKS.get(r.attack) or code(r.attack)
        attacks = r.attack_parameters.get("attacks")
        if in_short and r.attack == words.WORST_CASE and isinstance(attacks, list):
            attack = f"worst of {len(attacks)} for each image"
        elif settings := [f"{k}={words.format_setting(k, v)}" for k, v in r.attack_parameters.items()]:
            attack += f" {code(', '.join(settings))}"
        eps = "0" if r.attack is None else words.format_eps(r.eps)
        row = (words.describe_attacker_of(r), attack, eps, f"{r.num_images:,}", str(r.seed))
        rows.setdefault(row, {kind: [] for kind in columns})[r.tokens].append(_with_interval(r))
    return table(
        ("Attacker", "Attack", "eps in pixels (L-inf)", "Images", "Seed", *(words.TOKENS[kind] for kind in columns)),
        [(*row, *("; ".join(cells[kind]) or "-" for kind in columns)) for row, cells in rows.items()],
    )


def _with_interval(result: Result) -> str:
    return f"{words.format_number(result)}{words.format_unit(result)} {words.format_interval(result)}".rstrip()
