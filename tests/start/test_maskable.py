"""Which parameters become sparse: the weights of every kind of layer; biases, norms and embeddings stay dense."""

import pytest
import torch
from helpers import assert_masks_hold, masked, mlp, sgd, train
from torch import nn

from sparselearning import Masking
from sparselearning.start.maskable import maskable_parameters


class FirstOutput(nn.Module):
    """Returns the output of a recurrent or attention layer without its state."""

    def __init__(self, layer, *, self_attention=False):
        super().__init__()
        self.layer, self.self_attention = layer, self_attention

    def forward(self, x):
        return self.layer(x, x, x)[0] if self.self_attention else self.layer(x)[0]


LAYERS = {
    # layer, input shape, masked parameters
    "Linear": (lambda: nn.Linear(6, 5), (4, 6), ["weight"]),
    "Conv1d": (lambda: nn.Conv1d(3, 5, 3), (4, 3, 8), ["weight"]),
    "Conv2d": (lambda: nn.Conv2d(3, 5, 3), (4, 3, 8, 8), ["weight"]),
    "Conv3d": (lambda: nn.Conv3d(3, 5, 3), (4, 3, 4, 4, 4), ["weight"]),
    "grouped Conv2d": (lambda: nn.Conv2d(4, 8, 3, groups=4), (4, 4, 8, 8), ["weight"]),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 5, 3), (4, 3, 8), ["weight"]),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(3, 5, 3), (4, 3, 8, 8), ["weight"]),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(3, 5, 3), (4, 3, 4, 4, 4), ["weight"]),
    "RNN": (lambda: FirstOutput(nn.RNN(6, 5)), (4, 2, 6), ["layer.weight_ih_l0", "layer.weight_hh_l0"]),
    "GRU": (lambda: FirstOutput(nn.GRU(6, 5)), (4, 2, 6), ["layer.weight_ih_l0", "layer.weight_hh_l0"]),
    "two-layer LSTM": (
        lambda: FirstOutput(nn.LSTM(6, 5, num_layers=2)),
        (4, 2, 6),
        ["layer.weight_ih_l0", "layer.weight_hh_l0", "layer.weight_ih_l1", "layer.weight_hh_l1"],
    ),
    "MultiheadAttention": (
        lambda: FirstOutput(nn.MultiheadAttention(6, 2, add_bias_kv=True), self_attention=True),
        (4, 2, 6),
        ["layer.in_proj_weight", "layer.out_proj.weight"],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_train_sparsely(name):
    make, shape, expected = LAYERS[name]
    model = make()
    masking = masked(model, density=0.3)
    assert list(masking.masks) == expected
    inputs = torch.randn(shape)
    for _ in range(2):
        train(model, masking, 2, inputs)
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
        assert masking.total_nonzero == round(0.3 * sum(mask.numel() for mask in masking.masks.values()))


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.LayerNorm(4),
        nn.LayerNorm((4, 4)),  # its parameters have two dimensions
        nn.GroupNorm(2, 4),
        nn.RMSNorm((4, 4)),
        nn.PReLU(4),
        nn.Embedding(10, 4),
        nn.EmbeddingBag(10, 4),
    ],
    ids=str,
)
def test_these_layers_stay_dense(layer):
    model = nn.Sequential(layer, nn.Linear(4, 4))
    before = [parameter.clone() for parameter in layer.parameters()]
    masking = masked(model, density=0.1)
    assert list(masking.masks) == ["1.weight"]
    assert all(torch.equal(a, b) for a, b in zip(before, layer.parameters(), strict=True))


class Odd(nn.Module):
    """Has a layer, a weight of no layer, and a parameter of every kind that stays dense."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.relative_position_bias = nn.Parameter(torch.randn(6, 6))
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.gains = nn.Parameter(torch.ones(6))
        self.empty = nn.Parameter(torch.ones(0, 6))
        self.frozen = nn.Parameter(torch.randn(6, 6), requires_grad=False)
        self.register_buffer("table", torch.ones(6, 6))
        self.bias_network = nn.Linear(6, 6)

    def forward(self, x):
        x = self.scale * self.gains * x @ (self.weight + self.relative_position_bias)
        return self.bias_network(x) @ self.frozen


def test_biases_scalars_vectors_empty_and_frozen_parameters_stay_dense():
    model = Odd()
    frozen = model.frozen.clone()
    masking = masked(model, density=0.5, sparse=["weight"])
    assert list(masking.masks) == ["weight", "bias_network.weight"]
    for _ in range(3):
        train(model, masking, 1, torch.randn(4, 6))
        masking.at_end_of_epoch()
    masking.check()
    assert torch.equal(model.frozen, frozen)
    assert model.relative_position_bias.all()


def test_parameters_of_no_layer_stay_dense_unless_they_are_named():
    model = nn.Linear(6, 5)
    model.pos_embedding = nn.Parameter(torch.ones(1, 4, 6))
    model.A_log = nn.Parameter(torch.ones(6, 4))
    assert [name for name, _ in maskable_parameters(model)] == ["weight"]
    assert [name for name, _ in maskable_parameters(model, sparse_embeddings=True)] == ["weight"]
    assert [name for name, _ in maskable_parameters(model, sparse=["*A_log"])] == ["weight", "A_log"]


def test_the_name_of_a_layer_means_what_can_be_masked_of_it():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 10))
    names = [name for name, _ in maskable_parameters(model, sparse=["0", "1"])]
    assert names == ["0.weight", "1.weight"]
    with pytest.raises(ValueError, match=r"names 1.bias \(10,\), which cannot be masked: fewer than two dimensions"):
        list(maskable_parameters(model, sparse=["1*"]))


def test_embeddings_are_masked_when_asked_for():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    masking = Masking(sgd(model), None)
    masking.add_module(model, 0.5, sparse_embeddings=True)
    train(model, masking, 2, torch.randint(10, (4, 3)))
    masking.at_end_of_epoch()
    assert masking.name2nonzeros.keys() == {"0.weight", "1.weight"}
    assert masking.total_nonzero == 28
    assert_masks_hold(masking)


def test_a_tied_weight_is_masked_once():
    model = mlp(6, 6, 6)
    model.fc2.weight = model.fc1.weight
    masking = masked(model, density=0.5)
    assert masking.name2nonzeros == {"fc1.weight": 18}
    train(model, masking)
    masking.at_end_of_epoch()
    assert_masks_hold(masking)
    assert model.fc2.weight is model.fc1.weight


def test_what_is_tied_to_an_embedding_stays_dense():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4), nn.Linear(4, 10, bias=False))
    model[2].weight = model[0].weight
    assert list(masked(model).masks) == ["1.weight"]
