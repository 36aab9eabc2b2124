"""Sparse models to convert, and what they are compared with."""

import torch
from helpers_sparse import sparse_weight
from torch import nn

from sparselearning.sparse.in_place import Times
from sparselearning.sparse.modules import SparseModule
from sparselearning.sparse.trees import alone, arguments_of, copied
from sparselearning.sparse.verification import difference, run

LAYERS = (nn.Conv2d, nn.Linear, SparseModule)


def sparsify(model, density=0.05):
    """Zero most weights and give batch norms statistics of their own."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.weight.copy_(sparse_weight(module.weight.shape, density))
                module.weight.mul_((density * max(module.weight[:1].numel(), 1)) ** -0.5)
            elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.SyncBatchNorm):
                for tensor in (module.weight, module.bias, module.running_mean):
                    if tensor is not None:
                        tensor.uniform_(-0.5, 1)
                if module.running_var is not None:
                    module.running_var.uniform_(0.5, 2)
    return model.eval()


def turns_by(cost, rest=lambda modules: 0.0):
    """Return what stands for `in_place.time_in_turns`: models run once, and take what their layers cost.

    cost(modules, place) is the milliseconds of the layer modules[place], alone and until the next layer; rest(modules)
    those that the model takes beside its layers.
    """

    def time_in_turns(models, places, arguments, seconds, least=2, show=None):
        args, kwargs = copied(arguments)
        found = []
        for model in models:
            model(*args, **kwargs)
            modules = list(model.modules())
            layers = [place for place, module in enumerate(modules) if isinstance(module, LAYERS)]
            costs = {place: cost(modules, place) for place in layers}
            watched = {place: costs[place] for place in places}
            found.append(Times([sum(costs.values()) + rest(modules)] * least, watched, dict(watched)))
        return found

    return time_in_turns


def outputs_differ(model, other, example):
    """Return how the outputs of `other` differ from those of `model`; an empty text if they do not."""
    with alone():
        return difference(*(run(copied(each), arguments_of(example)) for each in (model, other)))


def cut_units(model):
    """Zero the weights into and out of some units of each linear and convolution layer."""
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear):
                layer.weight[::3] = 0
                layer.weight[:, 1::5] = 0
