"""Schedules of prune rates and densities, and the steps at which the masks move."""

import math
import pickle

import pytest
from helpers import assert_masks_hold, masked, mlp, same, snapshot, train
from hypothesis import given
from hypothesis import strategies as st

from sparselearning.schedules import (
    Constant,
    CosineDecay,
    CubicDensity,
    LinearDecay,
    SigmoidDensity,
    SoftDensity,
    StepDensity,
    Updates,
)

rates = st.floats(0, 1)
lengths = st.integers(1, 10_000)
schedules = st.builds(CosineDecay, rates, lengths) | st.builds(LinearDecay, rates, lengths) | st.builds(Constant, rates)


@pytest.mark.parametrize(
    ("step", "rate"),
    [(0, 0.5), (25, 0.005 + 0.495 * (2 + math.sqrt(2)) / 4), (50, 0.2525), (100, 0.005), (101, 0.005), (10**6, 0.005)],
)
def test_cosine_decay(step, rate):
    assert CosineDecay(0.5, T_max=100)(step) == pytest.approx(rate, abs=1e-15)


def test_cosine_decay_to_another_minimum():
    assert CosineDecay(0.5, T_max=100, eta_min=0.1)(100) == 0.1


@pytest.mark.parametrize(("step", "rate"), [(0, 0.5), (25, 0.375), (50, 0.25), (100, 0.0), (101, 0.0), (10**6, 0.0)])
def test_linear_decay(step, rate):
    assert LinearDecay(0.5, T_max=100)(step) == pytest.approx(rate, abs=1e-15)


@given(schedules, st.integers(0, 20_000), st.integers(0, 20_000))
def test_rates_are_fractions_that_never_rise(schedule, step, later):
    step, later = sorted((step, later))
    assert 0 <= schedule(later) <= schedule(step) <= schedule(0) == schedule.prune_rate


def test_step_density():
    density = StepDensity(start=0.8, end=0.1, at=100)
    assert [density(step) for step in (0, 99, 100, 10**6)] == [0.8, 0.8, 0.1, 0.1]


@pytest.mark.parametrize(
    ("step", "density"),
    [
        (0, 1.0),
        (4, 1.0),
        (6, 0.2 + 0.8 * 0.75**3),
        (8, 0.2 + 0.8 * 0.5**3),
        (11, 0.2 + 0.8 * 0.125**3),
        (12, 0.2),
        (99, 0.2),
    ],
)
def test_cubic_density(step, density):
    assert CubicDensity(start=1.0, end=0.2, begin=4, finish=12)(step) == pytest.approx(density, abs=1e-15)


def test_soft_density_is_above_by_what_the_next_update_prunes():
    density = SoftDensity(0.3, CosineDecay(0.5, 10, eta_min=0.25), finish=10)
    assert [round(density(step), 12) for step in (0, 9, 10, 11)] == [
        0.6,
        round(0.3 / (1 - density.decay(9)), 12),
        0.3,
        0.3,
    ]
    assert SoftDensity(0.8, Constant(0.5), finish=10)(3) == 1.0


@pytest.mark.parametrize("step", [0, 3, 4, 5, 8, 11, 12, 20])
def test_the_sigmoid_density_is_that_of_chtss(step):
    """Between the ends, 1 / (1 + exp(-6 x)) of x in [-1, 1], stretched to [0, 1]."""
    sigmoid = [1 / (1 + math.exp(-6 * x)) for x in (-1, min(max((step - 4) / 4 - 1, -1), 1), 1)]
    share = (sigmoid[1] - sigmoid[0]) / (sigmoid[2] - sigmoid[0])
    assert SigmoidDensity(0.5, 0.1, begin=4, finish=12)(step) == pytest.approx(0.5 - 0.4 * share, abs=1e-12)


def test_limits_of_settings_are_allowed():
    assert CosineDecay(1.0, 1, eta_min=1.0)(5) == Constant(1.0)(5) == 1.0
    assert CubicDensity(1.0, 1.0, 3, 3)(3) == 1.0
    assert [CubicDensity(1.0, 0.1, 5, 5)(step) for step in (0, 4, 5, 9)] == [1.0, 1.0, 0.1, 0.1]


