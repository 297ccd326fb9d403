"""Figures (optional extra `plots`): labels in plain words, a unit on every axis, readable in grey."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor


if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LINES = (("#1b4965", "-"), ("#ca6702", "--"), ("#8d8d8d", ":"))


def plot_training_curves(log_history: Sequence[Mapping[str, float]], path: str | os.PathLike[str]) -> None:
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


def plot_attacked_images(
    images: Tensor,
    attacked: Tensor,
    path: str | os.PathLike[str],
    *,
    eps: float,
    titles: Sequence[tuple[str, str]] | None = None,
) -> None:
    """Draws clean images, attacked ones, and their difference, a column each.

    Args:
        images: (B, 3, H, W) float in [0, 1].
        attacked: (B, 3, H, W) float in [0, 1].
        path: Where to write.
        eps: Budget of the attack in pixel units; the difference is drawn from -eps (black) to eps (white).
        titles: Per image what a model sees in the clean and in the attacked one, such as the predicted classes.
    """
    count = len(images)
    figure = _figure(1.25 * count + 1.1, 4.9)
    axes = figure.subplots(3, count, squeeze=False)
    names = ("clean", "attacked", f"difference\n(grey = 0,\nwhite = +{255 * eps:g}/255)")
    rows = (images, attacked, (attacked - images) / (2 * eps) + 0.5)
    for row, (name, pictures) in enumerate(zip(names, rows, strict=True)):
        for column in range(count):
            cell = axes[row, column]
            cell.imshow(np.clip(pictures[column].permute(1, 2, 0).cpu().numpy(), 0, 1), interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            if titles is not None and row < 2:
                cell.set_title(titles[column][row], fontsize=8)
        axes[row, 0].set_ylabel(name, rotation=0, ha="right", va="center")
    _save(figure, path)


def _figure(width: float, height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as exc:
        raise ImportError("figures need matplotlib: pip install 'robustness-tokens[plots]'") from exc
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Figure, path: str | os.PathLike[str]) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
