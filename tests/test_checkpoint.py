"""Checkpoints are written and loaded whole or not at all; resuming is exact; nothing in a file is executed."""

import copy
import os
import pickle
import random
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from helpers import assert_masks_hold, masked, mlp, train
from script import assert_equal
from torch import nn

from sparselearning import CosineDecay, checkpoint
from sparselearning.checkpoint import CheckpointError


def parts_of(widths=(8, 16, 4), optimizer="SGD", **settings):
    """Return all that a run saves, for a small network."""
    model = nn.Sequential(nn.Dropout(0.2), mlp(*widths))
    how = dict(lr=0.1, momentum=0.9) if optimizer == "SGD" else dict(lr=0.01)
    optimizer = getattr(torch.optim, optimizer)(model.parameters(), **how)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)
    masking = masked(model, optimizer, prune_rate_decay=CosineDecay(0.5, 20), **settings)
    return dict(model=model, optimizer=optimizer, scheduler=scheduler, mask=masking)


def run(parts, epochs, steps=5):
    """Train on inputs from the global generator and move the masks after each epoch."""
    for _ in range(epochs):
        for _ in range(steps):
            train(parts["model"], parts["mask"], 1, torch.randn(6, 8))
            parts["scheduler"].step()
        parts["mask"].at_end_of_epoch()


def frozen(parts):
    return copy.deepcopy({name: part.state_dict() for name, part in parts.items()})


def draws():
    return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random()  # noqa: NPY002


RESUMED = [
    dict(growth_mode="momentum"),
    dict(growth_mode="random"),
    dict(prune_mode="threshold", prune_every_k_steps=2),
    dict(pattern="2:4"),
    dict(pattern="fan-in:0.3", growth_mode="random"),
]


@pytest.mark.parametrize("optimizer", ["SGD", "Adam", "AdamW"])
@pytest.mark.parametrize("settings", RESUMED, ids=lambda settings: " ".join(map(str, settings.values())))
def test_resuming_is_bitwise_the_uninterrupted_run(tmp_path, optimizer, settings):
    whole = parts_of(optimizer=optimizer, **settings)
    run(whole, 2)
    checkpoint.save(tmp_path / "c.pt", **whole, epoch=2, history=[{"loss": 0.5}])
    saved = frozen(whole)
    run(whole, 2)
    expected = draws()

    torch.manual_seed(99)
    resumed = parts_of(optimizer=optimizer, **settings)
    rest = checkpoint.load(tmp_path / "c.pt", **resumed)
    assert rest == {"epoch": 2, "history": [{"loss": 0.5}]}
    assert_masks_hold(resumed["mask"])
    assert_equal(frozen(resumed), saved)
    run(resumed, 2)
    assert draws() == expected
    assert_equal(frozen(resumed), frozen(whole))


def test_generators_of_torch_numpy_and_python_go_on(tmp_path):
    checkpoint.save(tmp_path / "c.pt")
    expected = draws()
    draws()
    checkpoint.load(tmp_path / "c.pt")
    assert draws() == expected


def assert_refused_unchanged(path, parts, message):
    """Assert that loading raises `message` and changes neither parts nor generators."""
    before, generators = frozen(parts), copy.deepcopy(checkpoint.random_state())
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load(path, **parts)
    assert_equal(frozen(parts), before)
    assert_equal(checkpoint.random_state(), generators)


def test_another_model_is_refused_with_the_difference(tmp_path):
    checkpoint.save(tmp_path / "c.pt", **parts_of((8, 16, 4)))
    here = parts_of((8, 12, 4))
    message = r"of another model: 1\.fc1\.weight is \(16, 8\) in the file and \(12, 8\) here.*fc2\.weight"
    assert_refused_unchanged(tmp_path / "c.pt", here, message)


def test_more_layers_are_refused_as_absent(tmp_path):
    checkpoint.save(tmp_path / "c.pt", **parts_of((8, 16, 4)))
    assert_refused_unchanged(
        tmp_path / "c.pt", parts_of((8, 16, 4, 4)), r"fc3\.weight is absent in the file and \(4, 4\)"
    )


def test_another_optimizer_is_refused(tmp_path):
    saved = parts_of(optimizer="SGD")
    run(saved, 1)
    checkpoint.save(tmp_path / "c.pt", **saved)
    here = parts_of(optimizer="Adam")
    run(here, 1)
    assert_refused_unchanged(tmp_path / "c.pt", here, "optimizer .* SGD in the file and Adam here")


def test_masks_on_other_layers_change_nothing_at_all(tmp_path):
    saved = parts_of()
    run(saved, 1)
    checkpoint.save(tmp_path / "c.pt", **saved)
    here = parts_of()
    run(here, 1)
    here["mask"].remove_weight("1.fc2.weight")
    assert_refused_unchanged(
        tmp_path / "c.pt", here, r"The mask of .*1\.fc2\.weight: \(4, 16\) in the state, absent here"
    )


def test_parameter_groups_of_another_shape_change_nothing_at_all(tmp_path):
    saved = parts_of()
    checkpoint.save(tmp_path / "c.pt", **saved)
    here = parts_of()
    here["optimizer"].add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert_refused_unchanged(tmp_path / "c.pt", here, "The optimizer of .* parameter group")


