"""Small networks, optimizers and loops that the tests share."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from sparselearning import Masking

TORCH = tuple(int(number) for number in torch.__version__.split(".")[:2])


def needs_torch(major, minor, what):
    """Return the mark of tests of what older versions of torch cannot do."""
    return pytest.mark.skipif((major, minor) > TORCH, reason=f"{what} needs torch {major}.{minor}")


def mlp(*widths):
    """Return linear layers of these widths, named fc1, fc2, ..., with ReLU between them."""
    model = nn.Sequential()
    for i, (n_in, n_out) in enumerate(pairwise(widths), start=1):
        model.add_module(f"fc{i}", nn.Linear(n_in, n_out))
        if i < len(widths) - 1:
            model.add_module(f"relu{i}", nn.ReLU())
    return model


def sgd(*modules, **settings):
    """Return SGD with momentum for the parameters of these modules."""
    parameters = [parameter for module in modules for parameter in module.parameters()]
    return torch.optim.SGD(parameters, **({"lr": 0.1, "momentum": 0.9} | settings))


def masked(model, optimizer=None, density=0.2, sparse_init="constant", pattern=None, rescale=False, sparse=(), **modes):
    """Return a Masking on the model; its optimizer is SGD with momentum unless one is given."""
    optimizer = optimizer or sgd(model)
    modes = {"prune_rate_decay": None, "prune_rate": 0.5} | modes
    masking = Masking(optimizer, **modes)
    masking.add_module(model, density, sparse_init, pattern=pattern, rescale=rescale, sparse=sparse)
    return masking


def batch_for(model, size=8):
    """Return random inputs for a model whose first layer is linear."""
    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    return torch.randn(size, first.in_features, dtype=first.weight.dtype)


def backward(model, inputs=None):
    """Clear the gradients, then fill them with those of a loss that depends on every weight."""
    model.zero_grad()
    output = model(batch_for(model) if inputs is None else inputs)
    (output.float() - 1).square().mean().backward()


def train(model, stepper, steps=3, inputs=None):
    """Step an optimizer (or a Masking) on random data."""
    for _ in range(steps):
        backward(model, inputs)
        stepper.step()


def assert_masks_hold(masking):
    """Assert that inactive weights are exactly zero and that the counts are those of the masks."""
    for layer in masking.layers:
        inactive = layer.weight[~layer.mask]
        assert torch.equal(inactive, torch.zeros_like(inactive)), f"{layer.name} has inactive weights that are not zero"
        assert layer.nonzeros == layer.mask.sum() == masking.name2nonzeros[layer.name]
        assert layer.zeros == (~layer.mask).sum() == masking.name2zeros[layer.name]


def snapshot(masking):
    """Return copies of the masks by name."""
    return {name: mask.clone() for name, mask in masking.masks.items()}


def same(masks, others):
    """Tell whether two dicts hold the same tensors, bit for bit."""
    return masks.keys() == others.keys() and all(torch.equal(masks[name], others[name]) for name in masks)


def layer_with(weight, mask=None, momentum=None, prune_rate=0.5, **modes):
    """Return a Masking on one linear layer with these weights, mask and momentum, ready for an update."""
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    masking = masked(layer, density=1.0, prune_rate=prune_rate, **modes)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
    if mask is not None:
        masking.masks["weight"].copy_(torch.tensor(mask))
    if momentum is not None:
        masking.optimizer.state[layer.weight]["momentum_buffer"] = torch.tensor(momentum)
    masking.load_state_dict(masking.state_dict())  # counts and applies the mask
    masking.baseline_nonzero = masking.total_nonzero
    masking.layers[0].prune_rate = prune_rate
    return masking


def two_layers(first, second, prune_rate=0.5):
    """Return a Masking on two linear layers with these weights, all active, ready for an update."""
    model = mlp(len(first), 1, len(second))
    with torch.no_grad():
        model.fc1.weight.copy_(torch.tensor([first]))
        model.fc2.weight.copy_(torch.tensor(second).unsqueeze(1))
    masking = masked(model, density=1.0, prune_rate=prune_rate)
    for layer in masking.layers:
        layer.prune_rate = prune_rate
    return masking


def pruned(function, masking):
    """Return the mask that a prune function leaves of the only layer, as a list."""
    layer = masking.layers[0]
    return function(masking, layer.mask, layer.weight, layer.name).tolist()


def grown(function, masking, count):
    """Return the mask of the only layer after a growth function added `count` weights, as a list."""
    layer = masking.layers[0]
    return function(masking, layer.name, layer.mask, count, layer.weight).tolist()


def flat(masks):
    """Return masks by name as a list of flat lists."""
    return [mask.flatten().tolist() for mask in masks.values()]
