"""A user's mistake ends mnist_cifar/main.py with one line and exit status 2, and leaves nothing half-written.

The flags that it shares with imagenet/main.py are in experiments/run/test_session.py.
"""

import os
import pickle
from contextlib import nullcontext

import pytest
import torch
from data_files import write_cifar_records, write_mnist
from script import draw_nothing, load_main, metrics_of, run_folder, type_command

from sparselearning.experiments.run import session

DIGITS = "--data digits --epochs 2"
main = load_main()


@pytest.fixture
def call(tmp_path, monkeypatch, caplog):
    """Run main.py in this process, in an empty folder, without drawing."""
    caplog.set_level("INFO")
    monkeypatch.chdir(tmp_path)
    draw_nothing(monkeypatch)
    # Where pytest's handlers keep the script from adding its own, this one would write to stderr.
    monkeypatch.setattr(session, "logging_redirect_tqdm", nullcontext)

    def call(argv):
        main.main(["--device", "cpu", "--max-threads", "1", *argv.split()])

    return call


@pytest.fixture
def refusal(call, capsys):
    """Return the line with which main.py ends."""

    def refusal(argv):
        with pytest.raises(SystemExit) as end:
            call(argv)
        line = capsys.readouterr().err
        assert end.value.code == 2
        assert line.count("\n") == 1, line
        assert line.startswith("main.py: error: ")
        return line

    return refusal


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--density 0", "argument --density: expected a fraction in (0, 1], got '0'"),
        ("--density 1.5", "(0, 1]"),
        ("--density five", "got 'five'"),
        ("--model resnet", "Unknown model 'resnet'."),
        ("--model lenet300", "Did you mean 'lenet300-100'? Choose from: lenet5, lenet300-100, alexnet-s"),
        ("--data imagenet", "--data"),
        ("--prune magnitud", "path/to/file.py:function, got 'magnitud'"),
        ("--growth momentun", "expected one of momentum, gradient, random"),
        ("--redistribution nothing", "nonzeros"),
        ("--growth none.py:grow", "there is no file 'none.py'"),
        ("--sparse-init random", "--sparse-init"),
        ("--sparse-init snip --score-batches 0", "--score-batches"),
        (
            "--sparse-init synflow --score-batches 2",
            "--score-batches 2 is of --sparse-init snip and grasp, got synflow",
        ),
        ("--dense-layers conv1", "'conv1' matches none of the weights fc1.weight, fc2.weight, fc3.weight."),
        ("--sparse-layers conv1 fc1", "sparse=['conv1', 'fc1']: conv1 matches none of the parameters fc1.weight,"),
        ("--sparse-layers fc1.bias", "names fc1.bias (300,), which cannot be masked: fewer than two dimensions"),
        ("--layer-density conv1=0.5", "The pattern 'conv1' of density={'conv1': 0.5, '*': 0.05} matches none of the"),
        ("--layer-density fc1=0", "expected a fraction in (0, 1], got '0'"),
        ("--data cifar --model lenet5", "takes images of 1x28x28, got 3x32x32. Models for these images: alexnet-s"),
        ("--data digits --model vgg-d", "takes images of 3x32x32, got 1x28x28. Models for these images: lenet5"),
        ("--redistribution variance", "Adam's second moment: add --optimizer adam --lr 0.001"),
        ("--prune magnitude_variance", "Adam's second moment"),
        ("--valid_split 1", "expected a fraction in [0, 1), got '1'"),
        ("--lr nan", "argument --lr/--learning-rate: expected a finite number of at least 0"),
        ("--lr -1", "--lr"),
        ("--l2 -1", "--l2"),
        ("--epochs 0", "a whole number of at least 1"),
        ("--batch-size 1.5", "a whole number of at least 1"),
        ("--seed -1", "--seed"),
        ("--save-features", "lenet300-100 has none: --model lenet5"),
        ("--save-model /dev/null/model.pt", "--save-model /dev/null/model.pt: /dev/null is no folder"),
        ("--save-model model.pt --iters 2", "leave out --iters"),
        ("--density 1e-9", "A density of 1e-09 leaves none of 266200 weights."),
        ("--valid_split 0.9999", "holds out all 1438 training images. Take a smaller one."),
    ],
)
def test_a_mistake_ends_before_anything_is_written(refusal, tmp_path, argv, words):
    assert words in refusal(f"{DIGITS} {argv}")
    assert list(tmp_path.iterdir()) == []


