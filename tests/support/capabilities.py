"""Capabilities by family: the table in docs/families.md, and a check for each of its cells.

`python -m tests.support.capabilities` writes the table; test_capabilities.py runs every check and compares the table.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoBackbone, AutoModelForImageClassification, PreTrainedModel

from robustness_tokens import (
    RobustnessTokenForImageClassification,
    RobustnessTokenModel,
    RobustnessTokenTrainer,
    RobustnessTokenTrainingArguments,
    extract_features,
    extract_tokens,
    inject_tokens,
    remove_tokens,
)
from robustness_tokens.data.image_processors import build_image_processor
from robustness_tokens.models.layer_stack import find_layer_stack
from robustness_tokens.models.merging import merge
from robustness_tokens.models.onnx_export import export_onnx
from tests.integration import test_families
from tests.support.families import DEIT3, EVA, FAMILIES, HIDDEN_SIZE, IMAGE_SIZE, Family, images


TABLE_FILE = Path(__file__).parents[2] / "docs" / "families.md"
START, END = "<!-- families:start -->", "<!-- families:end -->"

CAPABILITIES = ("inject", "deep", "train", "classify", "backbone", "compile", "merge", "ONNX")
NUM_TOKENS = 3
LEARNING_RATE = 0.01

NO_BACKBONE = "transformers has no Backbone class for this family"
NO_REGISTERS = "this family has no native registers"
ONE_TOWER = "train the tokens in its vision class, CLIPVisionModelWithProjection, and inject them here"


def timm_backbone(architecture: str, **model_args: Any) -> Family:
    """Returns the family of a tiny TimmBackbone."""

    def build() -> PreTrainedModel:
        make_config: Any = transformers.TimmBackboneConfig
        config = make_config(backbone=architecture, out_indices=[0, 1], use_pretrained_backbone=False)
        return transformers.TimmBackbone._from_config(config, **model_args).eval()

    return Family(build, images)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        base: Name in `families.BASES`.
        classifier: Name in `families.HEADS` of a classifier on the same layers.
        backbone: Name in `families.HEADS` of a transformers Backbone on the same layers, or such a Family.
        trained_on: Name in `families.BASES` of the base that its adapters are trained on, if that is another.
        no: Reasons against capabilities, by name; all others are "yes".
    """

    base: str
    classifier: str | None = None
    backbone: str | Family | None = None
    trained_on: str | None = None
    no: dict[str, str] = field(default_factory=dict)


TABLE: dict[str, Row] = {
    "ViT": Row("vit", "vit_classifier", no={"backbone": NO_BACKBONE, "merge": NO_REGISTERS}),
    "DeiT": Row("deit", "deit_classifier", no={"backbone": NO_BACKBONE, "merge": NO_REGISTERS}),
    "DINOv2": Row("dinov2", "dinov2_classifier", "dinov2_backbone"),
    "DINOv2 with registers": Row(
        "dinov2_with_registers", "dinov2_with_registers_classifier", "dinov2_with_registers_backbone"
    ),
    "DINOv3 ViT": Row(
        "dinov3_vit",
        None,
        "dinov3_vit_backbone",
        no={"classify": "transformers has no classifier class for this family"},
    ),
    "CLIPVisionModel": Row("clip_vision", "clip_classifier", no={"backbone": NO_BACKBONE, "merge": NO_REGISTERS}),
    "CLIPVisionModelWithProjection": Row(
        "clip_vision_projection", "clip_classifier", no={"backbone": NO_BACKBONE, "merge": NO_REGISTERS}
    ),
    "CLIPModel": Row(
        "clip_two_towers",
        "clip_classifier",
        trained_on="clip_vision_projection",
        no={
            "train": ONE_TOWER,
            "backbone": NO_BACKBONE,
            "merge": NO_REGISTERS,
            "ONNX": "export its vision tower instead",
        },
    ),
    "SigLIP": Row("siglip_vision", "siglip_classifier", no={"backbone": NO_BACKBONE, "merge": NO_REGISTERS}),
    "SigLIP 2": Row(
        "siglip2_vision",
        "siglip2_classifier",
        no={
            "backbone": NO_BACKBONE,
            "merge": NO_REGISTERS,
            "ONNX": "its inputs are patches with their mask and grid, not images",
        },
    ),
    "BEiT": Row("beit_relative", "beit_classifier", "beit_backbone", no={"merge": NO_REGISTERS}),
    "ViT-MAE": Row(
        "vit_mae",
        "vit_classifier",
        no={
            "backbone": NO_BACKBONE,
            "merge": NO_REGISTERS,
            "ONNX": "it shuffles its patches at random; load its weights as ViTModel and export that",
        },
    ),
    "I-JEPA": Row("ijepa", "ijepa_classifier", no={"backbone": NO_BACKBONE, "merge": NO_REGISTERS}),
    "AIMv2": Row(
        "aimv2",
        no={
            "classify": "transformers has no classifier class for this family",
            "backbone": NO_BACKBONE,
            "merge": NO_REGISTERS,
        },
    ),
    "timm ViT, DeiT-III": Row("timm_deit3", "timm_deit3_classifier", timm_backbone("vit_tiny_patch16_224", **DEIT3)),
    "timm Eva": Row("timm_eva", "timm_eva_classifier", timm_backbone("eva02_tiny_patch14_224", **EVA)),
}


