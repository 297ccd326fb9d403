from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from robustness_tokens import RobustnessTokenForImageClassification, evaluate_robustness
from robustness_tokens.attacks.pgd import pgd_attack
from robustness_tokens.configuration import TOKENS, TokenState
from robustness_tokens.evaluation import attack_suite, evaluate
from robustness_tokens.evaluation.attack_suite import Attack, AttackBatch
from robustness_tokens.evaluation.cells import Cell, Series
from robustness_tokens.evaluation.checks import CHECKS, comparisons, gradients, run_checks
from robustness_tokens.evaluation.checks import parts as parts_module
from robustness_tokens.evaluation.checks.gradients import difference_cosines
from robustness_tokens.evaluation.checks.parts import exceeds, has_converged
from robustness_tokens.evaluation.measurements import Measurements, own_token_lengths
from robustness_tokens.evaluation.metrics import Outcome
from robustness_tokens.evaluation.plan import BUDGETS, build_attack
from robustness_tokens.evaluation.threat_models import AttackerView, EvaluatedModel
from robustness_tokens.models.heads import ProbedModel, SegmentationHead
from robustness_tokens.report.schema import Knowledge, Result
from tests.support.bases import HIDDEN_SIZE, IMAGE_SIZE, build_base


EPS = 4 / 255
COUNT = 200  # so that one image is half a point
LEVELS = (0, 1 / 255, 2 / 255, 4 / 255)
Measured = tuple[Cell, Outcome]
CheckFunction = Callable[[Measurements], Any]


def outcome(accuracy: float, *, tokens: Sequence[str] = ("trained",), count: int = COUNT, **changes: Any) -> Outcome:
    """Returns an outcome whose first images are correct, by the accuracy; each cosine equals the accuracy."""
    values: dict[str, Tensor] = {
        "pixel_difference": torch.zeros(count),
        "lowest_pixel": torch.zeros(count),
        "highest_pixel": torch.ones(count),
    }
    for name in tokens:
        values[f"{name}.correct"] = torch.arange(count) < round(accuracy * count)
        values[f"{name}.cosine"] = torch.full((count,), accuracy)
    return {**values, **changes}


def measured(
    accuracy: float,
    *,
    series: Series = "suite",
    knowledge: Knowledge = "full",
    view: str | None = None,
    attack: str = "cross_entropy",
    eps: float = EPS,
    num_steps: int | None = None,
    num_restarts: int | None = None,
    **changes: Any,
) -> Measured:
    built = build_attack(attack, BUDGETS["quick"])
    parameters = {**built.parameters(), "num_steps": num_steps, "num_restarts": num_restarts}
    parameters = {key: value for key, value in parameters.items() if value is not None}
    held: Any = None  # nothing looks at it
    cell = Cell(
        series=series,
        view=AttackerView(name=view or knowledge, knowledge=knowledge, model=held, tokens=(None,)),
        attack=Attack(name=built.name, **{**built.parameters(), **parameters}),
        eps=eps,
        num_images=COUNT,
    )
    return cell, outcome(accuracy, **changes)


def measurements(
    *parts: Measured, clean: Outcome | None = None, eps: Sequence[float] = (EPS,), task: str = "classification"
) -> Measurements:
    model: Any = SimpleNamespace(task=task, model=None, attack_precision="no")
    cells, outcomes = zip(*parts, strict=True) if parts else ((), ())
    return Measurements(
        model=model,
        batches={},
        clean=clean or outcome(0.9, tokens=("none", "trained")),
        cells=cells,
        outcomes=outcomes,
        eps=eps,
        seed=0,
    )


def against_white_box(accuracy: float, **other: Any) -> Callable[[float], Measurements]:
    """Returns a function of what another attacker leaves, beside a white box that leaves `accuracy`."""
    return lambda value: measurements(measured(accuracy), measured(value, **other))


def by_steps(*accuracies: float) -> Measurements:
    return measurements(
        *(
            measured(value, series="steps", num_steps=steps)
            for steps, value in zip((10, 20, 50, 100, 200), accuracies, strict=True)
        )
    )


def and_results(series: Measurements, accuracy: float) -> Measurements:
    """Adds a white-box attack of the suite that leaves `accuracy`."""
    pairs = list(zip(series.cells, series.outcomes, strict=True))
    return measurements(*pairs, measured(accuracy))


def by_restarts(*accuracies: float) -> Measurements:
    return measurements(
        *(
            measured(value, series="restarts", num_restarts=restarts)
            for restarts, value in zip((1, 5, 10), accuracies, strict=True)
        )
    )


def by_eps(*accuracies: float, **changes: Any) -> Measurements:
    curve = zip(LEVELS, accuracies, strict=True)
    return measurements(*(measured(value, series="sweep", eps=eps, **changes) for eps, value in curve))


