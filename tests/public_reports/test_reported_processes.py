"""What users of other libraries reported of several processes: masks that differ.

A comment above each test names the report: project and number on GitHub.
"""

import pytest
import torch
import torch.distributed as dist
from helpers import assert_masks_hold, flat, mlp, sgd, train
from launch import run
from torch.nn.parallel import DistributedDataParallel

from sparselearning import Masking


def masks_with_seeds_and_data_of_its_own(method, parts, wrapped_first=True):
    torch.manual_seed(100 + dist.get_rank())
    model = mlp(20, 30, 10)
    replica = DistributedDataParallel(model)  # sends the weights of the first process
    optimizer = sgd(model)
    masked = replica if wrapped_first else model
    masking = Masking.from_method(method, masked, optimizer, total_steps=12, density=0.2, **parts)
    model = replica if wrapped_first else DistributedDataParallel(model)
    masks = [flat(masking.masks)]
    for _ in range(3):
        train(model, masking, 2)
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
        masks.append(flat(masking.masks))
    masking.check()
    return masks, [parameter.tolist() for parameter in model.parameters()]


# neuralmagic/sparseml#429: processes whose seeds differ end up with different masks.
# microsoft/nni#5205, #5242: gradients of its own prune every process independently.
@pytest.mark.parametrize(
    ("method", "parts"), [("set", {}), ("rigl", dict(prune_every_k_steps=2)), ("gmp", dict(prune_every_k_steps=2))]
)
def test_processes_with_other_seeds_and_data_have_the_same_masks(method, parts):
    first, second = run(masks_with_seeds_and_data_of_its_own, 2, method, parts)
    assert first == second
    masks, _ = first
    assert masks[0] != masks[-1]


# microsoft/nni#5205: a model is pruned first, and wrapped in DDP then.
def test_a_masked_model_is_wrapped_later():
    first, second = run(masks_with_seeds_and_data_of_its_own, 2, "set", {}, False)
    assert first == second
