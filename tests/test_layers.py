"""Which parameters of which layers are masked, and that they hold in every kind of layer and dtype."""

import pytest
import torch
from helpers import assert_masks_hold, masked, mlp, train
from torch import nn

from sparselearning import Masking
from sparselearning.start.maskable import maskable_parameters


class FirstOutput(nn.Module):
    """The output of a recurrent or attention layer without its state."""

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
    """Parameters that are no weights, and one that is."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.relative_position_bias = nn.Parameter(torch.randn(4, 4))
        self.scale = nn.Parameter(torch.tensor(1.0))
        self.gains = nn.Parameter(torch.ones(4))
        self.empty = nn.Parameter(torch.ones(0, 4))
        self.frozen = nn.Parameter(torch.ones(4, 4), requires_grad=False)
        self.register_buffer("table", torch.ones(4, 4))
        self.bias_network = nn.Linear(4, 4)


def test_biases_scalars_vectors_empty_and_frozen_parameters_stay_dense():
    assert [name for name, _ in maskable_parameters(Odd())] == ["weight", "bias_network.weight"]


def test_positions_and_tokens_of_a_transformer_are_embeddings():
    model = nn.Linear(6, 5)
    model.pos_embedding = nn.Parameter(torch.ones(1, 4, 6))
    model.class_token = nn.Parameter(torch.ones(1, 1, 6))
    assert [name for name, _ in maskable_parameters(model)] == ["weight"]
    asked_for = [name for name, _ in maskable_parameters(model, sparse_embeddings=True)]
    assert asked_for == ["weight", "pos_embedding", "class_token"]


def test_embeddings_are_masked_when_asked_for():
    model = nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 4))
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None)
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("growth", ["momentum", "momentum_neuron", "global_momentum", "random"])
def test_weights_keep_their_dtype(dtype, growth):
    model = mlp(12, 16, 8).to(dtype)
    masking = masked(model, density=0.25, growth_mode=growth)
    train(model, masking)
    masking.at_end_of_epoch()
    train(model, masking)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert masking.total_nonzero == 80
    assert_masks_hold(masking)


@pytest.mark.parametrize("growth", ["momentum", "momentum_neuron", "global_momentum", "random"])
@pytest.mark.parametrize("prune", ["magnitude", "SET", "threshold", "global_magnitude"])
def test_channels_last_changes_no_result(prune, growth):
    def trained(memory_format):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).to(memory_format=memory_format)
        masking = masked(model, density=0.3, prune_mode=prune, growth_mode=growth)
        # Gradients may differ in the last bit between the layouts, so the test writes them.
        for step in range(3):
            for i, parameter in enumerate(model.parameters()):
                generator = torch.Generator().manual_seed(10 * step + i)
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            masking.step()
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
        return model, masking

    plain, plain_masking = trained(torch.contiguous_format)
    laid_out, masking = trained(torch.channels_last)
    assert laid_out[2].weight.is_contiguous(memory_format=torch.channels_last)
    for name, mask in masking.masks.items():
        assert torch.equal(mask, plain_masking.masks[name])
    for parameter, other in zip(plain.parameters(), laid_out.parameters(), strict=True):
        assert torch.equal(parameter, other)


def test_a_weight_without_gradient_is_kept_at_its_masks():
    model = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    masking = masked(model, density=0.5)
    train(model[0], masking)
    masking.at_end_of_epoch()
    assert masking.total_nonzero == 36
    assert_masks_hold(masking)


def test_infinite_and_nan_weights_in_pruned_places_become_zero():
    model = mlp(6, 6)
    masking = masked(model, density=0.5)
    with torch.no_grad():
        model.fc1.weight[~masking.masks["fc1.weight"]] = torch.tensor([torch.inf, torch.nan, -torch.inf]).repeat(6)
    masking.apply_mask()
    assert_masks_hold(masking)
