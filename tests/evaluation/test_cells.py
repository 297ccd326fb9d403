from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from robustness_tokens import RobustnessTokenForImageClassification, RobustnessTokenModel
from robustness_tokens.configuration import TOKENS
from robustness_tokens.evaluation import cells
from robustness_tokens.evaluation.attack_suite import Attack, AttackBatch
from robustness_tokens.evaluation.cells import Cell, CellStore, find_remaining, measure_outcome, merge, run_cells
from robustness_tokens.evaluation.metrics import summarize, worst_outcome
from robustness_tokens.evaluation.threat_models import AttackerView, EvaluatedModel, attacker_views
from robustness_tokens.utils import digest
from tests.support.bases import IMAGE_SIZE, build_base
from tests.support.disks import full_disk


OUTCOME = {"trained.cosine": torch.tensor([0.5, 0.25]), "pixel_difference": torch.zeros(2)}


@pytest.fixture(scope="module")
def view() -> AttackerView:
    return attacker_views("full", EvaluatedModel(RobustnessTokenModel.from_base(build_base("dinov2"))))[0]


def cell(view: AttackerView, *, eps: float = 0.1, num_steps: int = 2) -> Cell:
    attack = Attack(name="feature_mse", target="base", num_steps=num_steps, num_restarts=1)
    return Cell(series="suite", view=view, attack=attack, eps=eps, num_images=2)


def test_a_stored_cell_is_found_again_bit_for_bit(view: AttackerView, tmp_path: Path) -> None:
    store = CellStore(tmp_path / "cells", {"seed": 0})
    assert store.load(cell(view)) is None
    store.save(cell(view), OUTCOME)
    found = CellStore(tmp_path / "cells", {"seed": 0}).load(cell(view))
    assert found is not None
    assert found.keys() == OUTCOME.keys()
    assert all(torch.equal(found[name], value) for name, value in OUTCOME.items())
    assert len(list((tmp_path / "cells").iterdir())) == 1


def test_a_full_disk_is_an_error_and_leaves_no_cell(view: AttackerView, tmp_path: Path) -> None:
    store = CellStore(tmp_path, {"seed": 0})
    with full_disk(), pytest.raises(OSError, match=r"File too large: .*suite.*safetensors'"):
        store.save(cell(view), OUTCOME)
    assert store.load(cell(view)) is None
    assert not list(tmp_path.iterdir())


def test_a_cell_of_other_settings_is_not_found(view: AttackerView, tmp_path: Path) -> None:
    store = CellStore(tmp_path, {"seed": 0})
    store.save(cell(view), OUTCOME)
    assert CellStore(tmp_path, {"seed": 1}).load(cell(view)) is None
    assert store.load(cell(view, eps=0.2)) is None
    assert store.load(cell(view, num_steps=3)) is None


def test_a_renamed_file_is_not_believed(view: AttackerView, tmp_path: Path) -> None:
    store = CellStore(tmp_path, {"seed": 0})
    store.save(cell(view), OUTCOME)
    (path,) = tmp_path.iterdir()
    CellStore(tmp_path / "other", {"seed": 1}).save(cell(view), OUTCOME)
    (other,) = (tmp_path / "other").iterdir()
    other.replace(path)
    with pytest.raises(ValueError, match="delete it"):
        store.load(cell(view))


