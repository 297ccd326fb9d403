import copy
import inspect
import json
import os
import pickle
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator, cpu_offload
from packaging.version import Version
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    Trainer,
    TrainingArguments,
    pipeline,
)

from robustness_tokens.configuration import RobustnessTokenConfig, state_digest
from robustness_tokens.data import build_image_processor
from robustness_tokens.hub import load_adapter, push_adapter
from robustness_tokens.models.injection import find_injector, remove_tokens
from robustness_tokens.models.layer_stack import find_layer_stack, headless_model
from robustness_tokens.models.modeling import (
    RobustnessTokenForImageClassification,
    RobustnessTokenModel,
    inject_tokens,
)
from tests.support.adapters import cache_as_repo
from tests.support.bases import build_base
from tests.support.families import BASES, FAMILIES
from tests.support.reports import make_report, report_on


ADAPTER_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}
NUM_TOKENS, HIDDEN_SIZE = 3, 32

MakeBase = Callable[..., Any]
Folders = dict[str, Path]


def randomize(model: Any) -> Any:
    """Gives a model tokens that matter; new ones are tiny."""
    with torch.no_grad():
        model.robustness_tokens.normal_()
    return model


@pytest.fixture
def model(family: str, base_folders: Folders) -> RobustnessTokenModel:
    """Builds each family from its folder, with three tokens that change its outputs."""
    return randomize(RobustnessTokenModel.from_base(base_folders[family], num_robustness_tokens=NUM_TOKENS))


@pytest.fixture
def dinov2_model(base_folders: Folders) -> RobustnessTokenModel:
    return randomize(RobustnessTokenModel.from_base(base_folders["dinov2"], num_robustness_tokens=NUM_TOKENS))


def flat(output: Any) -> dict[str, Tensor]:
    """Lists every tensor of an output, detached, with tuples of tensors unrolled."""
    tensors = {}
    for key, value in output.items():
        for index, tensor in enumerate(value if isinstance(value, tuple) else (value,)):
            tensors[f"{key}.{index}"] = tensor.detach()
    return tensors


def assert_same_outputs(first: Any, second: Any) -> None:
    """Asserts bit-equal outputs."""
    one, two = flat(first), flat(second)
    assert set(one) == set(two)
    assert [key for key in one if not torch.equal(one[key], two[key])] == []


def last_hidden_state(model: nn.Module, pixel_values: Tensor) -> Tensor:
    with torch.no_grad():
        state: Tensor = model(pixel_values=pixel_values).last_hidden_state
    return state


def logits(model: nn.Module, pixel_values: Tensor) -> Tensor:
    with torch.no_grad():
        result: Tensor = model(pixel_values=pixel_values).logits
    return result


def classifier_on(base: PreTrainedModel, family: str, make_base: MakeBase) -> Any:
    """Returns a classifier in memory on top of that base."""
    classifier = make_base(family, classifier=True)
    headless_model(classifier).load_state_dict(base.state_dict(), strict=False)
    return classifier


# New tokens


def test_new_tokens_have_the_papers_defaults(base_folders: Folders) -> None:
    model = RobustnessTokenModel.from_base(base_folders["dinov2"])
    assert model.robustness_tokens.shape == (10, HIDDEN_SIZE)
    assert model.robustness_tokens.dtype == torch.float32
    assert model.config.feature_view == "cls_and_patches"
    assert not model.training


@pytest.mark.parametrize("initializer_range", [0.01, 0.5])
def test_new_tokens_are_normal(make_base: MakeBase, initializer_range: float) -> None:
    model = RobustnessTokenModel.from_base(
        make_base("vit"), num_robustness_tokens=1000, initializer_range=initializer_range
    )
    assert model.robustness_tokens.std().item() == pytest.approx(initializer_range, rel=0.03)
    assert model.robustness_tokens.mean().item() == pytest.approx(0, abs=0.03 * initializer_range)


def test_the_seed_decides_the_new_tokens(make_base: MakeBase) -> None:
    def tokens(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return RobustnessTokenModel.from_base(make_base("vit")).robustness_tokens

    assert torch.equal(tokens(3), tokens(3))
    assert not torch.equal(tokens(3), tokens(4))


def test_the_config_describes_the_base(family: str, make_base: MakeBase, base_folders: Folders) -> None:
    config = RobustnessTokenModel.from_base(base_folders[family], num_robustness_tokens=4).config
    assert config.base_model_name_or_path == str(base_folders[family])
    assert config.base_model_revision is None
    assert config.base_model_class == type(make_base(family)).__name__
    assert (config.num_robustness_tokens, config.hidden_size) == (4, HIDDEN_SIZE)
    assert config.image_mean == [0.485, 0.456, 0.406]
    assert config.image_std == [0.229, 0.224, 0.225]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_robustness_tokens": 0}, "num_robustness_tokens must be a whole number"),
        ({"num_robustness_tokens": -1}, "num_robustness_tokens"),
        ({"num_robustness_tokens": 2.5}, "num_robustness_tokens"),
        ({"initializer_range": -1.0}, "initializer_range"),
        ({"initializer_range": float("nan")}, "initializer_range"),
        ({"feature_view": "cls_token"}, "feature_view"),
        ({"similarity_axis": "both"}, "similarity_axis"),
        ({"image_mean": [0.5]}, "image_mean"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std"),
        ({"image_mean": [float("nan"), 0.5, 0.5]}, "image_mean"),
    ],
)
def test_from_base_refuses_bad_values(make_base: MakeBase, arguments: dict[str, Any], message: str) -> None:
    base = make_base("dinov2")
    with pytest.raises(ValueError, match=message):
        RobustnessTokenModel.from_base(base, **arguments)
    assert find_injector(base) is None  # the base is not left with half an adapter in it


def test_normalisation_can_be_chosen(base_folders: Folders, tmp_path: Path) -> None:
    mean, std = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
    model = RobustnessTokenModel.from_base(base_folders["vit"], image_mean=mean, image_std=std)
    assert (model.config.image_mean, model.config.image_std) == (mean, std)
    model.save_pretrained(tmp_path)
    processor: Any = AutoImageProcessor.from_pretrained(tmp_path)
    assert (list(processor.image_mean), list(processor.image_std)) == (mean, std)


# On and off


def test_tokens_off_is_the_base_bit_for_bit(
    model: RobustnessTokenModel, family: str, make_base: MakeBase, pixel_values: Tensor
) -> None:
    expected = make_base(family)(pixel_values=pixel_values, output_hidden_states=True)
    with model.disable_adapter():
        assert_same_outputs(model(pixel_values=pixel_values, output_hidden_states=True), expected)


def test_tokens_on_change_the_values_and_keep_the_shapes(
    family: str, make_base: MakeBase, pixel_values: Tensor
) -> None:
    base = make_base(family, attn_implementation="eager")
    asked = {"pixel_values": pixel_values, "output_hidden_states": True, "output_attentions": True}
    before = base(**asked)
    model = randomize(RobustnessTokenModel.from_base(base, num_robustness_tokens=NUM_TOKENS))
    after = model(**asked)
    assert type(after) is type(before)
    assert {"hidden_states.2", "attentions.1"} <= set(flat(before))
    assert {k: v.shape for k, v in flat(after).items()} == {k: v.shape for k, v in flat(before).items()}
    assert (after.last_hidden_state - before.last_hidden_state).abs().max() > 0.01
    assert torch.equal(after.hidden_states[0], before.hidden_states[0])  # tokens come after the embeddings
    # The attention that went to the tokens is gone from the rows.
    assert (after.attentions[0].sum(dim=-1) < 1).all()


def test_features_leave_out_registers(model: RobustnessTokenModel, family: str, pixel_values: Tensor) -> None:
    features = model.get_features(pixel_values)
    assert features.shape == (2, 1 + 4, HIDDEN_SIZE)
    state = last_hidden_state(model, pixel_values)
    assert state.shape[1] == (9 if family == "dinov2_with_registers" else 5)
    assert torch.equal(features, torch.cat([state[:, :1], state[:, -4:]], dim=1))


