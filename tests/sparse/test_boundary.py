"""Nothing that a user passes reaches the kernels unchecked: each mistake is one clear error, and no foreign memory."""

import copy
import warnings

import pytest
import torch
from helpers_sparse import rows_of, sparse_weight
from torch import nn

from sparselearning.sparse import SparseConv2d, SparseLinear, available, ops
from sparselearning.sparse.interface import call, conv_shape, row_shape

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")
OPERATORS = torch.ops.sparselearning


def linear_arguments(outputs=4, features=6, dtype=torch.float32):
    """Return what the operator `linear` takes after its input, by name."""
    value, start, column = rows_of(sparse_weight((outputs, features), 0.5, dtype))
    turned = ops.transposed(start, column, row_shape(1, features, outputs))
    names = ("value", "bias", "start", "column", "t_start", "t_column", "t_order", "relu")
    return dict(zip(names, (value, torch.randn(outputs, dtype=dtype), start, column, *turned, False), strict=True))


def sparse_conv(*args, **kwargs):
    conv = nn.Conv2d(*args, **kwargs)
    with torch.no_grad():
        conv.weight.copy_(sparse_weight(conv.weight.shape, 0.3))
    return conv, SparseConv2d.from_dense(conv)


def error_of(call):
    with pytest.raises(RuntimeError) as error:
        call()
    return str(error.value)


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(8, 16, 3), (2, 9, 6, 6)),
        (nn.Conv2d(8, 16, 3), (20, 20, 6, 6)),
        (nn.Conv2d(8, 16, 3, groups=4), (2, 9, 6, 6)),
        (nn.Conv2d(8, 16, 3), (6, 6)),
        (nn.Conv2d(8, 16, 3), (1, 2, 8, 6, 6)),
        (nn.Conv2d(8, 16, 3), (2, 8, 2, 6)),
        (nn.Conv2d(8, 16, 3, dilation=5, padding=2), (2, 8, 6, 6)),
        (nn.Conv2d(8, 16, 3, padding=3), (2, 8, 0, 6)),
        (nn.Linear(64, 32), (2, 100)),
        (nn.Linear(64, 32), (3, 40, 100)),
        (nn.Linear(64, 32), (100,)),
        (nn.Linear(64, 32), (0, 100)),
        (nn.Linear(64, 32), ()),
    ],
)
def test_wrong_inputs_raise_what_dense_layers_raise(layer, shape, grad):
    kind = SparseLinear if isinstance(layer, nn.Linear) else SparseConv2d
    sparse, x = kind.from_dense(layer), torch.ones(shape, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        expected = error_of(lambda: layer(x))
        assert error_of(lambda: sparse(x)).startswith(expected)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (3, 0, 6), (2, 3, 4, 6), (40, 6), (5, 4, 6)])
def test_linear_takes_any_leading_dimensions_and_gives_contiguous_rows(shape):
    linear = nn.Linear(6, 4)
    sparse, x = SparseLinear.from_dense(linear), torch.randn(shape, requires_grad=True)
    y = sparse(x)
    torch.testing.assert_close(y, linear(x), atol=1e-5, rtol=1e-5)
    assert y.is_contiguous()
    y.view(-1).sum().backward()


