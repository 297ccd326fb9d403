"""Checks the paper's f for every family against slices of the base's output."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.siglip2.image_processing_siglip2 import convert_image_to_patches

from robustness_tokens.attacks.objectives import cosine_similarity
from robustness_tokens.configuration import FeatureView
from robustness_tokens.models.features import count_patches, default_feature_view, extract_features
from robustness_tokens.models.injection import attach_tokens
from robustness_tokens.models.layer_stack import headless_model
from tests.support.families import BASES, FAMILIES, HEADS, HIDDEN_SIZE, MAE, NUM_PATCHES, PATCH_SIZE, hf, images


CLIP = {"clip_vision", "clip_vision_projection", "clip_two_towers", "clip_classifier"}
# A Backbone gives maps, and what stands on one has no features of its own.
NO_FEATURES = ["dinov2_backbone", "dinov2_with_registers_backbone", "dinov3_vit_backbone", "dpt_on_dinov2"]
NO_FEATURES += ["upernet_on_beit"]
WITH_FEATURES = [name for name in FAMILIES if name not in NO_FEATURES]
CLASSIFIERS = [name for name in HEADS if name.endswith("classifier")]


def extract(name: str, model: Any, view: FeatureView) -> Tensor:
    inputs = dict(FAMILIES[name].inputs())
    inputs.pop("input_ids", None)
    inputs.pop("noise", None)
    with torch.no_grad():
        return extract_features(model, inputs.pop("pixel_values"), feature_view=view, **inputs)


def last_hidden_state(name: str, model: Any) -> Tensor:
    """Returns the base's last hidden state, under any head."""
    inputs = FAMILIES[name].inputs()
    with torch.no_grad():
        if name == "clip_two_towers":
            state = model(**inputs).vision_model_output.last_hidden_state
        elif name.startswith("timm"):
            state = model.timm_model.forward_features(inputs["pixel_values"])
        elif name == "vit_mae_pretraining":
            model.config.mask_ratio = 0.0
            state = model.vit(**inputs).last_hidden_state
            model.config.mask_ratio = 0.5
        elif name in HEADS:
            state = getattr(model, _trunk_name(name))(**inputs).last_hidden_state
        else:
            state = model(**inputs).last_hidden_state
    assert isinstance(state, Tensor)
    return state


def _trunk_name(name: str) -> str:
    stem = name.removesuffix("_classifier").removesuffix("_backbone")
    return "vision_model" if stem in ("clip", "siglip", "siglip2") else stem


@pytest.mark.parametrize("injected", [False, True], ids=["base", "tokens"])
@pytest.mark.parametrize("name", WITH_FEATURES)
def test_views_are_slices_of_the_last_hidden_state(name: str, injected: bool) -> None:
    family = FAMILIES[name]
    model = family.build()
    if injected:
        attach_tokens(model, torch.randn(3, HIDDEN_SIZE))
    state = last_hidden_state(name, model)
    # Left to right: what the family says stands before the patches, then the patches.
    assert state.shape[1] == len(family.prefix) + NUM_PATCHES
    patches = torch.stack([state[:, len(family.prefix) + index] for index in range(NUM_PATCHES)], dim=1)
    assert torch.equal(extract(name, model, "patches"), patches)
    if "cls" in family.prefix:
        cls = state[:, family.prefix.index("cls")]
        assert torch.equal(extract(name, model, "cls"), cls)
        assert torch.equal(extract(name, model, "cls_and_patches"), torch.cat([cls[:, None], patches], dim=1))
    else:
        assert torch.equal(extract(name, model, "cls_and_patches"), patches)
        with pytest.raises(ValueError, match='has no CLS token: choose feature_view="cls_and_patches"'):
            extract(name, model, "cls")


@pytest.mark.parametrize("name", [name for name in BASES if name not in ("vit_mae", "ijepa")])
def test_pooled_is_the_bases_own_pooled_output(name: str) -> None:
    model = FAMILIES[name].build()
    with torch.no_grad():
        output = model(**FAMILIES[name].inputs())
    if name == "clip_two_towers":  # it normalises what its get_image_features gives
        pooled = extract(name, model, "pooled")
        torch.testing.assert_close(nn.functional.normalize(pooled, dim=-1), output.image_embeds)
        return
    expected = output.image_embeds if name == "clip_vision_projection" else output.pooler_output
    assert torch.equal(extract(name, model, "pooled"), expected)