def test_batch_of_one_and_tuple_outputs(model: RobustnessTokenModel, pixel_values: Tensor) -> None:
    whole = last_hidden_state(model, pixel_values)
    assert torch.allclose(last_hidden_state(model, pixel_values[1:]), whole[1:], atol=1e-5)
    assert torch.equal(model(pixel_values=pixel_values, return_dict=False)[0], whole)
    assert torch.equal(model(pixel_values).last_hidden_state, whole)


def test_the_order_of_the_tokens_does_not_matter(model: RobustnessTokenModel, pixel_values: Tensor) -> None:
    before = last_hidden_state(model, pixel_values)
    with torch.no_grad():
        model.robustness_tokens.copy_(model.robustness_tokens.flip(0))
    assert torch.allclose(last_hidden_state(model, pixel_values), before, atol=1e-5)


def test_disable_adapter_nests(model: RobustnessTokenModel, pixel_values: Tensor) -> None:
    on = last_hidden_state(model, pixel_values)
    with model.disable_adapter():
        off = last_hidden_state(model, pixel_values)
        with model.disable_adapter():
            assert torch.equal(last_hidden_state(model, pixel_values), off)
        assert torch.equal(last_hidden_state(model, pixel_values), off)
    assert torch.equal(last_hidden_state(model, pixel_values), on)
    assert not torch.equal(on, off)


def test_disable_adapter_ends_with_an_exception(model: RobustnessTokenModel, pixel_values: Tensor) -> None:
    on = last_hidden_state(model, pixel_values)
    with pytest.raises(KeyError), model.disable_adapter(), model.disable_adapter():
        raise KeyError
    assert torch.equal(last_hidden_state(model, pixel_values), on)


def test_a_failed_forward_leaves_the_model_usable(model: RobustnessTokenModel, pixel_values: Tensor) -> None:
    on = last_hidden_state(model, pixel_values)
    with pytest.raises(ValueError, match=r"[Cc]hannel"):
        model(pixel_values=pixel_values[:, :1])
    assert torch.equal(last_hidden_state(model, pixel_values), on)


# What is trained


def test_the_trainable_set_is_the_tokens(model: RobustnessTokenModel) -> None:
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trainable) == 1
    assert trainable[0] is model.robustness_tokens
    assert not any(parameter.requires_grad for parameter in model.get_base_model().parameters())


def test_one_step_moves_the_tokens_and_nothing_else(model: RobustnessTokenModel, pixel_values: Tensor) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model(pixel_values=pixel_values).last_hidden_state.square().sum().backward()
    optimizer.step()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {"injector.robustness_tokens"}
    assert all(parameter.grad is None for parameter in model.get_base_model().parameters())


def test_train_keeps_the_base_in_eval(model: RobustnessTokenModel, pixel_values: Tensor) -> None:
    expected = last_hidden_state(model, pixel_values)
    assert model.train() is model
    assert model.training
    assert not any(module.training for module in model.get_base_model().modules())
    assert torch.equal(last_hidden_state(model, pixel_values), expected)  # dropout would show
    assert model.eval() is model
    assert not any(module.training for module in model.modules())


def test_print_trainable_parameters(model: RobustnessTokenModel, capsys: pytest.CaptureFixture[str]) -> None:
    total = sum(p.numel() for p in model.get_base_model().parameters()) + 96
    model.print_trainable_parameters()
    expected = f"trainable params: 96 || all params: {total:,} || trainable%: {100 * 96 / total:.4f}\n"
    assert capsys.readouterr().out == expected


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")  # its new name is too young
@pytest.mark.parametrize("enable_first", [True, False])
@pytest.mark.parametrize(
    "use_reentrant",
    [
        pytest.param(
            True,
            marks=pytest.mark.skipif(
                Version(transformers.__version__) < Version("5.23"),
                reason="older transformers give reentrant checkpoints no input with a gradient",
            ),
        ),
        False,
    ],
)
def test_gradient_checkpointing(
    model: RobustnessTokenModel, pixel_values: Tensor, enable_first: bool, use_reentrant: bool
) -> None:
    calls: list[str] = []
    first_layer: Any = find_layer_stack(model.get_base_model()).layers[0]
    next(first_layer.children()).register_forward_hook(lambda *_: calls.append("first child"))

    def gradient() -> Tensor:
        calls.clear()
        model.zero_grad()
        model(pixel_values=pixel_values).last_hidden_state.square().sum().backward()
        assert model.robustness_tokens.grad is not None
        return model.robustness_tokens.grad.clone()

    model.train()
    plain = gradient()
    assert len(calls) == 1
    if enable_first:
        model.eval()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if enable_first:
        model.train()
    assert torch.allclose(gradient(), plain, rtol=1e-5, atol=1e-6)
    assert len(calls) == 2  # computed again in the backward pass: checkpointing did something
    model.gradient_checkpointing_disable()
    assert torch.allclose(gradient(), plain, rtol=1e-5, atol=1e-6)
    assert len(calls) == 1
    assert not any(module.training for module in model.get_base_model().modules())


# Saving