def without(checked: Measurements, knowledge: Knowledge) -> Measurements:
    kept = [
        (cell, one)
        for cell, one in zip(checked.cells, checked.outcomes, strict=True)
        if cell.view.knowledge != knowledge
    ]
    return measurements(*kept)


def levels(full: float, base: float, own: float) -> Measurements:
    return measurements(
        measured(full), measured(base, knowledge="base"), measured(own, knowledge="own_tokens", view="own_tokens_0")
    )


def noises(uniform: float, corner: float) -> Measurements:
    parts = (("uniform_noise", uniform), ("corner_noise", corner))
    return measurements(measured(0.2), *(measured(value, knowledge="none", attack=name) for name, value in parts))


def single_step(single: float, *iterative: float) -> Measurements:
    series = by_steps(*iterative)
    pairs = list(zip(series.cells, series.outcomes, strict=True))
    return measurements(*pairs, measured(single, series="single_step", attack="single_step"))


squared = against_white_box(0.2, knowledge="none", attack="square")
transferred = against_white_box(0.2, knowledge="none", view="transfer")


def drawn(value: float, **changes: Any) -> Measurements:
    return measurements(measured(value, series="unbounded", eps=1.0, num_steps=100), **changes)


def changed(name: str, value: float, eps: float = EPS, attack: str = "cross_entropy") -> Measurements:
    pixels = outcome(0.5)[name].clone()
    pixels[7] = value
    pixel: dict[str, Any] = {name: pixels}
    return measurements(measured(0.5), measured(0.5, eps=eps, attack=attack, **pixel))


