import base64
import dataclasses
import json
import math
import os
import signal
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from robustness_tokens.report.schema import Check, MeasuredImages, OlderReportError, pack_correct
from robustness_tokens.report.writing import RobustnessReport
from robustness_tokens.utils import LEFTOVERS
from tests.support.reports import IMAGES, KEPT, MEASURED, make_report, make_result


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
    too_large = make_report(series={"x": [0.123456789] * 400_000})
    with pytest.raises(ValueError, match="expected at most 4,194,304"):
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


CORRECT = torch.tensor([True, False, False, True, False, False, False, False, True, True])


def test_the_first_image_is_the_highest_bit_of_the_first_byte() -> None:
    assert pack_correct(CORRECT) == base64.b64encode(bytes([0b10010000, 0b11000000])).decode() == KEPT["correct_bits"]


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_a_result_tells_which_images_were_correct(values: list[bool]) -> None:
    correct = torch.tensor(values)
    changes = {"num_images": len(values), "value": sum(values) / len(values), "confidence_interval": None}
    result = make_result(**changes, correct_bits=pack_correct(correct))
    assert result.correct is not None
    assert (result.correct.dtype, result.correct.tolist()) == (torch.bool, values)
    assert make_result(**changes).correct is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correct_bits": "kMA"}, "correct_bits must be base64 of 2 bytes, .* 10 images .* got 'kMA'"),
        ({"correct_bits": "kMAA"}, "correct_bits must be base64 of 2 bytes"),  # three bytes
        ({"correct_bits": "kA=="}, "correct_bits must be base64 of 2 bytes"),  # one byte
        ({"correct_bits": ""}, "correct_bits must be base64"),
        ({"correct_bits": "kM-="}, "correct_bits must be base64"),
        ({"correct_bits": "k=A="}, "correct_bits must be base64"),
        ({"correct_bits": "kM =\n"}, "correct_bits must be base64"),
        ({"correct_bits": "kM\u00c4="}, "correct_bits must be base64"),
        ({"correct_bits": "kMB="}, "correct_bits must be base64"),  # bits that no byte holds
        ({"correct_bits": "kOA="}, "correct_bits must be base64 .* and zeros after them"),  # an eleventh image
        ({"correct_bits": 5}, "correct_bits must be base64"),
        ({"correct_bits": [True] * 10}, "correct_bits must be base64"),
        ({"num_images": 11, "value": 4 / 11, "correct_bits": "kMA=" * 5000}, "correct_bits must be base64"),
        ({"num_images": 2**62}, "correct_bits must be base64 of 576,460,752,303,423,488 bytes"),
        ({"correct_bits": "kIA="}, "correct_bits tell that 3 of 10 images are correct, expected the share 0.4"),
        ({"value": 0.4001}, "correct_bits tell that 4 of 10 images are correct, expected the share 0.4001"),
        ({"metric": "cosine"}, "correct_bits belong to the metric accuracy, got cosine"),
        ({"metric": "miou", "task": "segmentation"}, "correct_bits belong to the metric accuracy, got miou"),
    ],
)
def test_bits_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    assert make_result(**KEPT).correct is not None
    with pytest.raises(ValueError, match=message):
        make_result(**{**KEPT, **changes})


def test_bits_of_many_images_stay_small(tmp_path: Path) -> None:
    def report(num_images: int, *, num_results: int, keep: bool) -> RobustnessReport:
        correct = torch.arange(num_images) % 3 > 0
        shared = {"value": int(correct.sum()) / num_images, "confidence_interval": None, "num_images": num_images}
        return make_report(
            dataset={"name": "x", "split": None, "num_images": num_images},
            images=MeasuredImages(rows=list(range(num_images)), sha256="0" * 64) if keep else None,
            results=[make_result(**shared, correct_bits=pack_correct(correct) if keep else None)] * num_results,
        )

    without, kept = (report(1000, num_results=60, keep=keep).to_json_string() for keep in (False, True))
    assert len(kept) - len(without) < 20_000  # 8 kB for the rows, 168 bytes for a result
    report(50_000, num_results=300, keep=True).save(tmp_path)
    assert RobustnessReport.load(tmp_path).results[299].correct is not None


def test_images_and_bits_come_back_from_disk(tmp_path: Path) -> None:
    report = make_report(**MEASURED)
    report.save(tmp_path)
    loaded = RobustnessReport.load(tmp_path)
    assert loaded == report
    assert loaded.images == IMAGES
    assert loaded.results[0].correct is not None
    assert torch.equal(loaded.results[0].correct, CORRECT)


