from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from robustness_tokens import Normalizer, RobustnessTokenForImageClassification, RobustnessTokenModel
from robustness_tokens.attacks.objectives import cosine_similarity, cross_entropy_objective
from robustness_tokens.attacks.paper import paper_attack_eps
from robustness_tokens.configuration import TOKENS, TokenState
from robustness_tokens.evaluation.attack_suite import ATTACKS, Attack, AttackBatch, on_8bit_grid, run_attack
from robustness_tokens.evaluation.plan import BUDGETS, build_attack, select_attacks
from robustness_tokens.evaluation.threat_models import AttackerView, EvaluatedModel, attacker_views
from tests.support.bases import HIDDEN_SIZE, IMAGE_SIZE, build_base


EPS = 16 / 255
PARAMETERS: dict[str, Any] = {
    "target": "base",
    "num_steps": 4,
    "num_restarts": 1,
    "num_queries": 10,
    "num_draws": 3,
    "num_target_classes": 2,
}


def small(name: str, **changes: Any) -> Attack:
    values = {key: value for key, value in PARAMETERS.items() if key in ATTACKS[name].parameters}
    return Attack(name=name, **{**values, **changes})


@pytest.fixture(scope="module")
def model() -> EvaluatedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EvaluatedModel(
            RobustnessTokenForImageClassification.from_base(
                build_base("dinov2", classifier=True), num_robustness_tokens=2, initializer_range=1.0
            )
        )


