import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from robustness_tokens.attacks.objectives import Objective, cross_entropy_objective
from robustness_tokens.attacks.pgd import pgd_attack


EPS = 8 / 255


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=seeded(seed))


def linear_objective(weight: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda images: (weight * images).flatten(1).sum(dim=1)


def bumpy_objective(images: Tensor) -> Tensor:
    """Many local maxima inside the ball, so that starts and restarts matter."""
    return torch.sin(300 * images).flatten(1).sum(dim=1)


@pytest.fixture
def images() -> Tensor:
    return random_images(4, 3, 5, 5)


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(3, 5, 5, generator=seeded(1))


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_objective_reaches_the_closed_form(
    images: Tensor, weight: Tensor, random_start: bool, num_steps: int, dtype: torch.dtype
) -> None:
    images, weight = images.to(dtype), weight.to(dtype)
    adversarial = pgd_attack(
        linear_objective(weight), images, eps=EPS, num_steps=num_steps, random_start=random_start, generator=seeded(2)
    )
    torch.testing.assert_close(adversarial, (images + EPS * weight.sign()).clamp(0, 1), rtol=0, atol=1e-7)
    assert adversarial.dtype == dtype
    assert not adversarial.requires_grad


def test_linear_classifier_reaches_the_closed_form(images: Tensor, weight: Tensor) -> None:
    labels = torch.tensor([0, 1, 0, 1])
    objective = cross_entropy_objective(
        lambda x: torch.stack([linear_objective(weight)(x), -linear_objective(weight)(x)], dim=1), labels
    )
    away = torch.where(labels == 0, -1.0, 1.0).view(-1, 1, 1, 1)
    adversarial = pgd_attack(objective, images, eps=EPS, generator=seeded(2))
    torch.testing.assert_close(adversarial, (images + EPS * away * weight.sign()).clamp(0, 1), rtol=0, atol=1e-7)


def test_steps_have_the_length_asked_for(weight: Tensor) -> None:
    images = torch.full((2, 3, 5, 5), 0.5)
    adversarial = pgd_attack(
        linear_objective(weight), images, eps=0.1, step_size=0.01, num_steps=3, random_start=False
    )
    torch.testing.assert_close(adversarial, images + 0.03 * weight.sign(), rtol=0, atol=1e-6)


def test_random_start_is_uniform_in_the_ball_and_the_range() -> None:
    images = torch.tensor([0.0, 0.5, 1.0]).expand(1, 2000, 3)
    starts = []

    def objective(iterate: Tensor) -> Tensor:
        starts.append(iterate.detach())
        return iterate.flatten(1).sum(dim=1)

    pgd_attack(objective, images, eps=0.1, num_steps=1, generator=seeded(0))
    black, grey, white = (starts[0] - images)[0].unbind(dim=1)
    assert grey.min() == pytest.approx(-0.1, abs=1e-3)
    assert grey.max() == pytest.approx(0.1, abs=1e-3)
    assert grey.std() == pytest.approx(0.2 / math.sqrt(12), rel=0.05)
    assert black.min() == 0
    assert white.max() == 0
    assert (black == 0).float().mean() == pytest.approx(0.5, abs=0.05)


@settings(deadline=None, max_examples=60)
@given(
    eps=st.floats(0, 1),
    step_size=st.none() | st.floats(1e-4, 2),
    num_steps=st.integers(1, 4),
    num_restarts=st.integers(1, 2),
    random_start=st.booleans(),
    momentum=st.sampled_from([0.0, 0.9, 1.0, 2.0]),
    contrast=st.sampled_from([0.0, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
)
def test_budget_and_range_are_never_exceeded(
    eps: float,
    step_size: float | None,
    num_steps: int,
    num_restarts: int,
    random_start: bool,
    momentum: float,
    contrast: float,
    seed: int,
) -> None:
    noise = torch.randn(2, 3, 4, 4, generator=seeded(seed))
    images = (0.5 + contrast * noise).clamp(0, 1)
    adversarial = pgd_attack(
        bumpy_objective,
        images,
        eps=eps,
        step_size=step_size,
        num_steps=num_steps,
        num_restarts=num_restarts if random_start else 1,
        random_start=random_start,
        momentum=momentum,
        generator=seeded(seed),
    )
    assert (adversarial - images).abs().max() <= eps + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1


@pytest.mark.parametrize("random_start", [False, True])
def test_no_budget_returns_the_images_exactly(images: Tensor, random_start: bool) -> None:
    adversarial = pgd_attack(bumpy_objective, images, eps=0, random_start=random_start)
    assert torch.equal(adversarial, images)
    assert adversarial.data_ptr() != images.data_ptr()


def test_best_iterate_is_kept_where_steps_overshoot() -> None:
    images = torch.full((2, 1), 0.5)
    target = torch.tensor([[0.58], [0.42]])
    # From .5 by steps of .06: .56 (off by .02), .62 (.04), .56, .62, ...
    adversarial = pgd_attack(
        lambda x: -(x - target).abs().sum(dim=1), images, eps=0.3, step_size=0.06, num_steps=4, random_start=False
    )
    torch.testing.assert_close(adversarial, torch.tensor([[0.56], [0.44]]))


def test_first_iterate_is_kept_where_every_step_is_worse() -> None:
    images = torch.full((1, 1), 0.5)
    adversarial = pgd_attack(
        lambda x: -(x - 0.501).abs().sum(dim=1), images, eps=0.3, step_size=0.1, num_steps=1, random_start=False
    )
    assert torch.equal(adversarial, images)


def test_the_last_iterate_is_returned_where_asked_and_costs_an_evaluation_less() -> None:
    images = torch.full((1, 1), 0.5)
    calls: list[Tensor] = []

    def objective(candidates: Tensor) -> Tensor:
        calls.append(candidates.detach())
        return -(candidates - 0.6).abs().sum(dim=1)

    options: dict[str, Any] = {"eps": 0.3, "step_size": 0.15, "num_steps": 3, "random_start": False}
    last = pgd_attack(objective, images, keep_best=False, **options)
    torch.testing.assert_close(last, torch.tensor([[0.65]]))  # 0.5, 0.65, 0.5, 0.65
    assert len(calls) == 3
    assert not last.requires_grad
    for wrong in ({"num_restarts": 2, "random_start": True}, {"stop_above": 0.0}):
        with pytest.raises(ValueError, match="keep_best=False returns the last iterate"):
            pgd_attack(objective, images, keep_best=False, **{**options, **wrong})


def test_best_iterate_is_chosen_per_image() -> None:
    images = torch.full((2, 1), 0.5)
    # Image 0 climbs on; image 1 would overshoot its maximum at once.
    adversarial = pgd_attack(
        lambda x: torch.stack([x[0, 0], -(x[1, 0] - 0.51).abs()]),
        images,
        eps=0.3,
        step_size=0.1,
        num_steps=2,
        random_start=False,
    )
    torch.testing.assert_close(adversarial, torch.tensor([[0.7], [0.5]]))


def test_result_scores_as_high_as_the_best_iterate_seen(images: Tensor) -> None:
    seen = []

    def objective(iterate: Tensor) -> Tensor:
        values = bumpy_objective(iterate)
        seen.append(values.detach())
        return values

    adversarial = pgd_attack(objective, images, eps=EPS, num_steps=5, num_restarts=3, generator=seeded(0))
    assert torch.equal(bumpy_objective(adversarial), torch.stack(seen).amax(dim=0))


def test_more_restarts_are_never_worse(images: Tensor) -> None:
    scores = torch.stack(
        [
            bumpy_objective(pgd_attack(bumpy_objective, images, eps=EPS, num_restarts=restarts, generator=seeded(0)))
            for restarts in (1, 2, 4, 8)
        ]
    )
    assert (scores.diff(dim=0) >= 0).all()
    assert scores[-1].sum() > scores[0].sum() + 1


def test_every_step_costs_one_gradient(images: Tensor) -> None:
    class CountBackward(torch.autograd.Function):
        calls = 0

        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, gradient: Tensor) -> Tensor:
            CountBackward.calls += 1
            return gradient

    evaluations = 0

    def objective(iterate: Tensor) -> Tensor:
        nonlocal evaluations
        evaluations += 1
        return bumpy_objective(CountBackward.apply(iterate))

    pgd_attack(objective, images, num_steps=5, num_restarts=3)
    assert CountBackward.calls == 3 * 5
    assert evaluations == 3 * (5 + 1)


class Counting:
    """An objective whose image i scores the sum of its pixels minus i, and counts who is asked."""

    def __init__(self, count: int) -> None:
        self.asked: list[list[int]] = []
        self.objective = Objective(self._score, torch.arange(count))

    def _score(self, images: Tensor, numbers: Tensor) -> Tensor:
        self.asked.append(numbers.tolist())
        return images.flatten(1).sum(dim=1) - numbers


def test_an_image_is_done_once_it_exceeds_the_threshold() -> None:
    images, counting = torch.full((4, 10), 0.5), Counting(4)
    settings: dict[str, Any] = {"eps": 0.4, "step_size": 0.1, "num_steps": 4, "random_start": False}
    adversarial = pgd_attack(counting.objective, images, stop_above=4.5, **settings)
    # Image i begins at 5 - i and gains 1 with each step.
    assert counting.asked == [[0, 1, 2, 3], [1, 2, 3], [2, 3], [3]]
    assert [round(image[0].item(), 4) for image in adversarial] == [0.5, 0.6, 0.7, 0.8]


def test_what_goes_on_is_attacked_as_it_would_be_alone() -> None:
    images, never = random_images(6, 3, 5, 5), math.inf
    weight = torch.randn(3, 5, 5, generator=seeded(1))

    def score(iterate: Tensor, offsets: Tensor) -> Tensor:
        return (weight * iterate).flatten(1).sum(dim=1) + torch.sin(90 * iterate).flatten(1).mean(dim=1) + offsets

    objective = Objective(score, torch.tensor([0.0, 9, 0, 9, 0, 9]) - score(images, torch.tensor(0.0)))
    settings: dict[str, Any] = {"eps": EPS, "num_steps": 5, "num_restarts": 3}
    stopped = pgd_attack(objective, images, stop_above=8, generator=seeded(4), **settings)
    whole = pgd_attack(objective, images, stop_above=never, generator=seeded(4), **settings)
    assert torch.allclose(stopped[::2], whole[::2], atol=1e-6)
    assert (objective(stopped)[1::2] > 8).all()
    assert not torch.allclose(stopped[1::2], whole[1::2], atol=1e-3)


def test_an_attack_on_images_that_are_all_done_is_over() -> None:
    counting = Counting(3)
    pgd_attack(counting.objective, random_images(3, 3, 5, 5), stop_above=-100, num_restarts=4)
    assert counting.asked == [[0, 1, 2]]


def test_a_threshold_needs_an_objective_of_some_of_the_images(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"stop_above needs an objective .* got a function"):
        pgd_attack(bumpy_objective, images, stop_above=1e9)


MI_FGSM: dict[str, Any] = {"momentum": 1.0, "random_start": False}


def test_momentum_on_a_linear_objective_reaches_the_closed_form(images: Tensor, weight: Tensor) -> None:
    adversarial = pgd_attack(linear_objective(weight), images, eps=EPS, step_size=EPS / 7, num_steps=7, **MI_FGSM)
    torch.testing.assert_close(adversarial, (images + EPS * weight.sign()).clamp(0, 1), rtol=0, atol=1e-6)


class Scripted(torch.autograd.Function):
    """Scores images by their sum, with a gradient for each step that is given beforehand."""

    gradients: Iterator[Tensor]

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.flatten(1).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        return next(Scripted.gradients)


def iterates(gradients: list[Tensor], images: Tensor, **settings: Any) -> list[Tensor]:
    """Returns what PGD by steps of 0.01 asks for, where step t finds the gradient `gradients[t]`."""
    asked: list[Tensor] = []

    def objective(iterate: Tensor) -> Tensor:
        asked.append(iterate.detach())
        return Scripted.apply(iterate)

    Scripted.gradients = iter(gradients)
    pgd_attack(objective, images, eps=0.1, step_size=0.01, num_steps=len(gradients), random_start=False, **settings)
    return asked


def moves(gradients: list[Tensor], **settings: Any) -> list[list[float]]:
    """Returns the steps of the first image, in units of the step size."""
    asked = torch.stack(iterates(gradients, torch.full_like(gradients[0], 0.5), **settings))[:, 0]
    return (asked.diff(dim=0) / 0.01).round(decimals=3).tolist()


def test_momentum_averages_a_gradient_that_alternates() -> None:
    # The first pixel alternates between 2 and -1 parts of the norm, the second is always positive.
    one, other = torch.tensor([[2.0, 1.0]]) / 3, torch.tensor([[-1.0, 2.0]]) / 3
    assert moves([one, other, one, other]) == [[1, 1], [-1, 1], [1, 1], [-1, 1]]
    assert moves([one, other, one, other], momentum=1.0) == [[1, 1]] * 4
    # Sums of the first pixel with half the momentum: 2, 0, 2, 0 thirds.
    assert moves([one, other, one, other], momentum=0.5) == [[1, 1], [0, 1], [1, 1], [0, 1]]


def test_momentum_counts_gradients_by_their_direction_not_their_size() -> None:
    # By size the first gradient would win for good; by its L1 norm it is -1/4, 3/4, and then 1, 0 and 1, 0.
    first, later = 1000 * torch.tensor([[-1.0, 3.0]]), torch.tensor([[1.0, 0.0]])
    assert moves([first, later, later], momentum=1.0) == [[-1, 1], [1, 1], [1, 1]]
    assert moves([first, 1e-30 * later, later], momentum=1.0) == [[-1, 1], [1, 1], [1, 1]]


def test_momentum_norms_are_of_each_image() -> None:
    images = torch.full((2, 2), 0.5)
    gradients = [torch.tensor([[-1.0, 3.0], [100.0, -300.0]]), torch.tensor([[1.0, 0.0], [0.0, 1e-3]])]
    steps = torch.stack(iterates(gradients, images, momentum=1.0)).diff(dim=0) / 0.01
    torch.testing.assert_close(steps, torch.tensor([[[-1.0, 1], [1, -1]], [[1.0, 1], [1, 1]]]))


def test_momentum_begins_anew_with_each_restart() -> None:
    images = torch.full((1, 2), 0.5)
    asked: list[Tensor] = []

    def objective(iterate: Tensor) -> Tensor:
        asked.append(iterate.detach())
        return Scripted.apply(iterate)

    one, other = torch.tensor([[1.0, 1.0]]), torch.tensor([[-1.0, 1.0]])
    Scripted.gradients = iter([one, one, other, other])
    pgd_attack(objective, images, eps=0.5, step_size=1e-4, num_steps=2, num_restarts=2, momentum=1.0)
    last = (asked[5] - asked[3]) / 1e-4
    torch.testing.assert_close(last, torch.tensor([[-2.0, 2.0]]), rtol=0, atol=0.01)


@pytest.mark.parametrize("momentum", [0.0, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iterates_are_those_of_the_published_algorithm(images: Tensor, dtype: torch.dtype, momentum: float) -> None:
    # Dividing by its norm would lose so small or so large a gradient: without momentum it is not divided.
    for scale in (1.0, *((1e-42, 1e36) if momentum == 0 else ())):
        asked: list[Tensor] = []

        def objective(iterate: Tensor, scale: float = scale, asked: list[Tensor] = asked) -> Tensor:
            asked.append(iterate.detach())
            return scale * bumpy_objective(iterate)

        pgd_attack(objective, images.to(dtype), eps=EPS, num_steps=6, random_start=False, momentum=momentum)
        iterate = images.to(dtype)
        lower, upper = (iterate - EPS).clamp(min=0), (iterate + EPS).clamp(max=1)
        sums = torch.zeros_like(iterate)
        for found in asked:
            assert torch.equal(found, iterate)
            iterate.requires_grad_()
            (gradient,) = torch.autograd.grad(scale * bumpy_objective(iterate).sum(), iterate)
            if momentum:
                sums = momentum * sums + gradient / gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
            direction = sums if momentum else gradient
            iterate = torch.clamp(iterate.detach() + 2.5 * EPS / 6 * direction.sign(), lower, upper)


def test_momentum_and_zero_gradients_make_no_nan(weight: Tensor, images: Tensor) -> None:
    alive = torch.tensor([1.0, 0.0, 1.0, 1.0])
    adversarial = pgd_attack(
        lambda x: alive * linear_objective(weight)(x), images, eps=EPS, step_size=EPS / 5, num_steps=5, **MI_FGSM
    )
    expected = (images + EPS * weight.sign()).clamp(0, 1)
    expected[1] = images[1]
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-6)
    zero, one = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    assert moves([zero, one, zero], momentum=1.0) == [[0, 0], [1, -1], [1, -1]]


def test_what_goes_on_with_momentum_is_attacked_as_it_would_be_alone() -> None:
    images = random_images(6, 3, 5, 5)

    def score(iterate: Tensor, offsets: Tensor) -> Tensor:
        return bumpy_objective(iterate) + offsets

    # The images at odd places are done after a few steps, one by one.
    offsets = torch.tensor([-1000.0, 70, -1000, 75, -1000, 80])
    settings: dict[str, Any] = {"eps": EPS, "num_steps": 8, "stop_above": 90.0, **MI_FGSM}
    together = pgd_attack(Objective(score, offsets), images, **settings)
    for row in range(6):
        alone = pgd_attack(Objective(score, offsets[row : row + 1]), images[row : row + 1], **settings)
        assert torch.equal(together[row : row + 1], alone)


def test_zero_gradient_of_one_image_leaves_the_others_their_attack(weight: Tensor, images: Tensor) -> None:
    alive = torch.tensor([1.0, 0.0, 1.0, 1.0])
    adversarial = pgd_attack(lambda x: alive * linear_objective(weight)(x), images, eps=EPS, random_start=False)
    expected = (images + EPS * weight.sign()).clamp(0, 1)
    expected[1] = images[1]
    torch.testing.assert_close(adversarial, expected, rtol=0, atol=1e-7)


def test_generator_makes_the_result_reproducible(images: Tensor) -> None:
    runs = [pgd_attack(bumpy_objective, images, generator=seeded(seed)) for seed in (3, 3, 4)]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_default_generator_follows_manual_seed_and_a_given_one_leaves_it_alone(images: Tensor) -> None:
    runs = []
    for _ in range(2):
        torch.manual_seed(0)
        pgd_attack(bumpy_objective, images, generator=seeded(9))
        runs.append(pgd_attack(bumpy_objective, images))
    assert torch.equal(runs[0], runs[1])
    torch.manual_seed(0)
    assert torch.equal(pgd_attack(bumpy_objective, images), runs[0])


@pytest.mark.parametrize("split", [[4], [1, 3], [1, 1, 1, 1]])
def test_one_generator_per_image_makes_batching_irrelevant(images: Tensor, split: list[int]) -> None:
    whole = pgd_attack(
        bumpy_objective, images, num_steps=3, num_restarts=3, generator=[seeded(10 + i) for i in range(4)]
    )
    generators = iter([seeded(10 + i) for i in range(4)])
    parts = [
        pgd_attack(
            bumpy_objective, part, num_steps=3, num_restarts=3, generator=[next(generators) for _ in range(len(part))]
        )
        for part in images.split(split)
    ]
    assert torch.equal(torch.cat(parts), whole)


class NormalisedClassifier(nn.Module):
    """A model with every kind of state that an attack could spoil."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.head = nn.Linear(75, 4)
        self.head.bias.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(images).flatten(1))


def test_model_and_images_stay_as_they_were(images: Tensor) -> None:
    model = NormalisedClassifier()
    model.norm.eval()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    images = images.requires_grad_()
    images.grad = torch.ones_like(images)
    kept = images.detach().clone()
    state = {name: value.clone() for name, value in model.state_dict().items()}

    pgd_attack(cross_entropy_objective(model, torch.arange(4)), images)

    assert torch.equal(images, kept)
    assert images.requires_grad
    assert torch.equal(images.grad, torch.ones_like(images))
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert [p.grad is None for p in (model.norm.weight, model.norm.bias, model.head.bias)] == [True] * 3
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        "norm.weight": True,
        "norm.bias": True,
        "head.weight": True,
        "head.bias": False,
    }
    assert (model.training, model.norm.training, model.head.training) == (True, False, True)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("random_start", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_callers_without_gradients_get_the_same_attack(
    images: Tensor, context: Callable[[], Any], random_start: bool
) -> None:
    model = NormalisedClassifier().eval()
    expected = pgd_attack(
        cross_entropy_objective(model, torch.arange(4)), images, random_start=random_start, generator=seeded(0)
    )
    with context():
        inside = images + 0
        objective = cross_entropy_objective(model, torch.arange(4) + 0)
        adversarial = pgd_attack(objective, inside, random_start=random_start, generator=seeded(0))
        assert not torch.is_grad_enabled()
        assert torch.is_inference_mode_enabled() == (context is torch.inference_mode)
    assert torch.equal(adversarial, expected)
    assert not adversarial.is_inference()


def test_graph_of_the_images_is_left_out(images: Tensor, weight: Tensor) -> None:
    scale = torch.tensor(0.5, requires_grad=True)
    adversarial = pgd_attack(linear_objective(weight), images * scale, eps=EPS)
    assert not adversarial.requires_grad
    assert scale.grad is None


@pytest.mark.gpu
def test_cpu_generators_serve_images_on_a_gpu(images: Tensor) -> None:
    on_cpu, on_gpu = (
        pgd_attack(bumpy_objective, images.to(device), num_steps=1, generator=[seeded(i) for i in range(4)])
        for device in ("cpu", "cuda")
    )
    assert on_gpu.device.type == "cuda"
    torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, 3, dtype=torch.uint8), "images must be float32 or float64, got torch.uint8"),
        (torch.zeros(2, 3, dtype=torch.bfloat16), "images must be float32 or float64, got torch.bfloat16"),
        (torch.zeros(0, 3), r"images must hold at least one image, .* got shape \(0, 3\)"),
        (torch.tensor(0.5), r"images must hold at least one image, .* got shape \(\)"),
        (torch.tensor([[0.0, 1.1]]), r"images must lie in \[0, 1\], got values from 0 to 1.1"),
        (torch.tensor([[-0.1, 1.0]]), r"images must lie in \[0, 1\], got values from -0.1 to 1"),
        (torch.tensor([[0.5, math.nan]]), r"images must lie in \[0, 1\], got values from nan"),
        (torch.tensor([[0.5, math.inf]]), r"images must lie in \[0, 1\], got values from 0.5 to inf"),
    ],
)
def test_bad_images_are_refused(bad: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pgd_attack(bumpy_objective, bad)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eps": -1 / 255}, "eps must be .* at least 0, got -0.0039"),
        ({"eps": math.nan}, "eps must be .* at least 0, got nan"),
        ({"eps": math.inf}, "eps must be a finite number .* got inf"),
        ({"step_size": 0.0}, "step_size must be .* above 0, got 0.0"),
        ({"step_size": -0.1}, "step_size must be .* above 0, got -0.1"),
        ({"step_size": math.nan}, "step_size must be .* above 0, got nan"),
        ({"num_steps": 0}, "num_steps must be a whole number of at least 1, got 0"),
        ({"num_restarts": 0}, "num_restarts must be a whole number of at least 1, got 0"),
        ({"num_restarts": 2, "random_start": False}, "num_restarts=2 would repeat one run"),
        ({"momentum": -0.1}, "momentum must be a finite number of at least 0, got -0.1"),
        ({"momentum": math.nan}, "momentum must be .* got nan"),
        ({"momentum": math.inf}, "momentum must be .* got inf"),
        ({"generator": [torch.Generator()]}, "generator must hold one generator per image, 4, got 1"),
        ({"generator": []}, "generator must hold one generator per image, 4, got 0"),
    ],
)
def test_bad_arguments_are_refused(images: Tensor, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pgd_attack(bumpy_objective, images, **arguments)


@pytest.mark.parametrize(
    ("objective", "message"),
    [
        (lambda x: x.sum(), r"one number per image, shape \(4,\), got shape \(\)"),
        (lambda x: x.flatten(1), r"one number per image, shape \(4,\), got shape \(4, 75\)"),
        (lambda x: bumpy_objective(x)[:3], r"one number per image, shape \(4,\), got shape \(3,\)"),
        (lambda x: bumpy_objective(x).detach(), "objective has no gradient with respect to the images"),
        (lambda x: torch.ones(4, requires_grad=True) * 2, "objective has no gradient with respect to the images"),
        (
            lambda x: bumpy_objective(x) / torch.tensor([1.0, 1.0, 0.0, 1.0]),
            "objective must be finite, got .*(inf|nan) for image 2",
        ),
        (lambda x: bumpy_objective(x) + math.nan, "objective must be finite, got nan for image 0"),
        (lambda x: (0 * x.flatten(1)).norm(dim=1).sqrt(), "objective has a gradient .* that is NaN"),
    ],
)
def test_bad_objectives_are_refused(images: Tensor, objective: Callable[[Tensor], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pgd_attack(objective, images)


def test_an_infinite_gradient_has_no_direction_to_add_up(images: Tensor) -> None:
    images[2, 0, 0, 0] = 0
    with pytest.raises(ValueError, match=r"gradient .* that is not finite"):
        pgd_attack(lambda x: x.flatten(1).sqrt().sum(dim=1), images, **MI_FGSM)


def test_eps_in_8_bit_units_is_refused() -> None:
    images = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match="eps must be at most 1, in pixel units"):
        pgd_attack(lambda x: x.flatten(1).sum(1), images, eps=8)
