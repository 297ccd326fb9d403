"""The tables of the report's page. Texts of a report may come from the Hub: all are escaped."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from .groups import BASELINES, WORST_CASE, group_results
from .markdown import format_setting, plain
from .words import ATTACKERS, METRICS, TASKS, TOKENS


if TYPE_CHECKING:
    from .schema import Check, Result


_LEVELS = {
    "full_worst_case": "Knows everything: worst case over all levels",
    "full": "Knows everything, tokens included (white box)",
    "own_tokens": "Knows the backbone and the recipe, trained own tokens",
    "base": "Knows the backbone, not the tokens (grey box)",
    "none": "Knows nothing (noise, queries, transfer)",
    None: "Clean images, no attacker",
}
# Look, symbol, word: of these each alone says it.
_VERDICTS = {True: ("pass", "✓", "pass"), False: ("fail", "✗", "FAIL"), None: ("none", "○", "no verdict")}
_MAIN = ("trained", "none")


def render_checks(checks: Sequence[Check]) -> str:
    """The checks in their order, with how many passed."""
    if not checks:
        return "<p>No check was run: the numbers below are claims, not findings.</p>"
    outcomes = [check.passed for check in checks]
    words = {True: "passed", False: "failed", None: "without a verdict"}
    counts = "".join(
        f"<li>{_verdict(outcome, f'{outcomes.count(outcome)} {words[outcome]}')}</li>"
        for outcome in (False, True, None)
        if outcome in outcomes
    )
    rows = "".join(
        f'<tr><td class="num">{check.number}</td><th scope="row">{escape_text(check.name)}</th>'
        f"<td>{_verdict(check.passed)}</td>"
        f'<td><span class="found">{escape_text(check.value)}</span>'
        f'<span class="how">{escape_text(check.explanation)}</span></td>'
        "</tr>\n"
        for check in sorted(checks, key=lambda check: check.number)
    )
    header = '<th scope="col" class="num">#</th>' + "".join(
        f'<th scope="col">{name}</th>' for name in ("Check", "Verdict", "What was found, and how")
    )
    caption = "Questions that an evaluation must answer before its numbers count."
    return f'<ul class="counts">{counts}</ul>\n{_table(caption, header, [rows], look="checks")}'


def _verdict(passed: bool | None, words: str | None = None) -> str:
    look, symbol, word = _VERDICTS[passed]
    return f'<span class="verdict {look}"><span aria-hidden="true">{symbol}</span> {words or word}</span>'


def render_results(results: Sequence[Result]) -> str:
    """For each metric a table of attackers, and behind a click every attack, the baselines and the sweep."""
    if not results:
        return "<p>Nothing was measured.</p>"
    blocks = [
        "<p>A number is worth what the attacker knew. eps is the largest change of a pixel (L-inf norm) of images in "
        "[0, 1]. A worst case takes for each image the attack that did the most, or none. Beside each number: its "
        "95% confidence interval.</p>"
    ]
    for (task, metric), groups in group_results(results).items():
        blocks.append(f"<h3>{TASKS[task]}: {METRICS[metric]}</h3>")
        unit = "" if metric == "cosine" else ", in %"
        name = METRICS[metric].capitalize() + unit
        if groups.leading:
            blocks.append(
                _results_table(groups.leading, _MAIN, f"{name}, by what the attacker knows.", by_attacker=True)
            )
        if groups.single:
            table = _results_table(groups.single, _MAIN, f"{name}, attack by attack.")
            blocks.append(f"<details><summary>Every single attack</summary>{table}</details>")
        baseline_rows = {_row_key(r) for r in groups.baselines}
        shown = (*groups.leading, *groups.single, *groups.baselines)
        if baselines := [r for r in shown if r.tokens != "none" and _row_key(r) in baseline_rows]:
            caption = f"{name}, with other tokens in place of the trained ones: was anything learned?"
            table = _results_table(baselines, ("trained", *BASELINES), caption)
            blocks.append(f"<details><summary>Baselines: other tokens in their place</summary>{table}</details>")
        if groups.sweep:
            table = _results_table(groups.sweep, _MAIN, f"{name}, one or two attacks at growing eps, fewer images.")
            blocks.append(f"<details><summary>Numbers of the sweep over eps</summary>{table}</details>")
    return "\n".join(blocks)


def _results_table(
    results: Sequence[Result], tokens: Sequence[str], caption: str, *, by_attacker: bool = False
) -> str:
    """A row per attack; the level of knowledge is in the row's name or over all rows of the level."""
    kinds = [kind for kind in tokens if any(r.tokens == kind for r in results)]
    header = f'<th scope="col">{"The attacker" if by_attacker else "Attack"}</th>'
    header += "".join(f'<th scope="colgroup" colspan="2" class="pair">{TOKENS[kind]}</th>' for kind in kinds)
    header += "".join(f'<th scope="col" class="num">{name}</th>' for name in ("eps, L-inf", "Images", "Seed"))
    bodies = []
    for level in ATTACKERS:
        rows: dict[tuple[Any, ...], list[Result]] = {}
        for r in (r for r in results if r.knowledge == level):
            rows.setdefault(_row_key(r), []).append(r)
        if not rows:
            continue
        shown = [_result_row(group, kinds, _LEVELS[level] if by_attacker else None) for group in rows.values()]
        if not by_attacker:
            span = 4 + 2 * len(kinds)
            shown.insert(0, f'<tr class="level"><th scope="rowgroup" colspan="{span}">{_LEVELS[level]}</th></tr>\n')
        bodies.append("".join(shown))
    return _table(caption, header, bodies, look="attackers" if by_attacker else "attacks")


