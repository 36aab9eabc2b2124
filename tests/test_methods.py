"""The table of methods, and the golden examples of their parts; test_every_method.py has what all of them hold."""

import copy
import math

import pytest
import torch
from helpers import assert_masks_hold, backward, batch_for, layer_with, masked, mlp, same, snapshot, train
from torch import nn

from sparselearning import Masking
from sparselearning.functions import FunctionError
from sparselearning.grow import (
    cannistraci_hebb_growth,
    dense_magnitude_growth,
    global_dense_magnitude_growth,
    gradient_growth,
    path_scores,
    rewiring_growth,
)
from sparselearning.methods import METHODS, find_method, masking_arguments
from sparselearning.prune import (
    adaptive_threshold_prune,
    dense_magnitude_prune,
    global_dense_magnitude_prune,
    gradual_magnitude_prune,
    magnitude_gradient_prune,
    sign_flip_prune,
)
from sparselearning.redistribute import no_redistribution, nonzero_redistribution, remaining_redistribution
from sparselearning.schedules import Constant, CosineDecay, CubicDensity, SoftDensity, StepDensity
from sparselearning.selection import add_highest
from sparselearning.start.scores import grasp, snip, synflow

T, F = True, False
BATCHES = [(torch.randn(16, 20, generator=torch.Generator().manual_seed(9)), torch.arange(16) % 10)]
STEPS, EPOCH = 24, 6  # of the short trainings here, with an update every other step where a method updates by steps


def begin(method, optimizer=torch.optim.SGD, density=0.2, **parts):
    """A small network, its optimizer and its masks by this method."""
    model = mlp(20, 30, 10)
    settings = dict(lr=0.1, momentum=0.9) if optimizer is torch.optim.SGD else dict(lr=0.01)
    optimizer = optimizer(model.parameters(), **settings)
    if METHODS[method].prune_every_k_steps:
        parts = {"prune_every_k_steps": 2} | parts
    return (
        model,
        optimizer,
        Masking.from_method(method, model, optimizer, STEPS, density, **{"batches": BATCHES} | parts),
    )


def go_on(model, optimizer, masking, first=0, last=STEPS):
    """Train from one step to another on data that depend on the step; yield after each step and epoch."""
    for step in range(first, last):
        backward(model, torch.randn(8, 20, generator=torch.Generator().manual_seed(step)))
        optimizer.step()
        yield step + 1
        if (step + 1) % EPOCH == 0 and step + 1 < STEPS:
            masking.at_end_of_epoch()
            yield step + 1


# The table


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown method 'rigel'. Choose one of 'sparse_momentum', 'set', "):
        find_method("rigel")


def test_an_unknown_part_names_the_known_ones():
    with pytest.raises(TypeError, match=r"A method has no part grwth. There are prune, redistribution, growth, "):
        find_method("rigl", grwth="random")


SCORES = {
    "snip": lambda model: snip(model, BATCHES),
    "grasp": lambda model: grasp(model, BATCHES),
    "synflow": lambda model: synflow(model, BATCHES[0][0], 0.1, dense=["fc2"]),
}


@pytest.mark.parametrize("score", SCORES)
def test_a_score_before_training_is_a_method(score):
    model = mlp(20, 30, 10)
    scores = SCORES[score](model)
    expected = add_highest(scores["fc1.weight"], torch.zeros(30, 20, dtype=torch.bool), 60)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    masking = Masking.from_method(score, model, optimizer, STEPS, 0.1, dense=["last"], batches=iter(BATCHES))
    assert same(masking.masks, {"fc1.weight": expected})


def test_a_score_needs_a_batch():
    with pytest.raises(ValueError, match=r"sparse_init='snip' scores the weights before .* Pass batches=\[\(inputs, "):
        begin("snip", batches=None)


