"""Takes over a trained adapter as `examples/quickstart/robust-adapter/`, with its report and card.

    python examples/quickstart/prepare_data.py --all --output outputs/fashion-mnist
    robtok train --preset robust --base_model examples/quickstart/base --dataset outputs/fashion-mnist \\
        --split "train[:58000]" --eps 16/255 --save_steps 100 --save_total_limit 2 \\
        --output_dir outputs/robust --resume_from_checkpoint True      # the same line again resumes a stopped run
    robtok evaluate outputs/robust --dataset outputs/fashion-mnist --task classification --output_dir outputs/robust
    python examples/quickstart/ship_robust.py outputs/robust
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from robustness_tokens import RobustnessTokenForImageClassification
from robustness_tokens.hub import read_report


ROOT = Path(__file__).parents[2]
BASE, SHIPPED = "examples/quickstart/base", ROOT / "examples" / "quickstart" / "robust-adapter"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("adapter", type=Path, help="folder of the trained adapter")
    args = parser.parse_args()
    model = RobustnessTokenForImageClassification.from_pretrained(args.adapter)
    model.save_pretrained(SHIPPED, base_model_id=BASE)
    if (report := read_report(args.adapter)) is not None:
        dataclasses.replace(report, base_model=BASE, adapter=SHIPPED.name, figures={}).save(SHIPPED)
        model.save_pretrained(SHIPPED, base_model_id=BASE)  # the card shows the report
    print(f"wrote {SHIPPED}: {sum(file.stat().st_size for file in SHIPPED.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
