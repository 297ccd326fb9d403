from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset

from robustness_tokens import (
    RobustnessTokenForImageClassification,
    RobustnessTokenModel,
    RobustnessTokenTrainingArguments,
    evaluate_robustness,
    inject_tokens,
)
from robustness_tokens.configuration import TOKENS
from robustness_tokens.data import Normalizer, choose_rows
from robustness_tokens.evaluation import cells as cells_module
from robustness_tokens.evaluation import evaluate
from robustness_tokens.evaluation.arguments import EvaluationArguments
from robustness_tokens.evaluation.attack_suite import Attack
from robustness_tokens.evaluation.evaluate import reported_tokens
from robustness_tokens.evaluation.plan import BUDGETS, Budget
from robustness_tokens.evaluation.threat_models import EvaluatedModel
from robustness_tokens.models.heads import ProbedModel, SegmentationHead
from robustness_tokens.report.html import render_report_html
from robustness_tokens.report.markdown import render_report_markdown
from robustness_tokens.report.schema import Result
from robustness_tokens.report.writing import RobustnessReport
from tests.support.bases import HIDDEN_SIZE, IMAGE_SIZE, build_base


NUM_IMAGES, EPS = 10, 16 / 255


class Images(Dataset[dict[str, Any]]):
    """Random images; their labels are the model's predictions, except for the last."""

    def __init__(self, labels: list[Any] | None, num_images: int = NUM_IMAGES) -> None:
        generator = torch.Generator().manual_seed(6)
        self.images = torch.randint(256, (num_images, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator) / 255
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"images": self.images[index], **({} if self.labels is None else {"labels": self.labels[index]})}


TINY = Budget(
    name="quick",
    num_images=NUM_IMAGES,
    num_steps=3,
    num_restarts=1,
    num_apgd_steps=3,
    num_target_classes=3,
    num_queries=5,
    num_draws=2,
    num_own_tokens=2,
    num_adversarial_pairs=4,
    num_sweep_images=4,
    num_sweep_steps=2,
    num_diagnostic_images=2,
)


@pytest.fixture(scope="module", autouse=True)
def tiny_budget() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "BUDGETS", {**BUDGETS, "quick": TINY})
        yield


@pytest.fixture(scope="module")
def classifier() -> RobustnessTokenForImageClassification:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RobustnessTokenForImageClassification.from_base(
            build_base("dinov2", classifier=True), num_robustness_tokens=2, initializer_range=0.5
        )


@pytest.fixture(scope="module")
def images(classifier: RobustnessTokenForImageClassification) -> Images:
    dataset, evaluated = Images(None), EvaluatedModel(classifier)
    with torch.no_grad():
        labels = evaluated.logits(dataset.images, None).argmax(dim=1).tolist()
    return Images([*labels[:-1], (labels[-1] + 1) % 5])


OWN = [torch.full((2, HIDDEN_SIZE), 0.1), torch.full((3, HIDDEN_SIZE), -0.1)]


def run(model: Any, dataset: Any, **changes: Any) -> RobustnessReport:
    defaults: dict[str, Any] = {
        "own_tokens": OWN,
        "eps": [EPS],
        "eps_sweep": [0, EPS],
        "diagnostics": False,
        "batch_size": 4,
        "disable_tqdm": True,
    }
    return evaluate_robustness(model, dataset, **{**defaults, **changes})


@pytest.fixture(scope="module")
def report(tiny_budget: None, classifier: RobustnessTokenForImageClassification, images: Images) -> RobustnessReport:
    return run(classifier, images)


def pick(results: list[Result], **wanted: Any) -> list[Result]:
    def value(result: Result, key: str) -> Any:
        return getattr(result, key) if hasattr(result, key) else result.attack_parameters.get(key)

    return [result for result in results if all(value(result, key) == one for key, one in wanted.items())]


def test_clean_numbers_are_the_models_own(
    report: RobustnessReport, classifier: RobustnessTokenForImageClassification, images: Images
) -> None:
    (without,) = pick(report.results, knowledge=None, tokens="none", metric="accuracy")
    assert without.value == (NUM_IMAGES - 1) / NUM_IMAGES
    (cosine,) = pick(report.results, knowledge=None, tokens="none", metric="cosine")
    assert cosine.value == pytest.approx(1, abs=1e-6)
    evaluated = EvaluatedModel(classifier)
    with torch.no_grad():
        correct = evaluated.logits(images.images, evaluated.tokens).argmax(dim=1) == torch.tensor(images.labels)
    (trained,) = pick(report.results, knowledge=None, tokens="trained", metric="accuracy")
    assert trained.value == correct.double().mean().item()
    assert {result.tokens for result in pick(report.results, knowledge=None)} == {
        "trained",
        "none",
        "untrained",
        "random",
        "zero",
        "mean",
    }


