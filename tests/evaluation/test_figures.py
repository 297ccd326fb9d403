import dataclasses
import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from robustness_tokens import Normalizer, inject_tokens
from robustness_tokens.configuration import TOKENS
from robustness_tokens.evaluation import figures as evaluation_figures
from robustness_tokens.evaluation.attack_suite import Attack, AttackBatch, run_attack
from robustness_tokens.evaluation.cells import Cell
from robustness_tokens.evaluation.figures import (
    LayerObservation,
    feature_colors,
    make_figures,
    observe_layers,
    training_figures,
)
from robustness_tokens.evaluation.measurements import Measurements
from robustness_tokens.evaluation.threat_models import EvaluatedModel, attacker_views
from robustness_tokens.models.layer_stack import find_layer_stack
from robustness_tokens.report.html import FIGURES
from robustness_tokens.report.schema import Knowledge
from robustness_tokens.training.run_folder import LOG_COLUMNS, LOG_FILE, start_log
from tests.report.test_plots import make_series
from tests.support.bases import HIDDEN_SIZE, NUM_LABELS, build_base
from tests.support.families import BASES, FAMILIES


EPS = 8 / 255
OBSERVED = [*(name for name in BASES if name != "vit_masked"), "upernet_on_beit", "dinov2_classifier"]


def evaluated(model: Any, tokens: Tensor, **kwargs: Any) -> EvaluatedModel:
    return EvaluatedModel(inject_tokens(model, tokens), normalizer=Normalizer([0.5] * 3, [0.5] * 3), **kwargs)


def random_images(count: int = 2) -> Tensor:
    return torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", OBSERVED)
@pytest.mark.parametrize("with_tokens", [False, True])
def test_the_layers_of_every_family_are_seen_without_the_tokens(name: str, with_tokens: bool) -> None:
    tokens = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)) * 1e4
    task = "segmentation" if name == "upernet_on_beit" else "features"
    model = evaluated(FAMILIES[name].build(), tokens, task=task)
    stack = find_layer_stack(model.model)
    hooks = [len(layer._forward_hooks) for layer in stack.layers]
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any = None) -> None:
        value = args[0] if output is None else output
        seen.append(value[0] if isinstance(value, tuple) else value)

    # Where the tokens are out again: behind the last layer's own hooks, in timm before the norm.
    handle = (
        stack.owner.norm.register_forward_pre_hook(keep)  # type: ignore[union-attr]
        if stack.is_timm
        else stack.layers[-1].register_forward_hook(keep)
    )
    observed = observe_layers(model, random_images(), {TOKENS: tokens} if with_tokens else None)
    handle.remove()
    (last,) = seen
    assert observed.grid == (2, 2)
    assert observed.maxima.shape == (len(stack.layers),)
    assert observed.maxima[-1].item() == pytest.approx(last.abs().flatten(1).max(dim=1).values.mean().item())
    assert observed.maxima.max() < 1e3, "the tokens' own rows, of size 1e4, are left out"
    torch.testing.assert_close(observed.patches, F.layer_norm(last[:, -4:], (32,)))
    assert [len(layer._forward_hooks) for layer in stack.layers] == hooks, "it leaves nothing behind"


def test_maxima_agree_with_the_hidden_states_that_the_model_records() -> None:
    model = build_base("dinov2", num_hidden_layers=3)
    tokens = torch.randn(3, HIDDEN_SIZE)
    view = evaluated(model, tokens, task="features")
    images = random_images()
    states = model(pixel_values=view.normalizer(images), output_hidden_states=True).hidden_states
    expected = [state.abs().flatten(1).max(dim=1).values.mean().item() for state in states[1:3]]
    assert observe_layers(view, images, {TOKENS: tokens}).maxima[:2].tolist() == pytest.approx(expected)
    assert observe_layers(view, images, None).maxima[:2].tolist() != pytest.approx(expected)


def observation(patches: Tensor, grid: tuple[int, int]) -> LayerObservation:
    return LayerObservation(maxima=torch.ones(1), patches=patches, grid=grid)


def test_colours_are_the_components_in_the_order_of_their_variance() -> None:
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(2, 600, 5, generator=generator) * torch.tensor([0.1, 3.0, 0.01, 1.0, 9.0])
    (colors,) = feature_colors(observation(patches, (20, 30)), [observation(patches, (20, 30))])
    assert colors.shape == (2, 3, 20, 30)
    assert colors.min() == 0
    assert colors.max() == 1
    for channel, axis in enumerate((4, 1, 3)):
        pair = torch.stack([colors[:, channel].flatten(), patches[..., axis].flatten()])
        assert torch.corrcoef(pair)[0, 1] > 0.98, "positive: the largest entry of a component is"


