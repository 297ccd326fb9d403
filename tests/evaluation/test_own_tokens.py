from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from torch import Tensor
from transformers import ViTImageProcessor

from robustness_tokens import (
    Normalizer,
    RobustnessTokenForImageClassification,
    RobustnessTokenModel,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    inject_tokens,
)
from robustness_tokens.configuration import TOKENS
from robustness_tokens.data.adversarial_pairs import load_adversarial_pairs
from robustness_tokens.evaluation import own_tokens
from robustness_tokens.evaluation.own_tokens import (
    OwnTokens,
    OwnTokensSpec,
    describe_training,
    own_tokens_specs,
    shortened,
    train_own_tokens,
)
from robustness_tokens.evaluation.threat_models import EvaluatedModel
from tests.support.bases import HIDDEN_SIZE, IMAGE_SIZE, build_base
from tests.support.reports import make_report


STATED: dict[str, Any] = {
    "attack": "pgd",
    "eps": 8 / 255,
    "num_attack_steps": 2,
    "max_steps": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 0.05,
    "seed": 2,
}
RECIPE: dict[str, Any] = {
    **RobustnessTokenTrainingArguments(output_dir="", **STATED).recipe(),
    "image_size": IMAGE_SIZE,
    "num_processes": 1,
    "num_steps_done": 2,
    "dataset": {"num_images": 6},
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
    first, second = (
        own.tokens[TOKENS]
        for own in train_own_tokens(
            model, specs, [dataset], tmp_path, num_adversarial_pairs=num_pairs, disable_tqdm=True
        )
    )
    assert (first.shape, second.shape) == ((4, HIDDEN_SIZE), (3, HIDDEN_SIZE))
    assert not torch.equal(first[:3], second)
    assert not torch.allclose(first, model.tokens[TOKENS], atol=1e-3)
    after = model.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert model.injector.enabled
    assert len(list(tmp_path.rglob("adversarial_pairs.json"))) == (0 if num_pairs is None else 1)


@pytest.mark.parametrize("change", ["nothing", "middle layer", "last image", "random images"])
def test_stored_sets_are_bound_to_the_whole_base_and_to_all_images(
    dataset: list[dict[str, Tensor]], tmp_path: Path, change: str
) -> None:
    class Augmented(torch.utils.data.Dataset[Any]):
        def __len__(self) -> int:
            return 6

        def __getitem__(self, row: int) -> dict[str, Tensor]:
            return {"images": torch.rand(3, IMAGE_SIZE, IMAGE_SIZE)}

    def train(changed: bool) -> None:
        base, images = build_base("dinov2", num_hidden_layers=3), dataset
        if changed and change == "middle layer":
            with torch.no_grad():
                base.encoder.layer[1].mlp.fc1.weight[0, 0] += 1
        if changed and change == "last image":
            images = [*dataset[:-1], {"images": 1 - dataset[-1]["images"]}]
        defended = RobustnessTokenModel.from_base(base, num_robustness_tokens=4)
        defended.config.training = RECIPE
        specs = [OwnTokensSpec(seed=5, num_robustness_tokens=4)]
        given: Any = Augmented() if change == "random images" else images
        train_own_tokens(EvaluatedModel(defended), specs, [given], tmp_path, disable_tqdm=True)

    for changed in (False, True):
        train(changed)
    assert len(list(tmp_path.iterdir())) == (1 if change == "nothing" else 2)


def test_a_set_whose_save_was_stopped_is_trained_again(
    model: EvaluatedModel, dataset: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    specs = [OwnTokensSpec(seed=5, num_robustness_tokens=4)]
    (trained,) = train_own_tokens(model, specs, [dataset], tmp_path, disable_tqdm=True)
    (config,) = tmp_path.rglob("seed-5*/config.json")
    config.unlink()
    (again,) = train_own_tokens(model, specs, [dataset], tmp_path, disable_tqdm=True)
    assert torch.equal(again.tokens[TOKENS], trained.tokens[TOKENS])
    assert config.exists()


def described(
    model: EvaluatedModel,
    datasets: list[list[dict[str, Tensor]]],
    folder: Path,
    *,
    num_pairs: int | None = None,
    overrides: dict[str, Any] | None = None,
    on_evaluated: bool = False,
) -> dict[str, dict[str, Any]]:
    specs = [OwnTokensSpec(seed=5, num_robustness_tokens=2, dataset=number) for number in range(len(datasets))]
    arguments: dict[str, Any] = {"num_adversarial_pairs": num_pairs, "overrides": overrides, "disable_tqdm": True}
    trained = train_own_tokens(model, specs, datasets, folder, **arguments)
    again = train_own_tokens(model, specs, datasets, folder, **arguments)
    words, stored = (
        describe_training(model, own, overrides=overrides, on_evaluated=on_evaluated) for own in (trained, again)
    )
    assert words == stored
    return words


OWN = {"num_robustness_tokens": 2, "num_images": 6}


@pytest.mark.parametrize(
    ("overrides", "recipe", "own"),
    [
        ({}, {}, {}),
        ({"attack": "pgd", "max_steps": 2, "seed": 3}, {}, {}),  # no other than the recipe
        (
            {"eps": 4 / 255, "max_steps": 3},
            {"max_steps": 2, "eps": 8 / 255},
            {"max_steps": 3, "eps": 4 / 255},
        ),
        ({"attack_through": "tokens"}, {"attack_through": "base"}, {"attack_through": "tokens"}),
    ],
    ids=["none", "same", "changed", "another attacker"],
)
def test_it_is_said_how_own_tokens_are_trained(
    model: EvaluatedModel,
    dataset: list[dict[str, Tensor]],
    tmp_path: Path,
    overrides: dict[str, Any],
    recipe: dict[str, Any],
    own: dict[str, Any],
) -> None:
    found = described(model, [dataset], tmp_path, overrides=overrides)
    assert found == {"recipe": {"num_images": 6, **recipe}, "own_tokens_0": {**OWN, **own}}


NUM_SETTINGS = len(RECIPE.keys() - {"seed", "image_size", "num_processes", "num_steps_done", "dataset"})


@pytest.mark.parametrize(
    ("recipe", "changes", "overrides", "theirs", "own"),
    [
        (
            {},
            {},
            {"max_steps": 2},
            {"max_steps": 50},
            {"settings_left_to_defaults": NUM_SETTINGS - 1, "max_steps": 2},
        ),
        ({"attack": "pgd"}, {}, {}, {}, {"settings_left_to_defaults": NUM_SETTINGS - 1}),
        (
            {"attack": "pgd"},
            {"max_steps": 3},
            {"max_steps": 3},
            {"max_steps": 50},
            {"settings_left_to_defaults": NUM_SETTINGS - 2, "max_steps": 3},
        ),
        (
            {**RECIPE, "max_steps": 3},
            {"max_steps": 3, "num_steps_done": 3},
            {},
            {"num_images": 6, "num_steps_done": 2},
            {"num_steps_done": 3},
        ),
        (
            {**RECIPE, "num_processes": 4},
            {},
            {},
            {"num_images": 6, "num_processes": 4, "images_per_step": 8},
            {"num_processes": 1, "images_per_step": 2},
        ),
        (
            {**RECIPE, "num_processes": 4},
            {"gradient_accumulation_steps": 4},
            {"gradient_accumulation_steps": 4},
            {"num_images": 6, "gradient_accumulation_steps": 1, "num_processes": 4},
            {"gradient_accumulation_steps": 4, "num_processes": 1},
        ),
        (
            {**RECIPE, "previous": STATED},
            {},
            {},
            {"num_images": 6, "earlier_training": True},
            {"earlier_training": False},
        ),
        (
            {**RECIPE, "image_size": [224, 196]},
            {},
            {},
            {"num_images": 6, "image_size": [224, 196]},
            {"image_size": IMAGE_SIZE},
        ),
        ({**RECIPE, "image_size": "\n" * 300, "num_processes": "all", "dataset": "all"}, {}, {}, {}, {}),
        ({**RECIPE, "num_processes": []}, {}, {}, {"num_images": 6, "num_processes": []}, {"num_processes": 1}),
        (
            {**RECIPE, "lr_scheduler_type": "x" * 300},
            {},
            {},
            {"num_images": 6, "lr_scheduler_type": "x" * 200},
            {"lr_scheduler_type": "constant"},
        ),
    ],
    ids=[
        "unknown",
        "defaults",
        "defaults and overrides",
        "cut short",
        "processes",
        "same batch",
        "previous",
        "image size",
        "nonsense",
        "no processes",
        "long",
    ],
)
def test_what_departs_from_any_part_of_the_recipe_is_said(
    model: EvaluatedModel,
    recipe: dict[str, Any],
    changes: dict[str, Any],
    overrides: dict[str, Any],
    theirs: dict[str, Any],
    own: dict[str, Any],
) -> None:
    assert model.adapter is not None
    model.adapter.config.training = recipe
    trained = OwnTokens(tokens={TOKENS: torch.zeros(2, HIDDEN_SIZE)}, training={**RECIPE, **changes})
    found = describe_training(model, [trained], overrides=overrides)
    assert found == {"recipe": theirs, "own_tokens_0": {**OWN, **own}}
    assert make_report(own_tokens=found).own_tokens == found, "a report holds it"


def test_it_is_said_what_own_tokens_are_trained_on(
    model: EvaluatedModel, dataset: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    recipe, once = {"num_images": 6}, {"attacked_once_for_all_sets": True}
    assert described(model, [dataset, dataset[:3]], tmp_path / "pairs", num_pairs=4) == {
        "recipe": recipe,
        "own_tokens_0": {**OWN, "num_images": 4, **once},
        "own_tokens_1": {**OWN, "num_images": 3, **once},
    }
    alone = train_own_tokens(
        model,
        [OwnTokensSpec(seed=5, num_robustness_tokens=2, dataset=1)],
        [dataset, dataset[:3]],
        tmp_path / "one",
        disable_tqdm=True,
    )
    assert describe_training(model, alone) == {"recipe": recipe, "own_tokens_0": {**OWN, "num_images": 3}}
    on_evaluated = described(model, [dataset], tmp_path / "own", on_evaluated=True)
    assert on_evaluated == {"recipe": recipe, "own_tokens_0": {**OWN, "on_evaluated_dataset": True}}
    both = {"attack_through": "both"}
    assert described(model, [dataset], tmp_path / "both", num_pairs=4, overrides=both) == {
        "recipe": {**recipe, "attack_through": "base"},
        "own_tokens_0": {**OWN, **both},
    }


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
    assert torch.equal(first.tokens[TOKENS], same.tokens[TOKENS])
    others = [{"images": item["images"].flip(-1)} for item in dataset]
    (elsewhere,) = train_own_tokens(model, spec, [others], tmp_path / "a", disable_tqdm=True)
    assert not torch.equal(first.tokens[TOKENS], elsewhere.tokens[TOKENS])
    longer = train_own_tokens(model, spec, [dataset], tmp_path / "a", overrides={"max_steps": 3}, disable_tqdm=True)
    assert not torch.equal(first.tokens[TOKENS], longer[0].tokens[TOKENS])

    class NoTrainer:
        def __init__(self, *args: Any) -> None:
            raise AssertionError("trained again")

    monkeypatch.setattr(own_tokens, "RobustnessTokenTrainer", NoTrainer)
    (stored,) = train_own_tokens(model, spec, [dataset], tmp_path / "a", disable_tqdm=True)
    assert torch.equal(stored.tokens[TOKENS], first.tokens[TOKENS])
    assert stored.training == first.training


def test_images_that_change_in_the_middle_are_others(
    model: EvaluatedModel, dataset: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    spec = [OwnTokensSpec(seed=5, num_robustness_tokens=4)]
    (first,) = train_own_tokens(model, spec, [dataset], tmp_path, disable_tqdm=True)
    others = [
        {"images": item["images"] if row in (0, 5) else item["images"].flip(-1)} for row, item in enumerate(dataset)
    ]
    (other,) = train_own_tokens(model, spec, [others], tmp_path, disable_tqdm=True)
    assert not torch.equal(first.tokens[TOKENS], other.tokens[TOKENS])


def test_tokens_begin_as_large_as_the_defenders(
    model: EvaluatedModel, dataset: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    assert model.adapter is not None
    model.adapter.config.initializer_range = 3.0
    spec = [OwnTokensSpec(seed=5, num_robustness_tokens=4)]
    (own,) = train_own_tokens(
        model, spec, [dataset], tmp_path, overrides={"learning_rate": 1e-9, "max_steps": 1}, disable_tqdm=True
    )
    assert own.tokens[TOKENS].std().item() == pytest.approx(3.0, rel=0.3)


def test_a_second_run_attacks_the_images_of_the_first(
    model: EvaluatedModel, dataset: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    specs = [OwnTokensSpec(seed=seed, num_robustness_tokens=4) for seed in (5, 6)]
    at_once = train_own_tokens(model, specs, [dataset], tmp_path / "a", num_adversarial_pairs=3, disable_tqdm=True)
    train_own_tokens(model, specs[:1], [dataset], tmp_path / "b", num_adversarial_pairs=3, disable_tqdm=True)
    later = train_own_tokens(model, specs, [dataset], tmp_path / "b", num_adversarial_pairs=3, disable_tqdm=True)
    for one, other in zip(at_once, later, strict=True):
        assert torch.equal(one.tokens[TOKENS], other.tokens[TOKENS])


@pytest.mark.parametrize(
    ("recipe", "steps", "expected"),
    [
        (
            {"max_steps": 400, "warmup_steps": 40, "lr_scheduler_type": "cosine"},
            80,
            {"max_steps": 80, "warmup_steps": 8},
        ),
        (
            {"max_steps": 400, "warmup_steps": 1, "lr_scheduler_type": "cosine"},
            80,
            {"max_steps": 80, "warmup_steps": 1},
        ),
        ({}, 5, {"max_steps": 5, "warmup_steps": 0}),
        ({"max_steps": 400}, None, {}),
    ],
)
def test_a_shorter_training_keeps_the_share_of_its_warm_up(
    recipe: dict[str, Any], steps: int | None, expected: dict[str, int]
) -> None:
    assert shortened(recipe, steps) == expected


def test_the_attacker_of_a_robust_adapter_trains_tokens_gains_and_shifts(
    dataset: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    defended = RobustnessTokenForImageClassification.from_base(
        build_base("dinov2", classifier=True), num_robustness_tokens=4, token_depth="all", gains_and_shifts=["norm"]
    )
    defended.config.training = {"objective": "distillation", "attack": "pgd", "eps": 0.1, "attack_through": "tokens"}
    defended.config.training |= {"max_steps": 10, "num_attack_steps": 1, "step_size": 0.1}
    evaluated = EvaluatedModel(defended)
    specs = [OwnTokensSpec(seed=5, num_robustness_tokens=2)]
    changes = shortened(evaluated.recipe, 2)
    (own,) = train_own_tokens(evaluated, specs, [dataset], tmp_path, overrides=changes, disable_tqdm=True)
    assert own.tokens.keys() == evaluated.tokens.keys()
    assert own.tokens[TOKENS].shape == (2, 2, HIDDEN_SIZE)
    assert own.tokens["norm1.gain"].abs().max() > 0
    assert own.training["objective"] == "distillation"
    described = describe_training(evaluated, [own], overrides=changes)
    assert described["own_tokens_0"]["max_steps"] == 2
    (again,) = train_own_tokens(evaluated, specs, [dataset], tmp_path, overrides=changes, disable_tqdm=True)
    assert all(torch.equal(tensor, again.tokens[name]) for name, tensor in own.tokens.items())


def test_own_tokens_are_bound_to_the_head_that_they_are_distilled_from(
    dataset: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    training = {"objective": "distillation", "attack": "pgd", "eps": 0.1, "attack_through": "tokens", "max_steps": 1}
    specs = [OwnTokensSpec(seed=5, num_robustness_tokens=2)]
    for _ in range(2):
        defended = RobustnessTokenForImageClassification.from_base(build_base("dinov2", classifier=True))
        defended.config.training = training
        with torch.no_grad():
            defended.get_base_model().classifier.bias.normal_()  # type: ignore[operator, union-attr]
        train_own_tokens(EvaluatedModel(defended), specs, [dataset], tmp_path, disable_tqdm=True)
    assert len(list(tmp_path.iterdir())) == 2


def test_own_tokens_of_a_distilled_adapter_need_its_head(dataset: list[dict[str, Tensor]], tmp_path: Path) -> None:
    defended = RobustnessTokenModel.from_base(build_base("dinov2"))
    defended.config.training = {"objective": "distillation", "attack": "pgd"}
    with pytest.raises(ValueError, match="own tokens need its head too"):
        train_own_tokens(
            EvaluatedModel(defended), [OwnTokensSpec(seed=5, num_robustness_tokens=2)], [dataset], tmp_path
        )


def test_each_process_has_a_batch_to_train_on(
    model: EvaluatedModel, dataset: list[dict[str, Tensor]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Trainer(RobustnessTokenTrainer):
        def __init__(self, model: Any, args: Any, images: Any, *, head: Any) -> None:
            sizes.append(args.per_device_train_batch_size)
            super().__init__(model, args, images, head=head)

    sizes: list[int] = []
    monkeypatch.setattr(own_tokens, "RobustnessTokenTrainer", Trainer)
    spec = [OwnTokensSpec(seed=5, num_robustness_tokens=4)]
    train_own_tokens(
        model, spec, [dataset], tmp_path, overrides={"per_device_train_batch_size": 64}, disable_tqdm=True
    )
    assert sizes == [6]


def test_of_many_images_some_at_random_are_attacked(
    model: EvaluatedModel, dataset: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    spec = [OwnTokensSpec(seed=5, num_robustness_tokens=4)]
    train_own_tokens(model, spec, [dataset], tmp_path, num_adversarial_pairs=3, disable_tqdm=True)
    (folder,) = tmp_path.glob("*/pairs-0")
    rows = list(load_adversarial_pairs(folder).stored["index"])
    assert len(set(rows)) == 3
    assert rows != [0, 1, 2]


@pytest.mark.parametrize("changes", [{"eps": 0.5 / 255}, {"resize": "processor"}], ids=["eps", "shapes"])
def test_what_stored_pairs_cannot_hold_is_attacked_while_training(
    model: EvaluatedModel, tmp_path: Path, changes: dict[str, Any]
) -> None:
    pictures = Dataset.from_list([{"image": Image.new("RGB", size)} for size in ((32, 24), (24, 32), (16, 16))])
    pictures = pictures.cast_column("image", ImageFeature())
    assert model.adapter is not None
    model.adapter.image_processor = ViTImageProcessor(size={"shortest_edge": IMAGE_SIZE}, do_center_crop=False)
    spec = [OwnTokensSpec(seed=5, num_robustness_tokens=4)]
    overrides = {**changes, "per_device_train_batch_size": 1}
    (own,) = train_own_tokens(
        model, spec, [pictures], tmp_path, num_adversarial_pairs=2, overrides=overrides, disable_tqdm=True
    )
    assert "adversarial_pairs" not in own.training["dataset"]
    (pairs,) = train_own_tokens(
        model, spec, [pictures], tmp_path, num_adversarial_pairs=2, overrides={}, disable_tqdm=True
    )
    assert "adversarial_pairs" in pairs.training["dataset"]


def test_a_classifier_that_tokens_were_injected_into_has_a_trunk_to_train_on(
    dataset: list[dict[str, Tensor]], tmp_path: Path
) -> None:
    injected = inject_tokens(build_base("vit", classifier=True), torch.zeros(2, HIDDEN_SIZE))
    model = EvaluatedModel(injected, normalizer=Normalizer([0.5] * 3, [0.25] * 3))
    overrides = {key: RECIPE[key] for key in ("attack", "eps", "num_attack_steps", "max_steps")}
    (own,) = train_own_tokens(
        model,
        [OwnTokensSpec(seed=1, num_robustness_tokens=2)],
        [dataset],
        tmp_path,
        overrides=overrides,
        disable_tqdm=True,
    )
    assert own.tokens[TOKENS].shape == (2, HIDDEN_SIZE)
    assert own.tokens[TOKENS].isfinite().all()


def test_without_features_there_is_nothing_to_train_on(tmp_path: Path) -> None:
    injected = inject_tokens(build_base("vit", classifier=True), torch.zeros(2, HIDDEN_SIZE))
    model = EvaluatedModel(injected, task="segmentation", normalizer=Normalizer([0.5] * 3, [0.25] * 3))
    with pytest.raises(ValueError, match="feature_view"):
        train_own_tokens(model, [OwnTokensSpec(seed=1, num_robustness_tokens=2)], [[]], tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_steps", "2"),
        ("max_steps", None),
        ("learning_rate", "0.1"),
        ("learning_rate", [0.1]),
        ("invariance_weight", {}),
        ("eps_warmup_ratio", None),
        ("eps", "4/255"),
        ("step_size", True),
        ("seed", 0.5),
        ("lr_scheduler_type", 1),
        ("attack", ["pgd"]),
        ("mixed_precision", {"bf16": 1}),
    ],
)
def test_a_recipe_of_wrong_types_is_refused_by_name(model: EvaluatedModel, name: str, value: Any) -> None:
    assert model.adapter is not None
    model.adapter.config.training = {**RECIPE, name: value}
    with pytest.raises(ValueError, match=rf"^{name} in the training of the adapter's config\.json must be"):
        _ = model.recipe


@pytest.mark.parametrize(
    "name", ["max_steps", "num_attack_steps", "per_device_train_batch_size", "gradient_accumulation_steps"]
)
def test_a_recipe_without_an_end_is_not_followed(
    model: EvaluatedModel, dataset: list[dict[str, Tensor]], tmp_path: Path, name: str
) -> None:
    assert model.adapter is not None
    model.adapter.config.training = {**RECIPE, name: 10**9}
    specs = own_tokens_specs(1, num_robustness_tokens=2, recipe_seed=0)
    with pytest.raises(ValueError, match=rf"{name} in the training .* is 1,000,000,000, .*: give own_tokens_steps"):
        train_own_tokens(model, specs, [dataset], tmp_path, disable_tqdm=True)
    train_own_tokens(model, specs, [dataset], tmp_path, overrides={name: RECIPE.get(name, 2)}, disable_tqdm=True)