@pytest.mark.parametrize(
    ("function", "checked", "passed", "value"),
    [
        (comparisons.white_box, levels(0.2, 0.5, 0.3), True, "white box 20.0%, grey box 50.0%, own tokens 30.0%"),
        (comparisons.white_box, levels(0.305, 0.5, 0.3), True, "white box 30.5%"),
        (comparisons.white_box, levels(0.31, 0.5, 0.3), False, "own tokens 30.0%"),
        (comparisons.white_box, levels(0.4, 0.3, 0.5), False, "grey box 30.0%"),
        (comparisons.white_box, without(levels(0.2, 0.5, 0.3), "own_tokens"), None, "own tokens not run"),
        (comparisons.white_box, without(levels(0.6, 0.5, 0.3), "own_tokens"), False, "own tokens not run"),
        (comparisons.white_box, without(levels(0.2, 0.5, 0.3), "full"), None, "not run"),
        (comparisons.queries, squared(0.2), True, "square 20.0% after 100 queries"),
        (comparisons.queries, squared(0.19), False, "square 19.0%"),
        (comparisons.queries, transferred(0.5), None, "not run"),
        (comparisons.transfer, transferred(0.6), True, "transfer 60.0%"),
        (comparisons.transfer, transferred(0.1), False, "transfer 10.0%"),
        (
            comparisons.transfer,
            squared(0.5),
            None,
            "not run: no attack with knowledge 'none', view 'transfer' at eps 4/255",
        ),
        (
            comparisons.noise,
            noises(0.9, 0.8),
            True,
            "uniform_noise 90.0% after 5 draws, corner_noise 80.0% after 5 draws",
        ),
        (comparisons.noise, noises(0.9, 0.1), False, "corner_noise 10.0%"),
        (comparisons.noise, noises(0.1, 0.9), False, "uniform_noise 10.0%"),
        (comparisons.steps, by_steps(0.5, 0.4, 0.3, 0.2, 0.2), True, "10: 50.0%, 20: 40.0%"),
        (comparisons.steps, by_steps(0.5, 0.4, 0.3, 0.2, 0.195), False, "100: 20.0%, 200: 19.5% (200 images)"),
        (comparisons.steps, by_steps(0.5, 0.4, 0.3, 0.2, 0.25), False, "200: 25.0%"),
        (
            comparisons.steps,
            and_results(by_steps(0.3, 0.3, 0.3, 0.2, 0.2), 0.205),
            True,
            "take 10, which leaves 20.5%",
        ),
        (
            comparisons.steps,
            and_results(by_steps(0.3, 0.3, 0.3, 0.2, 0.2), 0.3),
            False,
            "take 10, which leaves 30.0%",
        ),
        (comparisons.steps, measurements(), None, "not run: needs the diagnostics"),
        (comparisons.restarts, by_restarts(0.5, 0.4, 0.4), True, "1: 50.0%, 5: 40.0%, 10: 40.0%"),
        (comparisons.restarts, by_restarts(0.5, 0.4, 0.3), False, "5: 40.0%, 10: 30.0%"),
        (comparisons.restarts, and_results(by_restarts(0.4, 0.3, 0.3), 0.305), True, "take 1, which leaves 30.5%"),
        (comparisons.restarts, and_results(by_restarts(0.4, 0.3, 0.3), 0.4), False, "take 1, which leaves 40.0%"),
        # The worst for each image: what one start found is not lost again.
        (comparisons.restarts, by_restarts(0.3, 0.4, 0.35), True, "1: 30.0%, 5: 30.0%, 10: 30.0%"),
        (comparisons.strength_order, single_step(0.5, 0.5, 0.4, 0.3, 0.2, 0.2), True, "single step 50.0%"),
        (comparisons.strength_order, single_step(0.3, 0.5, 0.4, 0.3, 0.2, 0.2), False, "iterative 50.0%"),
        (comparisons.strength_order, single_step(0.3, 0.2, 0.2, 0.3, 0.4, 0.2), False, "iterative 40.0%"),
        (comparisons.strength_order, by_steps(0.5, 0.4, 0.3, 0.2, 0.2), None, "not run"),
        (comparisons.eps_sweep, by_eps(0.9, 0.5, 0.5, 0.1), True, "by 255 eps 0: 90.0%, 1: 50.0%"),
        (comparisons.eps_sweep, by_eps(0.9, 0.5, 0.505, 0.1), True, "eps 0 equals clean"),
        (comparisons.eps_sweep, by_eps(0.9, 0.5, 0.51, 0.1), False, "2: 51.0%"),
        (comparisons.eps_sweep, by_eps(0.9, 0.5, 0.505, 0.51), False, "4: 51.0%"),  # slowly up is up
        (comparisons.eps_sweep, by_eps(0.895, 0.5, 0.4, 0.1), False, "eps 0 differs from clean"),
        (
            comparisons.eps_sweep,
            by_eps(0.9, 0.5, 0.4, 0.1, attack="feature_cosine"),
            True,
            "cosine by 255 eps 0: 0.9",
        ),
        (comparisons.eps_sweep, by_eps(0.9, 0.5, 0.6, 0.1, knowledge="base"), None, "white box not swept"),
        (comparisons.eps_sweep, by_eps(0.8, 0.5, 0.4, 0.1, knowledge="base"), False, "eps 0 differs"),
        (comparisons.eps_sweep, measurements(measured(0.5, series="sweep")), None, "eps 0 not swept"),
        (comparisons.eps_sweep, measurements(measured(0.9, series="sweep", eps=0)), None, "eps 0 equals clean"),
        (comparisons.eps_sweep, measurements(), None, "not run: no sweep"),
        (comparisons.unbounded, drawn(0.01), True, "accuracy 1.0% after 100 steps"),
        (comparisons.unbounded, drawn(0.02), False, "accuracy 2.0%"),
        (comparisons.unbounded, drawn(0.05, task="features"), True, "cosine 0.050"),
        (comparisons.unbounded, drawn(0.2, task="features"), False, "cosine 0.200"),
        (comparisons.unbounded, measurements(), None, "not run"),
        (comparisons.budget, changed("pixel_difference", EPS + 5e-7), True, "0 of 400"),
        (comparisons.budget, changed("pixel_difference", EPS + 2e-6), False, "1 of 400"),
        (comparisons.budget, changed("pixel_difference", float("nan")), False, "1 of 400"),
        (comparisons.budget, changed("pixel_difference", 2 / 255, 2 / 255, "paper"), True, "0 of 400"),
        (comparisons.budget, changed("pixel_difference", 3 / 255, 2 / 255, "paper"), False, "paper-eps2 1"),
        (comparisons.budget, changed("lowest_pixel", -1e-9), False, "1 of 400"),
        (comparisons.budget, changed("highest_pixel", 1 + 1e-6), False, "1 of 400"),
    ],
)
def test_the_verdict_on_what_was_measured(
    function: CheckFunction, checked: Measurements, passed: bool | None, value: str
) -> None:
    check = function(checked)
    assert (check.passed, value in check.value) == (passed, True), check.value


ALL_TOKENS = ("none", "trained", "untrained", "random", "zero", "mean")


def found_results(checked: Measurements, **wanted: Any) -> dict[str, float]:
    """Returns the values of the results, by attack (or part of a level) and tokens."""
    return {
        f"{result.attack_parameters.get('part', result.attack)}, {result.tokens}": result.value
        for result in checked.results()
        if all(getattr(result, name) == value for name, value in wanted.items())
    }


