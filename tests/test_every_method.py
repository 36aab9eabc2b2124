"""What holds for every method, with its own pattern and with every pattern that it can keep.

Counts are exact after each update, inactive weights are zero, the pattern holds, a resumed run is bitwise the
uninterrupted one, two processes agree, a step does little more than a dense one, and main.py --method NAME runs. A
method is tested because it is in the table; combinations that make no sense are refused with one line.
"""

import copy

import by_method
import pytest
import torch
from by_method import batch, go_on
from helpers import assert_masks_hold, backward, mlp
from launch import run as run_processes
from script import assert_equal, checkpoint_of, load_main, metrics_of, run_folder
from torch.nn import functional
from work import work_of

from sparselearning import Masking
from sparselearning.experiments.report import plots
from sparselearning.functions import is_marked
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.methods import METHODS, find_method
from sparselearning.patterns import of_fan_in, pattern_for
from sparselearning.prune import PRUNE_FUNCTIONS

PATTERNS = ["unstructured", "2:4", "block:2x4", "fan-in", "fan-in:0.3", "neuron"]
WIDTHS, SIZE, DENSITY = (20, 40, 10), 1200, 0.2


def refusal(method, pattern):
    """Return the error for a combination that makes no sense; None for the others."""
    parts, units_differ = METHODS[method], pattern == "neuron"
    prune, grow = PRUNE_FUNCTIONS[parts.prune], GROWTH_FUNCTIONS[parts.growth]
    if is_marked(prune, "single_weights") and pattern in ("block:2x4", "neuron"):
        return f"prune_mode='{parts.prune}' moves single weights, and the pattern '{pattern}' does not let it"
    if parts.density_schedule != "constant" and (pattern.startswith("fan-in") or units_differ):
        return f"The pattern '{pattern}' keeps the density of each layer"
    across = any(is_marked(function, "network_wide") for function in (prune, grow))
    if units_differ and (parts.redistribution != "none" or across):
        return "The units of pattern 'neuron' have 20, 40 weights in different layers"
    if parts.start_density == 1 and pattern == "2:4":
        return r"Expected a density of at most 0\.5, which is all that the pattern '2:4' holds, got 1"
    return None


EVERY = [(method, pattern) for method in METHODS for pattern in PATTERNS]
KEPT = [case for case in EVERY if not refusal(*case)]
OWN = [(method, METHODS[method].pattern) for method in METHODS]


def begin(method, pattern, **parts):
    """Return a small network, its optimizer and its Masking by this method."""
    return by_method.begin(method, widths=WIDTHS, density=DENSITY, pattern=pattern, **parts)


def counted(masking):
    """Return the number of active weights, and of those that could not be placed after neurons were removed."""
    left_over = [layer.left_over for layer in masking.layers]
    assert all(count < len(layer.mask) for count, layer in zip(left_over, masking.layers, strict=True))
    return masking.total_nonzero + sum(left_over)


def due(masking, step, at_first):
    """Return how many weights an update at `step` is to leave active, in whole units."""
    if masking.updates.density is None:
        return at_first
    unit = masking.layers[0].pattern.size
    return round(masking.updates.density(step) * SIZE / unit) * unit


