"""`convert` keeps what a model computes, folds what it can, and explains itself."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from helpers import needs_torch
from helpers_conversion import sparsify
from torch import nn

from sparselearning.models import build
from sparselearning.native import library
from sparselearning.sparse import SparseConv2d, SparseLinear, available, conversion, convert, gpu
from sparselearning.sparse.batch_last import BatchLastMaxPool2d
from sparselearning.sparse.changes import make
from sparselearning.sparse.modules import SparseModule
from sparselearning.sparse.verification import Verifier

needs_kernels = pytest.mark.skipif(not available(), reason="built without sparse kernels")


@pytest.fixture
def never_faster(timed):
    timed(lambda modules, place: 2.0 if isinstance(modules[place], SparseModule) else 1.0)


class Residual(nn.Module):
    """A convolution whose output is read twice, so its norm must not be folded into it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.relu = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.fc = nn.Linear(8, 4)

    def forward(self, x):
        y = self.conv(x)
        y = y + self.relu(self.bn(y))
        return self.fc(self.pool(y).mean((2, 3)))


@needs_kernels
@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize("batch", [1, 17, 32])
@pytest.mark.parametrize("name", ["vgg-like", "wrn-28-2", "lenet5", "lenet300-100"])
def test_converted_models_give_the_same_outputs(name, batch):
    model = sparsify(build(name))
    x = torch.randn(batch, 1, 28, 28) if name.startswith("lenet") else torch.randn(batch, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    converted, report = convert(model, x)
    assert all(layer.replaced for layer in report.layers)
    with torch.no_grad():
        assert (converted(x) - model(x)).abs().max() <= 1e-4
    assert not any(isinstance(module, nn.BatchNorm2d) for module in converted.modules())
    folded = sum(isinstance(module, conversion.Affine) for module in converted.modules())
    assert folded == {"vgg-like": 1, "wrn-28-2": 12}.get(name, 0)  # after a ReLU; before one, on a sum
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in before.items())


@needs_kernels
@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize("batch", [2, 16])
def test_a_layer_read_twice_keeps_its_norm_apart(batch):
    model = sparsify(Residual(), 0.5)
    x = torch.randn(batch, 3, 9, 9)
    converted, _ = convert(model, x)
    torch.testing.assert_close(converted(x), model(x), atol=1e-5, rtol=1e-5)
    assert isinstance(converted.bn, conversion.Affine)
    assert not converted.conv.relu


@needs_kernels
@pytest.mark.usefixtures("always_faster")
def test_norm_and_relu_are_folded_into_the_layer():
    before = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
    model = sparsify(nn.Sequential(*before, nn.Conv2d(8, 4, 3), nn.Flatten()), 0.3)
    x = torch.randn(16, 3, 10, 10)
    converted, _ = convert(model, x)
    assert [type(module) for module in converted[:4]] == [SparseConv2d, nn.Identity, nn.Identity, BatchLastMaxPool2d]
    torch.testing.assert_close(converted(x), model(x), atol=1e-5, rtol=1e-5)


@needs_kernels
@pytest.mark.usefixtures("never_faster")
def test_nothing_slower_is_put_in():
    model = sparsify(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)))
    x = torch.randn(2, 3, 8, 8)
    converted, report = convert(model, x)
    assert [type(module) for module in converted] == [nn.Conv2d, nn.BatchNorm2d]
    assert not report.layers[0].replaced
    assert torch.equal(converted(x), model(x))


@needs_kernels
@pytest.mark.usefixtures("always_faster")
def test_small_convolutions_without_zeros_may_keep_the_memory_order_too():
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 257, (16, 2)))
    sparsify(model[0], 0.2)
    x = torch.randn(16, 3, 20, 20)
    fast, report = convert(model, x)
    assert [(layer.density, layer.replaced) for layer in report.layers[1:]] == [(1.0, True), (1.0, False)]
    torch.testing.assert_close(fast(x), model(x).detach(), atol=1e-5, rtol=1e-4)


@needs_kernels
@pytest.mark.usefixtures("always_faster")
def test_report_names_layers_and_why_they_stay():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Conv2d(1, 1, 2, padding_mode="circular", padding=1))
    with torch.no_grad():
        model[1].weight.copy_(torch.eye(4))
    _, report = convert(model, torch.randn(1, 1, 4, 4))
    assert [(layer.name, layer.replaced, layer.density) for layer in report.layers] == [
        ("0", False, 1.0),
        ("1", True, 0.25),
        ("2", False, 1.0),
    ]
    text = str(report)
    assert "kept: no zeros" in text
    assert "circular" in text
    assert "whole model" in text


@needs_kernels
@pytest.mark.usefixtures("always_faster")
def test_one_layer_alone_converts():
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.eye(4, 6))
    converted, _ = convert(layer, torch.randn(3, 6))
    assert isinstance(converted, SparseLinear)


@needs_kernels
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("always_faster")
def test_converted_models_export():
    model = sparsify(Residual(), 0.5)
    x = torch.randn(16, 3, 8, 8)
    converted, _ = convert(model, x)
    with torch.no_grad():
        program = torch.export.export(converted, (x,))
        torch.testing.assert_close(program.module()(x), converted(x))


