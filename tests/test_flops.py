"""FLOPs: small networks counted by hand, ResNet-50 as published, and the formulas for training."""

import pytest
import torch
from by_method import optimizer_of
from helpers import mlp
from torch import nn

from sparselearning import Masking, models
from sparselearning.flops import Flops, dense_gradients, forward_flops, relative_flops
from sparselearning.grow import gradient_growth, momentum_growth, random_growth
from sparselearning.methods import METHODS
from sparselearning.models.resnet import RESNETS
from sparselearning.start.distributions import divide, erdos_renyi_kernel
from sparselearning.start.maskable import maskable_parameters

# Of the gradient of the weights of a network of density 0.2, relative to the dense network's: 0.2 but for these.
SHARES = dict.fromkeys(METHODS, 0.2)
SHARES |= dict(sparse_momentum=1.0, top_kast=0.4, soft_threshold=1.0)
SHARES |= dict.fromkeys(["rigl", "srigl", "granet", "guided"], 0.9 * 0.2 + 0.1)
LENET5 = {
    "conv1.weight": 2 * 24 * 24 * 20 * 1 * 5 * 5,  # every output pixel and channel: 25 products, 25 sums
    "conv2.weight": 2 * 8 * 8 * 50 * 20 * 5 * 5,
    "fc3.weight": 2 * 800 * 500,
    "fc4.weight": 2 * 500 * 10,
}


@pytest.fixture(scope="module")
def resnet50():
    with torch.device("meta"):
        model, image = RESNETS["resnet50"](1000), torch.empty(1, 3, 224, 224)
    return forward_flops(model, image), {name: weight.shape for name, weight in maskable_parameters(model)}


def test_lenet5_by_hand():
    flops = forward_flops(models.build("lenet5"), torch.zeros(1, 1, 28, 28))
    assert flops == Flops(LENET5)
    assert flops.dense == 4_586_000


def test_lenet5_sparse_by_hand():
    densities = {"conv1.weight": 0.5, "conv2.weight": 0.1, "fc3.weight": 0.02}
    sparse = 288_000 + 320_000 + 16_000 + 10_000
    flops = Flops(LENET5)
    assert flops.sparse(densities) == pytest.approx(sparse)
    assert flops.inference(densities) == pytest.approx(sparse / 4_586_000)


def test_lenet300_100_costs_two_for_each_weight():
    flops = forward_flops(models.build("lenet300-100"), torch.zeros(1, 1, 28, 28))
    assert flops.dense == 2 * 266_200
    assert flops.inference(dict.fromkeys(flops.of_weights, 0.05)) == pytest.approx(0.05)


def test_training_as_in_the_appendix_of_rigl():
    flops, densities = Flops({"fc.weight": 1000}), {"fc.weight": 0.2}
    f_S, f_D = 200, 1000
    assert flops.training(densities, dense_gradients(random_growth, 100)) == pytest.approx(3 * f_S / (3 * f_D))
    assert flops.training(densities, dense_gradients(momentum_growth, 100)) == pytest.approx(
        (2 * f_S + f_D) / (3 * f_D)
    )
    rigl = (3 * f_S * 100 + 2 * f_S + f_D) / (100 + 1)
    assert flops.training(densities, dense_gradients(gradient_growth, 100)) == pytest.approx(rigl / (3 * f_D))
    assert flops.training({}, 1.0) == flops.inference({}) == 1
    # Top-KAST: the gradient of twice as many weights as are active.
    assert flops.training(densities, 0.0, {"fc.weight": 0.4}) == pytest.approx((2 * 200 + 400) / 3000)


