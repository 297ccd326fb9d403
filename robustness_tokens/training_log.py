"""The CSV logs of a training run: written row by row, so that a killed run leaves whole rows."""

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

EVAL_LOG_FILE = "logs/eval_log.csv"
EVAL_LOG_COLUMNS = (
    "step",
    "eval_loss",
    "eval_invariance_cosine",
    "eval_adversarial_cosine",
    "eval_baseline_cosine",
    "eval_num_images",
)


def start_log(path: Path, rows: Sequence[Mapping[str, float]] = (), *, columns: Sequence[str] = LOG_COLUMNS) -> None:
    """Writes a log with these rows in place of whatever is there.

    Args:
        path: The file; its folder is made if needed.
        rows: Each with these columns.
        columns: Of the log.

    Raises:
        OSError: If it can't be written.
    """
    partial = path.with_name(f"{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=columns)
            writer.writeheader()
            writer.writerows(rows)
        partial.replace(path)
    except OSError as exc:
        raise _unwritable(path, exc) from exc


def append_to_log(path: Path, row: Mapping[str, float]) -> None:
    """Adds a row, with the columns of the log in their order, to a log that [`start_log`] began.

    Raises:
        OSError: If it can't be written.
    """
    try:
        with path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, fieldnames=list(row)).writerow(row)
    except OSError as exc:
        raise _unwritable(path, exc) from exc


def read_log(path: Path, *, last_step: int, columns: Sequence[str] = LOG_COLUMNS) -> list[dict[str, float]]:
    """Reads the rows up to a step.

    Args:
        path: The file; one that is missing has no rows.
        last_step: What a killed run wrote after the checkpoint that is resumed is left out.
        columns: Of the log.

    Returns:
        The rows, `"step"` a whole number.
    """
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        whole = [row for row in csv.DictReader(file) if all(row.get(column) for column in columns)]
    rows = [{"step": int(row.pop("step")), **{key: float(value) for key, value in row.items()}} for row in whole]
    return [row for row in rows if row["step"] <= last_step]


def _unwritable(path: Path, exc: OSError) -> OSError:
    return OSError(
        exc.errno,
        f"the log {path} could not be written ({exc.strerror}); checkpoints are as they were: make room, or mend the "
        "permissions, and go on with resume_from_checkpoint=True",
    )
