"""Checkpoints of parts that processes hold together: whole files, and torch.distributed.checkpoint."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers import backward, masked, mlp
from launch import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sparselearning import Masking, checkpoint
from sparselearning.processes import distributed
from sparselearning.processes.sharded import unsharded


def alone(model):
    return model


def in_tensor_parallel(model):
    mesh = init_device_mesh("cpu", (distributed.processes(),))
    return parallelize_module(model, mesh, {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()})


def zero(model):
    network = nn.parallel.DistributedDataParallel(model)
    return network, ZeroRedundancyOptimizer(network.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)


def start(wrap, seed=0):
    torch.manual_seed(seed)
    model = mlp(6, 8, 4)
    wrapped = wrap(model)
    network, optimizer = wrapped if isinstance(wrapped, tuple) else (wrapped, None)
    optimizer = optimizer or torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    masking = Masking(optimizer, None, 0.5, prune_mode="sign_flip", growth_mode="rewiring")
    masking.add_module(network, density=0.5)
    return network, model, optimizer, masking


def train(network, optimizer, masking, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        network(torch.ones(2, 6)).square().mean().backward()
        optimizer.step()
        masking.at_end_of_epoch()


def state_of(model, masking):
    return copy.deepcopy(
        unsharded({"model": model.state_dict(), "mask": masking.state_dict(), "rate": masking.exploration_rate})
    )


def save_whole(wrap, path):
    """Train, save, train on; return the states at the two ends."""
    network, model, optimizer, masking = start(wrap)
    train(network, optimizer, masking)
    checkpoint.save(path, model=model, optimizer=optimizer, mask=masking, epoch=3)
    saved = state_of(model, masking)
    train(network, optimizer, masking)
    return saved, state_of(model, masking)


def load_whole(wrap, path):
    """Load into another network, train on; return the same two states."""
    network, model, optimizer, masking = start(wrap, seed=1)
    assert checkpoint.load(path, model=model, optimizer=optimizer, mask=masking) == {"epoch": 3}
    loaded = state_of(model, masking)
    train(network, optimizer, masking)
    return loaded, state_of(model, masking)


def save_and_load(place):
    """Save a training of each way, load it in the same way; and damage what is loaded on one process."""
    found = {}
    for name, wrap in (("FSDP2", fully_shard), ("TP", in_tensor_parallel), ("ZeRO", zero)):
        found[name] = save_whole(wrap, place / f"{name}.pt"), load_whole(wrap, place / f"{name}.pt")
    _, model, optimizer, masking = start(fully_shard, seed=2)
    before = state_of(model, masking)
    state = checkpoint.read(place / "FSDP2.pt")
    if dist.get_rank():
        state["mask"]["steps"] = -1
    with pytest.raises(checkpoint.CheckpointError) as error:
        checkpoint.restore("damaged.pt", state, model=model, optimizer=optimizer, mask=masking)
    torch.testing.assert_close(state_of(model, masking), before, rtol=0, atol=0)
    return found, str(error.value)


@pytest.mark.long
def test_whole_checkpoints_of_parts_are_those_of_one_process(tmp_path):
    first, second = run(save_and_load, 2, tmp_path)
    for found, error in (first, second):
        for name, (saved, loaded) in found.items():
            torch.testing.assert_close(saved, loaded, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")
        assert "The mask of checkpoint damaged.pt does not fit" in error
    for name, (saved, _) in first[0].items():  # and on one process
        loaded = load_whole(alone, tmp_path / f"{name}.pt")
        torch.testing.assert_close(loaded[0], saved[0], rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def save_parts(folder):
    network, model, optimizer, masking = start(fully_shard)
    train(network, optimizer, masking)
    dcp.save({"model": model.state_dict(), "mask": masking}, checkpoint_id=folder)
    return state_of(model, masking)


def load_parts(folder):
    """Load on other processes; before, fail half-way, and without the tensors that functions kept."""
    network, model, _, masking = start(fully_shard, seed=1)
    before = unsharded(masking.state_dict())
    with pytest.raises(BaseException, match="lost"):
        dcp.load({"mask": masking, "lost": {"lost": torch.zeros(2)}}, checkpoint_id=folder)
    said = ""
    try:
        dcp.load({"mask": masking}, checkpoint_id=folder)
    except RuntimeError as error:
        said = str(error)
    torch.testing.assert_close(unsharded(masking.state_dict()), before, rtol=0, atol=0)
    for layer in masking.layers:
        layer.memory["sign"] = torch.zeros_like(layer.mask, dtype=torch.int8)
    weights = model.state_dict()
    dcp.load({"model": weights, "mask": masking}, checkpoint_id=folder)
    model.load_state_dict(weights)
    backward(network, torch.ones(2, 6))
    masking.check()
    return state_of(model, masking), said


@pytest.mark.long
def test_distributed_checkpoints_load_on_another_number_of_processes_or_change_nothing(tmp_path):
    saved = run(save_parts, 2, Path(tmp_path) / "parts")[0]
    for loaded, said in run(load_parts, 4, tmp_path / "parts"):
        torch.testing.assert_close(loaded, saved, rtol=0, atol=0)
        assert "is to hold 1 tensors, and holds none" in said


def test_a_state_is_a_copy():
    masking = masked(mlp(6, 4))
    state = masking.state_dict()
    state["layers"]["fc1.weight"]["mask"].logical_not_()
    masking.check()
