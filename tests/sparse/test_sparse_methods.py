"""The methods train on sparse kernels, too."""

import pytest
from by_method import begin, go_on
from helpers import mlp, sgd, snapshot, train

from sparselearning import Masking
from sparselearning.sparse import available

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")


@pytest.mark.parametrize(
    "method", ["set", "rigl", "mest", "deep_rewiring", "granet", "cht", "cht_soft", "smet", "guided"]
)
def test_methods_train_on_sparse_kernels(method):
    model, optimizer, masking = begin(method, weights="sparse", regrown="random")
    for _ in go_on(model, optimizer, masking):
        for layer in masking.layers:
            assert not layer.weight[~layer.mask].any()
    assert masking.total_nonzero == 180
    assert masking.exploration_rate > masking.density or method == "deep_rewiring"


@pytest.mark.parametrize("method", ["rigl", "srigl", "granet"])
@pytest.mark.parametrize("last", [13, 31, 40])
def test_sparse_kernels_see_gradients_before_the_last_update(method, last):
    """The last update need not be a multiple of 30: it comes at step 13, or at 31, right after the one at 30."""
    model = mlp(20, 30, 10)
    optimizer = sgd(model)
    parts = dict(stop_fraction=last / 50, prune_every_k_steps=30, weights="sparse")
    masking = Masking.from_method(method, model, optimizer, 50, 0.2, **parts)
    list(go_on(model, optimizer, masking, last=50))
    assert masking.density == pytest.approx(0.2, abs=0.02)


@pytest.mark.parametrize("reset", [True, False])
def test_sparse_kernels_reset_the_state_of_regrown_weights(reset):
    model, optimizer, masking = begin("rigl", weights="sparse", prune_every_k_steps=3, reset_state=reset)
    train(model, optimizer, 2)
    before = snapshot(masking)
    train(model, optimizer, 1)
    for layer in masking.layers:
        module = masking.held.trained[layer.name]
        regrown = (layer.mask & ~before[layer.name]).flatten()[module.entries.position]
        momentum = optimizer.state[module.value]["momentum_buffer"]
        assert bool(momentum[regrown].any()) is not reset
        assert momentum[~regrown].any()
