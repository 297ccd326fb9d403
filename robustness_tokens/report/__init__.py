"""The report of an evaluation: its data, its texts and its figures."""

from .markdown import code, headline, prose, results_table
from .plots import (
    plot_attacked_images,
    plot_eps_curves,
    plot_image_columns,
    plot_layer_maxima,
    plot_sweep,
    plot_training_curves,
)
from .schema import (
    Check,
    Knowledge,
    MeasuredImages,
    Metric,
    OlderReportError,
    ReportedKnowledge,
    Result,
    Task,
    TokensInPlace,
    pack_correct,
)
from .words import (
    ATTACKERS,
    METRICS,
    PART_WORST_CASE,
    WORST_CASE,
    describe_attacker,
    format_eps,
    format_setting,
    group_results,
    is_sweep,
    num_queries,
    plain,
)
from .writing import REPORT_FILE, RobustnessReport
