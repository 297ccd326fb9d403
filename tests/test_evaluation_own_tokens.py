from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robustness_tokens import Normalizer, RobustnessTokenModel, inject_tokens
from robustness_tokens.evaluation import own_tokens
from robustness_tokens.evaluation.own_tokens import (
    OwnTokensSpec,
    describe_training,
    own_tokens_specs,
    train_own_tokens,
)
from robustness_tokens.evaluation.threat_models import EvaluatedModel
from tests.conftest import HIDDEN_SIZE, IMAGE_SIZE, build_base


RECIPE: dict[str, Any] = {
    "attack": "pgd",
    "eps": 8 / 255,
    "num_attack_steps": 2,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,
    "seed": 2,
    "image_size": 224,
    "num_processes": 1,
    "num_steps_done": 2,
    "dataset": {"num_images": 3},
}


@pytest.fixture
def dataset() -> list[dict[str, Tensor]]:
    images = torch.rand(6, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(8))
    return [{"images": image} for image in images]


@pytest.fixture
def model() -> EvaluatedModel:
    defended = RobustnessTokenModel.from_base(build_base("dinov2"), num_robustness_tokens=4)
    defended.config.training = RECIPE
    return EvaluatedModel(defended)


def test_the_attacker_never_takes_the_defenders_seed_and_guesses_lengths() -> None:
    specs = own_tokens_specs(6, num_robustness_tokens=10, recipe_seed=2, num_datasets=2)
    assert [spec.seed for spec in specs] == [1, 3, 4, 5, 6, 7]
    assert [spec.num_robustness_tokens for spec in specs] == [10, 10, 10, 5, 20, 10]
    assert [spec.dataset for spec in specs] == [0, 1, 0, 1, 0, 1]
    with pytest.raises(ValueError, match="num_seeds"):
        own_tokens_specs(0, num_robustness_tokens=10, recipe_seed=None)


@pytest.mark.parametrize("num_pairs", [None, 4])
def test_it_trains_by_the_recipe_and_leaves_the_model_alone(
    model: EvaluatedModel, dataset: list[dict[str, Tensor]], tmp_path: Path, num_pairs: int | None
) -> None:
    before = {name: value.clone() for name, value in model.model.state_dict().items()}
    specs = [OwnTokensSpec(seed=5, num_robustness_tokens=4), OwnTokensSpec(seed=6, num_robustness_tokens=3)]
    first, second = train_own_tokens(
        model, specs, [dataset], tmp_path, num_adversarial_pairs=num_pairs, disable_tqdm=True
    )
    assert (first.shape, second.shape) == ((4, HIDDEN_SIZE), (3, HIDDEN_SIZE))
    assert not torch.equal(first[:3], second)
    assert not torch.allclose(first, model.tokens, atol=1e-3)
    after = model.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.injector.enabled
    assert len(list(tmp_path.rglob("adversarial_pairs.json"))) == (0 if num_pairs is None else 1)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({}, []),
        ({"attack": "pgd", "max_steps": 2, "seed": 3, "disable_tqdm": True}, []),  # no other than the recipe
        (
            {"eps": 4 / 255, "max_steps": 3},
            ["but with eps=4/255 instead of 8/255", "but with max_steps=3 instead of 2"],
        ),
        ({"attack_through": "tokens"}, ["but with attack_through=tokens instead of base"]),
    ],
    ids=["none", "same", "changed", "unnamed"],
)
def test_it_is_said_how_own_tokens_are_trained(
    model: EvaluatedModel, dataset: list[dict[str, Tensor]], overrides: dict[str, Any], expected: list[str]
) -> None:
    assert describe_training(model, [dataset], overrides=overrides) == ["by the recipe", *expected]


def test_it_is_said_what_own_tokens_are_trained_on(model: EvaluatedModel, dataset: list[dict[str, Tensor]]) -> None:
    once = ["by the recipe", "on 4 images attacked once for all sets", "on 3 images attacked once for all sets"]
    assert describe_training(model, [dataset, dataset[:3]], num_adversarial_pairs=4) == once
    assert describe_training(model, [dataset], num_adversarial_pairs=4, overrides={"attack_through": "both"}) == [
        "by the recipe",
        "but with attack_through=both instead of base",
    ]
    long = describe_training(model, [dataset], overrides={"lr_scheduler_type": "x" * 300})
    assert [len(words) for words in long] == [13, 200]


def test_a_config_names_no_folders_or_trackers_for_the_attacker(
    dataset: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    defended = RobustnessTokenModel.from_base(build_base("dinov2"), num_robustness_tokens=2)
    foreign = {"resume_from_checkpoint": str(tmp_path / "theirs"), "report_to": "tensorboard", "save_steps": 1}
    defended.config.training = RECIPE | foreign
    specs = [OwnTokensSpec(seed=5, num_robustness_tokens=2)]
    train_own_tokens(EvaluatedModel(defended), specs, [dataset], tmp_path / "own", disable_tqdm=True)
    assert not list((tmp_path / "own").rglob("*checkpoint*"))


def test_runs_with_equal_specs_are_equal_and_not_run_again(
    model: EvaluatedModel, dataset: list[dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = [OwnTokensSpec(seed=5, num_robustness_tokens=4)]
    (first,) = train_own_tokens(model, spec, [dataset], tmp_path / "a", disable_tqdm=True)
    (same,) = train_own_tokens(model, spec, [dataset], tmp_path / "b", disable_tqdm=True)
    assert torch.equal(first, same)
    others = [{"images": item["images"].flip(-1)} for item in dataset]
    (elsewhere,) = train_own_tokens(model, spec, [others], tmp_path / "a", disable_tqdm=True)
    assert not torch.equal(first, elsewhere)
    longer = train_own_tokens(model, spec, [dataset], tmp_path / "a", overrides={"max_steps": 3}, disable_tqdm=True)
    assert not torch.equal(first, longer[0])

    class NoTrainer:
        def __init__(self, *args: Any) -> None:
            raise AssertionError("trained again")

    monkeypatch.setattr(own_tokens, "RobustnessTokenTrainer", NoTrainer)
    (stored,) = train_own_tokens(model, spec, [dataset], tmp_path / "a", disable_tqdm=True)
    assert torch.equal(stored, first)


def test_a_classifier_that_tokens_were_injected_into_has_a_trunk_to_train_on(
    dataset: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    injected = inject_tokens(build_base("vit", classifier=True), torch.zeros(2, HIDDEN_SIZE))
    model = EvaluatedModel(injected, normalizer=Normalizer([0.5] * 3, [0.25] * 3))
    overrides = {key: RECIPE[key] for key in ("attack", "eps", "num_attack_steps", "max_steps")}
    (tokens,) = train_own_tokens(
        model,
        [OwnTokensSpec(seed=1, num_robustness_tokens=2)],
        [dataset],
        tmp_path,
        overrides=overrides,
        disable_tqdm=True,
    )
    assert tokens.shape == (2, HIDDEN_SIZE)
    assert tokens.isfinite().all()


def test_without_features_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    injected = inject_tokens(build_base("vit", classifier=True), torch.zeros(2, HIDDEN_SIZE))
    model = EvaluatedModel(injected, task="segmentation", normalizer=Normalizer([0.5] * 3, [0.25] * 3))
    with pytest.raises(ValueError, match="feature_view"):
        train_own_tokens(model, [OwnTokensSpec(seed=1, num_robustness_tokens=2)], [[]], tmp_path)
