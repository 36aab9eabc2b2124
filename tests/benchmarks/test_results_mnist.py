"""benchmarks/results_mnist.py: the runs it makes, the runs it skips, and its table."""

import argparse
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    spec = importlib.util.spec_from_file_location("results_mnist", BENCHMARKS / "results_mnist.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def arguments(tmp_path, **changes):
    settings = dict(
        models=["lenet300-100", "lenet5"],
        methods=["dense", "set", "rigl"],
        densities=[0.05, 0.1],
        seeds=2,
        epochs=3,
        workers=2,
        data_dir=None,
        run_dir=tmp_path / "runs",
        csv=tmp_path / "m.csv",
        report=False,
    )
    return argparse.Namespace(**settings | changes)


def test_one_model_and_one_seed_come_first(script, tmp_path):
    order = [(w["model"], w["seed"], w["density"], w["method"]) for w in script.sweep(arguments(tmp_path))]
    assert order[:6] == [
        ("lenet300-100", 17, 1.0, "dense"),
        ("lenet300-100", 17, 0.05, "set"),
        ("lenet300-100", 17, 0.05, "rigl"),
        ("lenet300-100", 17, 0.1, "set"),
        ("lenet300-100", 17, 0.1, "rigl"),
        ("lenet300-100", 18, 1.0, "dense"),
    ]
    assert len(order) == len(set(order)) == 2 * 2 * 5


def test_finished_runs_are_not_repeated(script, tmp_path, monkeypatch):
    args = arguments(tmp_path, models=["lenet300-100"])
    made = []

    def run(command, **_):
        options = dict(zip(command[2::2], command[3::2], strict=False))
        made.append(" ".join(command))
        if "--dense" in command:
            return subprocess.CompletedProcess(command, 2, "", "main.py: error: the loss is nan")
        folder = Path(command[command.index("--run-dir") + 1]) / "mnist-x-0.05"
        folder.mkdir(parents=True)
        records = [dict(seconds=1.5, active_weights=7), dict(test_accuracy=0.96 + int(options["--seed"]) / 1000)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, records)))
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(script, "parse_arguments", lambda: args)
    monkeypatch.setattr(script.common, "commit", lambda: "abc")
    monkeypatch.setattr(script.subprocess, "run", run)
    script.main()
    assert len(made) == len(set(made)) == 10
    made.clear()
    script.main()
    assert len(made) == 2  # those that failed
    table = args.csv.with_suffix(".md").read_text()
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert ["SET", "2.25 (0.05)", "2.25 (0.05)"] in lines
    assert ["Deep Rewiring, published", "1.94", "1.81"] in lines
    assert args.csv.with_name("m-lenet300-100-3.png").read_bytes().startswith(b"\x89PNG")


def test_fewer_seeds_are_told(script):
    assert script.show([2.0, 3.0], seeds=3) == "2.50 (0.50) [2]"
    assert script.show([2.0], seeds=1) == "2.00"
    assert script.show(None, seeds=1) == ""


def test_every_argument_has_a_help(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["results_mnist.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        script.parse_arguments()
    assert "--densities" in capsys.readouterr().out
