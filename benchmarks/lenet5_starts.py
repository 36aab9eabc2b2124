"""Which share of runs of LeNet-5 at a density of 1% begins to learn: the first epochs of 100, over ten seeds.

Sparse networks train on sparse kernels, three times as fast as masked ones here.

    python benchmarks/lenet5_starts.py                # goes on where it was stopped
    python benchmarks/lenet5_starts.py --seeds 3 --epochs 2

Writes the training losses of every run to results/lenet5_starts.csv, and the shares to results/lenet5_starts.md.
"""

import argparse
import json
import logging
import time
from collections import Counter
from pathlib import Path
from statistics import median

import common
from campaign import kept, work
from campaign.runs import DENSE, FIRST_SEED, Run
from tabulate import tabulate

from sparselearning.flags import positive_int

EPOCHS = 100
SETTINGS = [
    (),
    ("--lr", "0.05"),
    ("--rescale",),
    ("--rescale", "--lr", "0.05"),
    ("--sparse-init", "erdos_renyi_kernel"),
    ("--sparse-init", "erdos_renyi_kernel", "--lr", "0.05"),
]
COLUMNS = ["command", "flags", "seed", "losses", "outcome", "torch", "commit", "hardware"]
OUTCOMES = ["learns", "at chance", "diverges"]
POLL_SECONDS = 0.2


def runs(seeds: int) -> list[Run]:
    """Return the runs, seed by seed: every setting of sparse momentum, and a dense network."""
    found = []
    for seed in range(FIRST_SEED, FIRST_SEED + seeds):
        flags = ((*setting, "--sparse-backend", "cpu") for setting in SETTINGS)
        found += [*(Run("mnist", "lenet5", "sparse_momentum", 0.01, seed, EPOCHS, each) for each in flags)]
        found += [Run("mnist", "lenet5", DENSE, 1.0, seed, EPOCHS)]
    return found


def first_epochs(run: Run, args: argparse.Namespace) -> tuple[list[dict], str]:
    """Make the first epochs of a run, and stop it; return the record of each, and what became of the run.

    Raises:
        RuntimeError: if main.py ends before for another reason than a loss of NaN, or another process makes the run.
    """
    job = work.start(run, args)
    if job is None:
        raise RuntimeError(f"another process makes the run in {args.run_dir}: {run.command}")
    try:
        while len(records := epochs_of(job.place)) < args.epochs:
            if job.process.poll() is not None:
                if "the loss is nan" in (job.place / "console.txt").read_text():
                    return records, "diverges"
                raise RuntimeError(f"main.py ended with status {job.process.returncode}: {job.place / 'console.txt'}")
            time.sleep(POLL_SECONDS)
    finally:
        job.stop()
        job.process.wait()
    return records[: args.epochs], "at chance" if records[args.epochs - 1]["at_chance"] else "learns"


def epochs_of(place: Path) -> list[dict]:
    """Return the records of the epochs of the run in a folder."""
    text = "".join(path.read_text() for path in place.glob("*/metrics.jsonl"))
    return [record for record in map(json.loads, text.splitlines()) if "train_loss" in record]


def report(rows: list[dict[str, str]], path: Path) -> None:
    """Write the table of the shares."""
    groups: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault(row["flags"], []).append(row)
    lines = []
    for flags, of in groups.items():
        outcomes = Counter(row["outcome"] for row in of)
        losses = [float(row["losses"].split()[-1]) for row in of if row["outcome"] == "learns"]
        middle, worst = (f"{median(losses):.3f}", f"{max(losses):.3f}") if losses else ("", "")
        lines.append([f"`{flags}`", *(str(outcomes[name]) for name in OUTCOMES), middle, worst])
    epochs = max(len(row["losses"].split()) for row in rows)
    headers = ["flags", *OUTCOMES, "loss of those that learn, median", "worst"]
    head = f"MNIST, lenet5: runs by where they are after {epochs} of {EPOCHS} epochs. Guessing has a loss of 2.303.\n\n"
    path.write_text(head + tabulate(lines, headers, tablefmt="github", disable_numparse=True) + "\n")


def main() -> None:
    """Make the runs that are left, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--seeds", type=positive_int, default=10, help=f"from {FIRST_SEED} on (default: %(default)s)")
    add("--epochs", type=positive_int, default=3, help="epochs that are seen (default: %(default)s)")
    add("--max-threads", type=positive_int, default=1, help="CPU threads (default: %(default)s)")
    add("--data-dir", help="folder of the data files (default: that of main.py)")
    add("--run-dir", type=Path, default=Path("runs/starts"), help="folder of the runs (default: %(default)s)")
    add("--csv", type=Path, default=common.RESULTS / "lenet5_starts.csv", help="results (default: %(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    machine = common.machine("cpu")
    here = dict(torch=machine["torch"], commit=machine["commit"], hardware=machine["processor"])
    for run in runs(args.seeds):
        if run.command in {row["command"] for row in kept.read(args.csv)}:
            continue
        records, outcome = first_epochs(run, args)
        losses = " ".join(f"{record['train_loss']:.4g}" for record in records)
        flags = " ".join(["--dense"] if run.method == DENSE else ["--density 0.01", *run.flags])
        row = dict(flags=flags, seed=run.seed, losses=losses, outcome=outcome)
        kept.append(args.csv, dict(command=run.command, **row, **here), COLUMNS)
        logging.info("%s: %s, %s", run.command, losses, outcome)
    report(kept.read(args.csv), args.csv.with_suffix(".md"))


if __name__ == "__main__":
    main()
