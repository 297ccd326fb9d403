"""An adapter's files, on disk and on the Hub, and its card."""

from .adapter_folder import (
    CARD_FILE,
    CONFIG_FILE,
    PROCESSOR_FILE,
    Adapter,
    cached_commit,
    check_base_is_repo_id,
    check_no_other_adapter,
    check_no_other_model,
    holds_adapter,
    is_adapter,
    is_repo_id,
    load_adapter,
    read_config,
    read_report,
    report_of,
    write_adapter,
)
from .card import is_generated, read_card, render_card, to_eval_results, update_card
from .pushing import push_adapter, push_adversarial_pairs
