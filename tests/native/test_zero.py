"""Masks of another shape, dtype or place in memory write to nothing that is not theirs."""

import pytest
import torch

from sparselearning.native.zero import zero_inactive


@pytest.mark.parametrize(
    ("tensor", "mask"),
    [
        (torch.ones(1000, 1000), torch.zeros(2, 2, dtype=torch.bool)),
        (torch.ones(4), torch.zeros(4)),
        (torch.ones(4), torch.zeros(4, dtype=torch.uint8)),
    ],
)
def test_a_mask_of_another_shape_or_dtype_is_refused(tensor, mask):
    with pytest.raises(ValueError, match=r"Expected a bool mask of shape"):
        zero_inactive([tensor], [mask])
    assert tensor.eq(1).all()


def test_one_mask_for_each_tensor():
    with pytest.raises(ValueError, match="got 2 tensors and 1 masks"):
        zero_inactive([torch.ones(2), torch.ones(2)], [torch.zeros(2, dtype=torch.bool)])


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[:, :4],
        lambda x: x[::2],
        lambda x: x.t(),
        lambda x: x[1:, 3],
        lambda x: x.reshape(2, 2, 2, 4).permute(3, 0, 2, 1),
    ],
)
def test_views_change_where_their_masks_say(view):
    base, mask = torch.ones(4, 8), torch.rand(4, 8) < 0.5
    expected = base.clone()
    view(expected).masked_fill_(~view(mask), 0)
    zero_inactive([view(base)], [view(mask)])
    assert torch.equal(base, expected)


def test_an_expanded_tensor_is_refused_by_torch():
    with pytest.raises(RuntimeError, match="more than one element"):
        zero_inactive([torch.ones(1).expand(1000)], [torch.zeros(1, dtype=torch.bool).expand(1000)])


def test_a_negated_view():
    x = torch.randn(4, dtype=torch.complex64)
    view = torch.imag(x.conj())
    zero_inactive([view], [torch.tensor([True, False, True, False])])
    assert x.imag.ne(0).tolist() == [True, False, True, False]


def test_in_inference_mode():
    with torch.inference_mode():
        weight = torch.ones(3)
        zero_inactive([weight], [torch.tensor([True, False, True])])
    assert weight.tolist() == [1, 0, 1]
