"""Patterns: golden masks, and what always holds, for each of them and every function that can keep it."""

import copy
import itertools
import math
import pickle

import pytest
import torch
from helpers import assert_masks_hold, masked, mlp, same, snapshot, train
from hypothesis import given
from hypothesis import strategies as st
from launch import run
from script import load_main, metrics_of
from test_update_matrix import without_aliases
from torch import nn

from sparselearning import Masking, checkpoint, network_wide
from sparselearning.functions import FunctionError, is_network_wide
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.invariants import InvariantError
from sparselearning.patterns import of_fan_in, pattern_for, pattern_of, with_pattern
from sparselearning.prune import PRUNE_FUNCTIONS
from sparselearning.redistribute import REDISTRIBUTION_FUNCTIONS
from sparselearning.selection import add_highest, add_highest_jointly, drop_lowest
from sparselearning.sparse import convert


def carrying(text, rows, most=None):
    """A mask from rows of 0 and 1, with its pattern."""
    mask = torch.tensor(rows).bool()
    pattern = pattern_for(text, mask.shape)
    if pattern.even:
        pattern = type(pattern)(**{**vars(pattern), "most": most or int(mask.sum(1).max())})
    return with_pattern(mask, pattern)


# By hand


def test_two_of_four_grows_where_a_group_lost():
    mask = carrying("2:4", [[1, 0, 0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1, 0, 0]])
    score = torch.tensor([[0, 1, 2, 3, 9, 9, 9, 9], [5, 6, 8, 7, 9, 9, 9, 9.0]])
    grown = add_highest(score, mask, 3)
    assert grown.int().tolist() == [[1, 0, 0, 1, 1, 0, 1, 0], [0, 0, 1, 1, 1, 1, 0, 0]]
    assert add_highest(score, mask, 1).int().tolist() == [[1, 0, 0, 0, 1, 0, 1, 0], [0, 0, 1, 0, 1, 1, 0, 0]]
    assert torch.equal(add_highest(score, mask, 99), grown), "the groups are full"


def test_dropping_from_two_of_four_is_dropping_anywhere():
    mask = carrying("2:4", [[1, 1, 0, 0, 1, 0, 1, 0]])
    score = torch.tensor([[1.0, 2, 0, 0, 4, 0, 3, 0]])
    assert drop_lowest(score, mask, 2).int().tolist() == [[0, 0, 0, 0, 1, 0, 1, 0]]


def test_blocks_leave_and_come_by_the_sum_of_their_scores():
    mask = carrying("block:2x2", [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]])
    score = torch.tensor([[9.0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]])
    left = drop_lowest(score, mask, 4)
    assert left.int().tolist() == [[0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]
    assert add_highest(score, mask, 4).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]
    assert torch.equal(drop_lowest(score, mask, 1), left), "a block is the least that holds one weight"
    assert torch.equal(add_highest(score, mask, 3), mask), "a block is more than three weights"


def test_a_neuron_is_its_row():
    mask = carrying("neuron", [[1, 1, 1], [0, 0, 0], [1, 1, 1]])
    score = torch.tensor([[1.0, 1, 1], [5, 0, 0], [0, 0, 2]])
    assert drop_lowest(score, mask, 3).any(1).tolist() == [True, False, False]
    assert add_highest(score, mask, 3).all()


def test_constant_fan_in_fills_the_neurons_that_lost():
    mask = carrying("fan-in", [[1, 0, 0], [0, 0, 0], [1, 1, 0]], most=2)
    score = torch.tensor([[0, 1, 2], [3, 1, 2], [9, 9, 9.0]])
    assert add_highest(score, mask, 3).int().tolist() == [[1, 0, 1], [1, 0, 1], [1, 1, 0]]


