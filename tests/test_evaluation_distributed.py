"""Two processes that evaluate together, by gloo, find what one finds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from robustness_tokens import RobustnessTokenForImageClassification, evaluate_robustness
from robustness_tokens.report.schema import RobustnessReport
from tests.conftest import HIDDEN_SIZE, IMAGE_SIZE, build_base
from tests.training_runs import run_together


def evaluate(output_dir: Path | None, **changes: Any) -> RobustnessReport:
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
    return evaluate_robustness(model, dataset, output_dir=output_dir, **{**arguments, **changes})


def evaluate_as_rank(rank: int, folder: Path) -> None:
    evaluate(folder / "work").save(folder / str(rank))
    trained = {"own_tokens": None, "num_own_tokens": 1, "knowledge": ["own_tokens"], "attacks": ["cross_entropy"]}
    recipe = {"attack": "pgd", "max_steps": 1, "num_attack_steps": 1, "per_device_train_batch_size": 2}
    evaluate(None, own_tokens_overrides=recipe, **trained).save(folder / f"trained-{rank}")


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    run_together(2, evaluate_as_rank, tmp_path)
    first, second = (RobustnessReport.load(tmp_path / str(rank)) for rank in (0, 1))
    alone = evaluate(None)
    assert first.results == second.results == alone.results
    again = evaluate(tmp_path / "work")
    assert again.results == alone.results
    assert len(list((tmp_path / "work" / "cells").iterdir())) == 7
    trained = [RobustnessReport.load(tmp_path / f"trained-{rank}").results for rank in (0, 1)]
    assert trained[0] == trained[1] != []
