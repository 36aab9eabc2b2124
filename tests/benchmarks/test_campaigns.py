"""Campaigns of runs: their order, what identifies a run, stopping and going on, what is kept, and the tables."""

import csv
import fcntl
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from data_files import write_cifar_records, write_mnist
from script import ROOT, load_main

from sparselearning.experiments.run.folder import NOT_IN_THE_NAME

BENCHMARKS = ROOT / "benchmarks"
PATIENCE = 300  # seconds that a process may take which takes few
main = load_main()


@pytest.fixture
def load(monkeypatch):
    """Import a module of the benchmarks."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module


@pytest.fixture
def mnist(load):
    return load("results_mnist").CAMPAIGN


@pytest.fixture
def cifar(load):
    return load("results_cifar").CAMPAIGN


@pytest.fixture
def arguments(load, tmp_path):
    """Return the arguments of a script for a campaign in a folder of its own."""

    def arguments(campaign, words=""):
        place = ["--run-dir", str(tmp_path / "runs"), "--csv", str(tmp_path / "out" / "r.csv")]
        return load("campaign.runs").parse_arguments(
            campaign, "", [*place, "--data-dir", str(tmp_path), *words.split()]
        )

    return arguments


@pytest.fixture
def order(load, arguments):
    """Return (model, method, density, seed) of the runs of a queue, in their order."""

    def order(campaign, words=""):
        runs = load("campaign.runs").queue(campaign, arguments(campaign, words))
        return [(run.model, run.method, run.density, run.seed) for run in runs]

    return order


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def lines_of(table):
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]


# Which runs, and what identifies one


def test_what_the_readme_claims_comes_first(mnist, order):
    runs = order(mnist)
    densities = (0.01, 0.02, 0.03, 0.04, 0.05, 0.1)
    seeds = range(17, 22)
    assert runs[:30] == [("lenet300-100", "sparse_momentum", d, seed) for seed in seeds for d in densities]
    assert runs[30:35] == [("lenet5", "sparse_momentum", 0.01, seed) for seed in seeds]
    assert len(runs) == len(set(runs)) == 30 + 5 + 5 + 10 + 4 * 4 * 3 + 5
    assert {method for model, method, *_ in runs if model == "lenet300-100"} == {
        *("sparse_momentum", "dense", "rigl", "set", "dsr", "deep_rewiring")
    }


def test_the_order_on_cifar(cifar, order):
    alexnet = [("alexnet-s", "sparse_momentum", 0.1, seed) for seed in (17, 18, 19)]
    assert order(cifar) == [
        *(*alexnet, ("alexnet-s", "dense", 1.0, 17)),
        *(("vgg-d", "sparse_momentum", 0.05, seed) for seed in (17, 18)),
        ("wrn-28-2", "sparse_momentum", 0.1, 17),
        ("wrn-16-8", "sparse_momentum", 0.05, 17),
        *(("alexnet-s", method, 0.1, 17) for method in ("rigl", "set", "static")),
    ]


def test_a_queue_can_be_filtered(mnist, order):
    assert order(mnist, "--models lenet5 --seeds 1") == [
        *(("lenet5", "sparse_momentum", density, 17) for density in (0.01, 0.02, 0.05)),
        ("lenet5", "dense", 1.0, 17),
    ]
    chosen = order(mnist, "--queue methods --methods set dense --densities 0.1 --models lenet5 --seeds 2")
    assert chosen == [("lenet5", name, d, s) for s in (17, 18) for name, d in [("dense", 1.0), ("set", 0.1)]]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--methods set --models lenet5", "has no run of these --models, --methods and --densities"),
        ("--densities 0.07 --methods set", "has no run of these"),
        ("--workers 0", "--workers: expected a whole number of at least 1"),
        ("--hours -1", "--hours: expected a finite number of at least 0"),
        ("--models vgg-d", "invalid choice: 'vgg-d'"),
    ],
)
def test_wrong_arguments_end_in_one_line(mnist, arguments, words, reason, capsys):
    with pytest.raises(SystemExit, match="2"):
        arguments(mnist, words)
    assert reason in capsys.readouterr().err


def computed(words):
    """Return what the arguments of main.py say about the result, but for the seed."""
    args = vars(main.parse_arguments([*words, "--device", "cpu"]))
    return {name: value for name, value in args.items() if name not in (*NOT_IN_THE_NAME, "seed", "method")}


def test_the_commands_of_the_page_make_the_same_runs(mnist, load):
    page = (ROOT / "docs" / "results.md").read_text()
    commands = [line for line in page.splitlines() if line.startswith("|") and "python main.py" in line]
    assert len(commands) >= 4
    for line in commands:
        words = re.search(r"`python main.py (.+)`", line)[1].split()
        args = main.parse_arguments([*words, "--device", "cpu"])
        method = "dense" if args.dense else "sparse_momentum"
        run = mnist.run(args.model, method, args.density, args.seed, args.epochs)
        assert computed(words) == computed(run.command.split()), line


@pytest.mark.parametrize("name", ["mnist", "cifar"])
def test_every_command_is_one_that_main_takes(name, load, arguments, request):
    campaign = request.getfixturevalue(name)
    queue_of = load("campaign.runs").queue
    runs = {run for queue in campaign.queues for run in queue_of(campaign, arguments(campaign, f"--queue {queue}"))}
    assert len({run.name for run in runs}) == len({run.key for run in runs}) == len(runs)
    for run in runs:
        args = main.parse_arguments([*run.command.split(), "--device", "cpu"])
        assert (args.data, args.model, args.seed, args.epochs) == (name, run.model, run.seed, campaign.epochs)
        assert args.dense or args.density == run.density


def test_cifar_has_the_schedule_of_the_paper(cifar):
    sparse = cifar.run("vgg-d", "sparse_momentum", 0.05, 17, 250).command
    assert "--batch-size 128 --decay_frequency 30000 --sparse-backend cpu --seed 17 --epochs 250" in sparse
    assert "--sparse-backend" not in cifar.run("vgg-d", "dense", 1.0, 17, 250).command
    assert "--decay_frequency 3000 " in cifar.run("vgg-d", "dense", 1.0, 17, 25).command


def test_masks_that_are_chosen_by_a_score_are_not_rescaled(mnist):
    assert "--lr 0.05 --rescale" in mnist.run("lenet5", "set", 0.05, 17, 100).command
    for method in ("dense", "snip", "top_kast"):
        command = mnist.run("lenet5", method, 0.05, 17, 100).command
        assert "--lr 0.05" in command
        assert "--rescale" not in command


# Making the runs


@pytest.mark.long
def test_finished_runs_are_kept_and_not_repeated(mnist, load, arguments, tmp_path, monkeypatch):
    write_mnist(tmp_path / "MNIST" / "raw")
    words = "--models lenet300-100 --methods dense set --densities 0.05 --seeds 2 --epochs 2"
    args = arguments(mnist, words)
    work, tables = load("campaign.work"), load("campaign.tables")
    assert work.work(mnist, args) == 0
    rows = read_csv(args.csv)
    made = sorted((row["method"], row["seed"]) for row in rows)
    assert made == [(method, seed) for method in ("dense", "set") for seed in ("17", "18")]
    for row in rows:
        assert row["rules"] == {"dense": "2", "set": "3"}[row["method"]]
        assert row["at_chance"] in ("True", "False")
        assert float(row["seconds_per_epoch"]) >= 0  # of two small epochs
        assert "" not in (row["hardware"], row["torch"], row["commit"])
        (path,) = (args.csv.parent / "runs").glob(f"mnist-lenet300-100-{row['method']}-*-2-{row['seed']}-*.jsonl")
        first, second, test = map(json.loads, path.read_text().splitlines())
        assert "density_per_layer" not in first
        assert ("density_per_layer" in second) == (row["method"] == "set")
        assert test["test_accuracy"] == pytest.approx(float(row["test_accuracy"]))

    monkeypatch.setattr(work, "start", lambda *_: pytest.fail("a finished run is repeated"))
    assert work.work(mnist, args) == 0
    tables.report(mnist, args.csv)
    assert "| SET " in args.csv.with_suffix(".md").read_text()
    for picture in ("r-lenet300-100-2.png", "r-lenet300-100-2-flops.png"):
        assert args.csv.with_name(picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_a_run_on_cifar_has_its_first_test_images_apart(cifar, load, arguments, tmp_path, monkeypatch):
    write_cifar_records(tmp_path, count=6)
    script = load("results_cifar")
    monkeypatch.setattr(script, "FIRST", 4)
    args = arguments(cifar, "--models alexnet-s --methods sparse_momentum --seeds 1 --epochs 1")
    assert load("campaign.work").work(cifar, args) == 0
    (row,) = read_csv(args.csv)
    (checkpoint,) = args.run_dir.glob("*/*/*/checkpoint.pt")
    monkeypatch.setattr(script, "FIRST", 6)
    whole = script.measure(SimpleNamespace(model="alexnet-s"), checkpoint.parent, args)
    assert whole["first_1000_test_accuracy"] == pytest.approx(float(row["test_accuracy"]))
    assert float(row["first_1000_test_accuracy"]) in (0, 0.25, 0.5, 0.75, 1)
    load("campaign.tables").report(cifar, args.csv)
    text = args.csv.with_suffix(".md").read_text()
    assert "test error, images 0-999, 250 epochs" in text
    assert "validation error, 1 epochs" in text
    assert "14.27" in text


def wait_for(condition):
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def epochs_in(path):
    return [json.loads(line).get("epoch") for line in path.read_text().splitlines()] if path.is_file() else []


@pytest.mark.long
@pytest.mark.parametrize(
    "whom", ["campaign", *(pytest.param(one, marks=pytest.mark.slow) for one in ("run", "campaign alone"))]
)
def test_a_run_that_is_stopped_goes_on(whom, tmp_path):
    """SIGTERM to the campaign, which begins again; SIGKILL to the run, with which the campaign goes on itself.

    And SIGKILL to the campaign, which begins again and waits for the run that still goes on.
    """
    write_mnist(tmp_path / "MNIST" / "raw")
    argv = f"--models lenet300-100 --methods set --densities 0.05 --seeds 1 --epochs 60 --data-dir {tmp_path}".split()
    argv += ["--run-dir", str(tmp_path / "runs"), "--csv", str(tmp_path / "r.csv")]
    command = [sys.executable, str(BENCHMARKS / "results_mnist.py"), *argv]
    log = tmp_path / "log.txt"

    def begin():
        with log.open("a") as file:
            return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)

    process = begin()

    def metrics():
        return next((tmp_path / "runs").glob("*/*/*/metrics.jsonl"), Path("none"))

    wait_for(lambda: len(epochs_in(metrics())) >= 3)
    if whom == "campaign":
        process.terminate()
        assert process.wait(PATIENCE) == 0
        assert not (tmp_path / "r.csv").exists()
        assert len(epochs_in(metrics())) < 60
        process = begin()
    elif whom == "campaign alone":
        process.kill()
        process.wait(PATIENCE)
        process = begin()
    else:
        os.kill(int((metrics().parent.parent / "lock").read_text()), signal.SIGKILL)
    assert process.wait(PATIENCE) == 0, log.read_text()
    assert epochs_in(metrics()) == [*range(1, 61), None]
    assert len(read_csv(tmp_path / "r.csv")) == 1
    console = (metrics().parent.parent / "console.txt").read_text()
    assert console.count("epoch 1  ") == 1, "it began again"
    assert len(re.findall("^density 0.05", console, re.MULTILINE)) == 2


@pytest.fixture
def campaign_of_one(mnist, load, arguments, tmp_path):
    """The module that makes runs, and a campaign of a single run."""
    args = arguments(mnist, "--models lenet5 --methods dense --seeds 1 --epochs 1 --workers 1")
    work = load("campaign.work")
    return work, work.Work(mnist, args)


def fake(work, status, place):
    """A process that ended with a status."""
    place.mkdir(exist_ok=True)
    (place / "console.txt").write_text("first\nmain.py: error: the reason\n")
    return lambda run, args: work.Job(run, place, SimpleNamespace(poll=lambda: status, returncode=status))


@pytest.mark.parametrize(("status", "attempts"), [(2, 1), (-9, 5), (143, 5)])
def test_a_run_that_fails_is_said_and_not_repeated_for_ever(
    campaign_of_one, status, attempts, monkeypatch, tmp_path, caplog
):
    work, campaign = campaign_of_one
    begin, started = fake(work, status, tmp_path / "place"), []
    monkeypatch.setattr(work, "POLL_SECONDS", 0)
    monkeypatch.setattr(work, "start", lambda *given: started.append(given) or begin(*given))
    assert campaign.run() == 1
    assert len(started) == attempts
    assert "--data mnist --model lenet5 --dense" in caplog.text
    assert "the reason" in caplog.text


def test_no_run_starts_when_the_hours_are_over(campaign_of_one, monkeypatch):
    work, campaign = campaign_of_one
    campaign.args.hours = 0
    monkeypatch.setattr(work, "start", lambda *_: pytest.fail("a run was started"))
    assert campaign.run() == 0


def test_a_run_that_another_process_makes_is_waited_for(campaign_of_one):
    work, campaign = campaign_of_one
    (run,) = campaign.waiting
    place = campaign.args.run_dir / f"rules-{run.rules}" / run.name
    place.mkdir(parents=True)
    with (place / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert work.start(run, campaign.args) is None
        assert campaign._start_next() is None
    assert campaign.waiting == [run]


# Tables


def row_of(campaign, load, seed, accuracy, **changes):
    settings = dict(model="lenet5", method="sparse_momentum", density=0.01, epochs=100) | changes
    chance = settings.pop("at_chance", False)
    run = campaign.run(seed=seed, **settings)
    row = dict.fromkeys(campaign.columns, 0) | settings | dict(rules=run.rules, command=run.command)
    return row | dict(seed=seed, test_accuracy=accuracy, at_chance=chance, seconds_per_epoch=2.5, training_flops=0.2)


def test_the_table_of_an_example(mnist, load, tmp_path):
    kept, tables = load("campaign.kept"), load("campaign.tables")
    path = tmp_path / "r.csv"
    for seed, accuracy in [(17, 0.991), (18, 0.993)]:
        kept.append(path, row_of(mnist, load, seed, accuracy), mnist.columns)
    kept.append(path, row_of(mnist, load, 17, 0.1135, epochs=5, at_chance=True), mnist.columns)
    for _ in range(2):  # two campaigns at a time may both collect a run
        kept.append(path, row_of(mnist, load, 17, 0.994, method="dense", density=1.0), mnist.columns)
    # An older rule, and other flags than today's: not mixed with the others.
    kept.append(path, row_of(mnist, load, 19, 0.5) | dict(rules="1"), mnist.columns)
    kept.append(path, row_of(mnist, load, 20, 0.5) | dict(command="--data mnist --lr 7"), mnist.columns)
    tables.report(mnist, path)
    lines = lines_of(path.with_suffix(".md").read_text())
    # (0.8 - 0.83) / sqrt(0.1^2 + 0.04^2) = -0.28
    sparse = ["0.80 (0.10)", "0.83 (0.04)", "-0.03", "-0.3", "2", "0", "2.5", "88.65 [1, 1]"]
    assert ["Sparse momentum", "1%", *sparse] in lines
    assert ["Dense", "100%", "0.60", "0.58 (0.01)", "+0.02", "-", "1", "0", "2.5", ""] in lines
    assert len(mnist.rows(path)) == 4


def test_several_published_results_are_compared_one_by_one(load):
    tables = load("campaign.tables")
    assert tables.difference([2.1, 2.3, 2.5], 2.0, 0.05) == ("+0.30", "+2.4")
    assert tables.difference([2.0, 2.0], 2.5, 0.0) == ("-0.50", "-")
    assert tables.difference([2.0], 2.5, 0.1) == ("-0.50", "-")
    assert (tables.show(2.364, 0.044), tables.show(2.364, None)) == ("2.36 (0.04)", "2.36")


def test_a_file_of_other_columns_is_refused(load, tmp_path):
    kept = load("campaign.kept")
    kept.append(tmp_path / "r.csv", dict(a=1, b=2), ["a", "b"])
    with pytest.raises(ValueError, match=r"has other columns than a, c.*--csv"):
        kept.append(tmp_path / "r.csv", dict(a=1, c=2), ["a", "c"])


def test_numbers_are_kept_with_five_digits(load):
    rounded = load("campaign.kept").rounded
    assert rounded({"a": 0.123456789, "b": 7, "c": {"d": 1234567.0}, "e": True}) == {
        **{"a": 0.12346, "b": 7, "c": {"d": 1234600.0}, "e": True}
    }


@pytest.mark.parametrize("name", ["mnist", "cifar"])
def test_every_argument_has_a_help(name, load, capsys):
    script = load(f"results_{name}")
    with pytest.raises(SystemExit, match="0"):
        script.main(script.CAMPAIGN, script.__doc__, ["--help"])
    assert "--hours" in capsys.readouterr().out
