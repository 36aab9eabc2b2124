"""Run folders: their names, what they hold, that nothing is overwritten, and when a run may go on."""

import argparse
import json
import logging

import pytest
import torch

from sparselearning import checkpoint
from sparselearning.checkpoint import CheckpointError
from sparselearning.experiments.run.folder import RunFolder, check_same_run, defaults_of_run


@pytest.fixture
def args(tmp_path):
    return argparse.Namespace(
        data="mnist", model="lenet5", density=0.05, dense=False, seed=17, lr=0.1, epochs=3, device="cpu",
        run_dir=str(tmp_path), resume=None, verbose=False,
    )  # fmt: skip


def changed(args, **changes):
    return argparse.Namespace(**{**vars(args), **changes})


def test_the_name_says_what_the_run_is(args):
    assert RunFolder(args).path.name.startswith("mnist-lenet5-0.05-17-")
    assert RunFolder(changed(args, dense=True)).path.name.startswith("mnist-lenet5-1-17-")


@pytest.mark.parametrize("change", [{"lr": 0.2}, {"epochs": 4}, {"seed": 18}, {"dense": True}])
def test_what_changes_the_result_changes_the_name(args, change):
    assert RunFolder(changed(args, **change)).path.name != RunFolder(args).path.name


def test_what_changes_no_result_keeps_the_name(args, tmp_path):
    other = changed(args, verbose=True, run_dir=str(tmp_path / "other"), resume="somewhere")
    assert RunFolder(other).path.name == RunFolder(args).path.name


def test_arguments_are_kept_as_json(args):
    assert json.loads((RunFolder(args).path / "args.json").read_text()) == vars(args)


def test_metrics_are_a_line_per_record(args):
    folder = RunFolder(args)
    folder.add(epoch=1, train_loss=0.5)
    folder.add(epoch=2, train_loss=0.25)
    lines = (folder.path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == folder.metrics == [
        {"epoch": 1, "train_loss": 0.5}, {"epoch": 2, "train_loss": 0.25},
    ]  # fmt: skip


def test_a_line_of_text_leaves_out_what_is_per_layer(args):
    folder = RunFolder(args)
    folder.add(epoch=1, valid_accuracy=0.98765, density_per_layer={"fc": 0.1})
    assert folder.line() == "epoch 1  valid accuracy 0.9877"


def test_earlier_runs_of_the_same_arguments_are_kept_beside(args, tmp_path):
    for run in range(3):
        RunFolder(args).add(run=run)
    name = RunFolder(args).path.name
    kept = [json.loads((tmp_path / f"{name}.{i}" / "metrics.jsonl").read_text())["run"] for i in (1, 2, 3)]
    assert kept == [0, 1, 2]


def test_a_run_goes_on_in_its_own_folder(args, tmp_path):
    folder = RunFolder(args)
    (folder.path / "log.txt").write_text("before\n")
    folder.add(epoch=1)
    folder.add(epoch=2)  # after the last checkpoint
    again = RunFolder(changed(args, resume=str(folder.checkpoint)), metrics=[{"epoch": 1}])
    assert again.path == folder.path
    assert (again.path / "metrics.jsonl").read_text() == '{"epoch": 1}\n'
    assert (again.path / "log.txt").read_text() == "before\n"
    assert list(tmp_path.iterdir()) == [folder.path]


def test_a_run_from_elsewhere_overwrites_no_other(args, tmp_path):
    RunFolder(args).add(epoch=1)
    folder = RunFolder(changed(args, resume=str(tmp_path / "copy" / "checkpoint.pt")), metrics=[])
    kept = folder.path.with_name(f"{folder.path.name}.1")
    assert (kept / "metrics.jsonl").read_text() == '{"epoch": 1}\n'


def test_what_is_logged_is_copied(args, caplog):
    caplog.set_level("INFO")
    folder = RunFolder(args)
    with folder.log():
        logging.getLogger("any").info("within")
    logging.getLogger("any").info("after")
    assert (folder.path / "log.txt").read_text() == "within\n"


def test_which_checkpoint_is_kept(args):
    folder = RunFolder(args)
    assert folder.kept() == "There is no checkpoint yet."
    folder.checkpoint.touch()
    assert folder.kept() == f"The last checkpoint is kept in {folder.checkpoint}."


def test_a_folder_that_cannot_be_written_says_what_to_do(args, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"run folder .*file/mnist-lenet5.* cannot be written: .* with --run-dir"):
        RunFolder(changed(args, run_dir=str(tmp_path / "file")))


def test_a_run_goes_on_with_its_arguments_longer_or_elsewhere(args):
    check_same_run("c.pt", vars(args), changed(args, epochs=9, device="cuda", run_dir="x", resume="c.pt"))
    check_same_run("c.pt", {"lr": 0.1, "gone": 3}, args)  # of a version with other arguments
    with pytest.raises(CheckpointError, match=r"^c\.pt is of a run with lr=0\.1 model=lenet5, not lr=1 model=vgg-d\."):
        check_same_run("c.pt", vars(args), changed(args, lr=1, model="vgg-d"))


def test_a_resumed_run_inherits_the_arguments_of_its_run(args, tmp_path):
    begun = changed(args, bench=True, start_epoch=2, data_dir="images", max_threads=1, sparse_init="snip")
    folder = RunFolder(begun)
    checkpoint.save(folder.checkpoint, model=torch.nn.Linear(1, 1), args=vars(begun))
    inherited = {**vars(begun), "run_dir": str(tmp_path)}
    for name in ("bench", "resume"):
        del inherited[name]
    assert defaults_of_run(str(folder.path), "constant") == inherited
    assert defaults_of_run(str(folder.checkpoint), "constant") == inherited
    assert defaults_of_run("auto", "constant") == {}
    assert defaults_of_run(str(folder.checkpoint), "resume") == {}, "a new run begins from its weights"
    assert defaults_of_run(str(folder.checkpoint), "resume", "weights.pt") == inherited
    (folder.path / "args.json").unlink()
    del inherited["run_dir"]
    assert defaults_of_run(str(folder.path), "constant") == inherited, "a checkpoint that was copied elsewhere"
    with pytest.raises(OSError, match="There is no checkpoint"):
        defaults_of_run(str(tmp_path / "none"), "constant")


def test_a_resumed_run_does_not_begin_again_from_the_nonzeros_that_it_began_with(args):
    begun = changed(args, sparse_init="resume", resume="old.pt")
    assert "sparse_init" not in defaults_of_run(str(RunFolder(begun).path), "constant")
    begun = changed(args, sparse_init="resume", pretrained_weights="old.pt", lr=1)
    assert defaults_of_run(str(RunFolder(begun).path), "constant")["sparse_init"] == "resume"
