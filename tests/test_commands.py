"""`sparselearning train`, `results`, `methods`, `describe` and `demo`, in the repository and in a built package."""

import os
import subprocess
import sys

import pytest
from script import ROOT, load_main, metrics_of, run_folder

from sparselearning import commands, describe
from sparselearning.methods import METHODS
from sparselearning.models import build
from sparselearning.parser import COMMAND, program

SMALL = ["--epochs", "1", "--model", "lenet300-100", "--batch-size", "300", "--max-threads", "1", "--device", "cpu"]


def call(*argv, cwd, status=0, **environment):
    """Type `python -m sparselearning` and these arguments; return what it says."""
    command = [sys.executable, "-m", "sparselearning", *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, done.stderr
    return done.stdout if status == 0 else done.stderr


@pytest.mark.long
def test_train_is_the_script_and_results_reads_its_runs(tmp_path):
    call("train", "digits", *SMALL, cwd=tmp_path)
    folder = run_folder(tmp_path / "runs")
    assert folder.name == load_main().place(load_main().parse_arguments(["--data", "digits", *SMALL])).name
    assert "test_accuracy" in metrics_of(folder)[-1]
    assert "lenet300-100" in call("results", cwd=tmp_path)


@pytest.mark.long
def test_a_built_package_holds_the_scripts_and_runs_them(tmp_path):
    build_command = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build_command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (tmp_path / "elsewhere").mkdir()
    call("train", "digits", *SMALL, cwd=tmp_path / "elsewhere", PYTHONPATH=str(tmp_path))
    assert run_folder(tmp_path / "elsewhere" / "runs").name.startswith("digits-lenet300-100-0.05-17-")
    for script, *_ in commands.SCRIPTS.values():
        assert (tmp_path / "sparselearning" / "scripts" / script).read_bytes() == (ROOT / script).read_bytes()


@pytest.mark.long
def test_the_demo_takes_its_flags(tmp_path):
    assert "Picture: runs/demo.png" in call("demo", "--epochs", "1", cwd=tmp_path)
    assert (tmp_path / "runs" / "demo.png").exists()


def test_every_script_that_trains_has_a_command():
    scripts = {script for script, *_ in commands.SCRIPTS.values()}
    assert {path.relative_to(ROOT).as_posix() for path in ROOT.glob("*/main.py")} <= scripts
    assert all(commands.place_of(script).is_file() for script in scripts)


@pytest.mark.long
def test_a_mistake_is_one_line_that_names_the_command(tmp_path):
    said = call("train", "digits", "--epochs", "0", cwd=tmp_path, status=2)
    assert (
        said
        == "sparselearning train digits: error: argument --epochs: expected a whole number of at least 1, got '0'\n"
    )
    assert call("results", cwd=tmp_path, status=2).startswith("sparselearning results: error: There is no folder runs.")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["train"], "expected one of train mnist, train cifar, train digits, train imagenet, train language"),
        (["train", "nothing"], "got 'train nothing'"),
        (["describe", "nothing"], "expected one of lenet5,"),
        (["describe", "none.py:f"], "there is no file 'none.py'"),
        (["describe", "torchvision:nothing"], "Unknown model nothing"),
        (["describe", "lenet5", "--density", "2"], "expected a fraction in (0, 1], got '2'"),
        (["describe", "lenet5", "--dense-layers", "none"], "none"),
    ],
)
def test_other_mistakes_are_one_line_too(capsys, argv, words):
    with pytest.raises(SystemExit) as end:
        commands.main(argv)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert said.startswith("sparselearning")
    assert words in said
    assert said.count("\n") == 1


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(commands, "find_spec", lambda module: None if module == "tabulate" else module)
    with pytest.raises(SystemExit):
        commands.main(["train", "mnist"])
    said = capsys.readouterr().err
    assert (
        said == 'sparselearning train mnist: error: there is no tabulate here: pip install "sparselearning[scripts]"\n'
    )


def test_methods_are_listed_with_their_flags(capsys):
    commands.main(["methods"])
    said = capsys.readouterr().out
    assert all(f"{name}: {method.name}. {method.paper}" in said for name, method in METHODS.items())
    assert "--prune SET --redistribution none --growth random" in said


def test_describe_shows_what_the_function_shows(capsys, tmp_path):
    commands.main(["describe", "lenet5", "--density", "0.1", "--layer-density", "fc3=0.02", "--dense-layers", "first"])
    assert capsys.readouterr().out.strip() == describe(
        build("lenet5"), density={"fc3": 0.02, "*": 0.1}, dense=["first"]
    )
    (tmp_path / "my.py").write_text("from torch import nn\ndef model():\n    return nn.Linear(30, 20)\n")
    commands.main(["describe", f"{tmp_path / 'my.py'}:model"])
    assert "600 of 620 parameters are masked; at density 0.05, 30 of them are active." in capsys.readouterr().out
    commands.main(["describe", "torchvision:resnet18"])
    assert "layer4.1.conv2.weight" in capsys.readouterr().out


def test_help_shows_the_commands(capsys):
    commands.main(["--help"])
    assert "sparselearning train mnist" in capsys.readouterr().out


def test_a_script_is_named_as_it_was_called(monkeypatch):
    assert program("main.py") == "main.py"
    monkeypatch.setenv(COMMAND, "sparselearning train mnist")
    assert program("main.py") == "sparselearning train mnist"
