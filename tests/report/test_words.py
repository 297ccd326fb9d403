from typing import get_args

import pytest

from robustness_tokens.report.schema import Metric, ReportedKnowledge, Result, Task, TokensInPlace
from robustness_tokens.report.words import ATTACKERS, METRICS, TASKS, TOKENS, group_results


@pytest.mark.parametrize(
    ("words", "names"),
    [(TASKS, get_args(Task)), (METRICS, get_args(Metric)), (TOKENS, get_args(TokensInPlace))],
    ids=["tasks", "metrics", "tokens"],
)
def test_every_name_of_the_schema_has_words(words: dict[str, str], names: tuple[str, ...]) -> None:
    """A name without words would be left out of every form of the report."""
    assert set(words) == set(names)


def test_every_level_of_knowledge_has_words_and_clean_images_too() -> None:
    assert set(ATTACKERS) == {*get_args(ReportedKnowledge), None}


def result(metric: Metric, *, task: Task = "classification", tokens: TokensInPlace = "trained") -> Result:
    return Result(
        task=task,
        metric=metric,
        value=0.5,
        confidence_interval=(0.4, 0.6),
        num_images=10,
        seed=0,
        tokens=tokens,
    )


def test_groups_come_in_the_order_of_the_words_and_keep_that_of_the_report() -> None:
    cosine, accuracy = result("cosine", task="features"), result("accuracy")
    without, zero = result("accuracy", tokens="none"), result("accuracy", tokens="zero")
    groups = group_results([cosine, without, zero, accuracy])
    assert list(groups) == [("classification", "accuracy"), ("features", "cosine")]
    assert groups["classification", "accuracy"].leading == [without, accuracy]
    assert groups["classification", "accuracy"].baselines == [zero]
    assert groups["features", "cosine"].leading == [cosine]
