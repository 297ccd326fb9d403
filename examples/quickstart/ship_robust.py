r"""Copies a trained adapter to `examples/quickstart/robust-adapter/`, with its report and card.

    python examples/quickstart/prepare_data.py --all --output outputs/fashion-mnist
    robtok train --preset robust --base_model examples/quickstart/base --dataset outputs/fashion-mnist \
        --split "train[:58000]" --eps 16/255 --save_steps 100 --save_total_limit 2 \
        --output_dir outputs/robust --resume_from_checkpoint True      # the same line again resumes a stopped run
    robtok evaluate outputs/robust --dataset outputs/fashion-mnist --dataset_name Fashion-MNIST \
        --task classification --attacker_dataset outputs/fashion-mnist --attacker_split "train[:58000]" \
        --own_tokens_steps 400 --output_dir outputs/robust
    python examples/quickstart/ship_robust.py outputs/robust
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path

from robustness_tokens import RobustnessTokenForImageClassification
from robustness_tokens.hub import load_adapter
from robustness_tokens.report import REPORT_FILE


ROOT = Path(__file__).parents[2]
# Relative to the root, which config and card name.
BASE, SHIPPED = "examples/quickstart/base", Path("examples/quickstart/robust-adapter")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("adapter", type=Path, help="folder of the trained adapter")
    args = parser.parse_args()
    adapter = args.adapter.resolve()
    os.chdir(ROOT)
    model = RobustnessTokenForImageClassification.from_pretrained(adapter, base_model=BASE)
    model.save_pretrained(SHIPPED, base_model_id=BASE)
    if (report := load_adapter(adapter).report) is not None:
        report = dataclasses.replace(report, base_model=BASE, adapter=SHIPPED.name)
        (SHIPPED / REPORT_FILE).write_text(report.to_json_string(), encoding="utf-8")
        model.save_pretrained(SHIPPED, base_model_id=BASE)  # the card shows the report
    print(f"wrote {SHIPPED}: {sum(file.stat().st_size for file in SHIPPED.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