def test_what_has_no_verdict_is_a_result() -> None:
    checked = measurements(
        measured(0.4, knowledge="base", tokens=ALL_TOKENS),
        measured(0.5, series="published", knowledge="base", attack="paper", eps=2 / 255, tokens=ALL_TOKENS),
        measured(0.3, knowledge="own_tokens", view="own_tokens_0"),
        measured(0.25, knowledge="own_tokens", view="own_tokens_ensemble"),
        measured(0.3, attack="cross_entropy"),
        measured(0.2, attack="feature_cosine:base"),
        measured(0.1, attack="feature_mse:defended"),
        clean=outcome(0.9, tokens=ALL_TOKENS),
    )
    clean = {f"None, {name}": pytest.approx(0.9) for name in ALL_TOKENS}
    assert found_results(checked, knowledge=None, metric="accuracy") == clean
    assert found_results(checked, knowledge=None, metric="cosine") == clean
    assert found_results(checked, knowledge="base", metric="accuracy") == {
        **{f"worst_case, {name}": 0.4 for name in ALL_TOKENS},
        **{f"cross_entropy, {name}": 0.4 for name in ("trained", "none")},
        **{f"paper, {name}": 0.5 for name in ("trained", "none")},
    }
    assert found_results(checked, knowledge="own_tokens", metric="accuracy") == {
        "worst_case, trained": 0.25,
        "own_tokens_0, trained": 0.3,
        "own_tokens_ensemble, trained": 0.25,
        "cross_entropy, trained": 0.25,
    }
    for metric in ("accuracy", "cosine"):
        found = found_results(checked, knowledge="full", metric=metric)
        assert found["attacks on features, trained"] == pytest.approx(0.1)
    (part, _) = [result for result in checked.results() if result.attack_parameters.get("part", "")[:7] == "attacks"]
    assert part.attack_parameters["attacks"] == ["feature_cosine:base (full)", "feature_mse:defended (full)"]


def after_others(pair: Measured, attacked: Tensor, **changes: Any) -> Measured:
    """Returns the pair as a `remaining_only` attack on the images of the mask `attacked`."""
    found = {
        name: value for name, value in {**pair[1], "attacked": attacked, **changes}.items() if "cosine" not in name
    }
    return dataclasses.replace(pair[0], remaining_only=True), found


def test_an_attack_on_what_is_left_counts_with_those_before_it() -> None:
    numbers = torch.arange(COUNT)
    margin = after_others(
        measured(0.9, knowledge="base", attack="margin"), numbers < 20, **{"trained.correct": numbers > 4}
    )
    apgd = after_others(measured(0.9, knowledge="base", attack="apgd_cross_entropy"), numbers < 0)
    weak = measured(0.5, knowledge="base", attack="feature_cosine:base")
    checked = measurements(weak, measured(0.1, knowledge="base"), margin, apgd, measured(0.2))
    assert comparisons.budget(checked).value.startswith("0 of 620 attacked images")
    found = {r.attack: r for r in checked.results() if r.metric == "accuracy" and r.knowledge == "base"}
    values = {name: (r.value, r.num_images) for name, r in found.items()}
    assert values == {
        "worst_case": (0.075, 200),
        "feature_cosine": (0.5, 200),
        "cross_entropy": (0.1, 200),
        "margin": (0.075, 200),
        "apgd_cross_entropy": (0.075, 200),
    }
    assert "which left 20 images" in found["margin"].attack_parameters["after"]
    assert "which left 0 images" in found["apgd_cross_entropy"].attack_parameters["after"]
    assert "after" not in found["cross_entropy"].attack_parameters
    cosines = {r.attack: r for r in checked.results() if r.metric == "cosine" and r.knowledge == "base"}
    assert set(cosines) == {"worst_case", "feature_cosine", "cross_entropy"}
    assert cosines["worst_case"].attack_parameters["attacks"] == ["cross_entropy (base)", "feature_cosine:base (base)"]
    assert len(found["worst_case"].attack_parameters["attacks"]) == 4
    with pytest.raises(
        ValueError, match=r"margin-eps4 attacked only what .*cross_entropy-eps4 left: choose those too"
    ):
        checked.worst([margin])


def test_sets_of_own_tokens_that_take_what_is_left_count_together() -> None:
    first = measured(0.3, knowledge="own_tokens", view="own_tokens_0")
    changes: dict[str, Any] = {"trained.correct": torch.arange(COUNT) >= 20}
    second = after_others(
        measured(0.9, knowledge="own_tokens", view="own_tokens_1"), torch.arange(COUNT) < 60, **changes
    )
    checked = measurements(first, second)
    parts = {"own_tokens_0, trained": 0.3, "own_tokens_1 after own_tokens_0, trained": 0.2}
    found = found_results(checked, knowledge="own_tokens", metric="accuracy")
    assert found == {"worst_case, trained": 0.2, "cross_entropy, trained": 0.2, **parts}
    cosines = found_results(checked, knowledge="own_tokens", metric="cosine")
    assert "own_tokens_0, trained" in cosines
    assert "own_tokens_1 after own_tokens_0, trained" not in cosines, "what it attacked feeds no cosine"


