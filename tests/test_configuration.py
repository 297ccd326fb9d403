import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

import robustness_tokens
from robustness_tokens.configuration import (
    AUTO_MAP,
    REMOTE_CODE_FILE,
    RobustnessTokenConfig,
    check_same_base,
    own_keys,
)


FIELDS = {
    "schema_version",
    "base_model_name_or_path",
    "base_model_revision",
    "base_model_class",
    "base_model_fingerprint",
    "num_robustness_tokens",
    "hidden_size",
    "initializer_range",
    "feature_view",
    "similarity_axis",
    "image_mean",
    "image_std",
    "training",
}

FULL: dict[str, Any] = {
    "base_model_name_or_path": "user/base",
    "base_model_revision": "0123abc",
    "base_model_class": "Dinov2Model",
    "base_model_fingerprint": {"bfloat16": "0" * 64, "float16": "f" * 64},
    "num_robustness_tokens": 7,
    "hidden_size": 48,
    "initializer_range": 0.5,
    "feature_view": "patches",
    "similarity_axis": "feature",
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
    "training": {"learning_rate": 0.001, "attack": "paper", "notes": None},
}


def own_values(config: RobustnessTokenConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in FIELDS}


def config_dict(**changes: Any) -> dict[str, Any]:
    content = {**RobustnessTokenConfig(**FULL).to_dict(), **changes}
    return {key: value for key, value in content.items() if value is not ...}


def test_the_fields_are_those_of_the_design() -> None:
    assert own_keys() == FIELDS


def test_defaults_are_the_papers() -> None:
    config = RobustnessTokenConfig()
    assert (config.num_robustness_tokens, config.initializer_range) == (10, 0.01)
    assert (config.feature_view, config.similarity_axis) == ("cls_and_patches", "token")
    assert (config.schema_version, config.base_model_fingerprint, config.training) == (1, {}, {})


def test_defaults_are_not_shared_between_configs() -> None:
    first, second = RobustnessTokenConfig(), RobustnessTokenConfig()
    assert first.training is not None
    first.training["seed"] = 1
    assert second.training == {}


