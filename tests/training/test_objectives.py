"""Trains tokens of every layer, gains and shifts by each objective, with the heads and labels that they need."""

import dataclasses
import functools
from pathlib import Path
from typing import Any, get_args

import datasets
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPModel

from robustness_tokens import (
    RobustnessTokenForImageClassification,
    RobustnessTokenModel,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    SweepArguments,
    ZeroShotHead,
    load_head,
    make_adversarial_pairs,
    run_sweep,
    save_head,
)
from robustness_tokens.configuration import GainsAndShifts
from robustness_tokens.models.heads import ClassificationHead, ProbedModel, SegmentationHead, head_digest
from robustness_tokens.training.step import TrainingStep
from tests.support.bases import HIDDEN_SIZE, build_base
from tests.support.families import FAMILIES, text_inputs
from tests.support.training_runs import SETTINGS, build_robust_trainer, images, state_of


KINDS: tuple[GainsAndShifts, ...] = get_args(GainsAndShifts)


def labelled(count: int) -> list[dict[str, Any]]:
    return [{**item, "labels": row % 2} for row, item in enumerate(images(count))]


def make(
    folder: Path,
    *,
    head: Any = None,
    classifier: bool = True,
    dataset: Any = None,
    eval_dataset: Any = None,
    **kwargs: Any,
) -> RobustnessTokenTrainer:
    torch.manual_seed(3)
    model_class = RobustnessTokenForImageClassification if classifier else RobustnessTokenModel
    model = model_class.from_base(
        build_base("dinov2", classifier=classifier),
        num_robustness_tokens=3,
        token_depth="all",
        gains_and_shifts=KINDS,
    )
    args = RobustnessTokenTrainingArguments(
        output_dir=str(folder), **{**SETTINGS, "attack_through": "tokens", **kwargs}
    )
    if eval_dataset is not None:
        args = dataclasses.replace(args, eval_steps=args.max_steps)
    return RobustnessTokenTrainer(model, args, images(8) if dataset is None else dataset, eval_dataset, head=head)


@pytest.mark.parametrize("objective", ["cosine", "head_distance", "distillation", "cross_entropy"])
def test_every_objective_goes_down_and_moves_all_that_is_learned(objective: str, tmp_path: Path) -> None:
    trainer = make(tmp_path, dataset=labelled(8), objective=objective, max_steps=12, per_device_train_batch_size=8)
    before = state_of(trainer)
    trainer.train()
    losses = [row["loss"] for row in trainer.log_history]
    assert losses[-1] < losses[0]
    for name, tensor in state_of(trainer).items():
        assert not torch.equal(tensor, before[name]), name


def test_a_killed_robust_run_resumes_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"max_steps": 6, "save_steps": 1}
    settings |= {"lr_scheduler_type": "cosine", "eps_warmup_ratio": 0.5}
    whole = build_robust_trainer(tmp_path / "whole", **settings)
    whole.train()
    real = TrainingStep.accumulate_gradient

    def killed(self: TrainingStep, *args: Any, step: int, **kwargs: Any) -> dict[str, float]:
        if step == 4:
            raise KeyboardInterrupt
        return real(self, *args, step=step, **kwargs)

    monkeypatch.setattr(TrainingStep, "accumulate_gradient", killed)
    with pytest.raises(KeyboardInterrupt):
        build_robust_trainer(tmp_path / "cut", **settings).train()
    monkeypatch.setattr(TrainingStep, "accumulate_gradient", real)
    resumed = build_robust_trainer(tmp_path / "cut", resume_from_checkpoint=True, **settings)
    resumed.train()
    expected = state_of(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(resumed).items())
    assert [row["loss"] for row in resumed.log_history] == [row["loss"] for row in whole.log_history]


def test_the_adapter_of_a_robust_run_says_how_it_was_trained(tmp_path: Path) -> None:
    trainer = build_robust_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    loaded = RobustnessTokenForImageClassification.from_pretrained(
        tmp_path, base_model=build_base("dinov2", classifier=True)
    )
    expected = state_of(trainer)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.injector.state.items())
    training = loaded.config.training
    assert training is not None
    assert {
        "objective": "distillation",
        "attack_through": "tokens",
        "invariance_weight": 0.5,
    }.items() <= training.items()
    assert len(training["head"]) == 64


