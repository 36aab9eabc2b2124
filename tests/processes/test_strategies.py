"""Every way to distribute a training moves the masks of one process: DDP, FSDP2, HSDP, tensor parallelism, ZeRO."""

import pytest
import torch
from helpers import TORCH, mlp
from launch import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from sparselearning import CosineDecay, Masking
from sparselearning.processes import distributed
from sparselearning.processes.sharded import unsharded

PLAN = {"fc1": ColwiseParallel(), "fc2": RowwiseParallel()}


def alone(model):
    return model


def replicated(model):
    return nn.parallel.DistributedDataParallel(model)


def sharded(model):
    return fully_shard(model)


def sharded_and_replicated(model):
    mesh = init_device_mesh("cpu", (2, distributed.processes() // 2), mesh_dim_names=("replicate", "shard"))
    return fully_shard(model, mesh=mesh)


def in_tensor_parallel(model):
    return parallelize_module(model, init_device_mesh("cpu", (distributed.processes(),)), PLAN)


def sharded_over_tensor_parallel(model):
    """Shard one dimension twice (`_StridedShard`), and leave a layer out of the tensor parallelism."""
    mesh = init_device_mesh("cpu", (2, distributed.processes() // 2), mesh_dim_names=("data", "tensor"))
    parallelize_module(model, mesh["tensor"], PLAN)
    return fully_shard(model, mesh=mesh["data"])


def plain(model):
    return torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)


def adam(model):
    return torch.optim.Adam(model.parameters(), lr=0.01)


def zero(model):
    return ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.02, momentum=0.9)


def zero_adam(model):
    return ZeroRedundancyOptimizer(model.parameters(), torch.optim.Adam, lr=0.01)


def train(wrap, optimizer_of, updates, growth="momentum"):
    """Train on the same batch on all processes, a mask update per step; return masks, and how the checks ended."""
    torch.manual_seed(0)
    model = mlp(12, 20, 8, 5).double()
    inputs, targets = torch.randn(8, 12).double(), torch.randn(8, 5).double()
    network = wrap(model)
    optimizer = optimizer_of(network)
    masking = Masking(optimizer, CosineDecay(0.5, updates), growth_mode=growth)
    masking.add_module(network, density=0.3)
    for _ in range(updates):
        optimizer.zero_grad()
        (network(inputs) - targets).square().mean().backward()
        optimizer.step()
        masking.at_end_of_epoch()
    masking.check()
    masking.load_state_dict(masking.state_dict())
    masks = {name: mask.tolist() for name, mask in unsharded(masking.masks).items()}
    return masks, masking.exploration_rate, masking.total_nonzero


WAYS = {
    "DDP": (replicated, plain, "momentum"),
    "DDP, random": (replicated, plain, "random"),
    "FSDP2": (sharded, plain, "momentum"),
    "FSDP2, random": (sharded, plain, "random"),
    "FSDP2, Adam": (sharded, adam, "global_momentum"),
    "HSDP": (sharded_and_replicated, plain, "momentum"),
    "TP": (in_tensor_parallel, plain, "momentum"),
    "ZeRO": (replicated, zero, "momentum"),
    "ZeRO, Adam": (replicated, zero_adam, "global_momentum"),
}
QUICK = {2: ("FSDP2, Adam", "TP", "ZeRO, Adam"), 4: ("HSDP", "TP", "ZeRO", "FSDP2 over TP")}
OF_ONE = {zero: plain, zero_adam: adam}
OF_FOUR = {"FSDP2 over TP": (sharded_over_tensor_parallel, plain, "global_momentum")}


def train_all(ways, updates):
    return {name: train(wrap, optimizer, updates, growth) for name, (wrap, optimizer, growth) in ways.items()}


@pytest.mark.long
@pytest.mark.parametrize(("processes", "updates"), [(2, 40), (4, 40), pytest.param(4, 200, marks=pytest.mark.slow)])
def test_every_way_moves_the_masks_of_one_process(processes, updates):
    ways = WAYS | (OF_FOUR if processes == 4 else {})
    if updates == 40:  # the others: test_distributed_training.py, or slow
        ways = {name: way for name, way in ways.items() if name in QUICK[processes]}
    if TORCH < (2, 8):  # whose FSDP2 fails on a CPU
        ways = {name: way for name, way in ways.items() if "SDP" not in name}
    of_one = {name: (alone, OF_ONE.get(optimizer, optimizer), growth) for name, (_, optimizer, growth) in ways.items()}
    expected = train_all(of_one, updates)
    for found in run(train_all, processes, ways, updates):
        for name in ways:
            assert found[name] == expected[name], name