def test_the_report_tells_which_images_were_correct(
    report: RobustnessReport, classifier: RobustnessTokenForImageClassification, images: Images
) -> None:
    assert report.images is not None
    assert report.images.rows == choose_rows(NUM_IMAGES, NUM_IMAGES, seed=0)
    (without,) = pick(report.results, knowledge=None, tokens="none", metric="accuracy")
    assert without.correct is not None
    assert [row for row, right in zip(report.images.rows, without.correct, strict=True) if not right] == [9]
    evaluated = EvaluatedModel(classifier)
    with torch.no_grad():
        correct = evaluated.logits(images.images, evaluated.tokens).argmax(dim=1) == torch.tensor(images.labels)
    (trained,) = pick(report.results, knowledge=None, tokens="trained", metric="accuracy")
    assert trained.correct is not None
    assert trained.correct.tolist() == correct[report.images.rows].tolist()
    for result in report.results:
        assert (result.correct is not None) == (result.metric == "accuracy")


def test_the_bits_of_a_worst_case_are_those_of_its_attacks(report: RobustnessReport) -> None:
    def worst(**wanted: Any) -> Tensor:
        chosen = pick(report.results, metric="accuracy", tokens="trained", **wanted)
        return torch.stack([result.correct for result in chosen if result.correct is not None]).all(dim=0)

    for level in ("none", "base", "own_tokens", "full"):
        at_eps: dict[str, Any] = {"knowledge": level, "eps": EPS, "series": None}
        (whole,) = pick(report.results, metric="accuracy", tokens="trained", attack="worst_case", **at_eps)
        assert whole.correct is not None
        names = {result.attack for result in pick(report.results, **at_eps)} - {"worst_case", "worst_case_of_part"}
        each = torch.stack([worst(attack=name, **at_eps) for name in names]).all(dim=0)
        assert whole.correct.tolist() == (each & worst(knowledge=None)).tolist()
    swept = pick(report.results, metric="accuracy", tokens="trained", series="sweep", eps=0.0, knowledge="full")
    assert [result.correct.tolist() for result in swept if result.correct is not None] == [
        worst(knowledge=None)[: swept[0].num_images].tolist()
    ]


def test_reports_on_the_same_images_say_so(
    report: RobustnessReport, classifier: RobustnessTokenForImageClassification, images: Images
) -> None:
    small: dict[str, Any] = {"attacks": ["cross_entropy"], "knowledge": ["full"], "eps_sweep": [], "num_steps": 1}
    assert run(classifier, images, batch_size=3, **small).images == report.images
    other_order = run(classifier, images, seed=1, **small).images
    assert report.images is not None
    assert other_order is not None
    assert sorted(other_order.rows) == sorted(report.images.rows)
    assert other_order.sha256 != report.images.sha256
    relabelled, repainted = Images([*images.labels[1:], 0]), Images(images.labels)  # type: ignore[index]
    repainted.images[3, 0, 0, 0] = 1 - repainted.images[3, 0, 0, 0]
    for changed in (relabelled, repainted):
        found = run(classifier, changed, **small).images
        assert found is not None
        assert found.rows == report.images.rows
        assert found.sha256 != report.images.sha256
    without_labels = run(
        classifier, images, task="features", knowledge=["full"], eps_sweep=[], attacks=["feature_mse"]
    )
    assert without_labels.images is not None
    assert without_labels.images.rows == report.images.rows


def test_eps_zero_equals_clean_exactly(
    report: RobustnessReport, classifier: RobustnessTokenForImageClassification, images: Images
) -> None:
    whole = run(classifier, images, eps=[0.0], eps_sweep=[])
    for result in pick(whole.results, eps=0.0):
        if result.attack not in (None, "paper"):
            (clean,) = pick(whole.results, knowledge=None, tokens=result.tokens, metric=result.metric)
            assert (result.value, result.confidence_interval) == (clean.value, clean.confidence_interval)


def test_the_report_holds_the_figures(report: RobustnessReport) -> None:
    assert report.figures == {"layers.png": b"not drawn"}


def test_every_level_has_its_worst_case(report: RobustnessReport) -> None:
    for metric in ("accuracy", "cosine"):
        for series in (None, "sweep"):
            at_eps = pick(report.results, tokens="trained", metric=metric, eps=EPS, series=series)
            worst = {result.knowledge: result.value for result in pick(at_eps, attack="worst_case")}
            assert set(worst) == {"none", "base", "own_tokens", "full", "full_worst_case"}
            for result in at_eps:
                if result.attack != "worst_case":
                    assert worst[result.knowledge] <= result.value
            assert worst["full_worst_case"] <= min(worst.values())


def test_the_first_worst_case_is_the_headline(report: RobustnessReport) -> None:
    first = next(result for result in report.results if result.knowledge is not None)
    assert (first.knowledge, first.attack, first.metric, first.eps) == (
        "full_worst_case",
        "worst_case",
        "accuracy",
        EPS,
    )