def test_the_saved_files_are_exactly_the_adapter(model: RobustnessTokenModel, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "adapter"
    model.save_pretrained(folder)
    assert {path.name for path in folder.iterdir()} == ADAPTER_FILES
    written = load_file(folder / "model.safetensors")
    assert set(written) == {"robustness_tokens"}
    assert torch.equal(written["robustness_tokens"], model.robustness_tokens.detach())
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["RobustnessTokenModel"]
    assert not {"id2label", "label2id", "dtype"} & set(config)


def test_the_saved_size_of_a_small_dinov2(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("dinov2", hidden_size=384, num_hidden_layers=1, mlp_ratio=1)
    RobustnessTokenModel.from_base(base).save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == ADAPTER_FILES
    weights = (tmp_path / "model.safetensors").stat()
    assert 10 * 384 * 4 < weights.st_size < 10 * 384 * 4 + 200
    assert stat.S_IMODE(weights.st_mode) == 0o600
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) < 20_000


def test_only_the_main_process_writes(dinov2_model: RobustnessTokenModel, tmp_path: Path) -> None:
    dinov2_model.save_pretrained(tmp_path, is_main_process=False)
    dinov2_model.save_pretrained(tmp_path, is_main_process=False, push_to_hub=True, repo_id="user/adapter")
    assert list(tmp_path.iterdir()) == []


def test_unknown_save_arguments_are_errors(dinov2_model: RobustnessTokenModel, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\['safe_serialisation'\], unknown, or for push_to_hub=True"):
        dinov2_model.save_pretrained(tmp_path, safe_serialisation=True)
    assert list(tmp_path.iterdir()) == []


def test_a_readme_that_a_person_wrote_is_kept(dinov2_model: RobustnessTokenModel, tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    card.write_bytes("Für mich: geprüft.\n".encode("latin-1"))
    dinov2_model.save_pretrained(tmp_path)
    assert card.read_bytes() == "Für mich: geprüft.\n".encode("latin-1")
    assert {path.name for path in tmp_path.iterdir()} == ADAPTER_FILES


def test_a_readme_of_ours_is_renewed(dinov2_model: RobustnessTokenModel, tmp_path: Path) -> None:
    dinov2_model.save_pretrained(tmp_path)
    dinov2_model.config.training = {"learning_rate": 0.25}
    dinov2_model.save_pretrained(tmp_path)
    assert '"learning_rate": 0.25' in (tmp_path / "README.md").read_text()


def test_saving_never_overwrites_another_model(base_folders: Folders, tmp_path: Path) -> None:
    folder = shutil.copytree(base_folders["dinov2"], tmp_path / "base")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    model = RobustnessTokenModel.from_base(folder)
    with pytest.raises(ValueError, match=r"save_directory.*holds another model.*'dinov2'"):
        model.save_pretrained(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("fault", ["nan tokens", "bad config", "unwritable recipe"])
def test_a_failed_save_keeps_the_last_good_adapter(
    dinov2_model: RobustnessTokenModel, tmp_path: Path, fault: str
) -> None:
    dinov2_model.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with torch.no_grad():
        dinov2_model.robustness_tokens.fill_(float("nan") if fault == "nan tokens" else 7.0)
    if fault == "bad config":
        dinov2_model.config.similarity_axis = "both"  # type: ignore[assignment]
    if fault == "unwritable recipe":
        dinov2_model.config.training = {"dataset": object()}
    with pytest.raises((ValueError, TypeError)):
        dinov2_model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_base_model_id_names_the_base_for_others(dinov2_model: RobustnessTokenModel, tmp_path: Path) -> None:
    dinov2_model.save_pretrained(tmp_path, base_model_id="user/base")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["base_model_name_or_path"], config["base_model_revision"]) == ("user/base", None)
    assert "base_model: user/base" in (tmp_path / "README.md").read_text()
    assert dinov2_model.config.base_model_name_or_path != "user/base"


def test_pushing_an_adapter_of_a_folder_needs_an_id(dinov2_model: RobustnessTokenModel) -> None:
    with pytest.raises(ValueError, match="pass base_model_id="):
        dinov2_model.push_to_hub("user/adapter")


# Loading


def test_save_and_load_is_bit_equal(model: RobustnessTokenModel, pixel_values: Tensor, tmp_path: Path) -> None:
    model.config.training = {"learning_rate": 0.1, "attack": "paper"}
    model.save_pretrained(tmp_path / "first")
    loaded = RobustnessTokenModel.from_pretrained(tmp_path / "first")
    assert not loaded.training
    assert torch.equal(loaded.robustness_tokens, model.robustness_tokens)
    assert [p for p in loaded.parameters() if p.requires_grad] == [loaded.robustness_tokens]
    assert_same_outputs(loaded(pixel_values=pixel_values), model(pixel_values=pixel_values))
    loaded.save_pretrained(tmp_path / "second")
    for name in ("config.json", "model.safetensors", "preprocessor_config.json"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_save_and_load_in_half_precision(
    family: str, base_folders: Folders, pixel_values: Tensor, tmp_path: Path, dtype: torch.dtype
) -> None:
    model = randomize(RobustnessTokenModel.from_base(base_folders[family], dtype=dtype))
    assert model.dtype == dtype
    model.save_pretrained(tmp_path)
    loaded = RobustnessTokenModel.from_pretrained(tmp_path, dtype=dtype)
    expected = last_hidden_state(model, pixel_values.to(dtype))
    assert expected.dtype == dtype
    assert torch.equal(last_hidden_state(loaded, pixel_values.to(dtype)), expected)
    assert torch.equal(loaded.robustness_tokens, model.robustness_tokens)
    assert loaded.robustness_tokens.dtype == torch.float32  # the master copy is never rounded


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_an_adapter_trained_in_float32_loads_in_any_precision(
    dinov2_model: RobustnessTokenModel, tmp_path: Path, dtype: torch.dtype
) -> None:
    dinov2_model.save_pretrained(tmp_path)
    loaded = RobustnessTokenModel.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.get_base_model().dtype == dtype
    assert torch.equal(loaded.robustness_tokens, dinov2_model.robustness_tokens)


def test_a_base_stored_in_float16_and_loaded_in_float32(
    make_base: MakeBase, pixel_values: Tensor, tmp_path: Path
) -> None:
    make_base("dinov2").half().save_pretrained(tmp_path / "base")
    model = randomize(RobustnessTokenModel.from_base(tmp_path / "base", dtype=torch.float32))
    model.save_pretrained(tmp_path / "adapter")
    loaded = RobustnessTokenModel.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    expected = last_hidden_state(model, pixel_values)
    assert expected.dtype == torch.float32
    assert torch.equal(last_hidden_state(loaded, pixel_values), expected)
    for other in (torch.float16, torch.bfloat16):
        RobustnessTokenModel.from_pretrained(tmp_path / "adapter", dtype=other)


def test_casting_the_model_moves_the_tokens_along(model: RobustnessTokenModel, pixel_values: Tensor) -> None:
    expected = last_hidden_state(model, pixel_values)
    assert torch.allclose(last_hidden_state(model.double(), pixel_values.double()).float(), expected, atol=1e-4)


@pytest.mark.parametrize("given", ["folder", "string", "instance"])
def test_the_base_can_be_given(
    adapter_folder: Path, base_folders: Folders, make_base: MakeBase, pixel_values: Tensor, given: str
) -> None:
    expected = last_hidden_state(RobustnessTokenModel.from_pretrained(adapter_folder), pixel_values)
    config = json.loads((adapter_folder / "config.json").read_text())
    config["base_model_name_or_path"] = "/a/folder/that/was/moved"
    (adapter_folder / "config.json").write_text(json.dumps(config))
    folder = base_folders["dinov2"]
    base = {"folder": folder, "string": str(folder), "instance": make_base("dinov2")}[given]
    model = RobustnessTokenModel.from_pretrained(adapter_folder, base_model=base)
    assert torch.equal(last_hidden_state(model, pixel_values), expected)
    if given == "instance":
        assert model.get_base_model() is base


def test_a_base_that_was_moved_is_named(adapter_folder: Path) -> None:
    config = json.loads((adapter_folder / "config.json").read_text())
    config["base_model_name_or_path"] = "/a/folder/that/was/moved"
    (adapter_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"/a/folder/that/was/moved.*pass base_model="):
        RobustnessTokenModel.from_pretrained(adapter_folder)


def test_a_base_made_in_memory(make_base: MakeBase, pixel_values: Tensor, tmp_path: Path) -> None:
    base = make_base("vit")
    model = randomize(RobustnessTokenModel.from_base(base))
    assert model.get_base_model() is base
    assert model.config.base_model_name_or_path == ""
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="doesn't name its base: pass base_model="):
        RobustnessTokenModel.from_pretrained(tmp_path)
    loaded = RobustnessTokenModel.from_pretrained(tmp_path, base_model=make_base("vit"))
    assert torch.equal(last_hidden_state(loaded, pixel_values), last_hidden_state(model, pixel_values))


@pytest.mark.parametrize("given", ["folder", "instance"])
def test_another_base_is_refused_and_both_are_named(
    adapter_folder: Path, base_folders: Folders, make_base: MakeBase, tmp_path: Path, given: str
) -> None:
    other = make_base("dinov2")
    with torch.no_grad():
        find_layer_stack(other).layers[0].mlp.fc1.weight.mul_(1.5)  # type: ignore[union-attr, operator]
    other.save_pretrained(tmp_path / "other")
    other = type(other).from_pretrained(tmp_path / "other")
    base = other if given == "instance" else tmp_path / "other"
    with pytest.raises(ValueError, match="trained on") as error:
        RobustnessTokenModel.from_pretrained(adapter_folder, base_model=base)
    message = str(error.value)
    assert f"Dinov2Model '{base_folders['dinov2']}'" in message
    assert f"Dinov2Model '{tmp_path / 'other'}'" in message
    assert "ignore_base_mismatch=True" in message
    assert find_injector(other) is None
    model = RobustnessTokenModel.from_pretrained(adapter_folder, base_model=base, ignore_base_mismatch=True)
    assert torch.equal(model.robustness_tokens, load_file(adapter_folder / "model.safetensors")["robustness_tokens"])


def test_a_base_of_another_width_is_refused_even_so(adapter_folder: Path, make_base: MakeBase) -> None:
    wide = make_base("dinov2", hidden_size=64)
    with pytest.raises(ValueError, match="trained on"):
        RobustnessTokenModel.from_pretrained(adapter_folder, base_model=wide)
    with pytest.raises(ValueError, match=r"shape \(K, 64\) or .* for Dinov2Model, got \(3, 32\).*another width"):
        RobustnessTokenModel.from_pretrained(adapter_folder, base_model=wide, ignore_base_mismatch=True)
    assert find_injector(wide) is None


def test_a_base_without_safetensors_is_refused(make_base: MakeBase, tmp_path: Path) -> None:
    base = make_base("dinov2")
    base.config.save_pretrained(tmp_path)
    torch.save(base.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="has no safetensors weights"):
        RobustnessTokenModel.from_base(tmp_path)


@pytest.mark.parametrize("name", ["BertTokenizer", "Trainer", "AutoModel", "pipeline", "NoSuchModel", "os"])
def test_a_base_class_that_is_no_model(adapter_folder: Path, name: str) -> None:
    config = json.loads((adapter_folder / "config.json").read_text())
    (adapter_folder / "config.json").write_text(json.dumps({**config, "base_model_class": name}))
    with pytest.raises(ValueError, match=f"base_model_class '{name}' is no model class"):
        RobustnessTokenModel.from_pretrained(adapter_folder)


@pytest.mark.parametrize("class_name", ["RobustnessTokenModel", "AutoModel", "inject_tokens"])
def test_damaged_tokens_are_refused_by_every_way_in(
    adapter_folder: Path, make_base: MakeBase, class_name: str
) -> None:
    save_file({"robustness_tokens": torch.full((3, 32), float("nan"))}, adapter_folder / "model.safetensors")
    ways: dict[str, Callable[[Path], Any]] = {
        "RobustnessTokenModel": RobustnessTokenModel.from_pretrained,
        "AutoModel": AutoModel.from_pretrained,
        "inject_tokens": lambda folder: inject_tokens(make_base("dinov2"), folder),
    }
    with pytest.raises(ValueError, match="not finite"):
        ways[class_name](adapter_folder)


def test_an_adapter_from_the_hub_cannot_name_a_folder_as_its_base(
    adapter_folder: Path, base_folders: Folders, pixel_values: Tensor, tmp_path: Path
) -> None:
    expected = last_hidden_state(RobustnessTokenModel.from_pretrained(adapter_folder), pixel_values)
    cache_as_repo(adapter_folder, tmp_path / "cache")  # its config names a folder that is there
    with pytest.raises(ValueError, match="is no repo id: pass base_model="):
        RobustnessTokenModel.from_pretrained("user/adapter", cache_dir=tmp_path / "cache")
    model = RobustnessTokenModel.from_pretrained(
        "user/adapter", cache_dir=tmp_path / "cache", base_model=base_folders["dinov2"]
    )
    assert torch.equal(last_hidden_state(model, pixel_values), expected)
    base = AutoModel.from_pretrained(base_folders["dinov2"])
    inject_tokens(base, "user/adapter", cache_dir=tmp_path / "cache")
    assert torch.equal(last_hidden_state(base, pixel_values), expected)


# Arguments


def test_unknown_arguments_are_errors(adapter_folder: Path, base_folders: Folders, make_base: MakeBase) -> None:
    with pytest.raises(TypeError, match="num_tokens"):
        RobustnessTokenModel.from_base(base_folders["dinov2"], num_tokens=3)
    with pytest.raises(TypeError, match="num_robustness_tokens"):
        RobustnessTokenModel.from_pretrained(adapter_folder, num_robustness_tokens=3)
    with pytest.raises(TypeError, match="ignore_mismatch"):
        inject_tokens(make_base("dinov2"), adapter_folder, ignore_mismatch=True)


@pytest.mark.parametrize("arguments", [{"dtype": torch.float16}, {"token": "x"}, {"attn_implementation": "sdpa"}])
def test_a_base_in_memory_takes_no_loading_arguments(make_base: MakeBase, arguments: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=rf"in memory already: {list(arguments)} can't be applied".replace("[", r"\[")
    ):
        RobustnessTokenModel.from_base(make_base("dinov2"), **arguments)


def test_an_adapter_on_a_base_in_memory_takes_no_loading_arguments(adapter_folder: Path, make_base: MakeBase) -> None:
    with pytest.raises(ValueError, match=r"in memory already: \['dtype'\] can't be applied"):
        RobustnessTokenModel.from_pretrained(adapter_folder, base_model=make_base("dinov2"), dtype=torch.float16)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_the_attention_reaches_the_base(adapter_folder: Path, base_folders: Folders, attn_implementation: str) -> None:
    models = [
        RobustnessTokenModel.from_base(base_folders["dinov2"], attn_implementation=attn_implementation),
        RobustnessTokenModel.from_pretrained(adapter_folder, attn_implementation=attn_implementation),
        AutoModel.from_pretrained(adapter_folder, attn_implementation=attn_implementation),
    ]
    assert [m.get_base_model().config._attn_implementation for m in models] == [attn_implementation] * 3


# The Auto classes and pipelines


def test_auto_classes_load_an_adapter(adapter_folder: Path, make_base: MakeBase, pixel_values: Tensor) -> None:
    expected = last_hidden_state(RobustnessTokenModel.from_pretrained(adapter_folder), pixel_values)
    config = AutoConfig.from_pretrained(adapter_folder)
    assert type(config) is RobustnessTokenConfig
    for loaded in (
        AutoModel.from_pretrained(adapter_folder),
        AutoModel.from_pretrained(adapter_folder, config=config),
    ):
        assert type(loaded) is RobustnessTokenModel
        assert torch.equal(last_hidden_state(loaded, pixel_values), expected)
    with_base = AutoModel.from_pretrained(adapter_folder, base_model=make_base("dinov2"))
    assert torch.equal(last_hidden_state(with_base, pixel_values), expected)
    half = AutoModel.from_pretrained(str(adapter_folder), dtype=torch.bfloat16)
    assert half.get_base_model().dtype == torch.bfloat16


@pytest.fixture
def classifier_adapter(family: str, classifier_folders: Folders, tmp_path: Path) -> Path:
    """Returns an adapter of a classifier, for each family in turn."""
    model = RobustnessTokenForImageClassification.from_base(classifier_folders[family], num_robustness_tokens=3)
    randomize(model).save_pretrained(tmp_path / "classifier_adapter")
    return tmp_path / "classifier_adapter"


def test_auto_classes_load_a_classifier(
    classifier_adapter: Path, family: str, make_base: MakeBase, pixel_values: Tensor
) -> None:
    assert {path.name for path in classifier_adapter.iterdir()} == ADAPTER_FILES
    base = make_base(family, classifier=True)
    loaded: Any = AutoModelForImageClassification.from_pretrained(classifier_adapter)
    assert type(loaded) is RobustnessTokenForImageClassification
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded, pixel_values), logits(base, pixel_values))
    inject_tokens(base, classifier_adapter)
    assert torch.equal(logits(loaded, pixel_values), logits(base, pixel_values))
    assert logits(base, pixel_values).shape == (2, 5)
    # The same adapter under AutoModel is the headless base.
    assert last_hidden_state(AutoModel.from_pretrained(classifier_adapter), pixel_values).shape[-1] == HIDDEN_SIZE


def test_a_headless_base_is_no_classifier(adapter_folder: Path, base_folders: Folders, make_base: MakeBase) -> None:
    attempts: list[Callable[[], Any]] = [
        lambda: AutoModelForImageClassification.from_pretrained(adapter_folder),
        lambda: RobustnessTokenForImageClassification.from_base(base_folders["dinov2"]),
        lambda: RobustnessTokenForImageClassification.from_base(make_base("dinov2")),
        lambda: RobustnessTokenForImageClassification.from_pretrained(adapter_folder, base_model=make_base("dinov2")),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=r"no classification head.*inject_tokens\(classifier, adapter\)"):
            attempt()


def picture() -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(values)


def test_feature_pipeline(adapter_folder: Path) -> None:
    model = RobustnessTokenModel.from_pretrained(adapter_folder)
    processor: Any = AutoImageProcessor.from_pretrained(adapter_folder)
    expected = last_hidden_state(model, processor(picture(), return_tensors="pt")["pixel_values"])
    features = pipeline("image-feature-extraction", model=str(adapter_folder))(picture())
    torch.testing.assert_close(torch.tensor(features), expected, rtol=0, atol=1e-5)


def test_classification_pipeline(classifier_adapter: Path) -> None:
    model = RobustnessTokenForImageClassification.from_pretrained(classifier_adapter)
    processor: Any = AutoImageProcessor.from_pretrained(classifier_adapter)
    expected = logits(model, processor(picture(), return_tensors="pt")["pixel_values"])[0].softmax(-1)
    result = pipeline("image-classification", model=str(classifier_adapter))(picture(), top_k=5)
    scores: dict[str, float] = {entry["label"]: entry["score"] for entry in result}
    assert scores == pytest.approx({f"LABEL_{i}": expected[i].item() for i in range(5)}, abs=1e-5)


# In place


def test_inject_tokens_into_a_classifier_and_out_again(
    model: RobustnessTokenModel, family: str, make_base: MakeBase, pixel_values: Tensor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    classifier = classifier_on(make_base(family), family, make_base)
    before = classifier(pixel_values=pixel_values, output_hidden_states=True)
    state = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    trainable = [parameter.requires_grad for parameter in classifier.parameters()]

    assert inject_tokens(classifier, tmp_path) is classifier
    during = classifier(pixel_values=pixel_values, output_hidden_states=True)
    assert during.logits.shape == before.logits.shape
    assert (during.logits - before.logits).abs().max() > 0.01
    assert set(classifier.state_dict()) == set(state)  # saved as before, without the tokens
    assert torch.equal(model.get_features(pixel_values)[:, 0], last_state(classifier, pixel_values)[:, 0])

    assert remove_tokens(classifier) is classifier
    assert_same_outputs(classifier(pixel_values=pixel_values, output_hidden_states=True), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in classifier.state_dict().items())
    assert [parameter.requires_grad for parameter in classifier.parameters()] == trainable
    assert not any(module._forward_pre_hooks for module in classifier.modules())


def last_state(classifier: nn.Module, pixel_values: Tensor) -> Tensor:
    return last_hidden_state(headless_model(classifier), pixel_values)


def test_inject_the_tokens_themselves(family: str, make_base: MakeBase, pixel_values: Tensor) -> None:
    base, tokens = make_base(family), torch.randn(2, HIDDEN_SIZE, requires_grad=True)
    injected = inject_tokens(base, tokens)
    before = last_hidden_state(injected, pixel_values)
    with torch.no_grad():
        tokens.zero_()
    assert torch.equal(last_hidden_state(injected, pixel_values), before)  # a copy was taken
    assert injected(pixel_values=pixel_values).last_hidden_state.requires_grad  # through the base's own weights
    assert tokens.grad is None


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(2, 31), r"shape \(K, 32\) or \(depth, K, 32\) for Dinov2Model, got \(2, 31\)"),
        (torch.zeros(32), r"got \(32,\)"),
        (torch.zeros(3, 2, 32), "from 1 to 2, the number of layers of Dinov2Model"),
        (torch.zeros(1, 1, 2, 32), r"got \(1, 1, 2, 32\)"),
        (torch.zeros(0, 32), r"got .*\(0, 32\)"),
        (torch.zeros(2, 32, dtype=torch.int64), "torch.int64"),
        (torch.full((2, 32), float("nan")), "finite"),
    ],
)
def test_tokens_that_do_not_fit(make_base: MakeBase, tokens: Tensor, message: str) -> None:
    base = make_base("dinov2")
    with pytest.raises(ValueError, match=message):
        inject_tokens(base, tokens)
    assert find_injector(base) is None


