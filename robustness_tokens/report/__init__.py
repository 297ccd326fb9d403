"""The report of an evaluation: its schema, and how it reads."""

from .html import render_report_html
from .markdown import render_report_markdown
from .schema import Check, Result, RobustnessReport


__all__ = ["Check", "Result", "RobustnessReport", "render_report_html", "render_report_markdown"]