@pytest.fixture(scope="module")
def batch(model: EvaluatedModel) -> AttackBatch:
    generator = torch.Generator().manual_seed(4)
    images = torch.randint(256, (6, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator) / 255
    with torch.no_grad():
        labels = model.logits(images, model.tokens).argmax(dim=1)
    return AttackBatch(images=images, labels=labels, index=torch.arange(6) + 10)


def view_for(name: str, model: EvaluatedModel) -> AttackerView:
    return attacker_views("none" if ATTACKS[name].gradient_free else "full", model)[0]


@pytest.mark.parametrize("name", sorted(ATTACKS.keys() - {"auto_attack"}))  # slow; tested with the package itself
def test_every_attack_keeps_its_budget_and_the_range(name: str, model: EvaluatedModel, batch: AttackBatch) -> None:
    if "apgd" in name:
        pytest.importorskip("pyautoattack")
    is_paper = name.startswith("paper")
    eps = paper_attack_eps(model.normalizer.image_std.flatten().tolist(), on_grid=True) if is_paper else EPS
    adversarial = run_attack(small(name), view_for(name, model), batch, eps=eps, seed=0)
    assert adversarial.shape == batch.images.shape
    assert 0 < (adversarial - batch.images).abs().max() <= eps + 1e-6
    assert adversarial.min() >= 0
    assert adversarial.max() <= 1
    assert torch.equal(adversarial, run_attack(small(name), view_for(name, model), batch, eps=eps, seed=0))


def test_the_papers_budget_on_imagenet_statistics_is_two_levels() -> None:
    assert paper_attack_eps([0.229, 0.224, 0.225], on_grid=True) == 2 / 255


@pytest.mark.parametrize("std", [0.229, 0.25, 0.5], ids=str)
@pytest.mark.parametrize("on_grid", [True, False], ids=["8-bit", "float"])
def test_the_papers_budget_is_kept_and_used_up(std: float, on_grid: bool) -> None:
    images = torch.rand(8, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(7))
    images = (images * 255).round() / 255 if on_grid else images
    assert on_8bit_grid(images) is on_grid
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = RobustnessTokenModel.from_base(build_base("dinov2"), num_robustness_tokens=2)
    evaluated = EvaluatedModel(model, normalizer=Normalizer([0.5] * 3, [std] * 3))
    batch = AttackBatch(images=images, labels=None, index=torch.arange(8))
    (view,) = attacker_views("base", evaluated)
    eps = paper_attack_eps(evaluated.normalizer.image_std.flatten().tolist(), on_grid=on_grid)
    changes = (run_attack(small("paper"), view, batch, eps=eps, seed=0) - images).abs()
    assert 0.99 * eps < changes.max() <= eps + 1e-6


def measured(attack: Attack, model: EvaluatedModel, view: AttackerView, batch: AttackBatch) -> dict[str, float]:
    adversarial = run_attack(attack, view, batch, eps=EPS, seed=0)
    with torch.no_grad():
        clean_base = model.features(batch.images, None)
        clean_defended = model.features(batch.images, model.tokens)
        found = model.features(adversarial, model.tokens)
        logits = model.logits(adversarial, model.tokens)
    assert batch.labels is not None
    return {
        "base": cosine_similarity(found, clean_base).mean().item(),
        "defended": cosine_similarity(found, clean_defended).mean().item(),
        "loss": cross_entropy_objective(lambda x: logits, batch.labels)(adversarial).mean().item(),
    }


def test_attacks_push_where_they_say(model: EvaluatedModel, batch: AttackBatch) -> None:
    (full,), (queries,) = attacker_views("full", model), attacker_views("none", model)
    whole = dataclasses.replace(full, knowledge="own_tokens")  # attacked to the end
    noise = measured(small("uniform_noise", num_draws=1), model, queries, batch)
    to_base = measured(small("feature_cosine", target="base"), model, full, batch)
    to_defended = measured(small("feature_cosine", target="defended"), model, full, batch)
    entropy = measured(small("cross_entropy"), model, whole, batch)
    assert to_base["base"] < min(noise["base"], to_defended["base"])
    assert to_defended["defended"] < min(noise["defended"], to_base["defended"])
    assert entropy["loss"] > max(noise["loss"], to_base["loss"], to_defended["loss"])


def test_kept_features_of_the_base_change_nothing(model: EvaluatedModel, batch: AttackBatch) -> None:
    (base,) = attacker_views("base", model)
    with torch.no_grad():
        kept = AttackBatch(**{**vars(batch), "base_features": model.features(batch.images, None)})
    for name in ("feature_cosine", "feature_mse"):
        without, with_kept = (run_attack(small(name), base, one, eps=EPS, seed=0) for one in (batch, kept))
        assert torch.equal(without, with_kept)


@pytest.mark.parametrize("name", ["feature_cosine", "cross_entropy", "margin", "square", "uniform_noise"])
def test_noise_belongs_to_the_image_and_the_seed(name: str, model: EvaluatedModel, batch: AttackBatch) -> None:
    view = view_for(name, model)
    rows = [4, 5]
    assert batch.labels is not None
    part = AttackBatch(images=batch.images[rows], labels=batch.labels[rows], index=batch.index[rows])
    together = run_attack(small(name), view, batch, eps=EPS, seed=1)
    assert torch.allclose(together[rows], run_attack(small(name), view, part, eps=EPS, seed=1), atol=1e-6)
    assert not torch.allclose(together, run_attack(small(name), view, batch, eps=EPS, seed=2), atol=1e-6)


def is_right(model: EvaluatedModel, images: Tensor, batch: AttackBatch) -> Tensor:
    assert batch.labels is not None
    with torch.no_grad():
        return model.logits(images, model.tokens, exact=True).argmax(dim=1).eq(batch.labels)


def change_logits(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Changes what attacks see of a model; what is measured stays as it is."""
    real = EvaluatedModel.logits

    def logits(self: EvaluatedModel, images: Tensor, tokens: TokenState | None, *, exact: bool = False) -> Tensor:
        found = real(self, images, tokens, exact=exact)
        return found if exact else change(found)

    monkeypatch.setattr(EvaluatedModel, "logits", logits)


@pytest.mark.parametrize(("name", "effort"), [("cross_entropy", 20), ("margin", 20), ("mi_fgsm", 20), ("square", 200)])
def test_an_attack_on_the_model_itself_ends_with_a_misclassification(
    name: str, effort: int, model: EvaluatedModel, batch: AttackBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    attack = small(name, **({"num_queries": effort} if name == "square" else {"num_steps": effort}))
    view = view_for(name, model)
    whole = dataclasses.replace(view, knowledge="own_tokens")
    counts: list[int] = []  # of the images in each forward pass

    def count(logits: Tensor) -> Tensor:
        counts.append(len(logits))
        return logits

    change_logits(monkeypatch, count)
    found = []
    for one in (view, whole):
        counts.clear()
        adversarial = run_attack(attack, one, batch, eps=EPS, seed=0)
        found.append((sum(counts), is_right(model, adversarial, batch)))
    (few, ended), (all_of_them, to_the_end) = found
    assert not ended.all()  # else nothing ends
    assert torch.equal(ended, to_the_end)
    assert few < all_of_them


@pytest.mark.parametrize("name", ["cross_entropy", "margin", "mi_fgsm"])
def test_what_only_the_attacks_precision_gets_wrong_is_attacked_on(
    name: str, model: EvaluatedModel, batch: AttackBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def rounded(logits: Tensor) -> Tensor:
        """Half precision errs by so much that at first every image looks misclassified."""
        if seen:
            return logits
        seen.append(len(logits))
        return -logits

    view, attack = view_for(name, model), small(name, num_steps=20)
    expected = run_attack(attack, view, batch, eps=EPS, seed=0)
    change_logits(monkeypatch, rounded)
    found = run_attack(attack, view, batch, eps=EPS, seed=0)
    left = [int(is_right(model, images, batch).sum()) for images in (batch.images, expected, found)]
    assert seen == [6]
    assert left[0] == 6
    assert left[1] == left[2] < 6


@pytest.mark.parametrize("name", ["cross_entropy", "margin", "square"])
def test_an_image_that_rounding_ended_is_attacked_on_whatever_its_batch(
    name: str, model: EvaluatedModel, batch: AttackBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rounding may depend on the batch size: what is misclassified in a part of a batch may not be so in all of it."""
    counts: list[int] = []

    def rounded(logits: Tensor) -> Tensor:
        counts.append(len(logits))
        wrong = torch.arange(len(logits)) < (1 if len(logits) == 6 else 6)
        return torch.where(wrong[:, None], -logits, logits)

    change_logits(monkeypatch, rounded)
    attack = small(name, **({"num_queries": 3} if name == "square" else {"num_steps": 2}))
    run_attack(attack, view_for(name, model), batch, eps=1e-4, seed=0)
    assert counts == [6, 5, 6, 6, 6]  # ended one by one; and all of them once more, to the end


def test_some_images_of_a_batch_keep_what_belongs_to_them(batch: AttackBatch) -> None:
    part = dataclasses.replace(batch, base_features=torch.arange(6.0)).select(torch.tensor([4, 1]))
    assert batch.labels is not None
    assert part.labels is not None
    assert part.base_features is not None
    assert torch.equal(part.images, batch.images[[4, 1]])
    assert part.labels.tolist() == batch.labels[[4, 1]].tolist()
    assert part.index.tolist() == [14, 11]
    assert part.base_features.tolist() == [4, 1]


def test_an_ensemble_maximises_the_mean(model: EvaluatedModel, batch: AttackBatch) -> None:
    own = [{TOKENS: torch.randn(count, HIDDEN_SIZE)} for count in (2, 5)]
    views = attacker_views("own_tokens", model, own_tokens=own)
    assert batch.labels is not None

    def loss(adversarial: Tensor) -> float:
        assert batch.labels is not None
        losses = [
            cross_entropy_objective(partial(model.logits, tokens=tokens), batch.labels)(adversarial).mean()
            for tokens in own
        ]
        return torch.stack(losses).mean().item()

    attack = small("cross_entropy", num_steps=20)
    with torch.no_grad():
        reached = [loss(run_attack(attack, view, batch, eps=4 / 255, seed=0)) for view in views]
    assert reached[2] > max(reached[:2])


def test_an_attacker_without_gradients_cannot_use_them(model: EvaluatedModel, batch: AttackBatch) -> None:
    (queries,) = attacker_views("none", model)
    with pytest.raises(ValueError, match="needs gradients"):
        run_attack(small("margin"), queries, batch, eps=EPS, seed=0)


def test_an_attack_that_does_not_fit_the_task_is_refused(model: EvaluatedModel, batch: AttackBatch) -> None:
    features = EvaluatedModel(model.model, task="features")
    with pytest.raises(ValueError, match="the task is 'features'"):
        run_attack(small("margin"), attacker_views("full", features)[0], batch, eps=EPS, seed=0)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "fgsm"}, "unknown, expected one of apgd"),
        ({"name": "margin", "num_steps": 3}, "num_restarts"),
        ({"name": "square", "num_queries": 3, "num_steps": 2}, "num_steps"),
        ({"name": "feature_mse", "num_steps": 3, "num_restarts": 1}, "target"),
    ],
)
def test_hyper_parameters_must_be_those_of_the_attack(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Attack(**kwargs)


@pytest.mark.parametrize("knowledge", ["none", "base", "own_tokens", "full"])
def test_a_larger_budget_runs_the_attacks_of_a_smaller_one_and_more(knowledge: Any) -> None:
    names = [
        {(attack.name, attack.target) for attack in select_attacks(None, BUDGETS[budget], knowledge)}
        for budget in ("quick", "standard", "full")
    ]
    assert names[0] <= names[1] <= names[2]
    assert names[0]


def test_attacks_by_name_take_their_target_after_a_colon() -> None:
    assert build_attack("feature_cosine:defended", BUDGETS["quick"]).target == "defended"
    assert build_attack("feature_cosine", BUDGETS["quick"]).target == "base"
    with pytest.raises(ValueError, match="has no target"):
        build_attack("margin:base", BUDGETS["quick"])
    with pytest.raises(ValueError, match="unknown"):
        build_attack("bim", BUDGETS["quick"])


def test_momentum_and_targets_are_of_the_standard_budget_against_who_knows_the_base() -> None:
    runs = {
        (knowledge, budget)
        for knowledge in ("none", "base", "own_tokens", "full")
        for budget in ("quick", "standard", "full")
        if {"mi_fgsm", "apgd_targeted_dlr"}
        <= {attack.name for attack in select_attacks(None, BUDGETS[budget], knowledge)}
    }
    assert runs == {(knowledge, budget) for knowledge in ("base", "full") for budget in ("standard", "full")}
    assert BUDGETS["standard"].num_queries >= 1000


@pytest.mark.parametrize("num_steps", [1, 4])
def test_mi_fgsm_is_as_published(num_steps: int, model: EvaluatedModel, batch: AttackBatch) -> None:
    (view,) = attacker_views("base", model)
    attack = build_attack("mi_fgsm", dataclasses.replace(BUDGETS["full"], num_steps=num_steps))
    assert attack.parameters() == {"num_steps": num_steps}
    assert batch.labels is not None
    objective = cross_entropy_objective(partial(model.logits, tokens=None), batch.labels)
    best, best_values = batch.images, objective(batch.images).detach()
    iterate, sums = batch.images, torch.zeros_like(batch.images)
    for _ in range(num_steps):
        iterate = iterate.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(iterate).sum(), iterate)
        sums = sums + gradient / gradient.abs().sum(dim=(1, 2, 3), keepdim=True)
        iterate = (iterate + EPS / num_steps * sums.sign()).detach().clamp(0, 1)
        values = objective(iterate).detach()
        best = torch.where((values > best_values)[:, None, None, None], iterate, best)
        best_values = torch.maximum(values, best_values)
    found = run_attack(attack, view, batch, eps=EPS, seed=0)
    # The attack computes faster, by other roundings, so a pixel whose gradients cancel may take another sign.
    assert (found - best).abs().gt(1e-6).double().mean() < 0.01
    assert torch.equal(run_attack(attack, view, batch, eps=0.0, seed=0), batch.images)
    assert torch.equal(found, run_attack(attack, view, batch, eps=EPS, seed=1)), "nothing is random"


def test_reports_name_the_steps_that_follow_from_eps() -> None:
    assert small("margin").reported_parameters(0.1) == {"num_steps": 4, "num_restarts": 1, "step_size": 0.0625}
    assert small("margin", step_size=0.01).reported_parameters(0.1)["step_size"] == 0.01
    assert small("single_step").reported_parameters(0.1) == {"step_size": 0.1}
    assert small("mi_fgsm").reported_parameters(0.1) == {"num_steps": 4, "step_size": 0.025, "momentum": 1.0}
    assert small("paper").reported_parameters(2 / 255)["eps_normalized"] == 8 / 255