def test_a_method_brings_its_pattern():
    masking = begin("srigl")[2]
    assert {layer.pattern.name for layer in masking.layers} == {"fan-in:0.3"}
    masking = begin("srigl", pattern="2:4", dense=["last"])[2]
    assert masking.layers[0].pattern.name == "2:4"
    with pytest.raises(ValueError, match=r"Unknown pattern '5:4'. Choose unstructured, "):
        find_method("srigl", pattern="5:4")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (dict(decay_schedule="cubic"), "Unknown decay_schedule 'cubic'. Choose one of 'cosine', "),
        (dict(density_schedule="cosine"), "Unknown density_schedule 'cosine'. Choose one of 'constant', 'cubic', "),
        (dict(start_fraction=0.8), "Expected 0 <= start_fraction <= stop_fraction <= 1, got 0.8 and 0.75."),
        (dict(density_schedule="soft", prune_rate=1.0), "density_schedule='soft' needs a prune_rate below 1, got 1.0."),
        (dict(start_density=1.5, density_schedule="cubic"), "Expected a start_density in (0, 1], got 1.5."),
        (dict(start_density=0.5), "A start_density needs a density_schedule that leaves it: 'cubic' or 'step'."),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        find_method("rigl", **parts)
    assert str(refused.value).startswith(message)


def test_a_method_is_the_arguments_of_masking():
    assert masking_arguments(find_method("rigl", prune_rate=0.2), density=0.05, total_steps=1000) == dict(
        prune_rate_decay=CosineDecay(0.2, 750, eta_min=0.0),
        prune_mode="magnitude",
        growth_mode="gradient",
        redistribution_mode="none",
        prune_every_k_steps=100,
        density_schedule=None,
        first_update=0,
        last_update=750,
        reset_state=True,
        regrown="zero",
        rescale=False,
        pull=0.0,
        inactive="zero",
    )
    gradual = masking_arguments(METHODS["gmp"], density=0.05, total_steps=1000)
    assert gradual["density_schedule"] == CubicDensity(1.0, 0.05, 0, 750)
    assert gradual["prune_rate_decay"] == Constant(0.0)


def test_a_method_begins_with_its_density():
    assert begin("gmp")[2].density == 1
    assert begin("rigl")[2].density == 0.2


def test_one_shot_prunes_once():
    model, optimizer, masking = begin("one_shot")
    counts = [masking.total_nonzero for _ in go_on(model, optimizer, masking)]
    assert counts == 12 * [900] + 15 * [180]  # steps 1 to 11 and the end of an epoch, then those from 12 on


def test_static_masks_stay():
    model, optimizer, masking = begin("static")
    first = snapshot(masking)
    list(go_on(model, optimizer, masking))
    assert same(masking.masks, first)
    assert masking.exploration_rate == 0.2


# Densities that change over time


@pytest.mark.parametrize("redistribution", ["none", "momentum", "remaining"])
@pytest.mark.parametrize("prune_rate", [0.0, 0.3])
@pytest.mark.parametrize(
    "schedule", [CubicDensity(0.9, 0.1, 2, 9), CubicDensity(0.1, 0.9, 2, 9), StepDensity(0.5, 0.05, 5)]
)
def test_the_density_follows_its_schedule_to_the_weight(schedule, prune_rate, redistribution):
    model = mlp(20, 30, 10)
    masking = masked(
        model,
        density=schedule(0),
        prune_rate=prune_rate,
        redistribution_mode=redistribution,
        prune_every_k_steps=1,
        density_schedule=schedule,
    )
    for step in range(1, 12):
        train(model, masking, 1)
        assert masking.total_nonzero == masking.baseline_nonzero == round(900 * schedule(step))
        assert_masks_hold(masking)


@pytest.mark.parametrize("prune_mode", ["threshold", "adaptive_threshold", "sign_flip", lambda _, mask, *more: mask])
def test_the_density_falls_whatever_a_function_prunes(prune_mode):
    model = mlp(20, 30, 10)
    schedule = StepDensity(1.0, 0.5, 1)
    masking = masked(model, None, 1.0, prune_mode=prune_mode, prune_rate=0.0, density_schedule=schedule)
    train(model, masking, 1)
    smallest = torch.cat([layer.weight.abs().flatten() for layer in masking.layers]).sort().values[:400]
    masking.at_end_of_epoch()
    masking.check()
    assert masking.total_nonzero == 450
    assert masking.total_removed >= 450
    if callable(prune_mode):  # which prunes nothing: the smallest of the network go
        kept = torch.cat([layer.weight[layer.mask].abs() for layer in masking.layers])
        assert kept.min() > smallest.max()


