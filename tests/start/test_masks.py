"""The first masks: drawn at random or read from the weights; and densities that are refused."""

import copy

import pytest
import torch
from helpers import masked, mlp, same, snapshot, train


def test_different_seeds_draw_different_masks_and_equal_seeds_equal_ones():
    def draw(seed):
        torch.manual_seed(seed)
        return snapshot(masked(mlp(20, 30, 10)))

    assert same(draw(1), draw(1))
    assert not same(draw(1), draw(2))


def saved(density=0.1, **modes):
    """Return a trained model as it is saved right after an update, and its Masking."""
    model = mlp(20, 30, 10) if "pattern" not in modes else mlp(20, 32, 10)
    masking = masked(model, density=density, **modes)
    train(model, masking)
    masking.at_end_of_epoch()
    return model, masking


def nonzeros(model):
    return {name: weight != 0 for name, weight in model.named_parameters() if "weight" in name}


def test_resume_takes_the_nonzeros_as_they_are():
    model = mlp(20, 30, 10)
    first = masked(model, density=0.1)
    again = masked(copy.deepcopy(model), density=0.1, sparse_init="resume")
    assert same(first.masks, again.masks)
    assert again.baseline_nonzero == 90


def test_resume_fills_up_to_the_density_with_weights_that_had_just_grown():
    model, first = saved()
    found = nonzeros(model)
    number = sum(int(mask.sum()) for mask in found.values())
    assert number < 60, "half of the 90 were pruned, few of them grew again at once"
    message = f"^{number} of 900 weights are not zero, and a density of 0.1 asks for 90: {90 - number} zeros, drawn"
    with pytest.warns(UserWarning, match=message):
        again = masked(copy.deepcopy(model), density=0.1, sparse_init="resume")
    assert again.total_nonzero == again.baseline_nonzero == first.total_nonzero == 90
    for name, mask in found.items():
        assert (again.masks[name] >= mask).all()
        assert again.name2nonzeros[name] == pytest.approx(90 * int(mask.sum()) / number, abs=1), "in proportion"


def test_resume_fills_up_each_density_of_its_own_and_leaves_no_layer_empty():
    model, _ = saved(density={"fc1": 0.1, "*": 0.2})
    with torch.no_grad():
        model.fc2.weight.zero_()
    with pytest.warns(UserWarning, match="asks for 60: "):
        again = masked(copy.deepcopy(model), density={"fc1": 0.1, "*": 0.2}, sparse_init="resume")
    assert again.name2nonzeros == {"fc1.weight": 60, "fc2.weight": 60}
    number = int(model.fc1.weight.count_nonzero())
    with pytest.warns(UserWarning, match=f"{number} of 900 weights are not zero, .*: 1 zeros, drawn at random"):
        again = masked(copy.deepcopy(model), density=number / 900, sparse_init="resume")
    assert again.name2nonzeros == {"fc1.weight": number, "fc2.weight": 1}


def test_resume_keeps_more_nonzeros_than_the_density_and_says_so():
    model = mlp(20, 30, 10)
    first = masked(model, density=0.1)
    message = "90 of 900 weights are not zero, .* asks for 45: all of them stay active. .* have the density 0.1"
    with pytest.warns(UserWarning, match=message):
        again = masked(copy.deepcopy(model), density=0.05, sparse_init="resume")
    assert same(first.masks, again.masks)


@pytest.mark.parametrize(("pattern", "density"), [("2:4", 0.5), ("block:2x2", 0.2), ("fan-in", 0.2)])
def test_resume_fills_up_whole_patterns(pattern, density):
    model, first = saved(density, pattern=pattern)
    with pytest.warns(UserWarning, match="drawn at random"):
        again = masked(copy.deepcopy(model), density=density, sparse_init="resume", pattern=pattern)
    assert again.total_nonzero == first.total_nonzero
    assert all(layer.pattern.holds(layer.mask) for layer in again.layers)


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
    names = "'constant', 'linear', 'erdos_renyi_kernel', 'magnitude'"
    with pytest.raises(ValueError, match=f"Unknown sparse_init 'Constant'. Pass a function, or one of {names}"):
        masked(mlp(5, 5), sparse_init="Constant")