def test_feature_attacks_on_what_is_left_say_nothing_of_features() -> None:
    left = after_others(measured(0.9, attack="feature_mse:base"), torch.arange(COUNT) < 20)
    checked = measurements(measured(0.1), measured(0.4, attack="feature_cosine:base"), left)
    name = "attacks on features, trained"
    assert found_results(checked, knowledge="full", metric="cosine")[name] == pytest.approx(0.4)
    assert found_results(checked, knowledge="full", metric="accuracy")[name] == 0.4


def own(view: str, *tokens: Tensor) -> Cell:
    cell, _ = measured(0.5, knowledge="own_tokens", view=view)
    states = tuple({TOKENS: one} for one in tokens)
    return dataclasses.replace(cell, view=dataclasses.replace(cell.view, tokens=states))


def test_every_set_of_own_tokens_counts() -> None:
    short, long = torch.zeros(2, HIDDEN_SIZE), torch.zeros(3, HIDDEN_SIZE)
    first, second, third = own("own_tokens_0", short), own("own_tokens_1", long), own("own_tokens_2", short)
    ensemble = own("own_tokens_ensemble", short, long, short)
    assert own_token_lengths([first, second, third, first, second, third]) == [2, 3, 2]
    assert own_token_lengths([first, second, third, ensemble]) == own_token_lengths([ensemble]) == [2, 3, 2]
    assert own_token_lengths([second]) == [3]
    assert own_token_lengths([measured(0.5)[0]]) == []


def test_the_paper_attack_is_no_part_of_a_comparison() -> None:
    weak = measured(0.1, series="published", knowledge="base", attack="paper")
    checked = levels(0.2, 0.5, 0.3)
    assert comparisons.white_box(measurements(*zip(checked.cells, checked.outcomes, strict=True), weak)).passed, (
        "2/255 says nothing of 4/255"
    )


def test_every_eps_is_judged() -> None:
    checked = [*zip(levels(0.2, 0.5, 0.3).cells, levels(0.2, 0.5, 0.3).outcomes, strict=True)]
    others: tuple[Knowledge, ...] = ("base", "own_tokens")
    second = [measured(0.4, eps=8 / 255), *(measured(0.1, knowledge=level, eps=8 / 255) for level in others)]
    check = comparisons.white_box(measurements(*checked, *second, eps=(EPS, 8 / 255)))
    assert check.passed is False
    assert "at 8/255 white box 40.0%" in check.value


def test_segmentation_is_judged_by_the_iou_over_all_pixels() -> None:
    def ious(intersections: list[list[int]], **changes: Any) -> Measured:
        counts: dict[str, Any] = {
            "trained.intersections": torch.tensor(intersections),
            "trained.unions": torch.full((2, 2), 100),
        }
        return measured(0.5, count=2, **counts, **changes)

    white, grey = ious([[50, 0], [0, 0]]), ious([[40, 0], [0, 0]], knowledge="base")
    own = ious([[60, 0], [0, 0]], knowledge="own_tokens")
    clean = ious([[90, 90], [90, 90]])[1]
    check = comparisons.white_box(measurements(white, grey, own, clean=clean, task="segmentation"))
    assert (check.passed, check.value) == (False, "miou at 4/255 white box 0.125, grey box 0.100, own tokens 0.150")
    assert comparisons.unbounded(
        measurements(ious([[10, 0], [0, 0]], series="unbounded"), task="segmentation")
    ).passed, ".025 is about 0"


def random_segmentation(seed: int) -> Measurements:
    """Returns attacks of every level on a few images, with very rare and very common classes."""
    generator = torch.Generator().manual_seed(seed)
    unions = (1000 ** torch.rand(4, 3, generator=generator)).long()

    def counts() -> dict[str, Any]:
        share = torch.rand(4, 3, generator=generator) ** 2
        return {"trained.intersections": (share * unions).long(), "trained.unions": unions}

    views: tuple[tuple[Knowledge, str], ...] = (
        ("none", "transfer"),
        ("base", "base"),
        ("own_tokens", "own_tokens_0"),
        ("own_tokens", "own_tokens_1"),
        ("full", "full"),
    )
    attacks = ("cross_entropy", "feature_cosine:base", "feature_mse:defended")
    parts = [
        measured(0.5, count=4, knowledge=level, view=view, attack=attack, **counts())
        for level, view in views
        for attack in attacks
    ]
    parts += [
        measured(0.5, count=4, series="restarts", num_restarts=number, num_steps=1, **counts())
        for number in (1, 5, 10)
    ]
    same: dict[str, Any] = {"trained.intersections": unions, "trained.unions": unions}
    clean = outcome(0.5, count=4, **same)
    return measurements(*parts, clean=clean, task="segmentation")


