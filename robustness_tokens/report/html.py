"""The report as one HTML page that needs nothing else: no network, no script, figures inline.

Texts of a report may come from the Hub. All of them are escaped, and the page's own policy lets nothing run or load.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from .markdown import BASE_HEAD, OWN_TOKENS, OWN_TOKENS_GIVEN, format_setting, own_tokens_rows, plain
from .schema import Check, ReportContent, Result
from .words import ATTACKERS, BASELINES, METRICS, TASKS, TOKENS, WORST_CASE, group_results, is_sweep


STYLE = """
:root {
  color-scheme: light dark;
  --page: #f6f7f9; --card: #ffffff; --text: #1c2430; --muted: #566173; --line: #dde2e9; --head: #eef1f5;
  --accent: #1b4965; --pass: #17603a; --pass-back: #dff3e6; --fail: #9b1c1c; --fail-back: #fbe3e3;
  --none: #4a5568; --none-back: #e9edf2;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #12161c; --card: #1a2029; --text: #e4e8ee; --muted: #9aa6b6; --line: #2e3744; --head: #222a35;
    --accent: #8ec5e8; --pass: #8fe0b0; --pass-back: #173626; --fail: #ffb0b0; --fail-back: #471d20;
    --none: #c0c9d6; --none-back: #2b3441;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0; background: var(--page); color: var(--text); line-height: 1.5; overflow-wrap: anywhere;
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Liberation Sans", Arial, sans-serif;
}
main { max-width: 68rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .5rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; line-height: 1.25; margin: 3rem 0 .75rem; letter-spacing: -.005em; }
h3 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
p { margin: 0 0 .75rem; max-width: 46rem; }
code { font-family: ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; font-size: .88em; }
.muted, caption, figcaption { color: var(--muted); }
.lead { font-size: 1.05rem; }
.eyebrow {
  margin: 0 0 .4rem; color: var(--muted); font-size: .78rem; font-weight: 600; letter-spacing: .07em;
  text-transform: uppercase;
}

.stats { display: grid; grid-template-columns: repeat(auto-fit, minmax(15rem, 1fr)); gap: .9rem; margin: 1.5rem 0 0; }
.stat {
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem;
}
.stat.strongest { border: 2px solid var(--accent); padding: calc(1rem - 1px) calc(1.1rem - 1px); }
.stat dt { font-weight: 650; line-height: 1.3; }
.stat dd { margin: 0; line-height: 1.4; font-size: .88rem; color: var(--muted); font-variant-numeric: tabular-nums; }
.stat dd.value { margin: .25rem 0 .1rem; font-size: 2.1rem; line-height: 1.25; font-weight: 650; color: var(--text); }
.stat dd.who { margin-top: .5rem; }
.stat dd.value small { font-size: 1.1rem; font-weight: 500; color: var(--muted); }

