import json
from collections.abc import Mapping
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


DEEP = {**FULL, "token_depth": 12, "gains_and_shifts": ["norm", "patch_embedding"]}
DEEP_FIELDS = FIELDS | {"token_depth", "gains_and_shifts"}
"""Of schema 2: tokens in several layers, or gains and shifts."""


def own_values(config: RobustnessTokenConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in DEEP_FIELDS}


def config_dict(full: Mapping[str, Any] = FULL, **changes: Any) -> dict[str, Any]:
    content = {**RobustnessTokenConfig(**full).to_dict(), **changes}
    return {key: value for key, value in content.items() if value is not ...}


def test_the_fields_are_those_of_the_design() -> None:
    assert own_keys(1) == FIELDS
    assert own_keys(2) == DEEP_FIELDS


def test_defaults_are_the_papers() -> None:
    config = RobustnessTokenConfig()
    assert (config.num_robustness_tokens, config.initializer_range) == (10, 0.01)
    assert (config.token_depth, config.gains_and_shifts, config.tokens_shape) == (1, [], (10, 384))
    assert (config.feature_view, config.similarity_axis) == ("cls_and_patches", "token")
    assert (config.schema_version, config.base_model_fingerprint, config.training) == (1, {}, {})


def test_defaults_are_not_shared_between_configs() -> None:
    first, second = RobustnessTokenConfig(), RobustnessTokenConfig()
    assert first.training is not None
    assert first.gains_and_shifts is not None
    first.training["seed"] = 1
    first.gains_and_shifts.append("norm")
    assert second.training == {}
    assert second.gains_and_shifts == []


@pytest.mark.parametrize("values", [{}, FULL, DEEP])
def test_save_and_load(values: dict[str, Any], tmp_path: Path) -> None:
    config = RobustnessTokenConfig(**values)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    fields = DEEP_FIELDS if values is DEEP else FIELDS
    assert set(written) == fields | {"model_type", "transformers_version"}
    assert written["schema_version"] == (2 if values is DEEP else 1), "older releases read what they can use"
    assert written["model_type"] == "robustness_tokens"
    for loaded in (RobustnessTokenConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert type(loaded) is RobustnessTokenConfig
        assert own_values(loaded) == own_values(config)


def test_labels_of_the_base_are_not_copied() -> None:
    config = RobustnessTokenConfig(**FULL)
    config.id2label = {index: str(index) for index in range(1000)}
    config.label2id = {str(index): index for index in range(1000)}
    assert set(config.to_dict()) <= FIELDS | {"model_type", "transformers_version", "architectures"}


@pytest.mark.parametrize("changes", [{"token_depth": 2}, {"gains_and_shifts": ["bias"]}])
def test_what_older_releases_do_not_know_has_schema_2(changes: dict[str, Any]) -> None:
    config = RobustnessTokenConfig(**FULL, **changes)
    assert config.schema_version == 2
    assert config.tokens_shape == ((2, 7, 48) if "token_depth" in changes else (7, 48))


def test_gains_and_shifts_need_no_tokens() -> None:
    assert RobustnessTokenConfig(num_robustness_tokens=0, gains_and_shifts=["norm"]).tokens_shape == (0, 384)


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
        ("token_depth", 0),
        ("token_depth", "all"),
        ("token_depth", 2**20),
        ("token_depth", None),
        ("gains_and_shifts", "norm"),
        ("gains_and_shifts", 5),
        ("gains_and_shifts", True),
        ("gains_and_shifts", {}),
        ("gains_and_shifts", ""),
        ("gains_and_shifts", ["norms"]),
        ("gains_and_shifts", ["norm", "norm"]),
        ("gains_and_shifts", [["norm"]]),
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
        ("training", {"eps": NAN}),
        ("training", {"previous": [{"eps": INFINITE}]}),
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
        RobustnessTokenConfig.from_dict(config_dict(DEEP if field in DEEP_FIELDS - FIELDS else FULL, **{field: value}))


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


@pytest.mark.parametrize("key", sorted(DEEP_FIELDS - {"schema_version"}))
def test_missing_keys_are_errors(key: str) -> None:
    with pytest.raises(ValueError, match=rf"missing keys \['{key}'\] and unknown keys \[\]"):
        RobustnessTokenConfig.from_dict(config_dict(DEEP, **{key: ...}))


@pytest.mark.parametrize("key", sorted(DEEP_FIELDS - FIELDS))
def test_keys_of_schema_2_are_unknown_in_schema_1(key: str) -> None:
    with pytest.raises(ValueError, match=rf"missing keys \[\] and unknown keys \['{key}'\]"):
        RobustnessTokenConfig.from_dict(config_dict(**{key: DEEP[key]}))


def test_a_missing_schema_version_is_an_error() -> None:
    with pytest.raises(ValueError, match="schema_version"):
        RobustnessTokenConfig.from_dict(config_dict(schema_version=...))


@pytest.mark.parametrize("key", ["peft_type", "num_labels", "id2label", "trust_remote_code"])
def test_unknown_keys_in_a_file_are_errors(key: str) -> None:
    with pytest.raises(ValueError, match=rf"missing keys \[\] and unknown keys \['{key}'\]"):
        RobustnessTokenConfig.from_dict({**config_dict(), key: 1})


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
    with pytest.raises(ValueError, match="schema_version 3, this package reads up to 2: pip install --upgrade"):
        RobustnessTokenConfig.from_dict({"schema_version": 3, "a_key_of_the_future": 1})


@pytest.mark.parametrize("content", [[], "config", None, 3])
def test_a_config_that_is_no_object(content: Any) -> None:
    with pytest.raises(ValueError, match="must be a dictionary"):
        RobustnessTokenConfig.from_dict(content)


def test_transformers_may_pass_its_own_arguments() -> None:
    config = RobustnessTokenConfig.from_dict(config_dict(), attn_implementation="eager", output_hidden_states=True)
    assert config._attn_implementation == "eager"
    assert config.output_hidden_states is True
    assert RobustnessTokenConfig(dtype=torch.float16).to_dict().get("dtype") is None
