"""Every family that robustness tokens go into: a tiny random model, inputs for it, and what to expect of it.

All are 2 layers deep and 32 wide. Weights are the same at each call, and large, so that tokens visibly change every
output. Dropout and drop path show if a base is left in training mode.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel


BATCH_SIZE, IMAGE_SIZE, PATCH_SIZE, HIDDEN_SIZE, NUM_LABELS = 2, 16, 8, 32, 5
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2

SIZES: dict[str, Any] = {
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.2,
    "num_labels": NUM_LABELS,
}
VIT = {**SIZES, "hidden_dropout_prob": 0.3}
DINOV2 = {**SIZES, "hidden_dropout_prob": 0.3, "mlp_ratio": 2, "drop_path_rate": 0.3}
DINOV3 = {**SIZES, "num_register_tokens": 2, "pos_embed_rescale": 2.0, "layerscale_value": 0.5, "drop_path_rate": 0.3}
BEIT = {**VIT, "drop_path_rate": 0.3, "use_mask_token": False}
MAE = {**VIT, "mask_ratio": 0.0, "decoder_hidden_size": 16, "decoder_num_hidden_layers": 1}
MAE |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 16}
CLIP = {**SIZES, "projection_dim": 24}
TEXT: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT |= {"vocab_size": 50, "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
TIMM: dict[str, Any] = {"img_size": IMAGE_SIZE, "patch_size": PATCH_SIZE, "embed_dim": HIDDEN_SIZE, "depth": 2}
TIMM |= {"num_heads": 4, "drop_path_rate": 0.3}
# DeiT-III's, as timm/deit3_small_patch16_224.fb_in1k has them.
DEIT3 = {**TIMM, "no_embed_class": True, "init_values": 0.5}
EVA = {**TIMM, "use_rot_pos_emb": True, "use_abs_pos_emb": True, "ref_feat_shape": (2, 2), "num_reg_tokens": 1}

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """One class of model.

    Attributes:
        build: Makes the model, in eval mode; keywords go to it (`attn_implementation`).
        inputs: Makes the inputs of its forward, `pixel_values` first.
        recorded: Which of "hidden_states" and "attentions" its forward can record.
        prefix: Tokens before the patches in its last hidden state: "cls", "register", "distillation".
        implementations: Allowed values of `attn_implementation`; timm chooses by itself.
        can_pickle: False for transformers' Backbones, which hold local functions.
    """

    build: Callable[..., Any]
    inputs: Callable[[], Inputs]
    recorded: tuple[str, ...] = ("hidden_states", "attentions")
    prefix: tuple[str, ...] = ("cls",)
    implementations: tuple[str, ...] = ("eager", "sdpa")
    can_pickle: bool = True


def images() -> Inputs:
    """Returns (2, 3, 16, 16) normalised images."""
    return {"pixel_values": torch.randn(BATCH_SIZE, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator())}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def mae_inputs() -> Inputs:
    return {**images(), "noise": torch.arange(float(NUM_PATCHES)).expand(BATCH_SIZE, -1)}


def masked_images() -> Inputs:
    """Returns images with an attention mask over [CLS, patches] that hides the second image's last patch."""
    mask = torch.ones(BATCH_SIZE, 1 + NUM_PATCHES, dtype=torch.long)
    mask[1, -1] = 0
    return {**images(), "attention_mask": mask}


def siglip2_inputs() -> Inputs:
    """Returns patches as SigLIP 2's processor makes them; the second image is smaller, hence padded and masked."""
    pixel_values = torch.randn(BATCH_SIZE, NUM_PATCHES, 3 * PATCH_SIZE**2, generator=generator())
    mask = torch.ones(BATCH_SIZE, NUM_PATCHES, dtype=torch.int32)
    mask[1, 2:] = 0
    return {
        "pixel_values": pixel_values,
        "pixel_attention_mask": mask,
        "spatial_shapes": torch.tensor([[2, 2], [1, 2]]),
    }


def text_inputs() -> Inputs:
    return {"input_ids": torch.tensor([[0, 5, 7, 1], [0, 9, 3, 1]])}


def hf(model_class: str, config: Any, **config_kwargs: Any) -> Callable[..., Any]:
    """Returns a builder of a transformers model, from a config class's name or a function that makes the config."""

    def build(**kwargs: Any) -> PreTrainedModel:
        made = getattr(transformers, config)(**config_kwargs) if isinstance(config, str) else config()
        return _seeded(lambda: getattr(transformers, model_class)._from_config(made, **kwargs))

    return build


