"""Two processes that evaluate together, by gloo, find what one finds."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from robustness_tokens import RobustnessTokenForImageClassification, evaluate_robustness
from robustness_tokens.evaluation import cells
from robustness_tokens.evaluation import cells as cells_module
from robustness_tokens.evaluation import evaluate as evaluate_module
from robustness_tokens.evaluation.attack_suite import Attack, AttackBatch
from robustness_tokens.evaluation.threat_models import AttackerView
from robustness_tokens.report.writing import RobustnessReport
from robustness_tokens.utils.processes import process_state
from tests.support.bases import HIDDEN_SIZE, IMAGE_SIZE, build_base
from tests.support.training_runs import run_together


def evaluate(output_dir: Path | None, *, draw: bool = False, **changes: Any) -> RobustnessReport:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = RobustnessTokenForImageClassification.from_base(
        build_base("dinov2", classifier=True), num_robustness_tokens=2, initializer_range=0.5
    )
    images = torch.rand(10, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(3))
    arguments: dict[str, Any] = {
        "own_tokens": [torch.full((2, HIDDEN_SIZE), 0.1)],
        "attacks": ["cross_entropy", "paper", "corner_noise"],
        "eps": [8 / 255],
        "eps_sweep": [],
        "diagnostics": False,
        "num_steps": 3,
        "batch_size": 4,
        "disable_tqdm": True,
    }
    dataset = [{"images": image, "labels": number % 5} for number, image in enumerate(images)]
    with pytest.MonkeyPatch.context() as patch:
        if not draw:
            patch.setattr(evaluate_module, "make_figures", lambda *args: {})
        return evaluate_robustness(model, dataset, output_dir=output_dir, **{**arguments, **changes})


def count_attacked(patch: pytest.MonkeyPatch) -> list[int]:
    """Counts the images that this process attacks, from now on, each time."""
    counts: list[int] = []
    real = cells_module.run_attack

    def counted(attack: Attack, view: AttackerView, batch: AttackBatch, **arguments: Any) -> Tensor:
        counts.append(len(batch.images))
        return real(attack, view, batch, **arguments)

    patch.setattr(cells_module, "run_attack", counted)
    return counts


# The attacks of a budget, most of which take the images that are left by others.
LEFT: dict[str, Any] = {"attacks": None, "knowledge": ["base", "full"], "eps": [0.003]}


def evaluate_as_rank(rank: int, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        counts = count_attacked(patch)
        evaluate(folder / "work", draw=True).save(folder / str(rank))
        # Of the batches of 4, 4 and 2 the first process has the outer ones; there are seven cells.
        assert counts == [[4, 2], [4]][rank] * 7
    state = process_state()
    assert (state.num_processes, state.process_index) == (2, rank)
    evaluate(folder / "left", **LEFT).save(folder / f"left-{rank}")
    trained: dict[str, Any] = {
        "own_tokens": None,
        "num_own_tokens": 1,
        "knowledge": ["own_tokens"],
        "attacks": ["cross_entropy"],
    }
    recipe = {"attack": "pgd", "max_steps": 1, "num_attack_steps": 1, "per_device_train_batch_size": 2}
    evaluate(None, own_tokens_overrides=recipe, **trained).save(folder / f"trained-{rank}")
    for _ in range(2):
        evaluate(folder / "trained", own_tokens_overrides=recipe, **trained).save(folder / f"kept-{rank}")


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    run_together(2, evaluate_as_rank, tmp_path)
    first, second = (RobustnessReport.load(tmp_path / str(rank)) for rank in (0, 1))
    alone = evaluate(None)
    assert first.results == second.results == alone.results
    assert first.checks == second.checks
    again = evaluate(tmp_path / "work")
    assert again.results == alone.results
    assert len(list((tmp_path / "work" / "cells").iterdir())) == 7
    left = [RobustnessReport.load(tmp_path / f"left-{rank}") for rank in (0, 1)]
    assert left[0].results == left[1].results == evaluate(None, **LEFT).results
    assert any("which left" in r.attack_parameters.get("after", "") for r in left[0].results)
    reports = [RobustnessReport.load(tmp_path / f"{name}-{rank}") for name in ("trained", "kept") for rank in (0, 1)]
    assert reports[0].results == reports[1].results == reports[2].results == reports[3].results != []
    assert len(list((tmp_path / "trained").rglob("model.safetensors"))) == 1


def evaluate_one_batch_as_rank(rank: int, folder: Path) -> None:
    arguments: dict[str, Any] = {"knowledge": ["base"], "attacks": ["cross_entropy"], "batch_size": 10}
    evaluate(folder, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        counts = count_attacked(patch)
        evaluate(folder, **arguments)
        assert counts == []


def test_a_process_without_images_finds_what_is_stored(tmp_path: Path) -> None:
    run_together(2, evaluate_one_batch_as_rank, tmp_path)
    assert len(list((tmp_path / "cells").iterdir())) == 1


def fail_as_rank(rank: int, folder: Path) -> None:
    def disk_is_full(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    with pytest.MonkeyPatch.context() as patch:
        if rank == 0:
            patch.setattr(cells.CellStore, "save", disk_is_full)
        with pytest.raises(OSError, match="no space left"):
            evaluate(folder, knowledge=["base"], attacks=["cross_entropy"])


def test_no_process_waits_for_one_that_failed(tmp_path: Path) -> None:
    run_together(2, fail_as_rank, tmp_path)


def wait_as_rank(rank: int, folder: Path) -> None:
    evaluate(None, knowledge=["none"], attacks=["corner_noise"], num_images=2)
    assert torch.distributed.get_backend() == "gloo"
    group: Any = torch.distributed.group.WORLD
    assert group._get_backend(torch.device("cpu")).options._timeout == timedelta(hours=3)


def test_processes_wait_for_each_other_as_long_as_in_a_training(tmp_path: Path) -> None:
    run_together(2, wait_as_rank, tmp_path)
