"""Class specialisation of convolutional channels."""

import numpy as np
import pytest
import torch
from torch import nn

from sparselearning.experiments.report import features


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 16, 5), nn.ReLU(),
    )  # fmt: skip


def batches(*sizes):
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(n, 1, 8, 8, generator=generator), torch.randint(3, (n,), generator=generator)) for n in sizes]


def slow_counts(model, data, classes):
    """1.0's loop: one forward pass per class and batch."""
    model.eval()
    counts = [torch.zeros(4, classes), torch.zeros(6, classes)]
    for images, labels in data:
        for label in range(classes):
            first = model[:3](images[labels == label])
            second = model[3:5](first)
            for layer, output in zip(counts, (first, second), strict=True):
                layer[:, label] += output.detach().abs().sum((0, 2, 3))
    return counts


def test_counts_equal_a_loop_over_classes(model):
    data = batches(7, 5, 1)
    found = features.collect(model, data, classes=3)
    assert list(found) == ["2", "4"]
    for fast, slow in zip(found.values(), slow_counts(model, data, 3), strict=True):
        torch.testing.assert_close(fast, slow)


def test_collect_leaves_the_model_as_it_was(model):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    features.collect(model, batches(4), classes=3)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def test_a_shared_relu_counts_once_per_use():
    relu = nn.ReLU()
    model = nn.Sequential(nn.Conv2d(1, 4, 3), relu, nn.Conv2d(4, 6, 3), relu)
    found = features.collect(model, batches(4, 4), classes=3)
    assert {name: list(layer.shape) for name, layer in found.items()} == {"1": [4, 3], "1#2": [6, 3]}


@pytest.mark.long
def test_a_compiled_model_is_not_compiled_again(model):
    data = batches(4, 5)
    expected = features.collect(model, data, classes=3)
    graphs = []
    model.compile(backend=lambda graph, _inputs: graphs.append(graph) or graph.forward)
    found = features.collect(model, data, classes=3)
    assert not graphs
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert model(data[0][0]).shape == (4, 5)
    assert graphs


def test_half_precision_activations_do_not_overflow():
    """Sums beyond 65,504, the largest float16, are ordinary for a layer."""
    images = torch.full((2, 1, 64, 64), 100.0, dtype=torch.float16)
    counts = features.collect(nn.Sequential(nn.ReLU()), [(images, torch.tensor([0, 1]))], classes=2)
    assert counts["0"].tolist() == [[409600.0, 409600.0]]


def test_channels_of_the_lowest_five_percent_are_left_out():
    counts = torch.tensor(
        [
            [1.0, 1.0],  # 2 of 100, left out
            [30.0, 10.0],
            [2.0, 0.5],  # 2.5 of 100: 4.5 together, left out
            [5.5, 50.0],
        ]
    )
    torch.testing.assert_close(features.specialisation(counts), torch.tensor([30 / 40, 50 / 55.5]))
    torch.testing.assert_close(
        features.specialisation(counts, ignored_share=0.0), (counts / counts.sum(1, True)).amax(1)
    )


def test_specialisation_ranges_from_uniform_to_one_class():
    counts = torch.stack([torch.full((10,), 3.0), torch.eye(10)[4] * 30])
    torch.testing.assert_close(features.specialisation(counts), torch.tensor([0.1, 1.0]))


def test_dead_channels_and_dead_layers_have_no_specialisation():
    assert features.specialisation(torch.zeros(3, 10)).shape == (0,)
    alive = torch.tensor([[0.0, 0.0], [3.0, 1.0]])
    assert features.specialisation(alive, ignored_share=0.0).tolist() == [0.75]


def test_a_linear_model_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"No nn\.ReLU with an output \[N, C, H, W\]"):
        features.collect(model, batches(4), classes=3)


def test_a_label_out_of_range_is_refused(model):
    with pytest.raises(ValueError, match="Expected labels from 0 to 1"):
        features.collect(model, batches(50), classes=2)


def test_saved_counts_load_unchanged(tmp_path):
    counts = {"block1.0.relu1": torch.rand(4, 10), "relu": torch.rand(2, 10)}
    features.save(counts, tmp_path / "features.npz")
    loaded = features.load(tmp_path / "features.npz")
    assert list(loaded) == list(counts)
    assert all(torch.equal(loaded[name], counts[name]) for name in counts)
    assert [path.name for path in tmp_path.iterdir()] == ["features.npz"]


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04cut off"])
def test_a_damaged_file_is_named(tmp_path, content):
    path = tmp_path / "features.npz"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"features\.npz is damaged, or not a feature file"):
        features.load(path)


def test_pickled_arrays_are_not_loaded(tmp_path):
    np.savez(tmp_path / "bad.npz", layer=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="not a feature file"):
        features.load(tmp_path / "bad.npz")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"No feature file .*none\.npz"):
        features.load(tmp_path / "none.npz")