def test_ablation_gives_up_the_neuron_with_the_fewest_salient_weights():
    # 3 neurons of fan-in 2 after pruning; unstructured growth would add two weights to the first and one to the second.
    mask = carrying("fan-in:0.9", [[1, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0]], most=2)
    score = torch.tensor([[0, 9, 8, 1], [0, 7, 1, 2], [0, 3, 1, 2.0]])
    grown = add_highest(score, mask, 3)
    assert grown.int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 0]]
    assert not carrying("fan-in:0.4", mask.int().tolist(), most=2).pattern.holds(torch.eye(3, 4).cumsum(1).bool())
    kept = add_highest(score, carrying("fan-in:0.4", mask.int().tolist(), most=2), 3)
    assert kept.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]]


def slow_growth(score, mask, k, most, group):
    """The k best inactive entries, one after the other, each if its group has room."""
    grown = [list(row) for row in mask]
    entries = [(-score[i][j], i, j) for i in range(len(mask)) for j in range(len(mask[0])) if not mask[i][j]]
    for _, i, j in sorted(entries):
        start = j // group * group
        if k and sum(grown[i][start : start + group]) < most:
            grown[i][j], k = 1, k - 1
    return grown


@given(st.data())
def test_growth_is_the_greedy_choice_among_groups_with_room(data):
    most, group = data.draw(st.sampled_from([(2, 4), (1, 4), (1, 2), (3, 6)]))
    rows, columns = data.draw(st.integers(1, 3)), group * data.draw(st.integers(1, 3))
    entry = st.lists(st.integers(0, 5), min_size=columns, max_size=columns)
    score = data.draw(st.lists(entry, min_size=rows, max_size=rows))
    mask = slow_growth(data.draw(st.lists(entry, min_size=rows, max_size=rows)), [[0] * columns] * rows, 4, most, group)
    k = data.draw(st.integers(0, 12))
    found = add_highest(torch.tensor(score).float(), carrying(f"{most}:{group}", mask), k)
    expected = torch.tensor(slow_growth(score, mask, k, most, group)).bool()
    assert found.sum() == expected.sum()
    assert torch.tensor(score)[found].sum() == torch.tensor(score)[expected].sum(), "equals may come from another group"
    assert pattern_of(carrying(f"{most}:{group}", mask)).holds(found)


def test_units_of_different_size_are_not_chosen_jointly():
    masks = carrying("neuron", [[0, 0]]), carrying("neuron", [[0, 0, 0]])
    with pytest.raises(ValueError, match=r"Units of \[2, 3\] weights cannot be selected jointly"):
        add_highest_jointly([torch.ones(1, 2), torch.ones(1, 3)], masks, 2)


# What always holds

PATTERNS = ["2:4", "1:4", "block:4x2", "neuron", "fan-in", "fan-in:0.3"]
TABLES = dict(prune_mode=PRUNE_FUNCTIONS, growth_mode=GROWTH_FUNCTIONS, redistribution_mode=REDISTRIBUTION_FUNCTIONS)
MODES = [dict(zip(TABLES, modes, strict=True)) for modes in itertools.product(*map(without_aliases, TABLES.values()))]
# Those of single methods, which find for themselves how many weights move, or need more than a mask.
APART = {"sign_flip", "magnitude_gradient", "gradual_magnitude", "rewiring", "cannistraci_hebb"}
APART |= {"dense_magnitude", "global_dense_magnitude"}
MODES = [modes for modes in MODES if not APART & set(modes.values())]
PLAIN = dict(prune_mode="magnitude", growth_mode="momentum", redistribution_mode="none")


def network():
    convolution = nn.Conv2d(4, 8, (1, 2)).to(memory_format=torch.channels_last)
    return nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), nn.Linear(32, 24), nn.ReLU(), nn.Linear(24, 8))


def sparse(pattern, model=None, density=None, **modes):
    model = model or network()
    density = density or {"2:4": 0.5, "1:4": 0.2}.get(pattern, 0.3)
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None, 0.3, **{**PLAIN, **modes})
    masking.add_module(model, density, "erdos_renyi_kernel", pattern=pattern)
    return model, masking


def move(model, masking, updates=1):
    for _ in range(updates):
        train(model, masking, steps=2, inputs=torch.randn(8, 4, 1, 5))
        masking.at_end_of_epoch()


