"""Both scripts do alike what they both do: wrong flags end in the same line, and runs start, go on and end alike."""

import os
import re
import subprocess
import sys
from argparse import Namespace
from contextlib import nullcontext

import pytest
import torch
from jpegs import write_folder
from script import ROOT, draw_nothing, load_main

from sparselearning.experiments.run import session
from sparselearning.experiments.run.training import NotFinite
from sparselearning.processes import distributed

SCRIPTS = {folder: load_main(folder) for folder in ("mnist_cifar", "imagenet")}
SMALL = "--epochs 2 --device cpu --max-threads 1"  # and the flags that make a run of a script short
OWN = {
    "mnist_cifar": f"--data digits {SMALL} --batch-size 300",
    "imagenet": f"--data photographs {SMALL} --batch-size 8 --arch resnet18 --image-size 32 --workers 0",
}
# In the lists of names that errors show, those of one script alone.
OF_ONE_SCRIPT = r", (magnitude_)?variance\b"

# Whatever a flag takes, several of these are wrong for it.
VALUES = ["", "-1", "0", "1.5", "nan", "inf", "1e999", "2147483648", "two words", "none", "none/at/all", "none.py:f"]
VALUES += ["fc1=0", "3:2", "mask:", "block:0x4"]


def flags_of_both():
    """The long flags that both scripts have, and that mean the same there."""
    mnist_cifar, imagenet = (
        {flag: action.dest for action in script.build_parser()._actions for flag in action.option_strings}
        for script in SCRIPTS.values()
    )
    return [flag for flag in mnist_cifar if flag.startswith("--") and imagenet.get(flag) == mnist_cifar[flag]]


@pytest.fixture
def answer(capsys):
    """Return how a script answers a command line: its exit status and its line, or what the last flag then means."""

    def answer(script, *argv):
        needed = ["--epochs", "2", *(["DIR"] if script == "imagenet" else [])]
        try:
            args = vars(SCRIPTS[script].parse_arguments([*needed, *argv]))
        except SystemExit as end:
            captured = capsys.readouterr()
            return end.code, re.sub(OF_ONE_SCRIPT, "", captured.err)
        return {name: value for name, value in args.items() if f"--{name.replace('_', '-')}" == argv[-1].split("=")[0]}

    return answer


@pytest.mark.parametrize("flag", flags_of_both())
def test_a_wrong_value_of_a_flag_gets_the_same_line(answer, flag):
    refused = 0
    for value in VALUES:
        answers = {script: answer(script, f"{flag}={value}") for script in SCRIPTS}
        assert answers["mnist_cifar"] == answers["imagenet"], value
        if isinstance(answers["imagenet"], tuple):
            status, line = answers["imagenet"]
            assert status == 2
            assert re.fullmatch(r"main\.py: error: .+\n", line)
            refused += 1
    assert refused or flag in ("--run-dir", "--dense-layers", "--sparse-layers"), (
        "any folder and any pattern of names may be meant"
    )


@pytest.fixture
def call(tmp_path, monkeypatch):
    """Call a script in a folder of its own, which holds photographs."""
    monkeypatch.chdir(tmp_path)
    draw_nothing(monkeypatch)
    # Where pytest's handlers keep the script from adding its own, this one would write to stderr.
    monkeypatch.setattr(session, "logging_redirect_tqdm", nullcontext)
    write_folder(tmp_path / "photographs")

    def call(script, argv):
        SCRIPTS[script].main([*OWN[script].split(), *argv.split()])

    return call


@pytest.fixture
def refusals(call, capsys, tmp_path):
    """Return the line with which both scripts end."""

    def refusals(argv, status=2):
        lines = []
        for script in SCRIPTS:
            with pytest.raises(SystemExit) as end:
                call(script, argv)
            assert end.value.code == status
            line = capsys.readouterr().err
            assert re.fullmatch(r"main\.py: .+\n", line), script
            lines.append(line)
        assert lines[0] == lines[1]
        return lines[0]

    return refusals


