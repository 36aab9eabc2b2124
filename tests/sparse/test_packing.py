"""The compressed file of a converted model is no larger than that of the masked one, and gives back every number."""

import pytest
import torch
from helpers_conversion import sparsify
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparselearning.sparse import SparseConv2d, SparseLinear, load_compressed, save_compressed

needs_files = pytest.importorskip("safetensors.torch")


def in_sparse_layers(model):
    """Return a model with every linear and convolution layer in its sparse form."""
    forms = {nn.Linear: SparseLinear, nn.Conv2d: SparseConv2d}
    return nn.Sequential(*(forms[type(m)].from_dense(m) if type(m) in forms else m for m in model))


def masked_by(model, pattern, density):
    """Zero the weights of a pattern."""
    for layer in model:
        if isinstance(layer, nn.Linear | nn.Conv2d):
            weight = layer.weight.detach().flatten(1)
            mask = torch.rand_like(weight) < density
            if pattern == "rows":
                mask = (torch.rand(len(weight), 1) < density).expand_as(weight)
            elif pattern == "columns":
                mask = (torch.rand(1, weight.shape[1]) < density).expand_as(weight)
            elif pattern == "blocks":
                mask = mask[:, ::4].repeat_interleave(4, 1)[:, : weight.shape[1]]
            layer.weight.data *= mask.reshape(layer.weight.shape)
    return model


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 40)] * 3),
    kernel=st.integers(1, 3),
    bias=st.booleans(),
    density=st.sampled_from([0.0, 0.001, 0.05, 0.3, 0.7, 0.79, 0.81, 0.95, 1.0]),
    pattern=st.sampled_from(["random", "rows", "columns", "blocks"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_sparse_model_takes_no_more_than_the_masked_one(
    tmp_path_factory, sizes, kernel, bias, density, pattern, dtype
):
    folder = tmp_path_factory.mktemp("files")
    first, second, third = sizes
    model = nn.Sequential(
        nn.Conv2d(first, second, kernel, bias=bias), nn.Flatten(), nn.Linear(second, third, bias=bias)
    )
    model = masked_by(model.to(dtype), pattern, density)
    sparse = in_sparse_layers(model)
    masked_bytes, _ = save_compressed(model.state_dict(), folder / "masked")
    sparse_bytes, _ = save_compressed(sparse.state_dict(), folder / "sparse")
    assert sparse_bytes <= masked_bytes
    loaded, state = load_compressed(folder / "sparse"), sparse.state_dict()
    assert loaded.keys() == state.keys()
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in state.items()
    )
    sparse.load_state_dict(loaded)


def test_active_zeros_survive(tmp_path):
    linear = nn.Linear(6, 4)
    linear.weight.data[:, ::2] = 0
    state = SparseLinear.from_dense(linear, torch.ones(4, 6)).state_dict()
    save_compressed(state, tmp_path / "file")
    loaded = load_compressed(tmp_path / "file")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    "state",
    [
        {"value": torch.ones(2), "start": torch.tensor([0, 2]).int(), "column": torch.tensor([1, 1]).int()},
        {"value": torch.ones(2), "start": torch.tensor([0, 1]).int(), "column": torch.tensor([0, 1]).int()},
        {"value": torch.ones(2), "start": torch.tensor([0, 2]).int(), "column": torch.tensor([-1, 1]).int()},
        {"value": torch.ones(3), "start": torch.tensor([0, 2]).int(), "column": torch.tensor([0, 1]).int()},
        {"value": torch.ones(2), "start": torch.tensor([0, 2]), "column": torch.tensor([0, 1])},
        {"value": torch.ones(2), "start": torch.zeros(0).int(), "column": torch.tensor([0, 1]).int()},
        {"column": torch.arange(9).int()},
    ],
)
def test_entries_with_these_names_that_are_no_layer_survive(tmp_path, state):
    save_compressed(state, tmp_path / "file")
    loaded = load_compressed(tmp_path / "file")
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(value=torch.ones(3)), "positions of 'column' do not fit"),
        ({"column.sparse_shape": torch.tensor([4, 1])}, "positions of 'column' do not fit"),
        ({"column.sparse_shape": torch.tensor([4])}, "rows and width of 'column'"),
        ({"column.sparse_shape": torch.tensor([2**40, 9])}, "rows and width of 'column'"),
        ({"column.sparse_shape": torch.tensor([2**30, 9])}, "expected were at most"),
        ({"column.sparse_gaps": torch.ones(5)}, "positions of 'column' do not fit"),
        ({"~rows": torch.ones(3)}, "as a matrix"),
        ({"~rows": torch.ones(())}, "as a matrix"),
        ({"~rows": torch.ones(2, 2)}, "holds 'value' twice"),
    ],
)
def test_parts_that_do_not_fit_are_refused(tmp_path, change, message):
    layer = SparseLinear.from_dense(sparsify(nn.Linear(200, 4), 0.1))
    save_compressed(layer.state_dict(), tmp_path / "file")
    stored = needs_files.load_file(tmp_path / "file")
    assert {"value", "column.sparse_gaps", "column.sparse_shape"} <= stored.keys()
    needs_files.save_file(stored | change, tmp_path / "file")
    with pytest.raises(ValueError, match=message):
        load_compressed(tmp_path / "file")