def assert_pattern_holds(masking):
    assert_masks_hold(masking)
    masking.check()
    for layer in masking.layers:
        assert layer.pattern.holds(layer.mask), layer.name
        counts = layer.mask.flatten(1).sum(1)
        if layer.pattern.even:
            assert len(set(counts[counts > 0].tolist())) == 1
        elif layer.pattern.most:
            assert (layer.mask.reshape(-1, layer.pattern.group).sum(1) <= layer.pattern.most).all()
        elif layer.pattern.name == "neuron":
            assert set(counts.tolist()) <= {0, layer.mask[0].numel()}


def refusal(pattern, prune_mode, growth_mode, redistribution_mode):
    """What is said of a combination that makes no sense; nothing of the others."""
    single = ("SET", "threshold", "adaptive_threshold")
    if growth_mode == "momentum_neuron":
        return f"growth_mode='momentum_neuron' moves single weights, and the pattern '{pattern}' does not let it"
    if prune_mode in single and pattern in ("block:4x2", "neuron"):
        return f"prune_mode='{prune_mode}' moves single weights, and the pattern '{pattern}' does not let it"
    across = is_network_wide(PRUNE_FUNCTIONS[prune_mode]) or is_network_wide(GROWTH_FUNCTIONS[growth_mode])
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


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("density", [0.1, 0.25, 0.5])
def test_a_layer_starts_with_whole_steps_nearest_to_its_density(pattern, density):
    if pattern == "1:4" and density == 0.5:
        with pytest.raises(ValueError, match=r"density of at most 0\.25, .* the pattern '1:4' holds, got 0\.5"):
            sparse(pattern, density=density)
        return
    _, masking = sparse(pattern, density=density)
    assert_pattern_holds(masking)
    size = sum(layer.mask.numel() for layer in masking.layers)
    steps = [layer.pattern.step(layer.mask.shape) for layer in masking.layers]
    assert all(layer.nonzeros % step == 0 < layer.nonzeros for layer, step in zip(masking.layers, steps, strict=True))
    if len(set(steps)) == 1:
        assert masking.total_nonzero == round(round(density * size) / steps[0]) * steps[0]


@pytest.mark.parametrize(("pattern", "start"), [("2:4", 0.5), ("1:4", 0.25), ("block:4x2", 1.0)])
@pytest.mark.parametrize("prune_mode", ["magnitude", "global_magnitude"])
def test_the_density_follows_a_schedule_in_units(pattern, start, prune_mode):
    def density(step):
        return max(start - step / 50, 0.05)

    model, masking = sparse(pattern, density=start, prune_mode=prune_mode, density_schedule=density)
    unit, size = masking.layers[0].pattern.size, masking.total_nonzero + masking.total_zero
    for update in range(1, 12):
        move(model, masking)
        assert_pattern_holds(masking)
        assert masking.total_nonzero == round(density(2 * update) * size / unit) * unit


@pytest.mark.parametrize("pattern", ["fan-in", "neuron"])
def test_the_density_of_some_patterns_stays(pattern):
    with pytest.raises(ValueError, match=f"The pattern '{pattern}' keeps the density of each layer"):
        sparse(pattern, density_schedule=lambda step: 0.1)


def test_a_density_above_the_pattern_s_is_refused():
    model, masking = sparse("2:4", density_schedule=lambda step: 0.6)
    with pytest.raises(ValueError, match=r"asks for a density of 0\.6, which is more than the pattern holds"):
        move(model, masking)


