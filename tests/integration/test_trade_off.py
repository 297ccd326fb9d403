import runpy
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure


SCRIPT = Path(__file__).parents[2] / "examples" / "quickstart" / "trade_off.py"


def test_the_trade_off_averages_the_seeds_of_a_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Any] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, dpi: saved.append(figure))
    rows: list[dict[str, Any]] = [
        {"way": "a", "clean": "0.9", "grey_box": "0.2", "white_box": "0.1"},  # as a CSV has it
        {"way": "a", "clean": 0.8, "grey_box": 0.4, "white_box": 0.1},
        {"way": "b", "clean": 0.7, "grey_box": 0.5, "white_box": 0.3},
        {"way": "c", "clean": 0.7, "grey_box": 0.6, "white_box": 0.3},
    ]
    runpy.run_path(str(SCRIPT))["draw"](rows, tmp_path / "x.png")
    grey, white = saved[0].axes
    points = [line.get_xydata().tolist()[0] for line in grey.lines]
    assert points == [pytest.approx([0.85, 0.3]), [0.7, 0.5], [0.7, 0.6]]
    assert [line.get_ydata()[0] for line in white.lines] == [pytest.approx(0.1), 0.3, 0.3]
    assert [text.get_text() for text in grey.texts] == ["1", "2", "3"]
    assert [text.get_text() for text in white.texts] == ["1", "2, 3"], "numbers at one point don't cover each other"
    assert "16/255" in grey.get_ylabel()
