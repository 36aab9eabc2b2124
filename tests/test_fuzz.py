"""Hypothesis looks for a network, a setting or a moment at which an invariant does not hold."""

import pytest
import torch
from helpers import assert_masks_hold
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparselearning import CosineDecay, LinearDecay, Masking
from sparselearning.distributions import DISTRIBUTIONS
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.prune import PRUNE_FUNCTIONS
from sparselearning.redistribute import REDISTRIBUTION_FUNCTIONS

SHAPES = st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple)
EXAMPLES = [100, pytest.param(10_000, marks=pytest.mark.slow)]

OPTIMIZERS = {  # the default eps is zero in float16
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda weights: torch.optim.Adam(weights, lr=0.01, eps=1e-4),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=0.01, momentum=0.9, eps=1e-4),
}
DECAYS = {
    "cosine": lambda rate: CosineDecay(rate, 6),
    "linear": lambda rate: LinearDecay(rate, 6),
    "none": lambda rate: lambda step: rate,
}


@st.composite
def networks(draw):
    """A module of weights of any shapes, dtype and layout, some of them all equal."""
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]))
    module = nn.Module()
    for i, shape in enumerate(draw(st.lists(SHAPES, min_size=1, max_size=5))):
        tied = draw(st.booleans())
        weight = torch.ones(shape, dtype=dtype) if tied else torch.randn(shape).to(dtype)
        if weight.dim() == 4 and draw(st.booleans()):
            weight = weight.contiguous(memory_format=torch.channels_last)
        module.register_parameter(f"layer{i}", nn.Parameter(weight))
    return module


def check_any(data):
    torch.manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    module = data.draw(networks(), label="network")

    def one_of(table):
        # Those that compare inactive weights need Masking(inactive="kept").
        return data.draw(st.sampled_from(sorted(name for name in table if "dense" not in name)))

    def rate(low):
        return data.draw(st.floats(low, 1, width=32))

    growth = one_of(GROWTH_FUNCTIONS)
    optimizer = OPTIMIZERS[one_of(OPTIMIZERS)](list(module.parameters()))
    masking = Masking(
        optimizer, DECAYS[one_of(DECAYS)](rate(0)), prune_mode=one_of(PRUNE_FUNCTIONS), growth_mode=growth,
        redistribution_mode=one_of(REDISTRIBUTION_FUNCTIONS), prune_every_k_steps=data.draw(st.integers(0, 3)),
    )  # fmt: skip
    sizes = [weight.numel() for weight in module.parameters()]
    density = data.draw(st.floats(min(1.0, (len(sizes) + 1) / sum(sizes)), 1), label="density")
    masking.add_module(module, density, one_of(DISTRIBUTIONS))
    total = masking.total_nonzero
    assert total == max(round(density * sum(sizes)), len(sizes))
    storages = [weight.data_ptr() for weight in module.parameters()]
    for _ in range(4):
        for weight in module.parameters():
            weight.grad = torch.randn(weight.shape).to(weight.dtype)
        masking.step()
        masking.check()
        masking.at_end_of_epoch()
        masking.check()
        assert_masks_hold(masking)
        assert masking.total_nonzero == total
    assert [weight.data_ptr() for weight in module.parameters()] == storages
    masking.load_state_dict(masking.state_dict())
    masking.check()


@pytest.mark.parametrize("examples", EXAMPLES)
def test_invariants_hold_whatever_is_trained(examples):
    settings(max_examples=examples)(given(st.data())(check_any))()
