"""Several processes train active weights alone, and end with the network that one process trains."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
import torch.distributed as dist
from launch import run
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparselearning import CosineDecay, Masking, checkpoint
from sparselearning.processes import distributed

DENSITY, EVERY = 0.2, 4


class Net(nn.Module):
    """A convolution whose activations are larger than its weight, and a linear layer whose activations are smaller."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.hidden = nn.Linear(216, 80)
        self.last = nn.Linear(80, 5)

    def forward(self, x):
        return self.last(self.hidden(self.conv(x).relu().flatten(1)).relu())


class Training:
    """A network that processes train on their parts of each batch, in float64: sums of another order hardly differ."""

    def __init__(self, growth, optimizer="sgd", scaled=False, wrap=distributed.replicate, every=EVERY, **settings):
        torch.manual_seed(0)
        self.model = Net().double()
        self.x, self.y = torch.randn(8, 1, 8, 8).double(), torch.randn(8, 5).double()
        kinds = {"sgd": dict(lr=0.05, momentum=0.9), "adam": dict(lr=0.003)}
        kind = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
        self.optimizer = kind(self.model.parameters(), **kinds[optimizer])
        modes = dict(growth_mode=growth, redistribution_mode="momentum" if growth == "momentum" else "nonzeros")
        settings = dict(weights="sparse", prune_every_k_steps=every) | settings
        self.masking = Masking(self.optimizer, CosineDecay(0.5, 400), **modes, **settings)
        self.masking.add_module(self.model, density=DENSITY)
        self.network = wrap(self.model)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
        self.masks = []

    def step(self, parts=1, clip=None, penalty=0.0):
        """Make a step with the mean gradient of `parts` parts of this process's share of the batch."""
        self.masking.zero_grad()
        mine = slice(distributed.rank(), None, distributed.processes())
        for part in range(parts):
            x, y = self.x[mine][part::parts], self.y[mine][part::parts]
            with nullcontext() if part + 1 == parts else distributed.without_sync(self.network):
                loss = (self.network(x) - y).square().mean() / parts
                if penalty:
                    loss = loss + penalty / parts * self.model.hidden.weight.square().sum()
                self.scaler.scale(loss).backward()
        if clip:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), clip)
        self.scaler.step(self.masking)
        self.scaler.update()
        self.masks.append([layer.checksum().item() for layer in self.masking.layers])

    def parts(self):
        return dict(model=self.model, optimizer=self.optimizer, mask=self.masking)

    def state(self):
        self.masking.check()
        weights = {name: weight.clone() for name, weight in self.model.state_dict().items()}
        return dict(weights=weights, masks=self.masks, sent=self.masking.held.bytes_per_step)


WAYS = {
    "gradient": dict(growth="gradient"),
    "momentum": dict(growth="momentum"),
    "random": dict(growth="random"),
    "adam, accumulated": dict(growth="gradient", optimizer="adam", parts=2),
    "clipped, scaled, a penalty": dict(growth="momentum", scaled=True, clip=0.5, penalty=1e-3, parts=2),
}


def train(steps, names=tuple(WAYS), sparingly=False):
    """Return what each way of training ends with."""
    states = {}
    for name in names:
        way = dict(WAYS[name])
        of_step = {key: way.pop(key) for key in ("parts", "clip", "penalty") if key in way}
        training = Training(**way)
        for step in range(steps):
            if sparingly:  # candidates, though the layers are small
                for layer in training.masking.layers:
                    layer.module.observed.among = layer.nonzeros
            training.step(**of_step)
            assert step == 0 or training.masks[-1] != training.masks[0] or step < EVERY
        states[name] = training.state()
    return states


SIZES = [(2, 20), *(pytest.param(processes, 200, marks=pytest.mark.slow) for processes in (2, 4))]


@pytest.mark.long
@pytest.mark.parametrize(("processes", "steps"), SIZES)
def test_processes_that_divide_the_batches_train_the_network_of_one(processes, steps):
    alone = train(steps)
    all_states = run(train, processes, steps)
    for name, expected in alone.items():
        for found in all_states:
            assert found[name]["masks"] == all_states[0][name]["masks"], name
            # In 200 steps a weight that is zero but for rounding may be pruned an update earlier or later.
            compared = slice(None) if steps <= 20 else slice(-1, None)
            assert found[name]["masks"][compared] == expected["masks"][compared], name
            torch.testing.assert_close(found[name]["weights"], expected["weights"])
            torch.testing.assert_close(found[name]["weights"], all_states[0][name]["weights"], rtol=0, atol=0)
        assert expected["sent"] is None


def train_among_candidates(steps):
    return train(steps, ("momentum", "clipped, scaled, a penalty"), sparingly=True)


def go_on(place):
    """Stop and go on between two updates, once as each process would, once from the file of the first."""
    states = []
    for growth in ("gradient", "momentum"):
        whole = Training(growth)
        for _ in range(6):
            whole.step()
        whole.masking.held.share()
        if distributed.rank() == 0:
            checkpoint.save(place, **whole.parts())
        dist.barrier()
        for _ in range(6):
            whole.step()
        resumed = Training(growth)
        checkpoint.load(place, **resumed.parts())
        for _ in range(6):
            resumed.step()
        assert resumed.masks == whole.masks[6:]
        torch.testing.assert_close(resumed.state()["weights"], whole.state()["weights"], rtol=0, atol=0)
        states.append(resumed.state()["weights"])
        dist.barrier()
    return states


