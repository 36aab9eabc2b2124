"""Compressed files give back every weight; converted models leave as dense ones for other tools."""

import json
import os
import re
import struct
import tracemalloc

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


def assert_same(loaded, state):
    assert loaded.keys() == state.keys()
    for name, tensor in state.items():
        assert loaded[name].dtype == tensor.dtype, name
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize(
    "dtype",
    [torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64],
)
def test_every_dtype_survives_the_file(tmp_path, dtype):
    sparse = sparse_weight((30, 40), 0.1).mul(100).to(dtype)
    state = {
        "sparse": sparse,
        "scalar": torch.ones((), dtype=dtype),
        "zero scalar": torch.zeros((), dtype=dtype),
        "empty": torch.zeros(3, 0, 2, dtype=dtype),
        "strided": sparse[::2, 1::3],
        "turned": sparse.t(),
        "tied": sparse,
        "a part of it": sparse[3:],
        "expanded": sparse[0].expand(5, 40),
    }
    save_compressed(state, tmp_path / "file")
    assert_same(load_compressed(tmp_path / "file"), state)


def test_dtypes_without_arithmetic_survive_the_file(tmp_path):
    numbers = torch.arange(500)
    state = {str(dtype): numbers.to(dtype) for dtype in (torch.uint16, torch.uint32, torch.uint64)}
    save_compressed(state, tmp_path / "file")
    assert_same(load_compressed(tmp_path / "file"), state)
    eights = torch.randn(100).to(torch.float8_e4m3fn)
    save_compressed({"eights": eights}, tmp_path / "file")
    assert torch.equal(load_compressed(tmp_path / "file")["eights"].view(torch.uint8), eights.view(torch.uint8))


def test_conjugate_and_negative_views_survive_the_file(tmp_path):
    numbers = torch.randn(50, dtype=torch.complex64)
    state = {"conjugate": numbers.conj(), "negative": numbers.conj().imag}
    save_compressed(state, tmp_path / "file")
    assert_same(load_compressed(tmp_path / "file"), state)


UNSTORABLE = [
    ("a.sparse_values", torch.ones(2), "name 'a.sparse_values' means something else"),
    ("a.sparse_gaps", torch.ones(2), "name 'a.sparse_gaps' means something else"),
    ("a.sparse_shape", torch.ones(2), "name 'a.sparse_shape' means something else"),
    ("__metadata__", torch.ones(2), "name '__metadata__' means something else"),
    ("extra", {"a": 1}, "Expected tensors, got a dict for 'extra'"),
    ("wide", torch.ones(2, dtype=torch.complex128), r"holds torch.complex128, the dtype of 'wide'. Convert it"),
    ("coo", torch.ones(2, 2).to_sparse(), "Expected dense tensors, got torch.sparse_coo on cpu for 'coo'"),
    ("meta", torch.ones(2, device="meta"), "Expected dense tensors, got torch.strided on meta for 'meta'"),
]


@pytest.mark.parametrize(("name", "entry", "message"), UNSTORABLE, ids=[name for name, *_ in UNSTORABLE])
def test_what_a_file_cannot_hold_is_refused_before_it_is_written(tmp_path, name, entry, message):
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises((TypeError, ValueError), match=message):
        save_compressed({"good": torch.ones(3), name: entry}, tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_names_that_only_look_like_ours_survive_the_file(tmp_path):
    state = {name: torch.zeros(2000) for name in (".sparse_values.", "a.sparse_gapss", "sparse_shape", "", "ä\n")}
    save_compressed(state, tmp_path / "file")
    assert_same(load_compressed(tmp_path / "file"), state)


def test_a_file_can_be_written_over_while_its_tensors_are_in_use(tmp_path):
    first = {"w": torch.randn(100_000)}
    save_compressed(first, tmp_path / "file")
    loaded = load_compressed(tmp_path / "file")
    save_compressed({"w": torch.ones(1)}, tmp_path / "file")
    assert_same(loaded, first)


def file_of(header, data=b""):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(header)) + header + data