def test_layers_fall_in_proportion_and_none_gives_each_back_what_it_lost():
    model = mlp(20, 30, 10)
    schedule = StepDensity(1.0, 0.5, 1)
    masking = masked(model, None, 1.0, prune_rate=0.3, redistribution_mode="none", density_schedule=schedule)
    train(model, masking, 1)
    masking.at_end_of_epoch()
    assert masking.name2removed == {"fc1.weight": 300 + 90, "fc2.weight": 150 + 45}
    assert masking.name2nonzeros == {"fc1.weight": 300, "fc2.weight": 150}


def test_the_schedule_arrives_at_the_last_update():
    model = mlp(20, 30, 10)
    schedule = CubicDensity(1.0, 0.1, 0, 7)
    masking = masked(model, None, 1.0, prune_every_k_steps=5, density_schedule=schedule, last_update=7)
    counts = []
    for _ in range(12):
        train(model, masking, 1)
        counts.append(masking.total_nonzero)
    assert counts == 4 * [900] + 2 * [round(900 * schedule(5))] + 6 * [90]


def test_density_schedules_at_their_edges():
    at_once = CubicDensity(1.0, 0.1, 5, 5)
    assert [at_once(step) for step in (0, 4, 5, 9)] == [1.0, 1.0, 0.1, 0.1]
    assert SoftDensity(0.8, Constant(0.5), 3)(0) == 1.0
    with pytest.raises(ValueError, match="Expected a prune rate below 1"):
        SoftDensity(0.1, Constant(1.0), 3)
    with pytest.raises(ValueError, match=r"Expected the density end in \(0, 1\], got 0."):
        StepDensity(1.0, 0, 3)
    with pytest.raises(ValueError, match="Expected steps 0 <= begin <= finish"):
        CubicDensity(1.0, 0.1, 5, 4)


def test_masks_stay_before_the_first_update():
    model = mlp(20, 30, 10)
    masking = masked(model, prune_every_k_steps=1, first_update=3)
    first = snapshot(masking)
    train(model, masking, 2)
    assert same(masking.masks, first)
    train(model, masking, 1)
    assert not same(masking.masks, first)


def test_a_density_that_is_none_is_refused():
    model = mlp(20, 30, 10)
    masking = masked(model, density_schedule=lambda step: 1 - step)
    train(model, masking, 1)
    with pytest.raises(ValueError, match=r"Expected a density in \(0, 1\] at step 1, got 0 of density_schedule"):
        masking.at_end_of_epoch()


# Regrown weights


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("reset", [True, False])
def test_the_state_of_regrown_weights_is_reset(optimizer, reset):
    model, optimizer, masking = begin("rigl", optimizer, prune_every_k_steps=3, reset_state=reset)
    train(model, optimizer, 2)
    before = snapshot(masking)
    train(model, optimizer, 1)
    for layer in masking.layers:
        regrown = layer.mask & ~before[layer.name]
        assert regrown.any()
        for key, value in optimizer.state[layer.weight].items():
            if key != "step":
                assert bool(value[regrown].any()) is not reset
                assert value[layer.mask & ~regrown].any()


def test_regrown_weights_are_drawn_as_torch_does():
    model = mlp(300, 200, 10)
    masking = masked(model, density=0.3, prune_rate=0.3, regrown="random", growth_mode="random")
    before = snapshot(masking)
    masking.at_end_of_epoch()
    assert_masks_hold(masking)
    layer = masking.layers[0]
    regrown = layer.weight[layer.mask & ~before[layer.name]]
    assert regrown.abs().max().item() == pytest.approx(1 / math.sqrt(300), rel=0.01)
    assert regrown.abs().mean().item() == pytest.approx(0.5 / math.sqrt(300), rel=0.05)
    assert abs(regrown.mean().item()) < 0.05 / math.sqrt(300)


def norms(masking):
    return [layer.weight.norm().item() for layer in masking.layers]


@pytest.mark.parametrize(
    ("method", "pattern"),
    [("mest", "block:2x2"), ("rigl", "2:5"), ("snip", None), ("granet", None)],
)
def test_rescaled_layers_have_the_norm_they_had_without_masks(method, pattern):
    torch.manual_seed(5)
    whole = mlp(20, 30, 10)
    torch.manual_seed(5)
    _, _, masking = begin(method, rescale=True, pattern=pattern)
    assert norms(masking) == pytest.approx([whole.fc1.weight.norm().item(), whole.fc2.weight.norm().item()])
    assert_masks_hold(masking)


