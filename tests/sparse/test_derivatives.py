"""Gradients of gradients, forward derivatives and torch.func: exact, or one clear error."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacfwd, jacrev, jvp, vmap

from sparselearning.sparse import SparseConv2d, SparseLinear, available

pytestmark = [
    pytest.mark.skipif(not available(), reason="built without sparse kernels"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:FutureWarning"),  # torch uses it for forward derivatives
]


@pytest.fixture(params=["conv", "strided", "linear"])
def layer_and_input(request):
    torch.manual_seed(0)
    if request.param == "linear":
        layer, x = nn.Linear(5, 3), torch.randn(4, 5)
    else:
        settings = dict(stride=2, padding=1, groups=2) if request.param == "strided" else {}
        layer, x = nn.Conv2d(4, 4, 3, **settings), torch.randn(2, 4, 5, 4)
    kind = SparseLinear if request.param == "linear" else SparseConv2d
    sparse = kind.from_dense(layer.double(), torch.rand_like(layer.weight) < 0.5)
    return sparse, x.double()


@pytest.mark.parametrize("relu", [False, True])
def test_gradients_of_gradients_pass_gradgradcheck(layer_and_input, relu):
    layer, x = layer_and_input
    layer.relu = relu

    def call(value, bias, x):
        return functional_call(layer, {"value": value, "bias": bias}, (x,))

    assert torch.autograd.gradgradcheck(call, (layer.value, layer.bias, x.requires_grad_()))


def test_a_gradient_penalty_is_that_of_the_dense_layer(layer_and_input):
    layer, x = layer_and_input
    dense = layer.to_dense()
    penalties = []
    for module in (layer, dense):
        given = x.clone().requires_grad_()
        (dx,) = torch.autograd.grad(module(given).square().sum(), given, create_graph=True)
        penalties.append(torch.autograd.grad(dx.square().sum(), [given, module.bias]))
    torch.testing.assert_close(*penalties)
    assert penalties[0][0].abs().sum() > 0


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: jacrev(f)(x),
        lambda f, x: jacfwd(f)(x),
        lambda f, x: vmap(f)(x),
        lambda f, x: jvp(f, (x,), (torch.ones_like(x),))[1],
        lambda f, x: grad(lambda x: f(x).square().sum())(x),
        lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).square().sum(), x),
    ],
    ids=["jacrev", "jacfwd", "vmap", "jvp", "grad", "hessian"],
)
def test_transforms_give_what_they_give_for_dense_layers(layer_and_input, transform, relu):
    layer, x = layer_and_input
    layer.relu = relu
    dense = nn.Sequential(layer.to_dense(), nn.ReLU() if relu else nn.Identity())
    torch.testing.assert_close(transform(layer, x), transform(dense, x))


@pytest.mark.parametrize("recording", [True, False])
def test_forward_derivatives(layer_and_input, recording):
    layer, x = layer_and_input
    with torch.set_grad_enabled(recording), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [forward_ad.unpack_dual(module(dual)).tangent for module in (layer, layer.to_dense())]
    torch.testing.assert_close(*tangents)


def test_one_layer_with_many_values():
    layer = SparseLinear.from_dense(nn.Linear(5, 3))
    values, x = torch.randn(4, len(layer.value)), torch.randn(2, 5)
    found = vmap(lambda value: functional_call(layer, {"value": value}, (x,)))(values)
    expected = [functional_call(layer, {"value": value}, (x,)) for value in values]
    torch.testing.assert_close(found, torch.stack(expected))


def test_operators_refuse_what_they_have_no_derivative_of():
    x = torch.randn(2, 3)
    value, bias, *indices = SparseLinear.from_dense(nn.Linear(3, 4)).arguments()
    with pytest.raises(RuntimeError, match="no forward derivatives"):
        jvp(lambda x: torch.ops.sparselearning.linear(x, value, bias, *indices, False), (x,), (x,))
    start, column, *turned = indices
    gradients = (
        lambda dy: torch.ops.sparselearning.linear_input_gradient(dy, value, *turned),
        lambda dy: torch.ops.sparselearning.linear_weight_gradient(dy, x, start, column, False)[0],
    )
    for gradient in gradients:
        with pytest.raises(RuntimeError, match="create_graph=True"):
            gradient(torch.randn(2, 4, requires_grad=True)).sum().backward()
