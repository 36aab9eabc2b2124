"""Layers that hold active weights alone: nothing dense exists, and whoever asks for something dense gets it."""

import copy
import gc
import io
import math
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparselearning import checkpoint, methods
from sparselearning.compact import expanded
from sparselearning.core import Masking
from sparselearning.functions import entrywise, network_wide, reads
from sparselearning.grow import add_highest
from sparselearning.selection import drop_lowest
from sparselearning.sparse import available, growing
from sparselearning.sparse.explored import MOST, Explored
from sparselearning.sparse.held_weight import HeldWeight
from sparselearning.sparse.layer import CompactLayer
from sparselearning.sparse.on_demand import OnDemand
from sparselearning.sparse.training import SparseTraining

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")
STATIC = dict(redistribution_mode="none", growth_mode="random")


def network(width=40):
    return nn.Sequential(nn.Linear(20, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 5))


def begin(weights="sparse", density=0.2, every=3, width=40, make=torch.optim.AdamW, **modes):
    torch.manual_seed(0)
    model = network(width)
    optimizer = make(model.parameters(), lr=0.01)
    masking = Masking(optimizer, None, 0.3, weights=weights, prune_every_k_steps=every, **(STATIC | modes))
    masking.add_module(model, density=density)
    return model, optimizer, masking


def step(model, optimizer, seed):
    torch.manual_seed(seed)  # of random growth
    generator = torch.Generator().manual_seed(seed)
    x, target = torch.randn(16, 20, generator=generator), torch.randint(5, (16,), generator=generator)
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), target)
    loss.backward()
    optimizer.step()
    return loss.item()


