import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from robustness_tokens.report.schema import Check
from robustness_tokens.report.writing import RobustnessReport
from tests.support.reports import make_report, make_result


def test_a_report_comes_back_from_disk_as_it_was(tmp_path: Path) -> None:
    report = make_report(figures={"eps.png": b"PNG"})
    report.save(tmp_path / "new" / "folder")
    loaded = RobustnessReport.load(tmp_path / "new" / "folder")
    assert loaded == report
    assert loaded.results[0].confidence_interval == (0.2, 0.3)
    assert loaded.figures == {}


def test_exactly_these_files_are_written(tmp_path: Path) -> None:
    make_report().save(tmp_path)
    make_report(budget="quick").save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"evaluation.json", "evaluation.md", "report.html"}
    assert json.loads((tmp_path / "evaluation.json").read_text())["budget"] == "quick"
    assert "Budget `quick`" in (tmp_path / "evaluation.md").read_text()


def test_a_report_that_can_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    make_report().save(tmp_path)
    before = (tmp_path / "evaluation.json").read_bytes()
    too_large = make_report(series={"x": [0.123456789] * 100_000})
    with pytest.raises(ValueError, match="expected at most 1,048,576"):
        too_large.save(tmp_path)
    assert (tmp_path / "evaluation.json").read_bytes() == before


def test_the_figures_are_neither_stored_nor_compared() -> None:
    assert "figures" not in make_report(figures={"a.png": b"1"}).to_dict()
    assert make_report(figures={"a.png": b"1"}) == make_report()
    assert make_report(seed=4) != make_report()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"value": math.nan}, "value must be a finite number from -0.001 to 1.001, got nan"),
        ({"value": 1.01}, "value must be"),
        ({"value": "0.5"}, "value must be"),
        ({"value": True}, "value must be"),
        ({"metric": "cosine", "value": -1.1}, "value must be a finite number from -1.001"),
        ({"confidence_interval": (0.3, 0.2)}, r"confidence_interval\[1\] must be a finite number from 0.3 to 1.001"),
        ({"confidence_interval": (0.3,)}, "confidence_interval must be a pair"),
        ({"confidence_interval": (0.3, math.inf)}, "confidence_interval"),
        ({"task": "detection"}, "task must be one of"),
        ({"metric": ["accuracy"]}, "metric must be one of"),
        ({"tokens": "some"}, "tokens must be one of"),
        ({"knowledge": "all"}, "knowledge must be one of"),
        ({"norm": "L2"}, "norm must be one of"),
        ({"eps": 4.0}, "eps must be a finite number from 0 to 1, got 4.0"),
        ({"eps": -0.1}, "eps must be"),
        ({"num_images": 0}, "num_images must be a whole number of at least 1, got 0"),
        ({"num_images": 10**400}, "num_images must be a whole number"),
        ({"seed": 1.0}, "seed must be a whole number"),
        ({"attack": None}, "knowledge and attack go together"),
        ({"knowledge": None}, "knowledge and attack go together"),
        ({"attack": "x" * 201}, "attack must be a text of at most 200"),
        ({"attack": None, "knowledge": None}, "clean images .* have no eps"),
        ({"attack_parameters": {"a": math.inf}}, "attack_parameters"),
        ({"attack_parameters": {"a": {"b": 1}}}, "attack_parameters"),
        ({"attack_parameters": {"a": [[1]]}}, "attack_parameters"),
        ({"attack_parameters": {1: 1}}, "the name of a value in attack_parameters"),
        ({"attack_parameters": []}, "attack_parameters must be a dictionary"),
    ],
)
def test_a_bad_result_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_result(**changes)


def test_a_cosine_may_round_beyond_one() -> None:
    assert make_result(metric="cosine", value=1.0000002, confidence_interval=(0.9, 1.0000003)).value > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"number": 13}, "number must be a whole number from 1 to 12"),
        ({"number": True}, "number"),
        ({"passed": 1}, "passed must be true or false, got 1"),
        ({"value": 0.5}, "value must be a text"),
        ({"explanation": "x" * 2001}, "explanation must be a text of at most 2000"),
    ],
)
def test_a_bad_check_is_refused(changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"number": 1, "name": "clean", "passed": None, "value": "", "explanation": ""}
    assert Check(**values).passed is None
    with pytest.raises(ValueError, match=message):
        Check(**{**values, **changes})