def test_the_same_feature_has_the_same_colour_everywhere() -> None:
    patches = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    moved = patches.flip(1) + 0.0
    far = patches + 100
    first, second, third = feature_colors(
        observation(patches, (2, 3)), [observation(one, (2, 3)) for one in (patches, moved, far)]
    )
    torch.testing.assert_close(second, first.flatten(2).flip(2).unflatten(2, (2, 3)))
    assert not torch.allclose(third, first)
    assert third.min() >= 0
    assert third.max() <= 1


def test_a_single_patch_has_a_colour() -> None:
    one = observation(torch.randn(1, 1, 4), (1, 1))
    (colors,) = feature_colors(one, [one])
    assert colors.isfinite().all()


@pytest.fixture
def view() -> EvaluatedModel:
    tokens = torch.randn(3, HIDDEN_SIZE, generator=torch.Generator().manual_seed(1))
    return evaluated(build_base("dinov2", classifier=True), tokens)


def measured(
    view: EvaluatedModel, levels: tuple[Knowledge, ...] = ("base", "full"), *, eps: float = EPS, count: int = 5
) -> Measurements:
    attack = Attack(name="cross_entropy", num_steps=3, num_restarts=1)
    images = random_images(count)
    labels = torch.arange(count) % NUM_LABELS
    cells = [
        Cell(series="suite", view=attacker_views(level, view)[0], attack=attack, eps=eps, num_images=count)
        for level in levels
    ]
    return Measurements(
        model=view,
        batches={0: AttackBatch(images=images, labels=labels, index=torch.arange(count))},
        clean={},
        cells=cells,
        outcomes=[{} for _ in cells],
        eps=[eps],
        seed=4,
    )


IMAGE_FIGURES = {"attacked_images.png", "feature_maps.png", "layer_maxima.png"}


def test_a_report_gets_its_figures(view: EvaluatedModel) -> None:
    series = make_series("accuracy") | make_series("cosine")
    drawn = make_figures(measured(view), series, num_images=3, num_feature_maps=2)
    assert set(drawn) == {"accuracy_by_eps.png", "cosine_by_eps.png", *IMAGE_FIGURES} <= set(FIGURES)
    for content in drawn.values():
        with Image.open(io.BytesIO(content)) as image:
            assert image.format == "PNG"
            shades = image.convert("L").getextrema()
        assert shades == (0, 255)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Any, dict[str, Any]]]:
    """Returns the arguments of each plot function by its name."""
    found: dict[str, tuple[Any, dict[str, Any]]] = {}
    for name in ("plot_attacked_images", "plot_image_columns", "plot_layer_maxima"):
        monkeypatch.setattr(evaluation_figures, name, lambda *args, n=name, **kw: found.update({n: (args, kw)}))
    return found


def test_the_drawn_images_are_those_that_were_measured(
    view: EvaluatedModel, calls: dict[str, tuple[Any, dict[str, Any]]]
) -> None:
    measurements = measured(view)
    cell, batch = measurements.cells[0], measurements.batches[0]
    attacked = run_attack(cell.attack, cell.view, batch, eps=EPS, seed=4)
    make_figures(measurements, {}, num_images=3, num_feature_maps=2)
    (clean, drawn), settings = calls["plot_attacked_images"]
    assert torch.equal(clean, batch.images[:3])
    torch.testing.assert_close(drawn, attacked[:3], atol=1e-6, rtol=0)
    assert settings["eps"] == EPS
    assert settings["heading"] == ("Grey box: knows the base, not the tokens\ncross_entropy, L-inf, eps 8/255")
    classes = [view.logits(drawn, tokens).argmax(dim=1).tolist() for tokens in (None, view.tokens)]
    assert [title[1] for title in settings["titles"]] == [
        f"seen as\nLABEL_{fooled};\nwith tokens\nLABEL_{defended}" for fooled, defended in zip(*classes, strict=True)
    ]


