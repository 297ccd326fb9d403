from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from robustness_tokens.data.preprocessing import Normalizer
from robustness_tokens.models.modeling import RobustnessTokenForImageClassification
from robustness_tokens.training.arguments import RobustnessTokenTrainingArguments
from robustness_tokens.training.losses import robustness_loss
from robustness_tokens.training.step import TrainingStep


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"invariance_weight": 0.5, "adversarial_weight": 2.0},
        {"objective": "head_distance", "attack_through": "both"},
        {"objective": "distillation", "attack": "pgd", "attack_through": "tokens"},
        {"objective": "cross_entropy", "attack": "pgd"},
    ],
    ids=["paper", "weighted", "head distance, both routes", "distillation", "cross-entropy"],
)
def test_gradient_is_that_of_the_loss_on_all_images(
    make_base: Callable[..., Any], tmp_path: Path, settings: dict[str, Any]
) -> None:
    model = RobustnessTokenForImageClassification.from_base(
        make_base("dinov2", classifier=True),
        num_robustness_tokens=3,
        token_depth="all",
        gains_and_shifts=["norm", "linear", "bias", "patch_embedding"],
    )
    normalizer = Normalizer((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    args = RobustnessTokenTrainingArguments(output_dir=str(tmp_path), **settings)
    clean, attacked = torch.rand(2, 6, 3, 16, 16)
    # Stored pairs, so that both see the same attacked images.
    labels = torch.arange(6) % 2
    batches = [
        {"images": clean[i], "adversarial_images": attacked[i], "index": torch.arange(6)[i], "labels": labels[i]}
        for i in (slice(0, 2), slice(2, 6))
    ]
    step = TrainingStep(model, args, normalizer)
    metrics = step.accumulate_gradient(step.outputs, batches, accelerator=Accelerator(), step=0)
    pixel_values = normalizer(clean)
    losses = robustness_loss(
        step.outputs,
        pixel_values,
        normalizer(attacked),
        step.base_outputs(pixel_values),
        invariance_weight=args.invariance_weight,
        adversarial_weight=args.adversarial_weight,
        **step.objective_options(pixel_values, labels),
    )
    state = model.injector.state
    for tensor, expected in zip(state.values(), torch.autograd.grad(losses.loss, list(state.values())), strict=True):
        assert tensor.grad is not None
        torch.testing.assert_close(tensor.grad, expected, rtol=1e-3, atol=1e-5)
    assert metrics["loss"] == pytest.approx(losses.loss.item(), abs=1e-4)
    assert metrics["invariance_cosine"] == pytest.approx(losses.invariance.item(), abs=1e-4)
    assert metrics["adversarial_cosine"] == pytest.approx(losses.adversarial.item(), abs=1e-4)
