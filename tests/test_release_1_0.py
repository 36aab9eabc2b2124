"""Release 1.0: its defects are gone, its names are here, and functions written for it run unchanged.

Each of the first tests fails on what 1.0 did. That replicas draw and keep the same masks is in test_processes.py.
"""

import math

import pytest
import torch
from helpers import assert_masks_hold, backward, layer_with, masked, mlp, same, snapshot, train
from torch import nn

import sparselearning.core
from sparselearning import Masking
from sparselearning.core import CosineDecay, LinearDecay
from sparselearning.experiments.data import in_memory as data
from sparselearning.funcs import growth_funcs, prune_funcs, redistribution_funcs

T, F = True, False

# What 1.0 did, and what is done now


def test_set_prunes_the_rate_asked_for_and_leaves_positive_weights():
    # 1.0 removed 75% at rate 0.5, all positive weights among them.
    weight = torch.linspace(-1, 1, 40).roll(7).tolist()
    masking = layer_with([weight], prune_rate=0.5)
    kept = prune_funcs["SET"](masking, masking.masks["weight"], masking.layers[0].weight, "weight")
    assert kept.sum() == 20
    assert torch.tensor([weight])[kept].sign().sum() == 0  # ten of each sign


def test_a_checkpoint_holds_masks_steps_and_the_place_in_the_schedule():
    # 1.0 saved none of them: resuming drew new masks on a sparse model, and began the schedule anew.
    model = mlp(20, 30, 10)
    decay = CosineDecay(0.5, T_max=10)
    masking = masked(model, prune_rate_decay=decay)
    train(model, masking, 6)
    masking.at_end_of_epoch()
    resumed = masked(mlp(20, 30, 10), prune_rate_decay=decay)
    resumed.load_state_dict(masking.state_dict())
    assert same(resumed.masks, masking.masks)
    assert (resumed.steps, resumed.prune_rate) == (6, decay(6))
    assert resumed.prune_rate != decay(0)


def test_negative_importance_makes_no_layer_dense():
    # 1.0 took it for a negative regrowth, and sliced `idx[:-n]`: all but n of the layer grew.
    def signed_momentum(masking, name, weight, mask):
        return -1.0 if name == "fc1.weight" else 0.5

    model = mlp(20, 30, 10)
    masking = masked(model, redistribution_mode=signed_momentum)
    train(model, masking)
    masking.at_end_of_epoch()
    assert masking.name2nonzeros == {"fc1.weight": 60, "fc2.weight": 120}


def test_bf16_weights_stay_bf16():
    # The product with an fp32 mask turned them to fp32.
    model = mlp(20, 30, 10).bfloat16()
    masking = masked(model)
    train(model, masking)
    assert model.fc1.weight.dtype == torch.bfloat16


def test_a_step_leaves_weights_where_they_are_in_memory():
    # `weight.data = weight.data * mask` gave them new storage every step.
    model = mlp(20, 30, 10)
    masking = masked(model)
    addresses = [parameter.data_ptr() for parameter in model.parameters()]
    train(model, masking)
    assert [parameter.data_ptr() for parameter in model.parameters()] == addresses


def test_an_overflow_in_a_pruned_place_becomes_zero():
    # inf * 0 = nan
    masking = layer_with([[1.0, 2.0]], [[T, F]])
    with torch.no_grad():
        masking.layers[0].weight[0, 1] = torch.inf
    masking.apply_mask()
    assert masking.layers[0].weight.tolist() == [[1.0, 0.0]]


def test_norms_activations_and_embeddings_stay_dense():
    model = nn.Sequential(
        nn.Embedding(5, 8), nn.LayerNorm(8), nn.GroupNorm(3, 3), nn.PReLU(3), nn.Linear(8, 8), nn.BatchNorm1d(3)
    )
    masking = masked(model)
    assert list(masking.masks) == ["4.weight"]


def test_an_unknown_sparse_init_is_refused():
    # 1.0 left all masks at zero.
    with pytest.raises(ValueError, match="Unknown sparse_init 'Constant'"):
        masked(mlp(5, 5), sparse_init="Constant")


@pytest.mark.parametrize("init", ["constant", "linear", "erdos_renyi_kernel"])
def test_the_number_of_active_weights_is_exact(init):
    # Erdos-Renyi was up to 14% short where a layer was full; the others were drawn weight by weight.
    model = mlp(200, 100, 3)
    assert masked(model, density=0.1, sparse_init=init).total_nonzero == 2030


def test_random_growth_is_exact():
    # 1.0 drew every weight for itself and steered the average with a controller.
    model = mlp(20, 30, 10)
    masking = masked(model, growth_mode="random")
    for _ in range(5):
        train(model, masking, 1)
        masking.at_end_of_epoch()
        assert masking.total_nonzero == 180


