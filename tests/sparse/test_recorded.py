"""Values of a few weights, distributed as the dense weight's would be."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from sparselearning.sparse.recorded import recorded

COUNT = 200_000


def linear(write, inputs=500, outputs=400):
    """Return a linear layer on the meta device whose reset_parameters is `write(layer)`."""

    class Own(nn.Linear):
        def reset_parameters(self):
            write(self)

    return Own(inputs, outputs, device="meta")


def assert_same_distribution(few, dense):
    """Compare moments, bounds and quantiles of two samples, to five standard errors of their difference."""
    few, dense = few.double(), dense.detach().flatten().double()
    spread = dense.std().item()
    error = spread * (1 / len(few) + 1 / len(dense)) ** 0.5
    assert few.mean().item() == pytest.approx(dense.mean().item(), abs=5 * error + 1e-12)
    assert few.std().item() == pytest.approx(spread, rel=0.01)
    points = dense.quantile(torch.linspace(0.02, 0.98, 25, dtype=torch.float64)).unsqueeze(1)
    below = [(sample <= points).double().mean(1) for sample in (few, dense)]
    assert (below[0] - below[1]).abs().max() < 5 * 0.5 * (1 / len(few) + 1 / len(dense)) ** 0.5


ENTRYWISE = {
    "uniform": lambda w: nn.init.uniform_(w, -0.2, 0.5),
    "normal": lambda w: nn.init.normal_(w, 0.1, 0.02),
    "truncated": lambda w: nn.init.trunc_normal_(w, std=0.02, a=-0.04, b=0.03),
    "truncated in the tail": lambda w: nn.init.trunc_normal_(w, a=1.0, b=3.0),
    "constant": lambda w: nn.init.constant_(w, 0.3),
    "ones": nn.init.ones_,
    "zeros": nn.init.zeros_,
    "xavier uniform": lambda w: nn.init.xavier_uniform_(w, gain=2.0),
    "xavier normal": nn.init.xavier_normal_,
    "kaiming uniform": lambda w: nn.init.kaiming_uniform_(w, a=5**0.5),
    "kaiming normal": lambda w: nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu"),
    "data": lambda w: w.data.normal_(0, 0.1),
    "a view": lambda w: w.data.view(-1).uniform_(),
    "several steps": lambda w: w.data.uniform_(-0.9, 0.9).erfinv_().mul_(0.02).add_(1).clamp_(0.99, 1.02),
    "a number": lambda w: w.data.normal_().mul_(torch.tensor(0.5)).abs_(),
}


@pytest.mark.parametrize("write", ENTRYWISE.values(), ids=ENTRYWISE)
def test_every_entrywise_function_is_drawn_as_in_a_dense_layer(write):
    torch.manual_seed(0)
    dense = torch.empty(400, 500, requires_grad=True)
    write(dense)
    few = recorded(linear(lambda layer: write(layer.weight)), "weight").draw(COUNT)
    assert few.shape == (COUNT,)
    assert not few.requires_grad
    assert_same_distribution(few, dense)


def test_truncated_normals_end_at_their_bounds():
    few = recorded(linear(lambda x: nn.init.trunc_normal_(x.weight, std=0.02, a=-0.04, b=0.03)), "weight").draw(COUNT)
    assert few.min() >= -0.04
    assert few.max() <= 0.03
    assert nn.init.trunc_normal_.__globals__["_no_grad_trunc_normal_"].__module__ == "torch.nn.init"


LAYERS = {
    "linear": (lambda device: nn.Linear(500, 400, device=device), "weight"),
    "convolution": (lambda device: nn.Conv2d(64, 128, 5, device=device), "weight"),
    "grouped": (lambda device: nn.Conv2d(64, 128, 5, groups=2, device=device), "weight"),
    "transposed": (lambda device: nn.ConvTranspose2d(64, 128, 5, device=device), "weight"),
    "embedding": (lambda device: nn.Embedding(2000, 100, device=device), "weight"),
    "attention": (lambda device: nn.MultiheadAttention(256, 4, device=device), "in_proj_weight"),
    "keys": (lambda device: nn.MultiheadAttention(256, 4, kdim=512, device=device), "k_proj_weight"),
    "lstm": (lambda device: nn.LSTM(200, 200, device=device), "weight_hh_l0"),
    "bilinear": (lambda device: nn.Bilinear(50, 60, 70, device=device), "weight"),
}


@pytest.mark.parametrize(("build", "name"), LAYERS.values(), ids=LAYERS)
def test_layers_of_torch_are_drawn_as_they_initialise_themselves(build, name):
    torch.manual_seed(0)
    few = recorded(build("meta"), name).draw(COUNT)
    dense = getattr(build("cpu"), name).detach()
    assert_same_distribution(few, dense)
    if not isinstance(build("meta"), nn.Embedding):
        assert few.abs().max().item() == pytest.approx(dense.abs().max().item(), rel=1e-3), "bounds of a uniform"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_values_have_the_dtype_asked_for(dtype):
    few = recorded(nn.Linear(4, 3, device="meta"), "weight").draw(7, dtype)
    assert few.dtype == dtype
    assert few.abs().max() <= 0.5


def test_a_recording_changes_nothing():
    layer = nn.BatchNorm2d(3)
    layer.weight.data.fill_(7)
    before, held = {name: x.clone() for name, x in layer.state_dict().items()}, dict(layer.named_parameters())
    state = torch.get_rng_state()
    recorded(layer, "weight")
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], x) for name, x in layer.state_dict().items())
    assert all(held[name] is x for name, x in layer.named_parameters())


def test_a_recording_needs_the_module_no_more():
    layer = nn.Linear(100, 100, device="meta")
    found = recorded(layer, "weight")
    del layer.weight
    assert found.draw(5).abs().max() <= 0.1


def test_a_module_may_initialise_its_parts():
    class Head(nn.Sequential):
        def reset_parameters(self):
            nn.init.constant_(self[0].weight, 0.25)

    head = Head(nn.Linear(4, 4, device="meta"))
    assert torch.equal(recorded(head, "0.weight").draw(3), torch.full((3,), 0.25))
    assert recorded(head[0], "weight").draw(3).unique().numel() == 3


def of_parts(layer):
    nn.init.normal_(layer.weight[:10])
    nn.init.normal_(layer.weight[10:])


def replacing(layer):
    layer.weight = nn.Parameter(layer.weight + 1)


REFUSED = {
    "orthogonal": (lambda x: nn.init.orthogonal_(x.weight), "calls copy_ with values from other tensors"),
    "sparse": (lambda x: nn.init.sparse_(x.weight, 0.1), "calls index_put_, which treats entries differently"),
    "eye": (lambda x: nn.init.eye_(x.weight), "calls eye, which treats entries differently"),
    "dirac": (lambda x: nn.init.dirac_(x.weight.unsqueeze(2)), "for a part of it"),
    "orthogonal after normal": (lambda x: nn.init.orthogonal_(nn.init.normal_(x.weight)), "from other tensors"),
    "other values": (lambda x: x.weight.data.normal_().add_(torch.ones(400, 500)), "calls add_ with values from other"),
    "its norm": (lambda x: x.weight.data.normal_().div_(x.weight.norm()), "calls div_ with values from other"),
    "parts": (of_parts, r"calls normal_ for a part of it, \(10, 500\)"),
    "truncated parts": (lambda x: nn.init.trunc_normal_(x.weight[1:]), r"calls trunc_normal_ for a part of it"),
    "a triangle": (lambda x: x.weight.data.normal_().tril_(), "calls tril_, which treats entries differently"),
    "a list": (lambda x: torch._foreach_mul_([x.weight.data, x.bias.data], 2.0), "calls _foreach_mul_, which treats"),
    "nothing": (lambda x: None, "does not write the weight"),
    "only scaled": (lambda x: x.weight.data.mul_(2), "only changes values that the weight has already"),
    "scaled first": (lambda x: x.weight.data.mul_(2).normal_(), "only changes values that the weight has already"),
    "replaced": (replacing, "replaces the parameter"),
}


@pytest.mark.parametrize(("write", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_drawn_entry_by_entry_is_refused_by_name(write, message):
    layer = linear(write)
    held = layer.weight
    with pytest.raises(ValueError, match=f"^The active values of head.fc.weight cannot.*{message}.*dense="):
        recorded(layer, "weight", "head.fc.weight")
    assert layer.weight is held
    assert nn.init._no_grad_trunc_normal_.__module__ == "torch.nn.init"


def test_the_row_that_pads_an_embedding_is_refused():
    with pytest.raises(ValueError, match=r"Embedding.weight cannot.*calls fill_ for a part of it, \(3,\)"):
        recorded(nn.Embedding(5, 3, padding_idx=0, device="meta"), "weight")


def test_modules_without_a_reset_and_with_one_that_fails_are_refused():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.empty(3, 3, device="meta"))

    with pytest.raises(ValueError, match=r"Expected Scale to say in reset_parameters\(\) how head.weight is drawn"):
        recorded(Scale(), "weight", "head.weight")
    reading = linear(lambda layer: None)
    type(reading).reset_parameters = lambda layer: layer.weight.data.normal_().mul_(layer.weight.max().item())
    with pytest.raises(ValueError, match=r"failed on the meta device, where Own.weight has no values to read"):
        recorded(reading, "weight")


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux")
def test_a_dense_weight_of_four_terabytes_costs_what_its_active_weights_cost():
    """The peak is VmHWM, set back by clear_refs: ru_maxrss begins with that of the process that started this one."""
    code = """
import re, torch
from pathlib import Path
from torch import nn
from sparselearning.start.drawing import initial_positions
from sparselearning.sparse.recorded import recorded
from sparselearning.sparse.unborn import materialise

def run(size, count):
    model = nn.Sequential(nn.Linear(size, size, device="meta"))
    positions = initial_positions({"0.weight": model[0].weight.shape}, count / size**2, "erdos_renyi_kernel")
    values = recorded(model[0], "weight").draw(count)
    materialise(model, {(model[0], "weight")})
    assert len(positions["0.weight"]) == len(values) == count and not model[0].bias.is_meta
    return positions, values, model

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

run(10, 10)
Path("/proc/self/clear_refs").write_text("5")
before = peak()
kept = run(10**6, 10**6)
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert 12 < float(done.stdout) < 100, "MB; positions of 8 and values of 4 are kept"
