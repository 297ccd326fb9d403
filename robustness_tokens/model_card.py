"""The card of an adapter: what it is, how to load it, what it does not promise."""

from __future__ import annotations

import json

from huggingface_hub import ModelCardData

from .configuration import RobustnessTokenConfig


# By the `attack_through` of the recipe.
_ATTACKERS = {
    "base": "They were trained against an attacker who knows the backbone but not the tokens (grey box).",
    "tokens": "They were trained against an attacker who knows the backbone and the tokens (white box).",
    "both": "They were trained against attackers who know the backbone, with and without the tokens.",
}
_UNKNOWN_ATTACKER = "The table below says what is known of their training."

_MARKER = "<!-- written by robustness_tokens -->"

_BODY = """
{marker}
# Robustness tokens for {base}

{count} learned input tokens (width {width}) that make the frozen backbone `{base}` more robust to adversarial
images. The backbone's weights are not changed and not in this repository.

```python
from robustness_tokens import RobustnessTokenModel

model = RobustnessTokenModel.from_pretrained({name!r})
```

With the package imported, `AutoModel` and `pipeline("image-feature-extraction", ...)` work on this folder or
repository too. A model with a head keeps it: `inject_tokens(model, {name!r})`.

## Threat model

The tokens are a secret. {attacker} Whoever can read this repository can attack
through them (white box), and then they protect far less. Keep the repository private.

## Base

| | |
|---|---|
| model | `{base}` |
| class | `{base_class}` |
| commit | {revision} |
| normalisation | mean {mean}, std {std} |

Another base is refused on loading, by the weights of its first and its last layer.

The method is that of [Robustness Tokens](https://arxiv.org/abs/2503.10191) (ECCV 2024).

## Training

{training}
"""


def render_card(config: RobustnessTokenConfig, *, name: str) -> str:
    """The README.md of an adapter.

    Args:
        config: The adapter's configuration, with its training recipe.
        name: Folder or repo id that the load lines name.

    Returns:
        Markdown with the metadata that the Hub reads.
    """
    data = ModelCardData(
        base_model=config.base_model_name_or_path or None,
        base_model_relation="adapter",
        library_name="robustness_tokens",
        pipeline_tag="image-feature-extraction",
        tags=["robustness-tokens", "adversarial-robustness"],
    )
    body = _BODY.format(
        marker=_MARKER,
        base=config.base_model_name_or_path or config.base_model_class,
        base_class=config.base_model_class,
        revision=f"`{config.base_model_revision}`" if config.base_model_revision else "not pinned",
        attacker=_ATTACKERS.get((config.training or {}).get("attack_through", ""), _UNKNOWN_ATTACKER),
        count=config.num_robustness_tokens,
        width=config.hidden_size,
        name=name,
        mean=config.image_mean,
        std=config.image_std,
        training=_render_training(config.training or {}),
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def is_generated(card: str) -> bool:
    """Whether a card was written by this package, and may be replaced; one that a person wrote may not."""
    return _MARKER in card


def _render_training(training: dict[str, object]) -> str:
    if not training:
        return "The tokens have not been trained."
    rows = [(key, json.dumps(value).replace("|", "\\|")) for key, value in sorted(training.items())]
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows)])
