"""Max-pooling in plain order equals torch's, whatever the windows, and so do means of planes."""

import pytest
import torch
import torch.nn.functional as F
from helpers_sparse import instruction_sets
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from sparselearning.sparse import available, pooling
from sparselearning.sparse.interface import kernels, watched
from sparselearning.sparse.memory_order import to_batch_last
from sparselearning.sparse.pooling import BatchLastAdaptiveAvgPool2d, BatchLastMaxPool2d, pool_planes, pooled_shape

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")
pair = st.tuples(st.integers(1, 4), st.integers(1, 4))


@settings(max_examples=150, deadline=None)
@given(
    kernel=pair, stride=pair, padding=st.tuples(st.integers(0, 2), st.integers(0, 2)), ceil_mode=st.booleans(),
    size=st.tuples(st.integers(1, 20), st.integers(1, 40)), dtype=st.sampled_from([torch.float32, torch.float64]),
    instruction_set=st.sampled_from(instruction_sets()), special=st.booleans(),
)  # fmt: skip
def test_pooling_equals_torch(kernel, stride, padding, ceil_mode, size, dtype, instruction_set, special):
    assume(all(2 * pad <= k <= n + 2 * pad for pad, k, n in zip(padding, kernel, size, strict=True)))
    torch.manual_seed(0)
    x = torch.randn(2, 3, *size, dtype=dtype)
    if special:
        drawn = torch.rand_like(x)
        x[drawn < 0.1], x[drawn > 0.8], x[(drawn > 0.4) & (drawn < 0.5)] = torch.nan, -torch.inf, torch.inf
    expected = F.max_pool2d(x, kernel, stride, padding, ceil_mode=ceil_mode)
    assert pooled_shape(x.shape, kernel, stride, padding, ceil_mode) == expected.shape
    kernels().instruction_set = instruction_set
    try:
        found = pool_planes(x, kernel, stride, padding, ceil_mode)
    finally:
        kernels().instruction_set = kernels().best
    assert torch.equal(found.nan_to_num(7.0), expected.nan_to_num(7.0))


def test_the_layer_takes_the_kernel_only_where_nothing_else_is_asked(monkeypatch):
    calls = []
    monkeypatch.setattr(pooling, "pool_planes", lambda *given: (calls.append(given), pool_planes(*given))[1])
    layer, x = BatchLastMaxPool2d(3, 2, 1), torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        assert torch.equal(layer(x), F.max_pool2d(x, 3, 2, 1))
        assert len(calls) == 1
        for other in (BatchLastMaxPool2d(3, 2, 1, dilation=2), BatchLastMaxPool2d(3, 2, 1, return_indices=True)):
            expected = nn.MaxPool2d(3, 2, 1, other.dilation, other.return_indices)(x)
            torch.testing.assert_close(other(x), expected)
        for given in (x.half(), x[0], x.to(memory_format=torch.channels_last)):
            assert torch.equal(layer(given), nn.MaxPool2d(3, 2, 1)(given))
    watched = x.clone().requires_grad_()
    layer(watched).sum().backward()
    assert watched.grad is not None
    assert len(calls) == 1
    with torch.no_grad(), pytest.raises(RuntimeError, match="pad"):
        BatchLastMaxPool2d(2, 2, 2)(x)
    with torch.no_grad(), pytest.raises(RuntimeError, match="too small"):
        BatchLastMaxPool2d(9)(x)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12)),
    dtype=st.sampled_from([torch.float32, torch.float64]), instruction_set=st.sampled_from(instruction_sets()),
    turned=st.booleans(), lost=st.booleans(),
)  # fmt: skip
def test_means_of_planes_equal_those_of_double_precision(shape, dtype, instruction_set, turned, lost):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    if lost:
        x[0, 0, 0, 0] = torch.nan
    x = to_batch_last(x) if turned else x
    kernels().instruction_set = instruction_set
    try:
        with watched() as calls:
            found = BatchLastAdaptiveAvgPool2d(1)(x)
    finally:
        kernels().instruction_set = kernels().best
    assert calls[-1].name.startswith("sl_average_planes")
    assert found.is_contiguous()
    expected = F.adaptive_avg_pool2d(x.double(), 1).to(dtype)
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_means_that_need_gradients_are_torchs():
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    with watched() as calls:
        BatchLastAdaptiveAvgPool2d(1)(x).sum().backward()
    assert not calls
    assert torch.equal(x.grad, torch.full_like(x, 1 / 16))


def test_sizes_that_do_not_fit_are_refused():
    x, y = torch.randn(1, 2, 6, 6), torch.empty(1, 2, 3, 3)
    sizes = dict(planes=2, height=6, width=6, out_height=3, out_width=3)
    windows = dict(kernel_y=2, kernel_x=2, stride_y=2, stride_x=2, pad_y=0, pad_x=0)
    pooling.call("pool_planes", y, x=x, **sizes, **windows)
    for wrong in (
        dict(planes=3), dict(planes=-1), dict(height=7), dict(out_width=4), dict(pad_y=2), dict(pad_x=-1),
        dict(kernel_y=0), dict(stride_x=0), dict(stride_y=4), dict(stride_y=2**31), dict(out_height=0),
    ):  # fmt: skip
        with pytest.raises(ValueError, match="sizes"):
            pooling.call("pool_planes", y, x=x, **{**sizes, **windows, **wrong})
