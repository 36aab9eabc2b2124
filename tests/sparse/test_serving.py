"""A saved model serves any number of rows without its class, and its file can do nothing else."""

import io
import json
import os
import pickle
import re
import subprocess
import sys
import zipfile
from collections import OrderedDict

import pytest
import torch
from helpers import needs_torch
from helpers_conversion import sparsify
from helpers_serving import NAMES, SmallGPT, served_model
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from sparselearning.sparse import SparseConv2d, SparseLinear, available, convert, load, save, save_compressed, serving
from sparselearning.sparse.serving import PROGRAM, Pieces, read_tensor, write_tensor

pytestmark = [
    needs_torch(2, 8, "a dynamic batch of convolutions"),
    pytest.mark.skipif(not available(), reason="built without sparse kernels"),
    pytest.mark.usefixtures("always_faster"),
]


@pytest.fixture(scope="module")
def small():
    """A small model of sparse layers."""
    torch.manual_seed(0)
    conv, linear = SparseConv2d.from_dense(sparsify(nn.Conv2d(3, 8, 3), 0.3)), nn.Linear(8 * 36, 5)
    linear = SparseLinear.from_dense(sparsify(linear, 0.3))
    return nn.Sequential(conv, nn.ReLU(), nn.Flatten(), linear)


@pytest.fixture(scope="module")
def saved(small, tmp_path_factory):
    """The file of `small`."""
    path = tmp_path_factory.mktemp("saved") / "model.sparse"
    save(small, path, torch.randn(8, 3, 8, 8))
    return path


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_saved_models_serve_any_number_of_rows_from_a_smaller_file(tmp_path, name):
    model, inputs = served_model(name)
    fast, report = convert(model, inputs(8))
    assert any(layer.replaced for layer in report.layers)
    size = save(fast, tmp_path / "model.sparse")
    assert size == (tmp_path / "model.sparse").stat().st_size
    masked, _ = save_compressed(model.state_dict(), tmp_path / "masked")
    assert max(size, save_compressed(fast.state_dict(), tmp_path / "converted")[0]) <= masked
    serve = load(tmp_path / "model.sparse")
    for rows in (1, 3, 16, 40):
        x = inputs(rows)
        with torch.no_grad():
            expected = fast(x)
        found = serve(x)
        assert torch.equal(found, expected)
        assert found.is_contiguous()
        assert not found.requires_grad


@pytest.mark.long
def test_another_process_needs_torch_and_this_package_alone(tmp_path):
    model = SmallGPT()
    fast, _ = convert(sparsify(model, 0.2), torch.randint(0, 50, (8, 16)))
    save(fast, tmp_path / "model.sparse")
    ids = torch.randint(0, 50, (3, 16))
    with torch.no_grad():
        torch.save((ids, fast(ids)), tmp_path / "expected.pt")
    code = """
import sys
import torch
from sparselearning.sparse import load

assert not {"safetensors", "torchvision", "helpers_serving"} & sys.modules.keys()
serve = load("model.sparse")
ids, expected = torch.load("expected.pt")
for threads in (1, 2):
    torch.set_num_threads(threads)
    torch.testing.assert_close(serve(ids), expected)
"""
    subprocess.run([sys.executable, "-I", "-c", code], check=True, cwd=tmp_path)