def test_a_damaged_part_changes_nothing_at_all(tmp_path):
    saved = parts_of()
    checkpoint.save(tmp_path / "c.pt", **saved)
    state = torch.load(tmp_path / "c.pt") | {"format": 1}  # without checksums
    for name in ("mask", "random"):
        torch.save(state | {name: 3}, tmp_path / f"{name}.pt")
        assert_refused_unchanged(tmp_path / f"{name}.pt", parts_of(), f"The {name} of ")
    torch.save(state | {"model": 3}, tmp_path / "model.pt")
    assert_refused_unchanged(tmp_path / "model.pt", parts_of(), "no weights of a model, but a int")


def test_a_part_that_is_absent_is_named(tmp_path):
    parts = parts_of()
    checkpoint.save(tmp_path / "dense.pt", model=parts["model"], optimizer=parts["optimizer"])
    assert_refused_unchanged(tmp_path / "dense.pt", parts, "holds no scheduler, mask, but model, optimizer, ")


def test_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint .*none\.pt"):
        checkpoint.load(tmp_path / "none.pt")


class Malicious:
    def __reduce__(self):
        return os.mkdir, (os.environ["PROOF"],)


DAMAGE = {
    "text": lambda path: path.write_text("hello"),
    "other data": lambda path: torch.save([1, 2], path),
    "no format": lambda path: torch.save({"model": 3}, path),
    "another format": lambda path: torch.save({"format": 99, "kinds": {}}, path),
    "zip of something else": lambda path: zipfile.ZipFile(path, "w").close(),
    "pickle with code": lambda path: path.write_bytes(pickle.dumps(Malicious(), protocol=4)),
    "old pickle with code": lambda path: path.write_bytes(pickle.dumps(Malicious(), protocol=2)),
    "archive with code": lambda path: torch.save({"format": 1, "kinds": {}, "model": Malicious()}, path),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_file_that_is_not_a_checkpoint_is_refused_and_not_executed(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("PROOF", str(tmp_path / "executed"))
    DAMAGE[damage](tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match=r"c\.pt is (damaged or )?not a checkpoint") as refusal:
        checkpoint.load(tmp_path / "c.pt")
    assert "\n" not in str(refusal.value)
    assert "weights_only" not in str(refusal.value)  # no advice to switch the protection off
    assert not (tmp_path / "executed").exists()


class Unwritable:
    """Fails while it is being written, as a full disk would."""

    def state_dict(self):
        return {"a": torch.zeros(10), "b": lambda: None}


def test_a_failing_save_leaves_the_old_file_alone(tmp_path):
    checkpoint.save(tmp_path / "c.pt", epoch=1)
    before = (tmp_path / "c.pt").read_bytes()
    with pytest.raises(AttributeError):  # pickle's, for a local function
        checkpoint.save(tmp_path / "c.pt", part=Unwritable())
    assert (tmp_path / "c.pt").read_bytes() == before
    assert os.listdir(tmp_path) == ["c.pt"]


@pytest.mark.long
def test_a_full_disk_is_an_os_error_that_names_the_file(tmp_path):
    pytest.importorskip("resource")
    checkpoint.save(tmp_path / "c.pt", epoch=1)
    program = (
        "import resource, sys, torch\n"
        "from sparselearning import checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try:\n"
        "    checkpoint.save(sys.argv[1], weight=torch.zeros(1_000_000))\n"
        "except OSError as error:\n"
        "    print(error.filename)\n"
    )
    path = str(tmp_path / "c.pt")
    ended = subprocess.run([sys.executable, "-c", program, path], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() == path
    assert checkpoint.load(path) == {"epoch": 1}
    assert os.listdir(tmp_path) == ["c.pt"]


def test_saving_into_a_file_instead_of_a_folder_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        checkpoint.save(tmp_path / "file" / "c.pt", epoch=1)


def release_1_0(path, model, zipped):
    """Write a checkpoint as release 1.0 did, in the format of torch 1.2 unless `zipped`."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 1, torch.randn(4, 8))
    state = {"epoch": 5, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)


@pytest.mark.parametrize("zipped", [False, True])
def test_weights_of_release_1_0_load(tmp_path, zipped):
    old, new = mlp(8, 16, 4), mlp(8, 16, 4)
    release_1_0(tmp_path / "c.pt", old, zipped)
    checkpoint.load_weights(tmp_path / "c.pt", new)
    assert_equal(dict(new.state_dict()), dict(old.state_dict()))


def test_release_1_0_cannot_be_resumed_whole(tmp_path):
    parts = parts_of()
    release_1_0(tmp_path / "c.pt", parts["model"], zipped=False)
    assert_refused_unchanged(tmp_path / "c.pt", parts, "holds no scheduler, mask, .* --sparse-init resume")


def test_weights_load_from_a_plain_state_dict(tmp_path):
    old, new = mlp(8, 16, 4), mlp(8, 16, 4)
    torch.save(old.state_dict(), tmp_path / "c.pt")
    checkpoint.load_weights(tmp_path / "c.pt", new)
    assert_equal(dict(new.state_dict()), dict(old.state_dict()))
    with pytest.raises(
        CheckpointError, match=r"another model: fc1\.weight is \(16, 8\) in the file and \(12, 8\) here"
    ):
        checkpoint.load_weights(tmp_path / "c.pt", mlp(8, 12, 4))


def test_a_checkpoint_without_a_model_gives_no_weights(tmp_path):
    checkpoint.save(tmp_path / "c.pt", epoch=3)
    with pytest.raises(CheckpointError, match="holds no model, but epoch"):
        checkpoint.load_weights(tmp_path / "c.pt", mlp(8, 4))