def _result_row(group: Sequence[Result], kinds: Sequence[str], level: str | None) -> str:
    """One attack, under each kind of tokens. Several numbers of one kind get a line each."""
    first = group[0]
    cells = [f'<th scope="row">{_attack(first) if level is None else level + _detail(first)}</th>']
    for kind in kinds:
        of_kind = [r for r in group if r.tokens == kind]
        values = "<br>".join(format_number(r.value, r) for r in of_kind) or "&ndash;"
        intervals = "<br>".join(format_interval(r) for r in of_kind)
        cells.append(f'<td class="num value">{values}</td><td class="num interval">{intervals}</td>')
    eps = "0" if first.attack is None else format_levels(first.eps)
    cells += [f'<td class="num">{cell}</td>' for cell in (eps, f"{first.num_images:,}", first.seed)]
    look = ' class="strongest"' if level is not None and first.knowledge == "full_worst_case" else ""
    return f"<tr{look}>{''.join(cells)}</tr>\n"


def _attack(result: Result) -> str:
    if result.attack is None:
        return "no attack"
    if result.attack == WORST_CASE:
        return f"worst case{_detail(result)}"
    return escape_code(result.attack) + _detail(result)


def _detail(result: Result) -> str:
    """The hyper-parameters in small print; of a worst case, the attacks that it is over."""
    parameters = {k: v for k, v in result.attack_parameters.items() if k != "series" and v is not None}
    attacks, over = parameters.get("attacks"), ""
    if result.attack == WORST_CASE and isinstance(attacks, list):
        del parameters["attacks"]
        items = "".join(f"<li>{escape_text(attack)}</li>" for attack in attacks)
        count = f"{len(attacks)} attack{'s' * (len(attacks) != 1)}"
        over = f"<details><summary>worst of {count} on each image</summary><ul>{items}</ul></details>"
    settings = ", ".join(f"{plain(name)} = {format_setting(name, value)}" for name, value in parameters.items())
    return over + (f'<span class="parameters">{escape_text(settings)}</span>' if settings else "")


def _table(caption: str, header: str, bodies: Iterable[str], *, look: str = "results") -> str:
    rows = "".join(f"<tbody>\n{body}</tbody>\n" for body in bodies)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {caption}"><table class="{look}">'
        f"<caption><span>{caption}</span></caption>\n<thead><tr>{header}</tr></thead>\n{rows}</table></div>"
    )


def _row_key(result: Result) -> tuple[Any, ...]:
    parameters = tuple((name, str(value)) for name, value in result.attack_parameters.items())
    return (result.knowledge, result.attack, parameters, result.eps, result.num_images, result.seed)


def format_number(value: float, result: Result) -> str:
    """A value of a result's metric: a cosine as it is, all others in %."""
    return f"{value:.3f}" if result.metric == "cosine" else f"{100 * value:.1f}"


def format_unit(result: Result) -> str:
    """What goes behind a number of this metric."""
    return "" if result.metric == "cosine" else "%"


def format_interval(result: Result) -> str:
    """The confidence interval, or nothing."""
    if result.confidence_interval is None:
        return ""
    low, high = result.confidence_interval
    return f"[{format_number(low, result)}, {format_number(high, result)}]"


def format_levels(eps: float) -> str:
    """A size in pixel units as people say it: `"4/255"`."""
    return f"{255 * eps:.4g}/255"


def escape_text(text: object) -> str:
    """A text that is shown as it is, on one line."""
    return escape(plain(text))


def escape_code(text: object) -> str:
    """A name or id, likewise."""
    return f"<code>{escape_text(text)}</code>"
