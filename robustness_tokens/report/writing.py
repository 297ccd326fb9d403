"""A report as files: JSON for programs; Markdown, a page and figures for people."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from ..utils import MAX_JSON_BYTES, local_path, read_json, write_together
from .html import FIGURES, render_report_html
from .markdown import render_report_markdown
from .schema import OlderReportError, ReportContent


REPORT_FILE = "evaluation.json"
MARKDOWN_FILE = "evaluation.md"
HTML_FILE = "report.html"
FIGURES_FOLDER = "figures"
FIGURE_FILES = tuple(f"{FIGURES_FOLDER}/{name}" for name in FIGURES)


@dataclass(kw_only=True)
class RobustnessReport(ReportContent):
    """The results and checks of an evaluation.

    `results` are the numbers and `checks` say whether to trust them; `adapter`, `base_model`, `dataset`, `budget` and
    `seed` are what they depend on. `images` tells which images were measured, and `correct` of an accuracy which of
    them were correct. `figures` are PNG files by name, and `series` the numbers behind them.

    Raises:
        ValueError: If a value is of the wrong type, not finite, or out of range.
    """

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes evaluation.json for programs, and evaluation.md, report.html and figures/ for people.

        The files are never those of two reports: a kill leaves the earlier ones, or no evaluation.json, which gets its
        name last. In the adapter's own folder the report is pushed with the adapter.

        Args:
            folder: Created if it does not exist.

        Raises:
            ValueError: If the JSON is larger than [`load`] reads, or a figure's name is not a plain `name.png`.
        """
        for name in self.figures:
            if not re.fullmatch(r"\w[\w-]*\.png", name, flags=re.ASCII):
                raise ValueError(f"figures must be named by letters, digits, _ and -, and .png, got {name!r:.200}")
        text = self.to_json_string()
        if (size := len(text.encode())) > MAX_JSON_BYTES:
            raise ValueError(
                f"the report has {size:,} bytes as JSON, expected at most {MAX_JSON_BYTES:,}: keep fewer results or "
                "shorter series"
            )
        contents = {
            REPORT_FILE: text.encode(),
            MARKDOWN_FILE: render_report_markdown(self).encode(),
            HTML_FILE: render_report_html(self).encode(),
            **{f"{FIGURES_FOLDER}/{name}": content for name, content in self.figures.items()},
        }
        path = Path(local_path(folder))
        write_together(path, contents, last=REPORT_FILE)
        for file in FIGURE_FILES:
            if file not in contents:  # of an earlier report
                (path / file).unlink(missing_ok=True)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Reads the evaluation.json of a folder, without the figures.

        Raises:
            OlderReportError: If a package that is too old wrote it.
            ValueError: If it is missing or damaged, or of another schema.
        """
        path = Path(local_path(folder)) / REPORT_FILE
        if not path.is_file():
            raise ValueError(f"{folder} holds no {REPORT_FILE}: write one with `robtok evaluate`")
        try:
            return cls.from_dict(read_json(path))
        except OlderReportError as exc:
            raise OlderReportError(f"{path}: {exc}") from exc
        except ValueError as exc:
            raise ValueError(f"{path}: {exc}") from exc
