"""Images that cannot be read, and that a run may do without: `--skip-bad-images N`.

In training the next readable image of the source takes the place of a bad one, cut and mirrored by the random numbers
of the place. Sources are sorted by class, so it is mostly of the same class. Which image it is depends on the files
alone: batches keep their shape, and an epoch is the same on any number of processes and workers, and after a resume. In
evaluation nothing takes its place: it is padding, which does not count.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

from sparselearning.experiments.data.files import DataError
from sparselearning.processes import distributed

logger = logging.getLogger(__name__)


@dataclass
class Skips:
    """The bad images of a run; the log names each once.

    Each of several processes counts those that it meets, and learns of the others' at the end of a pass over the data.
    A run that is resumed counts anew.

    Args:
        limit: how many may be skipped.
    """

    limit: int = 0
    met: dict[str, str] = field(default_factory=dict)

    def add(self, bad: Mapping[str, str]) -> None:
        """Count bad images {name: reason}, except those that were met before.

        Raises:
            DataError: if there are more than `limit`.
        """
        for name, reason in bad.items():
            if name in self.met:
                continue
            if len(self.met) == self.limit:
                raise DataError(f"{name} cannot be read: {reason}. {self._what_to_do()}")
            self.met[name] = reason
            count = f"{len(self.met)} of at most {self.limit}"
            logger.warning("%s cannot be read and is skipped (%s): %s", name, count, reason)

    def of_all(self, bad: Mapping[str, str]) -> dict[str, str]:
        """Return the bad images that all processes met together; all call it at the same time."""
        if not self.limit:
            return dict(bad)
        return {name: reason for part in distributed.gather_everywhere(bad) for name, reason in part.items()}

    def _what_to_do(self):
        if not self.limit:
            return "Replace it, or let --skip-bad-images N leave out up to N; main.py DIR --verify lists all."
        return f"--skip-bad-images {self.limit} skips no more; main.py DIR --verify lists all."
