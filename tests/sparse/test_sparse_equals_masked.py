"""Training on sparse kernels gives what masked training gives, whatever the loop does between backward and step."""

import pytest
import torch
from helpers_equal import MAXIMIZING, OPTIMIZERS, SITUATIONS, clipped, compare, loaded, plain

from sparselearning.sparse import available

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_sparse_training_is_masked_training(name, situation):
    compare(name, situation)


@pytest.mark.parametrize("situation", [plain, loaded], ids=lambda situation: situation.__name__)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_regrown_weights_start_from_the_mean_as_in_masked_training(name, situation):
    """The last step of a run is an update; the state is that of active weights right after it."""
    masked, sparse = compare(name, situation, reset="mean")
    numbers = {id(p): i for i, p in enumerate(p for group in masked.optimizer.param_groups for p in group["params"])}
    saved, found = (run.optimizer.state_dict()["state"] for run in (masked, sparse))
    for layer in masked.masking.layers:
        of_masked, of_sparse = (state.get(numbers[id(layer.weight)], {}) for state in (saved, found))
        for key, value in of_masked.items():
            if isinstance(value, torch.Tensor) and value.shape == layer.weight.shape:
                active = value[layer.mask]
                torch.testing.assert_close(of_sparse[key][layer.mask], active, rtol=2e-2, atol=1e-6)


@pytest.mark.parametrize("setting", ["maximize", "groups", "channels_last"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_settings_of_the_optimizer_and_the_model(name, setting):
    if setting == "maximize" and name not in MAXIMIZING:
        pytest.skip("one of each kind ascends")
    compare(name, clipped, **{setting: True})
