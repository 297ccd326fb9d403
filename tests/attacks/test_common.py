"""What every attack takes, refuses and returns."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustness_tokens.attacks import (
    apgd_attack,
    auto_attack,
    cross_entropy_objective,
    feature_cosine_objective,
    margin_objective,
    noise_attack,
    paper_attack,
    pgd_attack,
    pixel_cross_entropy_objective,
    square_attack,
)
from tests.support.toy_classifier import trained_toy_classifier


EPS = 0.2  # so large that AutoAttack is done after its first part


def attack_of(name: str) -> Callable[..., Tensor]:
    """Returns an attack as a function of logits, images and labels."""
    if "auto_attack" in name or "apgd" in name:
        pytest.importorskip("pyautoattack")
    settings: dict[str, Any]
    functions: dict[str, tuple[Callable[..., Tensor], dict[str, Any]]] = {
        "pgd": (pgd_attack, {"num_steps": 3}),
        "momentum": (pgd_attack, {"num_steps": 3, "momentum": 1.0, "random_start": False}),
        "uniform": (noise_attack, {"num_draws": 3}),
        "corners": (noise_attack, {"num_draws": 3, "kind": "corners"}),
        "square": (square_attack, {"num_queries": 10}),
        "apgd": (apgd_attack, {"num_steps": 3}),
        "apgd_targeted": (apgd_attack, {"num_steps": 3, "loss": "targeted_dlr"}),
        "auto_attack": (auto_attack, {}),
    }
    function, settings = functions[name]
    if function in (apgd_attack, auto_attack):
        return functools.partial(function, **settings)
    return lambda logits_fn, images, labels, **kwargs: function(
        cross_entropy_objective(logits_fn, labels), images, **{**settings, **kwargs}
    )


NAMES = ["pgd", "momentum", "uniform", "corners", "square", "apgd", "apgd_targeted", "auto_attack"]
each_attack = pytest.mark.parametrize("name", NAMES)


def some(count: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    model, images, labels = trained_toy_classifier()
    return model, images[:count], labels[:count]


@each_attack
@pytest.mark.parametrize(
    ("change", "eps", "message"),
    [
        (lambda x: 2 * x, EPS, r"images must lie in \[0, 1\], got values from .* undo the normalisation"),
        (lambda x: x - 1, EPS, r"images must lie in \[0, 1\]"),
        (lambda x: x * math.nan, EPS, r"images must lie in \[0, 1\], got values from nan"),
        (lambda x: (255 * x).byte(), EPS, "images must be float32"),
        (lambda x: x, 4, "eps must be at most 1, in pixel units .* got 4"),
        (lambda x: x, -0.1, "eps must be a finite number of at least 0, got -0.1"),
        (lambda x: x, torch.full((6, 1, 1, 1), 0.1), r"eps must be one number .* a tensor of shape \(6, 1, 1, 1\)"),
        (lambda x: x, "4/255", "eps must be one number .* '4/255'"),
    ],
)
def test_images_and_budget_are_checked_for_every_attack(
    name: str, change: Callable[[Tensor], Tensor], eps: Any, message: str
) -> None:
    model, images, labels = some()
    with pytest.raises(ValueError, match=message):
        attack_of(name)(model, change(images), labels, eps=eps)


@each_attack
def test_a_function_that_works_in_place_changes_no_result(name: str) -> None:
    model, images, labels = some()

    def in_place(x: Tensor) -> Tensor:
        return model(x.mul_(3).sub_(1).add_(1).div_(3))

    def in_place_and_back_to_noise(x: Tensor) -> Tensor:
        logits: Tensor = model(x * 1.0)
        with torch.no_grad():
            x += 5
        return logits

    before = images.clone()
    expected = attack_of(name)(model, images, labels, eps=EPS, **seeded(name))
    for function in (in_place_and_back_to_noise, in_place):
        found = attack_of(name)(function, images, labels, eps=EPS, **seeded(name))
        assert (found - before).abs().max() <= EPS + 1e-6
        assert found.min() >= 0
        assert found.max() <= 1
        assert torch.equal(images, before)
        if function is in_place_and_back_to_noise:
            assert torch.equal(found, expected)


def seeded(name: str) -> dict[str, Any]:
    return {} if name in ("apgd", "apgd_targeted", "auto_attack") else {"generator": torch.Generator().manual_seed(0)}


def test_the_papers_attack_takes_a_model_that_works_in_place() -> None:
    _, images, _ = some()
    weight = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))

    def model_fn(x: Tensor, *, in_place: bool) -> Tensor:
        x = x.mul_(2) if in_place else 2 * x
        return x.flatten(1).unflatten(1, (18, 6)) @ weight  # (B, N, D)

    found, expected = (
        paper_attack(
            functools.partial(model_fn, in_place=in_place),
            images,
            image_mean=[0.0] * 3,
            image_std=[1.0] * 3,
            num_steps=3,
            generator=torch.Generator().manual_seed(0),
        )
        for in_place in (True, False)
    )
    assert torch.equal(found, expected)


@each_attack
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_labels_of_any_integer_type_and_outputs_with_logits_do(name: str, dtype: torch.dtype) -> None:
    model, images, labels = some()
    expected = attack_of(name)(model, images, labels, eps=EPS, **seeded(name))
    found = attack_of(name)(
        lambda x: SimpleNamespace(logits=model(x)), images, labels.to(dtype), eps=torch.tensor(EPS), **seeded(name)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@each_attack
@pytest.mark.parametrize(
    ("label", "message"), [(-1, "labels must be classes from 0, got -1"), (4, "labels must be from 0 to 3, .* got 4")]
)
def test_labels_that_are_no_class_are_refused(name: str, label: int, message: str) -> None:
    model, images, labels = some()
    labels = labels.clone()
    labels[-1] = label
    with pytest.raises(ValueError, match=message):
        attack_of(name)(model, images, labels, eps=EPS)


def test_labels_that_are_no_class_are_refused_by_the_other_attacks() -> None:
    model, images, labels = some()
    settings: dict[str, Any] = {"image_mean": [0.0] * 3, "image_std": [1.0] * 3, "num_steps": 1}
    with pytest.raises(ValueError, match=r"from 0 to 3, .* got 4"):
        paper_attack(model, images, labels=torch.full_like(labels, 4), **settings)
    for make in (cross_entropy_objective, margin_objective, pixel_cross_entropy_objective):
        with pytest.raises(ValueError, match="classes from 0, got -2"):
            make(model, torch.full_like(labels, -2))
        with pytest.raises(ValueError, match=r"labels must be integers, .* got torch.float32"):
            make(model, labels.float())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("model_too", [False, True])
def test_channels_last_changes_nothing(name: str, model_too: bool) -> None:
    _, images, labels = some()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 4)).eval().requires_grad_(False)
    expected = attack_of(name)(model, images, labels, eps=0.5, **seeded(name))
    if model_too:
        model = model.to(memory_format=torch.channels_last)
    found = attack_of(name)(model, images.to(memory_format=torch.channels_last), labels, eps=0.5, **seeded(name))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_outputs_that_are_no_tensors_are_named() -> None:
    _, images, labels = some()
    for objective in (
        cross_entropy_objective(lambda x: {"scores": x}, labels),  # type: ignore[arg-type, return-value]
        feature_cosine_objective(lambda x: {"scores": x}, images.flatten(1)),  # type: ignore[arg-type, return-value]
    ):
        with pytest.raises(ValueError, match=r"_fn must return a tensor, got a dict: .* such as lambda images"):
            pgd_attack(objective, images)
    with pytest.raises(ValueError, match=r"objective must return one number per image, .* got a float"):
        pgd_attack(lambda x: 0.5, images)  # type: ignore[arg-type, return-value]


@pytest.mark.parametrize(
    ("attack", "argument"),
    [
        (square_attack, "num_queries"),
        (noise_attack, "num_draws"),
        (pgd_attack, "num_steps"),
        (pgd_attack, "num_restarts"),
    ],
)
@pytest.mark.parametrize("value", [0, 2.5])
def test_a_count_is_named_as_the_attack_names_it(attack: Callable[..., Tensor], argument: str, value: float) -> None:
    _, images, _ = some()
    with pytest.raises(ValueError, match=rf"{argument} must be a whole number of at least 1, got {value}"):
        attack(lambda x: x.flatten(1).sum(dim=1), images, **{argument: value})