def test_tokens_in_memory_come_from_nowhere(make_base: MakeBase) -> None:
    with pytest.raises(ValueError, match=r"in memory already: \['revision'\] can't be applied"):
        inject_tokens(make_base("dinov2"), torch.zeros(2, HIDDEN_SIZE), revision="main")


def test_inject_into_another_base_is_refused(adapter_folder: Path, make_base: MakeBase) -> None:
    other = make_base("dinov2_with_registers")
    with pytest.raises(ValueError, match=r"trained on Dinov2Model .*given is Dinov2WithRegistersModel"):
        inject_tokens(other, adapter_folder)
    assert find_injector(other) is None
    inject_tokens(other, adapter_folder, ignore_base_mismatch=True)
    assert find_injector(other) is not None


def test_double_injection(dinov2_model: RobustnessTokenModel, adapter_folder: Path, make_base: MakeBase) -> None:
    base = inject_tokens(make_base("dinov2"), adapter_folder)
    attempts: list[Callable[[], Any]] = [
        lambda: inject_tokens(base, adapter_folder),
        lambda: RobustnessTokenModel.from_base(base),
        lambda: RobustnessTokenModel.from_pretrained(adapter_folder, base_model=base),
        lambda: inject_tokens(dinov2_model, adapter_folder),
        lambda: RobustnessTokenModel.from_base(dinov2_model),
        lambda: RobustnessTokenModel.from_base(dinov2_model.get_base_model()),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match="has robustness tokens already"):
            attempt()


