"""Figures as PNG files (optional extra `plots`): plain words, a unit on every axis, readable in grey."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from .words import ATTACKERS, METRICS, TOKENS


_TRAINING_CURVES = {
    "invariance_cosine": ("clean images, with tokens", "#1b4965", "-", "o"),
    "adversarial_cosine": ("attacked images, with tokens", "#ca6702", "--", "s"),
    "baseline_cosine": ("attacked images, without tokens", "#8d8d8d", ":", "x"),
}
# The curves over eps, by their names in a report: the lines differ in grey too.
_EPS_CURVES = {
    "base, none": (f"{ATTACKERS['base'].name}, {TOKENS['none']}", "#8d8d8d", ":", "x"),
    "none": (ATTACKERS["none"].name, "#5a9fd4", (0, (6, 2, 1, 2, 1, 2)), "^"),
    "base": (ATTACKERS["base"].name, "#1b4965", "-", "o"),
    "own_tokens": (ATTACKERS["own_tokens"].name, "#ca6702", "--", "s"),
    "full": (ATTACKERS["full"].name, "#9b2226", "-.", "D"),
}
_COSINE = f"{METRICS['cosine']}\n{TOKENS['none']} (1 = the same)"


def plot_training_curves(log_history: Sequence[Mapping[str, float]]) -> bytes:
    """Draws the cosines of a trainer's log against the step."""
    figure = _figure(7.2, 4.0)
    axes = figure.subplots()
    steps = [row["step"] for row in log_history]
    for key, (label, color, style, _) in _TRAINING_CURVES.items():
        axes.plot(steps, [row[key] for row in log_history], color=color, linestyle=style, linewidth=2, label=label)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel(_COSINE)
    axes.set_title("What training does to the features", loc="left")
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=8)
    return _png(figure)


def plot_sweep(rows: Sequence[Mapping[str, float]]) -> bytes:
    """Draws the cosines of a sweep's rows against the number of tokens, a panel per learning rate.

    Each marker is one seed; the line joins the means, and bars reach from the lowest to the highest value.
    """
    learning_rates = sorted({row["learning_rate"] for row in rows})
    counts = sorted({row["num_robustness_tokens"] for row in rows})
    num_seeds = len({row["seed"] for row in rows})
    figure = _figure(max(5.2, 1.4 + 3.4 * len(learning_rates)), 4.3)
    panels = figure.subplots(1, len(learning_rates), sharey=True, squeeze=False)[0]
    baseline = float(np.mean([row["baseline_cosine"] for row in rows]))
    for axes, learning_rate in zip(panels, learning_rates, strict=True):
        of_panel = [row for row in rows if row["learning_rate"] == learning_rate]
        for key in ("invariance_cosine", "adversarial_cosine"):
            label, color, style, marker = _TRAINING_CURVES[key]
            groups = [[row[key] for row in of_panel if row["num_robustness_tokens"] == count] for count in counts]
            drawn = {place: values for place, values in enumerate(groups) if values}
            means = [float(np.mean(values)) for values in drawn.values()]
            below = [mean - min(values) for mean, values in zip(means, drawn.values(), strict=True)]
            above = [max(values) - mean for mean, values in zip(means, drawn.values(), strict=True)]
            look: dict[str, Any] = {"color": color, "linestyle": style, "linewidth": 2, "capsize": 4}
            axes.errorbar(list(drawn), means, yerr=[below, above], label=label, **look)
            for place, values in drawn.items():
                axes.plot([place] * len(values), values, marker, color=color, markersize=5, fillstyle="none")
        label, color, style, _ = _TRAINING_CURVES["baseline_cosine"]
        axes.axhline(baseline, color=color, linestyle=style, linewidth=2, label=label)
        axes.set_xticks(range(len(counts)), [f"{count:g}" for count in counts])
        axes.set_xlim(-0.4, len(counts) - 0.6)
        axes.set_xlabel("number of tokens")
        axes.set_title(f"learning rate {learning_rate:g}", loc="left", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel(_COSINE)
    seeds = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds: mean, lowest and highest"
    figure.suptitle(f"How many tokens it takes ({seeds})", x=0.02, ha="left", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = 3 if len(panels) > 1 else 1  # three don't fit under one panel
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=columns, fontsize=8)
    return _png(figure)


def plot_attacked_images(
    images: Tensor,
    attacked: Tensor,
    *,
    eps: float,
    heading: str,
    titles: Sequence[tuple[str, str]] | None = None,
) -> bytes:
    """Draws clean and attacked (B, 3, H, W) images in [0, 1], and their difference from -eps (black) to eps (white).

    `titles` are, for each image, a model's predictions for the clean and the attacked one; `eps` is in pixel units.
    """
    if eps <= 0:
        raise ValueError(f"eps must be positive to draw a difference of at most eps, got {eps}")
    count = len(images)
    figure = _figure(1.25 * count + 1.3, 5.7)
    axes = figure.subplots(3, count, squeeze=False)
    difference = f"difference\ntimes {0.5 / eps:.{0 if eps < 0.1 else 1}f}\n(grey = 0,\nwhite =\n+{255 * eps:.3g}/255)"
    rows = {"clean": images, "attacked": attacked, difference: (attacked - images) / (2 * eps) + 0.5}
    for row, (name, pictures) in enumerate(rows.items()):
        for column in range(count):
            _show(axes[row, column], pictures[column])
            if titles is not None and row < 2:
                axes[row, column].set_title(_verbatim(titles[column][row]), fontsize=8)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
    figure.suptitle(_verbatim(heading), x=0.02, ha="left", fontsize=10)
    return _png(figure)


def plot_eps_curves(series: Mapping[str, Sequence[float]], *, metric: str) -> bytes:
    """Draws a metric against eps, a line with its 95% band for each attacker.

    `series` holds, as in a report, `sweep/<who>/<metric>/<key>` for the keys eps (pixel units), value, low and high.
    """
    drawn = [who for who in _EPS_CURVES if f"sweep/{who}/{metric}/eps" in series]
    if not drawn:
        raise ValueError(f"series must hold sweep/<who>/{metric}/eps for a <who> of {list(_EPS_CURVES)}, got none")
    figure = _figure(6.4, 4.9)
    axes = figure.subplots()
    scale = 1.0 if metric == "cosine" else 100.0
    levels: set[float] = set()
    for who in drawn:
        label, color, style, marker = _EPS_CURVES[who]
        if queries := series.get(f"sweep/{who}/{metric}/num_queries"):
            label += f" ({max(queries):,.0f} queries)"
        eps, value, low, high = (
            np.asarray(series[f"sweep/{who}/{metric}/{key}"]) for key in ("eps", "value", "low", "high")
        )
        axes.fill_between(255 * eps, scale * low, scale * high, color=color, alpha=0.15, linewidth=0)
        look: dict[str, Any] = {"color": color, "linestyle": style, "marker": marker, "linewidth": 2, "markersize": 5}
        axes.plot(255 * eps, scale * value, label=label, **look)
        levels |= set((255 * eps).round(6).tolist())
    # A logarithmic axis that also has a place for 0.
    smallest = min((level for level in levels if level > 0), default=1.0)
    axes.set_xscale("symlog", base=2, linthresh=smallest)
    axes.set_xticks(sorted(levels), [f"{level:.3g}" for level in sorted(levels)])
    axes.minorticks_off()
    axes.set_xlabel("largest change of a pixel, eps, in n/255 (axis in doublings)")
    axes.set_ylabel(_COSINE if metric == "cosine" else f"{METRICS[metric]} in %")
    if metric != "cosine":
        axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=9, handlelength=4.0, title="Attacker")
    return _png(figure)