def test_momentum_growth_does_not_count_active_weights():
    # 1.0 set the score of active weights to 0, where they tied with inactive ones of momentum 0.
    masking = layer_with([[1.0, 1.0, 0.0, 0.0]], [[T, T, F, F]], momentum=[[5.0, 5.0, 0.0, 0.0]])
    layer = masking.layers[0]
    assert growth_funcs["momentum"](masking, "weight", layer.mask, 2, layer.weight).all()


def test_momentum_neuron_grows_its_total():
    # 1.0 gave neurons of fewer than ten new weights none, and lost what a neuron had no room for.
    model = mlp(20, 30, 10)
    masking = masked(model, growth_mode="momentum_neuron")
    train(model, masking)
    masking.at_end_of_epoch()
    assert masking.total_nonzero == 180


def test_global_pruning_is_exact():
    # 1.0 searched for a threshold until the count was 2% right, or gave up.
    model = mlp(20, 30, 10)
    masking = masked(model, prune_mode="global_magnitude", prune_rate=0.3)
    train(model, masking)
    masking.at_end_of_epoch()
    assert masking.total_removed == math.ceil(0.3 * 120) + math.ceil(0.3 * 60)


def test_schedules_stay_at_their_end():
    # CosineDecay rose again after T_max; LinearDecay went below zero.
    assert CosineDecay(0.5, T_max=10)(20) == 0.005
    assert LinearDecay(0.5, T_max=10)(20) == 0


@pytest.mark.parametrize("prune_mode", prune_funcs)
def test_a_prune_rate_of_zero_keeps_active_zeros(prune_mode):
    # 1.0 returned `weight != 0`, which dropped the newly grown.
    masking = layer_with([[0.0, 1.0, 0.0, 2.0]], [[T, T, F, T]], prune_rate=0.0, prune_mode=prune_mode, inactive="kept")
    masking.layers[0].weight.grad = torch.zeros(1, 4)
    masking.at_end_of_epoch()
    assert masking.masks["weight"].tolist() == [[T, T, F, T]]


def test_validation_images_are_not_augmented():
    digits = data.load("digits")
    part = data.Split(digits.valid.images[:5], digits.valid.labels[:5])
    (first, _), (again, _) = (next(data.batches(part, 5, mean=digits.mean, std=digits.std)) for _ in range(2))
    assert torch.equal(first, again)
    pixels = (part.images / 255 - digits.mean[0]) / digits.std[0]
    torch.testing.assert_close(first, pixels)