@pytest.mark.parametrize("order", [torch.Tensor.contiguous, lambda x: x.t().contiguous().t(), lambda x: x[:, ::2]])
@pytest.mark.parametrize(("batch", "outputs"), [(17, 5), (128, 300), (700, 33)])
def test_rows_in_any_order_give_rows(batch, outputs, order):
    x = order(torch.randn(batch, 70)).detach().requires_grad_()
    linear = nn.Linear(x.shape[1], outputs)
    with torch.no_grad():
        linear.weight.copy_(sparse_weight(linear.weight.shape, 0.2))
    sparse = SparseLinear.from_dense(linear)
    dy = order(torch.randn(batch, 2 * outputs))[:, :outputs]
    found, expected = sparse(x), linear(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert found.view(-1).is_contiguous()
    gradients = [torch.autograd.grad(y, [x, bias], dy) for y, bias in ((found, sparse.bias), (expected, linear.bias))]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)
    assert gradients[0][0].is_contiguous()


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("batch", [0, 3, 20])
def test_layers_without_inputs_or_outputs(inputs, outputs, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch initialises nothing, and says so
        linear, conv = nn.Linear(inputs, outputs), nn.Conv2d(inputs, outputs or 1, 3)
    for layer, kind, shape in ((linear, SparseLinear, (batch, inputs)), (conv, SparseConv2d, (batch, inputs, 5, 5))):
        x = torch.ones(shape, requires_grad=True)
        sparse = kind.from_dense(layer)
        expected = layer(x) if inputs or kind is SparseLinear else layer.bias.reshape(-1, 1, 1).expand(batch, -1, 3, 3)
        torch.testing.assert_close(sparse(x), expected)  # torch gives an image without channels
        sparse(x).sum().backward()
        assert sparse.value.grad.shape == sparse.value.shape


WRONG = {
    "a bias that is too short": dict(bias=torch.ones(3)),
    "a bias of another dtype": dict(bias=torch.ones(4, dtype=torch.float64)),
    "values of another dtype": dict(value=torch.ones(5, dtype=torch.float64)),
    "too few values": dict(value=torch.ones(2)),
    "values on another device": dict(value=torch.ones(5, device="meta")),
    "columns of another dtype": dict(column=torch.zeros(5, dtype=torch.int64)),
    "too few columns": dict(column=torch.zeros(2, dtype=torch.int32)),
    "no starts": dict(start=torch.zeros(0, dtype=torch.int32)),
    "starts beyond the values": dict(start=torch.tensor([0, 1, 2, 3, 10**6], dtype=torch.int32)),
    "starts below zero": dict(start=torch.tensor([-5, 1, 2, 3, 4], dtype=torch.int32)),
    "starts that fall": dict(start=torch.tensor([0, 4, 2, 3, 4], dtype=torch.int32)),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("batch", [0, 2, 20])
def test_operators_refuse(what, batch):
    torch.manual_seed(0)
    given = linear_arguments() | WRONG[what]
    if batch == 0 and what.startswith("starts"):
        return  # without rows nothing reads them
    with pytest.raises((TypeError, ValueError, RuntimeError)):
        OPERATORS.linear(torch.randn(batch, 6), *given.values())
    if batch:
        with pytest.raises((TypeError, ValueError, RuntimeError)), torch.no_grad():
            ops.run("linear", torch.randn(batch, 6), *given.values())


@pytest.mark.parametrize("what", ["t_start", "t_column", "t_order"])
@pytest.mark.parametrize("number", [-1, 7, 10**6])
def test_the_input_gradient_refuses_indices_out_of_range(what, number):
    given = linear_arguments()
    given[what] = given[what].clone()
    given[what][-1] = max(number, len(given["value"]) + 1) if number > 0 else number
    x = torch.randn(20, 6, requires_grad=True)
    with pytest.raises(ValueError, match="do not fit its shape"):
        OPERATORS.linear(x, *given.values()).sum().backward()


def test_a_kernel_gets_sliced_values_and_indices_as_they_look():
    given = linear_arguments()
    x = torch.randn(20, 6)
    expected = OPERATORS.linear(x, *given.values())
    spread = {name: torch.stack([part, part - 1], 1)[:, 0] for name, part in given.items() if name != "relu"}
    assert torch.equal(OPERATORS.linear(x, **(given | spread)), expected)
    negated = {name: torch._neg_view(-given[name]) for name in ("value", "bias")}
    with torch.no_grad():
        assert torch.equal(ops.run("linear", x, *(given | negated).values()), expected)
        assert torch.equal(ops.run("linear", torch._neg_view(-x), *given.values()), expected)


@pytest.mark.parametrize(
    "change",
    [
        dict(groups=0),
        dict(groups=3),
        dict(groups=-1),
        dict(stride=(0, 1)),
        dict(stride=(1,)),
        dict(stride=(2**40, 1)),
        dict(padding=(-1, 0)),
        dict(padding=(2**62, 0)),
        dict(dilation=(0, 1)),
        dict(dilation=(2**62, 2**62)),
        dict(kernel=(0, 3)),
        dict(kernel=(2**31, 2**31)),
        dict(kernel=(1, 3)),
        dict(kernel=(7, 7)),
    ],
)
def test_convolutions_refuse_numbers_that_make_none(change):
    given = dict(kernel=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    value, start, column = rows_of(torch.ones(4, 2, 3, 3))
    turned = ops.transposed(start, column, conv_shape(1, 2, 3, 3, 4, *given.values(), False)[0])
    given |= change
    x, dy = torch.randn(2, 2, 4, 4), torch.randn(2, 4, 4, 4)
    kernel, *rest = given.values()
    calls = [
        lambda: OPERATORS.conv2d(x, value, None, start, column, *turned, kernel, *rest, False),
        lambda: OPERATORS.conv2d_input_gradient(dy, value, *turned, x.shape, kernel, *rest),
        lambda: OPERATORS.conv2d_weight_gradient(dy, x, start, column, kernel, *rest, True),
        lambda: OPERATORS.conv2d(x.to("meta"), *(t.to("meta") for t in (value, value[:4], start, column, *turned)),
                                 kernel, *rest, False),
    ]  # fmt: skip
    for run in calls[:3] if change.get("kernel") in [(1, 3)] else calls:
        with pytest.raises((RuntimeError, ValueError)):
            run()


@pytest.mark.parametrize(
    ("scale", "shift"),
    [(torch.ones(2), torch.ones(3)), (torch.ones(3), torch.ones(0)), (torch.ones(3).double(), torch.ones(3))],
)
def test_affine_refuses_a_short_scale(scale, shift):
    for x in (torch.randn(2, 3, 4), torch.randn(2, 3, 4, device="meta")):
        with pytest.raises((RuntimeError, TypeError)):
            OPERATORS.affine(x, scale.to(x.device), shift.to(x.device), True)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [("affine", dict(outer=2**62, channels=1, inner=0, relu=0)), ("transpose", dict(rows=0, columns=2**62))],
)
def test_sizes_of_nothing_take_no_time(name, sizes):
    given = dict(scale=torch.ones(1), shift=torch.ones(1)) if name == "affine" else {}
    call(name, torch.empty(0), x=torch.empty(0), **given, **sizes)


@pytest.mark.parametrize(
    "change",
    [
        dict(place=torch.zeros(3, dtype=torch.uint8)),
        dict(place=torch.zeros(32)),
        dict(window_y=0),
        dict(window_x=-1),
        dict(window_y=5),
        dict(window_y=2**40, window_x=2**40),
        dict(height=2**40),
        dict(channels=3),
        dict(inner=-16),
        dict(inner=2**62),
        dict(x=torch.zeros(5)),
        dict(dy=torch.zeros(5)),
    ],
)
def test_pooling_refuses_sizes_that_do_not_fit(change):
    sizes = dict(channels=2, height=4, width=4, inner=16, window_y=2, window_x=2)
    place = torch.zeros(2 * 4 * 16, dtype=torch.uint8)
    forward = dict(x=torch.zeros(2 * 16 * 16), relu=1, place=place) | sizes
    backward = dict(dy=torch.zeros(2 * 4 * 16), place=place) | sizes
    call("pool", torch.zeros(2 * 4 * 16), **forward)
    call("pool_gradient", torch.zeros(2 * 16 * 16), **backward)
    for name, given, results in (("pool", forward, 2 * 4 * 16), ("pool_gradient", backward, 2 * 16 * 16)):
        if set(change) <= set(given):
            with pytest.raises((TypeError, ValueError)):
                call(name, torch.zeros(results), **given | change)


def test_affine_has_all_gradients():
    x, scale, shift = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 4), 3, 3))
    assert torch.autograd.gradcheck(lambda *given: OPERATORS.affine(*given, False), (x, scale, shift))