def check_inject(row: Row, folder: Path) -> None:
    """Checks the outputs: same class and shapes, all changed by tokens, the base's bits when they are off or gone."""
    test_families.test_outputs_have_the_bases_class_and_shapes(row.base, "input")
    test_families.test_toggling_removing_and_injecting_again(row.base, "input")


def check_deep(row: Row, folder: Path) -> None:
    """Checks the same with tokens for each layer, and with all gains and shifts that the family takes."""
    test_families.test_outputs_have_the_bases_class_and_shapes(row.base, "deep")
    test_families.test_toggling_removing_and_injecting_again(row.base, "deep")


def check_train(row: Row, folder: Path) -> None:
    """Checks that a step of the trainer moves every token by the learning rate, and nothing else."""
    model = make_adapter(row.base)
    base = {name: tensor.clone() for name, tensor in model.get_base_model().state_dict().items()}
    tokens = model.robustness_tokens.detach().clone()
    pictures = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(2))
    args = RobustnessTokenTrainingArguments(
        output_dir=str(folder / "run"),
        max_steps=1,
        per_device_train_batch_size=2,
        num_attack_steps=2,
        learning_rate=LEARNING_RATE,
        disable_tqdm=True,
    )
    RobustnessTokenTrainer(model, args, [{"images": picture} for picture in pictures]).train()
    moved = (model.robustness_tokens.detach() - tokens).abs()
    assert moved.max() <= LEARNING_RATE * 1.001
    assert (moved > LEARNING_RATE / 2).float().mean() > 0.95  # Adam's first step is as long, whatever the gradient
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.get_base_model().state_dict().items())


def check_classify(row: Row, folder: Path) -> None:
    """Checks an adapter in a classifier of AutoModelForImageClassification on the same layers."""
    assert row.classifier is not None
    family = FAMILIES[row.classifier]
    classifier = family.build()
    assert type(classifier) in classes_of(AutoModelForImageClassification, classifier)
    check_stands_on(row, classifier, family, folder)


def check_backbone(row: Row, folder: Path) -> None:
    """Checks an adapter in the class of AutoBackbone on the same layers, and its effect on the feature maps."""
    assert row.backbone is not None
    family = FAMILIES[row.backbone] if isinstance(row.backbone, str) else row.backbone
    backbone = family.build()
    assert type(backbone) in classes_of(AutoBackbone, backbone)
    assert len(backbone(**family.inputs()).feature_maps) == 2
    check_stands_on(row, backbone, family, folder)


def check_compile(row: Row, folder: Path) -> None:
    """Checks that torch.compile makes one graph of the model, with tokens on and off."""
    test_families.test_compiles_as_one_graph(row.base, "input")


def check_merge(row: Row, folder: Path) -> None:
    """Checks that the merged model has the same features, and gives the tokens back bit for bit."""
    model = make_adapter(row.base)
    pixel_values = images()["pixel_values"]
    plain = model.merge_and_unload()
    with torch.no_grad():
        expected = model.get_features(pixel_values)
        found = extract_features(plain, pixel_values, feature_view=model.config.feature_view)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(extract_tokens(plain, num_robustness_tokens=NUM_TOKENS), model.robustness_tokens)


def check_onnx(row: Row, folder: Path) -> None:
    """Checks every output of ONNX Runtime, for a batch size that was not exported."""
    import onnxruntime

    model = inject_tokens(FAMILIES[row.base].build(), tokens())
    names = export_onnx(model, folder / "model.onnx")
    pixel_values = images()["pixel_values"][:1]
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    outputs = session.run(names, {"pixel_values": pixel_values.numpy()})
    with torch.no_grad():
        expected = model(pixel_values=pixel_values)
    assert names
    for name, output in zip(names, outputs, strict=True):
        torch.testing.assert_close(torch.from_numpy(output), expected[name], rtol=1e-4, atol=1e-4)


def refuse_train(row: Row, folder: Path) -> None:
    with pytest.raises(ValueError, match="has two towers: give from_base its vision model"):
        make_adapter(row.base)