def both(place):
    return train_among_candidates(12), go_on(place)


@pytest.mark.long
def test_candidates_are_those_of_all_and_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    alone = train_among_candidates(12)
    (of_first, resumed), (of_second, as_well) = run(both, 2, tmp_path / "checkpoint.pt")
    for name, expected in alone.items():
        assert of_first[name]["masks"] == of_second[name]["masks"] == expected["masks"]
        torch.testing.assert_close(of_first[name]["weights"], expected["weights"])
    torch.testing.assert_close(resumed, as_well, rtol=0, atol=0)


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.left, self.right, self.never = (nn.Linear(6, 6) for _ in range(4))

    def forward(self, x, branch):
        return getattr(self, branch)(self.body(x))


def unequal_branches():
    """Each process uses another layer; return gradients, and the dense ones that DDP gives."""
    found = []
    for weights in ("sparse", "zero"):
        torch.manual_seed(0)
        model = Branches()
        masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1), None, weights=weights, growth_mode="random",
                          redistribution_mode="nonzeros")  # fmt: skip
        masking.add_module(model, density=0.5)
        network = DistributedDataParallel(model, find_unused_parameters=True)
        x = torch.ones(2, 6) + distributed.rank()
        network(x, ("left", "right")[distributed.rank()]).square().sum().backward()
        network(x, "left").square().sum().backward()  # added up, as no optimizer steps in between
        grads = {layer.name: layer.weight.grad for layer in masking.layers}
        if weights == "sparse":
            spread = masking.held.trained
            grads = {name: grad if grad is None else spread[name].entries.spread(grad) for name, grad in grads.items()}
        else:
            masks = masking.masks
            grads = {name: grad if grad is None else grad * masks[name] for name, grad in grads.items()}
        found.append(grads)
    return found


def late_penalty():
    """A gradient that comes for the dense weight counts, whether before or after that of the values."""
    found = []
    for weights in ("sparse", "zero"):
        training = Training("random", wrap=DistributedDataParallel, weights=weights)
        model = training.model
        y = training.network(training.x).square().sum()
        for weight in (model.conv.weight, model.last.weight):
            y = y + (1.0 + distributed.rank()) * weight.square().sum()
        (y + (training.network(training.x)).sum()).backward()
        masks = training.masking.masks
        held = training.masking.held.trained if weights == "sparse" else {}
        grads = {layer.name: layer.weight.grad for layer in training.masking.layers}
        found.append(
            {name: held[name].entries.spread(grad) if held else grad * masks[name] for name, grad in grads.items()}
        )
    return found


def message_of(function):
    try:
        function()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def refusals():
    """Return what is said of models that cannot be trained so."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)

    def add(model, masked=None):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        masking = Masking(optimizer, None, weights="sparse", growth_mode="random", redistribution_mode="nonzeros")
        masking.add_module(masked or model, density=0.5)

    def earlier():
        model = nn.Linear(6, 6)
        wrapped = DistributedDataParallel(model)
        add(model)
        assert wrapped

    def around_parent():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))
        add(model, model[0])
        DistributedDataParallel(model)(torch.ones(2, 6))

    def join():
        torch.manual_seed(0)
        model = nn.Linear(6, 6)
        add(model)
        network = DistributedDataParallel(model)
        with network.join():
            network(torch.ones(2, 6)).sum().backward()

    def sharded():
        add(fully_shard(nn.Linear(6, 6)))

    return [message_of(each) for each in (earlier, sharded, around_parent, join)]


def copies():
    """Train copies of a Masking and its model, and a layer that lost its mask; the processes must agree."""
    training = Training("momentum")
    training.step()
    again = copy.deepcopy(training)
    pickled = io.BytesIO()
    torch.save(training.model, pickled)
    again.network = DistributedDataParallel(again.model)
    for each in (again, training):
        each.masks.clear()
        for _ in range(5):
            each.step()
    assert again.masks == training.masks
    training.masking.remove_weight("last")
    for _ in range(2):
        training.step()
    assert training.model.last.weight.grad is not None
    return [training.state()["weights"], again.state()["weights"]]


def rest():
    return unequal_branches(), late_penalty(), copies(), refusals()


@pytest.mark.long
def test_gradients_are_those_of_ddp_whatever_a_process_uses_and_misuse_is_said():
    results = run(rest, 2)
    for branches, late, _, _ in results:
        assert branches[0]["never.weight"] is None
        for found, expected in (branches, late):
            torch.testing.assert_close(found, expected)
    torch.testing.assert_close(results[0][2], results[1][2], rtol=0, atol=0)
    for earlier, sharded, parent, join in [result[3] for result in results]:
        assert earlier.startswith("ValueError: weights='sparse' replaces weights that DistributedDataParallel holds on")
        assert sharded.startswith("ValueError: weights='sparse' trains whole weights, and these are sharded")
        assert parent.startswith("ValueError: DistributedDataParallel was made around Sequential, and holds on to")
        assert join.startswith("ValueError: weights='sparse' needs equally many batches on all processes")
