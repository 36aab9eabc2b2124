"""Replicas (DDP) and shards (FSDP2) train the network that one process trains."""

from contextlib import nullcontext
from itertools import combinations

import pytest
import torch
import torch.distributed as dist
from helpers import mlp
from launch import run
from script import load_main
from torch import nn

from sparselearning import CosineDecay, Masking
from sparselearning.experiments.data.in_memory import share
from sparselearning.experiments.run.precision import Precision
from sparselearning.functions import FunctionError
from sparselearning.processes import distributed
from sparselearning.processes.sharded import Whole, unsharded

GROWTHS = ("momentum", "random", "global_momentum", "guided")


def train(growth, dtype=torch.float32, wrap=None, divided=False, updates=20, **modes):
    """Train a small network, a mask update per step, and return its state."""
    torch.manual_seed(0)
    model = mlp(12, 21, 5).to(dtype)
    inputs, targets = torch.randn(8, 12, dtype=dtype), torch.randn(8, 5, dtype=dtype)
    network = wrap(model) if wrap else model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    masking = Masking(optimizer, CosineDecay(0.5, updates), growth_mode=growth, **modes)
    masking.add_module(model, density=0.2)
    mine = slice(distributed.rank(), None, distributed.processes()) if divided else slice(None)
    for update in range(updates):
        optimizer.zero_grad()
        (network(inputs[mine]) - targets[mine]).square().mean().backward()
        masking.step()
        if update % 10 == 0:  # an evaluation, after which FSDP2 keeps what it gathered
            with torch.no_grad():
                network(inputs)
        masking.at_end_of_epoch()
    return unsharded({"model": model.state_dict(), "mask": masking.state_dict(), "optimizer": optimizer.state_dict()})


def shard(model):
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


def train_replicas(updates, wrap=None):
    # In float64 sums of another order hardly differ.
    return [train(growth, torch.float64, wrap, divided=True, updates=updates) for growth in GROWTHS]


def train_shards(updates, wrap=None):
    return [train(growth, wrap=wrap, updates=updates) for growth in GROWTHS]


# Four processes on fewer cores wait for each other most of the time.
SIZES = [(2, 40), (4, 40), *(pytest.param(processes, 200, marks=pytest.mark.slow) for processes in (2, 4))]


@pytest.mark.long
@pytest.mark.parametrize(("processes", "updates"), SIZES)
def test_replicas_that_divide_the_batches_end_with_the_masks_of_one_process(processes, updates):
    alone = train_replicas(updates)
    for replica in run(train_replicas, processes, updates, distributed.replicate):
        for expected, found in zip(alone, replica, strict=True):
            torch.testing.assert_close(found, expected)
            assert same_masks(found, expected)


@pytest.mark.long
@pytest.mark.parametrize(("processes", "updates"), SIZES)
def test_shards_train_the_network_of_one_process_to_the_bit(processes, updates):
    # With the same batch on 2 or 4 processes the mean of the gradients is exact.
    alone = train_shards(updates)
    for trained in run(train_shards, processes, updates, shard):
        for expected, found in zip(alone, trained, strict=True):
            for part in ("model", "optimizer"):
                torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
            assert same_masks(found, expected)
            torch.testing.assert_close(found["mask"], expected["mask"])  # its importances to 1e-16


MODES = [
    dict(prune_mode="SET"),
    dict(prune_mode="threshold"),
    dict(prune_mode="global_magnitude"),
    dict(redistribution_mode="magnitude"),
    dict(redistribution_mode="nonzeros"),
    dict(redistribution_mode="none"),
]


def train_modes(wrap=None):
    return [train("momentum", wrap=wrap, updates=6, **modes) for modes in MODES]


@pytest.mark.long
def test_every_other_mode_moves_the_masks_of_shards_as_of_the_whole():
    alone = train_modes()
    for trained in run(train_modes, 2, shard):
        for modes, expected, found in zip(MODES, alone, trained, strict=True):
            assert same_masks(found, expected), modes


def grow_neurons():
    with pytest.raises(FunctionError, match=r"expects whole neurons.* Use growth_mode='momentum'"):
        train("momentum_neuron", wrap=shard, updates=1)


def test_neurons_of_shards_do_not_grow():
    run(grow_neurons, 2)


def same_masks(state, other):
    layers, others = state["mask"]["layers"], other["mask"]["layers"]
    return all(torch.equal(layers[name]["mask"], others[name]["mask"]) for name in others)


def go_on_in_shards(state):
    """Load a whole state into a sharded network and train on; return what was loaded, and the active weights."""
    torch.manual_seed(0)
    model = shard(mlp(12, 21, 5))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    masking = Masking(optimizer, None, growth_mode="momentum")
    masking.add_module(model, density=0.2)
    parts = {"model": Whole(model), "optimizer": Whole(optimizer), "mask": Whole(masking)}
    for name, part in parts.items():
        part.load_state_dict(state[name])
    loaded = {name: part.state_dict() for name, part in parts.items()}
    model(torch.ones(2, 12)).sum().backward()
    masking.step()
    masking.at_end_of_epoch()
    return loaded, masking.total_nonzero


