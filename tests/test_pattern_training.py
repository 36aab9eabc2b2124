"""Training keeps patterns with every function that can keep them, and the trained weights can be packed."""

import copy
import itertools
import math

import pytest
import torch
from helpers import masked, same, sgd, snapshot, train
from patterned import PATTERNS, assert_pattern_holds, move, network, sparse
from test_update_matrix import without_aliases
from torch import nn

from sparselearning import Masking, Updates, network_wide
from sparselearning.functions import is_marked
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.prune import PRUNE_FUNCTIONS
from sparselearning.redistribute import REDISTRIBUTION_FUNCTIONS
from sparselearning.selection import add_highest, drop_lowest
from sparselearning.sparse import convert

TABLES = dict(prune_mode=PRUNE_FUNCTIONS, growth_mode=GROWTH_FUNCTIONS, redistribution_mode=REDISTRIBUTION_FUNCTIONS)
MODES = [dict(zip(TABLES, modes, strict=True)) for modes in itertools.product(*map(without_aliases, TABLES.values()))]
# Those of single methods, which find for themselves how many weights move, or need more than a mask.
APART = {"sign_flip", "magnitude_gradient", "gradual_magnitude", "rewiring", "cannistraci_hebb"}
APART |= {"dense_magnitude", "global_dense_magnitude"}
MODES = [modes for modes in MODES if not APART & set(modes.values())]


def refusal(pattern, prune_mode, growth_mode, redistribution_mode):
    """Return the error for a combination that makes no sense; None for the others."""
    single = ("soft_magnitude", "SET", "threshold", "adaptive_threshold")
    if growth_mode == "momentum_neuron":
        return f"growth_mode='momentum_neuron' moves single weights, and the pattern '{pattern}' does not let it"
    if prune_mode in single and pattern in ("block:4x2", "neuron"):
        return f"prune_mode='{prune_mode}' moves single weights, and the pattern '{pattern}' does not let it"
    functions = PRUNE_FUNCTIONS[prune_mode], GROWTH_FUNCTIONS[growth_mode]
    across = any(is_marked(function, "network_wide") for function in functions)
    if pattern == "neuron" and (across or redistribution_mode != "none"):
        return "The units of pattern 'neuron' have 8, 24, 32 weights in different layers, so none can move from one"


@pytest.mark.parametrize("modes", MODES, ids=lambda modes: "-".join(modes.values()))
@pytest.mark.parametrize("pattern", PATTERNS)
def test_an_update_keeps_pattern_and_counts_or_says_what_cannot_be(pattern, modes):
    if message := refusal(pattern, **modes):
        with pytest.raises(ValueError, match=message):
            sparse(pattern, **modes)
        return
    model, masking = sparse(pattern, **modes)
    total = masking.total_nonzero
    for _ in range(3):
        before = snapshot(masking)
        masking.prune_threshold = 0.05  # among these weights: a threshold that adapts would take long to come here
        move(model, masking)
        assert_pattern_holds(masking)
        assert not same(before, masking.masks)
        lacking = sum(layer.room for layer in masking.layers) if pattern == "fan-in:0.3" else 0
        assert masking.total_nonzero + lacking == masking.baseline_nonzero == total


def test_own_functions_keep_patterns_without_knowing_them():
    def grow(masking, name, new_mask, total_regrowth, weight):
        return add_highest(masking.get_momentum_for_weight(weight).abs(), new_mask, total_regrowth)

    @network_wide
    def prune(masking):
        return {
            layer.name: drop_lowest(layer.master.abs(), layer.mask, math.ceil(0.3 * layer.nonzeros))
            for layer in masking.layers
        }

    for pattern in ("2:4", "block:4x2", "fan-in"):
        model, masking = sparse(pattern, growth_mode=grow, prune_mode=prune)
        move(model, masking, updates=2)
        assert_pattern_holds(masking)
        assert masking.total_nonzero == masking.baseline_nonzero


@pytest.mark.parametrize(("pattern", "start"), [("2:4", 0.5), ("1:4", 0.25), ("block:4x2", 1.0)])
@pytest.mark.parametrize("prune_mode", ["magnitude", "global_magnitude"])
def test_the_density_follows_a_schedule_in_units(pattern, start, prune_mode):
    def density(step):
        return max(start - step / 50, 0.05)

    model, masking = sparse(pattern, density=start, prune_mode=prune_mode, updates=Updates(density=density))
    unit, size = masking.layers[0].pattern.size, masking.total_nonzero + masking.total_zero
    for update in range(1, 12):
        move(model, masking)
        assert_pattern_holds(masking)
        assert masking.total_nonzero == round(density(2 * update) * size / unit) * unit


def test_a_density_above_what_the_pattern_holds_is_refused():
    model, masking = sparse("2:4", updates=Updates(density=lambda step: 0.6))
    with pytest.raises(ValueError, match=r"asks for a density of 0\.6, more than the pattern can hold"):
        move(model, masking)


def test_a_constant_fan_in_is_that_of_the_checkpoint():
    """The scores of another batch divide the weights differently among layers; a resumed run has no scores at all."""
    _, masking = sparse("fan-in")
    state = copy.deepcopy(masking.state_dict())
    again, other = sparse("fan-in", density=0.1)
    assert other.layers[1].pattern.most != masking.layers[1].pattern.most
    other.load_state_dict(state)
    assert [layer.pattern for layer in other.layers] == [layer.pattern for layer in masking.layers]
    move(again, other, updates=2)
    assert other.total_nonzero == masking.total_nonzero
    assert_pattern_holds(other)