def test_every_number_says_what_it_means(report: RobustnessReport) -> None:
    for result in report.results:
        assert result.confidence_interval is not None
        low, high = result.confidence_interval
        assert low - 1e-9 <= result.value <= high + 1e-9
        assert result.seed == 0
        if result.attack not in (None, "worst_case", "worst_case_of_part"):
            assert result.attack_parameters["view"]
        elif result.attack is not None:
            assert result.attack_parameters["attacks"]
    views = {
        result.attack_parameters["view"]
        for result in pick(report.results, knowledge="own_tokens")
        if "view" in result.attack_parameters
    }
    assert views == {"own_tokens_0", "own_tokens_1", "own_tokens_ensemble"}
    for view, lengths in (("own_tokens_0", [2]), ("own_tokens_1", [3]), ("own_tokens_ensemble", [2, 3])):
        for result in pick(report.results, view=view):
            assert result.attack_parameters["num_robustness_tokens"] == lengths
    assert report.own_tokens == {}, "they were not trained here"
    assert "their training is not known" in render_report_markdown(report)
    assert RobustnessReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_the_curve_over_eps_has_a_point_per_eps_and_level(report: RobustnessReport) -> None:
    for level in ("none", "base", "own_tokens", "full", "full_worst_case", "base, none"):
        assert report.series[f"sweep/{level}/accuracy/eps"] == [0, EPS]
        assert len(report.series[f"sweep/{level}/cosine/low"]) == 2
    swept = pick(report.results, series="sweep", knowledge="own_tokens")
    assert swept
    for result in swept:  # of own tokens by the first set alone, which it names
        assert result.attack_parameters["num_robustness_tokens"] == [2]
        assert all("(own_tokens_0)" in attack for attack in result.attack_parameters["attacks"])


def test_restarts_and_queries_are_the_users(classifier: RobustnessTokenForImageClassification, images: Images) -> None:
    found = run(
        classifier,
        images,
        knowledge=["none", "full"],
        attacks=["cross_entropy", "square"],
        eps_sweep=[],
        num_restarts=2,
        num_queries=7,
    )
    assert {r.attack_parameters["num_restarts"] for r in pick(found.results, attack="cross_entropy")} == {2}
    assert {r.attack_parameters["num_queries"] for r in pick(found.results, attack="square")} == {7}


def test_numbers_do_not_depend_on_the_batches(
    report: RobustnessReport, classifier: RobustnessTokenForImageClassification, images: Images
) -> None:
    other = run(classifier, images, batch_size=5, attacks=["cross_entropy", "square"], eps_sweep=[])
    for result in pick(other.results, tokens="trained"):
        if result.attack in ("cross_entropy", "square") and result.attack_parameters["view"] in (
            "queries",
            "base",
            "full",
            "own_tokens_0",
        ):
            (same,) = pick(
                report.results,
                tokens="trained",
                metric=result.metric,
                attack=result.attack,
                view=result.attack_parameters["view"],
                series=None,
            )
            assert result.value == pytest.approx(same.value, abs=1e-4)


def test_settings_come_as_arguments_or_by_keyword(
    classifier: RobustnessTokenForImageClassification, images: Images
) -> None:
    settings: dict[str, Any] = {"knowledge": ["base"], "attacks": ["cross_entropy"], "eps": [EPS], "eps_sweep": []}
    arguments = EvaluationArguments(**settings, diagnostics=False, disable_tqdm=True, seed=5)
    found = evaluate_robustness(classifier, images, arguments, seed=1, batch_size=4)
    assert found.results == run(classifier, images, **settings, seed=1).results
    assert (arguments.seed, arguments.batch_size) == (5, 100)
    with pytest.raises(TypeError, match="has no argument 'num_image': did you mean 'num_images'"):
        evaluate_robustness(classifier, images, num_image=3)