def test_pages_do_not_show_the_bits(tmp_path: Path) -> None:
    results = [dataclasses.replace(result, correct_bits=None) for result in MEASURED["results"]]
    for number, report in enumerate((make_report(**MEASURED), make_report(**{**MEASURED, "results": results}))):
        dataclasses.replace(report, images=None if number else IMAGES).save(tmp_path / str(number))
    for file in ("evaluation.md", "report.html"):
        assert (tmp_path / "0" / file).read_text() == (tmp_path / "1" / file).read_text()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": (1, 2)}, "rows must be a list"),
        ({"rows": [1, -1]}, r"rows\[1\] must be a whole number"),
        ({"rows": [1, True]}, r"rows\[1\] must be a whole number"),
        ({"rows": [3, 1, 3]}, "rows must hold each row once, got 3 more than once"),
        ({"sha256": "0" * 63}, "sha256 must be 64 hexadecimal digits"),
        ({"sha256": "G" * 64}, "sha256 must be 64 hexadecimal digits"),
        ({"sha256": None}, "sha256 must be 64 hexadecimal digits"),
    ],
)
def test_bad_images_are_refused(changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"rows": [1, 2], "sha256": "0" * 64}
    assert MeasuredImages(**values).rows == [1, 2]
    with pytest.raises(ValueError, match=message):
        MeasuredImages(**{**values, **changes})


def as_version_2(content: dict[str, Any]) -> dict[str, Any]:
    del content["images"]
    for result in content["results"]:
        del result["correct_bits"]
    return {**content, "schema_version": 2}


def test_a_report_of_schema_2_has_no_images_and_no_bits(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text(json.dumps(as_version_2(make_report(**MEASURED).to_dict())))
    loaded = RobustnessReport.load(tmp_path)
    assert loaded.images is None
    assert [result.correct for result in loaded.results] == [None, None]
    assert loaded.schema_version == 4
    assert [result.value for result in loaded.results] == [0.4, 0.5]
    loaded.save(tmp_path)
    assert RobustnessReport.load(tmp_path) == loaded


def test_the_report_of_the_example_card_is_of_a_schema_that_is_read() -> None:
    report = RobustnessReport.load(Path(__file__).parents[2] / "examples" / "quickstart" / "card")
    assert report.dataset["num_images"] == 200


def test_a_report_that_is_too_old_is_told_apart(tmp_path: Path) -> None:
    (tmp_path / "evaluation.json").write_text('{"schema_version": 1, "a_key_of_the_past": 1}')
    with pytest.raises(OlderReportError, match=r"evaluation\.json: the report has schema_version 1"):
        RobustnessReport.load(tmp_path)


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
        ({"schema_version": 5}, "schema_version 5, this package reads up to 4: pip install"),
        ({"schema_version": 1}, "schema_version 1, of an older package, this one reads 2 to 4: evaluate again"),
        ({"images": {"rows": [0], "sha256": "0" * 64}}, "images must be MeasuredImages or None, got"),
        ({"images": IMAGES}, "images must have a row for each of the dataset's 500 images, got 10"),
        (
            {**MEASURED, "results": [make_result()]},
            r"results\[0\] is on 500 images, expected at most the dataset's 10",
        ),
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
        (lambda c: c["results"][0].update(correct_bits="kMA="), r"results\[0\]: correct_bits must be base64"),
        (lambda c: c.update(images={"rows": []}), r"images has missing keys \['sha256'\] and unknown keys \[\]"),
        (lambda c: c.update(images={"rows": [0.5], "sha256": "0" * 64}), r"images: rows\[0\] must be a whole number"),
        (lambda c: c.update(images=[]), "images must be a dictionary"),
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
        (" " * (4 << 20) + "{}", "expected at most 4,194,304"),
        ('{"schema_version": NaN}', "holds nan, which is no number in JSON"),
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
    with pytest.raises(ValueError, match="holds nan, which is no number in JSON"):
        RobustnessReport.load(tmp_path)


def test_a_folder_without_a_report_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no evaluation\.json: write one with `robtok evaluate`"):
        RobustnessReport.load(tmp_path)


FILES = ("evaluation.json", "evaluation.md", "report.html", "figures/accuracy_by_eps.png")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("killed_at", range(16))
def test_a_kill_while_saving_leaves_no_mixture(tmp_path: Path, killed_at: int) -> None:
    """The earlier report whole, or parts of the new one without evaluation.json, which programs read."""
    old, new = (make_report(adapter=name, figures={"accuracy_by_eps.png": name.encode()}) for name in ("old", "new"))
    old.save(tmp_path / "old")
    old.save(tmp_path / "found")
    new.save(tmp_path / "new")
    calls = 0

    def dying(call: Callable[..., Any]) -> Callable[..., Any]:
        def count(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return count

    if (child := os.fork()) == 0:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("write_bytes", "unlink", "replace"):
                patch.setattr(Path, name, dying(getattr(Path, name)))
            new.save(tmp_path / "found")
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    found = files_of(tmp_path / "found")
    found = {name: content for name, content in found.items() if not fnmatch(Path(name).name, LEFTOVERS)}
    if "evaluation.json" in found:
        assert found in (files_of(tmp_path / "old"), files_of(tmp_path / "new"))
    assert (found == files_of(tmp_path / "old")) == (killed_at <= 4), "the earlier one stays until the new is written"
