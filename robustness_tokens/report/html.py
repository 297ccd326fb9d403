"""The report as one HTML page that needs nothing else: no network, no script, figures inline.

Texts of a report may come from the Hub. All of them are escaped, and the page's own policy lets nothing run or load.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from .groups import WORST_CASE, is_sweep
from .html_tables import (
    escape_code,
    escape_text,
    format_interval,
    format_levels,
    format_number,
    format_unit,
    render_checks,
    render_results,
)
from .markdown import plain
from .style import STYLE
from .words import METRICS


if TYPE_CHECKING:
    from .schema import Result, RobustnessReport


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
    "sweep.png": (
        "How many tokens it takes",
        "Cosine of the features against the number of tokens, a panel per learning rate.",
        True,
    ),
}


def render_report_html(report: RobustnessReport) -> str:
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


def _headline(report: RobustnessReport) -> str:
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


def _facts(report: RobustnessReport) -> str:
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