class Served(nn.Module):
    """A model of several arguments that returns containers."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, mask, *, scale=1.0, more=None):
        y = self.linear(x * mask) * scale
        y = y if more is None else y + more["bias"]
        return {"y": y, "all": OrderedDict(first=(y[:, :2], 3), rest=[y.sum(0), None])}


def test_arguments_and_outputs_keep_their_nesting(tmp_path):
    model = sparsify(Served(), 0.5)
    fast, _ = convert(model, {"x": torch.randn(4, 6), "mask": torch.rand(6), "more": {"bias": torch.ones(1)}})
    save(fast, tmp_path / "file")
    x, mask, more = torch.randn(7, 6), torch.rand(6), {"bias": torch.randn(1)}
    found, expected = load(tmp_path / "file")(more=more, mask=mask, x=x), model(x, mask, more=more)
    torch.testing.assert_close(found["y"], expected["y"])
    assert [*found] == ["y", "all"]
    assert type(found["all"]) is OrderedDict
    assert found["all"]["first"][1] == 3
    assert found["all"]["rest"][1] is None
    torch.testing.assert_close(found["all"]["rest"][0], expected["all"]["rest"][0])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.ones(2, 3, 8, 9),), r"as float32 of shape \(batch, 3, 8, 8\) on the CPU, got float32 \(2, 3, 8, 9\)"),
        ((torch.ones(3, 8, 8),), r"\(batch, 3, 8, 8\)"),
        ((torch.ones(()),), r"\(batch, 3, 8, 8\)"),
        ((torch.ones(2, 3, 8, 8).double(),), "got float64"),
        ((torch.ones(2, 3, 8, 8, device="meta"),), "on meta"),
        ((torch.ones(0, 3, 8, 8),), r"one number of rows, from 1 on, in all inputs; got \[0\]"),
        ((torch.ones(2, 3, 8, 8), 1), "nested as in the example"),
        ((), "got no tensors"),
        (("text",), "nested as in the example"),
    ],
)
def test_other_inputs_are_refused(saved, args, message):
    with pytest.raises((TypeError, ValueError), match=message):
        load(saved)(*args)


def test_all_inputs_have_as_many_rows(tmp_path):
    class Sum(nn.Module):
        def forward(self, x, y):
            return torch.cat([x, y], 1)

    save(Sum(), tmp_path / "file", (torch.randn(4, 2), torch.randn(4, 3)))
    serve = load(tmp_path / "file")
    assert serve(torch.ones(5, 2), torch.ones(5, 3)).shape == (5, 5)
    with pytest.raises(ValueError, match=r"got \[1, 5\]"):
        serve(torch.ones(5, 2), torch.ones(1, 3))


# What cannot be saved


class Branches(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1
        return x + self.seen


class Structure(nn.Module):
    def forward(self, x):
        return torch.return_types.max((x, x))


class Length(nn.Module):
    def forward(self, x):
        return x, x.shape[0]


class Random(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class ForFour(nn.Module):
    def forward(self, x):
        return x + torch.arange(4.0).reshape(4, 1)


class OfCode(nn.Module):
    """A model that computes with Python's own numbers, which torch.export takes for constants."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return x * self.calls


@pytest.mark.parametrize(
    ("model", "kind", "message"),
    [
        (Branches(), ValueError, "torch.export cannot trace the model for any number of rows: .*dynamic_batch=False"),
        (Counts(), ValueError, "writes 'model.seen' when it runs.*Put it in eval mode"),
        (Structure(), ValueError, "Expected tensors and numbers in tuples, lists and dicts, got a max"),
        (Length(), ValueError, "Expected tensors and numbers in tuples, lists and dicts, got a SymInt"),
        (Random(), ValueError, "computes something else than what torch.export makes of it"),
        (ForFour(), ValueError, "Constraints violated .*for the rows of the example: dynamic_batch=False"),
        (OfCode(), ValueError, "computes something else than what torch.export makes of it"),
        (nn.LazyLinear(3), ValueError, "Expected a model with weights, got lazy ones"),
        (nn.Linear(3, 3, device="meta"), ValueError, r"on the CPU, got 'weight' .* on meta"),
        (nn.Linear(3, 3).to(torch.float8_e4m3fn), ValueError, "torch.export cannot trace|holds no tensors of"),
        ("model", TypeError, "Expected a model, an nn.Module, got a str"),
    ],
)
def test_what_cannot_be_saved_says_why_and_leaves_the_file(tmp_path, model, kind, message):
    (tmp_path / "file").write_bytes(b"before")
    with pytest.raises(kind, match=message):
        save(model, tmp_path / "file", torch.randn(4, 3))
    assert (tmp_path / "file").read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]


def test_a_model_for_one_number_of_rows_is_saved_for_it(tmp_path):
    save(ForFour(), tmp_path / "file", torch.randn(4, 3), dynamic_batch=False)
    serve, x = load(tmp_path / "file"), torch.randn(4, 3)
    assert torch.equal(serve(x), ForFour()(x))
    with pytest.raises(ValueError, match=r"of shape \(4, 3\)"):
        serve(torch.randn(5, 3))


def test_other_models_need_an_example(tmp_path):
    with pytest.raises(ValueError, match=re.escape("save(model, path, example_input)")):
        save(nn.Linear(2, 2), tmp_path / "file")


def test_the_model_and_the_generators_stay_as_they_are(tmp_path):
    model = nn.Sequential(nn.Linear(3, 3), nn.Dropout()).train()
    before = torch.get_rng_state()
    save(model, tmp_path / "file", torch.zeros(2, 3))
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert torch.equal(load(tmp_path / "file")(torch.ones(5, 3)), model.eval()(torch.ones(5, 3)))


def test_a_folder_is_no_file(small, tmp_path):
    with pytest.raises(IsADirectoryError):
        save(small, tmp_path, torch.randn(2, 3, 8, 8))
    with pytest.raises(FileNotFoundError, match="no file"):
        load(tmp_path)


# Memory order