def test_what_is_finished_is_not_run_again(
    classifier: RobustnessTokenForImageClassification,
    images: Images,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    count = []
    real = cells_module.run_attack

    def counted(attack: Attack, *args: Any, **kwargs: Any) -> Tensor:
        count.append(attack.name)
        if len(count) == 8:
            raise KeyboardInterrupt
        return real(attack, *args, **kwargs)

    monkeypatch.setattr(cells_module, "run_attack", counted)
    with pytest.raises(KeyboardInterrupt):
        run(classifier, images, output_dir=tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 3  # two attacks on three batches each, and one batch
    resumed = run(classifier, images, output_dir=tmp_path)
    first = len(count)
    again = run(classifier, images, output_dir=tmp_path)
    assert len(count) == first
    monkeypatch.setattr(cells_module, "run_attack", real)
    expected = run(classifier, images)
    assert resumed.results == again.results == expected.results


def test_what_a_crash_left_damaged_is_run_again(
    classifier: RobustnessTokenForImageClassification, images: Images, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fixed: dict[str, Any] = {"attacks": ["cross_entropy"], "knowledge": ["base", "full"], "eps_sweep": []}
    first = run(classifier, images, output_dir=tmp_path, **fixed)
    damaged, whole = sorted((tmp_path / "cells").iterdir())
    untouched = whole.stat().st_mtime_ns
    damaged.write_bytes(damaged.read_bytes()[:100])
    caplog.clear()
    again = run(classifier, images, output_dir=tmp_path, **fixed)
    assert [record.getMessage().partition(" is damaged")[0] for record in caplog.records] == [str(damaged)]
    assert again.results == first.results
    run(classifier, images, output_dir=tmp_path, **fixed)
    assert len(caplog.records) == 1  # the file is repaired
    assert whole.stat().st_mtime_ns == untouched


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"num_steps": 4}, {"batch_size": 5}, {"eps": [8 / 255]}, {"num_images": 9}], ids=str
)
def test_a_changed_setting_is_not_mixed_in(
    classifier: RobustnessTokenForImageClassification, images: Images, tmp_path: Path, change: dict[str, Any]
) -> None:
    fixed: dict[str, Any] = {"attacks": ["cross_entropy"], "knowledge": ["full"], "eps_sweep": []}
    run(classifier, images, output_dir=tmp_path, **fixed)
    found = run(classifier, images, output_dir=tmp_path, **{**fixed, **change})
    assert len(list((tmp_path / "cells").iterdir())) == 2
    assert found.results == run(classifier, images, **{**fixed, **change}).results


def test_other_tokens_are_not_mixed_in(
    classifier: RobustnessTokenForImageClassification, images: Images, tmp_path: Path
) -> None:
    fixed: dict[str, Any] = {"attacks": ["cross_entropy"], "knowledge": ["base"], "eps_sweep": []}
    run(classifier, images, output_dir=tmp_path, **fixed)
    before = classifier.robustness_tokens.detach().clone()
    try:
        with torch.no_grad():
            classifier.robustness_tokens.mul_(2)
        run(classifier, images, output_dir=tmp_path, **fixed)
    finally:
        with torch.no_grad():
            classifier.robustness_tokens.copy_(before)
    assert len(list((tmp_path / "cells").iterdir())) == 2


def test_another_surrogate_is_not_mixed_in(
    classifier: RobustnessTokenForImageClassification, images: Images, tmp_path: Path
) -> None:
    fixed: dict[str, Any] = {"attacks": ["cross_entropy"], "knowledge": ["none"], "eps_sweep": []}
    for seed in (1, 2, 2):
        torch.manual_seed(seed)
        base = build_base("dinov2", classifier=True)
        with torch.no_grad():
            base.classifier.weight.normal_()
        other = RobustnessTokenForImageClassification.from_base(base)
        found = run(classifier, images, output_dir=tmp_path, surrogate=other, **fixed)
        assert found.results == run(classifier, images, surrogate=other, **fixed).results
    assert len(list((tmp_path / "cells").iterdir())) == 2


def test_half_precision_of_the_attacks_is_reported(
    classifier: RobustnessTokenForImageClassification, images: Images
) -> None:
    found = run(
        classifier, images, attack_precision="bf16", attacks=["cross_entropy"], knowledge=["full"], eps_sweep=[]
    )
    attacked = [result for result in found.results if result.attack is not None]
    assert {result.attack_parameters["attack_precision"] for result in attacked} == {"bf16"}


@pytest.mark.parametrize(
    ("changes", "num_images", "in_worst_case"),
    [({}, 4, False), ({"eps": [2 / 255]}, NUM_IMAGES, True), ({"attacks": ["paper"]}, NUM_IMAGES, False)],
    ids=["budget", "its own eps", "named"],
)
def test_the_published_attack_takes_all_images_where_it_is_asked_for(
    classifier: RobustnessTokenForImageClassification,
    images: Images,
    changes: dict[str, Any],
    num_images: int,
    in_worst_case: bool,
) -> None:
    found = run(classifier, images, knowledge=["base"], eps_sweep=[], **changes)
    (paper,) = pick(found.results, attack="paper", tokens="trained", metric="accuracy")
    assert (paper.num_images, paper.eps) == (num_images, 2 / 255)
    worst = pick(found.results, attack="worst_case", knowledge="base", tokens="trained", metric="accuracy")
    assert any("paper (base)" in result.attack_parameters["attacks"] for result in worst) is in_worst_case


