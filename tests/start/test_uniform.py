"""RigL's uniform distribution: the first layer dense, all others at the density."""

import math
from fractions import Fraction

import pytest
import torch
from helpers import masked, mlp, sgd
from oracles import distributions
from oracles.network import largest_remainders
from script import checkpoint_of, draw_nothing, load_main, run_folder
from torch import nn

from sparselearning import Masking, models
from sparselearning.start.maskable import maskable_parameters


def counts_of_the_paper(shapes, density):
    """Return the number of weights of each layer but the first, and exactly round(density * size) in all."""
    others = shapes[1:]
    size = sum(map(math.prod, others))
    total = round(density * size)
    real = distributions.uniform(others, Fraction(total, size))
    return largest_remainders(total, real, [math.prod(shape) for shape in others])


def test_lenet5_at_ten_percent():
    model = models.build("lenet5")
    masking = masked(model, density=0.1, sparse_init="uniform")
    assert masking.name2nonzeros == {"conv2.weight": 2500, "fc3.weight": 40_000, "fc4.weight": 500}
    assert masking.kept_dense["conv1.weight"][1] == "named to stay dense"


@pytest.mark.parametrize("name", ["lenet300-100", "lenet5", "wrn-28-2"])
@pytest.mark.parametrize("density", [0.013, 0.1, 0.5, 1.0])
def test_the_counts_are_those_of_the_paper(name, density):
    model = models.build(name)
    shapes = [tuple(weight.shape) for _, weight in maskable_parameters(model)]
    masking = masked(model, density=density, sparse_init="uniform")
    counts = list(masking.name2nonzeros.values())
    assert counts == counts_of_the_paper(shapes, density)
    real = distributions.uniform(shapes, density, dense=[0])
    assert max(abs(ours - theirs) for ours, theirs in zip(counts, real[1:], strict=True)) <= 1


def test_every_update_of_rigl_keeps_it():
    model = mlp(20, 30, 30, 10)
    masking = Masking.from_method("rigl", model, sgd(model), 40, 0.1, sparse_init="uniform", prune_every_k_steps=2)
    for _ in range(40):
        model.zero_grad()
        model(torch.randn(8, 20)).square().mean().backward()
        masking.step()
        assert masking.name2nonzeros == {"fc2.weight": 90, "fc3.weight": 30}
    assert model.fc1.weight.count_nonzero() == 600
    assert masking.exploration_rate > 0.1


def test_other_dense_layers_and_densities_by_name_go_with_it():
    model = mlp(20, 30, 30, 30, 10)
    masking = Masking(sgd(model), None)
    masking.add_module(model, {"fc2": 0.5, "*": 0.1}, sparse_init="uniform", dense=["last"])
    assert masking.name2nonzeros == {"fc2.weight": 450, "fc3.weight": 90}


def test_the_largest_magnitudes_of_all_layers_but_the_first():
    model = mlp(20, 30, 10)
    weight = model.fc2.weight.detach().clone()
    masking = masked(model, density=0.1, sparse_init="magnitude:uniform")
    assert list(masking.masks) == ["fc2.weight"]
    assert set(masking.masks["fc2.weight"].flatten().nonzero().flatten().tolist()) == set(
        weight.abs().flatten().topk(30).indices.tolist()
    )


def test_a_saved_state_finds_its_layers():
    first, second = mlp(20, 30, 10), mlp(20, 30, 10)
    saved = masked(first, density=0.1, sparse_init="uniform").state_dict()
    masking = Masking(sgd(second), None)
    masking.add_module(second, sparse_init="uniform", state=saved)
    assert masking.name2nonzeros == {"fc2.weight": 30}


def test_a_network_of_one_layer_has_nothing_to_mask():
    with pytest.raises(
        ValueError, match=r"All weights of Linear that could be masked are named to stay dense: weight\."
    ):
        masked(nn.Linear(4, 4), density=0.5, sparse_init="uniform")


def test_the_script_trains_with_it(tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    place = ["--data", "digits", "--device", "cpu", "--max-threads", "1", "--run-dir", str(tmp_path)]
    load_main().main(["--method", "rigl", "--sparse-init", "uniform", "--density", "0.1", "--epochs", "1", *place])
    saved = checkpoint_of(run_folder(tmp_path))
    shapes = [(300, 784), (100, 300), (10, 100)]
    active = {name: int(layer["mask"].sum()) for name, layer in saved["mask"]["layers"].items()}
    assert active == dict(zip(["fc2.weight", "fc3.weight"], counts_of_the_paper(shapes, 0.1), strict=True))