def test_a_removed_layer_takes_what_its_neurons_left_over():
    model, masking = sparse("fan-in:0.9", growth_mode="random")
    move(model, masking, updates=6)
    assert masking.total_nonzero < masking.baseline_nonzero, "neurons were given up"
    masking.check()
    for name in list(masking.masks):
        masking.remove_weight(name)
        masking.check()
    assert masking.baseline_nonzero == 0


def test_compiled_steps_keep_the_pattern():
    model, masking = sparse("2:4")
    train(model, masking, steps=1, inputs=torch.randn(8, 4, 1, 5))
    step = torch.compile(masking.optimizer.step, backend="eager")
    step()
    masking.at_end_of_epoch()
    assert_pattern_holds(masking)


# After training


def trained(pattern, **on):
    """Return a linear layer of 64 inputs and 32 outputs after three updates."""
    model = nn.Linear(64, 32, **on)
    masking = masked(model, density=0.5, pattern=pattern)
    for _ in range(3):
        train(model, masking, inputs=torch.randn(8, 64, **on))
        masking.at_end_of_epoch()
    train(model, masking, steps=1, inputs=torch.randn(8, 64, **on))
    assert_pattern_holds(masking)
    assert masking.total_nonzero == 1024
    return model


def test_torch_packs_and_unpacks_two_of_four():
    from torch.sparse import _semi_structured_conversions as conversions  # what to_sparse_semi_structured calls

    weight = trained("2:4").weight.detach().half()
    packed = conversions.sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(conversions.sparse_semi_structured_to_dense_cutlass(*packed), weight)
    assert ((weight.reshape(-1, 4) != 0).sum(1) <= 2).all()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(("pattern", "layout"), [("2:4", "2:4"), ("block:16x16", "bsr")])
def test_trained_patterns_are_converted_on_a_gpu(pattern, layout):
    model, x = trained(pattern, device="cuda", dtype=torch.float16), torch.randn(64, 64, device="cuda").half()
    converted, report = convert(model, x, layout=layout)
    assert report.layers[0].replaced
    torch.testing.assert_close(converted(x), model(x), atol=1e-2, rtol=1e-2)


# By name, and the output layer


def ablating(model, pattern, updates=4):
    """Return how many neurons each layer has lost after updates by growth whose scores favour few neurons."""

    def grow(masking, name, new_mask, total_regrowth, weight):
        return add_highest(torch.arange(weight.numel()).view(weight.shape).float(), new_mask, total_regrowth)

    masking = Masking(sgd(model), None, 0.5, "magnitude", grow, "none")
    masking.add_module(model, 0.3, pattern=pattern)
    for _ in range(updates):
        train(model, masking, steps=1, inputs=torch.randn(8, 16))
        masking.at_end_of_epoch()
        masking.check()
    return {name: int((mask.sum(1) == 0).sum()) for name, mask in masking.masks.items()}


def classifier():
    return nn.Sequential(nn.Linear(16, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 12))


def test_ablation_leaves_the_output_layer_all_its_neurons_unless_it_is_named():
    lost = ablating(classifier(), "fan-in:0.9")
    assert [bool(lost[f"{i}.weight"]) for i in (0, 2, 4)] == [True, True, False]
    lost = ablating(classifier(), {"*": "fan-in:0.9"})
    assert all(lost.values()), "a pattern by name does what it says"
    lost = ablating(classifier(), {"2": "fan-in", "*": "fan-in:0.9"})
    assert [bool(lost[f"{i}.weight"]) for i in (0, 2, 4)] == [True, False, True]


def test_the_output_layer_is_that_of_the_model_also_where_it_stays_dense():
    model = classifier()
    masking = Masking(sgd(model), None, growth_mode="gradient", redistribution_mode="none")
    masking.add_module(model, 0.3, pattern="fan-in:0.3", dense=["last"])
    assert [layer.pattern.ablation for layer in masking.layers] == [0.3, 0.3]


def test_srigl_keeps_all_classes():
    model = nn.Sequential(nn.Linear(16, 40), nn.ReLU(), nn.Linear(40, 20))
    masking = Masking.from_method("srigl", model, sgd(model), 40, density=0.1, prune_every_k_steps=2)
    train(model, masking, steps=30, inputs=torch.randn(8, 16))
    assert (masking.masks["2.weight"].sum(1) == 4).all()
    masking.check()


def test_patterns_by_name_hold_side_by_side():
    model = network()
    masking = Masking(sgd(model), None, 0.3, redistribution_mode="none")
    masking.add_module(model, 0.3, pattern={"0": "2:4", "3.weight": "block:4x2"})
    for _ in range(3):
        move(model, masking)
        assert_pattern_holds(masking)
    assert [layer.pattern.name for layer in masking.layers] == ["2:4", "block:4x2", "unstructured"]
    assert masking.total_nonzero == masking.baseline_nonzero


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ({"fc9": "2:4"}, "'fc9' matches none of the weights 0.weight, 3.weight, 5.weight"),
        ({"*": "9:4"}, "Unknown pattern '9:4'"),
        ({"0": "3:16"}, r"The pattern '3:16' does not fit 0.weight \(8, 4, 1, 2\)"),
        ({"0": "fan-in", "*": "unstructured"}, "Layers of constant fan-in keep their numbers of weights"),
        ({"0": "2:4", "*": "block:4x2"}, "have 1, 8 weights in different layers"),
    ],
)
def test_patterns_by_name_that_do_not_fit_are_refused(pattern, message):
    model = network()
    masking = Masking(sgd(model), None, redistribution_mode="momentum")
    with pytest.raises(ValueError, match=message):
        masking.add_module(model, 0.3, pattern=pattern)