@pytest.mark.parametrize("values", [{}, FULL])
def test_save_and_load(values: dict[str, Any], tmp_path: Path) -> None:
    config = RobustnessTokenConfig(**values)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert set(written) == FIELDS | {"model_type", "transformers_version"}
    assert written["model_type"] == "robustness_tokens"
    for loaded in (RobustnessTokenConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is RobustnessTokenConfig
        assert own_values(loaded) == own_values(config)


def test_labels_of_the_base_are_not_copied() -> None:
    config = RobustnessTokenConfig(**FULL)
    config.id2label = {index: str(index) for index in range(1000)}
    config.label2id = {str(index): index for index in range(1000)}
    assert set(config.to_dict()) <= FIELDS | {"model_type", "transformers_version", "architectures"}


@pytest.mark.parametrize("misspelt", ["num_robustnes_tokens", "num_tokens", "eps", "_secret"])
def test_unknown_arguments_are_errors(misspelt: str) -> None:
    with pytest.raises(ValueError, match=rf"unknown keys \['{misspelt}'\].*num_robustness_tokens"):
        RobustnessTokenConfig(**{**FULL, misspelt: 3})


NAN, INFINITE = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("schema_version", 0),
        ("schema_version", "1"),
        ("schema_version", True),
        ("num_robustness_tokens", 0),
        ("num_robustness_tokens", -1),
        ("num_robustness_tokens", 2.0),
        ("num_robustness_tokens", True),
        ("num_robustness_tokens", "10"),
        ("num_robustness_tokens", None),
        ("num_robustness_tokens", 2**40),
        ("hidden_size", 0),
        ("hidden_size", [384]),
        ("hidden_size", 2**63),
        ("initializer_range", -0.01),
        ("initializer_range", NAN),
        ("initializer_range", INFINITE),
        ("initializer_range", "0.01"),
        ("initializer_range", None),
        ("feature_view", "registers"),
        ("feature_view", None),
        ("feature_view", ["cls"]),
        ("similarity_axis", "tokens"),
        ("similarity_axis", 1),
        ("base_model_name_or_path", None),
        ("base_model_name_or_path", ["a"]),
        ("base_model_class", 3),
        ("base_model_class", "os.system"),
        ("base_model_class", "__import__"),
        ("base_model_class", "../Dinov2Model"),
        ("base_model_class", "Dinov2Model\n"),
        ("base_model_revision", 1),
        ("base_model_revision", "main"),
        ("base_model_revision", "../../0123abc"),
        ("base_model_revision", "0123abc\n"),
        ("initializer_range", 10**400),
        ("image_mean", [10**400] * 3),
        ("image_std", [10**400] * 3),
        ("architectures", "RobustnessTokenModel"),
        ("architectures", [1]),
        ("transformers_version", 5),
        ("dtype", "load"),
        ("dtype", "no_such_type"),
        ("dtype", 32),
        ("auto_map", {"AutoModel": "evil.Evil"}),
        ("auto_map", {"AutoModelForDepthEstimation": "modeling.RobustnessTokenModel"}),
        ("auto_map", None),
        ("base_model_fingerprint", "0" * 64),
        ("base_model_fingerprint", {"float16": "0" * 63}),
        ("base_model_fingerprint", {"float16": "Z" * 64}),
        ("base_model_fingerprint", {"float16": "0" * 64 + "\n"}),
        ("base_model_fingerprint", {"float16": None}),
        ("training", [1]),
        ("training", "paper"),
    ],
)
def test_bad_values_are_named(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        RobustnessTokenConfig(**{**FULL, field: value})
    with pytest.raises(ValueError, match=field):
        RobustnessTokenConfig.from_dict(config_dict(**{field: value}))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        (None, [1.0], "go together"),
        ([0.5], None, "go together"),
        ([0.5, 0.5, 0.5], [0.5], "one number per channel"),
        ([], [], "image_mean"),
        ("0.5", [0.5], "image_mean"),
        ([0.5, None, 0.5], [0.5] * 3, "image_mean"),
        ([0.5, NAN, 0.5], [0.5] * 3, "image_mean"),
        ([0.5] * 3, [0.5, 0.0, 0.5], "image_std must be positive"),
        ([0.5] * 3, [0.5, -0.1, 0.5], "image_std must be positive"),
        ([0.5] * 3, [0.5, INFINITE, 0.5], "image_std"),
    ],
)
def test_bad_normalisation(mean: Any, std: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RobustnessTokenConfig(image_mean=mean, image_std=std)


@pytest.mark.parametrize("key", sorted(FIELDS - {"schema_version"}))
def test_missing_keys_are_errors(key: str) -> None:
    with pytest.raises(ValueError, match=rf"missing keys \['{key}'\] and unknown keys \[\]"):
        RobustnessTokenConfig.from_dict(config_dict(**{key: ...}))


def test_a_missing_schema_version_is_an_error() -> None:
    with pytest.raises(ValueError, match="schema_version"):
        RobustnessTokenConfig.from_dict(config_dict(schema_version=...))


@pytest.mark.parametrize("key", ["peft_type", "num_labels", "id2label", "trust_remote_code"])
def test_unknown_keys_in_a_file_are_errors(key: str) -> None:
    with pytest.raises(ValueError, match=rf"missing keys \[\] and unknown keys \['{key}'\]"):
        RobustnessTokenConfig.from_dict(config_dict(**{key: 1}))


def test_the_packages_own_code_may_be_named() -> None:
    config = RobustnessTokenConfig.from_dict(config_dict(auto_map=AUTO_MAP))
    assert config.auto_map == config.to_dict()["auto_map"] == AUTO_MAP
    assert RobustnessTokenConfig().auto_map == {}
    assert "auto_map" not in config_dict()
    for code in AUTO_MAP.values():
        module, name = code.split(".")
        assert f"{module}.py" == REMOTE_CODE_FILE
        assert hasattr(robustness_tokens, name)


SAME = {"found_name": "FOUND", "expected_name": "EXPECTED", "made": "the pairs were made for", "fix": "make pairs"}


def test_every_digest_that_both_fingerprints_hold_must_be_equal() -> None:
    first, second = {"bfloat16": "a" * 64}, {"float16": "b" * 64}
    both = first | second
    for found, expected in ((both, both), (both, first), (second, both)):
        check_same_base(found, expected, **SAME)
    message = "the pairs were made for EXPECTED, but the base given is FOUND, with other weights"
    with pytest.raises(ValueError, match=rf"{message} \(float16 fingerprint c{{12}}, not b{{12}}\): make pairs$"):
        check_same_base(both | {"float16": "c" * 64}, both, **SAME)
    for found, expected in ((first, second), ({}, both), (both, {})):
        with pytest.raises(ValueError, match=r"cannot tell whether FOUND is EXPECTED.*float32, or make pairs$"):
            check_same_base(found, expected, **SAME)


def test_a_newer_schema_says_so_before_it_complains_of_keys() -> None:
    with pytest.raises(ValueError, match="schema_version 2, this package reads up to 1: pip install --upgrade"):
        RobustnessTokenConfig.from_dict({"schema_version": 2, "a_key_of_the_future": 1})


@pytest.mark.parametrize("content", [[], "config", None, 3])
def test_a_config_that_is_no_object(content: Any) -> None:
    with pytest.raises(ValueError, match="must be a dictionary"):
        RobustnessTokenConfig.from_dict(content)


def test_transformers_may_pass_its_own_arguments() -> None:
    config = RobustnessTokenConfig.from_dict(config_dict(), attn_implementation="eager", output_hidden_states=True)
    assert config._attn_implementation == "eager"
    assert config.output_hidden_states is True
    assert RobustnessTokenConfig(dtype=torch.float16).to_dict().get("dtype") is None