def test_remove_what_is_not_there(make_base: MakeBase, adapter_folder: Path) -> None:
    base = make_base("dinov2")
    with pytest.raises(ValueError, match="Dinov2Model has no robustness tokens to remove"):
        remove_tokens(base)
    remove_tokens(inject_tokens(base, adapter_folder))
    with pytest.raises(ValueError, match="no robustness tokens to remove"):
        remove_tokens(base)
    inject_tokens(base, adapter_folder)


def test_unload(model: RobustnessTokenModel, family: str, make_base: MakeBase, pixel_values: Tensor) -> None:
    expected, base = make_base(family)(pixel_values=pixel_values), model.get_base_model()
    assert model.unload() is base
    assert_same_outputs(base(pixel_values=pixel_values), expected)
    assert not any(module._forward_pre_hooks for module in base.modules())
    for use in (model.unload, model.get_base_model, lambda: model(pixel_values=pixel_values)):
        with pytest.raises(ValueError, match=r"taken out by unload\(\): load the adapter again"):
            use()


def twin(model: Any, how: str) -> Any:
    return copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_the_model_have_tokens_of_their_own(
    model: RobustnessTokenModel, pixel_values: Tensor, how: str
) -> None:
    on = last_hidden_state(model, pixel_values)
    copied = twin(model, how)
    assert torch.equal(last_hidden_state(copied, pixel_values), on)
    with torch.no_grad():
        copied.robustness_tokens.add_(1)
    changed = last_hidden_state(copied, pixel_values)
    assert not torch.equal(changed, on)
    assert torch.equal(last_hidden_state(model, pixel_values), on)
    with model.disable_adapter():
        assert torch.equal(last_hidden_state(copied, pixel_values), changed)
        off = last_hidden_state(model, pixel_values)
    assert torch.equal(last_hidden_state(copied.unload(), pixel_values), off)
    assert torch.equal(last_hidden_state(model, pixel_values), on)


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_of_an_injected_model(
    adapter_folder: Path, make_base: MakeBase, pixel_values: Tensor, how: str
) -> None:
    base = make_base("dinov2")
    off = last_hidden_state(base, pixel_values)
    on = last_hidden_state(inject_tokens(base, adapter_folder), pixel_values)
    copied = twin(base, how)
    assert torch.equal(last_hidden_state(copied, pixel_values), on)
    assert find_injector(copied) is not find_injector(base)
    assert torch.equal(last_hidden_state(remove_tokens(base), pixel_values), off)
    assert torch.equal(last_hidden_state(copied, pixel_values), on)
    assert torch.equal(last_hidden_state(remove_tokens(copied), pixel_values), off)


