"""The runs of benchmarks/language.py: which are made, how they go on, and the table."""

import argparse
import importlib
import sys

import pytest
from script import ROOT


@pytest.fixture
def language(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    monkeypatch.delitem(sys.modules, "language", raising=False)
    return importlib.import_module("language")


def test_the_runs_are_commands_of_the_script(language):
    args = argparse.Namespace(steps=40, seeds=2, methods=["dense", "rigl"], weights="sparse", flags="--dropout 0.1")
    runs = language.commands(args)
    assert [(method, seed) for method, seed, _ in runs] == [("dense", 17), ("rigl", 17), ("dense", 18), ("rigl", 18)]
    assert all("--steps 40 --eval-every 2 --dropout 0.1 " in command for *_, command in runs)
    assert runs[2][2].endswith("--dropout 0.1 --dense --seed 18")
    assert "--method rigl --layer-density attention=0.3,mlp=0.1 " in runs[1][2]
    assert "--weights sparse --seed 17" in runs[1][2]


def test_the_table_sets_methods_beside_dense(language, tmp_path):
    def row(method, loss, speed, held):
        measured = dict(best_valid_loss=loss, best_step="9", tokens_per_second=speed, peak_mb="900", held_mb=held)
        return dict(method=method, steps="10", **measured)

    rows = [row("dense", "1.5", "100", "80"), row("rigl", "1.5", "250", "20"), row("rigl", "1.7", "150", "20")]
    language.report(rows, tmp_path / "table.md")
    cells = [cell.strip() for cell in (tmp_path / "table.md").read_text().splitlines()[-1].split("|")[1:-1]]
    assert cells == ["10", "rigl", "2", "1.6000", "+0.100", "9", "200", "2.00", "20.0", "0.25", "900"]


def test_a_run_that_is_in_the_file_is_not_made_again(language, tmp_path, monkeypatch):
    made = []
    found = dict.fromkeys(language.MEASURED, 1.0) | dict(peak_mb=1, held_mb=1)
    monkeypatch.setattr(
        language, "make", lambda command, *_: made.append(command) or (None if "set" in command else found)
    )
    argv = ["language.py", "--methods", "dense", "set", "--seeds", "1", "--csv", str(tmp_path / "runs.csv")]
    monkeypatch.setattr(sys, "argv", argv)
    assert language.main() == 1
    assert len(made) == 2
    assert language.main() == 1
    assert len(made) == 3  # the one that failed is tried again
    assert (tmp_path / "runs.md").is_file()