def test_a_batch_too_small_for_normalisation(refusal, tmp_path):
    write_cifar_records(tmp_path / "data")
    line = refusal("--data cifar --model alexnet-s --data-dir data --batch-size 1")
    assert "that is one value per channel, which cannot be normalised" in line


def test_momentum_in_the_name_of_an_own_file_needs_none(call, tmp_path):
    (tmp_path / "momentum.py").write_text("def grow(masking, name, new_mask, total_regrowth, weight): return new_mask")
    call(f"{DIGITS} --momentum 0 --growth momentum.py:grow --redistribution nonzeros")


# Run folders


def test_a_run_folder_that_cannot_be_written(refusal, tmp_path):
    (tmp_path / "file").touch()
    line = refusal(f"{DIGITS} --run-dir file")
    assert "The run folder file/digits-lenet300-100-0.05-17-" in line
    assert "Choose another place with --run-dir." in line
    assert os.listdir(tmp_path) == ["file"]


# Data


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("--data mnist", "train-images-idx3-ubyte"),
        ("--data cifar --model alexnet-s", "data_batch_1.bin"),
    ],
)
def test_files_that_are_absent_are_named_with_their_place(refusal, tmp_path, argv, expected):
    line = refusal(f"{argv} --data-dir here")
    assert expected in line
    assert " in here/" in line
    assert "--data digits, which needs none" in line
    assert list(tmp_path.iterdir()) == []


def test_a_truncated_mnist_file_is_named(refusal, tmp_path):
    write_mnist(tmp_path / "MNIST" / "raw")
    path = tmp_path / "MNIST" / "raw" / "t10k-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:-10])
    assert "t10k-images-idx3-ubyte is damaged: expected 7,856 bytes" in refusal("--data mnist --data-dir .")
    assert os.listdir(tmp_path) == ["MNIST"]


def test_a_truncated_cifar_file_is_named(refusal, tmp_path):
    write_cifar_records(tmp_path)
    path = tmp_path / "cifar-10-batches-bin" / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-10])
    assert "data_batch_3.bin is damaged" in refusal("--data cifar --model alexnet-s --data-dir .")
    assert os.listdir(tmp_path) == ["cifar-10-batches-bin"]


# Checkpoints


