"""What the optimizer's state of a weight starts from when the weight becomes active."""

import copy
import re

import pytest
import torch
from by_method import begin
from helpers import assert_masks_hold, masked, mlp, sgd, snapshot, train
from launch import run
from oracles.regrown_adam import mean_over_active, steps
from script import ROOT
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from sparselearning import Masking
from sparselearning.sparse import available
from sparselearning.sparse.training import SparseTraining
from sparselearning.weights.dense_copy import DenseCopy
from sparselearning.weights.start_states import means
from sparselearning.weights.zeros import Zeros

RANDOM = dict(growth_mode="random", redistribution_mode="none")
OPTIMIZERS = {
    "SGD": {"momentum": 0.9},
    "SGD fused": {"momentum": 0.9, "nesterov": True, "fused": True},
    "Adam": {},
    "Adam fused": {"fused": True},
    "Adam amsgrad": {"amsgrad": True},
    "AdamW foreach": {"foreach": True},
    "NAdam": {},
    "RAdam": {},
    "Adamax": {},
    "RMSprop centered": {"momentum": 0.9, "centered": True},
    "Adagrad": {},
    "Adadelta": {},
    "Rprop": {},
    "Muon": {},
}


def optimizer_for(model, name):
    kind = getattr(torch.optim, name.split()[0], None)
    if kind is None:
        pytest.skip(f"torch {torch.__version__} has no {name}")
    parameters = [p for p in model.parameters() if p.dim() == 2 or name != "Muon"]
    return kind(parameters, lr=0.01, **OPTIMIZERS[name])


def states(masking):
    """Copies of the optimizer's state of every layer, without numbers and counts, by name of the layer."""
    found = masking.optimizer.state
    return {
        layer.name: {
            key: value.detach().clone()
            for key, value in found[layer.master].items()
            if isinstance(value, torch.Tensor) and value.dim() > 1
        }
        for layer in masking.layers
    }


def assert_grown_have_means(masking, before, old, tolerance=1e-5):
    """Assert that regrown weights have the oracle's mean, and that all else is to the bit what it was."""
    now = states(masking)
    for layer in masking.layers:
        grown, past = layer.mask & ~before[layer.name], old[layer.name]
        assert grown.any()
        assert past
        for key, value in now[layer.name].items():
            assert torch.equal(value[~grown], past[key][~grown])
            lists = [x.flatten().tolist() for x in (past[key].double(), before[layer.name], layer.mask)]
            expected = torch.full_like(value[grown], mean_over_active(*lists))
            torch.testing.assert_close(value[grown], expected, rtol=tolerance, atol=1e-9)


def update(masking):
    before, old = snapshot(masking), states(masking)
    masking.at_end_of_epoch()
    assert_masks_hold(masking)
    return before, old


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_all_that_an_optimizer_keeps_of_each_weight_starts_from_the_mean(name):
    model = mlp(20, 30, 10)
    optimizer = optimizer_for(model, name)
    masking = masked(model, optimizer, weights=Zeros(reset_state="mean"), **RANDOM)
    for _ in range(2):
        train(model, optimizer, 3)
        assert_grown_have_means(masking, *update(masking))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_means_are_precise_in_other_precisions(dtype):
    """A sum of 20,000 entries in half precision would lose most of them."""
    torch.manual_seed(0)
    model = mlp(300, 200).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
    masking = masked(model, optimizer, density=0.4, weights=Zeros(reset_state="mean"), **RANDOM)
    train(model, optimizer)
    assert_grown_have_means(masking, *update(masking), tolerance=1e-2 if dtype != torch.float64 else 1e-12)