def assert_pattern_holds(mask, pattern, most):
    """Assert the definition of a pattern on a mask [outputs, inputs]; a neuron started with `most` inputs."""
    rows = mask.flatten(1).int()
    inputs = rows.sum(1)
    if pattern == "2:4":
        assert rows.reshape(-1, 4).sum(1).max() <= 2
    elif pattern == "block:2x4":
        blocks = rows.reshape(len(rows) // 2, 2, -1, 4).sum((1, 3))
        assert set(blocks.flatten().tolist()) <= {0, 8}
    elif pattern == "fan-in":
        assert (inputs == most).all()
    elif pattern == "fan-in:0.3":
        assert len(set(inputs[inputs > 0].tolist())) == 1
        assert inputs.max() >= most
    elif pattern == "neuron":
        assert set(inputs.tolist()) <= {0, rows.shape[1]}


@pytest.mark.parametrize(("method", "pattern"), [case for case in EVERY if refusal(*case)])
def test_what_cannot_go_together_is_refused(method, pattern):
    with pytest.raises(ValueError, match=refusal(method, pattern)) as refused:
        begin(method, pattern)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(("method", "pattern"), KEPT)
def test_counts_are_exact_inactive_weights_zero_and_the_pattern_holds(method, pattern, optimizer):
    model, optimizer, masking = begin(method, pattern, optimizer=optimizer)
    most = {layer.name: layer.pattern.most for layer in masking.layers}
    at_first = counts = counted(masking)
    if pattern in ("unstructured", "2:4", "block:2x4"):
        unit = masking.layers[0].pattern.size
        assert at_first == round(find_method(method).density_at_start(DENSITY) * SIZE / unit) * unit
    for step in go_on(model, optimizer, masking):
        assert_masks_hold(masking)
        assert counted(masking) in (counts, due(masking, step, at_first))
        counts = counted(masking)
        masking.check()
        for layer in masking.layers:
            assert_pattern_holds(layer.mask, pattern, most[layer.name])
    assert counts == (at_first if masking.updates.density is None else round(DENSITY * SIZE))
    assert masking.density <= masking.exploration_rate <= 1


@pytest.mark.parametrize(("method", "pattern"), KEPT)
def test_a_resumed_run_is_the_uninterrupted_one(method, pattern):
    torch.manual_seed(0)
    parts = begin(method, pattern)
    saved = None
    for step in go_on(*parts):
        if step == 7:
            saved = copy.deepcopy([part.state_dict() for part in parts]), torch.get_rng_state()
    torch.manual_seed(1)
    again = begin(method, pattern, batches=[batch(8)])  # other scores, of which nothing stays
    for part, state in zip(again, saved[0], strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(saved[1])
    list(go_on(*again, first=7))
    for part, other in zip(parts, again, strict=True):
        assert_equal(part.state_dict(), other.state_dict())


def replicas():
    """Train by every method in one of several processes, each with its own data and random numbers."""
    rank = torch.distributed.get_rank()
    states = {}
    for method, pattern in KEPT:
        torch.manual_seed(0)
        model, optimizer, masking = begin(method, pattern, batches=[batch(rank)])
        torch.manual_seed(rank)
        network = torch.nn.parallel.DistributedDataParallel(model)
        for step in range(4):
            backward(network, torch.randn(8, 20))
            optimizer.step()
            if step % 2 == 1:
                masking.at_end_of_epoch()
        states[f"{method} {pattern}"] = {"model": model.state_dict(), "mask": masking.state_dict()}
    return states


@pytest.mark.long
def test_two_processes_agree():
    first, second = run_processes(replicas, 2)
    assert len(first) == len(KEPT)
    for case, state in first.items():
        assert_equal(state, second[case], case)


LAYERS, WEIGHTS = 2, 784 * 300 + 300 * 100
MORE_WORK = {  # operations, entries per weight and Python calls that masks may add to a step
    "zero": (1, 2, 120),  # all inactive weights are set to zero at once
    "own": (1 + 2 * LAYERS, 7, 220),  # and the step of each weight is lengthened, from what it was before
    "pulled": (1 + 3 * LAYERS, 10, 200),  # and a multiple of the signs is added to the gradients
    "kept": (1 + 15 * LAYERS, 40, 700),  # and weights are compared with a dense copy, exchanged for it, and back
    "soft": (1 + 19 * LAYERS, 50, 800),  # and shrunk
}


def training_step(method=None, pattern=None, like=None):
    """Return a function that makes one step of training, in which no masks move; dense, or with those of a method."""
    model = mlp(784, 300, 100)
    optimizer = by_method.optimizer_of(like or method, model.parameters(), lr=0.01)
    inputs, labels = torch.randn(100, 784), torch.arange(100)
    masking = None
    if method:
        parts = dict(prune_every_k_steps=10**6, stop_fraction=1.0, pattern=pattern, batches=[(inputs, labels)])
        masking = Masking.from_method(method, model, optimizer, 10**6, 0.05, **parts)

    def step(held=masking):  # while the step is used, its masks are
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()

    for _ in range(2):  # the optimizer's state appears
        step()
    return step


@pytest.mark.parametrize(("method", "pattern"), OWN)
def test_a_step_does_little_more_than_a_dense_one_and_waits_for_no_device(method, pattern):
    parts = METHODS[method]
    kind = "pulled" if parts.pull else "own" if parts.reset_state == "restart" else parts.weights
    operations, entries, waits, calls = work_of(training_step(method, pattern)) - work_of(training_step(like=method))
    most_operations, passes, most_calls = MORE_WORK[kind]
    assert waits == 0
    assert operations <= most_operations
    assert entries <= passes * WEIGHTS
    assert calls <= most_calls


@pytest.mark.parametrize(("method", "pattern"), OWN)
def test_the_script_runs_it(method, pattern, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "plot_curves", lambda *_: None)
    monkeypatch.setattr(plots, "plot_density", lambda *_: None)
    main = load_main()
    often = ["--prune-every-k-steps", "5"] if METHODS[method].prune_every_k_steps else []
    often += ["--optimizer", "adam", "--lr", "0.001"] if METHODS[method].reset_state == "restart" else []
    place = ["--data", "digits", "--device", "cpu", "--max-threads", "1", "--run-dir", str(tmp_path)]
    main.main(["--method", method, "--density", "0.1", "--epochs", "3", *often, *place])
    metrics = metrics_of(run_folder(tmp_path))
    saved = checkpoint_of(run_folder(tmp_path))
    for name, layer in saved["mask"]["layers"].items():
        assert not saved["model"][name][~layer["mask"]].any()
        shape, count = layer["mask"].shape, int(layer["mask"].sum())
        assert of_fan_in(pattern_for(pattern, shape), shape, count).holds(layer["mask"])
    assert metrics[2]["active_weights"] == 26620 or method == "srigl"
    assert metrics[2]["active_weights"] == pytest.approx(26620, abs=205)  # of SRigL's neurons half a weight each
    assert 0.09 <= metrics[0]["exploration_rate"] <= metrics[2]["exploration_rate"] <= 1
