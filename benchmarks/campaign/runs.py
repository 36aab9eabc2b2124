"""What a campaign is: the runs of mnist_cifar/main.py that it makes, in which order, and what was published.

A run is identified by the rules of its algorithm (`RULES`, `RULES_OF`) and by its command, which has every flag that
decides its result.
"""

import argparse
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import common

from campaign import kept
from sparselearning.flags import non_negative, positive_int
from sparselearning.methods import METHODS

# Raise it when the same command gives other results, as CHANGELOG.md tells: tables show runs of one set of rules only.
RULES = "2"
# Those of the methods that alone have changed since.
RULES_OF = dict.fromkeys(["set", "dsr", "deep_rewiring", "granet"], "3")

DENSE = "dense"
FIRST_SEED = 17


@dataclass(frozen=True)
class Run:
    """One run: what it trains, and the flags that decide its result beside these."""

    data: str
    model: str
    method: str  # a key of METHODS, or DENSE, whose density is 1
    density: float
    seed: int
    epochs: int
    flags: tuple[str, ...] = ()

    @property
    def command(self) -> str:
        """The arguments of main.py that decide the result."""
        kind = ["--dense"] if self.method == DENSE else ["--density", f"{self.density:g}"]
        if self.method not in (DENSE, "sparse_momentum"):  # sparse momentum is what main.py does
            kind += ["--method", self.method]
        seed = ["--seed", str(self.seed), "--epochs", str(self.epochs)]
        return " ".join(["--data", self.data, "--model", self.model, *kind, *self.flags, *seed])

    @property
    def key(self) -> tuple[str, str]:
        """What identifies the run among kept."""
        return self.rules, self.command

    @property
    def rules(self) -> str:
        """The rules of the algorithms that it trains by."""
        return RULES_OF.get(self.method, RULES)

    @property
    def name(self) -> str:
        """A name for files, one for each key."""
        digest = hashlib.sha256(" ".join(self.key).encode()).hexdigest()[:8]
        return f"{self.data}-{self.model}-{self.method}-{self.density:g}-{self.epochs}-{self.seed}-{digest}"


class Block(NamedTuple):
    """Runs of one model: each method at each density with so many seeds, the first seed first."""

    model: str
    methods: Sequence[str]
    densities: Sequence[float]
    seeds: int


@dataclass(frozen=True)
class Campaign:
    """What is run on one data set, and what was published.

    `flags` returns the flags of a model, a method and a number of epochs. `published` holds, by model, method and
    density, (test error in %, its standard error or None) pairs, one for each source. `errors` maps columns of
    accuracies to the headings of their errors; the first of them is compared with what was published. `measure`
    returns columns beside the usual ones, from a run and its folder.
    """

    title: str  # of the data set
    data: str
    epochs: int  # of the published runs
    queues: Mapping[str, Sequence[Block]]
    flags: Callable[[str, str, int], Sequence[str]]
    published: Mapping[str, Mapping[str, Mapping[float, Sequence[tuple[float, float | None]]]]]
    errors: Mapping[str, str] = field(default_factory=lambda: {"test_accuracy": "test error"})
    note: str = ""  # what a reader of the tables should know
    more_columns: Sequence[str] = ()
    measure: Callable[[Run, Path, argparse.Namespace], dict[str, Any]] = lambda *_: {}

    def run(self, model: str, method: str, density: float, seed: int, epochs: int) -> Run:
        """Return the run with today's flags."""
        flags = tuple(self.flags(model, method, epochs))
        return Run(self.data, model, method, 1.0 if method == DENSE else density, seed, epochs, flags)

    @property
    def columns(self) -> list[str]:
        """The columns of the CSV file."""
        return [*kept.COLUMNS, *self.more_columns]

    def rows(self, path: Path) -> list[dict[str, str]]:
        """Return the lines of the CSV file that today's rules and flags would repeat, one for each run."""
        rows = [row for row in kept.read(path) if self._of_row(row).key == (row["rules"], row["command"])]
        return list({row["command"]: row for row in rows}.values())

    def _of_row(self, row):
        return self.run(row["model"], row["method"], float(row["density"]), int(row["seed"]), int(row["epochs"]))


def parse_arguments(campaign: Campaign, description: str | None, argv: Sequence[str] | None = None):
    """Return the arguments of a script that makes this campaign."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=description, formatter_class=form)
    blocks = [block for blocks in campaign.queues.values() for block in blocks]
    models = [*dict.fromkeys(block.model for block in blocks)]
    first = next(iter(campaign.queues))
    place = common.RESULTS / f"runs_{campaign.data}.csv"
    add = parser.add_argument
    # fmt: off
    add("--queue", choices=[*campaign.queues], default=first, help=f"which runs to make (default: {first})")
    add("--models", nargs="+", choices=models, help="only these of the queue")
    add("--methods", nargs="+", choices=[DENSE, *METHODS], metavar="NAME", help="only these of the queue")
    add("--densities", nargs="+", type=float, help="only these of the queue; dense runs stay")
    add("--seeds", type=positive_int, help=f"number of seeds, from {FIRST_SEED} on (default: that of the queue)")
    add("--epochs", type=positive_int, default=campaign.epochs,
        help="epochs of a run; a shorter run decays its learning rate earlier, and has a column of its own "
        "(default: %(default)s)")
    add("--workers", type=positive_int, default=2, help="processes at a time (default: %(default)s)")
    add("--max-threads", type=positive_int, default=1, help="CPU threads of a process (default: %(default)s)")
    add("--hours", type=non_negative, default=math.inf, help="stop after so many hours; the same command goes on later")
    add("--data-dir", help="folder of the data files (default: that of main.py)")
    add("--run-dir", type=Path, default=Path("runs/campaign"), help="folder of the runs (default: %(default)s)")
    add("--csv", type=Path, default=place, help="results (default: %(default)s)")
    add("--report", action="store_true", help="only write tables and pictures of the finished runs")
    # fmt: on
    args = parser.parse_args(argv)
    if not args.report and not queue(campaign, args):
        parser.error(f"--queue {args.queue} has no run of these --models, --methods and --densities")
    return args


def queue(campaign: Campaign, args: argparse.Namespace) -> list[Run]:
    """Return the runs that the arguments ask for, in the order in which they are made."""
    return list(dict.fromkeys(_queue(campaign, args)))


def _queue(campaign: Campaign, args: argparse.Namespace) -> Iterator[Run]:
    for block in campaign.queues[args.queue]:
        if args.models and block.model not in args.models:
            continue
        for seed in range(FIRST_SEED, FIRST_SEED + (args.seeds or block.seeds)):
            for density in block.densities:
                for method in block.methods:
                    asked = method == DENSE or not args.densities or density in args.densities
                    if asked and (not args.methods or method in args.methods):
                        yield campaign.run(block.model, method, density, seed, args.epochs)