def test_a_rescaled_network_of_one_percent_passes_its_signal_on():
    torch.manual_seed(0)
    model = mlp(500, 500, 500, 500)
    images = batch_for(model, 64)
    whole = model(images).std(0).mean().item()
    for rescale, expected in ((False, 0.0), (True, 1.0)):
        sparse = copy.deepcopy(model)
        masked(sparse, density=0.01, rescale=rescale)
        assert sparse(images).std(0).mean().item() / whole == pytest.approx(expected, abs=0.2)


def test_rescaling_leaves_weights_alone_that_have_their_norm_or_none():
    model = mlp(20, 30, 10)
    nn.init.zeros_(model.fc2.weight)
    before = model.fc1.weight.clone()
    masking = masked(model, density={"fc1": 1.0, "*": 0.5}, rescale=True)
    assert torch.equal(model.fc1.weight, before)
    assert not model.fc2.weight.any()
    masking = masked(mlp(20, 30, 10), density=0.2)
    module = masking.modules[0]
    values = norms(masking)
    masking.remove_weight_partial_name("")
    assert norms(masked(module, sparse_init="resume", rescale=True)) == values


def test_sparse_kernels_begin_with_rescaled_weights():
    outputs = []
    for backend in (None, "cpu"):
        torch.manual_seed(5)
        model, _, masking = begin("set", rescale=True, sparse_backend=backend)
        outputs.append(model(BATCHES[0][0]))
        assert_masks_hold(masking)
    torch.testing.assert_close(*outputs)


def test_weights_that_are_active_for_their_magnitude_are_not_rescaled():
    with pytest.raises(ValueError, match="With inactive='kept' weights are active for their magnitude"):
        begin("top_kast", rescale=True)


def test_an_unknown_start_value_is_refused():
    with pytest.raises(ValueError, match=r"Unknown regrown 'one'. Choose one of 'zero', 'random'."):
        masked(mlp(5, 5), regrown="one")


# Golden examples


def test_gradient_growth():
    masking = layer_with([[1.0, 0, 0, 0]], [[T, F, F, F]])
    layer = masking.layers[0]
    layer.weight.grad = torch.tensor([[9.0, 1.0, -3.0, 2.0]])
    assert gradient_growth(masking, "weight", layer.mask, 2, layer.weight).tolist() == [[T, F, T, T]]


def test_gradient_growth_without_gradient_says_what_to_do():
    model = mlp(5, 5)
    masking = masked(model, growth_mode="gradient")
    train(model, masking)
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"shape \(5, 5\) has no gradient.*prune_every_k_steps=100"):
        masking.at_end_of_epoch()


def test_adaptive_threshold_doubles_and_halves():
    weight = [[0.1, -0.2, 0.3, 0.4], [0.5, -0.6, 0.7, 0.8]]
    masking = layer_with(weight, prune_rate=0.5)  # 4 of 8
    masking.prune_threshold = 0.15
    assert adaptive_threshold_prune(masking)["weight"].tolist() == [[F, T, T, T], [T, T, T, T]]
    assert masking.prune_threshold == 0.3
    assert adaptive_threshold_prune(masking)["weight"].tolist() == [[F, F, T, T], [T, T, T, T]]
    assert masking.prune_threshold == 0.6
    assert adaptive_threshold_prune(masking)["weight"].tolist() == [[F, F, F, F], [F, T, T, T]]
    assert masking.prune_threshold == 0.3
    masking.prune_threshold = 0.45
    adaptive_threshold_prune(masking)  # as many as intended
    assert masking.prune_threshold == 0.45


def test_remaining_counts_what_pruning_left():
    model = mlp(20, 30, 10)
    seen = {}

    def measure(masking, name, weight, mask):
        seen.setdefault(name, []).append(remaining_redistribution(masking, name, weight, mask))
        return nonzero_redistribution(masking, name, weight, mask)

    measure.after_pruning = True
    masking = masked(model, redistribution_mode=measure)
    masking.at_end_of_epoch()
    assert seen == {"fc1.weight": [120, 60], "fc2.weight": [60, 30]}