def entry(dtype, shape, start, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


FOUR = b'{"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
NO_FILES = {
    "empty": b"",
    "short": b"abc",
    "a length beyond the end": struct.pack("<Q", 2**62),
    "no JSON": file_of(b"hello"),
    "no object": file_of([1, 2]),
    "deeply nested": file_of(b"[" * 200_000),
    "deeply nested metadata": file_of(b'{"__metadata__": ' + b'{"a": ' * 200_000),
    "numbers as metadata": file_of({"__metadata__": {"a": 1}}),
    "a tensor twice": file_of(b'{"a": ' + FOUR + b', "a": ' + FOUR + b"}", b"abcd"),
    "a negative size": file_of({"a": entry("F32", [-1], 0, 4)}, b"abcd"),
    "a float as size": file_of({"a": entry("F32", [1.0], 0, 4)}, b"abcd"),
    "a text as size": file_of({"a": entry("F32", ["1"], 0, 4)}, b"abcd"),
    "a size beyond int64": file_of({"a": entry("F32", [2**63, 0], 0, 0)}),
    "a size of thousands of digits": file_of(b'{"a": ' + FOUR.replace(b"[1]", b"[%s]" % (b"9" * 5000)) + b"}", b"abcd"),
    "a size without data": file_of({"a": entry("F32", [2**40], 0, 4)}, b"abcd"),
    "an unknown dtype": file_of({"a": entry("F33", [1], 0, 4)}, b"abcd"),
    "overlapping data": file_of({"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 0, 4)}, b"abcd"),
    "truncated data": file_of({"a": entry("F32", [2], 0, 8)}, b"abcd"),
}


@pytest.mark.parametrize("content", NO_FILES.values(), ids=NO_FILES)
def test_a_damaged_file_is_refused_in_one_line(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(ValueError, match=r"file is damaged or no compressed file: .*[.]$") as refusal:
        load_compressed(tmp_path / "file")
    assert "\n" not in str(refusal.value)


def test_what_is_no_file_is_said(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # reading it would wait for a writer
    for name in ("none", "pipe", ""):
        with pytest.raises(FileNotFoundError, match=f"there is none.*{re.escape(str(tmp_path / name))}"):
            load_compressed(tmp_path / name)


def packed(values=(1.0,), gaps=(0,), shape=(4,), of_values=torch.float32, of_gaps=torch.uint8, of_shape=torch.int64):
    return {
        "w.sparse_values": torch.tensor(values, dtype=of_values),
        "w.sparse_gaps": torch.tensor(gaps, dtype=of_gaps),
        "w.sparse_shape": torch.tensor(shape, dtype=of_shape),
    }


HOSTILE = {
    "2**40 entries": (packed(shape=(2**40,)), f"take {2**42} bytes, most of them 'w', .* most_bytes={2**42}"),
    "2**32 entries": (packed(shape=(2**16, 2**16)), f"take {2**34} bytes"),
    "2**124 entries": (packed(shape=(2**62, 2**62)), f"take {2**126} bytes"),
    "no tensor at all": (packed((), (), shape=(2**62, 2**62, 0)), "Torch has no tensor of the shape of 'w'"),
    "a negative size": (packed(shape=(-4,)), r"shape of 'w' to be .* of at least 0, got \[-4\]"),
    "two negative sizes": (packed(shape=(-2, -2)), r"got \[-2, -2\] of torch.int64"),
    "float sizes": (packed(shape=(4.0,), of_shape=torch.float32), r"got \[4.0\] of torch.float32"),
    "a matrix of sizes": (packed(shape=((4,),)), "shape of 'w' to be at most 64 int64 numbers"),
    "thousands of sizes": (packed(shape=(2**62,) * 5000), "got 5000 numbers"),
    "gaps that go back": (packed((1.0, 2.0), (2, -2), of_gaps=torch.int64), "vector of uint8 gaps, got .* torch.int64"),
    "a gap past the end": (packed(gaps=(4,)), "positions of 'w' do not fit"),
    "a gap without end": (packed(gaps=(0, 255)), "positions of 'w' do not fit"),
    "too many values": (packed((1.0,) * 5, (0,) * 5), "positions of 'w' do not fit"),
    "more values than gaps": (packed((1.0, 2.0)), "positions of 'w' do not fit"),
    "a matrix of values": (packed(((1.0,),)), "got 2 dimensions of torch.float32"),
    "values that are no numbers": (packed(of_values=torch.float8_e5m2), "torch.float8_e5m2"),
    "a tensor twice": (packed() | {"w": torch.ones(4)}, "'w' twice, dense and compressed"),
    "gaps alone": ({"w.sparse_gaps": torch.ones(4)}, "positions of 'w' without their values"),
    "a shape alone": ({"w.sparse_shape": torch.ones(4)}, "positions of 'w' without their values"),
}


@pytest.mark.parametrize(("entries", "message"), HOSTILE.values(), ids=HOSTILE)
def test_entries_that_do_not_belong_together_are_refused_without_memory(tmp_path, entries, message):
    from safetensors.torch import save_file

    save_file(entries, tmp_path / "file")
    tracemalloc.start()
    with pytest.raises(ValueError, match=message) as refusal:
        load_compressed(tmp_path / "file")
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["w", "w.sparse_values"])
def test_bool_tensors_of_other_bytes_are_refused(tmp_path, name):
    from safetensors.torch import save_file

    flags = torch.tensor([2], dtype=torch.uint8).view(torch.bool)
    save_file((packed() if name != "w" else {}) | {name: flags}, tmp_path / "file")
    with pytest.raises(ValueError, match=r"'w.*' has bytes other than 0 and 1"):
        load_compressed(tmp_path / "file")


def test_zeros_of_moderate_size_load_and_larger_ones_on_request(tmp_path):
    moderate, large = torch.zeros(2**24), torch.zeros(2**25, dtype=torch.int16)
    save_compressed({"w": moderate}, tmp_path / "file")
    assert torch.equal(load_compressed(tmp_path / "file")["w"], moderate)
    with pytest.raises(ValueError, match=r"at most 1000000\. If you trust the file"):
        load_compressed(tmp_path / "file", most_bytes=10**6)
    save_compressed({"v": moderate, "w": large}, tmp_path / "file")
    with pytest.raises(ValueError, match=f"If you trust the file, load it with most_bytes={2**27}"):
        load_compressed(tmp_path / "file")
    assert len(load_compressed(tmp_path / "file", most_bytes=2**27)) == 2


def test_a_single_value_at_the_end_of_a_large_tensor_needs_no_request(tmp_path):
    """The bytes of a gap grow with it, so that files justify what they hold, at the lowest density too."""
    weight = torch.zeros(2**24 + 2**20, dtype=torch.float64)
    weight[-1] = 1
    save_compressed({"w": weight}, tmp_path / "file")
    assert torch.equal(load_compressed(tmp_path / "file")["w"], weight)


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


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_onnx_computes_the_same(tmp_path):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model, x = converted_by_hand(), torch.randn(2, 3, 8, 8)
    export_onnx(model, x, tmp_path / "model.onnx")
    session = reference.ReferenceEvaluator(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {session.input_names[0]: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("rows", [1, 4])
def test_onnx_takes_any_number_of_rows(tmp_path, rows):
    pytest.importorskip("onnxscript")
    reference = pytest.importorskip("onnx.reference")
    model = converted_by_hand()
    export_onnx(model, torch.randn(rows, 3, 8, 8), tmp_path / "model.onnx", dynamic_batch=True)
    session = reference.ReferenceEvaluator(str(tmp_path / "model.onnx"))
    for batch in (1, 3, 16):
        x = torch.randn(batch, 3, 8, 8)
        (found,) = session.run(None, {session.input_names[0]: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_onnxruntime_takes_any_number_of_rows(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = converted_by_hand()
    export_onnx(model, torch.randn(2, 3, 8, 8), tmp_path / "model.onnx", dynamic_batch=True)
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"))
    for batch in (1, 40):
        x = torch.randn(batch, 3, 8, 8)
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(x).detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "arguments", [(torch.ones(2, 3), torch.ones(3, 3)), (torch.ones(0, 3),), (torch.ones(()),), (3,)]
)
def test_a_dynamic_batch_needs_one_number_of_rows(tmp_path, arguments):
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match="one number of rows"):
        export_onnx(nn.Linear(3, 2), arguments, tmp_path / "model.onnx", dynamic_batch=True)
    assert not list(tmp_path.iterdir())