@pytest.mark.parametrize("seeds", [range(5), pytest.param(range(5, 20), marks=pytest.mark.slow)], ids=str)
def test_more_attacks_never_leave_a_higher_worst_case(seeds: range) -> None:
    """Holds for the mIoU of the dataset too, although it is no mean over the images."""
    for seed in seeds:
        checked = random_segmentation(seed)

        def worst(checked: Measurements = checked, **wanted: Any) -> float:
            return parts_module.worst(checked, checked.select(series="suite", **wanted), "miou")

        every, full = worst(), worst(knowledge="full")
        for level in ("none", "base", "own_tokens", "full"):
            assert every <= worst(knowledge=level), seed
            targeted = [pair for pair in checked.select(series="suite", knowledge=level) if pair[0].attack.target]
            assert worst(knowledge=level) <= parts_module.worst(checked, targeted, "miou")
            for cell, single in checked.select(series="suite", knowledge=level):
                assert worst(knowledge=level) <= worst(knowledge=level, view=cell.view.name)
                assert worst(knowledge=level) <= worst(knowledge=level, attack=cell.attack.name)
                assert worst(knowledge=level, view=cell.view.name) <= parts_module.score(single, "miou")
        reported = {result.knowledge: result.value for result in worst_cases(checked)}
        assert (reported["full_worst_case"], reported["full"]) == (every, full)
        assert reported["full_worst_case"] == min(reported.values())
        by_number = re.findall(r"\d+: ([\d.]+)", comparisons.restarts(checked).value)
        assert len(by_number) == 3
        assert by_number == sorted(by_number, reverse=True), seed


def worst_cases(checked: Measurements) -> list[Result]:
    checked.model.attack_precision = "no"
    return [result for result in checked.results() if (result.attack, result.metric) == ("worst_case", "miou")]


