"""A saved program makes a sparse convolution, the sum with another tensor and a ReLU in one step."""

import pytest
import torch
import torchvision
from helpers import needs_torch
from helpers_conversion import sparsify
from helpers_sparse import instruction_sets
from torch import nn

from sparselearning.sparse import SparseConv2d, available, load, ops, save
from sparselearning.sparse.fusing import ADDED, fused
from sparselearning.sparse.interface import kernels
from sparselearning.sparse.memory_order import to_batch_last

pytestmark = [
    needs_torch(2, 8, "a dynamic batch of convolutions"),
    pytest.mark.skipif(not available(), reason="built without sparse kernels"),
]
CONV = "sparselearning.conv2d.default"


class Residual(nn.Module):
    """Two convolutions, with or without one on the way past them."""

    def __init__(self, past, stride=1):
        super().__init__()
        self.one = SparseConv2d.from_dense(sparsify(nn.Conv2d(6, 6, 3, stride, 1), 0.3))
        self.two = SparseConv2d.from_dense(sparsify(nn.Conv2d(6, 6, 1), 0.3))
        self.past = SparseConv2d.from_dense(sparsify(nn.Conv2d(6, 6, 1, stride), 0.3)) if past else nn.Identity()
        self.relu = nn.ReLU()

    def forward(self, x):
        y = self.two(self.relu(self.one(x)))
        y += self.past(x)
        return self.relu(y)


def operators(program):
    return [
        step.args[0] if hasattr(step, "args") else getattr(step, "__name__", str(step)) for _, step, *_ in program.steps
    ]


@pytest.mark.parametrize(("past", "stride"), [(False, 1), (True, 1), (True, 2)])
def test_a_residual_block_takes_a_step_for_each_convolution(tmp_path, past, stride):
    torch.manual_seed(0)
    block = Residual(past, stride)
    save(block, tmp_path / "block.sparse", torch.randn(4, 6, 9, 9))
    serve = load(tmp_path / "block.sparse")
    assert operators(serve) == ["conv2d"] * (2 if past else 1) + ["conv2d_added"]
    for rows in (1, 2, 7, 16, 20, 33):
        x = torch.randn(rows, 6, 9, 9)
        with torch.no_grad():
            assert torch.equal(serve(x), block(x))


class Broadcast(nn.Module):
    """A sum of a convolution with a tensor of another shape, dtype or size, and one that is read twice."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.conv = kind, SparseConv2d.from_dense(sparsify(nn.Conv2d(2, 3, 3), 0.5))

    def forward(self, x):
        y = self.conv(x)
        if self.kind == "row":
            return (y + x.mean(dim=(1, 2, 3), keepdim=True)).relu()
        if self.kind == "double":
            return (y + y.detach().double().cos()).relu()
        if self.kind == "twice":
            return (y + y).relu()
        if self.kind == "number":
            return (y + 2.0).relu()
        if self.kind == "scaled":
            return torch.add(y, y.cos(), alpha=2).relu()
        if self.kind == "kept":
            total = y + self.conv(x.flip(-1))
            return total.relu(), total
        return y.relu() + y


@pytest.mark.parametrize("kind", ["row", "double", "twice", "number", "scaled", "kept", "read again"])
def test_other_sums_are_what_they_were(tmp_path, kind):
    torch.manual_seed(0)
    model = Broadcast(kind)
    save(model, tmp_path / "model.sparse", torch.randn(4, 2, 5, 5))
    serve = load(tmp_path / "model.sparse")
    for rows in (1, 3, 16):
        x = torch.randn(rows, 2, 5, 5)
        with torch.no_grad():
            torch.testing.assert_close(serve(x), model(x), atol=0, rtol=0)


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 3, 16, 31])
def test_the_kernels_add_before_the_relu(batch, dtype, instruction_set):
    torch.manual_seed(0)
    kernels().instruction_set = instruction_set
    try:
        for layer in (nn.Conv2d(4, 6, 3, 2, 1), nn.Conv2d(4, 6, 1), nn.Conv2d(4, 6, (1, 3), padding=(0, 2), groups=2)):
            sparse = SparseConv2d.from_dense(sparsify(layer.to(dtype), 0.4))
            x = torch.randn(batch, 4, 7, 9, dtype=dtype)
            given = x, *sparse.arguments(), *sparse.geometry()
            with torch.no_grad():
                alone = ops.conv2d(*given, False)
                for residual in (torch.randn_like(alone), to_batch_last(torch.randn(alone.shape, dtype=dtype))):
                    assert torch.equal(ops.conv2d_added(*given, False, residual), alone + residual)
                    assert torch.equal(ops.conv2d_added(*given, True, residual), (alone + residual).relu())
                none = torch.randn(6, 1, 1, dtype=dtype)  # of another shape
                assert torch.equal(ops.conv2d_added(*given, True, none), (alone + none).relu())
    finally:
        kernels().instruction_set = kernels().best


@pytest.mark.long
def test_residual_networks_have_no_sums_left(tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10).eval()
    for module in list(model.modules()):
        for name, conv in module.named_children():
            if isinstance(conv, nn.Conv2d):
                setattr(module, name, SparseConv2d.from_dense(sparsify(conv, 0.2)))
    for module in model.modules():
        if hasattr(module, "bn2"):
            module.bn2 = nn.Identity()
    save(model, tmp_path / "model.sparse", torch.randn(2, 3, 32, 32))
    serve = load(tmp_path / "model.sparse")
    assert operators(serve).count("conv2d_added") == 8
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(serve(x), model(x))


def conv(x, relu=False):
    return [CONV, [{"step": x} if isinstance(x, int) else x, {"layer": 0}, relu], []]


def test_the_later_of_two_convolutions_adds():
    steps = [conv({"input": 0}), conv({"input": 0}), ["aten.add.Tensor", [{"step": 1}, {"step": 0}], []]]
    last = ["aten.relu.default", [{"step": 2}], []]
    made = fused([*steps, last], [{"step": 3}])
    assert made == [steps[0], None, None, [ADDED, [{"input": 0}, {"layer": 0}, True, {"step": 0}], []]]


def test_a_sum_that_something_else_reads_ends_in_no_relu():
    steps = [conv({"input": 0}), ["aten.add.Tensor", [{"step": 0}, {"input": 0}], []]]
    relu = ["aten.relu.default", [{"step": 1}], []]
    made = fused([*steps, relu], [{"step": 1}, {"step": 2}])
    assert made == [None, [ADDED, [{"input": 0}, {"layer": 0}, False, {"input": 0}], []], relu]
