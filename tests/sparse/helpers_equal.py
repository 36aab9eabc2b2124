"""Runs on sparse kernels beside masked ones, and what a loop may do between backward and step.

The masked run is the oracle: torch's own layers, dense tensors, gradients of inactive weights set to zero, as the
sparse run never has them.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselearning.core import Masking
from sparselearning.sparse.training import SparseTraining
from sparselearning.weights.zeros import Zeros

OPTIMIZERS = {
    "sgd": lambda groups: torch.optim.SGD(groups, lr=0.05),
    "momentum": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, weight_decay=1e-3),
    "nesterov": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "dampened": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, dampening=0.5),
    "sgd loop": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, foreach=False),
    "sgd fused": lambda groups: torch.optim.SGD(groups, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda groups: torch.optim.Adam(groups, lr=0.01, weight_decay=1e-3),
    "adam fused": lambda groups: torch.optim.Adam(groups, lr=0.01, fused=True),
    "adamw": lambda groups: torch.optim.AdamW(groups, lr=0.01),
    "amsgrad": lambda groups: torch.optim.AdamW(groups, lr=0.01, amsgrad=True),
    "nadam": lambda groups: torch.optim.NAdam(groups, lr=0.01),
    "radam": lambda groups: torch.optim.RAdam(groups, lr=0.01),
    "adamax": lambda groups: torch.optim.Adamax(groups, lr=0.01),
    "adagrad": lambda groups: torch.optim.Adagrad(groups, lr=0.02),
    "rmsprop": lambda groups: torch.optim.RMSprop(groups, lr=0.005, momentum=0.5, centered=True),
    "adadelta": lambda groups: torch.optim.Adadelta(groups, lr=1.0),
}
MAXIMIZING = {"momentum", "sgd fused", "adamw", "rmsprop"}


def images(count, generator):
    return torch.randn(count, 3, 8, 8, generator=generator)


def network():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24, 10),
        nn.Tanh(),
        nn.Linear(10, 7),
    )


class Run:
    """A model with its optimizer and masks, and the steps that a situation makes of a batch."""

    def __init__(
        self, sparse, make_optimizer, maximize=False, groups=False, channels_last=False, reset=True, make=network
    ):
        torch.manual_seed(0)
        self.model = make()
        if channels_last:
            self.model.to(memory_format=torch.channels_last)
        weights = [p for p in self.model.parameters() if p.dim() > 1]
        others = [p for p in self.model.parameters() if p.dim() < 2]
        parts = [dict(params=weights[:2]), dict(params=weights[2:]), dict(params=others)]
        if groups:
            parts[1]["lr"], parts[0]["weight_decay"] = 0.02, 0.01
        self.optimizer = make_optimizer(parts)
        for group in self.optimizer.param_groups:
            group["maximize"] = maximize
        held = (SparseTraining if sparse else Zeros)(reset_state=reset)
        modes = dict(growth_mode="random", redistribution_mode="none")
        self.masking = Masking(self.optimizer, None, 0.3, weights=held, **modes)
        self.masking.add_module(self.model, density=0.4)
        self.sparse, self.sign = sparse, -1 if maximize else 1

    def backward(self, batch, factor=1.0):
        x, target = batch
        (self.sign * factor * F.cross_entropy(self.model(x), target)).backward()
        if not self.sparse:
            for layer in self.masking.layers:
                layer.weight.grad.mul_(layer.mask)

    def step(self, batch):
        self.optimizer.zero_grad()
        self.backward(batch)
        self.optimizer.step()

    def update(self, seed):
        torch.manual_seed(seed)
        self.masking.at_end_of_epoch()


def batches(count, draw=images):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield draw(16, generator), torch.randint(7, (16,), generator=generator)


def plain(run, batch, step):
    run.step(batch)


def clipped(run, batch, step):
    run.optimizer.zero_grad()
    run.backward(batch)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.1)
    run.optimizer.step()


def clipped_by_value(run, batch, step):
    run.optimizer.zero_grad()
    run.backward(batch)
    torch.nn.utils.clip_grad_value_(run.model.parameters(), 0.01)
    run.optimizer.step()


def scaled(run, batch, step):
    if not hasattr(run, "scaler"):
        run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    run.optimizer.zero_grad()
    run.backward(batch, run.scaler.scale(torch.ones(())))
    if step == 3:
        next(p for p in run.model.parameters() if p.dim() == 1).grad[0] = math.inf  # this step is skipped
    if step % 2:
        run.scaler.unscale_(run.optimizer)
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 0.5)
    run.scaler.step(run.optimizer)
    run.scaler.update()


def accumulated(run, batch, step):
    run.model.zero_grad(set_to_none=step % 2 == 0)
    x, target = batch
    run.backward((x[:6], target[:6]), 0.5)
    run.backward((x[6:], target[6:]), 0.5)
    run.masking.step()


def skipped(run, batch, step):
    run.optimizer.zero_grad()
    run.backward((batch[0] * math.nan if step in (3, 11) else batch[0], batch[1]))
    if step not in (3, 11):
        run.optimizer.step()


def copied(run, batch, step):
    run.step(batch)
    if step in (2, 7):  # the latter right after an update
        run.model, run.optimizer, run.masking = copy.deepcopy((run.model, run.optimizer, run.masking))


def moved(run, batch, step):
    """torch's fused optimizers step a weight and a momentum of two memory formats wrongly, so the oracle stays."""
    run.step(batch)
    if run.sparse and step in (2, 9):
        run.model.to(memory_format=torch.channels_last if step == 2 else torch.contiguous_format)


