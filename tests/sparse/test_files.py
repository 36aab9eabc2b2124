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


def hostile(values=(1.0, 1.0), gaps=(0, 1), shape=(5,), gaps_dtype=torch.uint8, shape_dtype=torch.int64, name="w"):
    return {
        f"{name}.sparse_values": torch.tensor(values),
        f"{name}.sparse_gaps": torch.tensor(gaps, dtype=gaps_dtype),
        f"{name}.sparse_shape": torch.tensor(shape, dtype=shape_dtype),
    }


@pytest.mark.parametrize(
    "parts",
    [
        hostile(shape=(2**40,)),
        hostile(shape=(2**32,)),
        hostile(shape=(2**62, 2**62)),
        hostile(shape=(0, 2**40, 2**40), values=(), gaps=()),
        hostile(shape=(-5,)),
        hostile(shape=(-5, -1)),
        hostile(shape=(5.0,), shape_dtype=torch.float32),
        hostile(shape=((5,),)),
        hostile(shape=[1] * 65),
        hostile(gaps=(3, -2), gaps_dtype=torch.int8),
        hostile(gaps=(0, 1), gaps_dtype=torch.int64),
        hostile(gaps=((0, 1),)),
        hostile(values=((1.0, 1.0),)),
        hostile(values=(1.0,)),
        {name: part for i in range(40) for name, part in hostile(shape=(2**24,), name=f"w{i}").items()},
        hostile() | {"w": torch.ones(5)},
        {"w.sparse_gaps": torch.ones(5)},
        {"w.sparse_shape": torch.ones(5)},
    ],
)
def test_files_that_ask_for_what_they_do_not_hold_are_refused(tmp_path, parts):
    from safetensors.torch import save_file

    save_file(parts, tmp_path / "file")
    with pytest.raises(ValueError, match=r"Write (it|the file) again"):
        load_compressed(tmp_path / "file")


@pytest.mark.parametrize("content", [b"", b"x" * 100, b"\xff" * 8, (2**40).to_bytes(8, "little") + b"{}"])
def test_other_files_are_refused_with_one_error(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match="damaged or no safetensors file"):
        load_compressed(tmp_path / "file")
    with pytest.raises(FileNotFoundError):
        load_compressed(tmp_path / "none")


def test_names_that_look_like_ours_and_other_entries_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"rename 'w.sparse_gaps'"):
        save_compressed({"w.sparse_gaps": torch.ones(3)}, tmp_path / "file")
    for entry in (torch.ones(3).to_sparse(), torch.ones(3, device="meta"), {"a": 1}):
        with pytest.raises(TypeError, match="hold dense tensors"):
            save_compressed({"w": entry}, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_large_tensors_of_zeros_say_how_large_they_are(tmp_path):
    state = {"w": torch.zeros(2**14, 2**15)}  # 2 GB
    state["w"][5, 7] = 1
    save_compressed(state, tmp_path / "file")
    assert torch.equal(load_compressed(tmp_path / "file")["w"], state["w"])


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
