"""The benchmark of engines: pairs, errors, what is skipped, and what is not run again. Engines are stand-ins."""

import importlib
import itertools
import json
import math
import sys

import numpy as np
import pytest
import torch
from script import ROOT
from torch import nn

STAND_INS = """
import sys
import numpy as np

def right(path, x, threads):
    weight = np.load(path + ".npy")
    return lambda: x @ weight.T

def wrong(path, x, threads):
    return lambda: right(path, x, threads)() + 0.5

def refuses(path, x, threads):
    print("a banner")
    raise RuntimeError("first line\\nno licence")

def dies(path, x, threads):
    sys.exit(3)
"""
KINDS = ["eager", "eager channels_last", "CSR", "right", "wrong", "refuses", "dies", "absent"]


@pytest.fixture
def engines(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("engines")


@pytest.fixture
def measured(engines, monkeypatch, tmp_path):
    """The module that measures, with a small model and stand-ins for the peers."""
    (tmp_path / "stand_ins.py").write_text(STAND_INS)
    module = importlib.import_module("peers.measured")
    peers = {kind: ("here", f"{tmp_path}/stand_ins.py:{kind}") for kind in ("right", "wrong", "refuses", "dies")}
    monkeypatch.setattr(module, "PEERS", {**peers, "absent": ("elsewhere", "absent")})
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    nn.init.zeros_(layer.bias)
    network = nn.Sequential(layer).eval()
    monkeypatch.setattr(module.rows, "network", lambda row: (network, torch.randn(2, 8)))
    weight = layer.weight.detach().numpy()
    monkeypatch.setattr(module.rows, "export", lambda model, x, path: np.save(f"{path}.npy", weight))
    return module


def job(**more):
    row = ["mlp", 0.05, "constant", 1, 0.2]
    pythons = {"here": [sys.executable, ""], "elsewhere": ["", "not installed: ERROR: no wheel"]}
    return dict(row=row, threads=1, isa="default", rounds=2, least=0.0, kinds=KINDS, pythons=pythons) | more


@pytest.mark.long
def test_kinds_are_measured_compared_and_skipped_by_name(measured):
    result = measured.measure(job())["result"]
    assert list(result) == ["ours", *KINDS]
    for kind in ("eager", "CSR", "right", "wrong"):
        assert min(result[kind][time] for time in ("ms", "ours_ms", "ratio")) > 0
    assert result["right"]["largest_difference"] < 1e-5
    assert result["wrong"]["largest_difference"] == pytest.approx(0.5, abs=1e-5)
    assert result["ours"]["largest_difference"] < 1e-5
    assert result["eager channels_last"] == {"skipped": "rows have no channels"}
    assert result["refuses"] == {"skipped": "RuntimeError: no licence"}
    assert result["dies"] == {"skipped": "its process ended with status 3"}
    assert result["absent"] == {"skipped": "not installed: ERROR: no wheel"}


def test_an_engine_that_cannot_be_held_to_avx2_is_skipped_there(measured, monkeypatch):
    monkeypatch.setattr(measured, "NO_AVX2", {"right": "it cannot be held"})
    assert measured.measure(job(isa="avx2", kinds=["right"]))["result"]["right"] == {"skipped": "it cannot be held"}


def test_a_pair_takes_turns_and_its_ratio_is_of_turns(measured):
    order = []
    ours, theirs = itertools.cycle([1.0, 2.0, 4.0]), itertools.cycle([3.0, 4.0, 20.0])

    def turn(name, times):
        return lambda least: order.append(name) or next(times)

    found = measured.pair(turn("ours", ours), turn("theirs", theirs), 3, 0.0)
    assert order == ["ours", "theirs"] * 3
    assert found == dict(ms=4000.0, ours_ms=2000.0, ratio=3.0)


def record(engines, name="mlp 0.05 b1", **result):
    times = {"ours": dict(ms=1.0, largest_difference=1e-6, largest_output=2.0), **result}
    machine = engines.common.machine("cpu")
    return dict(name=name, isa="default", threads=1, result=times, load_average=[0.5, 0, 0], machine=machine)


def kind(ratio, difference=1e-6):
    return dict(ms=ratio, ours_ms=1.0, ratio=ratio, largest_difference=difference, largest_output=2.0)


def test_the_table_compares_with_the_best_dense_engine_and_names_what_was_skipped(engines):
    table = importlib.import_module("peers.engines_table")
    result = {
        "eager": kind(8.0),
        "OpenVINO": kind(6.0),
        "OpenVINO int8": kind(2.0, 0.2),
        "DeepSparse": {"skipped": "no wheel"},
    }
    records = [record(engines, **result)]
    text = table.table(records)
    assert "OpenVINO: 6.00" in text
    assert "0.17 of 0.18 met" in text
    assert "DeepSparse was skipped: no wheel (1 rows)" in text
    cells = [cell.strip() for cell in text.splitlines()[4].split("|")[1:-1]]
    assert cells[-4:] == ["5e-07", "5e-07", "0.1", "0.5"]
    assert table.bars(records) == {"mlp 0.05\nbatch 1": {"ours": 6.0, "OpenVINO int8": 3.0}}


def test_a_row_without_dense_engines_has_no_goal_met(engines):
    table = importlib.import_module("peers.engines_table")
    text = table.table([record(engines, CSR=kind(1.0))])
    assert "met" not in text
    assert table.bars([record(engines, CSR=kind(1.0))]) == {}
    assert math.isnan(table.over_best_dense({})[1])


@pytest.mark.long
def test_rows_that_have_results_are_not_run_again(engines, monkeypatch, tmp_path):
    ran, asked = [], []

    def in_a_process(job):
        ran.append(job["row"].name)
        asked.append(job["kinds"])
        if job["row"].batch == 8:
            return None  # it fails
        kinds = {name: kind(2.0) for name in job["kinds"]}
        return {name: record(engines, **kinds)[name] for name in ("result", "load_average")}

    monkeypatch.setattr(engines, "in_a_process", in_a_process)
    arguments = ["--rows", "mlp", "--threads", "1", "--isa", "default", "--output", str(tmp_path / "e.json")]
    arguments += ["--kinds", "eager"]
    engines.main(arguments)
    assert ran == ["mlp 0.05 b1", "mlp 0.05 b8"]
    assert {path.name for path in tmp_path.iterdir()} == {"e.json", "e.md", "e.csv", "e.png"}
    engines.main(arguments)
    assert ran[2:] == ["mlp 0.05 b8"]
    engines.main([*arguments[:-1], "eager,CSR"])
    assert ran[3:] == ["mlp 0.05 b1", "mlp 0.05 b8"]
    assert asked[3:] == [["CSR"], ["eager", "CSR"]]
    engines.main([*arguments, "--again"])
    assert ran[5:] == ["mlp 0.05 b1", "mlp 0.05 b8"]
    kept = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert [(each["name"], each["machine"]["torch"]) for each in kept] == [("mlp 0.05 b1", torch.__version__)]
    job = dict(row=engines.rows.ROWS[-2], isa="default", threads=1)
    assert engines.known_results(kept, job).keys() == {"ours", "eager", "CSR"}
    kept[0]["machine"]["processor"] = "another"
    assert engines.known_results(kept, job) == {}


def test_rows_are_those_of_the_issue_and_are_chosen_by_parts_of_names(engines):
    names = [row.name for row in engines.rows.ROWS]
    assert len(names) == len(set(names)) == 15
    assert [row.name for row in engines.rows.chosen("mlp, vgg-d 0.05 b32")] == [
        "vgg-d 0.05 b32",
        "mlp 0.05 b1",
        "mlp 0.05 b8",
    ]
    assert [row.name for row in engines.parse(["--quick"]).rows] == ["vgg-d 0.05 b1", "mlp 0.05 b1", "mlp 0.05 b8"]
    assert "compiled" not in engines.parse(["--quick"]).kinds


@pytest.mark.parametrize("arguments", [["--rows", "lenet"], ["--kinds", "TensorFlow"]])
def test_what_is_not_there_is_named(engines, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        engines.parse(arguments)
    assert stop.value.code == 2
    assert repr(arguments[1]) in capsys.readouterr().err


def test_a_peer_that_does_not_install_says_why(engines, monkeypatch, tmp_path):
    processes = importlib.import_module("peers.processes")
    monkeypatch.setattr(processes, "FOLDER", tmp_path)
    environment = processes.Environment(("numpy",), ("python0.1",))
    assert processes.install("old", environment) == ("", "no Python of python0.1")

    def run(command, **_):
        raise processes.subprocess.CalledProcessError(1, command, stderr="hint\nERROR: No matching distribution\nend")

    monkeypatch.setattr(processes.subprocess, "run", run)
    assert processes.install("gone", environment) == ("", "not installed: ERROR: No matching distribution")


def test_a_peer_that_is_installed_is_not_installed_again(engines, monkeypatch, tmp_path):
    processes = importlib.import_module("peers.processes")
    monkeypatch.setattr(processes, "FOLDER", tmp_path)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "installed.txt").write_text("numpy")
    assert processes.install("there", processes.Environment(("numpy",))) == (
        str(tmp_path / "there" / "bin" / "python"),
        "",
    )
