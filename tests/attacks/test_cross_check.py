"""Our attacks against independent implementations on the same trained classifier."""

from __future__ import annotations

import foolbox
import pytest
import torch

from robustness_tokens.attacks.objectives import cross_entropy_objective, margin_objective
from robustness_tokens.attacks.pgd import pgd_attack
from robustness_tokens.attacks.random_search import square_attack
from tests.support.toy_classifier import accuracy, trained_toy_classifier


@pytest.mark.parametrize("eps", [4 / 255, 8 / 255, 16 / 255])
def test_pgd_is_as_strong_as_foolbox(eps: float) -> None:
    model, images, labels = trained_toy_classifier()
    steps, step_size = 20, 2.5 * eps / 20
    theirs = foolbox.attacks.LinfPGD(abs_stepsize=step_size, steps=steps, random_start=True)
    _, attacked, _ = theirs(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), images, labels, epsilons=eps)
    ours = pgd_attack(
        cross_entropy_objective(model, labels), images, eps=eps, step_size=step_size, num_steps=steps, num_restarts=1
    )
    clean, robust_theirs, robust_ours = (accuracy(model, x, labels) for x in (images, attacked, ours))
    assert robust_theirs < clean - 0.05, "the attack must have something to do"
    assert 0 < robust_ours <= robust_theirs + 0.01
    assert abs(robust_ours - robust_theirs) <= 0.01


@pytest.mark.parametrize("eps", [4 / 255, 8 / 255, 16 / 255])
def test_momentum_is_as_strong_as_foolbox(eps: float) -> None:
    """Theirs adds up the signs of the gradients, not the gradients divided by their L1 norms."""
    model, images, labels = trained_toy_classifier()
    theirs = foolbox.attacks.MIFGSM(abs_stepsize=eps / 10, steps=10, momentum=1.0, random_start=False)
    _, attacked, _ = theirs(foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu"), images, labels, epsilons=eps)
    ours = pgd_attack(
        cross_entropy_objective(model, labels),
        images,
        eps=eps,
        step_size=eps / 10,
        num_steps=10,
        momentum=1.0,
        random_start=False,
    )
    clean, robust_theirs, robust_ours = (accuracy(model, x, labels) for x in (images, attacked, ours))
    assert robust_theirs < clean - 0.05
    assert abs(robust_ours - robust_theirs) <= 0.01


def test_square_is_about_as_strong_as_the_authors() -> None:
    square = pytest.importorskip("pyautoattack.square")
    model, images, labels = trained_toy_classifier()
    images, labels, eps, queries = images[:200], labels[:200], 8 / 255, 300
    with torch.random.fork_rng(devices=[]):
        # Theirs writes into the logits.
        theirs = square.SquareAttack(lambda x: model(x).clone(), eps=eps, n_queries=queries, device="cpu")
        attacked = theirs.perturb(images, labels)
    ours = square_attack(
        margin_objective(model, labels),
        images,
        eps=eps,
        num_queries=queries,
        generator=torch.Generator().manual_seed(0),
    )
    clean, robust_theirs, robust_ours = (accuracy(model, x, labels) for x in (images, attacked, ours))
    assert robust_theirs < clean - 0.05
    assert robust_ours <= robust_theirs + 0.02
