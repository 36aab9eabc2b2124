"""Training that does not happen, or ends before the density arrives, is said."""

import logging

import pytest
import torch
from helpers import masked, mlp, sgd, train

from sparselearning import Masking, Updates
from sparselearning.schedules import Constant, CubicDensity, SoftDensity, StepDensity


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("every", [0, 100])
def test_an_epoch_without_a_step_is_said(every, caplog):
    model = mlp(20, 30, 10)
    masking = masked(model, prune_every_k_steps=every)
    masking.at_end_of_epoch()
    (message,) = warnings_of(caplog)
    assert message.startswith("SGD has made no step since the last call of at_end_of_epoch (0 in all)")
    assert "Make the Masking with the optimizer that trains" in message


def test_an_epoch_without_a_step_is_said_later_too(caplog):
    model = mlp(20, 30, 10)
    masking = masked(model)
    train(model, masking, 2)
    masking.at_end_of_epoch()
    assert not warnings_of(caplog)
    masking.at_end_of_epoch()
    assert "no step since the last call of at_end_of_epoch (2 in all)" in caplog.text


def test_an_optimizer_that_is_not_the_one_that_trains_is_said(caplog):
    model = mlp(20, 30, 10)
    masking = masked(model, updates=Updates(every=100))
    train(model, sgd(model), 3)
    masking.at_end_of_epoch()
    assert len(warnings_of(caplog)) == 1


def test_a_run_that_goes_on_at_the_end_of_an_epoch_says_nothing(caplog):
    model = mlp(20, 30, 10)
    masking = masked(model)
    train(model, masking, 2)
    masking.load_state_dict(masking.state_dict())
    masking.at_end_of_epoch()
    assert not warnings_of(caplog)


SCHEDULES = {
    "cubic": Updates(every=100, density=CubicDensity(1.0, 0.05, 0, 1000)),
    "last": Updates(every=100, last=1000, density=lambda step: 1.0 - 0.95 * min(step, 1000) / 1000),
    "step": Updates(every=100, density=StepDensity(1.0, 0.05, 1000)),
    "soft": Updates(every=100, density=SoftDensity(0.05, Constant(0.5), 1000)),
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_a_density_that_did_not_arrive_is_said(kind, caplog):
    model = mlp(20, 30, 10)
    masking = masked(model, density=1.0, prune_mode="global_magnitude", growth_mode="random", updates=SCHEDULES[kind])
    train(model, masking, 300)
    caplog.set_level(logging.INFO)
    masking.at_end_of_epoch()
    assert (
        f"The density is {masking.density:.4g} after 300 steps, and the schedule's is 0.05 from step 1000"
        in caplog.text
    )
    assert not warnings_of(caplog)
    masking.check()
    assert len(warnings_of(caplog)) == 1


def test_a_density_that_arrived_is_not_mentioned(caplog):
    model = mlp(20, 30, 10)
    updates = Updates(every=2, last=10, density=CubicDensity(1.0, 0.05, 0, 10))
    masking = masked(model, density=1.0, prune_mode="global_magnitude", growth_mode="random", updates=updates)
    train(model, masking, 10)
    masking.check()
    masking.at_end_of_epoch()
    assert masking.total_nonzero == 45
    assert not warnings_of(caplog)


def test_frozen_layers_that_keep_their_density_are_said(caplog):
    model = mlp(20, 30, 10)
    updates = Updates(every=2, last=4, density=CubicDensity(1.0, 0.05, 0, 4))
    masking = masked(model, density=1.0, prune_mode="global_magnitude", growth_mode="random", updates=updates)
    model.fc1.requires_grad_(False)
    train(model, masking, 4)
    masking.check()
    assert "from step 4 on: no update has come since, or frozen layers keep theirs" in caplog.text


def test_a_method_that_is_stopped_early_says_so(caplog):
    model = mlp(20, 30, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masking = Masking.from_method("gmp", model, optimizer, total_steps=1000, density=0.05)
    train(model, masking, 300)
    masking.check()
    assert "the schedule's is 0.05 from step 750 on" in caplog.text