def without_end(content: bytes) -> bytes:
    return content[: len(content) // 2]


def with_another_value(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


@pytest.mark.parametrize(
    "damage",
    [lambda content: b"", without_end, lambda content: content[:-1], lambda content: b"\xff" * 64, with_another_value],
    ids=["empty", "half", "short", "noise", "one bit"],
)
def test_a_damaged_file_is_measured_again_and_said_once(
    view: AttackerView, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    store = CellStore(tmp_path, {"seed": 0})
    store.save(cell(view), OUTCOME)
    (path,) = tmp_path.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert store.load(cell(view)) is None
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert "measured again" in record.getMessage()
    store.save(cell(view), OUTCOME)
    found = store.load(cell(view))
    assert found is not None
    assert torch.equal(found["trained.cosine"], OUTCOME["trained.cosine"])
    assert len(caplog.records) == 1


def test_a_cell_of_another_format_is_no_damage(
    view: AttackerView, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CellStore(tmp_path, {"seed": 0})
    with monkeypatch.context() as patch:
        patch.setattr(cells, "FORMAT", cells.FORMAT - 1)
        store.save(cell(view), OUTCOME)
    with caplog.at_level(logging.WARNING):
        assert store.load(cell(view)) is None
    assert not caplog.records
    store.save(cell(view), OUTCOME)
    assert len(list(tmp_path.iterdir())) == 2


def test_what_a_cell_before_covers_is_not_attacked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = EvaluatedModel(RobustnessTokenModel.from_base(build_base("dinov2"), initializer_range=1.0))
    (base_view,) = attacker_views("base", model)
    images = torch.rand(4, 3, IMAGE_SIZE, IMAGE_SIZE)
    batches = {
        number: AttackBatch(images=images[2 * number :][:2], index=torch.arange(2) + 2 * number, labels=None)
        for number in range(2)
    }
    tokens = {"trained": model.tokens, "none": None, "zero": {TOKENS: torch.zeros_like(model.tokens[TOKENS])}}
    attacked: list[tuple[str, int]] = []
    real = cells.run_attack

    def count(attack: Attack, view: AttackerView, batch: AttackBatch, *, eps: float, seed: int) -> torch.Tensor:
        attacked.append((f"{255 * eps:g}", len(batch.images)))
        return real(attack, view, batch, eps=eps, seed=seed)

    monkeypatch.setattr(cells, "run_attack", count)
    suite = dataclasses.replace(cell(base_view), num_images=4)
    some = dataclasses.replace(suite, series="sweep", num_images=2)
    more = dataclasses.replace(some, eps=0.2)
    store = CellStore(tmp_path, {})
    whole, first, other = run_cells(
        [suite, some, more], model, batches, tokens, {}, batch_size=2, seed=0, store=store, disable_tqdm=True
    )
    assert attacked == [("25.5", 2), ("25.5", 2), ("51", 2)]
    assert first.keys() == other.keys() == {name for name in whole if not name.startswith("zero.")}
    assert all(torch.equal(first[name], whole[name][:2]) for name in first)
    assert not torch.equal(first["trained.cosine"], other["trained.cosine"])
    alone = run_cells([some], model, batches, tokens, {}, batch_size=2, seed=0, store=CellStore(None, {}))
    assert first.keys() == alone[0].keys()
    assert all(torch.equal(first[name], alone[0][name]) for name in first)
    attacked.clear()
    again = run_cells([suite, some, more], model, batches, tokens, {}, batch_size=2, seed=0, store=store)
    assert not attacked
    assert all(torch.equal(again[1][name], first[name]) for name in first)


@pytest.fixture(scope="module")
def classifier() -> EvaluatedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = build_base("dinov2", classifier=True)
        return EvaluatedModel(RobustnessTokenForImageClassification.from_base(base, initializer_range=1.0))


def labelled_batches(model: EvaluatedModel, count: int) -> dict[int, AttackBatch]:
    """Batches of two images; the model classifies all of them correctly except the first."""
    images = torch.rand(count, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        labels = model.logits(images, model.tokens).argmax(dim=1)
    labels[0] = (labels[0] + 1) % 3
    numbers = torch.arange(count)
    return {
        row: AttackBatch(images=images[rows], labels=labels[rows], index=numbers[rows])
        for row, rows in enumerate(numbers.split(2))
    }


def clean_outcome(
    model: EvaluatedModel, batches: dict[int, AttackBatch], tokens: dict[str, Any]
) -> dict[str, torch.Tensor]:
    """Returns the outcome on all images before any attack."""
    return merge([(row, measure_outcome(model, one, one.images, tokens)) for row, one in batches.items()])


def test_an_attack_on_what_is_left_leaves_the_same_worst_case(classifier: EvaluatedModel, tmp_path: Path) -> None:
    batches, tokens = labelled_batches(classifier, 8), {"trained": classifier.tokens}
    clean = clean_outcome(classifier, batches, tokens)
    (full,) = attacker_views("full", classifier)
    first, second = (
        Cell(series="suite", view=full, attack=Attack(name=name, num_steps=3, num_restarts=1), eps=0.004, num_images=8)
        for name in ("cross_entropy", "margin")
    )
    after = dataclasses.replace(second, remaining_only=True)

    def run(*chosen: Cell, folder: Path | None = None) -> list[dict[str, torch.Tensor]]:
        store = CellStore(folder, {})
        return run_cells(
            chosen, classifier, batches, tokens, clean, batch_size=2, seed=0, store=store, disable_tqdm=True
        )

    whole, (entropy, margin) = run(first, second), run(first, after, folder=tmp_path)
    remaining = clean["trained.correct"] & entropy["trained.correct"]
    assert torch.equal(margin.pop("attacked"), remaining)
    assert 1 < remaining.sum() < 7  # else the test says nothing
    assert "trained.cosine" not in margin  # its worst case is of all images
    for name, value in margin.items():
        assert torch.equal(value[~remaining], clean[name][~remaining])
        torch.testing.assert_close(value[remaining], whole[1][name][remaining], atol=1e-5, rtol=1e-5)
    worst = [worst_outcome([*outcomes, clean])["trained.correct"] for outcomes in (whole, (entropy, margin))]
    assert torch.equal(*worst)
    files = {path.name for path in tmp_path.iterdir()}
    again = run(first, after, folder=tmp_path)[1]
    assert torch.equal(again["trained.correct"], margin["trained.correct"])
    assert {path.name for path in tmp_path.iterdir()} == files
    run(after, folder=tmp_path)  # after no attack more images are left, so that it is another measurement
    assert len(list(tmp_path.iterdir())) == len(files) + 1


@pytest.mark.parametrize("remaining_only", [False, True])
def test_a_stopped_cell_goes_on_with_the_next_batch(
    classifier: EvaluatedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, remaining_only: bool
) -> None:
    batches, tokens = labelled_batches(classifier, 6), {"trained": classifier.tokens}
    clean = clean_outcome(classifier, batches, tokens)
    attack = Attack(name="margin", num_steps=3, num_restarts=1)
    chosen = Cell(
        series="suite",
        view=attacker_views("full", classifier)[0],
        attack=attack,
        eps=0.1,
        num_images=6,
        remaining_only=remaining_only,
    )
    settings: dict[str, Any] = {"batch_size": 2, "seed": 0, "disable_tqdm": True}
    (whole,) = run_cells([chosen], classifier, batches, tokens, clean, store=CellStore(None, {}), **settings)
    attacked: list[int] = []
    real = cells.run_attack

    def stop_at_the_last(attack: Attack, view: AttackerView, batch: AttackBatch, **kwargs: Any) -> torch.Tensor:
        if attacked == [0 if not remaining_only else 1, 2]:
            raise KeyboardInterrupt
        attacked.append(int(batch.index[0]))
        return real(attack, view, batch, **kwargs)

    monkeypatch.setattr(cells, "run_attack", stop_at_the_last)
    with pytest.raises(KeyboardInterrupt):
        run_cells([chosen], classifier, batches, tokens, clean, store=CellStore(tmp_path, {}), **settings)
    assert len(list(tmp_path.iterdir())) == 2
    attacked.clear()
    (again,) = run_cells([chosen], classifier, batches, tokens, clean, store=CellStore(tmp_path, {}), **settings)
    assert attacked == [4]
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], value) for name, value in whole.items())
    assert len(list(tmp_path.iterdir())) == 1, "the batches of a finished cell are removed"


def test_nothing_is_attacked_where_nothing_is_left(
    classifier: EvaluatedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches, tokens = labelled_batches(classifier, 4), {"trained": classifier.tokens}
    clean = clean_outcome(classifier, batches, tokens)
    clean["trained.correct"][:] = False
    monkeypatch.setattr(cells, "run_attack", None)
    attack = Attack(name="margin", num_steps=3, num_restarts=1)
    after = Cell(
        series="suite",
        view=attacker_views("full", classifier)[0],
        attack=attack,
        eps=0.1,
        num_images=3,
        remaining_only=True,
    )
    settings: dict[str, Any] = {"batch_size": 2, "seed": 0, "store": CellStore(None, {}), "disable_tqdm": True}
    (outcome,) = run_cells([after], classifier, batches, tokens, clean, **settings)
    assert not outcome.pop("attacked").any()
    assert all(torch.equal(value, clean[name][:3]) for name, value in outcome.items())


def stood(correct: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    return {f"{name}.correct": torch.tensor(values) == 1 for name, values in correct.items()}


def test_an_image_stands_with_any_tokens_after_each_attack_of_its_level_and_eps(view: AttackerView) -> None:
    clean = stood({"trained": [1, 1, 1, 0, 1], "none": [1, 1, 1, 0, 1], "zero": [1, 1, 1, 1, 1]})
    one = stood({"trained": [0, 1, 1, 1, 1], "none": [1, 0, 1, 1, 1], "zero": [1, 1, 1, 1, 1]})
    two = stood({"trained": [1, 1, 0, 1, 1], "none": [0, 1, 0, 1, 1], "zero": [1, 1, 1, 1, 1]})
    this = dataclasses.replace(cell(view), num_images=4, remaining_only=True)
    other_eps, sweep = dataclasses.replace(this, eps=0.2), dataclasses.replace(this, series="sweep")
    other_level = dataclasses.replace(this, view=dataclasses.replace(view, knowledge="base"))

    def remaining(before: list[Cell], names: list[str]) -> list[bool]:
        return find_remaining(this, before, [one, two][: len(before)], clean, names).tolist()

    assert remaining([], ["trained"]) == [True, True, True, False]
    assert remaining([this], ["trained"]) == [False, True, True, False]
    assert remaining([this, this], ["trained"]) == [False, True, False, False]
    assert remaining([this, this], ["trained", "none"]) == [False, True, False, False]
    assert remaining([this, this], ["none", "zero"]) == [True, True, True, True]
    for other in (other_eps, other_level, sweep):
        assert remaining([other, other], ["trained"]) == remaining([], ["trained"])


def test_nothing_is_stored_without_a_folder(view: AttackerView) -> None:
    store = CellStore(None, {})
    store.save(cell(view), OUTCOME)
    assert store.load(cell(view)) is None


def test_a_digest_tells_values_shapes_and_types_apart() -> None:
    one = torch.zeros(2, 2)
    others = [torch.zeros(4), torch.zeros(2, 2, dtype=torch.int32), torch.eye(2)]
    assert digest([one]) == digest([torch.zeros(2, 2)])
    assert len({digest([tensor]) for tensor in [one, *others]}) == 4
    assert digest([torch.tensor(1.0)]) != digest([torch.tensor(2.0)])


def test_batches_are_merged_in_their_order() -> None:
    parts = [(number, {"x": torch.tensor([float(number)])}) for number in (2, 0, 1)]
    assert merge(parts)["x"].tolist() == [0, 1, 2]


def test_the_worst_case_is_taken_image_by_image() -> None:
    outcomes = [
        {
            "trained.cosine": torch.tensor([0.1, 0.9]),
            "trained.correct": torch.tensor([True, False]),
            "trained.intersections": torch.tensor([[4, 0], [2, 2]]),
            "trained.unions": torch.tensor([[4, 0], [4, 4]]),
        },
        {
            "trained.cosine": torch.tensor([0.5, 0.2]),
            "trained.correct": torch.tensor([False, True]),
            "trained.intersections": torch.tensor([[1, 0], [3, 3]]),
            "trained.unions": torch.tensor([[4, 3], [4, 4]]),
        },
    ]
    worst = worst_outcome(outcomes)
    assert worst["trained.cosine"].tolist() == pytest.approx([0.1, 0.2])
    assert worst["trained.correct"].tolist() == [False, False]
    assert worst["trained.intersections"].tolist() == [[1, 0], [2, 2]]
    assert worst["trained.unions"].tolist() == [[4, 3], [4, 4]]


def test_the_worst_miou_is_never_above_that_of_one_attack() -> None:
    """The worst attack for an image's IoU may hardly lower the dataset's, if a class is rare in that image only."""
    unions = torch.tensor([[100, 1], [100, 1000]])
    rare = {"trained.intersections": torch.tensor([[90, 0], [100, 1000]]), "trained.unions": unions}
    common = {"trained.intersections": torch.tensor([[40, 1], [100, 1000]]), "trained.unions": unions}
    each = [summarize(outcome, "trained", seed=0) for outcome in (rare, common)]
    found = {
        metric: (value, interval)
        for _, metric, value, interval in summarize(worst_outcome([rare, common]), "trained", seed=0)
    }
    for metric in ("miou", "mean_image_miou"):
        lowest = min(value for rows in each for _, name, value, _ in rows if name == metric)
        value, (low, high) = found[metric]
        assert value == pytest.approx(lowest)
        assert low <= value <= high
    assert found["miou"][0] == pytest.approx(0.85)  # of the common class' attack
    assert found["mean_image_miou"][0] == pytest.approx(0.725)  # of the rare class'


def test_the_worst_of_more_attacks_is_never_above_that_of_some_of_them() -> None:
    """The worst attack for each image need not give the lowest mIoU of the dataset, so parts are candidates too."""
    unions = torch.tensor([[100, 1], [100, 1000]])
    rare = {"trained.intersections": torch.tensor([[90, 0], [100, 1000]]), "trained.unions": unions}
    common = {"trained.intersections": torch.tensor([[40, 1], [100, 1000]]), "trained.unions": unions}
    second = {"trained.intersections": torch.tensor([[100, 1], [100, 400]]), "trained.unions": unions}
    part = summarize(worst_outcome([common, second]), "trained", seed=0)[0][2]
    assert part == pytest.approx((0.7 + 401 / 1001) / 2)
    assert summarize(worst_outcome([common, second, rare]), "trained", seed=0)[0][2] > part + 0.1
    worst = worst_outcome([common, second, rare], parts=[[common, second]])
    assert summarize(worst, "trained", seed=0)[0][2] == part
    assert worst["trained.image_iou"].tolist() == pytest.approx([0.45, 0.7])


def test_summaries_are_means_with_intervals() -> None:
    outcome = {
        "none.cosine": torch.tensor([0.0, 1.0, 0.5, 0.5]),
        "none.correct": torch.tensor([True, True, True, False]),
        "trained.correct": torch.tensor([False] * 4),
    }
    rows = {(task, metric): (value, interval) for task, metric, value, interval in summarize(outcome, "none", seed=0)}
    assert rows["classification", "accuracy"][0] == 0.75
    assert rows["classification", "accuracy"][1] == pytest.approx((0.3006, 0.9544), abs=1e-4)
    assert rows["features", "cosine"][0] == 0.5
    assert len(rows) == 2
    assert summarize(outcome, "trained", seed=0)[0][2] == 0
