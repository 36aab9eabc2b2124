"""Compressed files give back every weight; converted models leave as dense ones for other tools."""

import numpy as np
import pytest
import torch
from helpers_sparse import sparse_weight
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparselearning.sparse import SparseConv2d, SparseLinear, export_onnx, load_compressed, save_compressed, to_dense
from sparselearning.sparse.batch_last import keep_order
from sparselearning.sparse.conversion import Affine
from sparselearning.sparse.files import DenseAffine, pack_positions, unpack_positions


@given(st.sets(st.integers(0, 3000)))
def test_positions_survive_packing(positions):
    positions = np.array(sorted(positions), dtype=np.int64)
    assert np.array_equal(unpack_positions(pack_positions(positions)), positions)


def test_a_sparse_model_needs_a_sixteenth_of_its_dense_size(tmp_path):
    model = nn.Sequential(nn.Linear(600, 500), nn.ReLU(), nn.Linear(500, 300, bias=False))
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.copy_(sparse_weight(layer.weight.shape, 0.05))
    size, dense_size = save_compressed(model.state_dict(), tmp_path / "model.safetensors")
    assert dense_size == 4 * sum(p.numel() for p in model.parameters())
    assert size < dense_size / 15
    loaded = load_compressed(tmp_path / "model.safetensors")
    assert loaded.keys() == model.state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())


def test_any_tensor_survives_the_file(tmp_path):
    state = {
        "empty": torch.zeros(0, 3),
        "zeros": torch.zeros(40, 50),
        "scalar": torch.tensor(3),
        "dense": torch.randn(5, 5),
        "half": sparse_weight((30, 40), 0.1).half(),
        "strided": sparse_weight((30, 40), 0.1).t(),
        "integers": torch.arange(10),
    }
    save_compressed(state, tmp_path / "file")
    loaded = load_compressed(tmp_path / "file")
    assert all(
        torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in state.items()
    )


def test_positions_that_do_not_fit_are_refused(tmp_path):
    from safetensors.torch import save_file

    parts = {"w.sparse_values": torch.ones(2), "w.sparse_gaps": torch.tensor([0, 9], dtype=torch.uint8)}
    save_file({**parts, "w.sparse_shape": torch.tensor([5])}, tmp_path / "file")
    with pytest.raises(ValueError, match="positions of 'w' do not fit"):
        load_compressed(tmp_path / "file")
    save_file(parts, tmp_path / "file")
    with pytest.raises(ValueError, match="values of 'w' without their positions"):
        load_compressed(tmp_path / "file")


def converted_by_hand():
    """A model of every part that `convert` puts in."""
    conv = SparseConv2d.from_dense(nn.Conv2d(3, 4, 3))
    conv.relu = True
    norm = nn.BatchNorm2d(4)
    norm.running_mean.uniform_()
    linear = SparseLinear.from_dense(nn.Linear(36, 2))
    model = nn.Sequential(conv, Affine(norm, True), nn.MaxPool2d(2), nn.Flatten(), linear).eval()
    keep_order(model)
    return model


def test_to_dense_has_only_torch_layers_and_computes_the_same():
    model = converted_by_hand()
    dense = to_dense(model)
    assert not any(
        "sparselearning" in type(module).__module__ for module in dense.modules() if type(module) is not DenseAffine
    )
    x = torch.randn(16, 3, 8, 8)
    torch.testing.assert_close(dense(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_onnx_computes_the_same(tmp_path):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model, x = converted_by_hand(), torch.randn(2, 3, 8, 8)
    export_onnx(model, x, tmp_path / "model.onnx")
    session = reference.ReferenceEvaluator(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {session.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), atol=1e-5, rtol=1e-5)
