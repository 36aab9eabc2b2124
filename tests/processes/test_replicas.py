"""Two processes: masks are those of rank 0, after add_module and after every update."""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing
from helpers import assert_masks_hold, masked, mlp, train
from torch.nn.parallel import DistributedDataParallel

from sparselearning.processes.distributed import broadcast_masks, check_agreement

PROCESSES = 2


def worker(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES)
    torch.manual_seed(100 + rank)  # different weights, masks and data
    record = {}
    for growth in ("momentum", "random"):
        model = DistributedDataParallel(mlp(20, 30, 10))
        masking = masked(model, growth_mode=growth, prune_every_k_steps=3)
        masks = [[mask.tolist() for mask in masking.masks.values()]]
        for _ in range(6):
            train(model, masking, 1)
            assert_masks_hold(masking)
            masks.append([mask.tolist() for mask in masking.masks.values()])
        masking.truncate_weights()
        masks.append([mask.tolist() for mask in masking.masks.values()])
        record[growth] = {
            "names": list(masking.masks),
            "masks": masks,
            "counts": masking.name2nonzeros,
            "total": (masking.total_nonzero, masking.baseline_nonzero),
            "weights": [parameter.tolist() for parameter in model.parameters()],
        }
    record["private draw"] = torch.rand(1).item()
    torch.save(record, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def replicas(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    multiprocessing.spawn(worker, (folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


@pytest.mark.parametrize("growth", ["momentum", "random"])
def test_replicas_agree(replicas, growth):
    first, second = (replicas[rank][growth] for rank in range(PROCESSES))
    assert first["names"] == ["fc1.weight", "fc2.weight"]
    for i, (masks, others) in enumerate(zip(first["masks"], second["masks"], strict=True)):
        assert masks == others, f"after {i} steps"
    assert first == second
    assert first["total"] == (180, 180)
    assert first["masks"][0] != first["masks"][3] != first["masks"][6] != first["masks"][7]


def test_replicas_drew_from_different_generators(replicas):
    assert replicas[0]["private draw"] != replicas[1]["private draw"]


def test_one_process_agrees_with_itself():
    mask = torch.tensor([True, False])
    broadcast_masks([mask])
    check_agreement([mask])
    assert mask.tolist() == [True, False]