def test_an_attacker_may_leave_an_image_as_it_is() -> None:
    """An attack that corrects a misclassified clean image does not make it count as correct."""
    changes: dict[str, Any] = {"trained.correct": torch.arange(COUNT) >= COUNT // 10}
    clean = outcome(0.9, **changes)
    checked = measurements(measured(0.5), clean=clean)
    check = comparisons.white_box(checked)
    assert check.value.startswith("accuracy at 4/255 white box 40.0%")


def test_half_a_point_is_the_same_and_no_change_is_less() -> None:
    assert not exceeds(0.305, 0.3)  # 0.0050000000000000044 in floats
    assert exceeds(0.3051, 0.3)
    assert not has_converged(0.305, 0.3)
    assert has_converged(0.3049, 0.3)


def test_a_sentence_never_breaks_a_report() -> None:
    too_bright: dict[str, Any] = {"highest_pixel": torch.full((COUNT,), 2.0)}
    parts = [measured(0.3, knowledge="own_tokens", view=f"own_tokens_{number}", **too_bright) for number in range(500)]
    check = comparisons.budget(measurements(*parts))
    assert len(check.value) == 2000
    assert check.value.endswith(" ...")


class Planted(EvaluatedModel):
    """A classifier with a planted fault."""

    fault: Callable[[Tensor], Tensor] = staticmethod(lambda logits: logits)
    spoil: Callable[[Tensor], Tensor] = staticmethod(lambda images: images)

    def logits(self, images: Tensor, tokens: TokenState | None, *, exact: bool = False) -> Tensor:
        return self.fault(super().logits(self.spoil(images), tokens, exact=exact))


class _RandomGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return images.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.randn_like(gradients[0])


def straight_through(images: Tensor) -> Tensor:
    """Rounds pixels to 16 levels, with the gradient of the identity."""
    return images + ((images * 15).round() / 15 - images).detach()


@pytest.fixture(scope="module")
def classifier() -> RobustnessTokenForImageClassification:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return RobustnessTokenForImageClassification.from_base(
            build_base("dinov2", classifier=True), num_robustness_tokens=2, initializer_range=0.5
        )


def random_images(count: int) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(256, (count, 3, IMAGE_SIZE, IMAGE_SIZE), generator=generator) / 255


def probing(model: EvaluatedModel, eps: float = EPS) -> Measurements:
    images = random_images(20)
    labels = None
    if model.task != "features":
        with torch.no_grad():
            size = images.shape[2:]
            segments = model.task == "segmentation"
            logits = model.pixel_logits(images, None, size) if segments else EvaluatedModel.logits(model, images, None)
        labels = logits.argmax(dim=1)
    batch = AttackBatch(images=images, labels=labels, index=torch.arange(20) + 5)
    return Measurements(model=model, batches={0: batch}, clean={}, cells=[], outcomes=[], eps=[eps], seed=0)


def planted(classifier: RobustnessTokenForImageClassification, **changes: Any) -> Measurements:
    model = Planted(classifier)
    for name, value in changes.items():
        setattr(model, name, value)
    return probing(model)


@pytest.mark.parametrize("task", ["classification", "features", "segmentation"])
def test_a_sound_model_passes(classifier: RobustnessTokenForImageClassification, task: Any) -> None:
    model: Any = classifier
    if task == "segmentation":
        torch.manual_seed(0)
        model = ProbedModel(classifier, SegmentationHead(HIDDEN_SIZE, 4)).eval()
    checked = probing(EvaluatedModel(model, task=task))
    check = gradients.gradients(checked)
    assert check.passed, check.value
    assert check.value.startswith("0.0% of 16 gradients zero; outputs the same twice; ")
    assert float(check.value.rpartition(" ")[2]) > 0.98
    found = gradients.attack_unit_test(checked)
    assert (found.passed, found.value) == (True, "found for 100.0% of 16 images at 4/255, in 20 steps")


@pytest.mark.parametrize(
    ("changes", "value"),
    [
        ({"fault": lambda logits: (logits * 8).round() / 8}, "100.0% of 16 gradients zero"),
        ({"fault": lambda logits: logits * 1e4}, "gradients zero"),  # the softmax saturates
        ({"fault": lambda logits: logits.detach()}, "100.0% of 16 gradients zero"),
        (
            {"fault": lambda logits: logits + 1e-3 * torch.randn_like(logits)},
            "0.0% of 16 gradients zero; outputs not the",
        ),
        ({"spoil": straight_through}, "0.0% of 16 gradients zero; outputs the same twice; cosine"),
        ({"spoil": _RandomGradient.apply}, "0.0% of 16 gradients zero; outputs the same twice; cosine"),
    ],
    ids=["rounded", "saturated", "detached", "random", "quantised", "wrong"],
)
def test_masked_gradients_fail(
    classifier: RobustnessTokenForImageClassification, changes: dict[str, Any], value: str
) -> None:
    check = gradients.gradients(planted(classifier, **changes))
    assert check.passed is False
    assert value in check.value
    assert value.startswith("0.0%") == check.value.startswith("0.0%")


@pytest.mark.parametrize("task", ["classification", "features"])
def test_gradients_in_half_precision_are_compared_with_float32(
    classifier: RobustnessTokenForImageClassification, task: Any
) -> None:
    check = gradients.gradients(probing(EvaluatedModel(classifier, task=task, attack_precision="bf16")))
    assert check.passed, check.value
    found = re.search(r"; bf16 against float32: cosine ([01]\.\d+), (\d+\.\d)% of the signs equal$", check.value)
    assert found is not None, check.value
    assert float(found[1]) > 0.98
    assert 90 < float(found[2]) < 100


def test_gradients_that_half_precision_spoils_fail(classifier: RobustnessTokenForImageClassification) -> None:
    class Spoilt(Planted):
        def logits(self, images: Tensor, tokens: TokenState | None, *, exact: bool = False) -> Tensor:
            return super().logits(images if exact else _RandomGradient.apply(images), tokens, exact=exact)

    check = gradients.gradients(probing(Spoilt(classifier, attack_precision="bf16")))
    assert check.passed is False
    assert re.search(r"bf16 against float32: cosine -?0\.0\d\d, (49|50)\.\d% of the signs", check.value), check.value


def test_the_gradients_are_those_of_the_attacks(
    classifier: RobustnessTokenForImageClassification, monkeypatch: pytest.MonkeyPatch
) -> None:
    within = []

    @contextmanager
    def attacked_faster(self: EvaluatedModel) -> Iterator[None]:
        monkeypatch.setattr(Planted, "spoil", staticmethod(_RandomGradient.apply))
        within.append(self)
        yield
        monkeypatch.undo()

    monkeypatch.setattr(Planted, "attacked_faster", attacked_faster)
    check = gradients.gradients(planted(classifier))
    assert (check.passed, len(within)) == (False, 1), check.value


@pytest.mark.parametrize(
    "attack",
    [
        lambda objective, images, **kwargs: images,
        lambda objective, images, **kwargs: pgd_attack(lambda x: -objective(x), images, **kwargs),
        lambda objective, images, **kwargs: pgd_attack(objective, images, **{**kwargs, "step_size": 1e-6}),
    ],
    ids=["none", "wrong sign", "no step"],
)
def test_an_attack_that_does_not_work_fails(
    classifier: RobustnessTokenForImageClassification, attack: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradients, "pgd_attack", attack)
    assert gradients.attack_unit_test(probing(EvaluatedModel(classifier))).passed is False


def test_the_attack_that_is_tested_computes_as_all_do(classifier: RobustnessTokenForImageClassification) -> None:
    class Spoilt(Planted):
        def logits(self, images: Tensor, tokens: TokenState | None, *, exact: bool = False) -> Tensor:
            # The wrong way in whatever precision attacks compute in, and right where it is exact.
            return super().logits(images if exact else 2 * images.detach() - images, tokens, exact=exact)

    check = gradients.attack_unit_test(probing(Spoilt(classifier, attack_precision="bf16")))
    assert (check.passed, check.value[:10]) == (False, "found for ")


@pytest.mark.parametrize("grain", [8, 1e-3], ids=["fine", "constant"])
def test_an_attack_without_gradients_finds_nothing(
    classifier: RobustnessTokenForImageClassification, grain: float
) -> None:
    check = gradients.attack_unit_test(planted(classifier, fault=lambda z: (z * grain).round() / grain))
    assert check.passed is False


def test_there_is_nothing_to_probe_in_an_empty_ball(classifier: RobustnessTokenForImageClassification) -> None:
    checked = probing(EvaluatedModel(classifier), eps=0)
    for function in (gradients.gradients, gradients.attack_unit_test):
        assert function(checked).passed is None
        assert function(checked).value == "not run: the first eps is 0"


def test_random_directions_keep_the_cosine_of_full_vectors() -> None:
    weights = torch.tensor([[3.0, 4.0, 0.0], [1.0, 0.0, 0.0]])
    gradient = torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 2.0]])  # cosines .6 and 0
    directions = torch.randint(2, (4000, 2, 3)) * 2.0 - 1
    images = torch.rand(2, 3)
    cosines = difference_cosines(lambda x: (x * weights).double().sum(dim=1), images, gradient, directions)
    assert cosines.tolist() == pytest.approx([0.6, 0.0], abs=0.05)
    same = difference_cosines(lambda x: (x * weights).double().sum(dim=1), images, weights, directions[:16])
    assert same.tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
    none = difference_cosines(lambda x: x.double().sum(dim=1), images, torch.zeros(2, 3), directions[:16])
    assert none.tolist() == [0, 0]


