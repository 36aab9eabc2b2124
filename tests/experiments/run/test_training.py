"""Epoch functions: losses and accuracies are those of a plain loop, and training that diverges is noticed."""

import random
import re

import numpy as np
import pytest
import torch
from helpers import masked, mlp
from torch import nn
from torch.nn import functional as F

from sparselearning.experiments.run.precision import Precision
from sparselearning.experiments.run.training import (
    Evaluation,
    NotFinite,
    evaluate,
    progress_bar,
    seed_generators,
    train_epoch,
)

CPU = torch.device("cpu")


def classifier():
    return nn.Sequential(mlp(6, 5, 3), nn.LogSoftmax(dim=1))


def batches(count=5, size=4):
    generator = torch.Generator().manual_seed(3)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(count)
    ]


def optimizers(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)


def slow_epoch(model, data, l1):
    """The loop by hand; return the losses."""
    optimizer, scheduler = optimizers(model)
    losses = []
    for x, y in data:
        optimizer.zero_grad()
        loss = F.nll_loss(model(x), y)
        if l1:
            loss = loss + l1 * sum(weight.abs().sum() for weight in model.parameters() if weight.dim() > 1)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("l1", [0.0, 0.01])
@pytest.mark.parametrize("report_every", [1, 2, 100])
def test_an_epoch_is_the_loop_by_hand(l1, report_every):
    fast, slow = classifier(), classifier()
    slow.load_state_dict(fast.state_dict())
    expected = slow_epoch(slow, batches(), l1)
    reports = []
    loss = train_epoch(
        fast, batches(), *optimizers(fast), Precision("none", CPU), l1, lambda *seen: reports.append(seen), report_every
    )
    assert loss == pytest.approx(np.mean(expected))
    for ours, theirs in zip(fast.parameters(), slow.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert [done for done, _ in reports] == [*range(report_every, 5, report_every), 5]
    assert reports[0][1] == pytest.approx(np.mean(expected[:report_every]))


def test_a_masking_is_stepped_like_an_optimizer():
    model = classifier()
    optimizer, scheduler = optimizers(model)
    masking = masked(model, optimizer, density=0.3)
    train_epoch(model, batches(), masking, scheduler, Precision("none", CPU))
    assert masking.steps == 5
    assert all(not layer.weight[~layer.mask].any() for layer in masking.layers)


def test_l1_counts_active_and_dense_weights_but_no_biases():
    model = nn.Sequential(nn.Linear(2, 2), nn.LogSoftmax(dim=1))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    loss = train_epoch(
        model, [(torch.ones(1, 2), torch.tensor([0]))], optimizer, scheduler, Precision("none", CPU), 0.5
    )
    assert loss == pytest.approx(0.5 * 4 * 3 + np.log(2))


def test_l1_of_half_precision_weights_does_not_overflow():
    model = nn.Sequential(nn.Linear(300, 300), nn.LogSoftmax(dim=1)).to(torch.float16)
    nn.init.ones_(model[0].weight)  # 90,000 of them; the largest number is 65,504
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    data = [(torch.zeros(1, 300, dtype=torch.float16), torch.tensor([0]))]
    assert train_epoch(model, data, optimizer, scheduler, Precision("none", CPU), 1.0) == pytest.approx(
        90_000, rel=1e-3
    )


@pytest.mark.parametrize(("report_every", "bad"), [(1, 3), (2, 3), (100, 5)])
def test_a_loss_that_is_not_finite_is_named_with_its_step(report_every, bad):
    data = batches()
    data[bad - 1][0][0, 0] = torch.nan
    model = classifier()
    with pytest.raises(NotFinite, match=f"the loss is nan at step {bad} of the epoch"):
        train_epoch(model, data, *optimizers(model), Precision("none", CPU), report_every=report_every)


def test_weights_that_are_not_finite_after_the_last_step_are_noticed():
    model = classifier()
    model.register_parameter("spare", nn.Parameter(torch.tensor([1.0, torch.inf])))
    with pytest.raises(NotFinite, match="the weights are no longer finite after step 5 of the epoch"):
        train_epoch(model, batches(), *optimizers(model), Precision("none", CPU))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_fp16_skips_a_step_that_overflows_and_lowers_the_scale():
    model = classifier()
    optimizer, scheduler = optimizers(model)
    masking = masked(model, optimizer, density=0.3)
    precision = Precision("fp16", CPU)
    before = [parameter.clone() for parameter in model.parameters()]
    precision.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)  # no gradient survives this scale
    train_epoch(model, batches(1), masking, scheduler, precision)
    assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))
    assert masking.steps == 0
    assert precision.scaler.get_scale() == 2.0**125


def test_an_evaluation_is_the_mean_over_images_not_batches():
    model = classifier()
    data = [*batches(3), *batches(1, size=1)]
    images, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    output = model(images)
    found = evaluate(model, data, Precision("none", CPU))
    assert found.loss == pytest.approx(F.nll_loss(output, labels).item())
    assert (found.correct, found.total) == (int((output.argmax(1) == labels).sum()), 13)
    assert not model.training


def test_an_evaluation_that_is_not_finite_is_noticed():
    model = classifier()
    nn.init.constant_(model[0].fc2.bias, torch.nan)
    with pytest.raises(NotFinite, match="the loss is nan over 20 images"):
        evaluate(model, batches(), Precision("none", CPU))


def test_an_evaluation_reads_as_in_release_1_0():
    assert str(Evaluation(0.06119, 9853, 10_000)) == "Average loss: 0.0612, Accuracy: 9853/10000 (98.530%)"


def test_a_bar_shows_nothing_where_there_is_no_terminal(capsys):
    with progress_bar("epoch 1", 10) as report:
        report(5, 0.25)
    assert capsys.readouterr() == ("", "")


def test_a_bar_shows_steps_and_loss_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with progress_bar("epoch 1", 10) as report:
        report(5, 0.25)
        report(10, 0.125)
    assert re.search(r"epoch 1:.* 0/10", capsys.readouterr().err)


def test_seeds_reach_every_generator():
    def draw():
        return torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random()  # noqa: NPY002

    seed_generators(4)
    first = draw()
    assert draw() != first
    seed_generators(4)
    assert draw() == first