# No vision transformer


def other_models() -> dict[str, Callable[[], Any]]:
    bert = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, vocab_size=9)
    swin = SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2])
    resnet = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    return {
        "BertModel": lambda: BertModel(bert),
        "SwinModel": lambda: SwinModel(swin),
        "ResNetModel": lambda: ResNetModel(resnet),
    }


@pytest.mark.parametrize("name", list(other_models()))
def test_no_vision_transformer(name: str, adapter_folder: Path, tmp_path: Path) -> None:
    other = other_models()[name]()
    other.save_pretrained(tmp_path / "other")
    attempts: list[Callable[[], Any]] = [
        lambda: RobustnessTokenModel.from_base(other),
        lambda: RobustnessTokenModel.from_base(tmp_path / "other"),
        lambda: RobustnessTokenModel.from_pretrained(adapter_folder, base_model=other),
        lambda: inject_tokens(other, adapter_folder),
        lambda: inject_tokens(other, torch.zeros(1, 16)),
    ]
    for attempt in attempts:
        with pytest.raises(ValueError, match=rf"{name}.*(use a plain ViT|need layers that|need one width)"):
            attempt()


def test_a_model_of_two_towers_is_pointed_to_its_vision_half() -> None:
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**tower, "image_size": 16, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(vision_config=vision, text_config={**tower, "vocab_size": 9}, projection_dim=8))
    with pytest.raises(ValueError, match=r"CLIPModel has two towers: .*CLIPVisionModelWithProjection"):
        RobustnessTokenModel.from_base(clip)
    inject_tokens(clip, torch.zeros(1, 16))


