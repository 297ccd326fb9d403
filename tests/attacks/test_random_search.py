from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from robustness_tokens.attacks.objectives import Objective
from robustness_tokens.attacks.random_search import noise_attack, square_attack


EPS = 8 / 255


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def brightness(images: Tensor) -> Tensor:
    return images.flatten(1).sum(dim=1)


def generators(rows: list[int]) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(row) for row in rows]


ATTACKS: dict[str, Callable[..., Tensor]] = {
    "square": lambda objective, images, **kwargs: square_attack(objective, images, num_queries=30, **kwargs),
    "uniform": lambda objective, images, **kwargs: noise_attack(objective, images, num_draws=5, **kwargs),
    "corners": lambda objective, images, **kwargs: noise_attack(objective, images, kind="corners", **kwargs),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=list(ATTACKS))


@each_attack
def test_keeps_the_budget_and_the_range(attack: Callable[..., Tensor], images: Tensor) -> None:
    adversarial = attack(brightness, images, eps=EPS)
    assert (adversarial - images).abs().max() <= EPS + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert not torch.equal(adversarial, images)


@each_attack
def test_eps_zero_returns_the_images(attack: Callable[..., Tensor], images: Tensor) -> None:
    assert torch.equal(attack(brightness, images, eps=0), images)


@each_attack
def test_noise_belongs_to_the_image(attack: Callable[..., Tensor], images: Tensor) -> None:
    together = attack(brightness, images, eps=EPS, generator=generators([0, 1, 2, 3]))
    apart = attack(brightness, images[2:], eps=EPS, generator=generators([2, 3]))
    assert torch.equal(together[2:], apart)


@each_attack
def test_needs_no_gradient(attack: Callable[..., Tensor], images: Tensor) -> None:
    def objective(x: Tensor) -> Tensor:
        assert not torch.is_grad_enabled()
        return brightness(x.round())

    attack(objective, images.requires_grad_(), eps=EPS)


@each_attack
def test_an_objective_must_give_a_number_per_image(attack: Callable[..., Tensor], images: Tensor) -> None:
    with pytest.raises(ValueError, match="one number per image"):
        attack(lambda x: x.mean(), images, eps=EPS)


def test_square_finds_the_brightest_image_of_the_ball(images: Tensor) -> None:
    adversarial = square_attack(brightness, images, eps=EPS, num_queries=3000)
    best = (images + EPS).clamp(max=1)
    reached = (brightness(adversarial) - brightness(images)) / (brightness(best) - brightness(images))
    assert reached.min() > 0.9


def test_square_gets_better_with_queries(images: Tensor) -> None:
    few, many = (brightness(square_attack(brightness, images, eps=EPS, num_queries=n)).mean() for n in (2, 300))
    assert many > few


def test_more_draws_are_worse_for_the_image(images: Tensor) -> None:
    one, many = (
        brightness(noise_attack(brightness, images, eps=EPS, num_draws=n, generator=generators([0, 1, 2, 3])))
        for n in (1, 20)
    )
    assert (many >= one).all()
    assert (many > one).any()


def test_corners_are_corners() -> None:
    grey = torch.full((2, 3, 4, 4), 0.5)
    moved = noise_attack(brightness, grey, kind="corners", eps=EPS, num_draws=1) - grey
    assert torch.allclose(moved.abs(), torch.full_like(moved, EPS), atol=1e-7)
    assert moved.min() < 0 < moved.max()


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [({"num_queries": 0}, "num_queries"), ({"initial_area": 0.0}, "initial_area"), ({"eps": -1.0}, "eps")],
)
def test_square_refuses_what_makes_no_sense(images: Tensor, kwargs: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        square_attack(brightness, images, **kwargs)  # type: ignore[arg-type]


def test_noise_refuses_an_unknown_kind(images: Tensor) -> None:
    with pytest.raises(ValueError, match="corners"):
        noise_attack(brightness, images, kind="normal")  # type: ignore[arg-type]


def test_square_asks_nothing_more_of_an_image_that_is_done(images: Tensor) -> None:
    asked = []

    def score(candidates: Tensor, numbers: Tensor) -> Tensor:
        asked.append(numbers.tolist())
        return brightness(candidates) - 1000 * numbers

    objective = Objective(score, torch.tensor([0, 1, 0, 1]))
    found = square_attack(objective, images, eps=EPS, num_queries=30, stop_above=0, generator=generators([0, 1, 2, 3]))
    assert asked == [[0, 1, 0, 1], *[[1, 1]] * 29]
    whole = square_attack(objective, images, eps=EPS, num_queries=30, generator=generators([0, 1, 2, 3]))
    assert torch.equal(found[1::2], whole[1::2])
    assert not torch.equal(found[::2], whole[::2])
    assert ((found - images).abs() <= EPS + 1e-6).all()
