"""The benchmark's re-creation of the published step computes what the published implementation does."""

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import Dinov2Model

from benchmarks.published_step import PublishedStep


GOLDEN = Path(__file__).parent / "golden" / "dinov2"


def golden_step() -> tuple[PublishedStep, dict[str, torch.Tensor]]:
    tensors = load_file(GOLDEN / "golden.safetensors")
    step = PublishedStep(Dinov2Model.from_pretrained(GOLDEN).eval())
    with torch.no_grad():
        step.tokens.copy_(tensors["tokens"])
    return step, tensors


def test_five_steps_give_the_golden_trajectory_and_tokens() -> None:
    step, tensors = golden_step()
    torch.manual_seed(3)
    rows = [list(step(images).values()) for images in (tensors["images_u8"] / 255).split(4)]
    torch.testing.assert_close(torch.tensor(rows), tensors["train_trajectory"], rtol=0, atol=1e-4)
    torch.testing.assert_close(step.tokens.detach(), tensors["tokens_after_training"], rtol=0, atol=1e-4)


def test_it_wastes_what_the_published_code_wastes() -> None:
    step, tensors = golden_step()
    forwards = 0

    def count(*_: object) -> None:
        nonlocal forwards
        forwards += 1

    step.backbone.layernorm.register_forward_hook(count)
    step.num_attack_steps = 3
    step(tensors["images_u8"][:4] / 255)
    assert forwards == 3 + 2 + 2 + 1  # the attack's steps, two targets, clean and attacked images, the baseline
    weights = [name for name, value in step.backbone.named_parameters() if value.grad is not None]
    assert "encoder.layer.0.mlp.fc1.weight" in weights
    assert "embeddings.patch_embeddings.projection.weight" in weights