@pytest.mark.parametrize("pattern", ["2:4", "block:2x5", "fan-in", "neuron"])
def test_patterns_start_from_the_mean_too(pattern):
    model = mlp(20, 40, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    masking = masked(model, optimizer, pattern=pattern, density=0.4, weights=Zeros(reset_state="mean"), **RANDOM)
    train(model, optimizer)
    assert_grown_have_means(masking, *update(masking))


@pytest.mark.parametrize("settings", [dict(backward=2.0), dict(soft=True)])
def test_weights_that_kept_their_values_start_from_the_mean_too(settings):
    model = mlp(20, 30, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    held = DenseCopy(reset_state="mean", **settings)
    masking = masked(model, optimizer, weights=held, prune_mode="dense_magnitude", **RANDOM)
    train(model, optimizer)
    assert_grown_have_means(masking, *update(masking))


def test_several_optimizers_take_the_mean_each_for_its_weights():
    model = mlp(20, 30, 10)
    pair = [torch.optim.Adam(model.fc1.parameters(), lr=0.01), sgd(model.fc2)]
    masking = masked(model, pair, weights=Zeros(reset_state="mean"), **RANDOM)
    for _ in range(3):
        train(model, masking, 1)
    assert_grown_have_means(masking, *update(masking))


def test_a_method_takes_the_mean():
    model, optimizer, masking = begin("rigl", torch.optim.AdamW, prune_every_k_steps=4, reset_state="mean")
    train(model, optimizer, 3)
    before = snapshot(masking)
    train(model, optimizer, 1)
    layer = masking.layers[0]
    grown = layer.mask & ~before[layer.name]
    moments = optimizer.state[layer.weight]["exp_avg_sq"]
    assert moments[grown].unique().tolist() == pytest.approx([moments[layer.mask & ~grown].mean().item()])


def test_where_no_weight_stays_active_the_mean_is_zero():
    none = torch.zeros(3, dtype=torch.bool)
    assert means({"a": torch.ones(3), "b": torch.full((3,), torch.inf)}, none, {}) == {"a": 0, "b": 0}


@pytest.mark.parametrize(
    ("name", "settings", "key", "start"),
    [
        ("Rprop", dict(lr=0.03), "step_size", 0.03),
        ("Adagrad", dict(lr=0.1, initial_accumulator_value=0.5), "sum", 0.5),
        ("Adagrad", dict(lr=0.1), "sum", 0.0),
        ("Adadelta", {}, "acc_delta", 0.0),
    ],
)
@pytest.mark.parametrize("sparse", [False, True])
def test_a_reset_gives_what_the_optimizer_begins_with(name, settings, key, start, sparse):
    """A step size of zero would hold a weight where it is: Rprop's is a multiple of the one before."""
    if sparse and not available():
        pytest.skip("built without sparse kernels")
    model = mlp(20, 30, 10)
    optimizer = getattr(torch.optim, name)(model.parameters(), **settings)
    masking = masked(model, optimizer, weights=(SparseTraining if sparse else Zeros)(reset_state=True), **RANDOM)
    train(model, optimizer)
    before = snapshot(masking)
    masking.at_end_of_epoch()
    saved = optimizer.state_dict()["state"]
    for number, layer in zip((0, 2), masking.layers, strict=True):
        grown = saved[number][key][layer.mask & ~before[layer.name]]
        assert torch.equal(grown, torch.full_like(grown, start))


def test_averages_of_weights_are_no_state_to_take_a_mean_of():
    """ASGD's `ax` is a copy of the weights: it is zero where the weight is."""
    model = mlp(20, 30, 10)
    optimizer = torch.optim.ASGD(model.parameters(), lr=0.1)
    masking = masked(model, optimizer, weights=Zeros(reset_state="mean"), **RANDOM)
    train(model, optimizer)
    before, _ = update(masking)
    for layer in masking.layers:
        assert not optimizer.state[layer.weight]["ax"][layer.mask & ~before[layer.name]].any()
    masking.check()


# The sizes of steps


def late_adam(reset, t=100_000):
    """A layer of 4 x 5 in step t of Adam, and its Masking: all weights have had gradients of +-1 for long."""
    model = nn.Linear(5, 4, bias=False)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    masking = masked(model, optimizer, density=0.5, weights=Zeros(reset_state=reset), **RANDOM)
    signs = torch.arange(20).reshape(4, 5) % 2 * 2.0 - 1
    state = dict(step=torch.tensor(float(t)), exp_avg=0.1 * signs, exp_avg_sq=torch.ones(4, 5))
    optimizer.state[model.weight] = state
    return model, optimizer, masking, t


def regrown_steps(reset, gradients):
    """The steps over the learning rate that a regrown weight takes for these gradients; those of the equations."""
    model, optimizer, masking, t = late_adam(reset)
    before = snapshot(masking)["weight"]
    masking.at_end_of_epoch()
    grown = masking.masks["weight"] & ~before
    state = optimizer.state[model.weight]
    m, v = state["exp_avg"][grown][0].item(), state["exp_avg_sq"][grown][0].item()
    taken = []
    for gradient in gradients:
        old = model.weight.detach()[grown].clone()
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        taken.append(((old - model.weight[grown]) / 1e-3)[0].item())
    return taken, steps(m, v, gradients, t)


@pytest.mark.parametrize("reset", [False, True, "mean"])
def test_steps_of_regrown_weights_are_those_of_the_equations(reset):
    gradients = [1.0, -0.5, 2.0, 0.25, 1.0, -1.0, 0.0, 1.0, 3.0, 1.0]
    taken, expected = regrown_steps(reset, gradients)
    assert taken == pytest.approx(expected, rel=1e-3, abs=1e-3)


def documented(start):
    """The numbers of a row of docs/methods.md."""
    (row,) = re.findall(rf"^\| {start} \|(.+)\|$", (ROOT / "docs/methods.md").read_text(), re.MULTILINE)
    return [float(number) for number in row.split("|")]


@pytest.mark.parametrize(
    ("start", "reset", "v"), [("zero, equal gradients", True, 0), ("mean, equal gradients", "mean", 1)]
)
def test_the_documented_steps_are_those_of_the_optimizer(start, reset, v):
    rows = documented(start)
    assert rows == [round(step, 2) for step in steps(0.0, v, [1.0] * 10, 100_000)]
    if reset is True:  # with the mean, m is not exactly zero here
        assert regrown_steps(reset, [1.0] * 10)[0] == pytest.approx(rows, abs=0.01)


# Shards


def sharded_means():
    """Means over a weight that two processes hold whole, in shards, and as one shard each."""
    values, mask = torch.arange(15.0).reshape(5, 3), torch.arange(15).reshape(5, 3) % 4 == 1
    found = [means(dict(a=values, b=values**2), mask, {})]
    for shape in ((1, 2), (2, 1)):
        mesh = init_device_mesh("cpu", shape)
        a, b, c = (distribute_tensor(x, mesh, [Replicate(), Shard(0)]) for x in (values, values**2, mask))
        found.append(means(dict(a=a, b=b), c, {}))
    return [[mean.item() for mean in each.values()] for each in found]


def fsdp_state(shard):
    """The optimizer's state after an update, gathered; of weights in shards, or whole."""
    from torch.distributed.fsdp import fully_shard

    from sparselearning.processes.sharded import unsharded

    torch.manual_seed(3)
    model = mlp(9, 7, 5)
    if shard:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)
    masking = masked(
        model, optimizer, 0.4, weights=Zeros(reset_state="mean"), growth_mode="gradient", redistribution_mode="none"
    )
    for step in range(4):
        optimizer.zero_grad()
        model(torch.randn(8, 9, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    masking.at_end_of_epoch()
    kept = [optimizer.state[layer.weight] for layer in masking.layers]
    return unsharded([{key: value for key, value in state.items() if key != "step"} for state in kept])


def of_processes():
    return sharded_means(), fsdp_state(shard=True)


def test_means_are_over_the_whole_layer_and_all_processes():
    expected = fsdp_state(shard=False)
    for (whole, in_shards, twice), state in run(of_processes, 2):
        assert whole == in_shards == twice
        torch.testing.assert_close(state, expected)


# What cannot be


class Stand(torch.optim.Optimizer):
    """A third party's optimizer that keeps `state` of every weight."""

    def __init__(self, parameters, state):
        super().__init__(parameters, dict(lr=0.1))
        self.make = state

    @torch.no_grad()
    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            self.state[weight] = self.state.get(weight) or self.make(weight)
            weight.sub_(weight.grad, alpha=0.1)


STATES = {
    "rows and columns": lambda weight: {"row": weight.sum(-1), "column": weight.sum(0)},
    "whole numbers": lambda weight: {"age": torch.ones_like(weight, dtype=torch.int64)},
    "codes": lambda weight: {"state1": torch.ones_like(weight, dtype=torch.uint8), "absmax1": torch.ones(3)},
}


@pytest.mark.parametrize(
    ("state", "reset", "message"),
    [
        ("rows and columns", "mean", "reset_state='mean' takes the mean .* and Stand keeps no state of single weights"),
        ("whole numbers", "mean", "reset_state='mean' takes the mean .* and Stand keeps 'age' in whole numbers"),
        ("codes", "mean", r"Stand keeps 'state1' in codes of 8 bits, .* Use reset_state=False \(--no-reset-state\)"),
        ("codes", True, "Stand keeps 'state1' in codes of 8 bits"),
        ("rows and columns", True, None),
        ("whole numbers", True, None),
        ("codes", False, None),
    ],
)
def test_state_without_a_start_is_refused_before_masks_move(state, reset, message):
    model = mlp(20, 30, 10)
    optimizer = Stand([model.fc1.weight, model.fc2.weight], STATES[state])
    masking = masked(model, optimizer, weights=Zeros(reset_state=reset), **RANDOM)
    train(model, optimizer)
    before = copy.deepcopy([layer.mask for layer in masking.layers])
    if message is None:
        masking.at_end_of_epoch()
        assert not torch.equal(before[0], masking.layers[0].mask)
    else:
        with pytest.raises(RuntimeError, match=message):
            masking.at_end_of_epoch()
        assert all(map(torch.equal, before, masking.masks.values()))


@pytest.mark.parametrize("name", ["LBFGS", "Adafactor"])
@pytest.mark.parametrize("together", [True, False])
def test_optimizers_without_state_of_single_weights_are_refused_at_once(name, together):
    model = mlp(20, 30, 10)
    parts = [getattr(torch.optim, name)(model.fc1.parameters(), lr=0.1), sgd(model.fc2)]
    with pytest.raises(ValueError, match=f"{name} keeps no state of single weights. Use SGD, RMSprop or one of the"):
        Masking(parts if together else parts[0], None, weights=Zeros(reset_state="mean"), **RANDOM)


@pytest.mark.parametrize("start", ["median", "", None, 2])
def test_an_unknown_start_is_refused(start):
    with pytest.raises(ValueError, match=r"Unknown reset_state .*. Choose False, True or one of 'zero', 'mean'."):
        Zeros(reset_state=start)


def test_true_and_zero_are_the_same():
    assert [Zeros(reset_state=start).start_state for start in (True, "zero", "mean", False)] == ["zero"] * 2 + [
        "mean",
        None,
    ]