def test_maps_and_maxima_show_clean_and_attacked_without_and_with_tokens(
    view: EvaluatedModel, calls: dict[str, tuple[Any, dict[str, Any]]]
) -> None:
    measurements = measured(view)
    make_figures(measurements, {}, num_images=3, num_feature_maps=2)
    (curves,), _ = calls["plot_layer_maxima"]
    images = measurements.batches[0].images[:3]
    assert list(curves) == [
        "clean images, without tokens",
        "clean images, with tokens",
        "attacked images, without tokens",
        "attacked images, with tokens",
    ]
    for name, tokens in (("clean images, without tokens", None), ("clean images, with tokens", view.tokens)):
        assert curves[name] == observe_layers(view, images, tokens).maxima.tolist()
    (columns,), _ = calls["plot_image_columns"]
    assert [name.replace("\n", " ") for name, _ in columns] == [
        "clean image",
        "clean, without tokens",
        "clean, with tokens",
        "attacked image",
        "attacked, without tokens",
        "attacked, with tokens",
        "white box, with tokens",
    ]
    shapes = [tuple(pictures.shape) for _, pictures in columns]
    assert shapes == [(2, 3, 16, 16), (2, 3, 2, 2), (2, 3, 2, 2)] * 2 + [(2, 3, 2, 2)]
    maps = [pictures for _, pictures in columns if pictures.shape[-1] == 2]
    assert not any(torch.equal(maps[i], maps[j]) for i in range(5) for j in range(i))


def test_another_attacker_is_drawn_where_there_is_no_grey_box(
    view: EvaluatedModel, calls: dict[str, tuple[Any, dict[str, Any]]]
) -> None:
    make_figures(measured(view, ("full",)), {}, num_images=2)
    assert calls["plot_attacked_images"][1]["heading"].startswith("White box: knows everything, tokens included\n")
    assert len(calls["plot_image_columns"][0][0]) == 6


def test_the_attack_that_stands_for_all_is_drawn(
    view: EvaluatedModel, calls: dict[str, tuple[Any, dict[str, Any]]]
) -> None:
    measurements = measured(view, ("base", "base"))
    other = dataclasses.replace(measurements.cells[0], attack=Attack(name="margin", num_steps=2, num_restarts=1))
    both = dataclasses.replace(measurements, cells=[other, measurements.cells[1]])
    make_figures(both, {}, num_images=2)
    assert "\ncross_entropy, " in calls["plot_attacked_images"][1]["heading"]
    make_figures(dataclasses.replace(measurements, cells=[other], outcomes=[{}]), {}, num_images=2)
    assert "\nmargin, " in calls["plot_attacked_images"][1]["heading"]


def test_what_was_not_measured_is_not_drawn(view: EvaluatedModel) -> None:
    measurements = measured(view)
    nothing = dataclasses.replace(measurements, cells=[], outcomes=[])
    assert make_figures(nothing, {}) == {}
    assert set(make_figures(nothing, make_series("cosine"))) == {"cosine_by_eps.png"}
    assert set(make_figures(measured(view, eps=0.0), {})) == IMAGE_FIGURES - {"attacked_images.png"}
    assert make_figures(dataclasses.replace(measurements, batches={}), {}) == {}


def test_a_segmentation_or_features_alone_have_no_classes_to_name(
    calls: dict[str, tuple[Any, dict[str, Any]]],
) -> None:
    view = evaluated(build_base("dinov2"), torch.randn(3, HIDDEN_SIZE), task="features")
    measurements = measured(view, ("base",))
    attack = Attack(name="feature_cosine", target="base", num_steps=2, num_restarts=1)
    cell = dataclasses.replace(measurements.cells[0], attack=attack)
    make_figures(dataclasses.replace(measurements, cells=[cell]), {}, num_images=2)
    assert calls["plot_attacked_images"][1]["titles"] is None


def test_without_matplotlib_there_are_no_figures_and_a_word_about_it(
    view: EvaluatedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    original = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else original(name))
    assert make_figures(measured(view), make_series("accuracy")) == {}
    assert "pip install 'robustness-tokens[plots]'" in caplog.text


def test_what_the_training_left_is_taken_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "adapter"
    rows = [dict.fromkeys(LOG_COLUMNS, 0.5) | {"step": step} for step in (1, 2, 3)]
    assert training_figures(folder) == {}
    start_log(folder / LOG_FILE, rows)
    monkeypatch.setattr(evaluation_figures, "plot_training_curves", lambda log: repr(log).encode())
    assert training_figures(folder) == {"training_curves.png": repr(rows).encode()}
    assert training_figures("adapter/on-the-hub") == {}