def test_indices_that_change_after_they_were_made_are_refused():
    for batch in (1, 3, 8, 64):
        layer = SparseLinear.from_dense(nn.Linear(6, 4))
        layer(torch.randn(batch, 6))
        layer.column.numpy()[0] = 10**6  # bumps no version
        with pytest.raises(ValueError, match="do not fit its shape"), torch.no_grad():
            layer(torch.randn(batch, 6))


@pytest.mark.parametrize("kwargs", [dict(dilation=1000, padding=1000), dict(stride=(65536, 1), padding=1)])
@pytest.mark.parametrize("batch", [2, 32])
def test_large_steps_on_small_images_cost_no_memory(kwargs, batch):
    conv, sparse = sparse_conv(3, 8, 3, **kwargs)
    results = []
    for layer in (conv, sparse):
        x = torch.ones(batch, 3, 4, 4, requires_grad=True)
        results.append((y := layer(x), *torch.autograd.grad(y.square().sum(), [x, layer.bias])))
    torch.testing.assert_close(*results, atol=1e-4, rtol=1e-4)


@pytest.mark.long
def test_what_no_kernel_is_for_is_refused_at_once():
    with pytest.raises(ValueError, match="leave it dense"):
        SparseConv2d.from_dense(nn.Conv2d(3, 8, 3, stride=65536))
    _, wide = sparse_conv(1, 1, 1, padding=(50_000, 0), bias=False)
    with pytest.raises(ValueError, match="leave it dense"), torch.no_grad():
        wide(torch.ones(1, 1, 1, 50_000))


