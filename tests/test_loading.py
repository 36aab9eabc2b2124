"""Hostile states of masks are refused with the name of the entry, and nothing changes."""

import copy
import math

import pytest
import torch
from helpers import masked, mlp, train
from script import assert_equal

NAME = "fc1.weight"
SHAPE = (6, 8)
OTHERS = torch.full(SHAPE, 2, dtype=torch.uint8).view(torch.bool)  # bytes that are no truth values
NOTHING = object()  # the entry is absent

# (entry in the state, hostile value, what the message says)
OF_ALL = [
    (["steps"], math.nan, "'steps' .* whole number from 0 .* got nan"),
    (["steps"], -1, "'steps' .* got -1"),
    (["steps"], 3.0, r"'steps' .* got 3\.0"),
    (["steps"], True, "'steps' .* got True"),
    (["steps"], 10**300, "'steps' .* got a long number"),
    (["steps"], torch.tensor(3), "'steps' .* got a torch.int64 tensor"),
    (["steps"], NOTHING, "got no steps"),
    (["baseline_nonzero"], -4, "'baseline_nonzero' .* got -4"),
    (["baseline_nonzero"], 73, "'baseline_nonzero' .* from 0 to 72, got 73"),
    (["baseline_nonzero"], 3.5, r"'baseline_nonzero' .* got 3\.5"),
    (["prune_threshold"], math.nan, "'prune_threshold' .* finite number of at least 0, got nan"),
    (["prune_threshold"], "0.1", "'prune_threshold' .* got '0.1'"),
    (["sparse_training"], 3, "'sparse_training' .* a dict, got 3"),
    (["layers"], [1], "'layers' .* got a list"),
    (["layers", 3], {}, "'layers' .* layers by name"),
    (["layers", NAME], None, r"layers\['fc1.weight'\] .* a dict, got None"),
    (["more"], 3, "got 'more' too"),
]
OF_A_LAYER = [
    (["mask"], torch.ones(SHAPE), "'mask'.* a torch.bool tensor .* got a torch.float32 tensor"),
    (["mask"], OTHERS, "'mask'.* bytes 0 and 1"),
    (["mask"], torch.ones(SHAPE, dtype=torch.bool, device="meta"), "'mask'.* without data"),
    (["mask"], torch.ones(SHAPE).bool().to_sparse(), "'mask'.* in torch.sparse_coo"),
    (["mask"], torch.ones(1, dtype=torch.bool).expand(2**20, 2**20), r"fc1.weight: \(1048576, 1048576\) in the state"),
    (["mask"], [1, 2], "'mask'.* got a list"),
    (["mask"], NOTHING, r"layers\['fc1.weight'\] .* got no mask"),
    (["ever_active"], torch.ones(3, dtype=torch.bool), "'ever_active'.* got a torch.bool tensor"),
    (["ever_active"], torch.ones(SHAPE), "'ever_active'.* got a torch.float32 tensor"),
    (["removed"], 10**9, "'removed'.* from -48 to 48"),
    (["removed"], 1.5, "'removed'.* got 1.5"),
    (["importance"], math.inf, "'importance'.* finite number, got inf"),
    (["importance"], "x" * 5000, r"'importance'.* got 'x+\.\.\."),
    (["prune_rate"], math.nan, "'prune_rate'.* finite number from 0 to 1, got nan"),
    (["prune_rate"], 1.5, r"'prune_rate'.* got 1\.5"),
    (["prune_rate"], NOTHING, "got no prune_rate"),
    (["most"], 0, "'most'.* from 1 to 8, got 0"),
    (["most"], "all", "'most'.* got 'all'"),
    (["memory"], [], "'memory'.* got a list"),
    (["memory", "a"], 3, r"'memory'\]\['a'\].* a tensor, got 3"),
    (["memory", "a"], torch.ones(1).expand(2**40), r"'memory'\]\['a'\].* at most \d+ numbers"),
    (["memory", "a"], torch.ones(2**40, device="meta"), r"'memory'\]\['a'\].* without data"),
    (["memory", "sign"], torch.ones(2, dtype=torch.int8), r"'memory'\]\['sign'\].* of shape \(6, 8\)"),
    (["mine"], 3, "got 'mine' too"),
]
EVERYWHERE = OF_ALL + [(["layers", NAME, *path], value, message) for path, value, message in OF_A_LAYER]


