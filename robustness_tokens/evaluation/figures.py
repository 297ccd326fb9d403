"""The figures of a report: curves over eps, and a few images with their features in the model.

Shapes: B images, L layers, N the base's own sequence, K robustness tokens, P patches, D width.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..configuration import TokenState
from ..models import find_layer_stack, patch_grid
from ..report import (
    Knowledge,
    Metric,
    describe_attacker,
    plain,
    plot_attacked_images,
    plot_eps_curves,
    plot_image_columns,
    plot_layer_maxima,
    plot_training_curves,
)
from ..training import LOG_FILE, read_log
from .attack_suite import AttackBatch, run_attack
from .cells import Cell
from .measurements import Measurements
from .plan import main_attack
from .threat_models import EvaluatedModel


logger = logging.getLogger(__name__)

# The figures show images of the first of these attackers that was evaluated.
_DRAWN: tuple[Knowledge, ...] = ("base", "own_tokens", "full", "none")


@dataclass(frozen=True, kw_only=True)
class LayerObservation:
    """Outputs of the layers of a model for some images, without the rows of the robustness tokens."""

    maxima: Tensor  # (L,), the largest absolute activation after each layer, mean over the images
    patches: Tensor  # (B, P, D) float32 after the last layer, each normalised to mean 0 and variance 1
    grid: tuple[int, int]  # rows and columns of the patches


def make_figures(
    measurements: Measurements,
    series: Mapping[str, Sequence[float]],
    *,
    num_images: int = 8,
    num_feature_maps: int = 4,
) -> dict[str, bytes]:
    """Draws the figures of a report as PNG files by name, none without matplotlib; attacks a few images again.

    Runs no collective: the main process, which holds the first batch, calls it alone, with the model in eval mode.
    """
    if not _has_matplotlib():
        return {}
    figures = {
        f"{metric}_by_eps.png": plot_eps_curves(series, metric=metric)
        for metric in get_args(Metric)
        if any(name.startswith("sweep/") and name.endswith(f"/{metric}/eps") for name in series)
    }
    cells = [cell for knowledge in _DRAWN if (cell := _find_cell(measurements, knowledge)) is not None]
    if cells and measurements.batches:
        batch = measurements.batches[min(measurements.batches)].first(num_images)
        figures |= _image_figures(measurements, batch, cells, num_feature_maps)
    return figures


def training_figures(adapter: str | os.PathLike[str]) -> dict[str, bytes]:
    """Draws the training curves from the log beside an adapter, as PNG files by name; none without a log."""
    rows = read_log(Path(adapter) / LOG_FILE, last_step=sys.maxsize)
    return {"training_curves.png": plot_training_curves(rows)} if rows and _has_matplotlib() else {}


def _image_figures(
    measurements: Measurements, batch: AttackBatch, cells: Sequence[Cell], num_feature_maps: int
) -> dict[str, bytes]:
    model, cell = measurements.model, cells[0]
    attacked = run_attack(cell.attack, cell.view, batch, eps=cell.eps, seed=measurements.seed)
    heading = f"{describe_attacker(cell.view.knowledge)}\n{cell.attack.name}, L-inf, eps {255 * cell.eps:.3g}/255"
    states = {
        "clean images, without tokens": observe_layers(model, batch.images, None),
        "clean images, with tokens": observe_layers(model, batch.images, model.tokens),
        "attacked images, without tokens": observe_layers(model, attacked, None),
        "attacked images, with tokens": observe_layers(model, attacked, model.tokens),
    }
    maxima = {name: state.maxima.tolist() for name, state in states.items()}
    figures = {"layer_maxima.png": plot_layer_maxima(maxima, heading=heading)}
    if cell.eps > 0:
        titles = _titles(model, batch.images, attacked) if model.task == "classification" else None
        figures["attacked_images.png"] = plot_attacked_images(
            batch.images, attacked, eps=cell.eps, titles=titles, heading=heading
        )
    observed = list(states.values())
    white_box = next((one for one in cells[1:] if one.view.knowledge == "full"), None)
    if white_box is not None:
        worse = run_attack(white_box.attack, white_box.view, batch, eps=white_box.eps, seed=measurements.seed)
        observed.append(observe_layers(model, worse, model.tokens))
    maps = feature_colors(observed[0], observed)
    columns = [
        ("clean image", batch.images),
        ("clean,\nwithout tokens", maps[0]),
        ("clean,\nwith tokens", maps[1]),
        ("attacked image", attacked),
        ("attacked,\nwithout tokens", maps[2]),
        ("attacked,\nwith tokens", maps[3]),
        *(("white box,\nwith tokens", one) for one in maps[4:]),
    ]
    columns = [(name, shown[:num_feature_maps]) for name, shown in columns]
    figures["feature_maps.png"] = plot_image_columns(columns, heading=heading)
    return figures


@torch.no_grad()
def observe_layers(model: EvaluatedModel, images: Tensor, tokens: TokenState | None) -> LayerObservation:
    """Runs (B, 3, H, W) images in [0, 1] with tokens, or the base alone, and observes every layer."""
    stack = find_layer_stack(model.model)
    rows, columns = patch_grid(stack.owner, images)
    maxima: list[Tensor] = []
    last = torch.empty(0)

    def record(module: nn.Module, args: Any, output: Any) -> None:
        nonlocal last
        hidden = output[0] if isinstance(output, tuple) else output
        last = hidden[:, model.injector.num_active_tokens :].float()  # (B, K + N, D) -> (B, N, D)
        maxima.append(last.abs().amax(dim=(1, 2)).mean())

    # Prepended, to run before the hook that removes the tokens after the last layer.
    handles = [layer.register_forward_hook(record, prepend=True) for layer in stack.layers]
    try:
        run = model.logits if model.feature_view is None else model.features
        run(images, tokens, exact=True)
    finally:
        for handle in handles:
            handle.remove()
    if last.shape[1] < rows * columns:
        raise ValueError(
            f"images of {tuple(images.shape[2:])} pixels are {rows} x {columns} patches, but the layers of "
            f"{type(model.model).__name__} return {last.shape[1]} rows, expected one per patch"
        )
    patches = last[:, last.shape[1] - rows * columns :]  # (B, N, D) -> (B, P, D): the patches come last
    return LayerObservation(
        maxima=torch.stack(maxima).cpu(),
        patches=F.layer_norm(patches, patches.shape[-1:]).cpu(),
        grid=(rows, columns),
    )


def feature_colors(reference: LayerObservation, observations: Sequence[LayerObservation]) -> list[Tensor]:
    """Returns feature maps as colours, (B, 3, rows, columns) in [0, 1] for each observation of the same D.

    Red, green and blue are the first three principal components of `reference`, scaled by its range in all maps, so
    that the same colour means the same feature.
    """
    flat = reference.patches.flatten(0, 1).double()  # (B * P, D)
    mean = flat.mean(dim=0)
    centred = flat - mean
    _, vectors = torch.linalg.eigh(centred.T @ centred)  # ascending
    components = vectors[:, -3:].flip(1)  # (D, 3)
    components = components * components.gather(0, components.abs().argmax(dim=0, keepdim=True)).sign()
    projected = centred @ components
    low, high = (projected.quantile(share, dim=0) for share in (0.01, 0.99))

    def color(observed: LayerObservation) -> Tensor:
        values = (observed.patches.double() - mean) @ components  # (B, P, 3)
        shades = ((values - low) / (high - low).clamp_min(1e-9)).clamp(0, 1)
        return shades.float().permute(0, 2, 1).unflatten(2, observed.grid)  # (B, 3, rows, columns)

    return [color(observed) for observed in observations]


def _find_cell(measurements: Measurements, knowledge: Knowledge) -> Cell | None:
    """Returns a cell of the attacker, preferably of the main attack at the main eps."""
    name, _, target = main_attack(measurements.model).partition(":")
    suite: dict[str, Any] = {"series": "suite", "knowledge": knowledge}
    at_eps = {**suite, "eps": measurements.eps[0]}
    for wanted in ({**at_eps, "attack": name, "target": target or None}, at_eps, suite):
        if found := measurements.select(**wanted):
            return found[0][0]
    return None


@torch.no_grad()
def _titles(model: EvaluatedModel, images: Tensor, attacked: Tensor) -> list[tuple[str, str]]:
    """Returns the classes that the model predicts without and with tokens, as text."""
    names: Mapping[int, str] = getattr(getattr(model.model, "config", None), "id2label", None) or {}

    def seen(pictures: Tensor, tokens: TokenState | None) -> list[str]:
        classes = model.logits(pictures, tokens, exact=True).argmax(dim=1).tolist()
        return [plain(names.get(index, f"class {index}"))[:16] for index in classes]

    classes = zip(seen(images, None), seen(attacked, None), seen(attacked, model.tokens), strict=True)
    return [
        (f"seen as\n{clean}", f"seen as\n{fooled};\nwith tokens\n{defended}") for clean, fooled, defended in classes
    ]


def _has_matplotlib() -> bool:
    found = importlib.util.find_spec("matplotlib") is not None
    if not found:
        logger.warning("The report has no figures: pip install 'robustness-tokens[plots]'")
    return found