def test_shards_go_on_from_the_checkpoint_of_one_process():
    alone = train("momentum")
    for loaded, nonzeros in run(go_on_in_shards, 2, alone):
        torch.testing.assert_close(loaded, {name: alone[name] for name in loaded}, rtol=0, atol=0)
        assert nonzeros == alone["mask"]["baseline_nonzero"]


def diverge():
    model = mlp(8, 8)
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None)
    masking.add_module(model, density=0.5)
    mask = masking.masks["fc1.weight"]
    if distributed.rank() == 1:
        mask.copy_(mask.flip(0))
    try:
        masking.truncate_weights()
    except RuntimeError as error:
        return str(error)


def test_every_process_raises_where_masks_diverged():
    for message in run(diverge, 3):
        assert message.startswith("The masks of rank 1 differ from those of rank 0.")


def test_a_checksum_sees_every_swap():
    orders = [list(range(6))]
    for i, j in combinations(range(6), 2):
        orders.append(list(range(6)))
        orders[-1][i], orders[-1][j] = j, i
    mask = torch.eye(6, dtype=torch.bool)
    assert len({int(distributed.checksum(mask[order])) for order in orders}) == len(orders) == 16
    assert distributed.checksum(torch.zeros(3, dtype=torch.bool)) != distributed.checksum(torch.zeros(4).bool())


def overflow(wrap, parts):
    torch.manual_seed(0)
    model = mlp(6, 4)
    network = wrap(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masking = Masking(optimizer, None, prune_every_k_steps=1)
    masking.add_module(model, density=0.5)
    precision = Precision("fp16", torch.device("cpu"))
    states = []
    for factor in (1.0, float("inf") if distributed.rank() else 1.0, 1.0):
        masking.zero_grad()
        for part in range(parts):
            with nullcontext() if part + 1 == parts else distributed.without_sync(network):
                of_outputs = network(torch.ones(2, 6)).square().mean(dim=0)
                loss = (
                    of_outputs[0] * (1.0 if part else factor) + of_outputs[1:].sum()
                )  # one row of the weight overflows
                precision.backward(loss, part + 1 == parts)
        precision.step(masking)
        momenta = [entry["momentum_buffer"] for entry in optimizer.state.values()]
        states.append([masking.steps, *masking.masks.values(), *model.state_dict().values(), *momenta])
        states[-1] = [unsharded(value).clone() if isinstance(value, torch.Tensor) else value for value in states[-1]]
    return states


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("wrap", [distributed.replicate, shard])
def test_an_overflow_on_one_process_is_skipped_by_all(wrap, parts):
    for before, skipped, after in run(overflow, 2, wrap, parts):
        torch.testing.assert_close(skipped, before, rtol=0, atol=0)
        assert (before[0], after[0]) == (1, 2)


def average():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[0].running_mean.fill_(float(dist.get_rank()))
    distributed.average_buffers(model)
    return model[0].running_mean.tolist(), model[0].num_batches_tracked.item()


def test_statistics_of_batchnorm_are_averaged():
    assert run(average, 2) == [([0.5, 0.5], 0)] * 2


def train_digits(place, *more):
    """Run mnist_cifar/main.py on this process's share of each batch; return its metrics, without times."""
    script = load_main()
    given = "--data digits --epochs 2 --batch-size 30 --test-batch-size 71 --max-threads 1 --device cpu --run-dir"
    folder = script.run(script.parse_arguments([*given.split(), str(place), *more]))
    return [
        {name: value for name, value in record.items() if name not in ("seconds", "images_per_second")}
        for record in folder.metrics
    ]


@pytest.mark.long
@pytest.mark.parametrize("more", ["--growth momentum", "--growth random", "--pattern 2:4 --sparse-init snip"])
def test_digits_are_learned_by_two_processes_as_by_one(tmp_path, more):
    more = more.split()
    alone = train_digits(tmp_path / "alone", *more)
    first, second = run(train_digits, 2, tmp_path / "together", *more)
    assert first == second, "all processes know the accuracy of all images"
    assert len(list((tmp_path / "together").iterdir())) == 1, "one process writes"
    assert first[-1]["test_total"] == alone[-1]["test_total"] == 359
    assert first[-1]["test_accuracy"] == pytest.approx(alone[-1]["test_accuracy"], abs=0.03)
    assert [record["train_loss"] for record in first[:2]] == pytest.approx(
        [record["train_loss"] for record in alone[:2]], rel=0.02
    )


def deal(count, evenly):
    numbers = torch.arange(count)
    return [labels.tolist() for _, labels in share([(numbers, numbers), (numbers[:1], numbers[:1])], evenly)]


def test_a_batch_is_dealt_out():
    assert run(deal, 2, 5, False) == [[[0, 2, 4], [0]], [[1, 3], []]]
    assert run(deal, 2, 5, True) == [[[0, 2]], [[1, 3]]]
