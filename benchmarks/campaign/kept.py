"""What is kept of finished runs: a CSV file with a line for each, and their metrics in runs/<name>.jsonl beside it."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparselearning import checkpoint

COLUMNS = ["rules", "command", "data", "model", "method", "density", "seed", "epochs", "test_accuracy"]
COLUMNS += ["valid_accuracy", "active_weights", "inference_flops", "training_flops", "exploration_rate", "at_chance"]
COLUMNS += ["seconds_per_epoch", "threads", "commit", "torch", "hardware"]
BULKY = ("density_per_layer", "steps", "images_per_second")

Row = Mapping[str, Any]


def keep(records: Sequence[Row], path: Path) -> None:
    """Write the records of a run with five digits, without what is bulky; the last epoch keeps all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    last = max(i for i, record in enumerate(records) if "epoch" in record)
    lines = []
    for i, record in enumerate(records):
        kept = {name: value for name, value in record.items() if i == last or name not in BULKY}
        lines.append(json.dumps(rounded(kept)) + "\n")
    checkpoint.write_atomically(path, lambda file: file.write("".join(lines).encode()))


def rounded(value: Any) -> Any:
    """Return a value of JSON with five digits in each of its fractions."""
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def read(path: Path) -> list[dict[str, str]]:
    """Return the lines of the CSV file; an empty list if there is no file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.is_file() else []


def append(path: Path, row: Row, columns: Sequence[str]) -> None:
    """Add a line to the CSV file, which begins with the names of its columns.

    Raises:
        ValueError: if the file has other columns.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    begins = not path.is_file()
    if not begins and path.read_text().partition("\n")[0].strip() != ",".join(columns):
        raise ValueError(f"{path} has other columns than {', '.join(columns)}. Name another file with --csv.")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if begins:
            writer.writeheader()
        writer.writerow(row)
