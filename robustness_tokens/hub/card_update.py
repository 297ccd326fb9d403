"""Our part of a README, between its markers, made anew without a word lost of what a person wrote around it."""

from __future__ import annotations

import re
from typing import Any

import yaml
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import yaml_dump

from .eval_results import EVALUATED_WITH, PACKAGE


BEGIN = "<!-- robustness_tokens:begin -->"
END = "<!-- robustness_tokens:end -->"

# What an adapter is; nothing else of the metadata is replaced.
_OWN_KEYS = ("base_model", "base_model_relation", "library_name", "pipeline_tag", "datasets")

_MARKER_LINE = re.compile(r"^<!-- robustness_tokens:(begin|end) -->[ \t]*\r?$", re.MULTILINE)


def is_generated(card: str) -> bool:
    """Whether a card holds a part that this package wrote."""
    return _find_block(card) is not None


def update_card(existing: str | None, new: str) -> str:
    """A card with our part made anew, and all that a person wrote in it kept.

    Our part takes the place of the old one, or goes to the end where there is none. Of the metadata, the keys that say
    what an adapter is are ours; tags and evaluation results are united; any other key stays as it is.

    Args:
        existing: The card so far; None where there is none.
        new: What `render_card` made.

    Returns:
        Markdown; doing it twice changes nothing more.

    Raises:
        ValueError: If the metadata of the existing card are no YAML mapping.
    """
    if existing is None or not existing.strip():
        return new
    newline = "\r\n" if "\r\n" in existing else "\n"
    new_metadata, new_body = _split(new)
    old_metadata, body = _split(existing.removeprefix("\ufeff"))
    block_span = _find_block(new_body)
    assert block_span is not None, "render_card writes the markers"
    block = new_body[slice(*block_span)].replace("\n", newline)
    if (old_span := _find_block(body)) is not None:
        body = body[: old_span[0]] + block + body[old_span[1] :]
    else:
        while not body.endswith(2 * newline):
            body += newline
        body += block + newline
    metadata = _merge_metadata(old_metadata or "", yaml.safe_load(new_metadata or "")).replace("\r\n", "\n")
    gap = newline if old_metadata is None else ""
    return "".join(line + newline for line in ("---", *metadata.split("\n"), "---")) + gap + body


def _find_block(text: str) -> tuple[int, int] | None:
    """From the start of a begin mark to the end of the first end mark after it, with no other mark between."""
    begin = None
    for marker in _MARKER_LINE.finditer(text):
        if marker[1] == "begin":
            begin = marker.start()
        elif begin is not None:
            return begin, marker.end() - marker[0].endswith("\r")
    return None


def _split(card: str) -> tuple[str | None, str]:
    """The YAML of a card, None where there is none, and the rest."""
    match = REGEX_YAML_BLOCK.search(card)
    return (None, card) if match is None else (match[2], card[match.end() :])


def _merge_metadata(old_yaml: str, new: dict[str, Any]) -> str:
    """The YAML with our keys in it; what needs no change keeps its every letter, comments too."""
    try:
        old = yaml.safe_load(old_yaml)
    except yaml.YAMLError as exc:
        raise ValueError(
            f"the metadata of the README that is there are not valid YAML, mend them first: {exc}"
        ) from exc
    old = {} if old is None else old
    if not isinstance(old, dict):
        raise ValueError(
            "the metadata of the README that is there (between the --- at its top) must be a YAML mapping, got "
            f"{type(old).__name__}: mend them first"
        )
    merged = {**old, **{key: value for key, value in new.items() if key in _OWN_KEYS or key not in old}}
    tags = _as_list(old.get("tags"))
    merged["tags"] = tags + [tag for tag in new["tags"] if tag not in tags]
    model_index = [*_results_of_others(old.get("model-index")), *new.get("model-index", [])]
    merged = {key: value for key, value in merged.items() if key != "model-index"}
    if model_index:
        merged["model-index"] = model_index
    changed = {key: value for key, value in merged.items() if key not in old or old[key] != value}
    if not changed and len(merged) == len(old):
        return old_yaml
    text = _replace_keys(old_yaml, {key: changed.get(key) for key in old if key in changed or key not in merged})
    added = {key: value for key, value in changed.items() if key not in old}
    text = f"{text}\n{_dump(added)}".strip("\n")
    try:
        is_right = yaml.safe_load(text) == merged
    except yaml.YAMLError:
        is_right = False
    # Lines can't be exchanged in `{a: 1}`, nor where there are anchors: then all of it is written anew.
    return text if is_right else _dump(merged)


def _replace_keys(text: str, values: dict[str, Any]) -> str:
    """YAML of a mapping with the lines of some keys written anew, or taken out where the value is None."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    if root is None:
        return text
    lines = text.splitlines()
    starts = [key.start_mark.line for key, _ in root.value]
    parts = lines[: starts[0]] if starts else lines
    for (key, _), start, end in zip(root.value, starts, [*starts[1:], len(lines)], strict=True):
        if key.value not in values:
            parts += lines[start:end]
            continue
        after = end
        while after > start + 1 and lines[after - 1].lstrip().startswith("#"):
            after -= 1
        if values[key.value] is not None:
            parts.append(_dump({key.value: values[key.value]}))
        parts += lines[after:end]  # comments before the next key
    return "\n".join(parts)


def _dump(values: dict[str, Any]) -> str:
    return yaml_dump(values, sort_keys=False).strip("\n") if values else ""


def _results_of_others(model_index: object) -> list[Any]:
    """The entries of a model-index without our metrics, and without what held nothing else."""
    return [e for entry in _as_list(model_index) if (e := _without_ours(entry, "results", "metrics")) is not None]


def _without_ours(element: Any, *levels: str) -> Any:
    """An entry, a result or a metric without what is ours in it; None if nothing else was."""
    if not isinstance(element, dict):
        return element
    if not levels:
        arguments = element.get("args")
        is_ours = isinstance(arguments, dict) and str(arguments.get(EVALUATED_WITH)).startswith(PACKAGE)
        return None if is_ours else element
    before = _as_list(element.get(levels[0]))
    after = [kept for part in before if (kept := _without_ours(part, *levels[1:])) is not None]
    if before and not after:
        return None
    return element if after == before else {**element, levels[0]: after}


def _as_list(value: object) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]
