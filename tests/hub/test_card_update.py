import re
from itertools import pairwise
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from robustness_tokens.configuration import RobustnessTokenConfig
from robustness_tokens.hub.card import BEGIN, END, is_generated, render_card, update_card
from robustness_tokens.utils import read_yaml
from tests.support.reports import make_report, make_result


def render(base: str = "user/base", **kwargs: Any) -> str:
    return render_card(RobustnessTokenConfig(base_model_name_or_path=base), name="user/adapter", **kwargs)


NEW = render(license="mit")
EVALUATED = render(report=make_report(results=[make_result(value=0.75)]))
BLOCK = NEW[NEW.index(BEGIN) : NEW.index(END) + len(END)]


def metadata(card: str) -> dict[str, Any]:
    content = yaml.safe_load(card.split("---\n")[1])
    assert isinstance(content, dict)
    return content


PERSONS_METADATA = """\
# my own order, my own comment
license: apache-2.0  # of the base
language: no
date: 2024-01-02
tags:
- mine
- robustness-tokens
base_model: user/old
model-index:
- name: mine
  results:
  - task: {type: image-classification}
    dataset: {name: x, type: x}
    metrics:
    - {type: accuracy, value: 0.5, name: by hand}
widget: [{src: a.png}]\
"""
PERSONS = f"---\n{PERSONS_METADATA}\n---\n# Mine\n\nText.\n"

EXISTING = {
    "nothing": None,
    "empty": " \n",
    "ours": NEW,
    "ours, evaluated": EVALUATED,
    "ours, of another base": render("user/other", license="mit"),
    "text": "# Mine\n\nText.",
    "text that ends in a line break": "# Mine\n\nText.\n",
    "a person's": PERSONS,
    "a person's, with Windows' line breaks": PERSONS.replace("\n", "\r\n"),
    "a person's, with a byte order mark": "\ufeff" + PERSONS,
    "around ours": EVALUATED.replace(BEGIN, f"Before.\n\n{BEGIN}").replace("tags:", "mine: 1\ntags:") + "\nAfter.\n",
    "metadata alone": "---\nlicense: mit\n---",
    "metadata of one line": "---\n{license: apache-2.0, tags: mine}\n---\ntext",
    "metadata with anchors": "---\ntags: &t [a, b]\nother: *t\n---\ntext",
    "metadata with quotes around keys": "---\n\"tags\": [a]\n'base_model': user/old\n---\ntext",
    "metadata with comments in a list": "---\ntags:\n# first\n- a\n\n# last\n- b\n\n# mine\nx: 1\n\n---\ntext",
    "metadata with text that looks like a key": "---\nx: |\n  a\n\n  tags: b\ny: 'a\n  tags: b'\n---\ntext",
    "metadata of a comment": "---\n# nothing\n---\ntext",
    "no end": f"# Mine\n{BEGIN}\nText.\n",
    "no begin": f"# Mine\n{END}\nText.\n",
    "marks in a line": f"Ours stands between `{BEGIN}` and `{END}`.\n",
    "an empty model-index": "---\nmodel-index: []\n---\n",
    "tags with a colon": "---\ntags:\n- task: classification\n---\ntext\n",
    "scalar metadata": "---\ntags: one\nmodel-index: null\n---\n",
}


@pytest.mark.parametrize("new", [NEW, EVALUATED], ids=["new", "evaluated"])
@pytest.mark.parametrize("existing", EXISTING.values(), ids=EXISTING)
def test_twice_is_as_good_as_once(existing: str | None, new: str) -> None:
    once = update_card(existing, new)
    assert update_card(once, new) == once
    assert is_generated(once)
    updated = once.replace("\r\n", "\n")
    assert metadata(updated)["base_model"] == "user/base"
    keys = [key.value for key, _ in yaml.compose(updated.split("---\n")[1]).value]
    assert len(keys) == len(set(keys))
    # And the Hub's own client reads it.
    assert ModelCard(once).data.to_dict()["library_name"] == "robustness-tokens"