class Strides(nn.Module):
    """A model that reads memory by its strides, or as it lies."""

    def __init__(self, function):
        super().__init__()
        self.conv, self.function = nn.Conv2d(3, 4, 3, padding=1), function

    def forward(self, x):
        return self.function(self.conv(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda y: y.contiguous().as_strided((y.shape[0], 4, 3), (256, 64, 2)),
        lambda y: y.contiguous().view(y.shape[0], -1),
        lambda y: nn.functional.max_pool2d(y, 3, 2, 1, 1, True),
        lambda y: nn.functional.max_pool2d(y, 2),
        lambda y: nn.functional.max_pool2d(y, (2, 4), (1, 2), dilation=(2, 1)),
        lambda y: nn.functional.avg_pool2d(y, 3, 2, 1, True, False),
        lambda y: nn.functional.avg_pool2d(y, 2),
        lambda y: nn.functional.adaptive_avg_pool2d(y, 1),
        lambda y: y.mean((2, 3)),
        lambda y: nn.functional.conv2d(y, torch.arange(24.0).view(6, 4, 1, 1), stride=2),
        lambda y: nn.functional.conv2d(y, torch.arange(24.0).view(6, 4, 1, 1), torch.ones(6)).relu(),
        lambda y: nn.functional.conv2d(y, torch.arange(12.0).view(6, 2, 1, 1), groups=2),
        lambda y: y.mean((-1, -2), keepdim=True).flatten(1),
        lambda y: y.flatten(2).transpose(1, 2),
        lambda y: y.to(torch.float64).clone(memory_format=torch.channels_last),
    ],
)
def test_the_batch_may_be_last_in_memory(tmp_path, function):
    model = sparsify(Strides(function), 0.4)
    fast, _ = convert(model, torch.randn(4, 3, 8, 8))
    save(fast, tmp_path / "file")
    serve = load(tmp_path / "file")
    for rows in (1, 4, 16):
        x = torch.randn(rows, 3, 8, 8)
        torch.testing.assert_close(serve(x), model(x).detach())


def test_a_model_without_sparse_convolutions_serves_images_in_any_order(tmp_path):
    class Viewed(nn.Module):
        def forward(self, x):
            return nn.functional.conv2d(x, torch.ones(2, 3, 1, 1)).flatten(1) + x.reshape(len(x), -1)[:, :1]

    model = nn.Sequential(Viewed(), nn.Linear(32, 4)).eval()
    save(model, tmp_path / "file", torch.randn(8, 3, 4, 4), dynamic_batch=False)
    for turned in (False, True):
        x = torch.randn(3, 4, 4, 8).movedim(-1, 0) if turned else torch.randn(8, 3, 4, 4)
        torch.testing.assert_close(load(tmp_path / "file")(x), model(x).detach())


@given(
    shape=st.lists(st.integers(0, 4), max_size=4),
    dtype=st.sampled_from([*serving.DTYPES.values()]),
    density=st.sampled_from([0.0, 0.05, 1.0]),
    data=st.data(),
)
def test_tensors_keep_dtype_layout_and_numbers(shape, dtype, density, data):
    order = data.draw(st.permutations(range(len(shape))))
    tensor = ((torch.rand(shape) < density) * torch.randn(shape)).to(dtype).permute(*order) if shape else torch.ones(())
    numbers, places = io.BytesIO(), io.BytesIO()
    description = json.loads(json.dumps(write_tensor(tensor, numbers, places)))
    found = read_tensor(Pieces(numbers.getvalue()), Pieces(places.getvalue()), **description)
    assert found.dtype == tensor.dtype
    assert torch.equal(found, tensor)
    if tensor.numel() > 0 and 1 not in tensor.shape:
        assert found.stride() == tensor.stride()


@pytest.mark.long
def test_tied_weights_are_stored_once(tmp_path):
    layer = nn.Linear(300, 300, bias=False)
    one = save(nn.Sequential(layer), tmp_path / "one", torch.randn(2, 300))
    two = save(nn.Sequential(layer, nn.ReLU(), layer), tmp_path / "two", torch.randn(2, 300))
    assert two - one < 1000
    sparse = sparsify(layer, 0.1)
    fast, _ = convert(nn.Sequential(sparse, nn.ReLU(), sparse), torch.randn(2, 300))
    save(fast, tmp_path / "sparse")
    assert len(load(tmp_path / "sparse").stored["layer"]) == 1


# Files that are damaged, or made to harm


@pytest.fixture
def touched(tmp_path, monkeypatch):
    """Where code of a file would leave a trace."""
    monkeypatch.chdir(tmp_path)
    return tmp_path / "harmed"


class Harm:
    def __reduce__(self):
        return exec, ("open('harmed', 'w').close()",)


