import re
from typing import Any

import pytest
from markdown_it import MarkdownIt

from robustness_tokens.report.markdown import code, headline, prose, render_report_markdown, table
from robustness_tokens.report.schema import Check
from robustness_tokens.report.words import format_eps, format_setting, plain
from tests.support.reports import CLEAN, HOSTILE, make_report, make_result


def rendered(markdown: str) -> str:
    """Renders Markdown as GitHub does: with tables, strike-through, bare links and HTML."""
    return str(MarkdownIt("gfm-like", {"html": True, "linkify": False}).render(markdown))


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("shown", [code, prose])
def test_a_text_from_the_hub_is_never_markup(text: str, shown: Any) -> None:
    html = rendered(table(("a", "b"), [(shown(text), "second")]))
    cells = re.findall(r"<td>(.*?)</td>", html, flags=re.DOTALL)
    assert len(cells) == 2
    assert cells[1] == "second"
    assert set(re.findall(r"</?(\w+)", cells[0])) <= {"code"}
    assert "\n" not in cells[0]


@pytest.mark.parametrize("text", [text for text in HOSTILE if plain(text) and "|" not in text])
def test_a_text_is_shown_as_it_is(text: str) -> None:
    html = rendered(code(text))
    inner = html.removeprefix("<p><code>").removesuffix("</code></p>\n")
    entities = {"&lt;": "<", "&gt;": ">", "&quot;": '"', "&amp;": "&"}
    shown = re.sub("|".join(entities), lambda match: entities[match[0]], inner)
    assert shown == plain(text)


@pytest.mark.parametrize("text", ["http://a.b", "HTTPS://a.b", "www.a.b", "WWW.a.b", "me@a.b", "x ftp://a.b"])
def test_prose_holds_nothing_that_a_renderer_takes_for_a_bare_link(text: str) -> None:
    unescaped = re.sub(r"\\(.)", r"\1", prose(text))
    assert not re.search(r"://|www\.|\w@", unescaped, flags=re.IGNORECASE)


def test_plain_prose_stays_as_it_is() -> None:
    text = "doubling the last changes 0.3 points (limit: 0.5), 10-200 steps; eps = 4/255"
    assert prose(text) == text


@pytest.mark.parametrize(
    ("eps", "text"),
    [(4 / 255, "4/255 (0.01569)"), (0.5 / 255, "0.5/255 (0.001961)"), (1.0, "255/255 (1)"), (0.0, "0/255 (0)")],
)
def test_eps_is_shown_in_levels_and_as_a_number(eps: float, text: str) -> None:
    assert format_eps(eps) == text


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("step_size", 2 / 255, "2/255"),
        ("step_size", 0.5 / 255, "0.5/255"),
        ("step_size", 0.01, "0.01"),
        ("momentum", 1.0, "1"),
        ("p", 0.8, "0.8"),
        ("num_steps", 20, "20"),
        ("eps", [1 / 255, 2 / 255], "[1/255, 2/255]"),
        ("random_start", True, "True"),
        ("x", None, "None"),
    ],
)
def test_only_sizes_in_pixels_are_fractions(name: str, value: Any, text: str) -> None:
    assert format_setting(name, value) == text


def test_the_checks_come_first_and_count_their_verdicts() -> None:
    checks = [
        Check(number=9, name="steps", passed=False, value="1.5 points", explanation="limit <0.5"),
        Check(number=1, name="clean cost", passed=None, value="-2.6 points", explanation="reported"),
        Check(number=4, name="white box", passed=True, value="25%", explanation="at most grey box"),
    ]
    text = render_report_markdown(make_report(checks=checks))
    assert text.index("## Checks") < text.index("## Results")
    assert "1 passed, 1 failed, 1 without a verdict." in text
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    assert rows == [
        "| 1 | clean cost | - | -2.6 points | reported |",
        "| 4 | white box | pass | 25% | at most grey box |",
        "| 9 | steps | **FAIL** | 1.5 points | limit &lt;0.5 |",
    ]


def test_every_number_says_what_it_depends_on() -> None:
    results = [
        make_result(value=0.9, confidence_interval=None, **CLEAN),
        make_result(value=0.4, confidence_interval=(0.35, 0.45), knowledge="base"),
        make_result(value=0.02, confidence_interval=(0.01, 0.03), knowledge="base", tokens="none"),
        make_result(value=0.2, confidence_interval=None, knowledge="full_worst_case", attack="all"),
    ]
    text = render_report_markdown(make_report(results=results))
    rows = [line for line in text.partition("## Results")[2].splitlines() if line.startswith("| ")]
    parameters = "`num_steps=20, step_size=2/255, seeds=[1, 2], random_start=True, p=None`"
    assert rows == [
        "| Attacker | Attack | eps in pixels (L-inf) | Images | Seed | without tokens | with tokens |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        f"| White box, worst case: knows everything, tokens included | `all` {parameters} | 16/255 (0.06275) | 500 "
        "| 3 | - | 20.0% |",
        f"| Grey box: knows the base, not the tokens | `pgd_cross_entropy` {parameters} | 16/255 (0.06275) | 500 | 3 "
        "| 2.0% [1.0, 3.0] | 40.0% [35.0, 45.0] |",
        "| Clean images | no attack | 0 | 500 | 3 | - | 90.0% |",
    ]