@pytest.mark.parametrize("pooled", [False, True], ids=["probe", "zero-shot"])
def test_a_head_beside_the_base_is_distilled(pooled: bool, tmp_path: Path) -> None:
    head: Any = ZeroShotHead(torch.randn(4, HIDDEN_SIZE)) if pooled else ClassificationHead(2 * HIDDEN_SIZE, 4)
    weights = {name: tensor.clone() for name, tensor in head.state_dict().items()}
    trainer = make(tmp_path, classifier=False, head=head, objective="distillation", max_steps=2)
    pixel_values = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        expected = ProbedModel(trainer.model, head)(pixel_values)
        torch.testing.assert_close(trainer.training_step.outputs(pixel_values), expected)
    trainer.train()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in head.state_dict().items())
    assert not any(parameter.requires_grad for parameter in head.parameters())


def test_a_segmentation_head_is_distilled_patch_by_patch(tmp_path: Path) -> None:
    head = SegmentationHead(HIDDEN_SIZE, 4)
    trainer = make(tmp_path, classifier=False, head=head, objective="distillation", max_steps=1)
    assert trainer.training_step.outputs(torch.randn(2, 3, 16, 16)).shape == (2, 4, 4)  # (B, P, C)
    trainer.train()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classifier": False, "objective": "distillation"}, "distillation.* has no head: .*ForImageClassification"),
        ({"objective": "head_distance", "head": ClassificationHead(2 * HIDDEN_SIZE, 4)}, "reads no head"),
        (
            {"classifier": False, "objective": "cross_entropy", "dataset": labelled(8)},
            "cross_entropy.* has no head: .*ForImageClassification",
        ),
        (
            {"classifier": False, "head": torch.nn.Linear(4, 2), "objective": "cross_entropy", "dataset": labelled(8)},
            "head is a Linear, expected a probe head",
        ),
        ({"objective": "cross_entropy"}, "no labels, .* name their column by label_column_name"),
        ({"objective": "distillation", "attack": "paper", "eps": None}, 'distillation.* needs attack="pgd"'),
        ({"objective": "kl"}, "objective must be one of"),
        ({"eps_warmup_ratio": 1.5}, "eps_warmup_ratio must be from 0 to 1"),
        ({"eps_warmup_ratio": 0.5, "attack": "paper", "eps": None}, "eps_warmup_ratio=0.5 has no effect"),
    ],
)
def test_what_an_objective_lacks_is_said_before_anything_runs(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


def test_a_run_is_bound_to_its_head(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"classifier": False, "objective": "distillation", "save_steps": 1}
    make(tmp_path, head=ClassificationHead(2 * HIDDEN_SIZE, 4), max_steps=1, **settings).train()
    other = ClassificationHead(2 * HIDDEN_SIZE, 4)
    with pytest.raises(ValueError, match=r"made by another run .*head"):
        make(tmp_path, head=other, max_steps=2, resume_from_checkpoint=True, **settings).train()


def test_eps_grows_over_its_share_of_the_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[float] = []
    real = TrainingStep.attacked

    def watched(self: TrainingStep, batch: Any, target: Tensor, **kwargs: Any) -> Tensor:
        attacked = real(self, batch, target, **kwargs)
        used.append((self.normalizer.inverse(attacked) - batch["images"]).abs().max().item())
        return attacked

    monkeypatch.setattr(TrainingStep, "attacked", watched)
    settings: dict[str, Any] = {"eps": 0.1, "step_size": 0.1, "num_attack_steps": 2, "max_steps": 8}
    trainer = build_robust_trainer(tmp_path, eps_warmup_ratio=0.5, **settings)
    trainer.train()
    assert [trainer.args.eps_share(step) for step in range(8)] == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert used == pytest.approx([0.025, 0.05, 0.075, *[0.1] * 5], abs=1e-3)
    assert trainer.args.schedule_depends_on_max_steps


@torch.no_grad()
def test_a_zero_shot_head_gives_the_logits_of_the_two_towers() -> None:
    towers: CLIPModel = FAMILIES["clip_two_towers"].build()
    inputs = {**FAMILIES["clip_two_towers"].inputs(), **text_inputs()}
    expected = towers(**inputs).logits_per_image
    text = towers.get_text_features(**text_inputs())
    text = text if isinstance(text, Tensor) else text.pooler_output
    head = ZeroShotHead(text, towers.logit_scale.exp().item())
    found = ProbedModel(towers, head)(inputs["pixel_values"])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_zero_shot_head_is_made_from_text_not_from_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="ZeroShotHead is not saved"):
        save_head(ZeroShotHead(torch.randn(2, 8)), tmp_path / "head")
    assert not (tmp_path / "head").exists()
    with pytest.raises(ValueError, match=r"text_embeddings must be \(C, E\)"):
        ZeroShotHead(torch.randn(8))
    save_head(ClassificationHead(8, 2, base_model_fingerprint={"float16": "0" * 64}), tmp_path / "probe")
    assert isinstance(load_head(tmp_path / "probe"), ClassificationHead)


