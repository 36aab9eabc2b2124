"""Prune-rate schedules."""

import math
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparselearning.schedules import Constant, CosineDecay, CubicDensity, LinearDecay, SoftDensity, StepDensity

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


def test_limits_of_settings_are_allowed():
    assert CosineDecay(1.0, 1, eta_min=1.0)(5) == Constant(1.0)(5) == 1.0
    assert CubicDensity(1.0, 1.0, 3, 3)(3) == 1.0


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
        (lambda: CubicDensity(1.5, 0.1, 0, 5), r"Expected the density start in \(0, 1\], got 1.5"),
        (lambda: CubicDensity(1.0, 0.0, 0, 5), r"Expected the density end in \(0, 1\], got 0.0"),
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
    ],
)
def test_impossible_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
