"""Starts of LeNet-5: which runs are made, and how their outcomes are counted."""

import importlib

import pytest
from script import ROOT


@pytest.fixture
def starts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("lenet5_starts")


def test_every_setting_and_a_dense_network_have_the_same_seeds(starts):
    runs = starts.runs(2)
    assert [run.seed for run in runs] == [17] * 7 + [18] * 7
    assert len({run.command for run in runs}) == 14
    assert "--density 0.01 --rescale --lr 0.05 --sparse-backend cpu --seed 18 --epochs 100" in runs[10].command


def test_the_table_counts_outcomes_and_the_losses_of_those_that_learn(starts, tmp_path):
    rows = [
        dict(flags="--dense", losses=losses, outcome=outcome)
        for losses, outcome in [
            ("1.0 0.5", "learns"),
            ("1.0 0.1", "learns"),
            ("2.3 2.3", "at chance"),
            ("0.4", "diverges"),
        ]
    ]
    starts.report(rows, tmp_path / "table.md")
    text = (tmp_path / "table.md").read_text()
    assert "after 2 of 100 epochs" in text
    cells = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    assert cells == ["`--dense`", "2", "1", "1", "0.300", "0.500"]