@pytest.mark.parametrize("existing", [None, "", "\n", NEW])
def test_where_nobody_wrote_anything_it_is_the_new_card(existing: str | None) -> None:
    assert update_card(existing, NEW) == NEW


def test_our_part_is_rewritten() -> None:
    assert update_card(EXISTING["ours, of another base"], NEW) == NEW


def test_results_of_other_tokens_go() -> None:
    updated = update_card(EVALUATED, NEW)
    assert "75.0%" not in updated
    assert "model-index" not in metadata(updated)


def test_a_persons_text_around_ours_stays() -> None:
    updated = update_card(EXISTING["around ours"], NEW)
    body = updated.split("---\n", 2)[2]
    assert body == f"\nBefore.\n\n{BLOCK}\n\nAfter.\n"
    assert metadata(updated) == {**metadata(NEW), "mine": 1}


@pytest.mark.parametrize("end", ["", "\n", "\n\n"])
def test_a_persons_card_gets_ours_at_its_end(end: str) -> None:
    updated = update_card(f"# Mine\n\nText.{end}", NEW)
    assert updated == NEW.split(BEGIN)[0] + f"# Mine\n\nText.\n\n{BLOCK}\n"


def test_a_persons_metadata_stay_as_they_were_written() -> None:
    updated = update_card(PERSONS, NEW)
    lines = updated.split("---\n")[1].splitlines()
    theirs = PERSONS_METADATA.splitlines()
    at = theirs.index("tags:")
    assert theirs[at : at + 4] == ["tags:", "- mine", "- robustness-tokens", "base_model: user/old"]
    tags = "tags: [mine, robustness-tokens, adversarial-robustness]"
    expected = [*theirs[:at], tags, "base_model: user/base", *theirs[at + 4 :]]
    assert lines[: len(expected)] == expected
    assert metadata(updated) == {
        **yaml.safe_load(PERSONS_METADATA),
        "tags": ["mine", "robustness-tokens", "adversarial-robustness"],
        "base_model": "user/base",
        "base_model_relation": "adapter",
        "library_name": "robustness-tokens",
        "pipeline_tag": "image-feature-extraction",
    }


def test_a_comment_goes_with_the_key_below_it() -> None:
    updated = update_card("---\nbase_model: user/old\n# of the base\nlicense: mit\n---\n", NEW)
    assert updated.startswith("---\nbase_model: user/base\n# of the base\nlicense: mit\n")


def test_comments_and_empty_lines_of_other_keys_stay() -> None:
    updated = update_card(EXISTING["metadata with comments in a list"], NEW)
    kept = "---\ntags: [a, b, robustness-tokens, adversarial-robustness]\n\n# mine\nx: 1\nbase_model: user/base\n"
    assert updated.startswith(kept)
    assert update_card("---\n# mine\n---\ntext", NEW).startswith("---\n# mine\nbase_model: user/base\n")
    assert update_card("---\n\n# mine\n\nx: 1\n---\ntext", NEW).startswith("---\n\n# mine\n\nx: 1\nbase_model")


def test_a_persons_results_stand_beside_ours_and_survive_them() -> None:
    both = update_card(PERSONS, EVALUATED)
    data: Any = ModelCard(both).data
    by_hand, measured = data.eval_results
    assert by_hand.metric_name == "by hand"
    assert measured.metric_value == 0.75
    assert [entry["name"] for entry in metadata(both)["model-index"]] == ["mine", "user/adapter"]
    assert metadata(update_card(both, NEW))["model-index"] == metadata(PERSONS)["model-index"]