def test_exploration_counts_every_weight_once():
    masking = masked(mlp(4, 4), density=0.25)
    mask = masking.masks["fc1.weight"]
    assert masking.exploration_rate == 0.25
    first = mask.clone()
    masking.grow = lambda masking, name, new_mask, total_regrowth, weight: (
        ~first & (torch.arange(16).reshape(4, 4) < 10)
    )
    masking.at_end_of_epoch()
    explored = first | (~first & (torch.arange(16).reshape(4, 4) < 10))
    assert masking.exploration_rate == explored.sum().item() / 16
    assert torch.equal(masking.ever_active["fc1.weight"], explored)


def test_magnitude_and_gradient_together_rank_weights():
    masking = layer_with([[0.5, 0.4, 0.3, 0.0]], [[T, T, T, F]], prune_rate=1 / 3)
    layer = masking.layers[0]
    layer.weight.grad = torch.tensor([[0.0, 5.0, 30.0, 0.0]])  # scores 0.5, 0.45 and 0.6
    assert magnitude_gradient_prune(masking, layer.mask, layer.weight, "weight").tolist() == [[T, F, T, F]]


def test_weights_that_change_sign_leave_and_new_ones_have_a_sign_to_keep():
    masking = layer_with([[0.5, -0.4, 0.3, 0.0]], [[T, T, T, F]])
    layer = masking.layers[0]
    assert sign_flip_prune(masking, layer.mask, layer.weight, "weight").tolist() == [[T, T, T, F]]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[-0.1, -0.2, 0.0, 0.0]]))
    layer.mask.copy_(sign_flip_prune(masking, layer.mask, layer.weight, "weight"))
    assert layer.mask.tolist() == [[F, T, F, F]]
    assert rewiring_growth(masking, "weight", layer.mask, 3, layer.weight).tolist() == [[T, T, T, T]]
    signs = layer.memory["sign"][0].tolist()
    assert signs[1] == -1
    assert all(abs(sign) == 1 for sign in signs)


def test_gradual_pruning_falls_everywhere_and_then_moves_in_each_layer():
    model = mlp(4, 1, 4)
    masking = masked(model, density=1.0, prune_rate=0.5)
    with torch.no_grad():
        model.fc1.weight.copy_(torch.tensor([[0.1, 0.2, 0.3, 0.9]]))
        model.fc2.weight.copy_(torch.tensor([[0.4], [0.5], [0.6], [0.7]]))
    masking.baseline_nonzero = 6
    masks = gradual_magnitude_prune(masking)
    # 0.1 and 0.2 are the smallest of all; of the two and four that are left half go.
    assert masks["fc1.weight"].tolist() == [[F, F, F, T]]
    assert masks["fc2.weight"].flatten().tolist() == [F, F, T, T]


def paths_by_hand(mask):
    """The CH3-L3p scores as loops over all paths."""
    outputs, inputs = mask.shape
    nodes = [("in", u) for u in range(inputs)] + [("out", v) for v in range(outputs)]
    linked = {(("out", v), ("in", u)) for v in range(outputs) for u in range(inputs) if mask[v, u]}
    linked |= {(b, a) for a, b in linked}
    neighbours = {node: {other for other in nodes if (node, other) in linked} for node in nodes}
    scores = torch.zeros(mask.shape)
    for v in range(outputs):
        for u in range(inputs):
            start, end = ("in", u), ("out", v)
            paths = [(a, b) for a in neighbours[start] for b in neighbours[end] if b in neighbours[a]]
            community = {node for path in paths for node in path}
            external = {node: len(neighbours[node] - community - {start, end}) for node in community}
            if not mask[v, u]:
                scores[v, u] = sum(((1 + external[a]) * (1 + external[b])) ** -0.5 for a, b in paths)
    return scores


def test_path_scores_are_those_of_a_loop_over_paths():
    torch.manual_seed(0)
    for density in (0.2, 0.5, 0.8):
        mask = torch.rand(7, 9) < density
        torch.testing.assert_close(path_scores(mask), paths_by_hand(mask))


def test_a_path_of_length_three_brings_its_link():
    # Output 0 has inputs 0 and 1, output 1 has input 1: input 0 - output 0 - input 1 - output 1 closes with [1, 0].
    mask = torch.tensor([[T, T, F], [F, T, F], [F, F, T]])
    assert path_scores(mask).tolist() == [[0, 0, 0], [1, 0, 0], [0, 0, 0]]
    masking = layer_with([[0.0] * 3] * 3, mask.tolist())
    grown = cannistraci_hebb_growth(masking, "weight", mask, 1, masking.layers[0].weight)
    assert (grown ^ mask).nonzero().tolist() == [[1, 0]]