def test_fp16_momentum_is_that_of_the_master_of_the_same_weight():
    # 1.0 asked the optimizer for the state of the fp16 copy, which it does not step.
    model = mlp(20, 30, 10).half()
    masters = [parameter.detach().float() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(masters, lr=0.1, momentum=0.9)
    optimizer.fp16_groups, optimizer.fp32_from_fp16_groups = [list(model.parameters())], [masters]
    masking = Masking(optimizer, None, fp16=True)
    masking.add_module(model, 0.2)
    for i, master in enumerate(masters):
        master.grad = torch.full_like(master, i)
    masking.step()
    assert masking.get_momentum_for_weight(model.fc1.weight).unique().tolist() == [0]
    assert masking.get_momentum_for_weight(model.fc2.weight).unique().tolist() == [2]
    assert_masks_hold(masking)


def test_training_needs_no_gpu():
    model = mlp(20, 30, 10)
    masking = masked(model)
    train(model, masking)
    masking.at_end_of_epoch()
    assert {mask.device.type for mask in masking.masks.values()} == {"cpu"}


def test_sgd_without_momentum_is_told_what_works():
    # 1.0 ended in an UnboundLocalError, at the first update.
    model = mlp(20, 30, 10)
    with pytest.raises(RuntimeError, match="growth_mode='random'"):
        masked(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_an_update_before_the_first_step_runs():
    masking = masked(mlp(20, 30, 10))
    masking.at_end_of_epoch()
    assert masking.total_nonzero == 180


def test_an_update_runs_with_an_empty_layer():
    # The mean over no weights was NaN, and so was the regrowth.
    model = mlp(20, 30, 10)
    with torch.no_grad():
        model.fc2.weight.zero_()
    masking = masked(model, sparse_init="resume")
    train(model, masking)
    masking.at_end_of_epoch()
    assert masking.total_nonzero == 600


# Names and signatures of 1.0


def test_the_signatures_of_1_0_are_taken_by_position():
    model = mlp(20, 30, 10)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    masking = Masking(optimizer, CosineDecay(0.5, 100), 0.5, "SET", "random", "nonzero")
    masking.add_module(model, 0.1, "linear")
    masking.remove_weight_partial_name(partial_name="bias")
    masking.remove_type(nn.BatchNorm2d)
    masking.remove_weight("fc2")
    masking.prune_every_k_steps = 2
    train(model, masking, 4)
    masking.print_nonzero_counts()
    assert masking.get_momentum_for_weight(model.fc1.weight).shape == (30, 20)
    assert_masks_hold(masking)


def test_the_paths_of_1_0_hold_its_names():
    assert sparselearning.core.add_sparse_args
    assert {"magnitude", "SET", "threshold", "global_magnitude"} <= prune_funcs.keys()
    assert {"momentum", "random", "momentum_neuron", "global_momentum_growth"} <= growth_funcs.keys()
    assert {"momentum", "magnitude", "nonzero", "none"} <= redistribution_funcs.keys()


# Functions in the shape of 1.0's tutorial

pytestmark = pytest.mark.filterwarnings("ignore:indexing with dtype torch.uint8")  # of torch, to who uses .byte()


def largest_momentum(masking, name, weight, mask):
    """A Python number, by way of the optimizer's state and a byte index."""
    return masking.optimizer.state[weight]["momentum_buffer"][mask.byte()].abs().max().item()


def gradient_variance(masking, name, weight, mask):
    """A 0-d tensor, by way of the gradient."""
    return torch.var(weight.grad[mask.byte()])


def share_of_layer(masking, name, weight, mask):
    """From the counts of the layer and the network."""
    return masking.name2nonzeros[name] / (masking.total_nonzero + masking.total_zero) + masking.name2variance[name]


def smallest_in_place(masking, mask, weight, name):
    """Sort everything, edit the mask in place through .data and a flat view."""
    count = math.ceil(masking.name2prune_rate[name] * masking.name2nonzeros[name])
    if count == 0:
        return weight.data != 0.0
    importance = torch.abs(weight.data) * mask
    importance[mask == 0] = 0.0
    _, order = torch.sort(importance.view(-1))
    mask.data.view(-1)[order[: masking.name2zeros[name] + count]] = 0.0
    return mask


def beyond_a_threshold(masking, mask, weight, name):
    """A new mask of floats."""
    cut = weight.data[mask.byte()].abs().median().item()
    return (weight.data.abs() > cut).float()


def largest_in_place(masking, name, new_mask, total_regrowth, weight):
    """Edit the new mask in place through .data and a flat view."""
    score = masking.get_momentum_for_weight(weight).abs() * (new_mask == 0).float()
    _, order = torch.sort(score.flatten(), descending=True)
    new_mask.data.view(-1)[order[:total_regrowth]] = 1.0
    return new_mask


def coin_flips(masking, name, new_mask, total_regrowth, weight):
    """A new mask of bytes, about as many as asked for."""
    free = (new_mask == 0).sum().item()
    if free == 0:
        return new_mask
    return new_mask.byte() | (torch.rand(new_mask.shape) < total_regrowth / free)


def row_by_row(masking, name, new_mask, total_regrowth, weight):
    """Edit one row after the other; fewer than asked for, from what was pruned here."""
    for i in range(new_mask.shape[0]):
        new_mask[i] = new_mask[i] | (torch.rand(new_mask.shape[1:]) < masking.name2removed[name] / new_mask.numel())
    return new_mask


@pytest.mark.parametrize("growth", [largest_in_place, coin_flips, row_by_row])
@pytest.mark.parametrize("redistribution", [largest_momentum, gradient_variance, share_of_layer])
@pytest.mark.parametrize("prune", [smallest_in_place, beyond_a_threshold])
def test_functions_written_for_1_0_run_unchanged(prune, redistribution, growth):
    model = mlp(20, 30, 10)
    masking = masked(model, prune_mode=prune, redistribution_mode=redistribution, growth_mode=growth)
    before = snapshot(masking)
    for _ in range(3):
        train(model, masking, 2)
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
        assert sum(masking.name2variance.values()) == pytest.approx(1)
        assert masking.total_removed > 0
    assert not same(before, masking.masks)
    if growth is largest_in_place:
        assert masking.total_nonzero == 180
    elif growth is coin_flips:
        assert masking.total_nonzero == pytest.approx(180, rel=0.25)


def test_in_place_functions_equal_the_built_in_ones():
    def trained(prune, growth):
        torch.manual_seed(5)
        model = mlp(20, 30, 10)
        masking = masked(model, prune_mode=prune, growth_mode=growth)
        train(model, masking, 4)
        masking.at_end_of_epoch()
        backward(model)
        return masking.masks

    assert same(trained(smallest_in_place, largest_in_place), trained("magnitude", "momentum"))