def test_our_results_go_from_among_a_persons_that_the_hubs_client_put_together() -> None:
    card = ModelCard(
        update_card(
            PERSONS.replace("name: x, type: x", "name: user/pictures, type: user/pictures, split: test"), EVALUATED
        )
    )
    together = metadata(str(card))["model-index"]
    assert [len(result["metrics"]) for entry in together for result in entry["results"]] == [2]
    (entry,) = metadata(update_card(str(card), NEW))["model-index"]
    assert entry["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.5, "name": "by hand"}]


def test_what_is_no_model_index_is_left_alone() -> None:
    card = "---\nmodel-index: [1, {name: x}, {results: [2, {metrics: [3]}]}]\n---\n"
    assert metadata(update_card(card, NEW))["model-index"] == [1, {"name": "x"}, {"results": [2, {"metrics": [3]}]}]


def test_windows_line_breaks_stay() -> None:
    updated = update_card(PERSONS.replace("\n", "\r\n"), NEW)
    assert not re.search(r"(?<!\r)\n", updated)
    assert updated.replace("\r\n", "\n") == update_card(PERSONS, NEW)


def test_a_mark_without_its_pair_costs_no_text() -> None:
    text = f"# Mine\n{BEGIN}\nText.\n"
    once = update_card(text, NEW)
    assert text in once
    assert text in update_card(once, EVALUATED)
    assert once.count(BEGIN) == update_card(once, EVALUATED).count(BEGIN) == 2


def test_marks_within_a_line_are_no_marks() -> None:
    text = f"Ours stands between `{BEGIN}` and `{END}`.\n"
    assert not is_generated(text)
    assert text in update_card(text, NEW)


def test_a_persons_license_wins_and_ours_fills_a_gap() -> None:
    assert metadata(update_card(PERSONS, NEW))["license"] == "apache-2.0"
    assert metadata(update_card("# Mine", NEW))["license"] == "mit"


BOMB = "a: &a [x]\n" + "".join(f"{to}: &{to} [{', '.join([f'*{of}'] * 10)}]\n" for of, to in pairwise("abcdefghi"))


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ("a: [", "not valid YAML"),
        ("just text", "must be a YAML mapping, got str"),
        ("- a", "list"),
        ("license: mit\nlicense: gpl", r"the keys \['license'\] occur twice"),
        (BOMB, "more than 50,000 values, or 32 deep"),
        ("a: &a [*a]", "more than 50,000 values, or 32 deep"),
        ("a: " + "[" * 40 + "]" * 40, "more than 50,000 values, or 32 deep"),
        ("a: " + "x" * (1 << 18), "has 262,147 bytes, expected at most 262,144"),
        ("a: !!timestamp x", "not valid YAML"),
        ("a: " + "9" * 5000, "not valid YAML"),
    ],
    ids=["no end", "text", "list", "twice", "bomb", "in itself", "deep", "large", "wrong tag", "digits"],
)
def test_metadata_that_can_not_be_read_are_an_error(front: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        update_card(f"---\n{front}\n---\ntext", NEW)


def test_a_persons_card_is_told_from_ours() -> None:
    assert is_generated(NEW)
    assert not is_generated("# My tokens\nTrained with care, by robustness_tokens.")
    assert not is_generated("")


def test_bytes_of_another_encoding_stay() -> None:
    written = "Für mich: geprüft.\n".encode("latin-1")
    updated = update_card(written.decode("utf-8", errors="surrogateescape"), NEW)
    assert written in updated.encode("utf-8", errors="surrogateescape")


@pytest.mark.parametrize("text", ["010", "1e5", "0o7", "1:30", "no", "null", "true", ".5", "0123456"])
def test_a_text_like_a_number_stays_a_text_in_either_yaml(text: str) -> None:
    card = render(license=text)
    assert metadata(card)["license"] == text, "YAML 1.1"
    assert metadata(update_card("---\na: {b: &b 1, c: *b}\n---", card))["license"] == text
    assert read_yaml(card.split("---\n")[1])["license"] == text, "YAML 1.2"


def test_what_a_person_wrote_in_yaml_1_2_keeps_its_meaning() -> None:
    updated = update_card("---\n{language: no, revision: 0123456, license: mit}\n---\n", NEW)
    assert read_yaml(updated.split("---\n")[1])["language"] == "no"
    assert metadata(updated)["language"] == "no"