def loaded(run, batch, step):
    """Save, train on, and load the saved state in another order each time."""
    run.step(batch)
    if step in (2, 7, 9):
        parts = [run.model, run.optimizer, run.masking]
        saved = copy.deepcopy([part.state_dict() for part in parts])
        run.step(batch)
        for index in {2: (0, 1, 2), 7: (2, 1, 0), 9: (1, 0, 2)}[step]:
            parts[index].load_state_dict(saved[index])


def penalized(run, batch, step):
    run.optimizer.zero_grad()
    (1e-3 * run.sign * sum(p.abs().sum() for p in run.model.parameters() if p.dim() > 1)).backward()
    run.backward(batch)
    run.optimizer.step()


def overwritten(run, batch, step):
    """Write weights in the ways of weight averaging, and read them back."""
    run.step(batch)
    if step in (2, 8):
        with torch.no_grad():
            for tensor in run.model.state_dict().values():
                if tensor.is_floating_point():
                    tensor.mul_(0.9)
    if step == 5:
        for parameter in run.model.parameters():
            parameter.data.copy_(parameter.data * 1.1)


SITUATIONS = [
    plain, clipped, clipped_by_value, scaled, accumulated, skipped, copied, moved, loaded, penalized, overwritten
]  # fmt: skip


def train(run, situation, steps=14, every=7, draw=images):
    losses = []
    for step, batch in enumerate(batches(steps, draw)):
        situation(run, batch, step)
        with torch.no_grad():
            losses.append(F.cross_entropy(run.model(batch[0]), batch[1]).item())
        if step % every == every - 1:
            run.update(step)
    return losses


def compare(name, situation, draw=images, **settings):
    masked, sparse = (Run(kind, OPTIMIZERS[name], **settings) for kind in (False, True))
    expected, losses = (train(run, situation, draw=draw) for run in (masked, sparse))
    assert losses == pytest.approx(expected, rel=1e-3, abs=1e-4)
    sparse.masking.check()
    for one, other in zip(masked.masking.layers, sparse.masking.layers, strict=True):
        assert torch.equal(one.mask, other.mask)
        torch.testing.assert_close(other.weight.detach(), one.weight.detach(), rtol=1e-2, atol=1e-4)
    saved, found = masked.optimizer.state_dict(), sparse.optimizer.state_dict()
    assert {key: state.keys() for key, state in saved["state"].items()} == {
        key: state.keys() for key, state in found["state"].items()
    }
    return masked, sparse