CHECK = Check(number=2, name="grey box", passed=None, value="", explanation="")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema_version": 3}, "schema_version 3, this package reads up to 2: pip install"),
        ({"schema_version": 1}, "schema_version 1, of an older package, .* evaluate again"),
        ({"own_tokens": []}, "own_tokens must be a dictionary"),
        ({"own_tokens": {"recipe": {"a": {}}}}, r"own_tokens\['recipe'\]\['a'\] must be a text"),
        ({"own_tokens": {"recipe": 1}}, r"own_tokens\['recipe'\] must be a dictionary"),
        ({"base_has_own_head": 1}, "base_has_own_head must be true or false"),
        ({"schema_version": "1"}, "schema_version must be"),
        ({"dataset": {"name": "x"}}, r"dataset has missing keys \['num_images', 'split'\]"),
        ({"dataset": {"name": "x", "split": 1, "num_images": 5}}, "dataset.split must be a text"),
        ({"dataset": {"name": "x", "split": None, "num_images": 0}}, "dataset.num_images"),
        ({"base_model": None}, "base_model must be a text"),
        ({"base_model_revision": 5}, "base_model_revision must be a text"),
        ({"seed": -1}, "seed must be"),
        ({"seconds": math.nan}, "seconds must be a finite number"),
        ({"results": [{}]}, "results must be a list of Result"),
        ({"checks": [CHECK, CHECK]}, r"each check once, got more of number \[2\]"),
        ({"series": {"a": [0.1, math.nan]}}, r"series\['a'\]\[1\] must be a finite number"),
        ({"series": {"a": 1.0}}, r"series\['a'\] must be a list"),
        ({"series": []}, "series must be a dictionary"),
    ],
)
def test_a_bad_report_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_report(**changes)


def without(key: str) -> Callable[[dict[str, Any]], object]:
    return lambda content: content.pop(key)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without("seed"), r"the report has missing keys \['seed'\] and unknown keys \[\]"),
        (lambda c: c.update(extra=1), r"unknown keys \['extra'\]"),
        (lambda c: c.update(figures={}), r"unknown keys \['figures'\]"),
        (lambda c: c.update(schema_version=9, new_key=1), "pip install --upgrade"),
        (without("schema_version"), "schema_version must be"),
        (lambda c: c["results"][1].pop("norm"), r"results\[1\] has missing keys \['norm'\]"),
        (lambda c: c["results"][0].update(value=7), r"results\[0\]: value must be"),
        (lambda c: c["results"][0].update(confidence_interval=[0.1, 0.2, 0.3]), r"results\[0\]: confidence_interval"),
        (lambda c: c["results"][0].update(confidence_interval={}), r"results\[0\]: confidence_interval"),
        (lambda c: c.update(results={}), "results must be a list"),
        (lambda c: c.update(results=[5]), r"results\[0\] must be a dictionary"),
        (lambda c: c["checks"][0].update(color="red"), r"checks\[0\] has missing keys \[\] and unknown keys"),
        (lambda c: c.update(checks=None), "checks must be a list"),
    ],
)
def test_a_damaged_file_is_refused_with_its_name(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object], message: str
) -> None:
    make_report().save(tmp_path)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    damage(content)
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        RobustnessReport.load(tmp_path)
    assert "evaluation.json" in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "must hold a JSON object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        (" " * (1 << 20) + "{}", "expected at most 1,048,576"),
        ('{"schema_version": NaN}', "schema_version must be"),
    ],
)
def test_what_is_no_report_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "evaluation.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        RobustnessReport.load(tmp_path)


def test_nan_in_the_file_is_refused(tmp_path: Path) -> None:
    make_report().save(tmp_path)
    text = (tmp_path / "evaluation.json").read_text()
    assert text.count('"seconds": 12.5') == 1
    (tmp_path / "evaluation.json").write_text(text.replace('"seconds": 12.5', '"seconds": NaN'))
    with pytest.raises(ValueError, match="seconds must be a finite number"):
        RobustnessReport.load(tmp_path)


def test_a_folder_without_a_report_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no evaluation\.json: write one with `robtok evaluate`"):
        RobustnessReport.load(tmp_path)