def timm(model_class: str, architecture: str, **model_args: Any) -> Callable[..., Any]:
    """Returns a builder of a timm model inside its transformers wrapper."""

    def build(**kwargs: Any) -> PreTrainedModel:
        make_config: Any = transformers.TimmWrapperConfig
        config = make_config(architecture=architecture, model_args=model_args, num_labels=NUM_LABELS, do_pooling=True)
        return _seeded(lambda: getattr(transformers, model_class)._from_config(config, **kwargs))

    return build


def _seeded(make: Callable[[], Any]) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = make().eval()
        for parameter in model.parameters():
            # Zero biases would hide mistakes; large weights show what tokens change.
            parameter.data.add_(torch.randn(parameter.shape) * 0.1)
    return model


def two_towers(stem: str, vision: dict[str, Any], **kwargs: Any) -> Callable[[], Any]:
    """Returns a function that makes the config of a two-tower model."""

    def make() -> Any:
        text = {**TEXT, **({"projection_size": HIDDEN_SIZE} if stem.startswith("Siglip") else {})}
        return getattr(transformers, f"{stem}Config")(text_config=text, vision_config=vision, **kwargs)

    return make


def dpt(**kwargs: Any) -> PreTrainedModel:
    model = hf("DPTForDepthEstimation", dpt_config)(**kwargs)
    model.head.head[-2].bias.data.fill_(5.0)  # the last ReLU must let something through
    return model


def dpt_config() -> Any:
    make: Any = transformers.Dinov2Config
    backbone = make(
        **{**DINOV2, "num_hidden_layers": 4},
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
        apply_layernorm=True,
    )
    return transformers.DPTConfig(
        backbone_config=backbone,
        is_hybrid=False,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        reassemble_factors=[1, 1, 1, 0.5],
    )