def test_a_method_takes_a_pattern():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masking = Masking.from_method("rigl", model, optimizer, 100, 0.25, pattern="2:4", prune_every_k_steps=2)
    train(model, masking, steps=6, inputs=torch.randn(8, 4, 1, 5))
    assert_pattern_holds(masking)
    assert masking.total_nonzero == round(0.25 * 1024)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_resuming_is_bitwise(pattern, tmp_path):
    torch.manual_seed(3)
    model, masking = sparse(pattern, growth_mode="random")
    move(model, masking)
    parts = dict(model=model, optimizer=masking.optimizer, mask=masking)
    checkpoint.save(tmp_path / "c.pt", **parts)
    move(model, masking, updates=2)
    again, other = sparse(pattern, growth_mode="random")
    checkpoint.load(tmp_path / "c.pt", model=again, optimizer=other.optimizer, mask=other)
    move(again, other, updates=2)
    assert same(dict(model.state_dict()), dict(again.state_dict()))
    assert same(masking.masks, other.masks)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_a_copy_keeps_its_pattern(copied):
    model, masking = copied(sparse("2:4"))
    move(model, masking)
    assert_pattern_holds(masking)
    assert masking.layers[0].pattern.name == "2:4"


def train_patterns():
    torch.manual_seed(torch.distributed.get_rank() if torch.distributed.is_initialized() else 0)
    states = []
    for pattern in PATTERNS:
        model, masking = sparse(pattern, growth_mode="random")
        torch.manual_seed(1)
        move(model, masking, updates=2)
        states.append(masking.masks)
    return [{name: mask.detach() for name, mask in masks.items()} for masks in states]


def test_two_processes_agree():
    first, second = run(train_patterns, 2)
    assert all(same(one, other) for one, other in zip(first, second, strict=True))


def test_compiled_steps_keep_the_pattern():
    model, masking = sparse("2:4")
    train(model, masking, steps=1, inputs=torch.randn(8, 4, 1, 5))
    step = torch.compile(masking.optimizer.step, backend="eager")
    step()
    masking.at_end_of_epoch()
    assert_pattern_holds(masking)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 1)])
def test_scores_before_training_choose_the_best_of_each_group(n, m):
    model = mlp(16, 8, 8)
    scores = {name: torch.rand(weight.shape) for name, weight in model.named_parameters() if weight.dim() > 1}
    masking = masked(model)
    other = mlp(16, 8, 8)
    masking = Masking(
        torch.optim.SGD(other.parameters(), lr=0.1), None, growth_mode="random", redistribution_mode="none"
    )
    masking.add_module(other, n / m, scores, pattern=f"{n}:{m}")
    for name, mask in masking.masks.items():
        best = scores[name].reshape(-1, m).topk(n, dim=1).indices
        assert torch.equal(mask.reshape(-1, m), torch.zeros(mask.numel() // m, m).scatter(1, best, 1).bool())


def trained(pattern, **on):
    """A linear layer of 64 inputs and 32 outputs after three updates."""
    model = nn.Linear(64, 32, **on)
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None)
    masking.add_module(model, 0.5, pattern=pattern)
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


# What cannot be


@pytest.mark.parametrize(
    "text", ["2:0", "5:4", "0:4", "block", "block:0x4", "block:4", "fan-in:1", "fan-in:1.5", "neurons", "", "2:4:8"]
)
def test_an_unknown_pattern_is_refused(text):
    with pytest.raises(ValueError, match=f"Unknown pattern '{text}'. Choose unstructured, N:M such as 2:4, block:RxC"):
        sparse(text)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        (
            "2:6",
            r"does not fit 0.weight \(8, 4, 1, 2\), because its 8 inputs are not a multiple of 6; 3.weight \(24, 32\)",
        ),
        ("block:16x8", r"'block:16x8' does not fit 0.weight .* 8 x 8 weights cannot be divided into blocks of 16 x 8"),
    ],
)
def test_a_pattern_that_fits_no_layer_names_them(pattern, message):
    with pytest.raises(ValueError, match=message):
        sparse(pattern, density=0.2)


def test_layers_that_a_pattern_does_not_fit_stay_dense_when_named():
    model = network()
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None)
    masking.add_module(model, 0.2, pattern="block:8x16", dense=["0", "5"])
    move(model, masking)
    assert masking.name2nonzeros == {"3.weight": round(0.2 * 768 / 128) * 128}