class Largest(TorchDispatchMode):
    """The most numbers in a tensor that an operation returns."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor) and type(each) is not HeldWeight:
                self.most = max(self.most, each.untyped_storage().nbytes() // each.element_size())
        return result


METHODS = {
    "set": dict(growth_mode="random", redistribution_mode="none", prune_mode="SET"),
    "rigl": dict(growth_mode="gradient", redistribution_mode="none"),
    "guided": dict(growth_mode="guided", redistribution_mode="none"),
    "momentum": dict(growth_mode="momentum", redistribution_mode="momentum"),
    "dsr": dict(growth_mode="random", redistribution_mode="remaining", prune_mode="adaptive_threshold"),
    "global": dict(growth_mode="gradient", redistribution_mode="magnitude", prune_mode="global_magnitude"),
}


@pytest.mark.parametrize("method", METHODS)
def test_nothing_as_large_as_a_weight_exists(method, monkeypatch):
    monkeypatch.setattr("sparselearning.sparse.growth.DRAWN_WHOLE", 1000)
    monkeypatch.setattr(growing, "BLOCK_BYTES", 2**14)
    model, optimizer, masking = begin(SparseTraining(candidates=1000), density=0.01, width=400, **METHODS[method])
    with Largest() as largest:
        for seed in range(7):
            step(model, optimizer, seed)
    masking.check()
    assert largest.most < 40_000  # the largest weight has 160,000 entries, the network 170,000
    assert masking.total_nonzero == round(0.01 * 170_000)


@pytest.mark.parametrize("make", [torch.optim.AdamW, lambda p, lr: torch.optim.SGD(p, lr, momentum=0.9)])
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_masks_and_weights_are_those_of_masked_training(method, make):
    """Adam's state is reset in both; momenta that masked training keeps for inactive weights change RigL's values."""
    runs = []
    for weights in ("zero", "sparse"):
        held = methods.WEIGHTS[weights](reset_state=True)
        runs.append(begin(held, make=make, **METHODS[method]))
    for seed in range(3):
        assert step(*runs[0][:2], seed) == pytest.approx(step(*runs[1][:2], seed), rel=1e-4)
    for one, other in zip(runs[0][2].layers, runs[1][2].layers, strict=True):
        assert torch.equal(one.mask, other.mask)
        torch.testing.assert_close(other.weight.detach(), one.weight.detach(), rtol=1e-3, atol=1e-5)


def test_candidates_choose_what_all_means_would():
    """Where the largest means are those of the first step too; ten times as many candidates as weights that grow."""
    modes = dict(growth_mode="momentum", redistribution_mode="none")
    exact = begin(every=1, width=100, **modes)
    few = begin(SparseTraining(candidates=100), every=1, width=100, **modes)
    assert [layer.module.observed.among for layer in few[2].layers] == [400, 2000, 100]
    for run in (exact, few):
        step(*run[:2], 0)
    for one, other in zip(exact[2].layers, few[2].layers, strict=True):
        assert torch.equal(one.mask, other.mask)


def test_what_is_read_is_dense_and_what_is_written_counts():
    model, optimizer, masking = begin(every=100)
    layer, weight = masking.layers[1], model[2].weight
    assert isinstance(weight, HeldWeight)
    assert isinstance(layer, CompactLayer)
    assert weight.shape == (40, 40)
    assert torch.equal(weight != 0, layer.mask)
    active = layer.mask.nonzero()[0].tolist()
    with torch.no_grad():
        for write in (
            lambda: weight.mul_(2),
            lambda: weight[0].mul_(2),
            lambda: weight.view(-1)[:40].mul_(2),
            lambda: weight.data.mul_(2),
            lambda: weight.data[0].mul_(2),
            lambda: weight.__setitem__(0, weight[0] * 2),
            lambda: model.state_dict()["2.weight"].mul_(2),
            lambda: torch.mul(weight, 2, out=weight),
            lambda: setattr(weight, "data", weight * 2),
        ):
            before = weight[active[0], active[1]].item()
            write()
            assert weight[active[0], active[1]].item() == pytest.approx(2 * before)
    number = masking.total_nonzero
    masking.masks["2.weight"][active[0]] = False
    step(model, optimizer, 0)
    assert not layer.mask[active[0]].any()
    assert not weight[active[0]].any()
    assert len(layer.entries.value) < number - masking.layers[0].nonzeros


def test_what_is_written_where_nothing_is_active_stays_until_a_step(caplog):
    model, optimizer, masking = begin(every=100)
    mask = masking.masks["2.weight"].clone()
    with torch.no_grad():
        model[2].weight.copy_(torch.ones(40, 40))
    assert model[2].weight.sum() == 1600
    step(model, optimizer, 0)
    assert torch.equal(model[2].weight != 0, mask)
    assert "sets 1280 of 1600 nonzero weights of 2.weight to zero" in caplog.text


def test_functions_of_a_users_own_get_dense_tensors():
    seen = []

    def prune(masking, mask, weight, name):
        seen.append((mask.shape, weight.abs().shape))
        return drop_lowest(weight.abs(), mask, 5)

    @reads("nothing")
    def grow(masking, name, new_mask, total_regrowth, weight):
        seen.append((new_mask.shape, weight.sum().shape))
        return add_highest(torch.arange(new_mask.numel()).reshape(new_mask.shape), new_mask, total_regrowth)

    model, optimizer, masking = begin(prune_mode=prune, growth_mode=grow)
    for seed in range(3):
        step(model, optimizer, seed)
    assert seen[0] == ((40, 20), (40, 20))
    assert all(layer.mask[-1, -1] for layer in masking.layers)
    masking.check()


def test_functions_that_look_at_active_entries_get_these_in_a_row():
    seen = []

    @network_wide
    @entrywise
    @reads("momentum")
    def prune(masking):
        for layer in masking.layers:
            momentum = masking.get_momentum_for_weight(layer.master)
            seen.append((layer.mask.shape, layer.weight.shape, momentum.shape))
        return {layer.name: drop_lowest(layer.master.abs(), layer.mask, 3) for layer in masking.layers}

    model, optimizer, masking = begin(prune_mode=prune)
    for seed in range(3):
        step(model, optimizer, seed)
    assert seen == [((layer.nonzeros,),) * 3 for layer in masking.layers]
    masking.check()


def test_a_failing_update_changes_nothing():
    def grow(masking, name, new_mask, total_regrowth, weight):
        if name.startswith("4"):
            raise ZeroDivisionError
        return new_mask

    model, optimizer, masking = begin(growth_mode=reads("nothing")(grow), every=100)
    step(model, optimizer, 0)
    before = copy.deepcopy([masking.state_dict(), model.state_dict()])
    with pytest.raises(ZeroDivisionError):
        masking.truncate_weights()
    for layer in masking.layers:
        assert torch.equal(layer.mask, expanded(before[0]["layers"][layer.name]["mask"]))
    assert all(torch.equal(tensor, before[1][name]) for name, tensor in model.state_dict().items())
    step(model, optimizer, 1)
    masking.check()


@pytest.mark.parametrize("growth", ["gradient", "momentum", "random", "guided"])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_training_goes_on_to_the_bit_from_a_file(growth, stop, tmp_path):
    whole, resumed = (begin(SparseTraining(candidates=100), growth_mode=growth, every=0) for _ in range(2))

    def go_on(run, steps):
        losses = []
        for seed in steps:
            losses.append(step(*run[:2], seed))
            if seed % 3 == 2:
                run[2].at_end_of_epoch()
        return losses

    def parts(run):
        return dict(zip(("model", "optimizer", "mask"), run, strict=True))

    go_on(whole, range(stop))
    checkpoint.save(tmp_path / "c.pt", **parts(whole))
    expected = go_on(whole, range(stop, 9))
    go_on(resumed, range(20, 27))  # other masks, other values
    checkpoint.load(tmp_path / "c.pt", **parts(resumed))
    assert go_on(resumed, range(stop, 9)) == expected
    for one, other in zip(whole[2].layers, resumed[2].layers, strict=True):
        assert torch.equal(one.mask, other.mask)
        assert torch.equal(one.entries.value, other.entries.value)


def test_a_file_is_as_small_as_the_active_weights(tmp_path):
    model, optimizer, masking = begin(density=0.01, width=1000, every=100)
    step(model, optimizer, 0)
    checkpoint.save(tmp_path / "c.pt", model=model, optimizer=optimizer, mask=masking)
    active, dense = masking.total_nonzero, masking.total_nonzero + masking.total_zero
    # Value, two moments, column and a hash of the place; rows, biases with their moments, and the archive's own bytes.
    assert (tmp_path / "c.pt").stat().st_size < 3 * 24 * active + 40 * 2100 + 20_000 < dense


def test_a_damaged_compact_form_is_one_clear_error(tmp_path):
    model, optimizer, masking = begin()
    step(model, optimizer, 0)
    parts = dict(model=model, optimizer=optimizer, mask=masking)
    checkpoint.save(tmp_path / "c.pt", **parts)
    good = checkpoint.read(tmp_path / "c.pt")
    for damage in (
        lambda x: x["column"].add_(1000),
        lambda x: x["start"].neg_(),
        lambda x: x.update(shape=[40, -1]),
        lambda x: x.update(shape=[2**40, 2**40]),
        lambda x: x.update(start=x["start"][:-1]),
        lambda x: x.update(value=x["column"]),
        lambda x: x["column"].zero_(),
    ):
        bad = copy.deepcopy(good)
        damage(bad["model"]["2.weight"])
        torch.save(bad | {"format": 1}, tmp_path / "bad.pt")
        before = copy.deepcopy(model.state_dict())
        with pytest.raises(checkpoint.CheckpointError, match="damaged"):
            checkpoint.load(tmp_path / "bad.pt", **parts)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_state_dict_loads_without_this_library():
    model, optimizer, _ = begin()
    step(model, optimizer, 0)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    dense = network()
    dense.load_state_dict(state)
    x = torch.randn(3, 20)
    torch.testing.assert_close(dense(x), model(x))
    assert isinstance(model.state_dict()["0.weight"], OnDemand)
    assert type(model.state_dict()["0.weight"] * 2) is torch.Tensor


def test_explored_weights_are_counted_exactly_and_then_closely():
    explored, every = Explored(), torch.randperm(40 * MOST)
    for part in every[: MOST // 2].split(1000):
        explored.add(part)
        explored.add(part)
    assert explored.count == MOST // 2
    for part in every.split(MOST):
        explored.add(part)
    assert explored.count == pytest.approx(40 * MOST, rel=5 / math.sqrt(MOST))
    assert len(explored.hashes) == MOST


def test_ever_active_says_that_it_is_not_kept():
    _, _, masking = begin()
    assert masking.exploration_rate == pytest.approx(masking.density)
    with pytest.raises(AttributeError, match="exploration_rate"):
        masking.layers[0].ever_active  # noqa: B018


def test_a_model_that_nobody_holds_is_freed():
    run = begin(growth_mode="gradient")
    for seed in range(4):
        step(*run[:2], seed)
    model = weakref.ref(run[0])
    del run
    gc.collect()
    assert model() is None
