"""SNIP and GraSP written with hooks of autograd alone, in a given mode of the model.

From the papers' equations and the modes of the authors' codes: `is_train: False` when namhoonlee/snip-public scores;
alecwangcq/GraSP scores a network in training mode.
"""

import copy

import torch
from torch.nn import functional as F


def snip_of(model, batches, training):
    """|dL(c * w)/dc| at c = 1, with a switch c for every weight of two dimensions or more."""
    model = copy.deepcopy(model).train(training)
    weights = {name: p.detach() for name, p in model.named_parameters() if p.dim() > 1}
    switches = {name: torch.ones_like(w, requires_grad=True) for name, w in weights.items()}
    loss = 0.0
    for inputs, targets in batches:
        state = {name: switches[name] * w for name, w in weights.items()}
        loss = loss + F.cross_entropy(torch.func.functional_call(model, state, inputs), targets)
    gradients = torch.autograd.grad(loss, list(switches.values()))
    return {name: g.abs() for name, g in zip(switches, gradients, strict=True)}


def grasp_of(model, batches, training, temperature=200.0):
    """w * (H g), H g as the difference of gradients at w + e g and w - e g."""
    names = [name for name, p in model.named_parameters() if p.dim() > 1]

    def gradients(shift):
        copied = copy.deepcopy(model).train(training)
        weights = dict(copied.named_parameters())
        with torch.no_grad():
            for name, amount in shift.items():
                weights[name].add_(amount)
        loss = sum(F.cross_entropy(copied(inputs) / temperature, targets) for inputs, targets in batches)
        found = torch.autograd.grad(loss, [weights[name] for name in names])
        return dict(zip(names, found, strict=True))

    g, weights, step = gradients({}), dict(model.named_parameters()), 1e-2
    high, low = (gradients({name: sign * step * g[name] for name in names}) for sign in (1, -1))
    return {name: (weights[name] * (high[name] - low[name]) / (2 * step)).detach() for name in names}