@pytest.fixture
def saved(call, tmp_path):
    """The folder of a finished run; no test may change it."""
    call(DIGITS)
    folder = run_folder(tmp_path / "runs")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    yield folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert os.listdir(tmp_path / "runs") == [folder.name]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ("--model lenet5", "is of a run with model=lenet300-100, not model=lenet5. Go on with its arguments."),
        ("--dense", "dense=False, not dense=True"),
        ("--density 0.1 --lr 0.2", "density=0.05 lr=0.1, not density=0.1 lr=0.2"),
        ("--optimizer adam", "optimizer=sgd, not optimizer=adam"),
        ("--iters 2", "--resume goes on with one run: leave out --iters"),
        ("--model lenet5 --sparse-init resume", "is of another model: conv1.weight is absent in the file"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(refusal, saved, argv, words):
    assert words in refusal(f"{DIGITS} --resume {saved} {argv}")


def test_a_dense_checkpoint_is_no_sparse_one(call, refusal, tmp_path):
    call(f"{DIGITS} --dense")
    folder = run_folder(tmp_path / "runs")
    assert "dense=True, not dense=False" in refusal(f"{DIGITS} --resume {folder} --sparse")


def test_a_checkpoint_of_release_1_0_has_no_masks(refusal):
    torch.save({"epoch": 3, "state_dict": main.models.build("lenet300-100").state_dict(), "optimizer": {}}, "old.pt")
    assert "--sparse-init resume" in refusal(f"{DIGITS} --resume old.pt")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("init", ["", "--sparse-init resume"])
@pytest.mark.parametrize("damage", ["truncated", "random", "code", "code in an archive"])
def test_a_damaged_checkpoint_is_refused_unexecuted(refusal, tmp_path, damage, init):
    torch.save({"format": 1, "kinds": {}, "model": {}}, "whole.pt")
    content = {
        "truncated": (tmp_path / "whole.pt").read_bytes()[:-50],
        "random": bytes(range(256)) * 20,
        "code": pickle.dumps(Malicious(), protocol=2),
    }.get(damage)
    if content:
        (tmp_path / "bad.pt").write_bytes(content)
    else:
        torch.save({"format": 1, "kinds": {}, "model": Malicious()}, "bad.pt")
    assert "bad.pt is damaged or not a checkpoint: " in refusal(f"{DIGITS} --resume bad.pt {init}")
    assert sorted(os.listdir()) == ["bad.pt", "whole.pt"]


# Training that goes wrong


def test_a_loss_that_is_not_finite_names_its_step(refusal, tmp_path):
    line = refusal(f"{DIGITS} --lr 1e10")
    assert "Epoch 1: the loss is nan at step " in line
    assert "There is no checkpoint yet. Try a lower --lr." in line
    assert not (run_folder(tmp_path / "runs") / "checkpoint.pt").exists()


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_last_good_checkpoint_is_kept(refusal, tmp_path, monkeypatch, when):
    """Weights that are infinite before an epoch spoil its loss, after its last step they would be saved."""
    epochs, train_epoch = [], main.train_epoch

    def spoil(batches, model):
        yield from batches
        with torch.no_grad():
            model.fc1.bias[0] = torch.inf

    def train_and_spoil(model, batches, *arguments, **more):
        epochs.append(len(epochs) + 1)
        if epochs == [1, 2]:
            batches = spoil(batches, model) if when == "after" else [*spoil(batches, model)]
        return train_epoch(model, batches, *arguments, **more)

    monkeypatch.setattr(main, "train_epoch", train_and_spoil)
    line = refusal(f"{DIGITS} --l2 0 --max-threads 1")
    folder = run_folder(tmp_path / "runs")
    assert f"Epoch 2: {'the weights are no longer finite after' if when == 'after' else 'the loss is'}" in line
    assert f"The last checkpoint is kept in runs/{folder.name}/checkpoint.pt." in line
    saved = torch.load(folder / "checkpoint.pt")
    assert saved["epoch"] == 1
    assert all(weight.isfinite().all() for weight in saved["model"].values())
    assert [record["epoch"] for record in metrics_of(folder)] == [1]


OWN = {
    "raises": ("growth", "def f(masking, name, new_mask, total_regrowth, weight):\n    return {}['key']\n",
               "own.py:f raised KeyError in line 2: 'key'"),
    "wrong arguments": ("growth", "def f(masking, name):\n    pass\n", "cannot be called as f(masking, name, new_mask"),
    "wrong shape": ("prune", "def f(masking, mask, weight, name):\n    return mask[:1]\n",
                    "Expected a mask of shape (300, 784) for fc1.weight, got shape (1, 784)"),
    "no mask": ("growth", "def f(masking, name, new_mask, total_regrowth, weight):\n    pass\n", "got NoneType"),
    "no number": ("redistribution", "def f(masking, name, weight, mask):\n    pass\n",
                  "Expected the importance of fc1.weight, a number or a 0-d tensor, got None."),
    "many numbers": ("redistribution", "def f(masking, name, weight, mask):\n    return weight\n",
                     "got a tensor of shape (300, 784)"),
    "infinite": ("redistribution", "def f(masking, name, weight, mask):\n    return float('inf')\n", "importance inf"),
    "no momentum": ("growth", "def f(masking, name, new_mask, total_regrowth, weight):\n"
                    "    return masking.get_momentum_for_weight(weight) > 0\n", "SGD holds no momentum"),
    "not for every layer": ("growth", "from sparselearning.functions import network_wide\n@network_wide\n"
                            "def f(masking, total_regrowth):\n    return {}\n", "Expected a dict"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", OWN)
def test_an_own_function_that_is_wrong(refusal, tmp_path, mistake):
    flag, text, words = OWN[mistake]
    (tmp_path / "own.py").write_text(text)
    modes = {"growth": "random", "redistribution": "none", "prune": "magnitude"} | {flag: "own.py:f"}
    flags = " ".join(f"--{name} {mode}" for name, mode in modes.items())
    line = refusal(f"{DIGITS} --momentum {0 if mistake == 'no momentum' else 0.9} {flags}")
    assert words in line
    assert not list(tmp_path.glob("runs/*/checkpoint.pt"))


# As a user types it


@pytest.mark.long
@pytest.mark.parametrize("argv", ["--density 2", "--lr 1e10"])
def test_a_process_ends_with_one_line_and_status_2(tmp_path, argv):
    process = type_command(*DIGITS.split(), *argv.split(), cwd=tmp_path)
    assert process.returncode == 2
    assert process.stderr.startswith("main.py: error: ")
    assert process.stderr.count("\n") == 1
    assert "Traceback" not in process.stdout
