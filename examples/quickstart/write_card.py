"""Writes docs/example_card.md, the card of the quickstart's adapter.

python examples/quickstart/write_card.py outputs/quickstart/adapter   # stores the run's config and report in card/
python examples/quickstart/write_card.py                              # from card/ alone
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from robustness_tokens.hub import CONFIG_FILE, load_adapter, read_config, read_report, render_card
from robustness_tokens.report import REPORT_FILE


HERE = Path(__file__).parent
STORED = HERE / "card"
EXAMPLE_CARD = HERE.parent.parent / "docs" / "example_card.md"


def render_quickstart_card() -> str:
    """Returns the card made from the stored config and report."""
    return render_card(
        read_config(STORED),
        name="outputs/quickstart/adapter",
        license="mit",  # as in the card of the base
        datasets=["zalando-datasets/fashion_mnist"],
        images="examples/quickstart/data",
        report=read_report(STORED),
    )


def take_over(adapter: Path) -> None:
    """Stores an adapter's config and report, with the base's path relative to the root of the repository."""
    loaded = load_adapter(adapter)
    config, report = loaded.config, loaded.report
    config.base_model_name_or_path = "examples/quickstart/base"
    STORED.mkdir(exist_ok=True)
    (STORED / CONFIG_FILE).write_text(config.to_json_string(use_diff=False), encoding="utf-8")
    (STORED / REPORT_FILE).unlink(missing_ok=True)
    if report is not None:
        report = dataclasses.replace(report, base_model=config.base_model_name_or_path)
        (STORED / REPORT_FILE).write_text(report.to_json_string(), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("adapter", type=Path, nargs="?", help="folder of a run's adapter, to be stored first")
    args = parser.parse_args()
    if args.adapter is not None:
        take_over(args.adapter)
    EXAMPLE_CARD.write_text(render_quickstart_card(), encoding="utf-8")
    print(f"wrote {EXAMPLE_CARD}")


if __name__ == "__main__":
    main()