.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.scroll:focus-visible, summary:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; line-height: 1.4; }
caption > span {
  display: inline-block; position: sticky; left: .85rem; max-width: min(46rem, calc(100vw - 4.5rem));
}
caption { text-align: left; padding: .75rem .85rem; font-size: .88rem; }
th, td { padding: .5rem .85rem; text-align: left; vertical-align: baseline; border-top: 1px solid var(--line); }
thead th { background: var(--head); font-size: .8rem; font-weight: 600; color: var(--muted); vertical-align: bottom; }
tbody th { font-weight: 600; }
.level th { background: var(--head); padding-top: .6rem; padding-bottom: .45rem; }
.num { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
td.value { font-weight: 600; padding-right: .3rem; }
td.interval { color: var(--muted); padding-left: .3rem; font-size: .85em; }
th.pair { text-align: right; white-space: nowrap; }
tbody th[scope=row] { font-weight: 500; min-width: 14rem; }
tr.strongest > * { border-top: 2px solid var(--accent); border-bottom: 2px solid var(--accent); }
tbody tr.strongest > th { font-weight: 700; }
tr.strongest details { font-weight: 400; }
.parameters { display: block; color: var(--muted); font-size: .8rem; font-weight: 400; max-width: 30rem; }

.checks td:last-child { min-width: 15rem; }
.checks th[scope=row] { min-width: 9rem; font-weight: 600; }
.found { display: block; font-weight: 500; }
.how { display: block; color: var(--muted); font-size: .85rem; }
.verdict {
  display: inline-block; white-space: nowrap; border-radius: 1rem; padding: .08rem .6rem; font-size: .82rem;
  font-weight: 650; border: 1px solid transparent;
}
.pass { color: var(--pass); background: var(--pass-back); }
.fail { color: var(--fail); background: var(--fail-back); border-color: currentColor; }
.none { color: var(--none); background: var(--none-back); }
.counts .verdict { white-space: normal; }
.counts { display: flex; flex-wrap: wrap; gap: .5rem; margin: 0 0 1rem; padding: 0; list-style: none; }

details { margin-top: .3rem; }
main > details, section > details { margin-top: 1rem; }
summary { cursor: pointer; color: var(--muted); font-size: .85rem; }
details ul { margin: .3rem 0 0; padding-left: 1.1rem; color: var(--muted); font-size: .8rem; font-weight: 400; }
details .scroll { margin-top: .6rem; }

.figures { display: grid; gap: 1.25rem; grid-template-columns: repeat(2, minmax(0, 1fr)); }
figure {
  margin: 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem; overflow: hidden;
  display: flex; flex-direction: column;
}
figure.wide { grid-column: 1 / -1; }
figure.alone img { max-width: min(100%, 40rem); }
figure .paper {
  flex: 1; display: grid; align-content: center; background: #ffffff; padding: .9rem; overflow-x: auto;
}
figure img { display: block; margin: 0 auto; max-width: 100%; height: auto; }
figcaption { padding: .8rem 1rem 1rem; font-size: .88rem; border-top: 1px solid var(--line); }
figcaption b { display: block; color: var(--text); font-size: .95rem; }

dl.facts { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1.25rem; margin: 0 0 1rem; }
dl.facts dt { color: var(--muted); }
dl.facts dd { margin: 0; }
.limits { padding-left: 1.2rem; max-width: 46rem; }
.limits li { margin-bottom: .45rem; }

@media (max-width: 46rem) {
  main { padding: 1.25rem 1rem 3rem; }
  h1 { font-size: 1.4rem; }
  .figures { grid-template-columns: minmax(0, 1fr); }
  th, td { padding: .45rem .6rem; }
  figure .paper { padding: .5rem; }
  figure.wide:not(.alone) img { max-width: none; width: 44rem; }
  .checks, .checks caption, .checks tbody { display: block; }
  .checks thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .checks tr {
    display: grid; grid-template-columns: 1.9rem 1fr auto; align-items: baseline; padding: .55rem .6rem;
    border-top: 1px solid var(--line);
  }
  .checks th, .checks td { border: 0; padding: 0; }
  .checks td:first-child { text-align: left; }
  .checks td:last-child { grid-column: 2 / -1; padding-top: .2rem; }
  dl.facts { grid-template-columns: 1fr; gap: 0; }
  dl.facts dd { margin-bottom: .5rem; }
}
@media print {
  :root {
    color-scheme: light;
    --page: #ffffff; --card: #ffffff; --text: #000000; --muted: #444444; --line: #bbbbbb; --head: #f0f0f0;
    --accent: #1b4965; --pass: #17603a; --pass-back: #ffffff; --fail: #9b1c1c; --fail-back: #ffffff;
    --none: #444444; --none-back: #ffffff;
  }
  body { font-size: 10pt; }
  main { max-width: none; padding: 0; }
  .scroll { overflow: visible; }
  .verdict { border-color: currentColor; }
  figure, .stat, tr { break-inside: avoid; }
  h2, h3, .level { break-after: avoid; }
  thead { display: table-header-group; }
}
"""

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

# File name of a figure -> title, explanation, whether it takes the whole width.
FIGURES: dict[str, tuple[str, str, bool]] = {
    **{
        f"{metric}_by_eps.png": (
            f"{words.capitalize()} against the size of the attack",
            "The worst of the sweep's one or two attacks at each level of knowledge, from no change at all to one "
            "that anybody sees; the results take more. Who knows nothing tries noise alone; of own tokens the budgets "
            "quick and standard take the first set. Bands: 95% confidence interval. Higher is better. The numbers are "
            "in the table of the sweep.",
            False,
        )
        for metric, words in METRICS.items()
    },
    "layer_maxima.png": (
        "Largest absolute activation per layer",
        "Over the base's own sequence (the robustness tokens' rows are left out), mean over the images shown below. "
        "Where attacked images with tokens follow the clean ones, the attack doesn't reach that layer.",
        False,
    ),
    "training_curves.png": (
        "Training of the tokens",
        "Cosine of the features with those of clean images without tokens, step by step.",
        False,
    ),
    "attacked_images.png": (
        "Clean images, attacked images, and their difference",
        "The difference is amplified by the factor beside it. What the model sees is its predicted class, where it "
        "has classes.",
        True,
    ),
    "feature_maps.png": (
        "Features of the patches as colours",
        "The first three principal components of the last layer's patches, of clean images without tokens, are red, "
        "green and blue in all columns: the same colour is the same feature. A good defence makes the columns of "
        "attacked images look like the clean ones.",
        True,
    ),
}


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


def render_report_html(report: ReportContent) -> str:
    """The report as HTML: what the strongest attacker left, the checks, the numbers, the figures, the limits.

    Args:
        report: What was found; its figures are PNG files by name.

    Returns:
        A whole document that needs no other file and no network.
    """
    style_hash = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{style_hash}'; base-uri 'none'; form-action 'none'"
    dataset = report.dataset
    split = "" if dataset["split"] is None else f", split {escape_code(dataset['split'])}"
    title = f"Robustness of {plain(report.adapter)}"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="referrer" content="no-referrer">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="eyebrow">Robustness evaluation</p>
<h1>{escape_text(report.adapter)}</h1>
<p class="muted">on its frozen base {escape_code(report.base_model)}, measured on
{escape_code(dataset["name"])}{split}, {dataset["num_images"]:,} images</p>
{_headline(report)}
</header>
<section>
<h2>Can the numbers be trusted? The checks</h2>
{render_checks(report.checks)}
</section>
<section>
<h2>What holds, against whom</h2>
{render_results(report.results)}
{_own_tokens(report)}
</section>
<section>
<h2>Figures</h2>
{_figures(report.figures)}
</section>
<section>
<h2>How it was measured</h2>
{_facts(report)}
</section>
</main>
</body>
</html>
"""


def _headline(report: ReportContent) -> str:
    """The worst case beside the grey box and clean images, of the first metric that was reported."""
    ours = [r for r in report.results if r.tokens == "trained" and not is_sweep(r)]
    if not ours:
        return ""
    attacked = [r for r in ours if r.attack is not None]
    worst = next((r for r in attacked if r.knowledge == "full_worst_case"), None)
    main = worst or (attacked or ours)[0]
    same = [r for r in report.results if (r.task, r.metric) == (main.task, main.metric) and not is_sweep(r)]
    grey_box = [r for r in same if r.knowledge == "base" and r.eps == main.eps]
    grey_box = [r for r in grey_box if r.attack == WORST_CASE] or grey_box
    everything = "the attacker knows everything, tokens included; on each image the worst of all attacks"
    cards = [
        _card("Clean images", "no attacker", [r for r in same if r.attack is None]),
        _card("Grey box", "the attacker knows the backbone, not the tokens", grey_box),
        _card("White box, worst case", everything, [worst] if worst else [], is_strongest=True),
    ]
    budget = f", every pixel changed by at most {format_levels(main.eps)}" if main.attack is not None else ""
    warning = "" if worst else "<p>No attacker who knows the tokens was tried: these numbers are no defence's yet.</p>"
    return (
        f'<p class="lead">{METRICS[main.metric].capitalize()} with the tokens in place{budget}.</p>\n{warning}'
        f'<dl class="stats">\n{"".join(cards)}</dl>'
    )


def _card(name: str, who: str, results: Sequence[Result], *, is_strongest: bool = False) -> str:
    ours, without = (
        min((r for r in results if r.tokens == kind), key=lambda r: r.value, default=None)
        for kind in ("trained", "none")
    )
    value, lines = "&ndash;", ["not measured"]
    if ours is not None:
        value = f"{format_number(ours.value, ours)}<small>{format_unit(ours)}</small>"
        lines = [] if ours.confidence_interval is None else [f"95% interval {format_interval(ours)}"]
    if without is not None:
        lines.append(f"without tokens {format_number(without.value, without)}{format_unit(without)}")
    shown = "".join(f"<dd>{line}</dd>" for line in lines)
    return (
        f'<div class="stat{" strongest" * is_strongest}"><dt>{name}</dt><dd class="value">{value}</dd>{shown}'
        f'<dd class="who">{who}</dd></div>\n'
    )


def _figures(figures: dict[str, bytes]) -> str:
    if not figures:
        return (
            "<p>This report was written without figures: <code>pip install 'robustness-tokens[plots]'</code>, then "
            "<code>robtok evaluate</code> again with the same output folder, which keeps what is measured.</p>"
        )
    order = [name for name in FIGURES if name in figures] + sorted(set(figures) - set(FIGURES))
    half = [name for name in order if name in FIGURES and not FIGURES[name][2]]
    alone = half[-1] if len(half) % 2 else None
    shown = []
    for name in order:
        title, explanation, _ = FIGURES.get(name, (plain(name), "", True))
        data = base64.b64encode(figures[name]).decode()
        look = "wide alone" if name == alone else "half" if name in half else "wide"
        shown.append(
            f'<figure class="{look}">'
            f'<div class="paper" tabindex="0" role="region" aria-label="Figure: {escape(title)}">'
            f'<img alt="{escape(f"{title}. {explanation}".strip())}" src="data:image/png;base64,{data}"></div>'
            f"<figcaption><b>{escape(title)}</b> {escape(explanation)}</figcaption></figure>\n"
        )
    return f'<div class="figures">\n{"".join(shown)}</div>'


def _own_tokens(report: ReportContent) -> str:
    """How the attacker's own tokens were trained, and whether the base had a head of its own."""
    blocks = [f"<p>{BASE_HEAD}</p>"] if report.base_has_own_head else []
    if any(result.knowledge == "own_tokens" for result in report.results):
        blocks.append("<h3>How the attacker's own tokens were trained</h3>")
        header, *rows = own_tokens_rows(report) or [[]]
        if not rows:
            return "\n".join([*blocks, f"<p>{OWN_TOKENS_GIVEN}</p>"])
        columns = "".join(f'<th scope="col">{escape_text(cell)}</th>' for cell in header)
        body = "".join(
            f'<tr><th scope="row">{escape_code(name)}</th>'
            f"{''.join(f'<td>{escape_text(cell)}</td>' for cell in cells)}</tr>\n"
            for name, *cells in rows
        )
        blocks.append(_table(OWN_TOKENS, columns, [body]))
    return "\n".join(blocks)


def _facts(report: ReportContent) -> str:
    dataset = report.dataset
    split = "not named" if dataset["split"] is None else escape_code(dataset["split"])
    facts = {
        "Adapter": escape_code(report.adapter),
        "Base": escape_code(report.base_model),
        "Commit of the base": "not known"
        if report.base_model_revision is None
        else escape_code(report.base_model_revision),
        "Data": f"{escape_code(dataset['name'])}, split {split}, {dataset['num_images']:,} images",
        "Attack budget": "L-inf, eps in pixel units of images in [0, 1], written as n/255",
        "Effort": f"{escape_code(report.budget)}, {report.seconds:,.0f} seconds",
        "Seed": str(report.seed),
        "Intervals": "95%: Wilson's for an accuracy, bootstrap over the images for all others",
        "Written by": f"robustness_tokens {escape_code(report.package_version)}; the same numbers for machines: "
        "<code>evaluation.json</code> in the same folder",
    }
    limits = [
        "An attack shows what breaks, never what holds: a stronger attacker may leave less than the numbers above.",
        "The tokens are the secret of the defence. Grey-box numbers hold only while nobody gets them; the white-box "
        "numbers say what is left once somebody does.",
        "eps counts pixels of images in [0, 1]. The paper's attack counts in normalised space, where its 8/255 is "
        "about 1.8/255 here: its numbers belong beside that budget only.",
        "Only small changes of every pixel were tried (L-inf): nothing is said about patches, rotations "
        "or other data.",
        "The interval covers the choice of images, not the choice of attacks or of the training run.",
    ]
    rows = "".join(f"<dt>{name}</dt><dd>{value}</dd>\n" for name, value in facts.items())
    items = "".join(f"<li>{limit}</li>\n" for limit in limits)
    return f'<dl class="facts">\n{rows}</dl>\n<h3>Limits</h3>\n<ul class="limits">\n{items}</ul>'
