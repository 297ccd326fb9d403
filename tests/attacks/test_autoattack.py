from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from robustness_tokens.attacks.autoattack import apgd_attack, auto_attack
from tests.support.toy_classifier import accuracy, trained_toy_classifier


pyautoattack = pytest.importorskip("pyautoattack")

EPS = 8 / 255


def some(count: int) -> tuple[nn.Module, Tensor, Tensor]:
    model, images, labels = trained_toy_classifier()
    return model, images[:count], labels[:count]


def test_auto_attack_equals_the_package_run_directly() -> None:
    model, images, labels = some(6)
    with torch.random.fork_rng(devices=[]):
        direct = pyautoattack.AutoAttack(model, eps=EPS, seed=3, device="cpu")
        direct.apgd_targeted.n_target_classes = direct.fab.n_target_classes = 3  # there are four classes
        trace = sys.gettrace()
        expected, _ = direct.run_standard_evaluation(images, labels, batch_size=6)
        sys.settrace(trace)
    found = auto_attack(model, images, labels, eps=EPS, seed=3)
    assert torch.equal(found, expected)
    assert accuracy(model, found, labels) < accuracy(model, images, labels)
    assert (found - images).abs().max() <= EPS + 1e-6


@pytest.mark.parametrize("loss", ["cross_entropy", "targeted_dlr"])
def test_apgd_equals_the_package_run_directly(loss: Any) -> None:
    from pyautoattack.autopgd_base import APGDAttack, APGDAttack_targeted

    model, images, labels = some(50)
    settings: dict[str, Any] = {"n_iter": 20, "norm": "Linf", "eps": EPS, "seed": 5, "device": "cpu"}
    with torch.random.fork_rng(devices=[]):
        direct = (
            APGDAttack(model, **settings)
            if loss == "cross_entropy"
            else APGDAttack_targeted(model, n_target_classes=2, **settings)
        )
        expected = direct.perturb(images, labels)
    found = apgd_attack(model, images, labels, loss=loss, eps=EPS, num_steps=20, num_target_classes=2, seed=5)
    assert torch.equal(found, expected)
    assert accuracy(model, found, labels) < accuracy(model, images, labels) - 0.05


def test_the_highest_loss_is_found_where_no_class_changes() -> None:
    _, images, _ = some(4)
    labels = torch.zeros(4, dtype=torch.int64)

    def logits_fn(x: Tensor) -> Tensor:  # class 0 stays far ahead; brighter is a little less so
        score = 100 - x.mean(dim=(1, 2, 3))
        return torch.stack([score, *[torch.zeros_like(score)] * 3], dim=1)

    assert torch.equal(apgd_attack(logits_fn, images, labels, eps=EPS), images)
    found = apgd_attack(lambda x: logits_fn(x) / 20, images, labels, eps=EPS, num_steps=10, highest_loss=True)
    torch.testing.assert_close(found, (images + EPS).clamp(max=1))


def test_the_highest_loss_is_reproducible_and_not_for_targets() -> None:
    model, images, labels = some(6)
    first, again = (apgd_attack(model, images, labels, eps=EPS, num_steps=5, highest_loss=True) for _ in range(2))
    assert torch.equal(first, again)
    with pytest.raises(ValueError, match='highest_loss is for loss="cross_entropy"'):
        apgd_attack(model, images, labels, loss="targeted_dlr", highest_loss=True)


def test_random_state_and_trace_are_left_as_found() -> None:
    model, images, labels = some(4)

    def trace(*args: Any) -> None:
        return None

    before, trace_before = torch.get_rng_state(), sys.gettrace()
    sys.settrace(trace)
    try:
        auto_attack(model, images, labels, eps=0.5)  # all fall at once, so the slow parts have nothing to do
        assert sys.gettrace() is trace
    finally:
        sys.settrace(trace_before)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("attack", [auto_attack, apgd_attack])
def test_it_gets_float32_logits_of_a_model_in_bfloat16(attack: Callable[..., Tensor]) -> None:
    model, images, labels = some(4)
    seen = []

    def logits_fn(x: Tensor) -> Tensor:
        seen.append(x.dtype)
        return model(x).bfloat16()

    found = attack(logits_fn, images, labels, eps=0.5)
    assert found.dtype == torch.float32
    assert set(seen) == {torch.float32}


@pytest.mark.parametrize("attack", [auto_attack, apgd_attack])
def test_eps_zero_returns_the_images(attack: Callable[..., Tensor]) -> None:
    model, images, labels = some(4)
    assert torch.equal(attack(model, images, labels, eps=0), images)


def test_three_classes_are_too_few_for_the_targeted_loss() -> None:
    _, images, labels = some(4)
    with pytest.raises(ValueError, match="at least 4 classes, got 3"):
        apgd_attack(lambda x: x.flatten(1)[:, :3], images, labels.clamp(max=2), loss="targeted_dlr")


def test_the_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images, labels = some(4)
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ImportError, match=r"pip install 'robustness-tokens\[eval\]'"):
        auto_attack(model, images, labels)