def refuse_classify(row: Row, folder: Path) -> None:
    assert row.classifier is None
    base = FAMILIES[row.base].build()
    assert not classes_beside(base, "ForImageClassification")
    with pytest.raises(ValueError, match="no classification head"):
        RobustnessTokenForImageClassification.from_base(
            base, image_processor=build_image_processor(image_size=IMAGE_SIZE)
        )


def refuse_backbone(row: Row, folder: Path) -> None:
    assert row.backbone is None
    base = FAMILIES[row.base].build()
    assert not classes_beside(base, "Backbone")
    with pytest.raises(ValueError, match="for this kind of AutoModel: AutoBackbone"):
        AutoBackbone.from_config(base.config)


def refuse_merge(row: Row, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"no native registers .* ONNX"):
        merge(inject_tokens(FAMILIES[row.base].build(), tokens()))


def refuse_onnx(row: Row, folder: Path) -> None:
    model = inject_tokens(FAMILIES[row.base].build(), tokens())
    with pytest.raises(ValueError, match=r"has two towers|takes patches|gives other outputs at each call"):
        export_onnx(model, folder / "model.onnx", image_size=IMAGE_SIZE)
    assert not any(folder.iterdir())


Check = Callable[[Row, Path], None]
CHECKS: dict[str, Check] = dict(
    zip(
        CAPABILITIES,
        (
            check_inject,
            check_deep,
            check_train,
            check_classify,
            check_backbone,
            check_compile,
            check_merge,
            check_onnx,
        ),
        strict=True,
    )
)
REFUSALS: dict[str, Check] = {
    "train": refuse_train,
    "classify": refuse_classify,
    "backbone": refuse_backbone,
    "merge": refuse_merge,
    "ONNX": refuse_onnx,
}


def tokens() -> Tensor:
    return torch.randn(NUM_TOKENS, HIDDEN_SIZE, generator=torch.Generator().manual_seed(3))


def make_adapter(name: str) -> RobustnessTokenModel:
    """Returns a base with tokens that change its outputs."""
    model = RobustnessTokenModel.from_base(
        FAMILIES[name].build(),
        num_robustness_tokens=NUM_TOKENS,
        image_processor=build_image_processor(image_size=IMAGE_SIZE),
    )
    with torch.no_grad():
        model.robustness_tokens.copy_(tokens())
    return model


def check_stands_on(row: Row, model: PreTrainedModel, family: Family, folder: Path) -> None:
    """Checks a saved adapter of the row's base in a model on the same layers, which keeps its head and outputs."""
    adapter = make_adapter(row.trained_on or row.base)
    adapter.save_pretrained(folder / "adapter")
    weights = find_layer_stack(adapter.unload()).layers.state_dict()
    find_layer_stack(model).layers.load_state_dict(weights)
    case = test_families.Case(model, family.inputs(), family)
    before = case.run()
    inject_tokens(model, folder / "adapter")
    after = case.run()
    assert type(after) is type(before)
    assert test_families.shapes(after) == test_families.shapes(before)
    for path, tensor in test_families.main_outputs(after).items():
        assert tensor.isfinite().all()
        assert not torch.allclose(tensor, test_families.main_outputs(before)[path]), f"the tokens don't reach {path}"
    remove_tokens(model)
    test_families.assert_equal(case.run(), before)


def classes_of(auto_class: Any, model: PreTrainedModel) -> tuple[type, ...]:
    """Returns the classes that an Auto class maps a model's config to."""
    found = auto_class._model_mapping[type(model.config)]
    return found if isinstance(found, tuple) else (found,)


def classes_beside(base: PreTrainedModel, suffix: str) -> list[str]:
    """Returns the names of the classes in a base's module with a given ending."""
    return [name for name in vars(sys.modules[type(base).__module__]) if name.endswith(suffix)]


def render_table() -> str:
    """Returns the table in Markdown, with the reason for every "no" under it."""
    reasons: list[str] = []
    lines = [f"| family | {' | '.join(CAPABILITIES)} |", f"|---|{'---|' * len(CAPABILITIES)}"]
    for title, row in TABLE.items():
        cells = []
        for capability in CAPABILITIES:
            reason = row.no.get(capability)
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    notes = [f"{number}. {reason}" for number, reason in enumerate(reasons, start=1)]
    return "\n".join([*lines, "", *notes])


def written_table(text: str) -> str:
    """Returns the table between the markers of a text."""
    return text.partition(START)[2].partition(END)[0].strip()


def with_table(text: str, table: str) -> str:
    """Returns a text with the table between its markers."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"no {START} followed by {END} in the text: put these lines where the table belongs")
    return f"{before}{START}\n{table}\n{END}{after}"


if __name__ == "__main__":
    TABLE_FILE.write_text(with_table(TABLE_FILE.read_text(encoding="utf-8"), render_table()), encoding="utf-8")
