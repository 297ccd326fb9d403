import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertModel,
    Dinov2Backbone,
    DPTConfig,
    DPTForDepthEstimation,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
)

from robustness_tokens.models.layer_stack import (
    base_fingerprint,
    check_base,
    find_layer_stack,
    headless_model,
    square_size,
)


def fingerprint(model: nn.Module) -> dict[str, str]:
    return base_fingerprint(model)


def check(model: nn.Module, expected: dict[str, str]) -> None:
    check_base(model, expected, expected_name="EXPECTED", made="the tokens were trained on", fix="load that base")


def test_finds_the_stack(base: PreTrainedModel) -> None:
    stack = find_layer_stack(base)
    assert (len(stack.layers), stack.hidden_size, stack.is_timm) == (2, 32, False)
    assert stack.owner in list(base.modules())
    assert stack.attention_class is not None
    assert any(isinstance(module, stack.attention_class) for module in stack.layers.modules())


def test_finds_the_same_stack_under_a_head(family: str, make_base: Callable[..., Any]) -> None:
    classifier = make_base(family, classifier=True)
    assert find_layer_stack(classifier).layers is find_layer_stack(headless_model(classifier)).layers
    assert headless_model(headless_model(classifier)) is headless_model(classifier) is not classifier


NOT_VISION_TRANSFORMERS: dict[str, Callable[[], nn.Module]] = {
    "BertModel": lambda: BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=20)
    ),
    "ResNetModel": lambda: ResNetModel(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ),
    "Sequential": lambda: nn.Sequential(nn.Linear(4, 4)),
    "ModuleList": lambda: nn.ModuleList(),
}


@pytest.mark.parametrize("name", NOT_VISION_TRANSFORMERS)
def test_no_vision_transformer(name: str) -> None:
    with pytest.raises(ValueError, match=f"no stack of vision transformer layers found in {name}"):
        find_layer_stack(NOT_VISION_TRANSFORMERS[name]())


def test_hierarchical_transformer() -> None:
    swin = SwinModel(SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2]))
    with pytest.raises(ValueError, match=r"SwinModel (is hierarchical|has no single)"):
        find_layer_stack(swin)


def test_fingerprint_is_reproducible_and_hexadecimal(base: PreTrainedModel) -> None:
    found = fingerprint(base)
    assert set(found) == {"bfloat16", "float16"}
    assert all(len(digest) == 64 and int(digest, 16) for digest in found.values())
    assert fingerprint(copy.deepcopy(base)) == found
    check(base, found)


def test_fingerprint_is_the_same_under_a_head_and_in_a_folder(
    family: str, make_base: Callable[..., Any], classifier_folders: dict[str, Path]
) -> None:
    classifier = make_base(family, classifier=True)
    found = fingerprint(headless_model(classifier))
    assert fingerprint(classifier) == found
    headless = type(make_base(family)).from_pretrained(classifier_folders[family])
    assert fingerprint(headless) == found


def test_fingerprint_is_the_same_in_a_depth_estimator(make_base: Callable[..., Any]) -> None:
    base = make_base("dinov2")
    backbone_config = copy.deepcopy(base.config)
    backbone_config.set_output_features_output_indices(out_features=["stage1", "stage2"], out_indices=None)
    dpt = DPTForDepthEstimation(
        DPTConfig(
            backbone_config=backbone_config,
            neck_hidden_sizes=[8, 8],
            reassemble_factors=[1, 1],
            fusion_hidden_size=8,
            head_in_index=-1,
        )
    )
    backbone: Any = dpt.backbone
    assert isinstance(backbone, Dinov2Backbone)
    backbone.load_state_dict(base.state_dict(), strict=False)
    assert fingerprint(dpt) == fingerprint(base)


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")])
def test_fingerprint_survives_a_cast(base: PreTrainedModel, dtype: torch.dtype, name: str) -> None:
    full = fingerprint(base)
    cast: Any = copy.deepcopy(base)
    cast.to(dtype)
    assert fingerprint(cast) == {name: full[name]}
    check(cast, full)
    # A half-precision model loaded wider is the same base, in that precision.
    check(cast.float(), {name: full[name]})


def test_fingerprint_of_a_float16_file_loaded_in_bfloat16(base: PreTrainedModel) -> None:
    stored = copy.deepcopy(base).half()
    expected = fingerprint(copy.deepcopy(stored).float())
    check(stored.to(torch.bfloat16), expected)


def test_float64_is_the_same_base(base: PreTrainedModel) -> None:
    expected = fingerprint(base)
    assert fingerprint(base.double()) == expected


@pytest.mark.parametrize("layer", [0, -1])
def test_fingerprint_sees_one_changed_weight(base: PreTrainedModel, layer: int) -> None:
    expected = fingerprint(base)
    with torch.no_grad():
        list(find_layer_stack(base).layers[layer].parameters())[-1].view(-1)[-1] += 0.5
    found = fingerprint(base)
    assert all(found[name] != expected[name] for name in expected)
    with pytest.raises(
        ValueError, match=r"trained on EXPECTED, but the base given is \w+ ''.*ignore_base_mismatch=True"
    ):
        check(base, expected)


def test_fingerprint_sees_swapped_layers(base: PreTrainedModel) -> None:
    expected, layers = fingerprint(base), find_layer_stack(base).layers
    first, last = layers[0], layers[1]
    layers[0], layers[1] = last, first
    assert fingerprint(base) != expected


def test_fingerprints_that_cannot_be_compared(base: PreTrainedModel) -> None:
    expected = fingerprint(copy.deepcopy(base).bfloat16())
    with pytest.raises(ValueError, match=r"cannot tell whether \w+ '' is EXPECTED.*\['bfloat16'\].*float32"):
        check(base.half(), expected)
    with pytest.raises(ValueError, match="cannot tell"):
        check(base.float(), {})


def test_fingerprint_needs_the_weights(base: PreTrainedModel) -> None:
    with pytest.raises(ValueError, match="meta device"):
        fingerprint(base.to("meta"))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("size", "side"), [(224, 224), ((224, 224), 224), ([16, 32], None), (None, None), ([518, 518], 518)]
)
def test_square_size(size: Any, side: int | None) -> None:
    assert square_size(size) == side
