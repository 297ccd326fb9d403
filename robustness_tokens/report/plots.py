"""Figures (optional extra `plots`): labels in plain words, a unit on every axis, readable in grey."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

import numpy as np
from torch import Tensor


if TYPE_CHECKING:
    from matplotlib.figure import Figure


Target: TypeAlias = str | os.PathLike[str] | IO[bytes]
"""A path, whose ending chooses the format, or an open file, which gets a PNG."""

_SWEEP_CURVES = (
    ("invariance_cosine", "clean images, with tokens", "o"),
    ("adversarial_cosine", "attacked images, with tokens", "s"),
)
_LINES = (("#1b4965", "-"), ("#ca6702", "--"), ("#8d8d8d", ":"))
# By the name of the curve in a report: in words, and so that the lines differ in grey too.
_ATTACKERS = {
    "base, none": ("without tokens (knows the backbone)", "#8d8d8d", ":", "x"),
    "none": ("knows nothing (noise)", "#5a9fd4", (0, (6, 2, 1, 2, 1, 2)), "^"),
    "base": ("knows the backbone (grey box)", "#1b4965", "-", "o"),
    "own_tokens": ("trained own tokens", "#ca6702", "--", "s"),
    "full": ("knows the tokens (white box)", "#9b2226", "-.", "D"),
}
_METRICS = {
    "accuracy": "accuracy",
    "miou": "mean IoU",
    "mean_image_miou": "mean of the images' mean IoU",
    "cosine": "cosine with the clean features\nwithout tokens (1 = the same)",
}


def plot_training_curves(log_history: Sequence[Mapping[str, float]], path: Target) -> None:
    """Draws the two cosines of the training and the one without tokens, against the step.

    Args:
        log_history: `RobustnessTokenTrainer.log_history`.
        path: Where to write; the ending chooses the format.
    """
    figure = _figure(7.2, 4.0)
    axes = figure.subplots()
    curves = (
        ("invariance_cosine", "clean images, with tokens"),
        ("adversarial_cosine", "attacked images, with tokens"),
        ("baseline_cosine", "attacked images, without tokens"),
    )
    steps = [row["step"] for row in log_history]
    for (key, label), (color, style) in zip(curves, _LINES, strict=True):
        values = [row[key] for row in log_history]
        axes.plot(steps, values, color=color, linestyle=style, linewidth=2, label=label)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("cosine with the clean features\nwithout tokens (1 = the same)")
    axes.set_title("What training does to the features", loc="left")
    axes.grid(alpha=0.3)
    figure.legend(frameon=False, loc="outside lower center", ncols=3, fontsize=8)
    _save(figure, path)


def plot_sweep(rows: Sequence[Mapping[str, float]], path: Target) -> None:
    """Draws the cosine of clean and of attacked images against the number of tokens, a panel per learning rate.

    A marker is a seed's; the line joins their means, and the bar goes from the lowest to the highest.

    Args:
        rows: Of a sweep, each with the fields of `SweepRow`.
        path: Where to write; the ending chooses the format.
    """
    learning_rates = sorted({row["learning_rate"] for row in rows})
    counts = sorted({row["num_robustness_tokens"] for row in rows})
    num_seeds = len({row["seed"] for row in rows})
    figure = _figure(max(5.2, 1.4 + 3.4 * len(learning_rates)), 4.3)
    panels = figure.subplots(1, len(learning_rates), sharey=True, squeeze=False)[0]
    baseline = float(np.mean([row["baseline_cosine"] for row in rows]))
    for axes, learning_rate in zip(panels, learning_rates, strict=True):
        of_panel = [row for row in rows if row["learning_rate"] == learning_rate]
        for (key, label, marker), (color, style) in zip(_SWEEP_CURVES, _LINES[:2], strict=True):
            groups = [[row[key] for row in of_panel if row["num_robustness_tokens"] == count] for count in counts]
            places = [place for place, values in enumerate(groups) if values]
            means = [float(np.mean(groups[place])) for place in places]
            below = [mean - min(groups[place]) for place, mean in zip(places, means, strict=True)]
            above = [max(groups[place]) - mean for place, mean in zip(places, means, strict=True)]
            look: dict[str, Any] = {"color": color, "linestyle": style, "linewidth": 2, "capsize": 4}
            axes.errorbar(places, means, yerr=[below, above], label=label, **look)
            for place in places:
                values = groups[place]
                axes.plot([place] * len(values), values, marker, color=color, markersize=5, fillstyle="none")
        color, style = _LINES[2]
        axes.axhline(baseline, color=color, linestyle=style, linewidth=2, label="attacked images, without tokens")
        axes.set_xticks(range(len(counts)), [f"{count:g}" for count in counts])
        axes.set_xlim(-0.4, len(counts) - 0.6)
        axes.set_xlabel("number of tokens")
        axes.set_title(f"learning rate {learning_rate:g}", loc="left", fontsize=10)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("cosine with the clean features\nwithout tokens (1 = the same)")
    seeds = "1 seed" if num_seeds == 1 else f"{num_seeds} seeds: mean, lowest and highest"
    figure.suptitle(f"How many tokens it takes ({seeds})", x=0.02, ha="left", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    columns = 3 if len(panels) > 1 else 1  # three don't fit under one panel
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=columns, fontsize=8)
    _save(figure, path)


def plot_trade_off(rows: Sequence[Mapping[str, Any]], path: Target, *, eps: float) -> None:
    """Draws accuracy on attacked images against accuracy on clean ones, a number for each way of training.

    Args:
        rows: Each with `way`, and the accuracies `clean`, `grey_box` and `white_box`; several of a way are averaged.
        path: Where to write; the ending chooses the format.
        eps: Of the attacks, in pixel units.
    """
    ways = list(dict.fromkeys(row["way"] for row in rows))
    panels = (("grey_box", "knows the backbone (grey box)"), ("white_box", "knows the tokens (white box)"))
    figure = _figure(8.4, 4.6)
    all_axes = figure.subplots(1, 2, sharex=True, sharey=True)
    for axes, (key, title) in zip(all_axes, panels, strict=True):
        numbers: dict[tuple[float, float], list[str]] = {}  # several ways may end at the same point
        for number, way in enumerate(ways, start=1):
            of_way = [row for row in rows if row["way"] == way]
            clean, attacked = (float(np.mean([float(row[name]) for row in of_way])) for name in ("clean", key))
            axes.plot(clean, attacked, "o", color=_LINES[0][0], markersize=5, label=f"{number}  {way}")
            numbers.setdefault((round(clean, 3), round(attacked, 3)), []).append(str(number))
        for point, there in numbers.items():
            # A longer label goes where the neighbours' are not.
            place = {"xytext": (4, 4)} if len(there) == 1 else {"xytext": (-4, -5), "ha": "right", "va": "top"}
            axes.annotate(", ".join(there), point, textcoords="offset points", fontsize=9, **place)
        axes.set_title(f"the attacker {title}", loc="left", fontsize=10)
        axes.set_xlabel("accuracy on clean images")
        axes.margins(0.12)
        axes.grid(alpha=0.3)
    all_axes[0].set_ylabel(f"accuracy under attack, eps {255 * eps:g}/255 in pixels")
    all_axes[0].set_ylim(bottom=0)
    handles, labels = all_axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, loc="outside lower center", ncols=3, fontsize=8, handlelength=0)
    _save(figure, path)


def plot_attacked_images(
    images: Tensor,
    attacked: Tensor,
    path: Target,
    *,
    eps: float,
    titles: Sequence[tuple[str, str]] | None = None,
    heading: str | None = None,
) -> None:
    """Draws clean images, attacked ones, and their difference, amplified; a column per image.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        attacked: (B, 3, H, W) float in [0, 1].
        path: Where to write.
        eps: Budget of the attack in pixel units; the difference is drawn from -eps (black) to eps (white).
        titles: Per image what a model sees in the clean and in the attacked one, such as the predicted classes.
        heading: Over the whole.

    Raises:
        ValueError: If `eps` is not positive.
    """
    if eps <= 0:
        raise ValueError(f"eps must be positive to draw a difference of at most eps, got {eps}")
    count = len(images)
    figure = _figure(1.25 * count + 1.3, 5.1 if heading is None else 5.7)
    axes = figure.subplots(3, count, squeeze=False)
    difference = f"difference\ntimes {0.5 / eps:.{0 if eps < 0.1 else 1}f}\n(grey = 0,\nwhite =\n+{255 * eps:.3g}/255)"
    names = ("clean", "attacked", difference)
    rows = (images, attacked, (attacked - images) / (2 * eps) + 0.5)
    for row, (name, pictures) in enumerate(zip(names, rows, strict=True)):
        for column in range(count):
            _show(axes[row, column], pictures[column])
            if titles is not None and row < 2:
                axes[row, column].set_title(_verbatim(titles[column][row]), fontsize=8)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
    if heading is not None:
        figure.suptitle(_verbatim(heading), x=0.02, ha="left", fontsize=10)
    _save(figure, path)


def plot_eps_curves(series: Mapping[str, Sequence[float]], path: Target, *, metric: str) -> None:
    """Draws a metric against the attack's budget, a line with its 95% band per attacker.

    Args:
        series: Of a report: `sweep/<who>/<metric>/` and `eps` (pixel units), `value`, `low`, `high`.
        path: Where to write.
        metric: `"accuracy"`, `"cosine"`, `"miou"` or `"mean_image_miou"`.

    Raises:
        ValueError: If the series hold no curve of this metric.
    """
    drawn = [who for who in _ATTACKERS if f"sweep/{who}/{metric}/eps" in series]
    if not drawn:
        raise ValueError(f"series must hold sweep/<who>/{metric}/eps for a <who> of {list(_ATTACKERS)}, got none")
    figure = _figure(6.4, 4.9)
    axes = figure.subplots()
    scale = 1.0 if metric == "cosine" else 100.0
    levels: set[float] = set()
    for who in drawn:
        label, color, style, marker = _ATTACKERS[who]
        eps, value, low, high = (
            np.asarray(series[f"sweep/{who}/{metric}/{key}"]) for key in ("eps", "value", "low", "high")
        )
        axes.fill_between(255 * eps, scale * low, scale * high, color=color, alpha=0.15, linewidth=0)
        look: dict[str, Any] = {"color": color, "linestyle": style, "marker": marker, "linewidth": 2, "markersize": 5}
        axes.plot(255 * eps, scale * value, label=label, **look)
        levels |= set((255 * eps).round(6).tolist())
    # Doublings are as wide as each other, and 0 still has its place.
    smallest = min((level for level in levels if level > 0), default=1.0)
    axes.set_xscale("symlog", base=2, linthresh=smallest)
    axes.set_xticks(sorted(levels), [f"{level:.3g}" for level in sorted(levels)])
    axes.minorticks_off()
    axes.set_xlabel("largest change of a pixel, eps, in n/255 (axis in doublings)")
    axes.set_ylabel(_METRICS[metric] + ("" if metric == "cosine" else " in %"))
    if metric != "cosine":
        axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    look = {"ncols": 2, "fontsize": 9, "handlelength": 4.0, "title": "What the attacker knows", "frameon": False}
    figure.legend(loc="outside lower center", **look)
    _save(figure, path)


def plot_layer_maxima(curves: Mapping[str, Sequence[float]], path: Target, *, heading: str | None = None) -> None:
    """Draws the largest absolute activation after each layer.

    Args:
        curves: By what the model saw and held, in words, at most four: a value per layer.
        path: Where to write.
        heading: Over the whole.
    """
    figure = _figure(6.4, 4.9)
    from matplotlib.ticker import LogLocator

    axes = figure.subplots()
    looks = (("#8d8d8d", "-", "o"), ("#8d8d8d", ":", "x"), ("#1b4965", "-", "s"), ("#ca6702", "--", "D"))
    for (label, values), (color, style, marker) in zip(curves.items(), looks, strict=False):
        layers = range(1, len(values) + 1)
        look: dict[str, Any] = {"color": color, "linestyle": style, "marker": marker, "linewidth": 2, "markersize": 5}
        axes.plot(layers, values, label=label, **look)
    highest, lowest = max(map(max, curves.values())), min(map(min, curves.values()))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if highest < 20 * lowest else (1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel("layer (1 = the first)")
    axes.set_ylabel("largest absolute activation\n(mean over images, logarithmic)")
    if heading is not None:
        axes.set_title(_verbatim(heading), loc="left", fontsize=10)
    axes.grid(alpha=0.3, which="both")
    figure.legend(frameon=False, loc="outside lower center", ncols=2, fontsize=9, handlelength=4.0)
    _save(figure, path)


def plot_image_columns(columns: Sequence[tuple[str, Tensor]], path: Target, *, heading: str | None = None) -> None:
    """Draws pictures and maps side by side, a row per image.

    Args:
        columns: What each shows, and (B, 3, H, W) float in [0, 1], of any H and W.
        path: Where to write.
        heading: Over the whole.
    """
    count = len(columns[0][1])
    figure = _figure(1.3 * len(columns), 1.3 * count + 0.9)
    axes = figure.subplots(count, len(columns), squeeze=False)
    for column, (name, pictures) in enumerate(columns):
        axes[0, column].set_title(_verbatim(name), fontsize=9)
        for row in range(count):
            _show(axes[row, column], pictures[row])
    if heading is not None:
        figure.suptitle(_verbatim(heading), x=0.02, ha="left", fontsize=10)
    _save(figure, path)


def _show(axes: Any, picture: Tensor) -> None:
    """Draws (3, H, W)."""
    axes.imshow(np.clip(picture.permute(1, 2, 0).float().cpu().numpy(), 0, 1), interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _verbatim(text: str) -> str:
    """A text in which no dollar sign begins a formula: class names may come from the Hub."""
    return text.replace("$", r"\$")


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ImportError("figures need matplotlib: pip install 'robustness-tokens[plots]'") from exc
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: Target) -> None:
    if isinstance(path, str | os.PathLike):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