def trained(weights="zero"):
    model = mlp(8, 6, 4)
    masking = masked(model, density=0.5, weights=weights)
    train(model, masking, 3, torch.randn(6, 8))
    return model, masking


def put(state, path, value):
    *place, last = path
    for name in place:
        state = state[name]
    if value is NOTHING:
        del state[last]
    else:
        state[last] = value


def assert_refused(model, masking, path, value, message):
    state = copy.deepcopy(masking.state_dict())
    put(state, path, value)
    before = copy.deepcopy([masking.state_dict(), model.state_dict(), masking.optimizer.state_dict()])
    with pytest.raises(RuntimeError, match=message) as refusal:
        masking.load_state_dict(state)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 500
    assert_equal([masking.state_dict(), model.state_dict(), masking.optimizer.state_dict()], before)


@pytest.mark.parametrize(("path", "value", "message"), EVERYWHERE)
def test_a_hostile_state_is_refused_and_nothing_changes(path, value, message):
    assert_refused(*trained(), path, value, message)


@pytest.mark.parametrize("state", [3, None, [], torch.ones(2)])
def test_a_state_of_another_type_is_refused(state):
    with pytest.raises(RuntimeError, match="'mask' of the state is damaged: expected a dict"):
        trained()[1].load_state_dict(state)


MEMORY = ["layers", NAME, "memory"]
OF_WEIGHTS = [
    ("kept", [*MEMORY, "dense"], NOTHING, r"'memory'\]\['dense'\].* a floating tensor of shape \(6, 8\), got None"),
    ("kept", [*MEMORY, "dense"], torch.ones(6), r"'memory'\]\['dense'\].* of shape \(6, 8\)"),
    ("kept", [*MEMORY, "trained"], torch.ones(SHAPE), r"'memory'\]\['trained'\].* torch.bool tensor"),
    ("soft", [*MEMORY, "threshold"], torch.ones(2), r"'memory'\]\['threshold'\].* of shape \(\)"),
    ("sparse", ["sparse_training", "since_update"], -1, "'since_update' .* got -1"),
    ("sparse", ["sparse_training", "interval"], math.nan, "'interval' .* got nan"),
    ("sparse", ["sparse_training", "layers"], 3, r"'layers'\] .* a dict, got 3"),
    ("sparse", ["sparse_training", "layers", "other"], {}, r"'layers'\] .* got 'other' too"),
    ("sparse", ["sparse_training", "layers", NAME, "gradient"], torch.ones(3), r"'gradient'\] .* of shape \(6, 8\)"),
    ("sparse", ["sparse_training", "layers", NAME, "gradient"], torch.ones(SHAPE).long(), "floating tensor"),
    ("sparse", ["sparse_training", "layers", NAME, "observed"], -3, r"'observed'\] .* got -3"),
    ("sparse", ["sparse_training", "layers", NAME, "observing"], "no", r"'observing'\] .* True or False, got 'no'"),
    ("sparse", ["sparse_training", "more"], 3, "'sparse_training' .* got 'more' too"),
]


@pytest.mark.parametrize(("weights", "path", "value", "message"), OF_WEIGHTS)
def test_a_hostile_state_of_held_weights_is_refused_and_nothing_changes(weights, path, value, message):
    assert_refused(*trained(weights), path, value, message)


@pytest.mark.parametrize("weights", ["zero", "kept", "soft", "sparse"])
def test_an_honest_state_loads(weights):
    _, masking = trained(weights)
    state = copy.deepcopy(masking.state_dict())
    masking.at_end_of_epoch()
    masking.load_state_dict(state)
    assert_equal(masking.state_dict(), state)


def test_removing_layers_whose_masks_lost_weights_leaves_a_state_that_loads():
    _, masking = trained()
    masking.baseline_nonzero = 1  # a user's function has grown more than it was asked to
    masking.remove_weight("fc1.weight")
    assert masking.baseline_nonzero == 0
    masking.load_state_dict(masking.state_dict())