def test_a_mask_of_another_pattern_is_refused():
    model, masking = sparse("2:4")
    state = copy.deepcopy(masking.state_dict())
    state["layers"]["0.weight"]["mask"].fill_(True)
    before = snapshot(masking)
    with pytest.raises(RuntimeError, match=r"mask of 0\.weight in the state is not of the pattern '2:4'"):
        masking.load_state_dict(state)
    assert same(before, masking.masks)
    full = {name: torch.ones_like(mask) for name, mask in before.items()}
    masking.remove_weight_partial_name("")
    other = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None)
    with pytest.raises(ValueError, match=r"The mask of 0\.weight is not of the pattern '2:4'"):
        other.add_module(model, 0.5, full, pattern="2:4")


def test_an_own_function_that_breaks_the_pattern_leaves_the_masks():
    def dense_rows(masking, name, new_mask, total_regrowth, weight):
        return new_mask | (torch.arange(len(new_mask)) == 0).view(-1, *[1] * (new_mask.dim() - 1))

    model, masking = sparse("2:4", growth_mode=dense_rows)
    before = snapshot(masking)
    with pytest.raises(FunctionError, match=r"growth_mode='dense_rows' does not keep the pattern '2:4' of 0\.weight"):
        move(model, masking)
    assert same(before, masking.masks)


def test_own_functions_know_nothing_of_patterns():
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


def test_a_removed_layer_takes_what_its_neurons_left_over():
    model, masking = sparse("fan-in:0.9", growth_mode="random")
    move(model, masking, updates=6)
    assert masking.total_nonzero < masking.baseline_nonzero, "neurons were given up"
    masking.check()
    for name in list(masking.masks):
        masking.remove_weight(name)
        masking.check()
    assert masking.baseline_nonzero == 0


def test_check_sees_a_count_that_is_off():
    _, masking = sparse("fan-in:0.3")
    masking.baseline_nonzero += 1
    with pytest.raises(InvariantError, match="weights are active"):
        masking.check()


# From the command line


@pytest.mark.parametrize("pattern", [*PATTERNS[:2], "block:10x4", *PATTERNS[3:]])
def test_a_run_keeps_its_pattern(pattern, tmp_path):
    main = load_main()
    density = {"2:4": 0.5, "1:4": 0.25}.get(pattern, 0.1)
    given = f"--data digits --epochs 3 --max-threads 1 --device cpu --density {density} --pattern {pattern}"
    argv = [*given.split(), "--redistribution", "none", "--run-dir", str(tmp_path)]
    folder = main.run(main.parse_arguments(argv))
    layers = torch.load(folder.checkpoint)["mask"]["layers"]
    for layer in layers.values():
        shape, count = layer["mask"].shape, int(layer["mask"].sum())
        assert of_fan_in(pattern_for(pattern, shape), shape, count).holds(layer["mask"])
    counts = [record["active_weights"] for record in metrics_of(folder.path)[:3]]
    assert counts[0] == pytest.approx(density * 266_200, rel=0.05)
    assert pattern == "fan-in:0.3" or counts == [counts[0]] * 3


def test_a_constant_fan_in_is_that_of_the_checkpoint():
    """The scores of another batch divide the weights among layers otherwise; a resumed run has no scores at all."""
    _, masking = sparse("fan-in")
    state = copy.deepcopy(masking.state_dict())
    again, other = sparse("fan-in", density=0.1)
    assert other.layers[1].pattern.most != masking.layers[1].pattern.most
    other.load_state_dict(state)
    assert [layer.pattern for layer in other.layers] == [layer.pattern for layer in masking.layers]
    move(again, other, updates=2)
    assert other.total_nonzero == masking.total_nonzero
    assert_pattern_holds(other)


def test_a_run_from_scores_goes_on_with_its_fan_in(tmp_path):
    main = load_main()
    given = f"--data digits --max-threads 1 --device cpu --density 0.05 --run-dir {tmp_path} --method snip"
    whole = main.run(main.parse_arguments([*given.split(), "--pattern", "fan-in", "--epochs", "2"]))
    resumed = main.run(main.parse_arguments(["--resume", str(whole.path), "--epochs", "3"]))
    counts = [record["density_per_layer"] for record in metrics_of(resumed.path)[:3]]
    assert counts[2] == counts[1]
