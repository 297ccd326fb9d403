import builtins
import io
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from PIL import Image

from robustness_tokens.report import plots


LEVELS = (0.0, 0.5, 1.0, 4.0)
WHO = ("base, none", "none", "base", "own_tokens", "full")


def make_series(metric: str) -> dict[str, list[float]]:
    """Curves of all attackers, and of two that are not drawn."""
    series: dict[str, list[float]] = {}
    for place, who in enumerate((*WHO, "full_worst_case", "base, zero")):
        values = [0.9 - 0.1 * place - 0.02 * level for level in LEVELS]
        name = f"sweep/{who}/{metric}"
        series[f"{name}/eps"] = [level / 255 for level in LEVELS]
        series[f"{name}/value"] = values
        series[f"{name}/low"] = [value - 0.05 for value in values]
        series[f"{name}/high"] = [value + 0.05 for value in values]
    return series


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Returns what is drawn, instead of files."""
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "_png", drawn.append)
    return drawn


def test_a_curve_per_attacker_with_its_band(figures: list[Any]) -> None:
    plots.plot_eps_curves(make_series("accuracy"), metric="accuracy")
    (axes,) = figures[0].get_axes()
    assert [line.get_label() for line in axes.get_lines()] == [
        "grey box, without tokens",
        "black box",
        "grey box",
        "own tokens",
        "white box",
    ]
    white_box = axes.get_lines()[-1]
    assert list(white_box.get_xdata()) == pytest.approx(LEVELS)
    assert list(white_box.get_ydata()) == pytest.approx([50, 49, 48, 42])
    band = axes.collections[-1].get_paths()[0].vertices
    assert {(round(x, 6), round(y, 6)) for x, y in band} >= {(0, 45), (0, 55), (4, 37), (4, 47)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "0.5", "1", "4"]
    assert axes.get_xlabel() == "largest change of a pixel, eps, in n/255 (axis in doublings)"
    assert axes.get_ylabel() == "accuracy in %"
    (legend,) = figures[0].legends
    assert legend.get_title().get_text() == "Attacker"
    assert len(legend.get_texts()) == 5


def test_lines_differ_without_their_colour(figures: list[Any]) -> None:
    plots.plot_eps_curves(make_series("cosine"), metric="cosine")
    plots.plot_layer_maxima({name: [1.0, 2.0] for name in "abcd"}, heading="x")
    for figure in figures:
        lines = figure.get_axes()[0].get_lines()
        assert len({line.get_marker() for line in lines}) == len(lines)
        looks = {(line.get_linestyle(), round(sum(to_rgb(line.get_color())), 2)) for line in lines}
        assert len(looks) == len(lines)


def test_a_cosine_is_no_percentage(figures: list[Any]) -> None:
    plots.plot_eps_curves(make_series("cosine"), metric="cosine")
    (axes,) = figures[0].get_axes()
    assert list(axes.get_lines()[0].get_ydata()) == pytest.approx([0.9, 0.89, 0.88, 0.82])
    assert axes.get_ylabel() == "cosine with the clean features\nwithout tokens (1 = the same)"


def test_only_what_was_measured_is_drawn(figures: list[Any]) -> None:
    series = {name: values for name, values in make_series("miou").items() if name.startswith("sweep/base/")}
    plots.plot_eps_curves(series, metric="miou")
    assert len(figures[0].get_axes()[0].get_lines()) == 1
    with pytest.raises(ValueError, match=r"series must hold sweep/<who>/accuracy/eps"):
        plots.plot_eps_curves(series, metric="accuracy")


@pytest.mark.parametrize(("highest", "ticks"), [(22.0, [10, 15, 20]), (900.0, [10, 20, 50, 100, 200, 500, 1000])])
def test_layers_are_counted_from_one_on_a_logarithmic_axis(
    figures: list[Any], highest: float, ticks: list[float]
) -> None:
    plots.plot_layer_maxima({"clean": [9.0, 12.0, 11.0], "attacked": [9.0, 15.0, highest]}, heading="x")
    (axes,) = figures[0].get_axes()
    clean, attacked = axes.get_lines()
    assert list(clean.get_xdata()) == [1, 2, 3]
    assert list(attacked.get_ydata()) == [9, 15, highest]
    assert axes.get_yscale() == "log"
    low, high = axes.get_ylim()
    assert [tick for tick in axes.get_yticks() if low <= tick <= high] == pytest.approx(ticks)
    assert "logarithmic" in axes.get_ylabel()
    assert axes.get_xlabel() == "layer (1 = the first)"


@pytest.mark.parametrize(("eps", "factor"), [(16 / 255, "8"), (4 / 255, "32"), (0.5, "1.0")])
def test_the_difference_is_amplified_by_the_factor_beside_it(figures: list[Any], eps: float, factor: str) -> None:
    images = torch.full((2, 3, 4, 4), 0.5)
    attacked = images.clone()
    attacked[0, :, 0, 0] += eps
    attacked[1, :, 0, 0] -= eps / 2
    plots.plot_attacked_images(images, attacked, eps=eps, titles=[("a", "b"), ("c", "d")], heading="h")
    grid = figures[0].get_axes()
    assert len(grid) == 6
    shown = [np.asarray(cell.get_images()[0].get_array()) for cell in grid]
    assert shown[0] == pytest.approx(0.5)
    assert shown[2][0, 0] == pytest.approx(0.5 + eps, abs=1e-6)
    assert shown[4][0, 0] == pytest.approx(1.0, abs=1e-5)
    assert shown[5][0, 0] == pytest.approx(0.25, abs=1e-5)
    assert shown[4][1:] == pytest.approx(0.5)
    assert grid[4].get_ylabel().startswith(f"difference\ntimes {factor}\n")
    assert [cell.get_title() for cell in grid] == ["a", "c", "b", "d", "", ""]
    with pytest.raises(ValueError, match="eps must be positive"):
        plots.plot_attacked_images(images, attacked, eps=0.0, heading="x")


def test_columns_of_pictures_keep_their_own_size(figures: list[Any]) -> None:
    images, maps = torch.rand(3, 3, 8, 8), torch.rand(3, 3, 2, 2)
    plots.plot_image_columns([("image", images), ("features", maps)], heading="x")
    grid = figures[0].get_axes()
    assert [cell.get_title() for cell in grid] == ["image", "features", "", "", "", ""]
    assert np.asarray(grid[3].get_images()[0].get_array()) == pytest.approx(maps[1].permute(1, 2, 0).numpy())
    assert {cell.get_images()[0].get_interpolation() for cell in grid} == {"nearest"}


@pytest.mark.parametrize("name", ["$\\frac{", "$x", "a$b$c", "\\$"])
def test_a_class_name_is_no_formula(name: str) -> None:
    images = torch.rand(1, 3, 4, 4)
    plots.plot_attacked_images(images, images, eps=0.1, titles=[(name, name)], heading=name)
    assert plots.plot_image_columns([(name, images)], heading=name).startswith(b"\x89PNG")


def test_a_figure_is_a_png() -> None:
    with Image.open(io.BytesIO(plots.plot_eps_curves(make_series("accuracy"), metric="accuracy"))) as image:
        assert image.format == "PNG"
        assert image.size == (960, 735)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'robustness-tokens\[plots\]'"):
        plots.plot_layer_maxima({"clean": [1.0]}, heading="x")