@needs_kernels
@needs_torch(2, 8, "a dynamic batch of convolutions")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize("rows", [2, 8, 16])
def test_exported_models_take_any_number_of_rows(tmp_path, rows):
    model = sparsify(Residual(), 0.5)
    x = torch.randn(rows, 3, 8, 8)
    converted, _ = convert(model, x)
    with torch.no_grad():
        program = torch.export.export(converted, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=1, max=1024)},))
        torch.export.save(program, tmp_path / "model.pt2")
        loaded = torch.export.load(tmp_path / "model.pt2").module()
        for batch in (1, 3, 11, 12, 16, 40):  # the kernels hold images in another order from 12 on
            x = torch.randn(batch, 3, 8, 8)
            torch.testing.assert_close(loaded(x), converted(x))


def bytes_in_memory(model):
    """Return the bytes of all tensors of a model, each piece of memory once."""
    tensors = [*model.parameters(), *model.buffers()]
    pieces = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(pieces.values())


@needs_kernels
@pytest.mark.usefixtures("always_faster")
def test_a_converted_model_holds_no_order_of_gradients_until_it_trains():
    dense = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    sparsify(dense, 0.1)
    x = torch.randn(4, 256)
    converted, _ = convert(dense, x)
    values = sum(len(layer.value) for layer in converted if isinstance(layer, SparseLinear))
    with torch.no_grad():
        converted(x)
    assert bytes_in_memory(converted) < 8 * values + 8000  # a value and a column; starts and biases
    copy.deepcopy(converted)(x).square().sum().backward()  # the first pass with gradients makes the order
    for model in (dense, converted):
        model.zero_grad()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, given in zip((dense, converted), inputs, strict=True):
        model(given).square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    assert bytes_in_memory(converted) > 16 * values
    converted.load_state_dict(converted.state_dict())
    torch.testing.assert_close(converted(x), dense(x))


@needs_kernels
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("always_faster")
def test_a_converted_model_that_is_compiled_has_gradients():
    dense = sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)), 0.2)
    x = torch.randn(4, 64)
    converted, _ = convert(dense, x)
    compiled = torch.compile(converted, backend="aot_eager", fullgraph=True)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for model, given in zip((dense, compiled), inputs, strict=True):
        model(given).square().sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


@needs_kernels
@pytest.mark.filterwarnings("ignore")
def test_linear_layers_of_sequences_export_for_any_number_of_them():
    layer = SparseLinear.from_dense(sparsify(nn.Linear(6, 4), 0.5))
    with torch.no_grad():
        shapes = ({0: torch.export.Dim("batch", min=1)},)
        program = torch.export.export(layer, (torch.randn(8, 5, 6),), dynamic_shapes=shapes).module()
        for batch in (1, 3, 40):
            x = torch.randn(batch, 5, 6)
            assert torch.equal(program(x), layer(x))


def test_without_kernels_the_model_stays_dense_and_says_so(monkeypatch, caplog):
    monkeypatch.setattr(library, "LIBRARY", None)
    model = nn.Sequential(nn.Linear(4, 4))
    with caplog.at_level(logging.WARNING):
        converted, report = convert(model, torch.randn(2, 4))
    assert type(converted[0]) is nn.Linear
    assert report.layers == []
    assert "built without sparse kernels" in caplog.text


@pytest.mark.parametrize("layout", ["2:4", "bsr"])
def test_patterns_need_a_gpu(layout):
    with pytest.raises(ValueError, match=f"layout='{layout}' needs a model on a GPU, got one on 'cpu'"):
        convert(nn.Linear(4, 4), torch.randn(2, 4), layout=layout)


def test_unknown_layout_is_refused():
    with pytest.raises(ValueError, match=r"Unknown layout 'csr'. Choose from unstructured, 2:4, bsr"):
        convert(nn.Linear(4, 4), torch.randn(2, 4), layout="csr")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("layout", ["2:4", "bsr"])
def test_patterns_compute_the_same_on_a_gpu(layout):
    linear = nn.Linear(128, 128, dtype=torch.float16, device="cuda")
    mask = torch.tensor([1, 1, 0, 0]).repeat(32) if layout == "2:4" else torch.arange(128) % 64 < 16
    with torch.no_grad():
        linear.weight.mul_(mask.to(linear.weight))
    x = torch.randn(64, 128, dtype=torch.float16, device="cuda")
    converted, report = convert(linear, x, layout=layout)
    assert report.layers[0].replaced
    torch.testing.assert_close(converted(x), F.linear(x, linear.weight, linear.bias), atol=1e-2, rtol=1e-2)


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support")
def test_patterned_layers_are_verified(monkeypatch):
    """What a GPU does, on a CPU: torch has products of blocks there too."""
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 8)).eval()
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(torch.arange(64) % 64 < 16)
    x = torch.randn(8, 64)
    blocks, expected = gpu.blocks, model(x)
    wrong = [model[2].weight.detach().clone()]
    monkeypatch.setattr(gpu, "blocks", lambda w: blocks(w * 2 if torch.equal(w, wrong[0]) else w))
    report, changes = gpu.plan(model, "bsr")
    make(model, changes, Verifier(model, x))
    assert [layer.replaced for layer in report.layers] == [True, False, False]
    assert "the model differs: on the example output differs" in report.layers[1].note
    assert model[0].weight.layout == torch.sparse_bsr
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)