def test_the_baseline_is_unknown_where_only_the_tokens_are_attacked(tmp_path: Path) -> None:
    trainer = build_robust_trainer(tmp_path, max_steps=2)
    trainer.train()
    assert all(row["baseline_cosine"] != row["baseline_cosine"] for row in trainer.log_history)
    assert all(row["adversarial_cosine"] == row["adversarial_cosine"] for row in trainer.log_history)


def foreign_head() -> ClassificationHead:
    return ClassificationHead(2 * HIDDEN_SIZE, 4, base_model_fingerprint={"bfloat16": "0" * 64, "float16": "0" * 64})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": foreign_head()}, "classification head was trained on the head's own base"),
        ({"head": torch.nn.Linear(64, 4)}, "head is a Linear, expected a probe head"),
        ({"head": SegmentationHead(HIDDEN_SIZE, 4), "objective": "cross_entropy"}, "head for classification"),
    ],
)
def test_a_head_that_does_not_belong_here_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path, classifier=False, dataset=labelled(8), **{"objective": "distillation", **settings})


@pytest.mark.parametrize("label", [-100, -1, 999])
def test_labels_that_are_no_classes_are_refused(label: int, tmp_path: Path) -> None:
    dataset = [{**item, "labels": label} for item in images(8)]
    with pytest.raises(ValueError, match=f"labels go from {label} to {label}, expected classes of the head, 0 to"):
        make(tmp_path, dataset=dataset, objective="cross_entropy", max_steps=1).train()


NAMES = ["shirt", "bag", "boot", "coat", "dress"]


def pictures(names: list[str] | None, labels: list[Any], **columns: Any) -> datasets.Dataset:
    kind: Any = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    shots = [(255 * item["images"]).byte().permute(1, 2, 0).numpy() for item in images(len(labels))]
    rows = {"image": [Image.fromarray(shot) for shot in shots], "label": labels, **columns}
    features = {"image": datasets.Image(), "label": kind, **dict.fromkeys(columns, datasets.Value("int64"))}
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