OWN_FUNCTIONS = """
from sparselearning import reads
@reads("momentum")
def reads_momentum(masking, name, new_mask, total_regrowth, weight): pass
@reads("second_moment")
def reads_second_moment(masking, name, weight, mask): pass
"""
MOMENTUM = "--growth momentum and --redistribution momentum need a momentum: --momentum 0.9, or --growth random"
NONZEROS = "--sparse-init resume takes the nonzeros of a checkpoint: "


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--momentum 0", MOMENTUM),
        ("--momentum 0 --growth random", MOMENTUM),
        ("--momentum 0 --growth global_momentum --redistribution none", MOMENTUM),
        ("--momentum 0 --growth momentum_neuron --redistribution none", MOMENTUM),
        ("--method sparse_momentum --momentum 0", MOMENTUM),
        ("--momentum 0 --growth own.py:reads_momentum --redistribution none", MOMENTUM),
        ("--redistribution own.py:reads_second_moment", "need Adam's second moment"),
        ("--device foo", "argument --device: no device 'foo' here: "),
        ("--device meta", "argument --device: no device 'meta' here: "),
        ("--resume none", "argument --resume: There is no checkpoint none."),
        ("--resume damaged.pt", "damaged.pt is damaged or not a checkpoint: "),
        ("--resume none --sparse-init resume", "There is no checkpoint none."),
        ("--sparse-init resume", f"{NONZEROS}add --resume PATH"),
        ("--sparse-init resume --resume auto", f"{NONZEROS}--resume auto names none"),
        ("--sparse-init mask:none.pt", "There is no checkpoint none.pt."),
        ("--sparse-backend cpu --amp bf16", "--sparse-backend cpu computes in fp32: leave out --amp and --fp16"),
        ("--sparse-backend cpu --fp16", "--sparse-backend cpu computes in fp32: leave out --amp and --fp16"),
        ("--sparse-backend cpu --dense", "--sparse-backend cpu trains active weights only: leave out --dense"),
        ("--sparse-backend cpu --compile", "--sparse-backend cpu chooses its own kernels: leave out --compile"),
        ("--sparse-backend cpu --inactive kept", "--inactive kept trains inactive weights, and --sparse-backend cpu"),
        ("--growth dense_magnitude", "compare the values of inactive weights: add --inactive kept, or soft"),
        ("--fp16 --amp bf16", "--fp16 and --amp bf16 are two precisions: leave out one"),
        ("--dense --sparse", "argument --sparse: not allowed with argument --dense"),
        ("--start-epoch 3", "--start-epoch 3 is after the last of 2 epochs"),
        ("--start-fraction 0.9 --stop-fraction 0.1", "Expected 0 <= start_fraction <= stop_fraction <= 1"),
        ("--start-density 0.5", "A start_density needs a density_schedule"),
        ("--unknown", "unrecognized arguments: --unknown"),
    ],
)
def test_arguments_that_exclude_each_other_get_the_same_line(refusals, tmp_path, argv, words):
    (tmp_path / "damaged.pt").write_bytes(b"PK")
    (tmp_path / "own.py").write_text(OWN_FUNCTIONS)
    before = sorted(os.listdir())
    assert words in refusals(argv)
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--batch-size 7", "--batch-size 7 cannot be divided evenly among 2 processes"),
    ],
)
def test_what_several_processes_cannot_do_gets_the_same_line(refusals, monkeypatch, argv, words):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert words in refusals(argv)


def raising(error):
    def train_epoch(*_, **__):
        raise error

    return train_epoch


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (
            NotFinite("the loss is nan at step 1 of the epoch"),
            2,
            "error: Epoch 1: the loss is nan at step 1 of the epoch. There is no checkpoint yet. Try a lower --lr.",
        ),
        (
            ValueError("fc has importance inf."),
            2,
            "error: Epoch 1: fc has importance inf. There is no checkpoint yet.",
        ),
        (OSError(28, "No space left on device"), 2, "error: [Errno 28] No space left on device"),
        (distributed.ProcessError("Process 0 lost another one."), 1, "error: Process 0 lost another one."),
        (
            KeyboardInterrupt(),
            130,
            "stopped by SIGINT; the same command with --resume auto goes on from the last checkpoint",
        ),
    ],
)
def test_errors_in_training_end_alike(refusals, monkeypatch, error, status, line):
    for script in SCRIPTS.values():
        monkeypatch.setattr(script, "train_epoch", raising(error))
    assert refusals("", status) == f"main.py: {line}\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_openmp_spins_for_a_moment_from_the_time_it_is_loaded(script, tmp_path):
    (tmp_path / "torch.py").write_text(
        "import os, sys\nsys.exit(' '.join(map(str, map(os.environ.get, ('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT')))))"
    )
    command = [sys.executable, str(ROOT / script / "main.py")]
    plain = {name: value for name, value in os.environ.items() if name not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    plain["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(ROOT)])
    for own, expected in (
        ({}, "passive 10000"),
        ({"OMP_WAIT_POLICY": "active"}, "active None"),
        ({"GOMP_SPINCOUNT": "5"}, "passive 5"),
    ):
        done = subprocess.run(command, env=plain | own, capture_output=True, text=True, timeout=60)
        assert done.stderr == f"{expected}\n"


@pytest.fixture
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads_as_before")
def test_threads_are_limited_by_the_flag_the_environment_and_the_cores(monkeypatch):
    def threads(limit, before):
        torch.set_num_threads(before)
        session.start(Namespace(device="cpu", max_threads=limit, seed=0, sparse_backend=None, inactive="zero"))
        return torch.get_num_threads()

    assert threads(limit=1, before=2) == 1
    assert threads(limit=10, before=2) == 2, "OMP_NUM_THREADS, or the cores"
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert threads(limit=10, before=1) == 4, "half of the cores, whatever torchrun says"
    assert threads(limit=3, before=1) == 3
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert threads(limit=10, before=1) == 1
