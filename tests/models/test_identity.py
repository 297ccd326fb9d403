from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from robustness_tokens import RobustnessTokenModel, inject_tokens
from robustness_tokens.data.image_processors import build_image_processor
from robustness_tokens.models.identity import model_digest
from tests.support.bases import HIDDEN_SIZE, build_base


def test_every_weight_and_buffer_counts(family: str) -> None:
    model = build_base(family, num_hidden_layers=3)
    known = {model_digest(model)}
    names = list(model.state_dict())
    for name in names:
        changed = copy.deepcopy(model)
        with torch.no_grad():
            changed.state_dict()[name].view(-1)[-1] += 1
        known.add(model_digest(changed))
    assert len(known) == 1 + len(names)


@pytest.mark.parametrize("change", [{"layer_norm_eps": 1e-3}, {"hidden_act": "relu"}, {"num_attention_heads": 2}])
def test_what_the_weights_do_not_tell_counts(family: str, change: dict[str, Any]) -> None:
    assert model_digest(build_base(family, **change)) != model_digest(build_base(family))


@pytest.mark.parametrize("change", [{"norm_layer": "rmsnorm"}, {"act_layer": "relu"}, {"num_heads": 2}])
def test_the_modules_count_where_there_is_no_config(change: dict[str, Any]) -> None:
    timm = pytest.importorskip("timm")

    def build(**change: Any) -> Any:
        torch.manual_seed(0)
        sizes = {"img_size": 16, "patch_size": 8, "embed_dim": HIDDEN_SIZE, "depth": 2, "num_heads": 4}
        return timm.create_model("vit_tiny_patch16_224", **{**sizes, **change})

    assert model_digest(build()) == model_digest(build())
    assert model_digest(build(**change)) != model_digest(build())


def test_neither_the_place_nor_the_hooks_count(family: str, tmp_path: Path) -> None:
    model = build_base(family)
    known = model_digest(model)
    model.save_pretrained(tmp_path)
    assert model_digest(type(model).from_pretrained(tmp_path)) == known
    assert model_digest(inject_tokens(copy.deepcopy(model), torch.randn(3, HIDDEN_SIZE))) == known
    assert model_digest(type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)) != known


def test_an_adapter_counts_by_what_it_learned(make_model: Callable[..., RobustnessTokenModel]) -> None:
    model = make_model()
    known = model_digest(model)
    model.config.training = {"max_steps": 3}
    assert model_digest(model) == known
    with torch.no_grad():
        model.robustness_tokens[-1, -1] += 1
    assert model_digest(model) != known


def test_an_offloaded_model_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match=r"weights of .* are on the meta device, such as .*: load it without"):
        model_digest(build_base(family).to("meta"))


def test_weights_that_a_checkpoint_lacks_are_the_same_at_each_load(tmp_path: Path) -> None:
    build_base("vit", classifier=True).save_pretrained(tmp_path)  # without the pooler
    build_image_processor(image_size=16).save_pretrained(tmp_path)
    digests = {model_digest(RobustnessTokenModel.from_base(tmp_path).get_base_model()) for _ in range(2)}
    assert len(digests) == 1


class Wrapped(torch.nn.Module):
    """As a user wraps a model; its own settings and buffers change what it computes."""

    def __init__(self, model: torch.nn.Module, sign: Any = 1, scale: float = 1.0) -> None:
        super().__init__()
        self.model, self.sign = model, sign
        self.register_buffer("scale", torch.tensor(scale), persistent=False)


def test_a_users_module_counts_by_its_own_settings_and_buffers(family: str) -> None:
    base = build_base(family)
    assert model_digest(Wrapped(base)) == model_digest(Wrapped(build_base(family)))
    changes: Any = ({}, {"sign": -1}, {"sign": [1]}, {"sign": torch.ones(2)}, {"scale": 2.0})
    digests = {model_digest(Wrapped(base, **change)) for change in changes}
    assert len(digests) == 5


def test_a_quantised_model_counts_by_its_packed_weights(family: str) -> None:
    def quantise(sign: int) -> Any:
        base = build_base(family)
        with torch.no_grad():
            next(module for module in base.modules() if isinstance(module, torch.nn.Linear)).weight.mul_(sign)
        return torch.ao.quantization.quantize_dynamic(base, {torch.nn.Linear}, dtype=torch.qint8)

    assert model_digest(quantise(1)) == model_digest(quantise(1))
    assert model_digest(quantise(1)) != model_digest(quantise(-1))
