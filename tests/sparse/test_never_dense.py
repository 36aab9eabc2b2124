"""Models on the meta device, whose layers get active weights and never are dense."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselearning import checkpoint
from sparselearning.core import Masking
from sparselearning.sparse import available
from sparselearning.sparse.held_weight import HeldWeight

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")


class Network(nn.Module):
    """A convolution, a norm, linear layers, and a layer that has no sparse kernel."""

    def __init__(self, width=60):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.up = nn.ConvTranspose2d(8, 8, 2)
        self.fc1 = nn.Linear(8 * 49, width)
        self.fc2 = nn.Linear(width, 10)

    def forward(self, x):
        x = self.up(F.relu(self.norm(self.conv(x))))
        return self.fc2(F.relu(self.fc1(x.flatten(1))))


def begin(device="meta", weights="sparse", seed=0, density=0.1, network=Network, growth="gradient", **added):
    torch.manual_seed(seed)
    with torch.device(device):
        model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    modes = dict(growth_mode=growth, redistribution_mode="none", prune_every_k_steps=2)
    masking = Masking(optimizer, None, 0.3, weights=weights, **modes)
    masking.add_module(model, density=density, **added)
    return model, optimizer, masking


def train(run, seeds):
    model, optimizer, _ = run
    losses = []
    for seed in seeds:
        torch.manual_seed(seed)
        x, target = torch.randn(16, 1, 8, 8), torch.randint(10, (16,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("sparse_init", ["constant", "linear", "erdos_renyi_kernel", lambda shape: shape[0]])
def test_as_many_weights_are_active_as_in_a_model_that_was_dense(sparse_init):
    runs = [begin(device, sparse_init=sparse_init) for device in ("meta", "cpu")]
    assert runs[0][2].name2nonzeros == runs[1][2].name2nonzeros
    for run in runs:
        assert all(not parameter.is_meta for parameter in run[0].parameters())
        assert isinstance(run[0].fc1.weight, HeldWeight)
        train(run, range(5))
        run[2].check()


def test_values_are_drawn_as_the_layers_draw_all():
    for name in ("fc1", "conv", "up", "fc2"):
        drawn, dense = (getattr(begin(device, density=0.5)[0], name) for device in ("meta", "cpu"))
        one, other = drawn.weight.detach(), dense.weight.detach()
        one, other = one[one != 0].abs(), other[other != 0].abs()
        assert one.max() <= 1.01 * other.max() + 0.01
        assert one.mean() == pytest.approx(other.mean().item(), rel=0.25)
        assert drawn.bias.abs().max() > 0


def test_rescaled_values_have_the_norm_that_is_expected_of_all():
    norms = [begin(density=0.1, rescale=True)[0].fc1.weight.norm(), Network().fc1.weight.norm()]
    assert norms[0].item() == pytest.approx(norms[1].item(), rel=0.1)


def test_a_layer_without_kernels_is_masked_and_all_else_is_real(caplog):
    model, _, masking = begin()
    assert "4 layers" not in caplog.text or "masked on dense kernels: up.weight" in caplog.text
    assert torch.equal(model.up.weight != 0, masking.masks["up.weight"])
    assert torch.equal(model.norm.weight.detach(), torch.ones(8))
    assert torch.equal(model.norm.running_var, torch.ones(8))


def test_training_goes_on_to_the_bit_in_a_model_that_never_was_dense(tmp_path):
    whole = begin()
    train(whole, range(5))
    names = ("model", "optimizer", "mask")
    checkpoint.save(tmp_path / "c.pt", **dict(zip(names, whole, strict=True)))
    expected = train(whole, range(5, 9))
    for again in (begin(seed=3), begin(seed=3, state=checkpoint.read(tmp_path / "c.pt")["mask"])):
        checkpoint.load(tmp_path / "c.pt", **dict(zip(names, again, strict=True)))
        assert train(again, range(5, 9)) == expected


class Tabled(nn.Module):
    """A layer with a buffer that its __init__ computed."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("table", torch.arange(4), persistent=False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(weights="zero"), "on the meta device. Use weights='sparse'"),
        (dict(sparse_init="magnitude"), "reads the values of weights"),
        (dict(sparse_init="resume"), "reads the values of weights"),
        (dict(pattern="fan-in", sparse_init="constant"), "patterns for"),
        (dict(network=Tabled), "table of Tabled"),
    ],
)
def test_what_needs_values_is_one_clear_error(settings, message):
    with pytest.raises(ValueError, match=message):
        begin(**settings)


@pytest.mark.parametrize("growth", ["random", "guided"])
def test_a_layer_may_have_more_than_2_to_the_31_entries(growth):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(60_000, 50_000), nn.ReLU(), nn.Linear(50_000, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    modes = dict(growth_mode=growth, redistribution_mode="none", prune_every_k_steps=2)
    masking = Masking(optimizer, None, 0.5, weights="sparse", **modes)
    masking.add_module(model, density=1e-5)
    before = masking.layers[0].entries.position
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(3, 60_000)).square().sum().backward()
        optimizer.step()
    after = masking.layers[0].entries.position
    assert len(after) == len(before) == masking.layers[0].nonzeros
    assert after.max() > 2**31
    assert not torch.equal(before, after)
    masking.check()