def test_images_off_the_8_bit_grid_keep_the_papers_budget_too() -> None:
    model = RobustnessTokenModel.from_base(build_base("vit"), num_robustness_tokens=2)
    dataset = Images(None)
    largest = 8 / 255 * max(model.config.image_std or [])  # in pixel units
    for images, eps in ((dataset.images, (math.floor(255 * largest) + 1) / 255), (0.9 * dataset.images, None)):
        dataset.images = images
        report = run(model, dataset, knowledge=["base"], attacks=["paper"], eps_sweep=[], num_images=2)
        (check,) = (check for check in report.checks if check.number == 11)
        assert check.passed, check.value
        (result,) = pick(report.results, attack="paper", tokens="trained")
        assert result.eps == pytest.approx(largest + 1 / 255 if eps is None else eps)


def test_features_need_no_labels(tmp_path: Path) -> None:
    model = RobustnessTokenModel.from_base(build_base("vit"), num_robustness_tokens=2)
    report = run(model, Images(None))
    assert {result.metric for result in report.results} == {"cosine"}
    worst = pick(report.results, attack="worst_case", tokens="trained", series=None)
    assert {result.knowledge for result in worst} == {"none", "base", "own_tokens", "full", "full_worst_case"}
    (clean,) = pick(report.results, knowledge=None, tokens="trained")
    assert all(result.value < clean.value for result in worst)


def test_segmentation_by_a_probe() -> None:
    model = RobustnessTokenModel.from_base(build_base("dinov2"), num_robustness_tokens=2)
    probed = ProbedModel(model, SegmentationHead(HIDDEN_SIZE, 3))
    with torch.no_grad():
        probed.head.convolution.weight.copy_(torch.randn_like(probed.head.convolution.weight))  # type: ignore[operator, union-attr, arg-type]
    evaluated = EvaluatedModel(probed)
    dataset = Images(None)
    with torch.no_grad():
        labels = evaluated.pixel_logits(dataset.images, None, (IMAGE_SIZE, IMAGE_SIZE)).argmax(dim=1)
    labels[:, :4] = 255
    report = run(probed, Images(list(labels)), knowledge=["base", "full"])
    (clean,) = pick(report.results, knowledge=None, tokens="none", metric="miou")
    assert clean.value == 1
    (attacked,) = pick(
        report.results, knowledge="base", tokens="none", metric="miou", attack="cross_entropy", series=None
    )
    assert attacked.value < 1
    worst = pick(report.results, knowledge="full_worst_case", metric="mean_image_miou", series=None)
    each = pick(report.results, tokens="trained", metric="mean_image_miou", eps=EPS, series=None)
    assert worst[0].value <= min(result.value for result in each)
    assert all(result.correct is None for result in report.results), "an image has no bit"
    assert report.images is not None
    assert not report.base_has_own_head


def test_a_head_of_the_bases_own_is_no_secret() -> None:
    model = RobustnessTokenModel.from_base(build_base("dinov2"), num_robustness_tokens=2)
    head, other = (SegmentationHead(HIDDEN_SIZE, 3) for _ in range(2))
    labels = torch.zeros(NUM_IMAGES, IMAGE_SIZE, IMAGE_SIZE, dtype=torch.int64)
    changes: dict[str, Any] = {"knowledge": ["base"], "attacks": ["cross_entropy"], "eps_sweep": [], "num_images": 2}
    report = run(ProbedModel(model, head, base_head=other), Images(list(labels)), **changes)
    assert report.base_has_own_head
    for text in (render_report_markdown(report), render_report_html(report)):
        assert "The results without tokens use a separate head." in text


def test_the_attacker_trains_own_tokens(
    classifier: RobustnessTokenForImageClassification, images: Images, tmp_path: Path
) -> None:
    arguments: dict[str, Any] = {
        "own_tokens": None,
        "knowledge": ["own_tokens"],
        "own_tokens_overrides": {"attack": "pgd", "max_steps": 2, "num_attack_steps": 2},
        "output_dir": tmp_path,
        "eps_sweep": [],
    }
    first = run(classifier, images, **arguments)
    assert pick(first.results, knowledge="own_tokens", attack="worst_case", metric="accuracy")
    assert not pick(first.results, knowledge="full_worst_case")
    own = {
        "num_robustness_tokens": 2,
        "num_images": 4,
        "on_evaluated_dataset": True,
        "attacked_once_for_all_sets": True,
        "attack": "pgd",
        "max_steps": 2,
        "num_attack_steps": 2,
    }
    left = len(RobustnessTokenTrainingArguments(output_dir="").recipe().keys() - {"seed", "image_size"}) - 3
    own["settings_left_to_defaults"] = left
    recipe = {"attack": "paper", "max_steps": 50, "num_attack_steps": 30}
    assert first.own_tokens == {"recipe": recipe, "own_tokens_0": own, "own_tokens_1": own}
    for result in pick(first.results, knowledge="own_tokens"):
        if result.attack == "worst_case":
            by_set = [2, 2] if result.metric == "accuracy" else [2]  # attacks on what is left count for no cosine
            assert result.attack_parameters["num_robustness_tokens"] == by_set
    assert "| `max_steps` | `50` | `2` | `2` |" in render_report_markdown(first)
    assert '<th scope="row"><code>max_steps</code></th><td>50</td><td>2</td><td>2</td>' in render_report_html(first)
    files = sorted((tmp_path / "own_tokens").rglob("model.safetensors"))
    assert len(files) == 2
    times = [file.stat().st_mtime_ns for file in files]
    assert run(classifier, images, **arguments).results == first.results
    assert [file.stat().st_mtime_ns for file in files] == times


