"""What processes must do together, and what one of them may do alone: errors come in seconds, on all of them."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from helpers import backward, masked, mlp, sgd
from launch import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.parallel.ddp import _pre_dp_module_transform

from sparselearning import Masking
from sparselearning.invariants import InvariantError
from sparselearning.processes import distributed, group
from sparselearning.processes.distributed import ProcessError


def failure(function, *arguments, **settings):
    """Return what a function raises, as `kind: text`."""
    try:
        function(*arguments, **settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def train_several_networks():
    """Train a network on each process: of other shapes, of equal ones, and in groups of their own."""
    rank, said = dist.get_rank(), {}
    stage = mlp(6, 4 + rank, 3)
    said["other shapes"] = failure(masked, stage)
    torch.manual_seed(rank)
    stage = mlp(6, 4, 3)
    said["equal shapes"] = failure(masked, stage)
    torch.manual_seed(0)
    alike = masked(mlp(6, 4, 3), density=0.9)
    backward(alike.modules[0], torch.full((2, 6), 1.0 + rank))  # gradients of two networks, which begin alike
    alike.step()
    said["equal at first"] = failure(alike.truncate_weights)
    mine, _ = dist.new_subgroups(group_size=1)
    stages = []
    for given in (mine, init_device_mesh("cpu", (2,))):
        stage = mlp(6, 4 + rank, 3) if given is mine else mlp(6, 4, 3)
        masking = Masking(sgd(stage), None)
        masking.add_module(stage, density=0.5, process_group=given)
        for _ in range(2 + rank if given is mine else 2):
            backward(stage, torch.ones(2, 6))
            masking.step()
            masking.truncate_weights()
        stages.append(masking.group.ranks)
    said["groups"] = stages
    stage = mlp(6, 4, 3)
    masking = Masking(sgd(stage), None)
    elsewhere = dist.GroupMember.NON_GROUP_MEMBER
    said["not a member"] = failure(masking.add_module, stage, 0.5, process_group=elsewhere)
    return said


def test_processes_that_train_several_networks_say_so_or_are_told():
    for said in run(train_several_networks, 2):
        assert "do not train the same network: 0 has fc1.weight (4, 6), 1 has fc1.weight (5, 6)" in said["other shapes"]
        assert said["equal shapes"].startswith("ProcessError: The weights of processes 1 and 0 differ")
        assert said["equal at first"].startswith("ProcessError: The weights of processes 1 and 0 differ")
        assert all("process_group=" in said[name] for name in ("other shapes", "equal shapes", "equal at first"))
        assert said["not a member"].startswith("ValueError: Expected a process group or a DeviceMesh that process")
        assert [len(ranks) for ranks in said["groups"]] == [1, 2]


def look_alone():
    """Let the first process look at replicas and shards alone, also after an evaluation; then all go on."""
    counts = []
    for wrap in (nn.parallel.DistributedDataParallel, fully_shard):
        torch.manual_seed(0)
        model = mlp(6, 5, 4)
        network = wrap(model)
        masking = masked(network)
        for _ in range(2):
            backward(network, torch.ones(2, 6))
            masking.step()
            masking.truncate_weights()
            with torch.no_grad():
                network(torch.ones(2, 6))
            if dist.get_rank() == 0:
                masking.check()
                counts.append((len(masking.summary()), masking.exploration_rate, len(masking.state_dict())))
    return counts


def test_one_process_alone_looks_at_masks():
    first, second = run(look_alone, 2)
    assert len(first) == 4
    assert second == []


def fail_together():
    """Make mistakes on one process or on all, one after the other; return what each says."""
    group.LEAST_PATIENCE = timedelta(seconds=60)  # guards against hanging; what is said comes before
    rank, said = dist.get_rank(), {}
    masking = masked(mlp(6, 5, 4))
    for _ in range(2 + rank):
        backward(masking.modules[0], torch.ones(2, 6))
        masking.step()
    masking.layers[0].weight.data.zero_(), masking.layers[1].weight.data.zero_()  # equal, but for the steps
    said["steps"] = failure(masking.at_end_of_epoch)
    masking = masked(mlp(6, 5, 4))
    backward(masking.modules[0], torch.ones(2, 6))
    masking.step()
    said["places"] = failure(
        masking.truncate_weights if rank else lambda: masking.load_state_dict(masking.state_dict())
    )

    def fails_on_one(masking, mask, weight, name):
        if rank:
            raise ArithmeticError("by the user")
        return mask

    masking.prune = fails_on_one
    before = masking.layers[0].mask.clone()
    said["function"] = failure(masking.truncate_weights)
    said["unchanged"] = torch.equal(before, masking.layers[0].mask)
    state = masking.state_dict()
    if rank:
        del state["layers"]["fc1.weight"]
    said["state"] = failure(masking.load_state_dict, state)
    if rank:
        masking.layers[0].mask.logical_not_()
    said["edited"] = failure(masking.check)
    said["optimizer"] = failure(masked, mlp(6, 4), sgd(mlp(6, 4)) if rank else None)
    return said


def test_a_failure_on_one_process_is_told_to_all():
    first, second = run(fail_together, 2)
    assert first["steps"] == second["steps"]
    assert "Process 1 has made 3 steps of the optimizer, and process 0 2" in first["steps"]
    assert first["places"] == second["places"]
    assert "Process 0 is at load_state_dict, process 1 at an update of the masks" in first["places"]
    assert first["function"].startswith("ProcessError: Process 1 failed at truncate_weights, and all stop")
    assert second["function"] == "ArithmeticError: by the user"
    assert first["unchanged"]
    assert second["unchanged"]
    assert first["state"].startswith("ProcessError: Process 1 failed at load_state_dict")
    assert second["state"].startswith("RuntimeError: The masks are of another model")
    assert (first["edited"], second["edited"][:13]) == ("no error", "ProcessError:")
    assert first["optimizer"].startswith("ProcessError: Process 1 failed at add_module")
    assert second["optimizer"].startswith("ValueError: SGD steps no weight")


def come_late():
    """Let an update be due on one process alone, while the other waits in Join, and a call of one process alone."""
    group.LEAST_PATIENCE = timedelta(seconds=2)
    network = nn.parallel.DistributedDataParallel(mlp(6, 5, 4))
    masking = masked(network, prune_every_k_steps=1)
    from torch.distributed.algorithms.join import Join

    with Join([network]):
        for _ in range(2 + distributed.rank()):
            backward(network, torch.ones(2, 6))
            masking.step()


@pytest.mark.long
def test_an_update_that_one_process_waits_for_ends_soon():
    with pytest.raises(RuntimeError) as error:
        run(come_late, 2)
    assert "Process 1 waited" in str(error.value)
    assert "must make the same calls and the same number of steps" in str(error.value)


def refuse_and_notice():
    """Try what hides weights, and write into shards."""
    said = {}
    hidden = FullyShardedDataParallel(mlp(6, 4), device_id=torch.device("cpu"), use_orig_params=True)
    said["FSDP1"] = failure(masked, hidden, sgd(hidden))
    split = parallelize_module(mlp(6, 4), init_device_mesh("cpu", (2,)), {"fc1": ColwiseParallel()})
    _pre_dp_module_transform(split)  # what torch wants before DistributedDataParallel
    said["DDP over TP"] = failure(masked, split, sgd(split))

    model = fully_shard(mlp(6, 1, 4))  # the second process holds nothing of the first layer
    masking = masked(model)
    backward(model, torch.ones(2, 6))
    masking.step()
    with torch.no_grad():
        masking.layers[0].weight.add_(1)
    said["check"] = failure(masking.check)
    said["update"] = failure(masking.truncate_weights)
    masking.apply_mask()
    masking.check()
    masking.layers[1].mask.to_local().fill_(True)
    said["mask"] = failure(masking.check)

    network = nn.parallel.DistributedDataParallel(mlp(6, 5, 4))
    masking = masked(network, ZeroRedundancyOptimizer(network.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9))
    backward(network, torch.ones(2, 6))
    masking.step()
    said["momenta"] = [failure(masking.get_momentum_for_weight, layer.weight)[:80] for layer in masking.layers]
    return said


def test_what_cannot_be_masked_is_refused_and_writes_into_shards_are_noticed():
    first, second = run(refuse_and_notice, 2)
    for said in (first, second):
        assert "FullyShardedDataParallel (FSDP1)" in said["FSDP1"]
        assert "Use fully_shard" in said["FSDP1"]
        assert "DistributedDataParallel over tensor parallelism" in said["DDP over TP"]
        assert said["update"].startswith(f"{InvariantError.__name__}: More weights are not zero than are active in fc1")
        assert said["mask"].startswith(f"{ProcessError.__name__}: The masks of fc2.weight were written")
    assert "inactive weights are not zero" in first["check"]
    of_each = sorted(said["momenta"] for said in (first, second))
    refused = "RuntimeError: ZeroRedundancyOptimizer keeps the momentum of a weight of shape"
    for one, other in zip(*of_each, strict=True):
        assert sorted([one[:8], other[:8]]) == ["RuntimeE", "no error"]
        assert refused in (one[: len(refused)], other[: len(refused)])
