"""The runs of benchmarks/language.py: which are made, how they go on, and the table."""

import argparse
import importlib
import json
import shutil
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
    methods = [(run["method"], run["seed"]) for run in runs]
    assert methods == [("dense", 17), ("rigl", 17), ("dense", 18), ("rigl", 18)]
    typed = [run["command"] for run in runs]
    assert all("--steps 40 --eval-every 2 --dropout 0.1 " in command for command in typed)
    assert typed[2].endswith("--dropout 0.1 --dense --seed 18")
    assert "--method rigl --layer-density attention=0.3,mlp=0.1 " in typed[1]
    assert "--weights sparse --seed 17" in typed[1]


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


@pytest.mark.long
def test_speeds_are_measured_by_the_script_beside_a_dense_model(language, tmp_path, monkeypatch):
    speed = importlib.import_module("language_speed")
    other = tmp_path / "other"
    for folder in ("sparselearning", "language"):
        shutil.copytree(ROOT / folder, other / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "sparselearning/__init__.py").open("a") as file:
        file.write("__import__('pathlib').Path(__file__).with_name('imported').touch()\n")
    argv = ["language_speed.py", "--quick", "--rounds", "1", "--methods", "rigl", "--parts", "1", "--threads", "1"]
    argv += ["--other", str(other / "language/main.py"), "--output", str(tmp_path / "speed.json")]
    monkeypatch.setattr(sys, "argv", argv)
    speed.main()
    assert (other / "sparselearning/imported").exists()
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    dense, compiled, rigl, of_other = rows
    assert [row["kind"] for row in rows] == ["dense", "dense, compiled", "rigl", "rigl, other"]
    assert dense["tokens_per_second / dense"] == compiled["tokens_per_second / dense, compiled"] == 1
    assert rigl["held_mb"] == of_other["held_mb"] < dense["held_mb"]
    expected = round(of_other["tokens_per_second"] / rigl["tokens_per_second"], 3)
    assert of_other["tokens_per_second / this checkout"] == expected


@pytest.fixture
def budgets(language, monkeypatch):
    monkeypatch.delitem(sys.modules, "language_budgets", raising=False)
    return importlib.import_module("language_budgets")


def test_wider_networks_have_as_many_active_weights(budgets):
    args = argparse.Namespace(steps=40, seeds=1, widths=[64, 128], method="set", weights="sparse")
    runs = budgets.commands(args)
    assert [(run["width"], run["density"], run["kind"]) for run in runs] == [
        (64, 1.0, "dense"),
        (128, 0.25, "set, width 128"),
        (128, 1.0, "dense"),
    ]
    assert "--width 128 --heads 4 --steps 40 --eval-every 4 --method set --density 0.25 " in runs[1]["command"]
    assert "--dense" in runs[2]["command"]


def test_budgets_are_drawn_and_in_a_table(budgets, tmp_path):
    rows = [
        dict(kind=kind, active_weights=active, best_valid_loss=loss)
        for kind, active, loss in (
            ("dense", "100", "2"),
            ("dense", "400", "1"),
            ("dense", "400", "1.5"),
            ("set", "100", "1.5"),
        )
    ]
    budgets.report(rows, tmp_path / "budgets.md")
    lines = (tmp_path / "budgets.md").read_text().splitlines()
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["dense", "400", "1.2500", "0.2500", "2"]
    assert (tmp_path / "budgets.png").stat().st_size > 1000


def test_the_loss_after_updates_is_beside_that_of_masks_that_stay(language):
    updates = importlib.import_module("language_updates")
    args = argparse.Namespace(first=100, steps=300)
    stays = [1.0] * 300
    jump = [1.0] * 100 + [1.0 + 0.5 * (step < 10) for step in range(100)] + [1.0] * 100
    risen = updates.after_updates(jump, stays, args)
    assert len(risen) == 100
    assert risen[:10] == [0.5] * 10
    assert risen[10:] == [0.0] * 90