def test_the_attacker_of_a_segmenter_trains_on_its_pictures(tmp_path: Path) -> None:
    size, generator = (IMAGE_SIZE, IMAGE_SIZE), np.random.default_rng(0)
    rows = {
        "image": [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for _ in range(4)],
        "mask": [Image.fromarray(generator.integers(0, 3, size, dtype=np.uint8)) for _ in range(4)],
    }
    kinds = datasets.Features({name: datasets.Image() for name in rows})
    model = RobustnessTokenModel.from_base(build_base("dinov2"), num_robustness_tokens=2)
    report = run(
        ProbedModel(model, SegmentationHead(HIDDEN_SIZE, 3)),
        datasets.Dataset.from_dict(rows, features=kinds),
        own_tokens=None,
        knowledge=["own_tokens"],
        attacks=["cross_entropy"],
        own_tokens_overrides={"attack": "pgd", "max_steps": 1, "num_attack_steps": 1},
        image_size=IMAGE_SIZE,
        eps_sweep=[],
    )
    assert pick(report.results, knowledge="own_tokens", metric="miou", attack="worst_case")


def test_what_the_checks_look_at_is_run(classifier: RobustnessTokenForImageClassification, images: Images) -> None:
    seen = []
    real = evaluate.run_cells

    def spy(planned: Any, *args: Any, **kwargs: Any) -> Any:
        seen.extend(planned)
        return real(planned, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate, "run_cells", spy)
        run(classifier, images, diagnostics=True, eps_sweep=[], knowledge=["full"], attacks=["cross_entropy"])
    steps = [cell.attack.num_steps for cell in seen if cell.series == "steps"]
    restarts = [cell.attack.num_restarts for cell in seen if cell.series == "restarts"]
    assert (steps, restarts) == ([10, 20, 50, 100, 200], [1, 5, 10])
    assert {cell.eps for cell in seen if cell.series == "unbounded"} == {1.0}
    assert {cell.series for cell in seen} == {"suite", "steps", "restarts", "single_step", "unbounded"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"eps": [8.0]}, r"eps must lie in \[0, 1\]"),
        ({"eps": []}, "at least one budget"),
        ({"budget": "huge"}, "budget must be one of"),
        ({"eps": "4/255"}, r"eps must lie in \[0, 1\], .* got '4/255'"),
        ({"knowledge": "everything"}, "knowledge must be a list of at least one of"),
        ({"knowledge": ["everything"]}, "knowledge must be a list of at least one of"),
        ({"attacks": ["bim"]}, "unknown, expected one of"),
        ({"attacks": ["square"], "knowledge": ["full"]}, "no attack fits"),
        ({"num_images": 0}, "num_images must be a whole number"),
        ({"image_size": 8}, "image_size=8 can't be applied"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"seed": -1}, "seed must be a whole number of at least 0, got -1"),
    ],
)
def test_what_makes_no_sense_is_refused(
    classifier: RobustnessTokenForImageClassification, images: Images, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        run(classifier, images, **changes)


def test_an_unknown_attack_is_refused_before_anything_is_computed(
    classifier: RobustnessTokenForImageClassification, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "train_own_tokens", lambda *_, **__: pytest.fail("trained"))
    for name, message in (("bim", "unknown, expected one of"), ("square:base", "has no target, got 'base'")):
        with pytest.raises(ValueError, match=message):
            run(classifier, images, attacks=[name], own_tokens=None)


def test_labels_must_be_there(classifier: RobustnessTokenForImageClassification) -> None:
    with pytest.raises(ValueError, match="dataset has no labels"):
        run(classifier, Images(None))


ALONE: dict[str, Any] = {"knowledge": "base", "attacks": "cross_entropy", "eps_sweep": [], "num_steps": 1}


def clean_accuracy(report: RobustnessReport) -> float:
    (clean,) = pick(report.results, knowledge=None, tokens="none", metric="accuracy")
    return clean.value


def test_one_value_stands_for_a_list_of_one(classifier: RobustnessTokenForImageClassification, images: Images) -> None:
    listed = run(classifier, images, **{**ALONE, "knowledge": ["base"], "attacks": ["cross_entropy"]})
    alone = run(classifier, images, **ALONE, eps=EPS)
    assert [r.value for r in alone.results] == [r.value for r in listed.results]
    assert len(pick(alone.results, attack="cross_entropy", eps=EPS)) > 0


def test_tuples_of_image_and_label_do(classifier: RobustnessTokenForImageClassification, images: Images) -> None:
    tuples = [(item["images"], item["labels"]) for item in (images[row] for row in range(len(images)))]
    found, expected = run(classifier, tuples, **ALONE), run(classifier, images, **ALONE)
    assert [r.value for r in found.results] == [r.value for r in expected.results]


@pytest.mark.parametrize("answer", ["tensor", "logits"])
def test_a_model_inside_a_users_module_is_evaluated(answer: str) -> None:
    base = build_base("dinov2", classifier=True)
    inject_tokens(base, torch.randn(3, HIDDEN_SIZE, generator=torch.Generator().manual_seed(0)))

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = base

        def forward(self, x: Tensor) -> Any:
            output = self.inside(x)
            return output.logits if answer == "tensor" else output

    settings: dict[str, Any] = {**ALONE, "task": "classification", "normalizer": Normalizer([0.5] * 3, [0.5] * 3)}
    dataset = Images([0] * NUM_IMAGES)
    wrapped, plain = run(Wrapped(), dataset, **settings), run(base, dataset, **settings)
    assert [r.value for r in wrapped.results] == [r.value for r in plain.results]


def test_an_answer_without_logits_is_named() -> None:
    base = build_base("dinov2")
    inject_tokens(base, torch.zeros(3, HIDDEN_SIZE))
    settings: dict[str, Any] = {**ALONE, "task": "classification", "normalizer": Normalizer([0.5] * 3, [0.5] * 3)}
    with pytest.raises(ValueError, match=r"Sequential must return logits, .*, got a BaseModelOutput"):
        run(nn.Sequential(base), Images([0] * NUM_IMAGES), **settings)


NAMES = ["shirt", "bag", "boot", "coat", "dress"]


@pytest.fixture
def named(classifier: RobustnessTokenForImageClassification) -> Iterator[RobustnessTokenForImageClassification]:
    """The classifier with names of its classes."""
    config = classifier.get_base_model().config
    before = config.id2label
    config.id2label = dict(enumerate(NAMES))
    yield classifier
    config.id2label = before


def pictures_of(images: Images, **columns: Any) -> datasets.Dataset:
    """Returns the images as a table with these columns of labels."""
    arrays = [(255 * image).round().byte().permute(1, 2, 0).numpy() for image in images.images]
    rows = {"image": [Image.fromarray(array) for array in arrays]}
    features = {"image": datasets.Image(), **{name: feature for name, (feature, _) in columns.items()}}
    values = {name: value for name, (_, value) in columns.items()}
    return datasets.Dataset.from_dict({**rows, **values}, features=datasets.Features(features))


@pytest.mark.parametrize("kind", ["other order", "words", "numbers", "a named column"])
def test_labels_mean_the_same_classes_on_both_sides(
    kind: str, named: RobustnessTokenForImageClassification, images: Images
) -> None:
    assert images.labels is not None
    order = sorted(NAMES)
    in_order = (datasets.ClassLabel(names=order), [order.index(NAMES[label]) for label in images.labels])
    columns: dict[str, Any] = {
        "other order": {"label": in_order},
        "words": {"label": (datasets.Value("string"), [NAMES[label] for label in images.labels])},
        "numbers": {"label": (datasets.Value("int32"), images.labels)},
        "a named column": {"fine": in_order, "coarse": (datasets.ClassLabel(names=["a"]), [0] * NUM_IMAGES)},
    }[kind]
    dataset = pictures_of(images, **columns)
    assert clean_accuracy(run(named, dataset, **ALONE, label_column_name=next(iter(columns)))) == 0.9
    if kind == "other order":
        by_index = run(named, dataset, **ALONE, label_matching="index")
        labels = torch.tensor(in_order[1])
        assert clean_accuracy(by_index) != 0.9
        with torch.no_grad():
            predicted = EvaluatedModel(named).logits(images.images, None).argmax(dim=1)
        assert clean_accuracy(by_index) == (predicted == labels).double().mean().item()
    if kind == "a named column":
        with pytest.raises(ValueError, match=r"several columns of class labels, .*choose by label_column_name"):
            run(named, dataset, **ALONE)


def test_other_classes_than_the_models_are_an_error(
    named: RobustnessTokenForImageClassification, images: Images
) -> None:
    dataset = pictures_of(images, label=(datasets.ClassLabel(names=["shirt", "cat"]), [0, 1] * 5))
    with pytest.raises(ValueError, match=r"such as 'cat': the dataset has 'shirt', 'cat', the model 'shirt', 'bag', "):
        run(named, dataset, **ALONE)


def test_a_surrogate_has_the_same_classes(named: RobustnessTokenForImageClassification, images: Images) -> None:
    base = build_base("vit", classifier=True, id2label=dict(enumerate(reversed(NAMES))))
    surrogate = RobustnessTokenForImageClassification.from_base(base)
    with pytest.raises(ValueError, match="model and surrogate must have the same classes in the same order"):
        run(named, images, **ALONE, surrogate=surrogate)


@pytest.mark.parametrize("label", [-1, 5, 999])
def test_labels_are_checked_before_anything_runs(
    label: int, classifier: RobustnessTokenForImageClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("train_own_tokens", "run_cells"):
        monkeypatch.setattr(evaluate, name, lambda *_, **__: pytest.fail("began"))
    with pytest.raises(ValueError, match=f"labels must be from 0 to 4, the classes of the model, got {label}"):
        run(classifier, Images([0] * (NUM_IMAGES - 1) + [label]), own_tokens=None)
    masks = [torch.zeros(IMAGE_SIZE, IMAGE_SIZE, dtype=torch.int64) for _ in range(NUM_IMAGES)]
    masks[-1][0, 0], masks[0][0, 0] = label, 255
    probed = ProbedModel(RobustnessTokenModel.from_base(build_base("dinov2")), SegmentationHead(HIDDEN_SIZE, 5))
    with pytest.raises(ValueError, match=f"labels must be from 0 to 4, .* got {label}"):
        run(probed, Images(masks), own_tokens=None)


@pytest.mark.parametrize("given", [False, True], ids=["evaluated images", "own images"])
def test_columns_hold_for_the_attackers_own_datasets_too(
    given: bool, named: RobustnessTokenForImageClassification, images: Images, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Any]] = []

    def train(*_: Any, overrides: dict[str, Any], **__: Any) -> None:
        seen.append(overrides)
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "train_own_tokens", train)
    assert images.labels is not None
    dataset = pictures_of(images, fine=(datasets.Value("int64"), images.labels))
    columns: dict[str, Any] = {"label_column_name": "fine", "label_matching": "index"}
    theirs = {"attacker_datasets": [dataset]} if given else {}
    with pytest.raises(KeyboardInterrupt):
        run(named, dataset, knowledge="own_tokens", own_tokens=None, **columns, **theirs)
    assert seen == [columns if given else {"label_matching": "index"}]