def test_importance_by_counts():
    masking = layer_with([[1.0, -2.0, 3.0], [0.0, 5.0, 0.0], [0.0, 0.0, 6.0]], [[T, T, T], [F, T, F], [F, F, T]])
    layer = masking.layers[0]
    measured = [
        measure(masking, "weight", layer.weight, layer.mask)
        for measure in (nonzero_redistribution, remaining_redistribution, no_redistribution)
    ]
    assert measured == [5, 5, 1.0]


# Weights that keep their values while they are inactive


def kept(weight, mask, inactive):
    """A masking on one linear layer with these weights, of which those outside the mask are kept."""
    layer = torch.nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, weight_decay=0.1)
    modes = dict(prune_mode="dense_magnitude", growth_mode="dense_magnitude", redistribution_mode="none")
    masking = Masking(optimizer, None, **modes, inactive=inactive)
    masking.add_module(layer, 1.0, {"weight": torch.tensor(mask)})
    return layer, masking


def test_inactive_weights_keep_their_values_and_train():
    layer, masking = kept([[4.0, 0.5, 2.0, 1.0]], [[T, F, F, F]], "kept")
    assert layer.weight.tolist() == [[4, 0, 0, 0]]
    layer.weight.grad = torch.tensor([[1.0, 9.0, -4.0, 9.0]])
    masking.step()
    # Trained are the active weight and the largest other one, whose decay of 0.1 is divided by the density 0.25.
    assert masking.memory["weight"]["dense"][0].tolist() == pytest.approx([4 - 1 - 0.4, 0.5, 2 + 4 - 0.8, 1.0])
    assert layer.weight[0].tolist() == pytest.approx([2.6, 0, 0, 0])
    masking.at_end_of_epoch()
    assert layer.weight[0].tolist() == pytest.approx([0, 0, 5.2, 0])
    assert masking.memory["weight"]["trained"].tolist() == [[T, F, T, F]]
    masking.check()


def test_the_largest_of_a_layer_and_of_the_network():
    model = mlp(3, 1, 3)
    with torch.no_grad():
        model.fc1.weight.copy_(torch.tensor([[0.1, -0.9, 0.3]]))
        model.fc2.weight.copy_(torch.tensor([[0.8], [-0.7], [0.2]]))
    given = {"fc1.weight": torch.tensor([[T, F, T]]), "fc2.weight": torch.tensor([[F], [T], [F]])}
    masking = masked(model, sparse_init=given, prune_rate=0.0, inactive="kept")
    layers = [(name, layer.mask, layer.master) for name, layer in zip(masking.masks, masking.layers, strict=True)]
    # Two of the first layer's and one of the second's: 0.9 and 0.3, and 0.8.
    pruned = [dense_magnitude_prune(masking, mask, weight, name) for name, mask, weight in layers]
    assert [mask.flatten().tolist() for mask in pruned] == [[F, F, T], [F, F, F]]
    grown = [
        dense_magnitude_growth(masking, name, mask, 1, None) for (name, *_), mask in zip(layers, pruned, strict=True)
    ]
    assert [mask.flatten().tolist() for mask in grown] == [[F, T, T], [T, F, F]]
    # Three of the network: 0.9, 0.8 and 0.7.
    everywhere = global_dense_magnitude_prune(masking)
    assert [mask.flatten().tolist() for mask in everywhere.values()] == [[F, F, F], [F, T, F]]
    for layer in masking.layers:
        layer.mask.copy_(everywhere[layer.name])
    everywhere = global_dense_magnitude_growth(masking, 2)
    assert [mask.flatten().tolist() for mask in everywhere.values()] == [[F, T, F], [T, T, F]]


def test_soft_weights_are_smaller_by_the_largest_inactive_one():
    layer, masking = kept([[4.0, -3.0, 2.0, 1.0]], [[T, T, F, F]], "soft")
    assert layer.weight.tolist() == [[2, -1, 0, 0]]
    masking.optimizer.param_groups[0]["weight_decay"] = 0
    layer.weight.grad = torch.tensor([[0.0, 0.0, -3.0, 0.0]])  # passes straight through
    masking.step()
    assert masking.memory["weight"]["dense"].tolist() == [[4, -3, 5, 1]]
    assert layer.weight.tolist() == [[2, -1, 0, 0]]
    masking.at_end_of_epoch()
    assert layer.weight.tolist() == [[1, 0, 2, 0]]


