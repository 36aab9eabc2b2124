"""Makes the runs of a campaign in processes of their own, and goes on with those that were stopped."""

import argparse
import fcntl
import json
import logging
import os
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch

from campaign import kept
from campaign.runs import Campaign, Run, queue
from sparselearning.experiments.run.stopping import SIGNALS, handled

SCRIPT = Path(__file__).parents[2] / "mnist_cifar" / "main.py"
ATTEMPTS = 5  # of a run that something else than the campaign stops
POLL_SECONDS = 0.5
STOPPED = [128 + number for number in SIGNALS]


def work(campaign: Campaign, args: argparse.Namespace) -> int:
    """Make the runs that are not in the CSV file; return how many failed.

    SIGTERM, SIGINT and the end of --hours stop all processes after the step that they do; they write checkpoints.
    """
    return Work(campaign, args).run()


@dataclass
class Job:
    """A run that a process makes in the folder `place`."""

    run: Run
    place: Path
    process: subprocess.Popen
    told_to_stop: bool = False

    def stop(self) -> None:
        """Tell the process once to write a checkpoint and end; a second time would end it at once."""
        if not self.told_to_stop:
            self.told_to_stop = True
            self.process.terminate()


class Work:
    """The runs that wait, those that processes make, and those that failed."""

    def __init__(self, campaign: Campaign, args: argparse.Namespace):
        self.campaign, self.args = campaign, args
        self.waiting = queue(campaign, args)
        self.running: list[Job] = []
        self.failed = 0
        self.attempts: Counter[Run] = Counter()
        self.stopping = False
        machine = common.machine("cpu")
        hardware = f"{machine['processor']}, {machine['cores']} cores, {machine['cpu_capability']}"
        self.here = dict(threads=args.max_threads, commit=machine["commit"], torch=torch.__version__, hardware=hardware)

    def run(self) -> int:
        """Make the runs; return how many failed."""
        there = len(kept.read(self.args.csv))
        logging.info("%d runs in the queue; %s has %d results", len(self.waiting), self.args.csv, there)
        deadline = time.monotonic() + 3600 * self.args.hours
        with handled(self._stop):
            try:
                while self.running or (self.waiting and not self.stopping):
                    self.stopping = self.stopping or time.monotonic() > deadline
                    self._turn()
                    time.sleep(POLL_SECONDS)
            finally:  # where this program fails, too
                for job in self.running:
                    job.stop()
        return self.failed

    def _turn(self):
        """Start what may start, stop what has to stop, and take the results of what has ended."""
        while not self.stopping and len(self.running) < self.args.workers and (job := self._start_next()):
            self.running.append(job)
        if self.stopping:
            for job in self.running:
                job.stop()
        for job in [job for job in self.running if job.process.poll() is not None]:
            self.running.remove(job)
            self._end(job)

    def _stop(self, _signal, _frame):
        self.stopping = True

    def _start_next(self):
        """Start the first waiting run that is not done, and that no process of another campaign makes just now."""
        done = {(row["rules"], row["command"]) for row in kept.read(self.args.csv)}
        self.waiting = [run for run in self.waiting if run.key not in done]
        for run in self.waiting:
            if job := start(run, self.args):
                self.waiting.remove(run)
                return job
        return None

    def _end(self, job):
        status = job.process.returncode
        if status == 0:
            row = finished(self.campaign, job, self.args) | self.here
            kept.append(self.args.csv, row, self.campaign.columns)
            logging.info("%s: test accuracy %.4f; %d wait", job.run.name, row["test_accuracy"], len(self.waiting))
            return
        self.attempts[job.run] += 1
        if (status < 0 or status in STOPPED) and (self.stopping or self.attempts[job.run] < ATTEMPTS):
            self.waiting.insert(0, job.run)
            logging.info("%s: stopped with status %d", job.run.name, status)
            return
        self.failed += 1
        lines = (job.place / "console.txt").read_text(errors="replace").splitlines()
        logging.error("main.py %s ended with status %d: %s", job.run.command, status, lines[-1] if lines else "")


def start(run: Run, args: argparse.Namespace) -> Job | None:
    """Start a process that makes the run or goes on with it; return None if another one makes it.

    The process holds a lock on its folder as long as it lives, even if the campaign is killed; the file has its id. It
    does not get the Ctrl-C of a terminal: the campaign stops it.
    """
    place = args.run_dir / f"rules-{run.rules}" / run.name
    place.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(SCRIPT), *run.command.split(), "--device", "cpu", "--run-dir", str(place)]
    command += ["--resume", "auto", "--max-threads", str(args.max_threads)]
    command += ["--data-dir", str(args.data_dir)] if args.data_dir else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.max_threads)}
    with (place / "lock").open("a") as lock, (place / "console.txt").open("a") as console:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        output = dict(stdout=console, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        own = dict(pass_fds=[lock.fileno()], start_new_session=True)
        process = subprocess.Popen(command, env=environment, **output, **own)
        lock.truncate(0)
        lock.write(str(process.pid))
        return Job(run, place, process)


def finished(campaign: Campaign, job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Write what is kept of a finished run's metrics; return its results by column."""
    newest = max(job.place.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    records = [json.loads(line) for line in newest.read_text().splitlines()]
    *epochs, test = records
    last = epochs[-1]
    run = {name: getattr(job.run, name) for name in ("data", "model", "method", "density", "seed", "epochs")}
    found = {name: last.get(name) for name in ("valid_accuracy", "active_weights", "at_chance")}
    found |= dict(exploration_rate=last.get("exploration_rate", 1.0), test_accuracy=test["test_accuracy"])
    found |= dict(inference_flops=test["inference_flops"], training_flops=test["training_flops"])
    found |= dict(seconds_per_epoch=round(median(record["seconds"] for record in epochs), 2))
    found |= campaign.measure(job.run, newest.parent, args)
    kept.keep(records, args.csv.parent / "runs" / f"{job.run.name}.jsonl")
    return dict(rules=job.run.rules, command=job.run.command, **run, **found)
