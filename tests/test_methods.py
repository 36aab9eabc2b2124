"""The table of methods; test_every_method.py shows what holds for all of them."""

import pytest
import torch
from by_method import STEPS, batch, begin, go_on
from helpers import mlp, same, sgd, snapshot

from sparselearning import Masking
from sparselearning.methods import arguments_of, find_method
from sparselearning.schedules import Constant, CosineDecay, CubicDensity, Updates
from sparselearning.selection import add_highest
from sparselearning.start.scores import grasp, snip, synflow


def test_an_unknown_method_names_the_known_ones():
    with pytest.raises(ValueError, match=r"Unknown method 'rigel'. Choose one of 'sparse_momentum', 'set', "):
        find_method("rigel")


def test_an_unknown_part_names_the_known_ones():
    with pytest.raises(TypeError, match=r"A method has no part grwth. There are prune, redistribution, growth, "):
        find_method("rigl", grwth="random")


SCORES = {
    "snip": lambda model: snip(model, [batch()]),
    "grasp": lambda model: grasp(model, [batch()]),
    "synflow": lambda model: synflow(model, batch()[0], 0.1, dense=["fc2"]),
}


@pytest.mark.parametrize("score", SCORES)
def test_a_score_before_training_is_a_method(score):
    model = mlp(20, 30, 10)
    scores = SCORES[score](model)
    expected = add_highest(scores["fc1.weight"], torch.zeros(30, 20, dtype=torch.bool), 60)
    optimizer = sgd(model, momentum=0)
    masking = Masking.from_method(score, model, optimizer, STEPS, 0.1, dense=["last"], batches=iter([batch()]))
    assert same(masking.masks, {"fc1.weight": expected})


def test_a_score_needs_a_batch():
    with pytest.raises(ValueError, match=r"sparse_init='snip' scores the weights before .* Pass batches=\[\(inputs, "):
        begin("snip", batches=None)


def test_a_method_brings_its_pattern():
    masking = begin("srigl")[2]
    assert [layer.pattern.name for layer in masking.layers] == ["fan-in:0.3", "fan-in"], "the last one is the output"
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
        (dict(start_density=0.5), "A start_density needs a density_schedule that leaves it: 'cubic', 'early_cubic', "),
    ],
)
def test_parts_that_do_not_fit_are_refused(parts, message):
    with pytest.raises(ValueError) as refused:  # noqa: PT011
        find_method("rigl", **parts)
    assert str(refused.value).startswith(message)


def test_a_method_is_the_arguments_of_masking_and_of_add_module():
    parts = dict(prune_rate=0.2, verbose=True, dense=["last"])
    of_masking, of_module = arguments_of("rigl", density=0.05, total_steps=1000, parts=parts)
    held = of_masking.pop("weights")
    assert (held.kind, held.regrown, held.reset_state, held.pull) == ("zero", "zero", True, 0.0)
    assert of_masking == dict(
        prune_rate_decay=CosineDecay(0.2, 750, eta_min=0.0),
        prune_mode="magnitude",
        growth_mode="gradient",
        redistribution_mode="none",
        updates=Updates(every=100, first=0, last=750),
        verbose=True,
    )
    sparse_init = "erdos_renyi_kernel"
    assert of_module == dict(
        density=0.05, sparse_init=sparse_init, pattern="unstructured", rescale=False, dense=["last"]
    )


def test_a_method_that_changes_the_density_begins_with_its_own():
    of_masking, of_module = arguments_of("gmp", density=0.05, total_steps=1000, parts={})
    assert of_masking["updates"] == Updates(100, 0, 750, density=CubicDensity(1.0, 0.05, 0, 750))
    assert of_masking["prune_rate_decay"] == Constant(0.0)
    assert of_module["density"] == 1.0


def test_a_method_begins_with_its_density():
    assert begin("gmp")[2].density == 1
    assert begin("rigl")[2].density == 0.2


def test_one_shot_prunes_once():
    model, optimizer, masking = begin("one_shot")
    counts = [masking.total_nonzero for _ in go_on(model, optimizer, masking)]
    assert counts == 12 * [900] + 15 * [180]  # steps 1 to 11 and the end of an epoch, then those from 12 on


def test_granet_regenerates_after_its_density_has_arrived():
    model, optimizer, masking = begin("granet", prune_every_k_steps=5)
    moved, before = [], snapshot(masking)
    for step in go_on(model, optimizer, masking):
        if not same(before, masking.masks):
            moved.append((step, masking.total_nonzero))
            before = snapshot(masking)
    fall = CubicDensity(0.5, 0.2, 0, 18)
    assert moved == [(step, round(fall(step) * 900)) for step in (5, 10, 15, 18, 20)]


def test_static_masks_stay():
    model, optimizer, masking = begin("static")
    first = snapshot(masking)
    list(go_on(model, optimizer, masking))
    assert same(masking.masks, first)
    assert masking.exploration_rate == 0.2


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
