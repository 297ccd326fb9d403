"""The report of an evaluation: its schema, and how it reads."""

from .html import render_report_html
from .markdown import (
    code,
    format_eps,
    format_setting,
    headline,
    plain,
    prose,
    render_report_markdown,
    results_table,
    table,
)
from .plots import (
    plot_attacked_images,
    plot_eps_curves,
    plot_image_columns,
    plot_layer_maxima,
    plot_sweep,
    plot_trade_off,
    plot_training_curves,
)
from .schema import Check, Knowledge, Metric, OlderReportError, Result, Task, TokensInPlace
from .words import ATTACKERS, METRICS, PART_WORST_CASE, WORST_CASE, group_results
from .writing import FIGURE_FILES, HTML_FILE, MARKDOWN_FILE, REPORT_FILE, RobustnessReport


__all__ = [
    "ATTACKERS",
    "FIGURE_FILES",
    "HTML_FILE",
    "MARKDOWN_FILE",
    "METRICS",
    "PART_WORST_CASE",
    "REPORT_FILE",
    "WORST_CASE",
    "Check",
    "Knowledge",
    "Metric",
    "OlderReportError",
    "Result",
    "RobustnessReport",
    "Task",
    "TokensInPlace",
    "code",
    "format_eps",
    "format_setting",
    "group_results",
    "headline",
    "plain",
    "plot_attacked_images",
    "plot_eps_curves",
    "plot_image_columns",
    "plot_layer_maxima",
    "plot_sweep",
    "plot_trade_off",
    "plot_training_curves",
    "prose",
    "render_report_html",
    "render_report_markdown",
    "results_table",
    "table",
]