def upernet_config() -> Any:
    make: Any = transformers.BeitConfig
    backbone = make(
        **{**BEIT, "num_hidden_layers": 4, "use_relative_position_bias": True},
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    make = transformers.UperNetConfig
    return make(
        backbone_config=backbone, hidden_size=16, pool_scales=[1, 2], auxiliary_channels=8, num_labels=NUM_LABELS
    )


SIGLIP2 = {key: value for key, value in SIZES.items() if key != "image_size"} | {"num_patches": NUM_PATCHES}
BACKBONE = {"out_features": ["stage1", "stage2"]}
HIDDEN_ONLY = ("hidden_states",)
REGISTERS = ("cls", "register", "register")

# Bases.
BASES: dict[str, Family] = {
    "vit": Family(hf("ViTModel", "ViTConfig", **VIT), images),
    "vit_masked": Family(hf("ViTModel", "ViTConfig", **VIT), masked_images),
    "deit": Family(hf("DeiTModel", "DeiTConfig", **VIT), images, prefix=("cls", "distillation")),
    "dinov2": Family(hf("Dinov2Model", "Dinov2Config", **DINOV2), images),
    "dinov2_with_registers": Family(
        hf("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", **DINOV2, num_register_tokens=2),
        images,
        prefix=REGISTERS,
    ),
    "dinov3_vit": Family(hf("DINOv3ViTModel", "DINOv3ViTConfig", **DINOV3), images, prefix=REGISTERS),
    "clip_vision": Family(hf("CLIPVisionModel", "CLIPVisionConfig", **CLIP), images),
    "clip_vision_projection": Family(hf("CLIPVisionModelWithProjection", "CLIPVisionConfig", **CLIP), images),
    "clip_two_towers": Family(
        hf("CLIPModel", two_towers("CLIP", CLIP, projection_dim=24)),
        lambda: {**images(), **text_inputs()},
    ),
    "siglip_vision": Family(hf("SiglipVisionModel", "SiglipVisionConfig", **SIZES), images, prefix=()),
    "siglip2_vision": Family(hf("Siglip2VisionModel", "Siglip2VisionConfig", **SIGLIP2), siglip2_inputs, prefix=()),
    "beit_absolute": Family(
        hf("BeitModel", "BeitConfig", **BEIT, use_absolute_position_embeddings=True, use_mean_pooling=False), images
    ),
    "beit_relative": Family(hf("BeitModel", "BeitConfig", **BEIT, use_relative_position_bias=True), images),
    "beit_shared": Family(hf("BeitModel", "BeitConfig", **BEIT, use_shared_relative_position_bias=True), images),
    "vit_mae": Family(hf("ViTMAEModel", "ViTMAEConfig", **MAE), mae_inputs),
    "ijepa": Family(hf("IJepaModel", "IJepaConfig", **VIT), images, prefix=()),
    "aimv2": Family(hf("Aimv2VisionModel", "Aimv2VisionConfig", **SIZES), images, prefix=()),
    "timm_deit3": Family(
        timm("TimmWrapperModel", "vit_tiny_patch16_224", **DEIT3), images, recorded=HIDDEN_ONLY, implementations=()
    ),
    "timm_vit_registers": Family(
        timm("TimmWrapperModel", "vit_tiny_patch16_224", **DEIT3, reg_tokens=2),
        images,
        recorded=HIDDEN_ONLY,
        prefix=REGISTERS,
        implementations=(),
    ),
    "timm_vit_no_cls": Family(
        timm("TimmWrapperModel", "vit_tiny_patch16_224", **TIMM, class_token=False, global_pool="avg"),
        images,
        recorded=HIDDEN_ONLY,
        prefix=(),
        implementations=(),
    ),
    "timm_vit_registers_no_cls": Family(
        timm("TimmWrapperModel", "vit_tiny_patch16_224", **TIMM, class_token=False, reg_tokens=2, global_pool="avg"),
        images,
        recorded=HIDDEN_ONLY,
        prefix=("register", "register"),
        implementations=(),
    ),
    "timm_eva": Family(
        timm("TimmWrapperModel", "eva02_tiny_patch14_224", **EVA),
        images,
        recorded=HIDDEN_ONLY,
        prefix=("cls", "register"),
        implementations=(),
    ),
}

# Models on a base, which the same mechanism finds inside.
HEADS: dict[str, Family] = {
    "vit_classifier": Family(hf("ViTForImageClassification", "ViTConfig", **VIT), images),
    "deit_classifier": Family(
        hf("DeiTForImageClassificationWithTeacher", "DeiTConfig", **VIT), images, prefix=("cls", "distillation")
    ),
    "dinov2_classifier": Family(hf("Dinov2ForImageClassification", "Dinov2Config", **DINOV2), images),
    "dinov2_with_registers_classifier": Family(
        hf("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", **DINOV2, num_register_tokens=2),
        images,
        prefix=REGISTERS,
    ),
    "clip_classifier": Family(
        hf("CLIPForImageClassification", two_towers("CLIP", CLIP, projection_dim=24, num_labels=NUM_LABELS)), images
    ),
    "siglip_classifier": Family(
        hf("SiglipForImageClassification", two_towers("Siglip", SIZES, num_labels=NUM_LABELS)), images, prefix=()
    ),
    "siglip2_classifier": Family(
        hf("Siglip2ForImageClassification", two_towers("Siglip2", SIGLIP2, num_labels=NUM_LABELS)),
        siglip2_inputs,
        prefix=(),
    ),
    "beit_classifier": Family(
        hf("BeitForImageClassification", "BeitConfig", **BEIT, use_relative_position_bias=True), images
    ),
    "ijepa_classifier": Family(hf("IJepaForImageClassification", "IJepaConfig", **VIT), images, prefix=()),
    "vit_mae_pretraining": Family(
        hf("ViTMAEForPreTraining", "ViTMAEConfig", **{**MAE, "mask_ratio": 0.5}), mae_inputs
    ),
    "timm_deit3_classifier": Family(
        timm("TimmWrapperForImageClassification", "vit_tiny_patch16_224", **DEIT3),
        images,
        recorded=HIDDEN_ONLY,
        implementations=(),
    ),
    "timm_eva_classifier": Family(
        timm("TimmWrapperForImageClassification", "eva02_tiny_patch14_224", **EVA),
        images,
        recorded=HIDDEN_ONLY,
        prefix=("cls", "register"),
        implementations=(),
    ),
    "dinov2_backbone": Family(hf("Dinov2Backbone", "Dinov2Config", **DINOV2, **BACKBONE), images, can_pickle=False),
    "dinov2_with_registers_backbone": Family(
        hf(
            "Dinov2WithRegistersBackbone",
            "Dinov2WithRegistersConfig",
            **DINOV2,
            **BACKBONE,
            num_register_tokens=2,
        ),
        images,
        prefix=REGISTERS,
        can_pickle=False,
    ),
    "dinov3_vit_backbone": Family(
        hf("DINOv3ViTBackbone", "DINOv3ViTConfig", **DINOV3, **BACKBONE), images, prefix=REGISTERS, can_pickle=False
    ),
    "beit_backbone": Family(
        hf("BeitBackbone", "BeitConfig", **BEIT, **BACKBONE, use_relative_position_bias=True), images, can_pickle=False
    ),
    "dpt_on_dinov2": Family(dpt, images, can_pickle=False),
    "upernet_on_beit": Family(
        hf("UperNetForSemanticSegmentation", upernet_config), images, implementations=("eager",), can_pickle=False
    ),
}

FAMILIES = {**BASES, **HEADS}
