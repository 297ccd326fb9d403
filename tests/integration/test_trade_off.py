import runpy
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure


SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "trade_off.py"


def test_the_trade_off_averages_the_seeds_of_a_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    saved: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: saved.append(figure))
    rows: list[dict[str, Any]] = [
        {
            "variant": "tokens alone",
            "token_depth": "6",
            "max_steps": "200",
            "clean": "0.9",
            "white_box": "0.1",
        },  # of a CSV
        {"variant": "tokens alone", "token_depth": 6, "max_steps": 200, "clean": 0.8, "white_box": 0.3},
        {"variant": "400 steps", "token_depth": 6, "max_steps": 400, "clean": 0.7, "white_box": 0.3},
        {"variant": "robust", "token_depth": 6, "max_steps": 200, "clean": 0.7, "white_box": 0.3},
    ]
    runpy.run_path(str(SCRIPT))["draw"](rows, tmp_path / "x.png")
    depth, steps, clean = saved[0].axes
    assert depth.lines[0].get_xydata().tolist() == [pytest.approx([6, 0.2])]
    assert steps.lines[0].get_xydata().tolist() == [[200, 0.3], [400, 0.3]]
    points = [line.get_xydata().tolist()[0] for line in clean.lines]
    assert points == [pytest.approx([0.85, 0.2]), [0.7, 0.3], [0.7, 0.3]]
    assert [text.get_text() for text in clean.texts] == ["1", "2, 3"], "numbers at one point don't cover each other"
    assert "16/255" in depth.get_ylabel()