def test_a_closure_would_see_what_the_network_does_not():
    _, masking = kept([[4.0, 0.5, 2.0, 1.0]], [[T, F, F, F]], "kept")
    with pytest.raises(RuntimeError, match=r"and a closure would see the dense ones"):
        masking.step(lambda: 0.0)


def test_modes_that_compare_inactive_weights_need_them_kept():
    model = mlp(20, 30, 10)
    masking = masked(model, prune_mode="dense_magnitude")
    with pytest.raises(FunctionError, match="inactive='kept'"):
        masking.at_end_of_epoch()


def test_what_cannot_be_kept_is_refused():
    with pytest.raises(ValueError, match=r"Unknown inactive 'gone'. Choose one of 'zero', 'kept', 'soft'."):
        masked(mlp(5, 5), inactive="gone")
    with pytest.raises(ValueError, match="leave out sparse_backend"):
        masked(mlp(5, 5), inactive="kept", sparse_backend="cpu")


def test_a_pull_is_an_l1_term():
    model, twin = mlp(20, 30, 10), mlp(20, 30, 10)
    twin.load_state_dict(model.state_dict())
    inputs = torch.randn(8, 20)
    plain, pulled = (masked(net, density=1.0, **kind) for net, kind in [(model, {}), (twin, dict(pull=0.01))])
    for net, masking, l1 in [(model, plain, 0.01), (twin, pulled, 0)]:
        net.zero_grad()
        weights = [layer.weight for layer in masking.layers]
        ((net(inputs) - 1).square().mean() + l1 * sum(weight.abs().sum() for weight in weights)).backward()
        masking.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_soft_bound_prunes_back_to_the_density():
    model, optimizer, masking = begin("mest", stop_fraction=0.5)
    assert masking.total_nonzero == round(180 / 0.7)
    for step in go_on(model, optimizer, masking):
        rate = masking.prune_rate
        if step < 12 and step % 2 == 0:
            assert masking.total_nonzero == round(180 / (1 - rate))
            assert masking.total_nonzero - 180 == pytest.approx(rate * masking.total_nonzero, abs=2)
        if step >= 12:
            assert masking.total_nonzero == 180


# On sparse kernels


@pytest.mark.parametrize("method", ["set", "rigl", "mest", "deep_rewiring", "granet", "cht"])
def test_methods_train_on_sparse_kernels(method):
    model, optimizer, masking = begin(method, sparse_backend="cpu", regrown="random")
    for _ in go_on(model, optimizer, masking):
        for layer in masking.layers:
            assert not layer.weight[~layer.mask].any()
    assert masking.total_nonzero == 180
    assert masking.exploration_rate > masking.density or method == "deep_rewiring"


@pytest.mark.parametrize("method", ["rigl", "srigl", "granet"])
@pytest.mark.parametrize("last", [13, 31, 40])
def test_sparse_kernels_see_gradients_before_the_last_update(method, last):
    """It comes at a step of its own: 13, or 31 right after that at 30."""
    model = mlp(20, 30, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parts = dict(stop_fraction=last / 50, prune_every_k_steps=30, sparse_backend="cpu")
    masking = Masking.from_method(method, model, optimizer, 50, 0.2, **parts)
    list(go_on(model, optimizer, masking, last=50))
    assert masking.density == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("reset", [True, False])
def test_sparse_kernels_reset_the_state_of_regrown_weights(reset):
    model, optimizer, masking = begin("rigl", sparse_backend="cpu", prune_every_k_steps=3, reset_state=reset)
    train(model, optimizer, 2)
    before = snapshot(masking)
    train(model, optimizer, 1)
    for layer in masking.layers:
        module = masking.sparse_training.trained[layer.name]
        regrown = (layer.mask & ~before[layer.name]).flatten()[module.position]
        momentum = optimizer.state[module.value]["momentum_buffer"]
        assert bool(momentum[regrown].any()) is not reset
        assert momentum[~regrown].any()