@pytest.mark.parametrize("who", ["classifier", "probe", "zero-shot"])
def test_labels_are_those_of_the_heads_classes(who: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    named_base = functools.partial(build_base, id2label=dict(enumerate(NAMES)))
    monkeypatch.setattr("tests.training.test_objectives.build_base", named_base)
    head: Any = {
        "classifier": None,
        "probe": ClassificationHead(2 * HIDDEN_SIZE, 5, label_names=NAMES),
        "zero-shot": ZeroShotHead(torch.randn(5, HIDDEN_SIZE), label_names=NAMES),
    }[who]
    settings: dict[str, Any] = {"classifier": head is None, "head": head, "objective": "cross_entropy"}
    settings |= {"max_steps": 2, "image_size": 16}
    labels, order = [0, 1, 2, 3, 4, 0, 1, 2], sorted(NAMES)
    there = [order.index(NAMES[label]) for label in labels]
    ours = make(tmp_path / "a", dataset=pictures(NAMES, labels), **settings)
    theirs = make(tmp_path / "b", dataset=pictures(order, there), **settings)
    for row in range(8):
        assert theirs.train_dataset[row]["labels"] == ours.train_dataset[row]["labels"] == labels[row]
    held_out = make(tmp_path / "c", dataset=pictures(NAMES, labels), eval_dataset=pictures(order, there), **settings)
    assert held_out.eval_dataset is not None
    assert [held_out.eval_dataset[row]["labels"] for row in range(8)] == labels
    by_index = make(tmp_path / "d", dataset=pictures(order, there), label_matching="index", **settings)
    assert [by_index.train_dataset[row]["labels"] for row in range(8)] == there
    with pytest.raises(ValueError, match=r"such as 'cat': the dataset has 'cat', 'bag', the model 'shirt', 'bag'"):
        make(tmp_path / "e", dataset=pictures(["cat", "bag"], [0, 1] * 4), **settings)


@pytest.mark.parametrize("label", [-1, 5])
def test_labels_of_a_table_are_checked_before_anything_runs(label: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"objective": "cross_entropy", "image_size": 16}
    with pytest.raises(ValueError, match=f"labels must be from 0 to 4, .* got {label}"):
        make(tmp_path, dataset=pictures(None, [0] * 7 + [label]), **settings)
    with pytest.raises(ValueError, match=f"eval_dataset can't be used: labels must be from 0 to 4, .* got {label}"):
        make(tmp_path, dataset=pictures(None, [0] * 8), eval_dataset=pictures(None, [label]), **settings)
    named = make(tmp_path, dataset=pictures(None, [label] * 8, fine=[3] * 8), label_column_name="fine", **settings)
    assert named.train_dataset[7]["labels"] == 3


@pytest.mark.parametrize("name", ["timm_deit3_classifier", "vit_classifier", "dinov2_classifier"])
def test_the_digest_of_a_head_is_that_of_its_weights(name: str) -> None:
    base = FAMILIES[name].build()
    before = head_digest(base, None)
    assert head_digest(base, None) == before
    with torch.no_grad():
        next(p for n, p in base.named_parameters() if n.endswith(("classifier.weight", "head.weight"))).add_(1)
    assert head_digest(base, None) != before


def test_pairs_are_bound_to_the_head_that_was_attacked(tmp_path: Path) -> None:
    model = build_robust_trainer(tmp_path / "x").model
    settings: dict[str, Any] = {**SETTINGS, "objective": "distillation"}
    pairs_args = RobustnessTokenTrainingArguments(output_dir=str(tmp_path / "pairs"), **settings)
    pairs = make_adversarial_pairs(model, pairs_args, images(8))
    assert pairs.info.head == head_digest(model.get_base_model(), None)
    run = RobustnessTokenTrainingArguments(output_dir=str(tmp_path / "run"), max_steps=1, **settings)
    RobustnessTokenTrainer(model, run, pairs).train()
    with torch.no_grad():
        model.get_base_model().classifier.weight.add_(1)  # type: ignore[operator, union-attr]
    with pytest.raises(ValueError, match="pairs that were made through another head"):
        RobustnessTokenTrainer(model, dataclasses.replace(run, overwrite_output_dir=True), pairs)
    with pytest.raises(ValueError, match=r"made differently .*head"):
        make_adversarial_pairs(model, pairs_args, images(8))
    with pytest.raises(ValueError, match=r"eps_warmup_ratio=0\.5 does not fit adversarial pairs"):
        make(tmp_path / "y", dataset=pairs, objective="distillation", attack_through="base", eps_warmup_ratio=0.5)
    with pytest.raises(ValueError, match="pairs have no labels"):
        make_adversarial_pairs(model, dataclasses.replace(pairs_args, objective="cross_entropy"), images(8))


def test_a_sweep_distils_from_the_bases_head(tmp_path: Path) -> None:
    model = RobustnessTokenForImageClassification.from_base(build_base("dinov2", classifier=True))
    args = RobustnessTokenTrainingArguments(
        output_dir=str(tmp_path), max_steps=2, objective="distillation", **SETTINGS
    )
    grid = SweepArguments(sweep_num_tokens=[1, 2], sweep_seeds=[0], num_eval_pairs=2)
    assert [row["num_robustness_tokens"] for row in run_sweep(model, args, images(12), grid)] == [1, 2]


def test_a_zero_shot_head_takes_the_scale_of_a_model() -> None:
    scale = torch.nn.Parameter(torch.tensor(2.0))
    head = ZeroShotHead(torch.randn(3, 8), scale.exp())  # type: ignore[arg-type]  # a tensor with a graph
    assert not head.weight.requires_grad
    for text, factor in ((torch.zeros(2, 8), 1.0), (torch.full((2, 8), torch.nan), 1.0), (torch.randn(2, 8), 0.0)):
        with pytest.raises(ValueError, match="text_embeddings must be finite rows"):
            ZeroShotHead(text, factor)
