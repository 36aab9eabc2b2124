"""The curves of a run for TensorBoard: the numbers of metrics.jsonl, over optimizer steps."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any


class Curves:
    """Writes every record of a run to event files in a folder; `tensorboard --logdir runs` shows them.

    A run that goes on has earlier records in `metrics`. They are written again, and what was in the folder before is no
    longer shown: the folder may be another one, or hold records after the checkpoint that the run went back to.
    """

    def __init__(self, folder: Path, metrics: Sequence[Mapping[str, Any]]):
        from torch.utils.tensorboard.writer import SummaryWriter

        self.steps = 0
        self.writer = SummaryWriter(str(folder), purge_step=0)
        for record in metrics:
            self.add(record)

    def add(self, record: Mapping[str, Any]) -> None:
        """Write the numbers of a record at its step, or at the last one if it has none."""
        self.steps = record.get("steps", self.steps)
        for name, number in flat(record):
            self.writer.add_scalar(name, number, self.steps)
        self.writer.flush()

    def close(self) -> None:
        """End the writer's thread."""
        self.writer.close()


def flat(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Yield names and numbers of a record, those of dicts with the name of the dict before theirs.

    >>> dict(flat({"density": 0.05, "density_per_layer": {"fc1": 0.1}, "at_chance": False, "note": "none"}))
    {'density': 0.05, 'density_per_layer/fc1': 0.1, 'at_chance': 0.0}
    """
    for name, entry in record.items():
        if isinstance(entry, Mapping):
            yield from flat(entry, f"{prefix}{name}/")
        elif isinstance(entry, int | float):
            yield f"{prefix}{name}", float(entry)