@pytest.mark.parametrize(("method", "share"), SHARES.items())
def test_a_method_costs_what_its_steps_need(method, share):
    """At a density of 0.2 a step costs two f_S and the gradient of the weights, relative to 3 f_D."""
    model = mlp(20, 30, 10)
    settings = dict(batches=[(torch.randn(8, 20), torch.arange(8))], sparse_init="constant", start_density=None)
    if METHODS[method].density_schedule != "constant":
        settings["density_schedule"] = "constant"
    optimizer = optimizer_of(method, model.parameters())
    masking = Masking.from_method(method, model, optimizer, 100, 0.2, **settings, prune_every_k_steps=9)
    flops = forward_flops(model, torch.zeros(1, 20))
    expected = (2 * masking.density + share) / 3
    assert relative_flops(flops, masking, 9)["training_flops"] == pytest.approx(expected, abs=0.003)


def test_resnet50_dense(resnet50):
    assert resnet50[0].dense == pytest.approx(8.2e9, rel=0.01)


@pytest.mark.parametrize(
    ("distribution", "density", "published", "of_momentum"),
    [("uniform", 0.2, 0.23, None), ("uniform", 0.1, 0.13, None), ("erk", 0.2, 0.42, 0.61), ("erk", 0.1, 0.24, 0.50)],
)
def test_resnet50_as_published(resnet50, distribution, density, published, of_momentum):
    """Evci et al. 2020, figure 2: inference of uniform networks, whose first layer is dense, and of ERK ones."""
    flops, shapes = resnet50
    if distribution == "uniform":
        densities = dict.fromkeys(shapes, density) | {"conv1.weight": 1.0}
    else:
        sizes = [shape.numel() for shape in shapes.values()]
        shares = [erdos_renyi_kernel(shape) for shape in shapes.values()]
        counts = divide(round(density * sum(sizes)), shares, sizes, steps=[1] * len(sizes))
        densities = {name: count / size for name, count, size in zip(shapes, counts, sizes, strict=True)}
    assert flops.inference(densities) == pytest.approx(published, abs=0.01)
    if of_momentum:
        assert flops.training(densities, 1.0) == pytest.approx(of_momentum, abs=0.01)


def test_the_products_of_attention_and_of_its_weights_are_told_apart():
    width, length = 8, 5
    layer = nn.TransformerEncoderLayer(width, 2, 16, batch_first=True)
    flops = forward_flops(layer, torch.randn(1, length, width))
    assert flops.of_weights == {
        "self_attn.in_proj_weight": 2 * length * width * 3 * width,
        "self_attn.out_proj.weight": 2 * length * width * width,
        "linear1.weight": 2 * length * width * 16,
        "linear2.weight": 2 * length * width * 16,
    }
    assert flops.others == 2 * (2 * length * length * width)


LENGTH, IN, HIDDEN = 5, 4, 3


@pytest.mark.parametrize(("kind", "gates"), [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)])
def test_recurrent_layers_by_hand(kind, gates):
    """Every step multiplies by the weights of all gates, from its input and from the hidden state before."""
    state = torch.zeros(2, 1, HIDDEN)
    flops = forward_flops(kind(IN, HIDDEN, 2), torch.zeros(LENGTH, 1, IN), (state, state) if kind is nn.LSTM else state)
    expected = {"weight_ih_l0": LENGTH * 2 * gates * HIDDEN * IN}
    expected |= dict.fromkeys(["weight_hh_l0", "weight_ih_l1", "weight_hh_l1"], LENGTH * 2 * gates * HIDDEN * HIDDEN)
    assert flops == Flops(expected)
    assert flops.sparse({"weight_ih_l0": 0.5}) == flops.dense - expected["weight_ih_l0"] / 2


def test_a_recurrent_layer_of_both_directions_by_hand():
    flops = forward_flops(nn.LSTM(IN, HIDDEN, bidirectional=True), torch.zeros(LENGTH, 1, IN))
    assert flops.of_weights["weight_ih_l0"] == flops.of_weights["weight_ih_l0_reverse"] == LENGTH * 2 * 4 * HIDDEN * IN
    assert flops.others == 0