@pytest.mark.parametrize("name", ["vit_mae", "ijepa"])
def test_families_without_pooled_output_say_so(name: str) -> None:
    with pytest.raises(ValueError, match='has no pooled output: choose feature_view="cls_and_patches"'):
        extract(name, FAMILIES[name].build(), "pooled")


@pytest.mark.parametrize("name", list(FAMILIES))
def test_default_view_is_the_papers(name: str) -> None:
    assert default_feature_view(FAMILIES[name].build()) == ("pooled" if name in CLIP else "cls_and_patches")


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_the_head_is_not_run(name: str) -> None:
    model = FAMILIES[name].build()
    calls: list[str] = []
    for module_name, module in model.named_modules():
        if module_name.rpartition(".")[2] in ("classifier", "cls_classifier", "distillation_classifier", "head"):
            if name.startswith("siglip") and module_name != "classifier":
                continue  # the pooling head is the base's own
            module.register_forward_hook(lambda module, args, output, path=module_name: calls.append(path))
    extract(name, model, "cls_and_patches")
    assert calls == []
    with torch.no_grad():
        model(**FAMILIES[name].inputs())
    assert calls


@pytest.mark.parametrize("name", NO_FEATURES)
def test_what_has_no_features_says_so(name: str) -> None:
    with pytest.raises(ValueError, match="pass the headless model"):
        extract(name, FAMILIES[name].build(), "cls_and_patches")


def test_mae_sees_all_patches_in_order_whatever_its_mask_ratio() -> None:
    masking = hf("ViTMAEModel", "ViTMAEConfig", **{**MAE, "mask_ratio": 0.75})()
    expected = extract("vit_mae", FAMILIES["vit_mae"].build(), "cls_and_patches")
    for _ in range(2):
        assert torch.equal(extract("vit_mae", masking, "cls_and_patches"), expected)
    assert masking.config.mask_ratio == 0.75
    with pytest.raises(ValueError, match="channel dimension"), torch.no_grad():
        extract_features(masking, torch.zeros(1, 1, 16, 16), feature_view="cls")
    assert masking.config.mask_ratio == 0.75


def test_siglip2_takes_images_as_its_processor_cuts_them() -> None:
    model, pictures = FAMILIES["siglip2_vision"].build(), torch.rand(2, 3, 16, 16)
    patches = torch.stack([convert_image_to_patches(picture, PATCH_SIZE) for picture in pictures])
    shapes = torch.tensor([[2, 2], [2, 2]])
    processed = {"pixel_attention_mask": torch.ones(2, NUM_PATCHES), "spatial_shapes": shapes}
    with torch.no_grad():
        expected = extract_features(model, patches, feature_view="pooled", **processed)
        actual = extract_features(model, pictures, feature_view="pooled")
    torch.testing.assert_close(actual, expected)


def test_siglip2_features_are_differentiable_in_the_image() -> None:
    pictures = torch.rand(1, 3, 16, 24, requires_grad=True)
    features = extract_features(FAMILIES["siglip2_vision"].build(), pictures, feature_view="patches")
    assert features.shape == (1, 6, HIDDEN_SIZE)
    features.square().sum().backward()
    assert pictures.grad is not None
    assert (pictures.grad != 0).all()


@pytest.mark.parametrize(("height", "width", "patches"), [(16, 16, 4), (24, 16, 6), (30, 17, 6)])
@pytest.mark.parametrize("name", ["dinov2", "clip_two_towers", "timm_deit3", "siglip2_vision"])
def test_count_patches(name: str, height: int, width: int, patches: int) -> None:
    headless = headless_model(FAMILIES[name].build())
    assert count_patches(headless, torch.zeros(1, 3, height, width)) == patches
    assert count_patches(headless, torch.zeros(1, 7, 192)) == 7


@pytest.mark.parametrize("axis", ["token", "feature"])
def test_both_similarity_axes(axis: Any) -> None:
    model = FAMILIES["dinov2"].build()
    pixel_values = images()["pixel_values"]
    with torch.no_grad():
        one = extract_features(model, pixel_values, feature_view="cls_and_patches")
        other = extract_features(model, pixel_values.flip(3), feature_view="cls_and_patches")
    dim = {"token": 1, "feature": 2}[axis]
    dots = (one * other).sum(dim) / (one.norm(dim=dim) * other.norm(dim=dim))
    torch.testing.assert_close(cosine_similarity(one, other, similarity_axis=axis), dots.mean(dim=1))
