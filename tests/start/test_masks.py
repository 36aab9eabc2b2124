"""The first masks: drawn at random or read from the weights; and densities that are refused."""

import copy

import pytest
import torch
from helpers import masked, mlp, same, snapshot


def test_different_seeds_draw_different_masks_and_equal_seeds_equal_ones():
    def draw(seed):
        torch.manual_seed(seed)
        return snapshot(masked(mlp(20, 30, 10)))

    assert same(draw(1), draw(1))
    assert not same(draw(1), draw(2))


def test_resume_takes_the_nonzeros_as_they_are():
    model = mlp(20, 30, 10)
    first = masked(model, density=0.1)
    again = masked(copy.deepcopy(model), density=0.7, sparse_init="resume")
    assert same(first.masks, again.masks)
    assert again.baseline_nonzero == 90


def test_one_weight_stays_in_every_layer_where_the_density_leaves_less():
    model = mlp(10, 10, 10, 10, 10)
    with pytest.warns(UserWarning, match=r"A density of 2 of 400 weights leaves less than one in each of 4 layers"):
        masking = masked(model, density=0.005)
    assert [layer.nonzeros for layer in masking.layers] == [1, 1, 1, 1]
    masking.check()


@pytest.mark.parametrize("density", [0, -0.1, 1.5, float("nan")])
def test_a_density_outside_its_range_is_refused(density):
    with pytest.raises(ValueError, match=r"Expected a density in \(0, 1\], got"):
        masked(mlp(5, 5), density=density)


def test_a_density_that_leaves_no_weight_is_refused():
    with pytest.raises(ValueError, match=r"A density of 0.001 leaves none of 25 weights"):
        masked(mlp(5, 5), density=0.001)


def test_an_unknown_sparse_init_is_refused():
    # Release 1.0 left all masks at zero.
    names = "'constant', 'linear', 'erdos_renyi_kernel', 'resume'"
    with pytest.raises(ValueError, match=f"Unknown sparse_init 'Constant'. Pass a function, or one of {names}"):
        masked(mlp(5, 5), sparse_init="Constant")