def test_the_number_of_queries_stands_beside_every_number_of_a_black_box(
    report: RobustnessReport, classifier: RobustnessTokenForImageClassification, images: Images
) -> None:
    black_box = pick(report.results, knowledge="none")
    assert black_box
    found = {
        (r.attack, r.attack_parameters.get("series")): r.attack_parameters["num_queries"]
        for r in black_box
        if r.metric == "accuracy"
    }
    # Square 5, two kinds of noise 2 each; the sweep draws corners alone.
    assert found == {
        ("worst_case", None): 9,
        ("square", None): 5,
        ("uniform_noise", None): 2,
        ("corner_noise", None): 2,
        ("worst_case", "sweep"): 2,
    }
    assert all("num_queries" not in r.attack_parameters for r in report.results if r.knowledge in (None, "base"))
    assert set(report.series["sweep/none/accuracy/num_queries"]) == {2}
    assert "Black box: knows nothing, and tries noise and queries (9 for each image)" in render_report_markdown(report)
    assert "num_queries = 9" in render_report_html(report)
    surrogate = RobustnessTokenForImageClassification.from_base(build_base("vit", classifier=True))
    transfer = run(classifier, images, knowledge="none", attacks=["cross_entropy"], eps_sweep=[], surrogate=surrogate)
    (alone,) = pick(transfer.results, attack="cross_entropy", tokens="trained", metric="accuracy")
    assert alone.attack_parameters["num_queries"] == 0


def test_random_tokens_have_the_norm_of_the_trained_ones_and_other_directions() -> None:
    model = RobustnessTokenForImageClassification.from_base(
        build_base("dinov2", classifier=True),
        num_robustness_tokens=3,
        token_depth="all",
        gains_and_shifts=["norm", "bias"],
        initializer_range=1.0,
    )
    with torch.no_grad():
        for parameter in model.injector.parameters():
            parameter.add_(torch.randn(parameter.shape))
    evaluated = EvaluatedModel(model)
    trained, random = evaluated.tokens, reported_tokens(evaluated, seed=0)["random"]
    assert random is not None
    assert random.keys() == trained.keys()
    torch.testing.assert_close(random[TOKENS].norm(dim=-1), trained[TOKENS].norm(dim=-1))
    for name, tensor in trained.items():
        assert random[name].norm().item() == pytest.approx(tensor.norm().item(), rel=1e-5)
        assert torch.cosine_similarity(random[name].flatten(), tensor.flatten(), dim=0).abs() < 0.6, name
    again = reported_tokens(evaluated, seed=0)["random"]
    assert again is not None
    assert all(torch.equal(tensor, random[name]) for name, tensor in again.items())
