"""Sparsity distributions: the number of active weights of each layer at the start."""

import math

import pytest
from helpers import masked, mlp
from hypothesis import given
from hypothesis import strategies as st
from oracles import distributions as oracle

from sparselearning import models
from sparselearning.models.resnet import RESNETS
from sparselearning.start.distributions import (
    DISTRIBUTIONS,
    divide,
    erdos_renyi,
    erdos_renyi_kernel,
    uniform,
)
from sparselearning.start.maskable import maskable_parameters


def counts_of(shapes, density, distribution):
    """Divide round(density * number of weights) weights among layers of these shapes."""
    sizes = [math.prod(shape) for shape in shapes]
    return divide(round(density * sum(sizes)), [distribution(shape) for shape in shapes], sizes, [1] * len(sizes))


@pytest.mark.parametrize(
    ("distribution", "shape", "share"),
    [
        (uniform, (10, 20), 200),
        (uniform, (4, 2, 3, 3), 72),
        (erdos_renyi, (10, 20), 30),  # n_in + n_out
        (erdos_renyi, (4, 2, 3, 3), 54),  # (n_in + n_out) * 9 positions
        (erdos_renyi_kernel, (10, 20), 30),
        (erdos_renyi_kernel, (4, 2, 3, 3), 12),  # n_in + n_out + 3 + 3
    ],
)
def test_shares(distribution, shape, share):
    assert distribution(shape) == share


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        (uniform, [11760, 1500, 50]),  # 5% of each
        (erdos_renyi, [9051, 3340, 919]),  # 13310 * 1084/1594, 400/1594 and 110/1594
        (erdos_renyi_kernel, [9051, 3340, 919]),  # the same without kernels
    ],
)
def test_lenet300_100_at_five_percent(distribution, expected):
    assert counts_of([(300, 784), (100, 300), (10, 100)], 0.05, distribution) == expected
    assert sum(expected) == round(0.05 * 266_200)


@pytest.mark.parametrize(
    ("distribution", "expected"),
    [
        (uniform, [25, 1250, 20000, 250]),
        (erdos_renyi, [500, 10335, 7678, 3012]),  # 21 * 25, 70 * 25, 1300, 510: the first layer is full
        (erdos_renyi_kernel, [363, 937, 15225, 5000]),  # 31, 80, 1300, 510: the last layer is full
    ],
)
def test_lenet5_at_five_percent(distribution, expected):
    shapes = [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)]
    assert counts_of(shapes, 0.05, distribution) == expected
    assert sum(expected) == round(0.05 * 430_500)


@pytest.mark.parametrize("density", [0.01, 0.05, 0.1, 0.2, 0.5])
@pytest.mark.parametrize("name", ["lenet300-100", "lenet5", "wrn-22-8", "resnet50"])
def test_erdos_renyi_kernel_is_the_published_rule_to_two_weights(name, density):
    model = RESNETS[name](1000) if name in RESNETS else models.build(name)
    shapes = [weight.shape for _, weight in maskable_parameters(model)]
    ours = counts_of(shapes, density, erdos_renyi_kernel)
    assert max(abs(a - b) for a, b in zip(ours, oracle.erdos_renyi_kernel(shapes, density), strict=True)) <= 2


def test_what_a_full_layer_cannot_take_goes_to_the_others():
    # A third each would be 30; the layer of 10 weights is full, the others take 40 each.
    assert counts_of([(10, 20), (10, 20), (2, 5)], 90 / 410, lambda shape: 1.0) == [40, 40, 10]


def test_no_layer_starts_empty():
    assert counts_of([(100, 100), (2, 5), (1, 3)], 0.005, uniform) == [48, 1, 1]


def test_two_weights_cannot_fill_three_layers_so_there_are_three():
    with pytest.warns(UserWarning, match="A density of 2 of 300 weights"):
        assert counts_of([(10, 10), (10, 10), (10, 10)], 2 / 300, uniform) == [1, 1, 1]


shapes = st.lists(st.lists(st.integers(1, 12), min_size=2, max_size=4), min_size=1, max_size=6)


@pytest.mark.filterwarnings("ignore:A density of")
@given(shapes, st.floats(0.001, 1), st.sampled_from(list(DISTRIBUTIONS.values())))
def test_the_total_is_exact_and_no_layer_overflows(shapes, density, distribution):
    counts = counts_of(shapes, density, distribution)
    sizes = [math.prod(shape) for shape in shapes]
    assert sum(counts) == max(round(density * sum(sizes)), len(sizes))
    assert all(1 <= count <= size for count, size in zip(counts, sizes, strict=True))


@pytest.mark.parametrize("init", [*DISTRIBUTIONS, lambda shape: 1.0], ids=[*DISTRIBUTIONS, "function"])
@pytest.mark.parametrize("density", [0.02, 0.1, 0.5, 0.9, 1.0])
def test_masks_hold_the_counts_of_the_distribution(init, density):
    model = mlp(30, 40, 10)
    masking = masked(model, density=density, sparse_init=init)
    distribution = DISTRIBUTIONS.get(init, init)
    expected = counts_of([(40, 30), (10, 40)], density, distribution)
    assert list(masking.name2nonzeros.values()) == expected
    assert [int(mask.sum()) for mask in masking.masks.values()] == expected
    assert masking.total_nonzero == round(density * 1600)
