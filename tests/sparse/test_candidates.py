"""Candidates for growth by momentum hold the mean gradient of some inactive entries, and nothing else."""

import pytest
import torch
from helpers_growing import indices_of

from sparselearning.selection import add_highest
from sparselearning.sparse.candidates import CandidateSet


def candidates(seed=0):
    torch.manual_seed(seed)
    mask, whole = torch.rand(6, 8) < 0.3, torch.randn(6, 8)
    return mask, whole, CandidateSet.choose(lambda i, j: whole[i:j], *indices_of(mask), 8, 10)


def test_candidates_hold_the_mean_gradient_of_their_steps():
    mask, whole, chosen = candidates()
    expected = (add_highest(whole.abs(), mask, 10) & ~mask).flatten().nonzero().flatten()
    assert torch.equal(chosen.position(), expected)
    assert torch.equal(chosen.mean(), whole.flatten()[expected])
    more = [torch.randn(10) for _ in range(3)]
    for gradient in more:
        chosen.add(gradient)
    assert chosen.steps == 4
    mean = (whole.flatten()[expected] + sum(more)) / 4
    torch.testing.assert_close(chosen.mean(), mean)
    position, gradient = chosen.best(4)
    order = mean.abs().argsort(descending=True)[:4].sort().values
    assert torch.equal(position, expected[order])
    torch.testing.assert_close(gradient, mean[order])


def test_candidates_are_saved_and_loaded():
    _, _, chosen = candidates()
    chosen.add(torch.randn(10))
    _, _, other = candidates(1)
    other.load_state_dict(chosen.state_dict())
    before = chosen.mean().clone()
    assert torch.equal(other.position(), chosen.position())
    assert torch.equal(other.mean(), before)
    other.add(torch.ones(10))
    assert torch.equal(chosen.mean(), before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: 3, "expected a dict, got 3"),
        (lambda state: state | {"more": 1}, "'more' too"),
        (lambda state: {"start": state["start"]}, "got no column, sum, steps"),
        (lambda state: state | {"start": state["start"].long()}, r"\['start'\].*expected a torch.int32 tensor"),
        (lambda state: state | {"start": state["start"][:-1]}, r"expected a torch.int32 tensor of shape \(7,\)"),
        (lambda state: state | {"start": state["start"] + 1}, "numbers that rise from 0 to 10"),
        (lambda state: state | {"start": state["start"].flip(0)}, "numbers that rise from 0 to 10"),
        (lambda state: state | {"column": state["column"].view(2, 5)}, "expected one dimension"),
        (lambda state: state | {"column": state["column"].clamp(max=2)}, "that rise within a row"),
        (lambda state: state | {"column": state["column"] + 7}, "numbers below 8"),
        (lambda state: state | {"column": state["column"] - 7}, "numbers below 8"),
        (lambda state: state | {"sum": state["sum"][1:]}, r"\['sum'\].*of shape \(10,\)"),
        (lambda state: state | {"sum": state["sum"].int()}, "expected a floating tensor"),
        (lambda state: state | {"steps": 0}, r"\['steps'\].*from 1"),
        (lambda state: state | {"steps": 1.5}, r"\['steps'\].*got 1.5"),
    ],
)
def test_damaged_candidates_are_refused_and_change_nothing(damage, message):
    _, _, chosen = candidates()
    position, mean = chosen.position(), chosen.mean()
    with pytest.raises(RuntimeError, match=message):
        chosen.load_state_dict(damage(candidates(1)[2].state_dict()))
    assert torch.equal(chosen.position(), position)
    assert torch.equal(chosen.mean(), mean)
