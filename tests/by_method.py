"""Train small networks by a method of the table."""

import torch
from helpers import backward, mlp

from sparselearning import Masking
from sparselearning.methods import METHODS

STEPS, EPOCH = 24, 6  # short; a method that updates after so many steps does so after every other one


def batch(seed=9):
    """Inputs and labels for a network of 20 inputs and 10 outputs."""
    return torch.randn(16, 20, generator=torch.Generator().manual_seed(seed)), torch.arange(16) % 10


def optimizer_of(method, parameters, kind=torch.optim.SGD, **settings):
    """Return an optimizer of this kind, or Adam for a method that is made for it."""
    if kind is torch.optim.SGD and METHODS[method].reset_state != "restart":
        return kind(parameters, **{"lr": 0.1, "momentum": 0.9, **settings})
    return (torch.optim.Adam if kind is torch.optim.SGD else kind)(parameters, lr=0.01)


def begin(method, optimizer=torch.optim.SGD, widths=(20, 30, 10), density=0.2, **parts):
    """Return a small network, its optimizer, and its Masking by a method of which `parts` replace some."""
    model = mlp(*widths)
    optimizer = optimizer_of(method, model.parameters(), optimizer)
    if METHODS[method].prune_every_k_steps:
        parts = {"prune_every_k_steps": 2} | parts
    parts = {"batches": [batch()]} | parts
    return model, optimizer, Masking.from_method(method, model, optimizer, STEPS, density, **parts)


def go_on(model, optimizer, masking, first=0, last=STEPS):
    """Train from one step to another on data that depend on the step; yield after each step and epoch."""
    for step in range(first, last):
        backward(model, torch.randn(8, 20, generator=torch.Generator().manual_seed(step)))
        optimizer.step()
        yield step + 1
        if (step + 1) % EPOCH == 0 and step + 1 < STEPS:
            masking.at_end_of_epoch()
            yield step + 1
