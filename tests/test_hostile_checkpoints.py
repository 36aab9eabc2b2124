"""Files that somebody made: one clear error, in bounded time and memory, and nothing is half-loaded."""

import math
import zipfile

import pytest
import torch
from helpers import masked, mlp, train
from torch import nn

from sparselearning import checkpoint
from sparselearning.checkpoint import CheckpointError
from sparselearning.sparse import SparseLinear


@pytest.mark.parametrize(
    ("name", "number"),
    [("steps", math.nan), ("steps", -1), ("steps", 2.5), ("baseline_nonzero", -4), ("baseline_nonzero", math.inf),
     ("prune_threshold", math.nan), ("steps", "3")],
)  # fmt: skip
def test_counts_that_are_none_are_refused(tmp_path, name, number):
    model = mlp(8, 16, 4)
    masking = masked(model)
    train(model, masking, 2)
    state = masking.state_dict()
    before = {key: mask.clone() for key, mask in masking.masks.items()}
    masking_state = {**state, name: number}
    torch.save({"model": model.state_dict(), "mask": masking_state, "kinds": {}, "format": 1}, tmp_path / "c.pt")
    with pytest.raises(RuntimeError, match="of at least 0, got"):
        masking.load_state_dict(masking_state)
    assert masking.steps == state["steps"]
    assert all(torch.equal(mask, before[key]) for key, mask in masking.masks.items())


def test_a_mask_of_another_dtype_is_refused():
    masking = masked(mlp(8, 16, 4))
    state = masking.state_dict()
    entry = next(iter(state["layers"].values()))
    entry["mask"] = entry["mask"].float()
    with pytest.raises(RuntimeError, match="not bool"):
        masking.load_state_dict(state)


def test_a_small_tensor_that_says_it_is_huge_is_refused(tmp_path):
    torch.save({"w": torch.ones(1).expand(2**40)}, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="repeats 4 bytes"):
        checkpoint.read(tmp_path / "c.pt")


def test_an_archive_that_is_compressed_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**7))
    with pytest.raises(CheckpointError, match="compressed"):
        checkpoint.read(tmp_path / "c.pt")


@pytest.mark.parametrize("damage", [lambda s: s["1.start"].fill_(10**6), lambda s: s["1.column"].fill_(-1)])
def test_weights_with_indices_that_do_not_fit_are_refused_whole(tmp_path, damage):
    model = nn.Sequential(nn.Linear(4, 4), SparseLinear.from_dense(nn.Linear(4, 3)))
    state = {name: tensor.clone() + (tensor.dtype == torch.float32) for name, tensor in model.state_dict().items()}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    damage(state)
    torch.save(state, tmp_path / "c.pt")
    with pytest.raises(CheckpointError, match="do not fit its shape"):
        checkpoint.load_weights(tmp_path / "c.pt", model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model(torch.ones(2, 4)).shape == (2, 3)