def test_the_checks_are_numbered_from_1_to_12(classifier: RobustnessTokenForImageClassification) -> None:
    empty = probing(EvaluatedModel(classifier))
    checked = Measurements(**{**vars(empty), "clean": outcome(0.9, tokens=ALL_TOKENS)})
    checks = run_checks(checked)
    assert [check.number for check in checks] == list(range(1, 13))
    assert len(CHECKS) == 12
    assert len({check.name for check in checks}) == 12
    not_run = {check.number for check in checks if check.value.startswith("not run")}
    assert not_run == {1, 2, 3, 4, 5, 6, 7, 8, 9, 11}
    assert all(check.passed is None for check in checks if check.number in not_run)


class Images(torch.utils.data.Dataset[dict[str, Any]]):
    def __init__(self, labels: list[int]) -> None:
        self.images, self.labels = random_images(len(labels)), labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return {"images": self.images[index], "labels": self.labels[index]}


@pytest.fixture
def small_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    small = dataclasses.replace(
        BUDGETS["quick"], num_images=8, num_steps=3, num_queries=5, num_draws=2, num_sweep_images=4, num_sweep_steps=3
    )
    monkeypatch.setattr(evaluate, "BUDGETS", {**BUDGETS, "quick": small})


def evaluated(classifier: RobustnessTokenForImageClassification) -> dict[int, Any]:
    with torch.no_grad():
        labels = EvaluatedModel(classifier).logits(random_images(8), None).argmax(dim=1).tolist()
    report = evaluate_robustness(
        classifier,
        Images(labels),
        own_tokens=[torch.full((2, HIDDEN_SIZE), 0.1)],
        eps=[EPS],
        eps_sweep=[0, EPS],
        diagnostics=False,
        batch_size=4,
        disable_tqdm=True,
    )
    return {check.number: check for check in report.checks}


def test_the_report_has_the_checks(classifier: RobustnessTokenForImageClassification, small_budget: None) -> None:
    checks = evaluated(classifier)
    assert sorted(checks) == list(range(1, 13))
    assert "eps 0 equals clean" in checks[8].value
    assert {number: checks[number].passed for number in (10, 11, 12)} == {10: True, 11: True, 12: True}
    assert all(checks[number].value.startswith("not run") for number in (3, 5, 6, 7, 9))


def test_an_attack_that_moves_without_a_budget_is_seen(
    classifier: RobustnessTokenForImageClassification, small_budget: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def restless(objective: Any, images: Tensor, *, eps: float, **kwargs: Any) -> Tensor:
        return (images + 1 / 255).clamp(0, 1)

    monkeypatch.setattr(attack_suite, "pgd_attack", restless)
    check = evaluated(classifier)[8]
    assert check.passed is False
    assert "eps 0 differs from clean" in check.value


def test_an_attack_that_breaks_its_budget_is_seen(
    classifier: RobustnessTokenForImageClassification, small_budget: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overshooting(*args: Any, eps: float, **kwargs: Any) -> Tensor:
        return pgd_attack(*args, eps=eps + 1 / 255, **kwargs)

    monkeypatch.setattr(attack_suite, "pgd_attack", overshooting)
    check = evaluated(classifier)[11]
    assert check.passed is False
    assert "suite-full-cross_entropy-eps4" in check.value