def test_a_rate_of_zero_stays_zero():
    assert {CosineDecay(0.0, 100)(step) for step in range(200)} == {0.0}


def test_equal_settings_make_equal_schedules():
    assert CosineDecay(0.5, 100) == CosineDecay(0.5, 100) != CosineDecay(0.5, 200)
    assert pickle.loads(pickle.dumps(LinearDecay(0.5, 100))) == LinearDecay(0.5, 100)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosineDecay(1.5, 100), r"Expected a prune rate in \[0, 1\], got 1.5"),
        (lambda: CosineDecay(0.5, 100, eta_min=-0.1), r"Expected eta_min in \[0, 1\], got -0.1"),
        (lambda: CosineDecay(1.0, 100, eta_min=1.5), r"Expected eta_min in \[0, 1\], got 1.5"),
        (lambda: SigmoidDensity(0.5, 0.0, 0, 5), r"Expected the density end in \(0, 1\], got 0.0"),
        (lambda: SigmoidDensity(0.5, 0.1, 5, 4), "Expected steps 0 <= begin <= finish, got begin=5 and finish=4"),
        (lambda: SigmoidDensity(0.5, 0.1, 0, 5, k=0), "Expected a positive k below 700, got 0"),
        (lambda: CubicDensity(1.5, 0.1, 0, 5), r"Expected the density start in \(0, 1\], got 1.5"),
        (lambda: CubicDensity(1.0, 0.0, 0, 5), r"Expected the density end in \(0, 1\], got 0.0"),
        (lambda: CubicDensity(1.0, 0.1, 5, 4), "Expected steps 0 <= begin <= finish, got begin=5 and finish=4"),
        (
            lambda: SoftDensity(0.1, LinearDecay(1.0, 10), 5),
            "Expected a prune rate below 1, which leaves weights; got 1.0",
        ),
        (lambda: LinearDecay(-0.1, 100), r"Expected a prune rate in \[0, 1\], got -0.1"),
        (lambda: Constant(math.nan), r"Expected a prune rate in \[0, 1\], got nan"),
        (lambda: StepDensity(0.0, 0.1, 5), r"Expected the density start in \(0, 1\], got 0.0"),
        (lambda: StepDensity(1.0, 1.1, 5), r"Expected the density end in \(0, 1\], got 1.1"),
        (lambda: CosineDecay(0.5, 0), "Expected T_max of at least 1 step, got 0"),
        (lambda: LinearDecay(0.5, -3), "Expected T_max of at least 1 step, got -3"),
        (lambda: Updates(every=-1), "Expected every to be a number of steps, 0 or more, got -1"),
        (lambda: Updates(first=2.5), "Expected first to be a number of steps, 0 or more, got 2.5"),
        (lambda: Updates(last=-3), "Expected last to be a number of steps, 0 or more, got -3"),
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_density_that_cannot_be_called_is_refused():
    with pytest.raises(TypeError, match=r"Expected density to be a function of the step, .* got 0\.1"):
        Updates(density=0.1)


# What a Masking takes


@pytest.mark.parametrize("decay", [0.3, "cosine"])
def test_a_schedule_that_cannot_be_called_is_refused(decay):
    with pytest.raises(TypeError, match=f"Expected prune_rate_decay to be a function .* got {decay!r}"):
        masked(mlp(5, 5), prune_rate_decay=decay)


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_a_schedule_that_leaves_its_range_is_refused(rate):
    masking = masked(mlp(5, 5), prune_rate_decay=lambda step: rate)
    with pytest.raises(ValueError, match=rf"Expected a prune rate in \[0, 1\] at step 0, got {rate}"):
        masking.at_end_of_epoch()


@pytest.mark.parametrize("density", [0, -0.1, 1.5, math.nan])
def test_a_scheduled_density_outside_its_range_is_refused(density):
    model = mlp(20, 30, 10)
    masking = masked(model, updates=Updates(density=lambda step: density))
    train(model, masking, 1)
    before = snapshot(masking)
    with pytest.raises(
        ValueError, match=rf"Expected a density in \(0, 1\] at step 1, got {density} of the density schedule"
    ):
        masking.at_end_of_epoch()
    assert same(before, masking.masks)


