"""Tests every cell of the table of families in docs/families.md."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import ViTModel

from robustness_tokens import extract_features, inject_tokens
from tests.support.capabilities import (
    CAPABILITIES,
    CHECKS,
    END,
    REFUSALS,
    START,
    TABLE,
    TABLE_FILE,
    make_adapter,
    render_table,
    with_table,
    written_table,
)
from tests.support.families import BASES, HEADS, images


# Seconds each: of these the fast tests see one family here, and more in test_families.py and test_onnx_export.py.
SLOW, SAMPLE = ("compile", "ONNX"), "ViT"


def cells() -> list[Any]:
    found = []
    for title, row in TABLE.items():
        for capability in CAPABILITIES:
            is_slow = capability in SLOW and title != SAMPLE and capability not in row.no
            marks = [pytest.mark.slow] if is_slow else []
            found.append(pytest.param(title, capability, marks=marks, id=f"{title}-{capability}"))
    return found


@pytest.mark.parametrize(("title", "capability"), cells())
def test_cell(title: str, capability: str, tmp_path: Path) -> None:
    if capability == "ONNX":
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package, reason=f"{package} is not installed: the cell is not checked")
    row = TABLE[title]
    checks = REFUSALS if capability in row.no else CHECKS
    checks[capability](row, tmp_path)


def test_every_classifier_and_backbone_that_is_registered_is_in_the_table() -> None:
    used = {name for row in TABLE.values() for name in (row.classifier, row.backbone) if isinstance(name, str)}
    assert used == {name for name in HEADS if name.endswith(("_classifier", "_backbone"))}


def test_every_base_is_in_the_table_or_a_variant_of_one() -> None:
    variants = {"vit_masked", "beit_shared", "beit_absolute"}
    variants |= {"timm_vit_registers", "timm_vit_no_cls", "timm_vit_registers_no_cls"}
    assert {row.base for row in TABLE.values()} == BASES.keys() - variants


def test_the_document_holds_the_table() -> None:
    text = TABLE_FILE.read_text(encoding="utf-8")
    assert written_table(text) == render_table(), "run `python -m tests.support.capabilities`"
    assert with_table(text, render_table()) == text


def test_the_table_has_a_line_for_each_family_and_a_note_for_each_reason() -> None:
    table, _, notes = render_table().partition("\n\n")
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    reasons = dict(note.split(". ", maxsplit=1) for note in notes.splitlines())
    assert lines[0] == ["family", *CAPABILITIES]
    assert [line[0] for line in lines[2:]] == list(TABLE)
    for title, *cells_of_row in lines[2:]:
        for capability, cell in zip(CAPABILITIES, cells_of_row, strict=True):
            reason = TABLE[title].no.get(capability)
            assert cell == "yes" if reason is None else reasons[cell.removeprefix("no (").removesuffix(")")] == reason


def test_writing_replaces_what_is_between_the_markers_and_nothing_else() -> None:
    text = f"before\n{START}\nold\n{END}\nafter\n"
    assert with_table(text, "new") == f"before\n{START}\nnew\n{END}\nafter\n"
    assert written_table(with_table(text, "new")) == "new"


@pytest.mark.parametrize("text", ["no markers", f"one {START}", f"{END} {START}"])
def test_a_text_without_markers_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="put these lines where the table belongs"):
        with_table(text, "new")


def test_the_weights_of_a_vit_mae_are_those_of_a_vit(tmp_path: Path) -> None:
    """Follows the table's advice for ONNX: the adapter goes into ViTModel, which sees all patches in their order."""
    adapter = make_adapter("vit_mae")
    adapter.get_base_model().save_pretrained(tmp_path / "base")
    adapter.save_pretrained(tmp_path / "adapter")
    vit = ViTModel.from_pretrained(tmp_path / "base").eval()
    inject_tokens(vit, tmp_path / "adapter")
    pixel_values = images()["pixel_values"]
    with torch.no_grad():
        found = extract_features(vit, pixel_values, feature_view="cls_and_patches")
        expected = adapter.get_features(pixel_values)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