def test_a_pickle_is_not_executed(touched):
    torch.save(Harm(), "pickle.pt")
    with open("plain", "wb") as file:
        pickle.dump(Harm(), file)
    with zipfile.ZipFile("inside", "w") as archive:
        for name in (PROGRAM, serving.TENSORS, serving.POSITIONS):
            archive.writestr(name, pickle.dumps(Harm()))
    for name in ("pickle.pt", "plain", "inside"):
        with pytest.raises(ValueError, match="is damaged or no saved model"):
            load(name)
    assert not touched.exists()


def changed(path, change):
    """Write a file with another program, whole and with right checksums."""
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    description = json.loads(parts[PROGRAM])
    change(description)
    with zipfile.ZipFile("changed", "w") as archive:
        for name, content in (parts | {PROGRAM: json.dumps(description)}).items():
            archive.writestr(name, content)
    return "changed"


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (["os.system", ["touch harmed"], []], "has no operator 'os.system'"),
        (["builtins.exec", ["open('harmed', 'w')"], []], "has no operator"),
        (["aten.from_file.default", ["harmed", True, 8], []], "reads files"),
        (["aten.relu_.default", [{"input": 0}], []], "changes what it is given"),
        (["aten._unsafe_index.Tensor", [{"input": 0}, []], []], "reads files"),
        (["aten._sparse_coo_tensor_unsafe.default", [{"input": 0}], []], "reads files"),
        (["aten.__class__.__init__", [], []], "has no operator"),
        (["sparselearning.transpose.default", [], []], "has no operator"),
        (["operator.attrgetter", ["__class__"], []], "has no operator"),
        (["aten.relu.default", [{"dtype": "load"}], []], "Expected a dtype, got 'load'"),
        (["aten.relu.default", [{"tensor": 99}], []], "list index out of range"),
    ],
)
def test_a_program_calls_functional_operators_only(saved, touched, step, message):
    path = changed(saved, lambda program: program["steps"].append(step))
    with pytest.raises(ValueError, match=f"is damaged or no saved model: .*{message}"):
        load(path)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda program: program.update(version=2), "version 2"),
        (lambda program: program.update(format="other"), "format 'other'"),
        (lambda program: program["tensors"][0].update(shape=[2**40]), "and expected were at most"),
        (lambda program: program["tensors"][0].update(shape=[-5]), "bytes too early"),
        (lambda program: program["layers"][0].update(turned=2**40), "and expected were at most"),
        (lambda program: program["layers"][0].update(width=2), "positions do not fit"),
        (lambda program: program["layers"][0].update(gaps=10**6), "ends .* bytes too early"),
        (lambda program: program.pop("layers"), "KeyError: 'layers'"),
    ],
)
def test_parts_that_do_not_fit_are_refused(saved, touched, change, message):
    with pytest.raises(ValueError, match=f"is damaged or no saved model: .*{message}"):
        load(changed(saved, change))


def test_a_truncated_file_is_one_clear_error(saved, tmp_path):
    content = saved.read_bytes()
    for length in (0, 1, 30, 100, len(content) // 2, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:length])
        with pytest.raises(ValueError, match="cut is damaged or no saved model: ") as error:
            load(tmp_path / "cut")
        assert "\n" not in str(error.value)


def test_a_damaged_file_is_refused_or_computes_the_same(saved, tmp_path):
    content, x = saved.read_bytes(), torch.randn(2, 3, 8, 8)
    expected, refused = load(saved)(x), 0
    for place in range(0, len(content), 7):
        broken = bytearray(content)
        broken[place] ^= 1 << place % 8
        (tmp_path / "broken").write_bytes(broken)
        try:
            assert torch.equal(load(tmp_path / "broken")(x), expected)  # a time in an archive means nothing
        except ValueError as error:
            assert "broken is damaged or no saved model" in str(error)  # noqa: PT017
            refused += 1
    assert refused > len(content) // 7 * 0.8


def test_equal_models_give_equal_files(small, saved, tmp_path):
    save(small, tmp_path / "again", torch.randn(8, 3, 8, 8))
    assert (tmp_path / "again").read_bytes() == saved.read_bytes()


@settings(max_examples=20)
@given(st.binary(max_size=200))
def test_no_bytes_are_taken_for_a_model(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("bytes") / "file"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged or no saved model"):
        load(path)


def test_models_whose_layers_stay_dense_are_saved_too(tmp_path):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), nn.ReLU(), nn.MaxPool2d(3, 2, 1), nn.Conv2d(16, 8, 3), nn.Flatten(), nn.Linear(8 * 36, 10)
    ).eval()
    x = torch.randn(4, 3, 16, 16)
    save(model, tmp_path / "model.sparse", x)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "model.sparse")(x[:3]), model(x[:3]))
