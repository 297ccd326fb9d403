import base64
import hashlib
import html as html_module
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from robustness_tokens.report.html import FIGURES, render_report_html
from robustness_tokens.report.schema import Check, Result
from robustness_tokens.report.words import plain
from robustness_tokens.report.writing import RobustnessReport
from tests.support.reports import CLEAN, HOSTILE, make_report, make_result


HOSTILE_HTML = [
    *HOSTILE,
    '"><script>alert(1)</script>',
    "' onload='alert(1)",
    '" onerror="alert(1)" x="',
    "</title></style></p><img src=x onerror=alert(1)>",
    "<!-- --> <base href=http://evil.example>",
    "javascript:alert(1)",
]
VOID = {"meta", "img", "br"}
CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="chromium is not installed (Debian: apt install chromium)"
)


class Page(HTMLParser):
    """Every element of a page, checked to be closed in order, and its text."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.declarations: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self._open:
            self.text.append(data)

    def handle_decl(self, decl: str) -> None:
        self.declarations.append(decl)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def png(color: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (960, 720), color).save(file, "png")
    return file.getvalue()


def worst(knowledge: str, value: float, **changes: Any) -> Result:
    parameters = {"attacks": [f"cross_entropy ({knowledge})", f"margin ({knowledge})"]}
    return make_result(knowledge=knowledge, attack="worst_case", attack_parameters=parameters, value=value, **changes)


def full_report(**changes: Any) -> RobustnessReport:
    """All kinds of results, checks and figures."""
    no_interval = {"confidence_interval": None}
    swept = {"attacks": ["cross_entropy (base)"], "series": "sweep"}
    results = [
        make_result(value=0.877, **CLEAN, **no_interval),
        make_result(value=0.903, tokens="none", **CLEAN, **no_interval),
        make_result(value=0.899, tokens="zero", **CLEAN, **no_interval),
        worst("full_worst_case", 0.062),
        worst("full", 0.076),
        worst("own_tokens", 0.152),
        worst("base", 0.196),
        worst("base", 0.002, tokens="none", **no_interval),
        worst("base", 0.008, tokens="zero", **no_interval),
        worst("none", 0.742, confidence_interval=(0.7, 0.8)),
        make_result(knowledge="base", value=0.211),
        make_result(knowledge="base", value=0.655, attack="worst_case", attack_parameters=swept, eps=4 / 255),
        make_result(task="features", metric="cosine", value=-0.125, confidence_interval=(-0.2, -0.1)),
    ]
    checks = [
        Check(number=9, name="Steps", passed=False, value="1.4 points", explanation="less than 0.5"),
        Check(number=1, name="Clean cost", passed=None, value="90.3% to 87.7%", explanation="the same head"),
        Check(number=4, name="White box", passed=True, value="7.6% <= 19.6%", explanation="at most grey box"),
    ]
    values: dict[str, Any] = {"results": results, "checks": checks, "figures": {name: png() for name in FIGURES}}
    return make_report(**{**values, **changes})


def check_page(source: str) -> Page:
    """The page can neither run nor load anything, and is semantic."""
    page = Page(source)
    assert page.declarations == ["DOCTYPE html"]
    allowed = {"html", "head", "meta", "title", "style", "body", "main", "header", "section", "h1", "h2", "h3", "p"}
    allowed |= {"dl", "div", "dt", "dd", "ul", "li", "span", "small", "b", "code", "br", "details", "summary"}
    allowed |= {"table", "caption", "thead", "tbody", "tr", "th", "td", "figure", "figcaption", "img"}
    assert {tag for tag, _ in page.elements} <= allowed
    for tag, attributes in page.elements:
        assert set(attributes) <= {"alt", "aria-hidden", "aria-label", "charset", "class", "colspan", "content"} | {
            "http-equiv",
            "lang",
            "name",
            "role",
            "scope",
            "src",
            "tabindex",
        }, tag
    for image in page.all("img"):
        assert (image["src"] or "").startswith("data:image/png;base64,")
        assert image["alt"]
    assert all(header.get("scope") for header in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption")) > 0
    assert [len(page.all(tag)) for tag in ("h1", "main", "title", "style")] == [1, 1, 1, 1]
    return page


def test_the_page_needs_nothing_else_and_runs_nothing() -> None:
    source = render_report_html(full_report())
    page = check_page(source)
    assert "@import" not in source
    assert "url(" not in source
    assert "://" not in source
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    match = re.search(r"<style>(.*?)</style>", source, flags=re.DOTALL)
    assert match is not None
    digest = base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()
    assert policy == (
        f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


@pytest.mark.parametrize("text", HOSTILE_HTML)
def test_a_text_from_the_hub_is_never_markup(text: str) -> None:
    def report(word: str) -> RobustnessReport:
        return full_report(
            adapter=word,
            base_model=word,
            base_model_revision=word,
            budget=word,
            package_version=word,
            dataset={"name": word, "split": word, "num_images": 5},
            checks=[Check(number=1, name=word, passed=None, value=word, explanation=word)],
            results=[
                make_result(attack=word, attack_parameters={word: word, "b": [word]}),
                make_result(knowledge="base", attack="worst_case", attack_parameters={"attacks": [word]}),
            ],
            figures={},
        )

    page, plain_page = check_page(render_report_html(report(text))), check_page(render_report_html(report("x")))
    assert [(tag, set(a)) for tag, a in page.elements] == [(tag, set(a)) for tag, a in plain_page.elements]
    assert "".join(page.text).count(plain(text)) >= 15, "it is shown as it is"


def test_the_headline_puts_the_strongest_attacker_beside_the_grey_box_and_clean_images() -> None:
    source = render_report_html(full_report())
    head = Page(source[: source.index("<section>")] + "</main></body></html>").words()
    assert "Accuracy with the tokens in place, every pixel changed by at most 16/255." in head
    assert re.search(r"Clean images 87\.7 % without tokens 90\.3% no attacker", head)
    assert re.search(r"Grey box 19\.6 % 95% interval \[20\.0, 30\.0\] without tokens 0\.2% the attacker knows", head)
    assert re.search(r"White box, worst case 6\.2 % 95% interval \[20\.0, 30\.0\] the attacker knows everything", head)


def test_without_an_attacker_who_knows_the_tokens_the_page_warns() -> None:
    report = full_report(results=[r for r in full_report().results if r.knowledge in (None, "base")])
    words = Page(render_report_html(report)).words()
    assert "White box, worst case \u2013 not measured" in words
    assert "No attacker who knows the tokens was tried" in words
    assert "No attacker who knows the tokens" not in Page(render_report_html(full_report())).words()


def test_verdicts_are_words_and_symbols_in_the_order_of_the_checks() -> None:
    page = check_page(render_report_html(full_report()))
    assert "✗ 1 failed ✓ 1 passed ○ 1 without a verdict" in page.words()
    expected = (
        "1 Clean cost ○ no verdict 90.3% to 87.7% the same head 4 White box ✓ pass 7.6% <= 19.6% at most grey box"
    )
    assert expected in page.words()
    assert "9 Steps ✗ FAIL 1.4 points less than 0.5" in page.words()
    titles = re.findall("<h2>(.*?)</h2>", render_report_html(full_report()))
    assert titles[0] == "Can the numbers be trusted? The checks"
    assert titles.index("Results by attacker") < titles.index("Figures") < titles.index("How it was measured")


def rows_of(source: str, summary_or_title: str) -> list[list[str]]:
    """The cells of the first table after a text."""
    table = source[source.index(summary_or_title) :].partition("<table")[2].partition("</table>")[0]
    cell = re.compile(r"<t[hd][^>]*>(.*?)</t[hd]>", flags=re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", table, flags=re.DOTALL)
    return [[html_module.unescape(re.sub("<[^>]+>", " ", c)).strip() for c in cell.findall(row)] for row in rows]


def test_the_table_has_a_row_per_attacker_the_strongest_first() -> None:
    rows = rows_of(render_report_html(full_report()), "<h3>Classification: accuracy</h3>")
    assert rows[0] == ["Attacker", "with tokens", "without tokens", "eps, L-inf", "Images", "Seed"]
    assert [re.split("  +", row[0])[0] for row in rows[1:]] == [
        "White box, worst case: knows everything, tokens included",
        "White box: knows everything, tokens included",
        "Own tokens: knows the base and the training recipe, and trains own tokens",
        "Grey box: knows the base, not the tokens",
        "Black box: knows nothing, and tries noise and queries",
        "Clean images",
    ]
    assert rows[4][1:] == ["19.6", "[20.0, 30.0]", "0.2", "", "16/255", "500", "3"]
    assert rows[6][1:] == ["87.7", "", "90.3", "", "0", "500", "3"]
    assert re.sub(" +", " ", rows[1][0]).endswith(
        "worst of 2 attacks on each image cross_entropy (full_worst_case) margin (full_worst_case)"
    )


def test_single_attacks_baselines_and_the_sweep_have_tables_of_their_own() -> None:
    source = render_report_html(full_report())
    single = rows_of(source, "<summary>Every single attack</summary>")
    assert [row[0] for row in single[:2]] == ["Attack", "Grey box: knows the base, not the tokens"]
    assert re.sub(" +", " ", single[2][0]) == (
        "pgd_cross_entropy num_steps = 20, step_size = 2/255, seeds = [1, 2], random_start = True"
    )
    assert single[2][1:] == ["21.1", "[20.0, 30.0]", "16/255", "500", "3"]
    baselines = rows_of(source, "<summary>Baselines")
    assert baselines[0][1:3] == ["with tokens", "zero tokens"]
    assert [row[1::2][:2] for row in baselines if len(row) > 6] == [["19.6", "0.8"], ["87.7", "89.9"]]
    sweep = rows_of(source, "<summary>Sweep over eps: one or two attacks on fewer images</summary>")
    assert sweep[2][1:] == ["65.5", "[20.0, 30.0]", "4/255", "500", "3"]
    features = rows_of(source, "<h3>Features: cosine with the clean features</h3>")
    assert features[1][1:3] == ["-0.125", "[-0.200, -0.100]"]


def test_an_empty_report_says_so() -> None:
    words = Page(render_report_html(make_report(results=[], checks=[]))).words()
    assert "No check was run" in words
    assert "Nothing was measured." in words
    assert "pip install 'robustness-tokens[plots]'" in words


def test_figures_are_inline_in_their_order_with_their_titles() -> None:
    figures = {"zoo.png": png("blue"), "training_curves.png": png("red"), "accuracy_by_eps.png": png("green")}
    source = render_report_html(full_report(figures=figures))
    page = check_page(source)
    shown = [base64.b64decode((image["src"] or "").partition(",")[2]) for image in page.all("img")]
    assert shown == [figures["accuracy_by_eps.png"], figures["training_curves.png"], figures["zoo.png"]]
    assert [(image["alt"] or "").partition(".")[0] for image in page.all("img")] == [
        "Accuracy against the size of the attack",
        "Training of the tokens",
        "zoo",
    ]
    assert "pip install" not in page.words()


def test_the_page_and_the_figures_are_saved_and_figures_of_an_earlier_report_go(tmp_path: Path) -> None:
    report = full_report()
    report.figures["mine.png"] = png("blue")
    report.save(tmp_path)
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == render_report_html(report)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {*FIGURES, "mine.png"}
    assert (tmp_path / "figures" / "mine.png").read_bytes() == png("blue")
    full_report(figures={"sweep.png": png("green")}).save(tmp_path)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"sweep.png", "mine.png"}
    assert (tmp_path / "figures" / "sweep.png").read_bytes() == png("green")


@pytest.mark.parametrize("name", ["../x.png", "a/b.png", "x.svg", ".png", "x.png\n", "", "é.png", "-rf.png"])
def test_a_figure_is_not_written_outside_its_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="figures must be named by"):
        full_report(figures={name: png()}).save(tmp_path / "report")
    assert list(tmp_path.iterdir()) == []


def run_chromium(tmp_path: Path, *arguments: str) -> str:
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--no-first-run"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@needs_chromium
@pytest.mark.parametrize(("scheme", "number"), [("dark", 0), ("light", 1)])
def test_the_page_is_drawn_in_light_and_in_dark(tmp_path: Path, scheme: str, number: int) -> None:
    full_report().save(tmp_path)
    target = tmp_path / "page.png"
    page = (tmp_path / "report.html").as_uri()
    look = f"--blink-settings=preferredColorScheme={number}"
    run_chromium(tmp_path, look, "--window-size=1200,4000", f"--screenshot={target}", page)
    with Image.open(target) as image:
        shot = image.convert("RGB")
    assert shot.size == (1200, 4000)
    corner = shot.getpixel((3, 3))
    assert isinstance(corner, tuple)
    assert (sum(corner) > 600) == (scheme == "light")
    colors = {color for _, color in shot.getcolors(maxcolors=1 << 24) or []}
    assert len(colors) > 100, "text, tables and badges"
    assert (254, 0, 0) in colors or (255, 0, 0) in colors, "the figures, which the page's policy must let through"


@needs_chromium
@pytest.mark.parametrize("width", [320, 400, 1200])
def test_nothing_is_wider_than_the_screen(tmp_path: Path, width: int) -> None:
    long_words = full_report(adapter="organisation/" + "x" * 150, budget="y" * 300)
    long_words.results.append(make_result(attack="z" * 150, attack_parameters={"p" * 150: "q" * 150}))
    long_words.save(tmp_path)
    # The page itself can't run a script; the page around it may look into it, as both are files.
    opened = (tmp_path / "report.html").read_text(encoding="utf-8").replace("<details>", "<details open>")
    (tmp_path / "report.html").write_text(opened, encoding="utf-8")
    (tmp_path / "frame.html").write_text(
        f'<iframe src="report.html" style="width:{width}px;height:800px;border:0"></iframe><pre></pre><script>'
        "onload = () => { const page = document.querySelector('iframe').contentDocument.documentElement;"
        "document.querySelector('pre').textContent = page.scrollWidth + ' of ' + page.clientWidth; }</script>"
    )
    page = (tmp_path / "frame.html").as_uri()
    dom = run_chromium(tmp_path, "--allow-file-access-from-files", "--window-size=1400,900", "--dump-dom", page)
    match = re.search(r"<pre>(\d+) of (\d+)</pre>", dom)
    assert match is not None
    assert int(match[1]) == int(match[2]) == width


def test_a_worst_case_says_how_own_tokens_were_trained() -> None:
    training = ["by the recipe", "but with attack_through=base instead of tokens"]
    parameters = {"attacks": ["cross_entropy (own_tokens_0)"], "num_robustness_tokens": [20, 10], "training": training}
    result = make_result(knowledge="own_tokens", attack="worst_case", attack_parameters=parameters)
    words = Page(render_report_html(make_report(results=[result]))).words()
    assert (
        "worst of 1 attack on each image cross_entropy (own_tokens_0) num_robustness_tokens = [20, 10], "
        "training = [by the recipe, but with attack_through=base instead of tokens]"
    ) in words
