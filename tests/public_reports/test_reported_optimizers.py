"""What users of other libraries reported of optimizers: weights that come back, gradients, steps that do not count.

A comment above each test names the report: project and number on GitHub.
"""

import pytest
import torch
from helpers import assert_masks_hold, backward, batch_for, masked, mlp, sgd, train
from torch import nn

from sparselearning import Masking

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1, weight_decay=0.1),
    "RMSprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.1, momentum=0.9, weight_decay=0.1),
}


# ruihangdu/PyTorch-Deep-Compression#2, he-y/filter-pruning-geometric-median#47, jacobgil/pytorch-pruning#41:
# gradients are masked, but the momentum of weights that have just been pruned brings them back.
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_momentum_brings_no_pruned_weight_back(name):
    model = mlp(20, 30, 10)
    optimizer = OPTIMIZERS[name](model.parameters())
    train(model, optimizer, 5)  # momenta of all weights
    masking = masked(model, optimizer, density=0.3)
    for _ in range(3):
        train(model, optimizer, 2)
        assert_masks_hold(masking)
        masking.at_end_of_epoch()
        assert_masks_hold(masking)


# OPTML-Group/Unlearn-Saliency#32: weight decay changes weights whose gradient was masked.
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_weight_decay_leaves_zeros_alone(name):
    model = mlp(20, 30, 10)
    optimizer = OPTIMIZERS[name](model.parameters())
    masking = masked(model, optimizer)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        assert_masks_hold(masking)


# TimDettmers/sparse_learning#16, Eric-mingjie/rethinking-network-pruning#23: is backpropagation that of the sparse
# network, if gradients are not masked?
def test_backpropagation_is_that_of_the_sparse_network():
    model = mlp(20, 30, 10)
    masking = masked(model)
    other = mlp(20, 30, 10)
    other.load_state_dict(model.state_dict())
    inputs = batch_for(model).requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs).square().mean(), inputs)
    weights = {name: weight * masking.masks.get(name, 1) for name, weight in other.named_parameters()}
    output = torch.func.functional_call(other, weights, (inputs,))
    assert torch.equal(gradient, torch.autograd.grad(output.square().mean(), inputs)[0])


# Eric-mingjie/rethinking-network-pruning#13: a mask of the nonzero weights freezes an active weight that becomes zero.
def test_an_active_weight_that_becomes_zero_goes_on_training():
    model = mlp(20, 30, 10)
    masking = masked(model)
    mask = masking.masks["fc1.weight"]
    with torch.no_grad():
        model.fc1.weight.zero_()
        model.fc1.bias.fill_(1.0)
    train(model, masking, 1)
    assert (model.fc1.weight[mask] != 0).any()
    assert masking.name2nonzeros["fc1.weight"] == mask.sum()


# NVIDIA/apex#1387: the masks were all True, and after many epochs no weight was zero.
def test_weights_are_sparse_from_the_first_step_to_the_last():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Flatten(), nn.Linear(256, 10))
    masking = masked(model, sgd(model, lr=0.01), density=0.1)
    size = sum(mask.numel() for mask in masking.masks.values())
    for _ in range(4):
        zeros = sum(int((layer.weight == 0).sum()) for layer in masking.layers)
        assert zeros >= size - masking.total_nonzero == size - round(0.1 * size)
        train(model, masking, 1, torch.randn(4, 3, 8, 8))
        masking.at_end_of_epoch()


# openvinotoolkit/nncf#199, neuralmagic/sparseml#1438: frozen layers end in an error, because they have no gradient.
@pytest.mark.parametrize("method", ["rigl", "sparse_momentum"])
def test_frozen_layers_stay_dense_and_raise_nothing(method):
    model = mlp(20, 30, 30, 10)
    model.fc1.requires_grad_(False)
    before = model.fc1.weight.clone()
    parts = {} if method == "sparse_momentum" else {"prune_every_k_steps": 2}
    masking = Masking.from_method(method, model, sgd(model), total_steps=10, density=0.2, **parts)
    train(model, masking, 6)
    masking.at_end_of_epoch()
    assert list(masking.masks) == ["fc2.weight", "fc3.weight"]
    assert masking.kept_dense["fc1.weight"][1] == "frozen"
    assert torch.equal(model.fc1.weight, before)


# TimDettmers/sparse_learning#24: does a Masking replace the scheduler of the learning rate?
def test_a_learning_rate_scheduler_goes_its_own_way():
    model = mlp(20, 30, 10)
    optimizer = sgd(model)
    masking = masked(model, optimizer)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for step in range(3):
        backward(model)
        masking.step()
        scheduler.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1 * 0.5 ** (step + 1))
        masking.at_end_of_epoch()
    assert_masks_hold(masking)


# TimDettmers/sparse_learning#8: prune_every_k_steps is used together with at_end_of_epoch; neuralmagic/sparseml#1090:
# the pruning at the start is done twice.
def test_masks_that_move_by_steps_move_once():
    model = mlp(20, 30, 10)
    masking = masked(model, prune_every_k_steps=4)
    moves, truncate = [], masking.truncate_weights
    masking.truncate_weights = lambda: (moves.append(masking.steps), truncate())
    for _ in range(4):
        train(model, masking, 2)
        masking.at_end_of_epoch()
    assert moves == [4, 8]


# intel/neural-compressor#1250: gradual pruning ends with masks of another density than the one asked for.
@pytest.mark.parametrize("method", ["gmp", "granet"])
def test_gradual_pruning_ends_with_the_density_asked_for(method):
    model = mlp(20, 30, 10)
    masking = Masking.from_method(
        method, model, sgd(model, lr=0.01), total_steps=21, density=0.1, prune_every_k_steps=4
    )
    train(model, masking, 21)
    assert masking.total_nonzero == round(0.1 * 900)
    assert_masks_hold(masking)


# Eric-mingjie/rethinking-network-pruning#18, GATECH-EIC/Early-Bird-Tickets#1, zejiangh/Filter-GaP#6: a threshold for
# the whole network removes a layer entirely, and the accuracy is that of chance.
def test_pruning_over_the_whole_network_empties_no_layer():
    model = mlp(20, 30, 30, 10)
    with torch.no_grad():
        model.fc2.weight.mul_(1e-6)
    masking = Masking.from_method("gmp", model, sgd(model, lr=1e-9), total_steps=8, density=0.05, prune_every_k_steps=2)
    train(model, masking, 8)
    assert min(masking.name2nonzeros.values()) > 0
    assert masking.total_nonzero == round(0.05 * 1800)
