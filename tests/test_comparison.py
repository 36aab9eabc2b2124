"""`compare`: several methods on a user's model and loader, seeds, a table and a picture."""

import math

import pytest
import torch
from helpers import mlp

from sparselearning import compare
from sparselearning.comparison import Row
from sparselearning.methods import METHODS, find_method

DIRECTION = torch.linspace(-1, 1, 20)


def batches(count=12, size=32):
    """Return batches of points of two classes, on either side of a plane."""
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(size, 20, generator=generator) for _ in range(count)]
    return [(points, (points @ DIRECTION > 0).long()) for points in inputs]


def accuracy(model):
    assert not model.training
    assert not torch.is_grad_enabled()
    points = torch.randn(500, 20, generator=torch.Generator().manual_seed(1))
    return (model(points).argmax(1) == (points @ DIRECTION > 0).long()).float().mean()


def adam(model):
    return torch.optim.Adam(model.parameters(), 0.01)


def run(methods, **settings):
    return compare(lambda: mlp(20, 40, 2), batches(), accuracy, methods, **{"epochs": 3, "density": 0.3, **settings})


def test_a_table_and_a_picture_of_methods_and_seeds(tmp_path):
    comparison = run(["dense", "sparse_momentum", "set"], seeds=range(2))
    assert [row.method for row in comparison.rows] == ["dense", "sparse_momentum", "set"]
    dense, momentum, _ = comparison.rows
    assert (dense.density, dense.active_weights) == (1.0, 20 * 40 + 40 * 2)  # as of the others, without biases
    assert momentum.active_weights == round(0.3 * (20 * 40 + 40 * 2))
    assert all(row.mean > 0.8 for row in comparison.rows)
    header, *lines = str(comparison).splitlines()
    assert header.split() == ["method", "density", "active", "weights", "score", "std.", "error", "seeds"]
    assert lines[1].split()[:3] == ["sparse_momentum", "0.3000", "264"]
    comparison.plot(tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").stat().st_size > 5000


def test_seeds_repeat():
    assert run(["rigl"], seeds=[5]) == run(["rigl"], seeds=[5])
    assert run(["rigl"], seeds=[5]) != run(["rigl"], seeds=[6])


def test_methods_see_the_same_batches():
    seen = {}

    class Shuffled:
        def __len__(self):
            return 3

        def __iter__(self):
            for index in torch.randperm(3):
                seen.setdefault(method, []).append(int(index))
                yield batches()[index]

    for method in ("dense", "set", "rigl", "snip"):
        compare(lambda: mlp(20, 40, 2), Shuffled(), accuracy, [method], epochs=4, density=0.3, seeds=[3])
    orders = [order[-12:] for order in seen.values()]  # one pass more begins where a start is scored
    assert all(order == orders[0] for order in orders)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_every_method_can_be_compared(method):
    (row,) = run([method], seeds=[0], epochs=2, optimizer=adam).rows
    assert 0 <= row.mean <= 1
    assert math.isnan(row.standard_error)


def test_own_parts_optimizer_and_loss():
    own = find_method("rigl", prune_every_k_steps=5)
    comparison = compare(
        lambda: mlp(20, 40, 2),
        batches(),
        accuracy,
        [own],
        epochs=2,
        density=0.3,
        seeds=[0],
        optimizer=adam,
        loss=torch.nn.CrossEntropyLoss(label_smoothing=0.1),
    )
    assert comparison.rows[0].mean > 0.7


def test_standard_errors_are_those_of_the_mean():
    row = Row("set", 0.1, 5, (0.5, 0.7, 0.9))
    assert row.mean == pytest.approx(0.7)
    assert row.standard_error == pytest.approx(0.2 / math.sqrt(3))


def test_mistakes_are_named_before_anything_is_trained():
    with pytest.raises(ValueError, match="rigll"):
        run(["dense", "rigll"])
    with pytest.raises(ValueError, match="Expected methods, seeds and batches"):
        run(["set"], seeds=[])
    with pytest.raises(ValueError, match="Methods have the same name: RigL"):
        run([find_method("rigl"), find_method("rigl", prune_rate=0.1)])
    with pytest.raises(ValueError, match="and 0 batches"):
        compare(lambda: mlp(20, 2), [], accuracy, ["set"])
