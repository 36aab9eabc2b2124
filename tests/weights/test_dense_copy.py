"""Inactive weights that keep their values and are trained, in a dense copy."""

import pytest
import torch
from helpers import masked, mlp, train

from sparselearning import Masking
from sparselearning.functions import FunctionError
from sparselearning.grow import GROWTH_FUNCTIONS, dense_magnitude_growth, global_dense_magnitude_growth
from sparselearning.prune import dense_magnitude_prune, global_dense_magnitude_prune
from sparselearning.selection import add_highest
from sparselearning.weights.dense_copy import DenseCopy, dense_weight

T, F = True, False


def kept(weight, mask, weights):
    """Return a linear layer and its Masking, which keeps the weights outside the mask."""
    layer = torch.nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0, weight_decay=0.1)
    modes = dict(prune_mode="dense_magnitude", growth_mode="dense_magnitude", redistribution_mode="none")
    masking = Masking(optimizer, None, **modes, weights=weights)
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


def test_the_exploration_term_decays_weights_where_the_optimizer_maximises():
    layer, masking = kept([[4.0, 0.5, 2.0, 1.0]], [[T, F, F, F]], "kept")
    masking.optimizer.param_groups[0]["maximize"] = True
    layer.weight.grad = torch.tensor([[-1.0, -9.0, 4.0, -9.0]])
    masking.step()
    assert masking.memory["weight"]["dense"][0].tolist() == pytest.approx([4 - 1 - 0.4, 0.5, 2 + 4 - 0.8, 1.0])


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


def test_the_largest_of_a_layer_and_of_the_network():
    model = mlp(3, 1, 3)
    with torch.no_grad():
        model.fc1.weight.copy_(torch.tensor([[0.1, -0.9, 0.3]]))
        model.fc2.weight.copy_(torch.tensor([[0.8], [-0.7], [0.2]]))
    given = {"fc1.weight": torch.tensor([[T, F, T]]), "fc2.weight": torch.tensor([[F], [T], [F]])}
    masking = masked(model, sparse_init=given, prune_rate=0.0, weights="kept")
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


# Whoever writes the weights means it


def through_data(layer, values):
    layer.weight.data.copy_(values)


def in_another_storage(layer, values):
    torch.nn.utils.vector_to_parameters(values.flatten().clone(), layer.parameters())


def into_the_state_dict(layer, values):
    layer.state_dict()["weight"].copy_(values)


def in_place(layer, values):
    with torch.no_grad():
        layer.weight.zero_().add_(values)


def by_loading(layer, values):
    layer.load_state_dict({"weight": values})


def by_an_average(layer, values):
    average = torch.optim.swa_utils.AveragedModel(torch.nn.utils.skip_init(torch.nn.Linear, 4, 1, bias=False))
    average.module.weight.data.copy_(values)
    layer.load_state_dict(average.module.state_dict())


WRITERS = [through_data, in_another_storage, into_the_state_dict, in_place, by_loading, by_an_average]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("weights", ["kept", "soft"])
@pytest.mark.parametrize("apply", [False, True])
def test_what_is_written_into_the_weights_stays_and_trains(write, weights, apply):
    layer, masking = kept([[4.0, -3.0, 2.0, 1.0]], [[T, T, F, F]], weights)
    masking.optimizer.param_groups[0]["weight_decay"] = 0
    written = torch.tensor([[-6.0, 7.0, 0.5, 0.0]])
    write(layer, written)
    if apply:
        masking.apply_mask()
        assert layer.weight.tolist() == [[-6, 7, 0, 0]]
    layer.weight.grad = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    masking.step()
    assert layer.weight.tolist() == [[-7, 7, 0, 0]]
    shrunk = 2.0 if weights == "soft" else 0.0
    assert masking.memory["weight"]["dense"].tolist() == [[-7 - shrunk, 7 + shrunk, 0.5 + shrunk, 1]]
    masking.check()


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("growth", ["dense_magnitude", "random"])
def test_an_update_reads_what_is_written_into_the_weights(write, growth):
    layer, masking = kept([[4.0, -3.0, 2.0, 1.0]], [[T, T, F, F]], "kept")
    masking.grow = GROWTH_FUNCTIONS[growth]
    masking.prune_rate_decay = lambda step: 0.5
    write(layer, torch.tensor([[1.5, 7.0, 0.0, 0.0]]))
    masking.at_end_of_epoch()
    assert layer.weight[0, 1] == 7
    assert masking.memory["weight"]["dense"].tolist() == [[1.5, 7, 2, 1]]
    if growth == "dense_magnitude":
        assert layer.weight.tolist() == [[0, 7, 2, 0]]


@pytest.mark.parametrize("weights", ["kept", "soft"])
def test_weights_that_are_swapped_and_swapped_back_change_nothing(weights):
    def trained(swap):
        torch.manual_seed(3)
        model = mlp(20, 30, 10)
        masking = masked(model, weights=weights, growth_mode="dense_magnitude", prune_mode="dense_magnitude")
        for _ in range(3):
            train(model, masking, 2)
            if swap:
                own = {name: value.clone() for name, value in model.state_dict().items()}
                model.load_state_dict({name: value / 2 for name, value in own.items()})
                model.load_state_dict(own)
            masking.at_end_of_epoch()
        return [layer.memory["dense"] for layer in masking.layers]

    assert all(map(torch.equal, trained(False), trained(True)))


def test_a_random_start_of_weights_that_keep_their_values_is_refused():
    with pytest.raises(ValueError, match="With weights='kept' a weight that grows has the value that it kept; leave"):
        DenseCopy(backward=2.0, regrown="random")


# What goes wrong


@pytest.mark.parametrize("argument", ["prune_mode", "growth_mode"])
def test_modes_that_compare_inactive_weights_need_them_kept(argument):
    with pytest.raises(
        FunctionError, match=r"compares the values of inactive weights: Masking\(\.\.\., weights='kept'\)"
    ):
        masked(mlp(20, 30, 10), **{argument: "dense_magnitude"})


def test_an_own_function_that_asks_for_inactive_weights_needs_them_kept():
    def grow(masking, name, new_mask, total_regrowth, weight):
        return add_highest(dense_weight(masking, name).abs(), new_mask, total_regrowth)

    masking = masked(mlp(20, 30), growth_mode=grow)
    with pytest.raises(FunctionError, match=r"The values of inactive weights of fc1\.weight are not kept"):
        masking.at_end_of_epoch()