def test_a_masked_lstm_costs_what_its_weights_do():
    model = nn.LSTM(IN, HIDDEN)
    masking = Masking(torch.optim.SGD(model.parameters(), 0.1, 0.9), None)
    masking.add_module(model, 0.5)
    flops = forward_flops(model, torch.zeros(LENGTH, 1, IN))
    assert flops.sparse(masking.densities) == LENGTH * 2 * masking.total_nonzero
    assert flops.inference(masking.densities) == 0.5


def test_a_bilinear_layer_by_hand():
    assert forward_flops(nn.Bilinear(4, 6, 3), torch.zeros(1, 4), torch.zeros(1, 6)) == Flops({"weight": 2 * 3 * 4 * 6})
    assert forward_flops(nn.Bilinear(4, 6, 3), torch.zeros(2, 5, 4), torch.zeros(2, 5, 6)).dense == 10 * 2 * 3 * 4 * 6


@pytest.mark.parametrize("sizes", [{}, dict(kdim=6, vdim=10)], ids=["one weight", "a weight each"])
def test_attention_by_hand(sizes):
    """Queries of length 3 and keys of length 5; a product with q, k, v and the output, and two between activations."""
    queries, keys, values = (
        torch.zeros(3, 1, 8),
        torch.zeros(5, 1, sizes.get("kdim", 8)),
        torch.zeros(5, 1, sizes.get("vdim", 8)),
    )
    flops = forward_flops(nn.MultiheadAttention(8, 2, **sizes), query=queries, key=keys, value=values)
    of_inputs = [2 * 3 * 8 * 8, 2 * 5 * 8 * keys.shape[2], 2 * 5 * 8 * values.shape[2]]
    names = ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    expected = dict(zip(names, of_inputs, strict=True)) if sizes else {"in_proj_weight": sum(of_inputs)}
    assert flops == Flops(expected | {"out_proj.weight": 2 * 3 * 8 * 8}, others=2 * (2 * 3 * 5 * 8))


def test_one_example_without_a_batch():
    assert forward_flops(nn.Linear(4, 3), torch.zeros(4)) == Flops({"weight": 24})
    assert forward_flops(nn.Linear(4, 3, bias=False), torch.zeros(4)) == Flops({"weight": 24})


class Unusual(nn.Module):
    """A product that torch has no count for, a weight that is computed, one that is not used, and a look-up."""

    def __init__(self):
        super().__init__()
        self.scaled, self.distance = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.spare, self.table = nn.Linear(4, 4), nn.Embedding(10, 4)

    def forward(self, indices, x):
        rows = self.table(indices) + x @ (self.scaled.weight * 2)
        return torch.cdist(rows, self.distance.weight)


def test_weights_that_cannot_be_counted_are_said():
    flops = forward_flops(Unusual(), torch.zeros(1, dtype=torch.long), x=torch.zeros(1, 4))
    assert flops.of_weights == {"spare.weight": 0, "table.weight": 0}
    assert set(flops.uncounted) == {"scaled.weight", "distance.weight"}
    assert flops.others == 2 * 16
    with pytest.warns(
        UserWarning, match=r"FLOPs are not known, by the operation that takes them: scaled\.weight \(aten\.mul\)"
    ):
        flops.sparse({"scaled.weight": 0.5, "spare.weight": 0.5})
    with pytest.raises(ValueError, match=r"Expected densities of the weights spare.weight, .*, got 1\.spare\.weight"):
        flops.sparse({"1.spare.weight": 0.5})


def test_a_weight_that_is_used_twice_counts_twice():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    assert forward_flops(model, torch.zeros(1, 4)) == Flops({"0.weight": 2 * 2 * 16})


def test_grouped_and_strided_convolutions():
    model = nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4)
    assert forward_flops(model, torch.zeros(1, 8, 6, 6)) == Flops({"weight": 2 * 3 * 3 * 8 * 2 * 9})


def test_counting_leaves_the_model_alone():
    model = nn.Sequential(nn.BatchNorm1d(4), mlp(4, 2))
    model[0].eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    forward_flops(model, torch.ones(1, 4))
    assert model[1].training
    assert not model[0].training
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