def plot_layer_maxima(curves: Mapping[str, Sequence[float]], *, heading: str) -> bytes:
    """Draws the largest absolute activation after each layer, for at most four named curves."""
    figure = _figure(6.4, 4.9)
    from matplotlib.ticker import LogLocator

    axes = figure.subplots()
    looks = (("#8d8d8d", "-", "o"), ("#8d8d8d", ":", "x"), ("#1b4965", "-", "s"), ("#ca6702", "--", "D"))
    for (label, values), (color, style, marker) in zip(curves.items(), looks, strict=False):
        look: dict[str, Any] = {"color": color, "linestyle": style, "marker": marker, "linewidth": 2, "markersize": 5}
        axes.plot(range(1, len(values) + 1), values, label=label, **look)
    highest, lowest = max(map(max, curves.values())), min(map(min, curves.values()))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if highest < 20 * lowest else (1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer (1 = the first)")
    axes.set_ylabel("largest absolute activation\n(mean over images, logarithmic)")
    axes.set_title(_verbatim(heading), loc="left", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=9, handlelength=4.0)
    return _png(figure)


def plot_image_columns(columns: Sequence[tuple[str, Tensor]], *, heading: str) -> bytes:
    """Draws named columns of (B, 3, H, W) images and maps in [0, 1], of any H and W, a row per image."""
    count = len(columns[0][1])
    figure = _figure(1.3 * len(columns), 1.3 * count + 0.9)
    axes = figure.subplots(count, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns):
        axes[0, column].set_title(_verbatim(name), fontsize=9)
        for row in range(count):
            _show(axes[row, column], pictures[row])
    figure.suptitle(_verbatim(heading), x=0.02, ha="left", fontsize=10)
    return _png(figure)


def _show(axes: Any, picture: Tensor) -> None:
    """Draws a (3, H, W) image in [0, 1]."""
    axes.imshow(np.clip(picture.permute(1, 2, 0).float().cpu().numpy(), 0, 1), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _verbatim(text: str) -> str:
    """Escapes dollar signs, which begin a formula: class names may come from the Hub."""
    return text.replace("$", r"\$")


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ImportError("figures need matplotlib: pip install 'robustness-tokens[plots]'") from exc
    return Figure(figsize=(width, height), layout="constrained")


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=150)
    return file.getvalue()
