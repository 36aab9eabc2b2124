"""The kernels equal torch's dense layers, whatever the shape, instruction set and number of threads."""

import pytest
import torch
import torch.nn.functional as F
from helpers_sparse import conv2d, instruction_sets, linear, rows_of, sparse_weight
from hypothesis import given, settings
from hypothesis import strategies as st

from sparselearning.sparse import ops
from sparselearning.sparse.interface import available, conv_shape, kernels, row_shape
from sparselearning.sparse.memory_order import in_order, is_turned

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10}


@st.composite
def convolutions(draw):
    pair = lambda low, high: st.tuples(st.integers(low, high), st.integers(low, high))  # noqa: E731
    kernel, stride, padding, dilation = (draw(p) for p in (pair(1, 4), pair(1, 3), pair(0, 3), pair(1, 3)))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    channels = [groups * draw(st.integers(1, 4)) for _ in range(2)]
    smallest = [max(1, d * (k - 1) + 1 - 2 * p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    size = [low + draw(st.integers(0, 16)) for low in smallest]
    return {
        "batch": draw(st.integers(1, 65)),
        "channels": channels,
        "size": size,
        "kernel": kernel,
        "density": draw(st.sampled_from([0.0, 0.05, 0.2, 1.0])),
        "dtype": draw(st.sampled_from([torch.float32, torch.float64])),
        "geometry": {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups},
        "instruction_set": draw(st.sampled_from(instruction_sets())),
        "bias": draw(st.booleans()),
        "relu": draw(st.booleans()),
        "turned": [draw(st.booleans()) for _ in range(2)],  # memory order of x and of the gradient of y
    }


def ordered(x, turned):
    """Return x as a new leaf, with the batch last in memory if `turned`."""
    return in_order(x.detach(), turned).requires_grad_()


def assert_same(outputs, references, dtype):
    for output, reference in zip(outputs, references, strict=True):
        scale = max(1.0, reference.abs().max().item()) if reference.numel() else 1.0
        torch.testing.assert_close(output, reference, atol=TOLERANCE[dtype] * scale, rtol=0)


@settings(max_examples=80, deadline=None)
@given(convolutions())
def test_convolution_equals_dense_in_values_and_gradients(case):
    torch.manual_seed(0)
    dtype, geometry = case["dtype"], case["geometry"]
    inputs, outputs = case["channels"]
    weight = sparse_weight((outputs, inputs // geometry["groups"], *case["kernel"]), case["density"], dtype)
    x = ordered(torch.randn(case["batch"], inputs, *case["size"], dtype=dtype), case["turned"][0])
    bias = torch.randn(outputs, dtype=dtype, requires_grad=True) if case["bias"] else None
    dense = weight.clone().requires_grad_()
    extra = [bias] if case["bias"] else []

    kernels().instruction_set = case["instruction_set"]
    try:
        y, value = conv2d(x, weight, bias, relu=case["relu"], **geometry)
        expected = F.conv2d(x, dense, bias, **geometry)
        expected = expected.relu() if case["relu"] else expected
        dy = ordered(torch.randn(expected.shape, dtype=dtype), case["turned"][1])
        found = torch.autograd.grad(y, [x, value, *extra], dy)
    finally:
        kernels().instruction_set = kernels().best
    dx, dweight, *dbias = torch.autograd.grad(expected, [x, dense, *extra], dy)
    assert_same((y, *found), (expected, dx, dweight[weight != 0], *dbias), dtype)


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("width", [1, 3, 4, 7, 18])
def test_the_order_in_memory_changes_no_bit(width, instruction_set):
    torch.manual_seed(0)
    weight = sparse_weight((6, 3, 3, 3), 0.3, torch.float32)
    x, dy = torch.randn(32, 3, 5, width), torch.randn(32, 6, 5, width)
    results = []
    kernels().instruction_set = instruction_set
    try:
        for turned in (False, True):
            given = ordered(x, turned)
            y, value = conv2d(given, weight, padding=(1, 1))
            results.append((y, *torch.autograd.grad(y, [given, value], ordered(dy, turned))))
            assert is_turned(y)
    finally:
        kernels().instruction_set = kernels().best
    assert all(torch.equal(first, last) for first, last in zip(*results, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 120),
    features=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    density=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    instruction_set=st.sampled_from(instruction_sets()),
    relu=st.booleans(),
    turned=st.tuples(st.booleans(), st.booleans()),
)
def test_linear_equals_dense_in_values_and_gradients(batch, features, density, dtype, instruction_set, relu, turned):
    torch.manual_seed(0)
    weight = sparse_weight(features, density, dtype)
    x = ordered(torch.randn(batch, features[1], dtype=dtype), turned[0])
    bias = torch.randn(features[0], dtype=dtype, requires_grad=True)
    dense = weight.clone().requires_grad_()
    kernels().instruction_set = instruction_set
    try:
        y, value = linear(x, weight, bias, relu)
        expected = F.linear(x, dense, bias)
        expected = expected.relu() if relu else expected
        dy = in_order(torch.randn(expected.shape, dtype=dtype), turned[1])
        found = torch.autograd.grad(y, [x, value, bias], dy)
    finally:
        kernels().instruction_set = kernels().best
    dx, dweight, dbias = torch.autograd.grad(expected, [x, dense, bias], dy)
    assert_same((y, *found), (expected, dx, dweight[weight != 0], dbias), dtype)


@pytest.mark.parametrize("batch", [1, 2, 5, 9, 17, 64, 100, 113])
@pytest.mark.parametrize("wrong", [-1, 500, 2**31 - 1])
def test_a_wrong_column_is_refused_before_it_is_read(batch, wrong, force_instruction_set):
    weight = sparse_weight((40, 500), 0.3)
    value, start, column = rows_of(weight)
    turned = ops.transposed(start, column, row_shape(1, 500, 40))
    column[-7] = wrong
    for index in instruction_sets():
        force_instruction_set(index)
        with pytest.raises(ValueError, match="do not fit its shape"):
            ops.run("linear", torch.randn(batch, 500), value, None, start, column, *turned, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [3, 17, 32])
@pytest.mark.parametrize(("outputs", "stride", "groups"), [(40, (1, 1), 1), (48, (2, 1), 2), (520, (1, 1), 1)])
def test_wide_layers_are_computed_block_by_block(outputs, stride, groups, batch, dtype, force_instruction_set):
    torch.manual_seed(0)
    weight = sparse_weight((outputs, 200, 3, 3), 0.08, dtype)
    geometry = dict(stride=stride, padding=(1, 1), groups=groups)
    x = torch.randn(batch, 200 * groups, 8, 7, dtype=dtype, requires_grad=True)
    bias = torch.randn(outputs, dtype=dtype)
    dense = weight.clone().requires_grad_()
    expected = F.conv2d(x, dense, bias, **geometry).relu()
    dx, dweight = torch.autograd.grad(expected.sum(), [x, dense])
    for index in instruction_sets():
        force_instruction_set(index)
        y, value = conv2d(x, weight, bias, relu=True, **geometry)
        found = torch.autograd.grad(y.sum(), [x, value])
        assert_same((y, *found), (expected, dx, dweight[weight != 0]), dtype)


@pytest.mark.parametrize("batch", [5, 24, 32])
@pytest.mark.parametrize(
    "geometry",
    [
        dict(padding=(1, 1)),
        dict(padding=(2, 2), dilation=(2, 2)),
        dict(stride=(2, 2), padding=(1, 1)),
        dict(groups=2),
    ],
    ids=lambda geometry: "-".join(geometry),
)
def test_strips_that_follow_one_another_share_their_rows(geometry, batch, force_instruction_set):
    torch.manual_seed(0)
    groups = geometry.get("groups", 1)
    weight = sparse_weight((12, 64, 3, 3), 0.05)
    x = torch.randn(batch, 64 * groups, 30, 33, requires_grad=True)
    dense = weight.clone().requires_grad_()
    expected = F.conv2d(x, dense, **geometry)
    dy = torch.randn_like(expected)
    dx, dweight = torch.autograd.grad(expected, [x, dense], dy)
    for index in instruction_sets():
        force_instruction_set(index)
        y, value = conv2d(x, weight, **geometry)
        found = torch.autograd.grad(y, [x, value], dy)
        assert_same((y, *found), (expected, dx, dweight[weight != 0]), torch.float32)


def test_wide_linear_layers_are_computed_block_by_block():
    torch.manual_seed(0)
    weight = sparse_weight((600, 3500), 0.05)
    x = torch.randn(70, 3500)
    y, _ = linear(x, weight, relu=True)
    assert_same([y], [F.linear(x, weight).relu()], torch.float32)


@pytest.mark.parametrize("batch", [2, 16])
def test_gradients_pass_gradcheck(batch):
    weight = sparse_weight((3, 2, 3, 3), 0.4, torch.float64)
    x = torch.randn(batch, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(3, dtype=torch.float64, requires_grad=True)
    value, start, column = rows_of(weight)
    geometry = ((3, 3), (2, 1), (1, 1), (1, 1), 1)
    turned = ops.transposed(start, column, conv_shape(1, 2, 3, 3, 3, *geometry, False)[0])

    def layer(x, value, bias):
        return torch.ops.sparselearning.conv2d(x, value, bias, start, column, *turned, *geometry, False)

    assert torch.autograd.gradcheck(layer, (x, value.requires_grad_(), bias))


def everything(threads, batch, size):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    weight = sparse_weight((48, 32, 3, 3), 0.1)
    x = torch.randn(batch, 32, size, size, requires_grad=True)
    y, value = conv2d(x, weight, stride=(2, 2), padding=(1, 1))
    return [y, *torch.autograd.grad(y.square().sum(), [x, value])]


@pytest.mark.parametrize(("batch", "size"), [(1, 70), (7, 30), (32, 12), (2, 9)])  # the last too small for two
def test_any_number_of_threads_gives_identical_results(batch, size):
    one = everything(1, batch, size)
    for threads in (2, 3, 5):
        assert all(torch.equal(a, b) for a, b in zip(one, everything(threads, batch, size), strict=True))


def test_instruction_sets_agree(force_instruction_set):
    results = []
    for index in instruction_sets():
        force_instruction_set(index)
        results.append(everything(2, 32, 12))
    for other in results[1:]:
        assert_same(other, results[0], torch.float32)


@pytest.mark.parametrize(("batch", "last"), [(11, False), (12, True), (16, True), (17, False), (23, True), (33, False)])
def test_where_a_batch_fills_most_lanes_it_is_last_in_memory(batch, last):
    weight = sparse_weight((4, 3, 3, 3), 0.5)
    y, _ = conv2d(torch.randn(batch, 3, 8, 8), weight)
    assert y.movedim(0, -1).is_contiguous() == last
    assert y.is_contiguous() != last
    again, _ = conv2d(y.relu(), sparse_weight((5, 4, 3, 3), 0.5))
    assert again.movedim(0, -1).is_contiguous() == last


def test_empty_batch_gives_empty_output_and_zero_gradient():
    weight = sparse_weight((4, 3, 3, 3), 0.5)
    y, value = conv2d(torch.randn(0, 3, 8, 8), weight)
    assert y.shape == (0, 4, 6, 6)
    assert torch.autograd.grad(y.sum(), value)[0].eq(0).all()


def test_indices_outside_the_layer_are_refused():
    x, value = torch.randn(2, 3), torch.ones(1)
    start, column = torch.tensor([0, 1]).int(), torch.tensor([3]).int()
    t_start = torch.tensor([0, 0, 0, 1]).int()
    with pytest.raises(ValueError, match="do not fit its shape"):
        torch.ops.sparselearning.linear(x, value, None, start, column, t_start, column, column, False)


def test_a_dtype_without_kernels_is_refused():
    with pytest.raises(TypeError, match=r"float32 or float64.*bfloat16"):
        linear(torch.randn(2, 3, dtype=torch.bfloat16), torch.ones(2, 3))


@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("batch", [3, 16])
def test_operators_satisfy_opcheck(batch):
    weight = sparse_weight((4, 3, 3, 3), 0.5)
    value, start, column = rows_of(weight)
    geometry = ((3, 3), (2, 2), (1, 1), (1, 1), 1)
    turned = ops.transposed(start, column, conv_shape(1, 3, 3, 3, 4, *geometry, False)[0])
    x = torch.randn(batch, 3, 6, 6, requires_grad=True)
    arguments = (x, value.requires_grad_(), torch.randn(4), start, column, *turned, *map(list, geometry[:4]), 1, True)
    torch.library.opcheck(torch.ops.sparselearning.conv2d, arguments)
    rows = rows_of(torch.eye(3, 5))
    turned = ops.transposed(*rows[1:], row_shape(1, 5, 3))
    torch.library.opcheck(
        torch.ops.sparselearning.linear,
        (torch.randn(batch, 5, requires_grad=True), rows[0].requires_grad_(), None, *rows[1:], *turned, False),
    )


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(1, 3), (2, 4), (3, 3), (3, 5), (4, 4), (7, 7), (14, 14), (40, 60)])
def test_convolutions_of_single_pixels_equal_dense_ones(size, dtype, instruction_set):
    torch.manual_seed(0)
    kernels().instruction_set = instruction_set
    try:
        sizes = [(1, 6, 4, 1), (3, 6, 4, 2), (5, 400, 3, 1)]
        strides = [(2, 2), (1, 2), (2, 1)]
        for batch, inputs, outputs, groups, stride in [(*each, (1, 1)) for each in sizes] + [
            (2, 6, 4, 1, s) for s in strides
        ]:
            weight = sparse_weight((outputs, inputs // groups, 1, 1), 0.3, dtype)
            x = torch.randn(batch, inputs, *size, dtype=dtype, requires_grad=True)
            dense, bias = weight.clone().requires_grad_(), torch.randn(outputs, dtype=dtype)
            y, value = conv2d(x, weight, bias, relu=True, groups=groups, stride=stride)
            expected = F.conv2d(x, dense, bias, stride, groups=groups).relu()
            dy = torch.randn_like(expected)
            dx, dweight = torch.autograd.grad(expected, [x, dense], dy)
            assert_same((y, *torch.autograd.grad(y, [x, value], dy)), (expected, dx, dweight[weight != 0]), dtype)
    finally:
        kernels().instruction_set = kernels().best