# When the masks move


@pytest.mark.parametrize("k", [1, 3])
def test_prune_every_k_steps_moves_the_masks_by_itself(k):
    model = mlp(20, 30, 10)
    masking = masked(model, prune_every_k_steps=k)
    for step in range(1, 26):  # the last one is no multiple of 3
        before = snapshot(masking)
        train(model, masking, 1)
        assert same(before, masking.masks) is bool(step % k)
        assert_masks_hold(masking)
        assert masking.total_nonzero == 180
    before = snapshot(masking)
    masking.at_end_of_epoch()
    assert same(before, masking.masks)


def test_masks_stay_before_the_first_update():
    model = mlp(20, 30, 10)
    masking = masked(model, updates=Updates(every=1, first=3))
    first = snapshot(masking)
    train(model, masking, 2)
    assert same(masking.masks, first)
    train(model, masking, 1)
    assert not same(masking.masks, first)


def test_the_last_update_comes_once():
    model = mlp(10, 20, 10)
    masking = masked(model, growth_mode="random", updates=Updates(last=2))
    train(model, masking, 2)  # arrives
    before = snapshot(masking)
    masking.at_end_of_epoch()
    assert same(before, masking.masks)


def test_the_schedule_arrives_at_the_last_update():
    model = mlp(20, 30, 10)
    schedule = CubicDensity(1.0, 0.1, 0, 7)
    masking = masked(model, None, 1.0, updates=Updates(every=5, last=7, density=schedule))
    counts = []
    for _ in range(12):
        train(model, masking, 1)
        counts.append(masking.total_nonzero)
    assert counts == 4 * [900] + 2 * [round(900 * schedule(5))] + 6 * [90]


@pytest.mark.parametrize(
    ("updates", "expected"),
    [
        (Updates(every=3), [(3, True), (2, True), (1, True), (3, True)]),
        (Updates(every=1), [(1, True)] * 4),
        (Updates(last=2), [(2, False), (1, False), (math.inf, True), (math.inf, True)]),
        (Updates(every=3, last=2), [(2, True), (1, True), (math.inf, True), (math.inf, True)]),
        (Updates(every=3, density=CubicDensity(1.0, 0.1, 0, 2)), [(2, True), (1, True), (1, True), (3, True)]),
        (Updates(every=3, first=3, density=CubicDensity(1.0, 0.1, 0, 2)), [(3, True), (2, True), (1, True), (3, True)]),
        (Updates(density=CubicDensity(1.0, 0.1, 0, 2)), [(math.inf, False)] * 4),
        (Updates(), [(math.inf, False)] * 4),
    ],
)
def test_the_steps_until_the_next_update_are_known(updates, expected):
    assert [updates.ahead(step) for step in range(4)] == expected
    assert [updates.after_step(step) for step in range(1, 5)] == [left == 1 for left, _ in expected]


def test_a_schedule_arrives_between_two_updates():
    model = mlp(20, 30, 10)
    density = CubicDensity(1.0, 0.1, begin=0, finish=7)
    masking = masked(model, None, 1.0, updates=Updates(every=5, density=density))
    train(model, masking, 7)
    assert masking.total_nonzero == 90


def test_the_distance_of_updates_can_be_changed_in_training():
    """As users of release 1.0 do."""
    model = mlp(20, 30, 10)
    masking = masked(model, updates=Updates(first=4, density=Constant(0.2)))
    assert masking.prune_every_k_steps == 0
    masking.prune_every_k_steps = 3
    assert masking.prune_every_k_steps == 3
    moved = []
    for _ in range(9):
        before = snapshot(masking)
        train(model, masking, 1)
        moved.append(not same(before, masking.masks))
    assert moved == [False] * 5 + [True, False, False, True]
    before = snapshot(masking)
    masking.at_end_of_epoch()
    assert same(before, masking.masks)
    masking.prune_every_k_steps = 0
    masking.at_end_of_epoch()
    assert not same(before, masking.masks)