def parts_of(layer):
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize(
    "damage",
    [
        lambda s: s["start"].__setitem__(-1, 10**6),
        lambda s: s["start"].__setitem__(1, -3),
        lambda s: s["column"].__setitem__(0, 10**6),
        lambda s: s.update(column=s["column"][:-1]),
        lambda s: s.update(value=s["value"][:-1]),
        lambda s: s.update(value=s["value"][:-1], column=s["column"][:-1]),
        lambda s: s.update(start=s["start"][:-1]),
        lambda s: s.update(start=s["start"].float()),
        lambda s: s.update(column=s["column"].double()),
        lambda s: s.update(value=s["value"].to(torch.complex64)),
        lambda s: s.update(value=s["value"].to_sparse()),
        lambda s: s.update(bias=torch.ones(9)),
        lambda s: s.pop("start"),
        lambda s: s.update(more=torch.ones(1)),
    ],
)
@pytest.mark.parametrize("built", [True, False])
def test_a_refused_load_leaves_the_layer_as_it_was(damage, assign, built, monkeypatch):
    if not built:
        monkeypatch.setattr("sparselearning.native.library.LIBRARY", None)
    torch.manual_seed(0)
    _, layer = sparse_conv(4, 6, 3)
    _, other = sparse_conv(4, 6, 3)
    state, before, x = parts_of(other), parts_of(layer), torch.randn(2, 4, 5, 5)
    expected = layer(x)
    damage(state)
    with pytest.raises(RuntimeError, match="SparseConv2d"):
        layer.load_state_dict(state, assign=assign)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())
    assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("assign", [True, False])
def test_a_sliced_state_loads_as_it_looks(assign):
    _, layer = sparse_conv(4, 6, 3)
    _, other = sparse_conv(4, 6, 3)
    sliced = {name: torch.stack([part, part + 1], 1)[:, 0] for name, part in other.state_dict().items()}
    assert not sliced["column"].is_contiguous()
    layer.load_state_dict(sliced, assign=assign)
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(layer(x), other(x))
    copy.deepcopy(layer)(x).sum().backward()


def test_sparse_layers_take_their_input_by_the_name_of_dense_ones():
    conv, sparse = sparse_conv(4, 6, 3)
    linear, x = nn.Linear(6, 4), torch.randn(20, 4, 5, 6)
    torch.testing.assert_close(sparse(input=x), conv(input=x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(SparseLinear.from_dense(linear)(input=x), linear(input=x), atol=1e-4, rtol=1e-4)


def test_sparse_layers_have_the_attributes_of_dense_ones():
    conv, sparse = sparse_conv(4, 6, (3, 2), stride=2, padding=1, dilation=(1, 2), groups=2)
    names = "in_channels out_channels kernel_size stride padding dilation groups padding_mode transposed output_padding"
    for name in names.split():
        assert getattr(sparse, name) == getattr(conv, name), name
    assert torch.equal(sparse.weight, conv.weight)
    linear = nn.Linear(6, 4)
    sparse = SparseLinear.from_dense(linear)
    assert (sparse.in_features, sparse.out_features) == (6, 4)
    assert torch.equal(sparse.weight, linear.weight)


@pytest.mark.parametrize("training", [True, False])
def test_parents_that_read_weights_accept_sparse_layers(training):
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0, batch_first=True).train(training)
    x = torch.randn(2, 5, 16)
    expected = layer(x)
    layer.linear1, layer.linear2 = SparseLinear.from_dense(layer.linear1), SparseLinear.from_dense(layer.linear2)
    torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected, atol=1e-5, rtol=1e-5)


def test_in_inference_mode_layers_are_made_loaded_and_run():
    with torch.inference_mode():
        conv, sparse = sparse_conv(4, 6, 3)
        sparse.load_state_dict(parts_of(sparse))
        x = torch.randn(20, 4, 5, 5)
        torch.testing.assert_close(sparse(x), conv(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sparse.to_dense()(x), conv(x))
