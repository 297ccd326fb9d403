"""The CSV log of a training run: written row by row, so that a killed run leaves a whole one."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path


LOG_FILE = "logs/training_log.csv"
LOG_COLUMNS = (
    "step",
    "loss",
    "invariance_cosine",
    "adversarial_cosine",
    "baseline_cosine",
    "learning_rate",
    "seconds",
)


def start_log(path: Path, rows: Sequence[Mapping[str, float]] = ()) -> None:
    """Writes a log with these rows in place of whatever is there.

    Args:
        path: The file; its folder is made if needed.
        rows: Each with `LOG_COLUMNS`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=LOG_COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    partial.replace(path)


def append_to_log(path: Path, row: Mapping[str, float]) -> None:
    """Adds a row with `LOG_COLUMNS` to a log that [`start_log`] began."""
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, fieldnames=LOG_COLUMNS).writerow(row)


def read_log(path: Path, *, last_step: int) -> list[dict[str, float]]:
    """Reads the rows up to a step.

    Args:
        path: The file; one that is missing has no rows.
        last_step: What a killed run wrote after the checkpoint that is resumed is left out.

    Returns:
        The rows, `"step"` a whole number.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        whole = [row for row in csv.DictReader(file) if all(row.get(column) for column in LOG_COLUMNS)]
    rows = [{"step": int(row.pop("step")), **{key: float(value) for key, value in row.items()}} for row in whole]
    return [row for row in rows if row["step"] <= last_step]
