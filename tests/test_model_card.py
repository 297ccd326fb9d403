from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from robustness_tokens.configuration import RobustnessTokenConfig
from robustness_tokens.model_card import is_generated, render_card


def config(**changes: Any) -> RobustnessTokenConfig:
    values: dict[str, Any] = {
        "base_model_name_or_path": "facebook/dinov2-small",
        "base_model_revision": "0123456789abcdef",
        "base_model_class": "Dinov2Model",
        "num_robustness_tokens": 11,
        "hidden_size": 384,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
    }
    return RobustnessTokenConfig(**{**values, **changes})


def test_metadata_is_what_the_hub_reads() -> None:
    data = ModelCard(render_card(config(), name="user/adapter")).data.to_dict()
    assert data["base_model"] == "facebook/dinov2-small"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "robustness_tokens"
    assert data["pipeline_tag"] == "image-feature-extraction"
    assert "robustness-tokens" in data["tags"]


def test_a_base_without_a_name_gives_no_empty_metadata() -> None:
    card = render_card(config(base_model_name_or_path="", base_model_revision=None), name="out")
    assert "base_model" not in ModelCard(card).data.to_dict()
    assert "# Robustness tokens for Dinov2Model" in card


def test_the_card_says_what_it_is() -> None:
    card = render_card(config(), name="user/adapter")
    assert "11 learned input tokens (width 384)" in card
    assert "| commit | `0123456789abcdef` |" in card
    assert "mean [0.1, 0.2, 0.3], std [0.4, 0.5, 0.6]" in card
    assert "The tokens are a secret" in card
    assert "The tokens have not been trained." in card


def test_the_first_line_of_code_is_the_import() -> None:
    code = render_card(config(), name="user/adapter").split("```python\n")[1].split("```")[0].splitlines()
    assert code[0] == "from robustness_tokens import RobustnessTokenModel"
    assert "model = RobustnessTokenModel.from_pretrained('user/adapter')" in code


def test_the_recipe_is_a_table() -> None:
    training = {"learning_rate": 0.001, "attack": "paper", "eps": None}
    card = render_card(config(training=training), name="user/adapter")
    assert '| attack | "paper" |\n| eps | null |\n| learning_rate | 0.001 |' in card
    assert "have not been trained" not in card


def test_a_pipe_in_a_value_does_not_break_the_table() -> None:
    card = render_card(config(training={"dataset": "a|b"}), name="user/adapter")
    row = next(line for line in card.splitlines() if line.startswith("| dataset"))
    assert row.replace("\\|", "").count("|") == 3


@pytest.mark.parametrize("name", ["x\n---\nlicense: mit", "a: b", "{base}", "'quoted'"])
def test_names_cannot_forge_metadata(name: str) -> None:
    data = ModelCard(render_card(config(base_model_name_or_path=name), name=name)).data.to_dict()
    assert data["base_model"] == name
    assert "license" not in data


def test_a_persons_card_is_told_from_ours(tmp_path: Path) -> None:
    assert is_generated(render_card(config(), name="user/adapter"))
    assert not is_generated("# My tokens\nTrained with care, by robustness_tokens.")
    assert not is_generated("")


@pytest.mark.parametrize(("through", "said"), [("base", "grey box"), ("tokens", "the backbone and the tokens")])
def test_the_card_says_against_whom_the_tokens_were_trained(through: str, said: str) -> None:
    card = render_card(RobustnessTokenConfig(training={"attack_through": through}), name="x")
    assert said in card.partition("## Threat model")[2].partition("Whoever")[0]


def test_the_card_of_untrained_tokens_claims_no_training() -> None:
    card = render_card(RobustnessTokenConfig(base_model_name_or_path="u/b"), name="x")
    assert "were trained against" not in card
    assert "| commit | not pinned |" in card