def test_baselines_and_metrics_have_tables_of_their_own() -> None:
    results = [
        make_result(task="features", metric="cosine", value=-0.5, confidence_interval=(-0.6, -0.4)),
        make_result(tokens="zero", value=0.1, confidence_interval=None),
        make_result(),
    ]
    text = render_report_markdown(make_report(results=results), level=2)
    assert re.findall(r"^#+ .*", text, flags=re.MULTILINE) == [
        "## Robustness evaluation",
        "### Checks",
        "### Results",
        "#### Classification: accuracy",
        "#### Features: cosine with the clean features",
    ]
    assert text.rstrip().endswith("| -0.500 [-0.600, -0.400] |")
    baselines = text.partition("<summary>Baselines:")[2].partition("</details>")[0].strip().splitlines()
    assert baselines[2].endswith("| Seed | zero tokens |")
    assert baselines[4].endswith("| 3 | 10.0% |")


def test_worst_cases_lead_and_the_rest_is_behind_a_click() -> None:
    def worst(value: float, *, over: int, **changes: Any) -> Any:
        parameters = {"attacks": [f"attack {number}" for number in range(over)], **changes.pop("more", {})}
        return make_result(value=value, attack="worst_case", attack_parameters=parameters, **changes)

    sweep: dict[str, Any] = {"more": {"series": "sweep"}, "over": 1, "num_images": 50}
    results = [
        make_result(value=0.9, confidence_interval=None, **CLEAN),
        worst(0.02, over=14, knowledge="full_worst_case"),
        worst(0.03, over=2),
        make_result(value=0.04),
        make_result(value=0.6, knowledge="base", tokens="zero"),
        worst(0.5, eps=1 / 255, **sweep),
        worst(0.3, eps=8 / 255, **sweep),
        worst(0.1, eps=8 / 255, knowledge="base", tokens="none", **sweep),
        worst(0.7, eps=8 / 255, knowledge="base", tokens="zero", **sweep),
    ]
    found = rendered(render_report_markdown(make_report(results=results))).partition("Classification: accuracy")[2]
    tables = re.findall(r"<table>(.*?)</table>", found, flags=re.DOTALL)
    assert re.findall(r"<summary>(.*?)</summary>", found) == [
        "Every single attack",
        "Baselines: other tokens in place of the trained ones",
        "Sweep over eps: one or two attacks on fewer images",
    ]
    assert found.count("<details>") == found.count("</details>") == 3
    assert found.index("<table>") < found.index("<details>")
    rows = [[re.findall(r"<t[dh]>(.*?)</t[dh]>", row) for row in one.split("</tr>")[:-1]] for one in tables]
    assert [row[1] for row in rows[0][1:]] == ["worst of 14 for each image", "worst of 2 for each image", "no attack"]
    assert [row[-1] for row in rows[1][1:]] == ["4.0% [20.0, 30.0]"]
    assert [row[-1] for row in rows[2][1:]] == ["60.0% [20.0, 30.0]"]
    assert rows[3] == [
        ["Attacker", "Tokens", "Images", "Seed", "1/255", "8/255"],
        [
            *("White box: knows everything, tokens included", "with tokens", "50", "3"),
            *("50.0% [20.0, 30.0]", "30.0% [20.0, 30.0]"),
        ],
        ["Grey box: knows the base, not the tokens", "without tokens", "50", "3", "-", "10.0% [20.0, 30.0]"],
    ]


def test_two_numbers_of_one_attack_are_both_shown() -> None:
    text = render_report_markdown(make_report(results=[make_result(), make_result(value=0.27)]))
    assert "| 25.0% [20.0, 30.0]; 27.0% [20.0, 30.0] |" in text


def test_an_empty_report_says_so() -> None:
    text = render_report_markdown(make_report(results=[], checks=[]))
    assert "No check was run." in text
    assert "Nothing was measured." in text


def test_the_headline_is_the_first_worst_case_beside_the_clean_result() -> None:
    worst = make_result(knowledge="full_worst_case", attack="all", value=0.031)
    other = make_result(knowledge="full_worst_case", attack="all", value=0.5, eps=1 / 255)
    clean = make_result(value=0.903, confidence_interval=None, **CLEAN)
    expected = (
        "Against an attacker who knows everything, tokens included (L-inf, eps 16/255 (0.06275) in pixels, worst case "
        "over all attacks), the accuracy is 3.1% [20.0, 30.0]"
    )
    assert headline(make_report(results=[clean, worst, other])) == f"{expected}; on clean images it is 90.3%."
    assert headline(make_report(results=[worst])) == f"{expected}."
    assert headline(make_report(results=[clean, make_result()])) is None


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_report_brings_no_markup(text: str) -> None:
    report = make_report(
        adapter=text,
        base_model=text,
        base_model_revision=text,
        budget=text,
        package_version=text,
        dataset={"name": text, "split": text, "num_images": 5},
        checks=[Check(number=1, name=text, passed=None, value=text, explanation=text)],
        results=[make_result(attack=text, attack_parameters={text: text, "b": [text]})],
    )
    html = rendered(render_report_markdown(report))
    allowed = {"h1", "h2", "h3", "p", "table", "thead", "tbody", "tr", "th", "td", "code"}
    assert set(re.findall(r"</?([a-z!][a-z0-9]*)", html)) <= allowed
    assert html.count("<h") == rendered(render_report_markdown(make_report())).count("<h")
    assert html.count("<td>") == 5 + 6
