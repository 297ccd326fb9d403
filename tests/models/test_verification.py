"""Tests that injection is verified: what passes, what is refused, and that no trace is left."""

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ResNetConfig

from robustness_tokens.configuration import TOKENS
from robustness_tokens.data import build_image_processor
from robustness_tokens.models import RobustnessTokenModel, inject_tokens
from robustness_tokens.models.gains_and_shifts import find_adapted_modules
from robustness_tokens.models.injection import attach_tokens, find_injector
from robustness_tokens.models.layer_stack import find_layer_stack
from robustness_tokens.models.verification import verify_injection
from tests.support.bases import build_base
from tests.support.families import BASES, FAMILIES, HIDDEN_SIZE, hf


TOKENS_3 = torch.randn(3, HIDDEN_SIZE, generator=torch.Generator().manual_seed(3))


def deep_state(model: Any) -> dict[str, Tensor]:
    """Returns tokens for both layers, and gains and shifts that change every output."""
    state = {TOKENS: TOKENS_3.expand(2, -1, -1)}
    for found in find_adapted_modules(model, find_layer_stack(model)):
        state |= {key: torch.full(shape, 0.3) for key, shape in found.shapes.items()}
    return state


def traces(model: nn.Module) -> dict[str, Any]:
    """Lists what a check could leave behind: attributes by identity, modes, hooks in order, tensors by version."""
    found: dict[str, Any] = {"rng": torch.get_rng_state().tolist(), "grad": torch.is_grad_enabled()}
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            is_plain = isinstance(value, bool | int | float | str)
            found[f"{name}.{key}"] = value if is_plain else list(value) if isinstance(value, dict) else id(value)
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found |= {f"tensor {name}": (tensor.device, tensor.dtype, tensor._version) for name, tensor in tensors}
    return found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", list(FAMILIES))
def test_every_family_passes_and_keeps_no_trace(name: str, training: bool) -> None:
    model = FAMILIES[name].build()
    model.train(training)
    injector = attach_tokens(model, deep_state(model) if training else TOKENS_3)
    state = {key: tensor.clone() for key, tensor in injector.state.items()}
    before = traces(model)
    verify_injection(model)
    assert traces(model) == before
    assert find_injector(model) is injector
    assert all(torch.equal(tensor, state[key]) for key, tensor in injector.state.items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(BASES))
def test_half_precision_passes(name: str, dtype: torch.dtype) -> None:
    inject_tokens(BASES[name].build().to(dtype), TOKENS_3)


SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
DETR: dict[str, Any] = {"d_model": 32, "encoder_layers": 2, "decoder_layers": 1, "encoder_ffn_dim": 32}
DETR |= {"decoder_ffn_dim": 32, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_queries": 3}


def resnet() -> Any:
    make: Any = ResNetConfig
    return make(embedding_size=8, hidden_sizes=[8, 8, 16, 16], depths=[1, 1, 1, 1], out_features=["stage4"])


def detr() -> Any:
    return hf("DetrModel", "DetrConfig", **DETR, backbone_config=resnet(), use_timm_backbone=False, backbone=None)()


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "positions between the layers": (
        hf("YolosModel", "YolosConfig", **SMALL, image_size=[16, 16], patch_size=8, num_detection_tokens=5),
        "YolosModel .* must match the size",
    ),
    "positions beside the sequence": (detr, "DetrModel .* must match the size"),
    "videos": (
        hf("VideoMAEModel", "VideoMAEConfig", **SMALL, image_size=16, patch_size=8, num_frames=2),
        "without tokens, on an image of 16 x 16 pixels",
    ),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_models_that_mix_the_sequence_otherwise_are_refused(name: str) -> None:
    make, message = REFUSED[name]
    model = make().eval()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(ValueError, match=message):
        inject_tokens(model, TOKENS_3)
    assert find_injector(model) is None
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    processor = build_image_processor(image_size=16)
    with pytest.raises(ValueError, match=message):
        RobustnessTokenModel.from_base(model, image_processor=processor)
    assert find_injector(model) is None
    assert find_injector(inject_tokens(model, TOKENS_3, verify=False)) is not None


class LeakyMlp(nn.Module):
    """Adds to each row of the sequence something of the others: its mean, or its neighbour."""

    def __init__(self, mlp: nn.Module, how: str) -> None:
        super().__init__()
        self.mlp, self.how = mlp, how

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.mlp(hidden_states)
        if self.how == "mean":
            return output + hidden_states.mean(dim=1, keepdim=True)
        if self.how == "neighbour":
            return output + 0.1 * hidden_states.roll(1, dims=1)
        rows = torch.arange(hidden_states.shape[1], dtype=output.dtype)  # positions that count from the front
        return output + 0.1 * rows[:, None] * torch.linspace(-1, 1, output.shape[-1], dtype=output.dtype)


@pytest.mark.parametrize("how", ["mean", "neighbour", "position"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["dinov2", "timm_deit3"])
def test_layers_in_which_more_than_attention_mixes_are_refused(name: str, how: str, dtype: torch.dtype) -> None:
    model = FAMILIES[name].build()
    layer: Any
    for layer in find_layer_stack(model).layers:
        layer.mlp = LeakyMlp(layer.mlp, how)
    with pytest.raises(ValueError, match="its outputs change by"):
        inject_tokens(model.to(dtype), TOKENS_3)


def test_an_attention_that_is_not_recognised_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["vit"].build()
    monkeypatch.setattr(type(model), "_can_record_outputs", {"hidden_states": type(model.layers[0])})
    with pytest.raises(ValueError, match="no attention is recognised in ViTLayer"):
        inject_tokens(model, TOKENS_3)


def test_from_base_and_from_pretrained_verify_too(adapter_folder: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(
        "robustness_tokens.models.modeling.verify_injection", lambda model: seen.append(type(model).__name__)
    )
    RobustnessTokenModel.from_base(build_base("vit"))
    RobustnessTokenModel.from_pretrained(adapter_folder)
    inject_tokens(build_base("dinov2_with_registers"), TOKENS_3)
    assert seen == ["ViTModel", "Dinov2Model", "Dinov2WithRegistersModel"]
    RobustnessTokenModel.from_base(build_base("vit"), verify=False)
    RobustnessTokenModel.from_pretrained(adapter_folder, verify=False)
    inject_tokens(build_base("vit"), TOKENS_3, verify=False)
    assert len(seen) == 3


def test_the_smallest_image_is_tried_first(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, sides in (("dinov2", [16]), ("vit", [16, 48])):  # ViT takes no other size than its own
        model = build_base(name, image_size=48)
        seen: list[int] = []
        model.embeddings.register_forward_pre_hook(lambda m, args, seen=seen: seen.append(args[0].shape[-1]))
        inject_tokens(model, TOKENS_3)
        assert list(dict.fromkeys(seen)) == sides


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_quantised_model_passes() -> None:
    model = torch.ao.quantization.quantize_dynamic(build_base("dinov2"), {nn.Linear}, dtype=torch.qint8)
    before = model(torch.ones(1, 3, 16, 16)).last_hidden_state
    inject_tokens(model, TOKENS_3)
    after = model(torch.ones(1, 3, 16, 16)).last_hidden_state
    assert after.shape == before.shape
    assert (after - before).abs().max() > 1e-2


def test_nothing_can_be_verified_on_the_meta_device(caplog: pytest.LogCaptureFixture) -> None:
    model = build_base("dinov2").to("meta")
    with caplog.at_level(logging.WARNING):
        inject_tokens(model, TOKENS_3)
    assert "could not be verified" in caplog.text
    assert model(torch.zeros(1, 3, 16, 16, device="meta")).last_hidden_state.shape == (1, 5, 32)
    injector = find_injector(model)
    assert injector is not None
    assert injector.robustness_tokens.device.type == "cpu"