def test_no_code_beside_an_adapter_or_a_base_is_run_or_offered(
    adapter_folder: Path, base_folders: Folders, tmp_path: Path
) -> None:
    base_folder = shutil.copytree(base_folders["dinov2"], tmp_path / "base")
    for folder in (adapter_folder, base_folder):
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        processor = {"auto_map": {"AutoImageProcessor": "evil.Evil"}, "image_processor_type": "Evil"}
        (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(ValueError, match="trust_remote_code"):
        RobustnessTokenModel.from_pretrained(adapter_folder, base_model=base_folders["dinov2"])
    with pytest.raises(ValueError, match="trust_remote_code"):
        RobustnessTokenModel.from_base(base_folder)
    assert not (tmp_path / "ran").exists()


def test_an_adapter_whose_config_names_code_is_refused(adapter_folder: Path) -> None:
    config = json.loads((adapter_folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "evil.Evil"}
    (adapter_folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="auto_map must name no code but the package's own"):
        AutoModel.from_pretrained(adapter_folder)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_files_have_the_users_permissions_and_tokens_none_for_others(
    dinov2_model: RobustnessTokenModel, tmp_path: Path, umask: int
) -> None:
    before = os.umask(umask)
    try:
        dinov2_model.save_pretrained(tmp_path)
        make_report(figures={"accuracy_by_eps.png": b"png"}).save(tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*") if path.is_file()}
    assert modes.pop("model.safetensors") == 0o600
    assert set(modes.values()) == {0o666 & ~umask}, modes


def test_a_report_goes_into_the_card_and_does_not_survive_its_tokens(
    dinov2_model: RobustnessTokenModel, tmp_path: Path
) -> None:
    dinov2_model.save_pretrained(tmp_path)
    report_on(tmp_path).save(tmp_path)
    dinov2_model.save_pretrained(tmp_path)
    assert (tmp_path / "evaluation.json").exists(), "the same tokens"
    assert "`evaluation.json` holds all numbers" in (tmp_path / "README.md").read_text()
    randomize(dinov2_model).save_pretrained(tmp_path)
    assert load_adapter(tmp_path).report is None
    assert "The tokens have not been evaluated yet" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("content", ["{}", "mine", '{"schema_version": 99}'])
def test_a_report_that_can_not_be_read_is_no_reason_to_lose_what_was_learned(
    dinov2_model: RobustnessTokenModel, tmp_path: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (tmp_path / "evaluation.json").write_text(content)
    dinov2_model.save_pretrained(tmp_path)
    assert torch.equal(load_adapter(tmp_path).tokens, dinov2_model.robustness_tokens.detach())
    assert "the card leaves out a report" in caplog.text
    assert (tmp_path / "evaluation.json").read_text() == content
    with pytest.raises(ValueError, match=r"evaluation\.json"):
        push_adapter(tmp_path, "user/adapter")


def test_a_relative_base_folder_is_found_from_elsewhere(
    base_folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base_folders["dinov2"].parent)
    RobustnessTokenModel.from_base(base_folders["dinov2"].name).save_pretrained(tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    assert RobustnessTokenModel.from_pretrained("adapter").config.base_model_name_or_path == str(
        base_folders["dinov2"].resolve()
    )


def test_a_base_in_memory_is_pinned_only_to_the_revision_that_the_user_names(
    make_base: MakeBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    def commit(name: str, *, revision: str | None, cache_dir: Any) -> str:
        return {None: "0" * 40, "v1": "1" * 40}[revision]

    monkeypatch.setattr("robustness_tokens.models.modeling.cached_commit", commit)
    assert RobustnessTokenModel.from_base(make_base("dinov2")).config.base_model_revision is None
    pinned = RobustnessTokenModel.from_base(make_base("dinov2"), revision="v1")
    assert pinned.config.base_model_revision == "1" * 40


def test_a_model_without_a_base_says_how_to_make_one(adapter_folder: Path) -> None:
    config = RobustnessTokenConfig()
    for make in (RobustnessTokenModel, RobustnessTokenForImageClassification, AutoModel.from_config):
        with pytest.raises(ValueError, match="needs its base: call from_base or from_pretrained"):
            make(config)
    with pytest.raises(ValueError, match="output_loading_info"):
        RobustnessTokenModel.from_pretrained(adapter_folder, output_loading_info=True)


def test_tokens_go_into_a_module_around_a_model(adapter_folder: Path, base_folders: Folders) -> None:
    wrapper: Any = nn.Sequential(AutoModel.from_pretrained(base_folders["dinov2"]))
    assert find_injector(inject_tokens(wrapper, adapter_folder)) is not None


def test_a_grey_base_is_refused(make_base: MakeBase) -> None:
    with pytest.raises(ValueError, match="takes images of 1 channels"):
        RobustnessTokenModel.from_base(make_base("dinov2", num_channels=1))


def test_an_adapter_without_its_image_processor_is_not_whole(adapter_folder: Path) -> None:
    (adapter_folder / "preprocessor_config.json").unlink()
    with pytest.raises(ValueError, match=r"has no preprocessor_config\.json"):
        RobustnessTokenModel.from_pretrained(adapter_folder)


def test_nothing_is_saved_after_unload(dinov2_model: RobustnessTokenModel, tmp_path: Path) -> None:
    dinov2_model.unload()
    with pytest.raises(ValueError, match=r"taken out by unload\(\)"):
        dinov2_model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


# As any model of transformers


def examples(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 5, (count,), generator=generator).tolist()
    return [{"pixel_values": torch.randn(3, 16, 16, generator=generator) + k / 2, "labels": k} for k in labels]


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": (prediction.predictions.argmax(-1) == prediction.label_ids).mean()}


def test_a_head_is_trained_on_robust_features_by_the_trainer_of_transformers(
    family: str, classifier_folders: Folders, pixel_values: Tensor, tmp_path: Path
) -> None:
    model: Any = RobustnessTokenForImageClassification.from_base(classifier_folders[family], num_robustness_tokens=3)
    randomize(model).injector.requires_grad_(False)
    model.get_base_model().classifier.requires_grad_(True)
    tokens, head = model.robustness_tokens.clone(), model.get_base_model().classifier.weight.clone()
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        num_train_epochs=4,
        eval_strategy="epoch",
        save_strategy="epoch",
        logging_strategy="no",
        load_best_model_at_end=True,
        learning_rate=0.1,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=examples(16),
        eval_dataset=examples(12),
        compute_metrics=accuracy,
    )
    trainer.train()
    measured = trainer.evaluate()
    assert measured["eval_loss"] == pytest.approx(trainer.state.best_metric)
    assert 0 <= measured["eval_accuracy"] <= 1
    assert torch.equal(model.robustness_tokens, tokens)
    assert not torch.equal(model.get_base_model().classifier.weight, head)
    trained = logits(model, pixel_values)
    assert torch.isfinite(trained).all()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", Path(str(trainer.state.best_model_checkpoint))):
        loaded = AutoModelForImageClassification.from_pretrained(folder)
        assert torch.equal(logits(loaded, pixel_values), trained)
    with torch.no_grad():
        model.get_base_model().classifier.weight.zero_()
        model.robustness_tokens.zero_()
    trainer.train(resume_from_checkpoint=trainer.state.best_model_checkpoint)
    assert torch.equal(model.robustness_tokens, tokens)


def test_an_injected_classifier_is_trained_by_the_trainer_of_transformers(
    adapter_folder: Path, base_folders: Folders, make_base: MakeBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    classifier = inject_tokens(classifier_on(make_base("dinov2"), "dinov2", make_base), adapter_folder)
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to=[], disable_tqdm=True, max_steps=2, save_steps=1, logging_strategy="no"
    )
    Trainer(classifier, arguments, train_dataset=examples(8)).train()
    assert caplog.text.count("saved without its robustness tokens: keep their adapter") == 1
    again = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-2")
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(
        logits(inject_tokens(again, adapter_folder, ignore_base_mismatch=True), images),
        logits(classifier.eval(), images),
    )


@pytest.mark.parametrize("how", ["save_pretrained", "state_dict"])
def test_saving_an_injected_model_says_once_that_its_tokens_are_missing(
    how: str, make_base: MakeBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = inject_tokens(make_base("vit"), torch.randn(3, HIDDEN_SIZE))
    for _ in range(2):
        if how == "save_pretrained":
            model.save_pretrained(tmp_path)
        else:
            model.state_dict()
    assert caplog.text.count("ViTModel is saved without its robustness tokens") == 1
    caplog.clear()
    remove_tokens(model).state_dict()
    RobustnessTokenModel.from_base(model).state_dict()
    assert caplog.text == ""


@pytest.mark.parametrize("change", ["in place", "trainable", "nothing"])
def test_a_head_is_saved_if_it_was_trained(
    change: str, family: str, classifier_folders: Folders, pixel_values: Tensor, tmp_path: Path
) -> None:
    model = randomize(RobustnessTokenForImageClassification.from_base(classifier_folders[family]))
    head = model.get_base_model().classifier
    if change == "in place":
        head.weight.data.normal_()
    elif change == "trainable":
        head.requires_grad_(True)
    for folder in (tmp_path / "first", tmp_path / "second"):
        model.save_pretrained(folder)
        written = set(load_file(folder / "model.safetensors"))
        expected = {f"backbone.classifier.{name}" for name in ("weight", "bias")}
        assert written == {"robustness_tokens"} | (expected if change != "nothing" else set())
        loaded = RobustnessTokenForImageClassification.from_pretrained(folder)
        assert torch.equal(logits(loaded, pixel_values), logits(model, pixel_values))
        if change == "in place":
            model = loaded  # what was loaded is saved again
    features = RobustnessTokenModel.from_pretrained(tmp_path / "second")  # has no head to load
    assert torch.equal(features.get_features(pixel_values), model.get_features(pixel_values))


def test_a_new_head_on_a_headless_base_is_loaded_with_its_number_of_labels(
    base_folders: Folders, pixel_values: Tensor, tmp_path: Path
) -> None:
    classifier = AutoModelForImageClassification.from_pretrained(base_folders["dinov2"], num_labels=3)
    model = randomize(RobustnessTokenForImageClassification.from_base(classifier))
    model.get_base_model().classifier.requires_grad_(True)
    model.save_pretrained(tmp_path)
    for load in (RobustnessTokenForImageClassification, AutoModelForImageClassification):
        loaded = load.from_pretrained(tmp_path, num_labels=3)
        assert torch.equal(logits(loaded, pixel_values), logits(model, pixel_values))
    with pytest.raises(ValueError, match=r"load it with the num_labels= that it was trained with"):
        RobustnessTokenForImageClassification.from_pretrained(tmp_path, num_labels=4)


@pytest.mark.parametrize("name", ["backbone.dinov2.layernorm.weight", "backbone.other", "other"])
def test_an_adapter_may_bring_a_head_and_nothing_else_of_the_base(
    name: str, classifier_folders: Folders, tmp_path: Path
) -> None:
    RobustnessTokenForImageClassification.from_base(classifier_folders["dinov2"]).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {name: torch.zeros(HIDDEN_SIZE)}, file)
    with pytest.raises(ValueError, match=name):
        RobustnessTokenForImageClassification.from_pretrained(tmp_path)


class LowRank(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.base_layer, self.lora_b = layer, nn.Linear(HIDDEN_SIZE, HIDDEN_SIZE)

    def forward(self, hidden_states: Tensor) -> Tensor:
        output: Tensor = self.base_layer(hidden_states) + self.lora_b(hidden_states)
        return output


@pytest.mark.parametrize("change", ["lora", "lora in one layer", "trainable", "weights", "nothing"])
def test_saving_says_that_changes_of_the_base_are_not_saved(
    change: str, make_base: MakeBase, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = RobustnessTokenModel.from_base(make_base("dinov2"))
    layers: Any = find_layer_stack(model.get_base_model()).layers
    for layer in layers[: {"lora": 2, "lora in one layer": 1}.get(change, 0)]:
        layer.attention.q_proj = LowRank(layer.attention.q_proj)
    if change == "trainable":
        layers[1].mlp.requires_grad_(True)
    if change == "weights":
        layers[1].mlp.fc1.weight.data.add_(1)
    model.save_pretrained(tmp_path)
    expected = 0 if change == "nothing" else 1
    assert caplog.text.count("layers of Dinov2Model were changed or trained") == expected


def test_saving_takes_the_arguments_of_transformers(dinov2_model: RobustnessTokenModel, tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    prepared = accelerator.prepare(dinov2_model)
    state_dict = {name: 2 * tensor for name, tensor in accelerator.get_state_dict(prepared).items()}
    accelerator.unwrap_model(prepared).save_pretrained(
        tmp_path,
        is_main_process=accelerator.is_main_process,
        save_function=accelerator.save,
        state_dict=state_dict,
        max_shard_size="1GB",
        safe_serialization=True,
        token="secret",
        variant=None,
    )
    assert {path.name for path in tmp_path.iterdir()} == ADAPTER_FILES
    loaded = RobustnessTokenModel.from_pretrained(tmp_path)
    assert torch.equal(loaded.robustness_tokens, 2 * dinov2_model.robustness_tokens)
    taken = inspect.signature(PreTrainedModel.save_pretrained).parameters.values()
    dinov2_model.save_pretrained(tmp_path, **{p.name: p.default for p in taken if p.default is not p.empty})
    with pytest.raises(ValueError, match="safetensors only"):
        dinov2_model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match=r"save_pretrained got \['max_size'\], unknown"):
        dinov2_model.save_pretrained(tmp_path, max_size=1)


def test_an_adapters_tensors_are_a_state_dict(dinov2_model: RobustnessTokenModel, tmp_path: Path) -> None:
    dinov2_model.save_pretrained(tmp_path)
    tokens = dinov2_model.robustness_tokens.clone()
    with torch.no_grad():
        dinov2_model.robustness_tokens.zero_()
    result = dinov2_model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
    assert result.missing_keys == result.unexpected_keys == []
    assert torch.equal(dinov2_model.robustness_tokens, tokens)
    dinov2_model.load_state_dict(dinov2_model.state_dict())


def test_auto_classes_hand_on_what_belongs_to_the_base(
    adapter_folder: Path, classifier_adapter: Path, pixel_values: Tensor
) -> None:
    assert len(AutoModel.from_pretrained(adapter_folder, output_hidden_states=True)(pixel_values).hidden_states) == 3
    eager = AutoModel.from_pretrained(adapter_folder, output_attentions=True, attn_implementation="eager")
    assert len(eager(pixel_values).attentions) == 2
    names = dict(enumerate("abcde"))
    labelled = AutoModelForImageClassification.from_pretrained(classifier_adapter, id2label=names)
    assert labelled.config.id2label == labelled.get_base_model().config.id2label == names
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForImageClassification.from_pretrained(classifier_adapter, num_labels=7)
    with pytest.raises(ValueError, match=r"in memory already: \['output_hidden_states'\] can't be applied"):
        AutoModel.from_pretrained(adapter_folder, output_hidden_states=True, base_model=labelled.unload())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_config_names_the_bases_attention(adapter_folder: Path, implementation: str) -> None:
    model: Any
    for model in (
        AutoModel.from_pretrained(adapter_folder, attn_implementation=implementation),
        RobustnessTokenModel.from_pretrained(adapter_folder, attn_implementation=implementation),
    ):
        assert model.config._attn_implementation == implementation
        assert model.get_base_model().config._attn_implementation == implementation
        other = {"eager": "sdpa", "sdpa": "eager"}[implementation]
        model.set_attn_implementation(other)
        assert model.config._attn_implementation == model.get_base_model().config._attn_implementation == other


@pytest.mark.parametrize(
    ("arguments", "dtype"),
    [
        ({"torch_dtype": torch.float16}, torch.float16),
        ({"torch_dtype": "bfloat16"}, torch.bfloat16),
        ({"torch_dtype": "auto"}, torch.float32),
        ({"dtype": torch.bfloat16}, torch.bfloat16),
        ({"use_safetensors": True}, torch.float32),
    ],
)
def test_arguments_of_older_code(adapter_folder: Path, arguments: dict[str, Any], dtype: torch.dtype) -> None:
    for load in (AutoModel, RobustnessTokenModel):
        assert load.from_pretrained(adapter_folder, **arguments).dtype == dtype
    with pytest.raises(ValueError, match="only safetensors weights are read"):
        RobustnessTokenModel.from_pretrained(adapter_folder, use_safetensors=False)


def test_weights_are_never_initialised_again(model: RobustnessTokenModel, pixel_values: Tensor) -> None:
    expected = last_hidden_state(model, pixel_values)
    model.init_weights()
    model.post_init()
    model.tie_weights()
    assert torch.equal(last_hidden_state(model, pixel_values), expected)


def test_what_could_not_be_loaded_is_not_saved(make_base: MakeBase, tmp_path: Path) -> None:
    config = RobustnessTokenConfig(num_robustness_tokens=3, hidden_size=HIDDEN_SIZE)
    model = RobustnessTokenModel(config, make_base("dinov2"))
    with pytest.raises(ValueError, match=r"make it by from_base\(base\)"):
        model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("name", ["timm_deit3", "timm_eva"])
def test_gradient_checkpointing_of_timm(name: str, pixel_values: Tensor) -> None:
    model = RobustnessTokenModel.from_base(
        FAMILIES[name].build(), image_processor=build_image_processor(image_size=16)
    )
    blocks: Any = find_layer_stack(model.get_base_model()).layers
    calls: list[None] = []
    blocks[0].norm1.register_forward_hook(lambda *_: calls.append(None))
    gradients = []
    for enable in (True, False):
        (model.gradient_checkpointing_enable if enable else model.gradient_checkpointing_disable)()
        calls.clear()
        model.zero_grad()
        model(pixel_values=pixel_values).last_hidden_state.square().sum().backward()
        assert len(calls) == (2 if enable else 1)
        gradients.append(model.robustness_tokens.grad.clone())  # type: ignore[union-attr]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("wrap", ["timm", "compiled", "DataParallel"])
def test_other_bases_say_how_to_take_them(wrap: str, adapter_folder: Path, make_base: MakeBase) -> None:
    base: Any = make_base("dinov2")
    if wrap == "timm":
        base = FAMILIES["timm_deit3"].build().timm_model
    else:
        base = torch.compile(base) if wrap == "compiled" else nn.DataParallel(base)
    for attempt in (
        lambda: RobustnessTokenModel.from_base(base),
        lambda: RobustnessTokenModel.from_pretrained(adapter_folder, base_model=base),
    ):
        with pytest.raises(
            ValueError, match=r"_orig_mod; .*module; .*TimmWrapperModel; .*inject_tokens\(model, tokens"
        ):
            attempt()
    inject_tokens(base, torch.randn(3, HIDDEN_SIZE))


def test_a_vision_model_with_its_projection_keeps_it(pixel_values: Tensor, tmp_path: Path) -> None:
    base = FAMILIES["clip_vision_projection"].build()
    base.save_pretrained(tmp_path / "base")
    build_image_processor(image_size=16).save_pretrained(tmp_path / "base")
    model = randomize(RobustnessTokenModel.from_base(tmp_path / "base"))
    assert model.config.base_model_class == "CLIPVisionModelWithProjection"
    assert model.get_features(pixel_values).shape == (2, 24)
    model.save_pretrained(tmp_path / "adapter")
    loaded = RobustnessTokenModel.from_pretrained(tmp_path / "adapter")
    assert torch.equal(loaded.get_features(pixel_values), model.get_features(pixel_values))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in BASES if name != "clip_two_towers"])
def test_half_precision_bases_take_float32_images(name: str, dtype: torch.dtype) -> None:
    processor = build_image_processor(image_size=16)
    model = RobustnessTokenModel.from_base(BASES[name].build().to(dtype), image_processor=processor)
    images = torch.randn(2, 3, 16, 16)
    assert model.get_features(images).dtype == dtype
    assert torch.equal(model.get_features(images), model.get_features(images.to(dtype)))
    assert model(**BASES[name].inputs())[0].dtype == dtype


def test_an_offloaded_base_gets_an_adapter(make_base: MakeBase, pixel_values: Tensor, tmp_path: Path) -> None:
    expected = RobustnessTokenModel.from_base(make_base("dinov2"))
    base = cpu_offload(make_base("dinov2"), execution_device=torch.device("cpu"))
    model = RobustnessTokenModel.from_base(base)
    assert model.config.base_model_fingerprint == expected.config.base_model_fingerprint
    with torch.no_grad():
        model.robustness_tokens.copy_(expected.robustness_tokens)
    assert torch.equal(last_hidden_state(model, pixel_values), last_hidden_state(expected, pixel_values))
    model.save_pretrained(tmp_path)


def test_an_adapters_head_is_saved_again_on_a_base_that_has_it(tmp_path: Path) -> None:
    build_base("vit", classifier=True).save_pretrained(tmp_path / "base")
    build_image_processor(image_size=16).save_pretrained(tmp_path / "base")
    model = RobustnessTokenForImageClassification.from_base(tmp_path / "base")
    base: Any = model.get_base_model()
    with torch.no_grad():
        base.classifier.weight.mul_(-1)
    model.save_pretrained(tmp_path / "adapter")
    stored = load_adapter(tmp_path / "adapter")
    assert stored.head
    tuned = RobustnessTokenForImageClassification.from_pretrained(tmp_path / "adapter").unload()
    again = RobustnessTokenForImageClassification.from_pretrained(tmp_path / "adapter", base_model=tuned)
    again.save_pretrained(tmp_path / "again")
    found = load_adapter(tmp_path / "again")
    assert found.head.keys() == stored.head.keys()
    assert all(torch.equal(found.head[name], stored.head[name]) for name in stored.head)
    assert state_digest(found.learned) == state_digest(stored.learned)
