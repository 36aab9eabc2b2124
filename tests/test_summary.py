"""What a Masking says of itself: a table of its layers and of what stays dense, and one line."""

import re

import pytest
import torch
from helpers import masked, mlp, sgd, train
from torch import nn

from sparselearning import Masking, describe
from sparselearning.sparse import available


class Network(nn.Module):
    """Two layers that are masked, and parameters that stay dense for every reason."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(10, 8)
        self.norm = nn.LayerNorm(8)
        self.scale = nn.Parameter(torch.ones(()))
        self.first, self.second = nn.Linear(8, 6), nn.Linear(6, 4, bias=False)
        self.named, self.gone = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.elsewhere, self.frozen = nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = self.second(self.first(self.norm(self.embed(x)).mean(1)))
        return self.scale * self.elsewhere(self.frozen(self.gone(self.named(x))))


def rows_of(masking):
    """Return the cells of each row of the summary, by the first cell."""
    rows = [re.split(r" {2,}", row.strip()) for row in masking.summary().splitlines()]
    return {row[0]: row[1:] for row in rows}


def network():
    model = Network()
    stepped = [parameter for name, parameter in model.named_parameters() if "elsewhere" not in name]
    masking = Masking(torch.optim.SGD(stepped, lr=0.1, momentum=0.9), None)
    masking.add_module(model, 0.5, dense=["named"])
    masking.remove_weight("gone")
    return model, masking


def test_a_row_for_every_layer():
    rows = rows_of(network()[1])
    assert next(iter(rows)) == "layer"
    assert rows["layer"] == ["shape", "active", "of", "density", "importance", "note"]
    assert rows["first.weight"] == ["6x8", "24", "48", "0.5000", "0.0000"]
    assert rows["second.weight"] == ["4x6", "12", "24", "0.5000", "0.0000"]
    assert rows["masked weights"] == ["36", "72", "0.5000"]


def test_importance_is_that_of_the_last_update():
    model, masking = network()
    train(model, masking, 2, torch.randint(10, (4, 3)))
    masking.at_end_of_epoch()
    rows = rows_of(masking)
    for layer in masking.layers:
        cells = rows[layer.name]
        assert cells[1] == str(layer.nonzeros)
        assert float(cells[4]) == pytest.approx(layer.importance, abs=5e-5)
        assert layer.importance > 0


def test_every_other_parameter_with_the_reason_why_it_stays_dense():
    model, masking = network()
    rows = rows_of(masking)
    assert {name: cells[-1] for name, cells in rows.items() if "dense" in cells} == {
        "embed.weight": "embedding",
        "norm.weight": "normalisation",
        "norm.bias": "normalisation",
        "scale": "fewer than two dimensions",
        "first.bias": "bias",
        "named.weight": "named to stay dense",
        "gone.weight": "its mask was removed",
        "elsewhere.weight": "the optimizer does not step it",
        "frozen.weight": "frozen",
    }
    assert rows["embed.weight"] == ["10x8", "80", "80", "dense", "embedding"]
    assert rows.keys() - {"layer", "masked weights"} == {name for name, _ in model.named_parameters()}


def names_of(masking):
    """Return the names in the summary, as often as they are there."""
    names = [line.split()[0] for line in masking.summary().splitlines()[1:]]
    return sorted(name for name in names if name != "masked")


def test_a_parameter_that_is_masked_later_is_no_longer_listed_as_dense():
    model = mlp(6, 5, 4)
    masking = Masking(sgd(model.fc1), None)
    masking.add_module(model, 0.5)
    assert rows_of(masking)["fc2.weight"][-1] == "the optimizer does not step it"
    masking.optimizer.add_param_group({"params": model.fc2.parameters()})
    masking.add_module(model, 0.5)
    assert names_of(masking) == sorted(name for name, _ in model.named_parameters())
    assert rows_of(masking)["fc2.weight"][:3] == ["4x5", "10", "20"]


def test_dense_parameters_of_two_modules_are_all_listed():
    first, second = mlp(6, 5), mlp(5, 4)
    masking = Masking(sgd(first, second), None)
    masking.add_module(first, 0.5)
    masking.add_module(second, 0.5)
    assert names_of(masking) == ["1.fc1.bias", "1.fc1.weight", "fc1.bias", "fc1.weight"]
    rows = rows_of(masking)
    assert (rows["fc1.bias"][0], rows["1.fc1.bias"][0]) == ("5", "4")


def test_embeddings_that_are_masked_are_layers():
    model = nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4, bias=False))
    masking = Masking(sgd(model), None)
    masking.add_module(model, 0.5, sparse_embeddings=True)
    assert rows_of(masking)["0.weight"][:3] == ["10x8", "40", "80"]


def test_notes_say_pattern_and_how_weights_are_held():
    assert rows_of(masked(mlp(8, 40), density=0.5, pattern="2:4"))["fc1.weight"][-1] == "2:4"
    assert rows_of(masked(mlp(8, 40), density=0.5, weights="soft"))["fc1.weight"][-1] == "dense copy"
    assert (
        rows_of(masked(mlp(8, 40), density=0.5, weights="kept", pattern="2:4"))["fc1.weight"][-1] == "2:4, dense copy"
    )


@pytest.mark.skipif(not available(), reason="built without sparse kernels")
def test_notes_say_which_layers_train_on_sparse_kernels():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4).half())
    rows = rows_of(masked(model, density=0.9, weights="sparse"))
    assert rows["0.weight"][-1] == "sparse kernels"
    assert rows["1.weight"][-1] == "masked: no kernels for torch.float16 on cpu"


def test_outputs_without_inputs_are_counted_before_and_after():
    model = nn.Sequential(nn.Linear(10, 100), nn.Linear(100, 2))
    assert "about 60 of 100 outputs without inputs at density 0.05" in describe(model)
    assert "2 outputs" in describe(model)
    masking = masked(model, density=0.05)
    empty = 100 - int(masking.masks["0.weight"].any(1).sum())
    assert rows_of(masking)["0.weight"][-1] == f"{empty} of 100 outputs without inputs"


def test_a_model_is_described_before_it_has_masks():
    model = network()[0]
    optimizer = sgd(model.first)
    lines = describe(model, optimizer, density=0.5, dense=["second"]).splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert [name for name in rows if name in dict(model.named_parameters())] == [n for n, _ in model.named_parameters()]
    assert "masked" in rows["first.weight"]
    assert "named to stay dense" in rows["second.weight"]
    assert "embedding" in rows["embed.weight"]
    assert "the optimizer does not step it" in rows["gone.weight"]
    assert lines[-1] == "48 of 239 parameters are masked; at density 0.5, 24 of them are active."


def test_columns_are_aligned():
    lines = network()[1].summary().splitlines()
    place = lines[0].index("density") + len("density")
    assert {line[place - 6 : place].strip() for line in lines[1:]} == {"0.5000", "dense"}


def test_one_line_names_modes_layers_and_weights():
    masking = masked(mlp(20, 30, 10), density=0.1, growth_mode="random")
    assert repr(masking) == (
        "Masking(prune='magnitude', redistribution='momentum', growth='random', weights='zero', "
        "2 layers, 90 of 900 weights active, density 0.1)"
    )


def test_one_line_names_own_functions_and_a_single_layer():
    def my_growth(masking, name, new_mask, total_regrowth, weight):
        return new_mask

    line = repr(masked(mlp(20, 30), growth_mode=my_growth, weights="kept"))
    assert "growth='my_growth', weights='kept', 1 layer, 120 of 600" in line
    assert "\n" not in line


def test_a_masking_without_layers_says_so():
    masking = Masking(sgd(mlp(4, 4)), None)
    assert repr(masking).endswith("0 layers, 0 of 0 weights active, density 0)")
    assert rows_of(masking)["masked weights"] == ["0", "0", "0.0000"]


def test_densities_by_name():
    masking = masked(mlp(20, 30, 10), density={"fc1": 0.1, "fc2": 0.5})
    assert masking.densities == {"fc1.weight": 0.1, "fc2.weight": 0.5}


def test_inputs_that_no_output_reads_are_counted_before_and_after():
    model = nn.Sequential(nn.Linear(100, 5), nn.Flatten(), nn.ConvTranspose1d(20, 4, 3))
    lines = {line.split()[0]: line for line in describe(model, density=0.1).splitlines()}
    assert lines["0.weight"].endswith("about 59 of 100 inputs that no output reads at density 0.1")
    assert lines["2.weight"].endswith("about 6 of 20 inputs that no output reads at density 0.1")
    masking = masked(model, density=0.1)
    unread = 100 - int(masking.masks["0.weight"].any(0).sum())
    assert rows_of(masking)["0.weight"][-1] == f"{unread} of 100 inputs that no output reads"
    unread = 20 - int(masking.masks["2.weight"].flatten(1).any(1).sum())
    assert rows_of(masking)["2.weight"][-1] == f"{unread} of 20 inputs that no output reads"


def test_a_description_takes_the_densities_of_add_module():
    model = mlp(20, 30, 10)
    lines = describe(model, density={"fc1": 0.5, "*": 0.001}).splitlines()
    assert "0.001" not in next(line for line in lines if line.startswith("fc1.weight"))
    assert "less than one active weight at density 0.001" in next(
        line for line in lines if line.startswith("fc2.weight")
    )
    assert lines[-1] == "900 of 940 parameters are masked; at these densities, 300 of them are active."
    with pytest.raises(ValueError, match="matches none of the weights"):
        describe(model, density={"conv1": 0.5, "*": 0.1})


def test_a_description_marks_what_add_module_refuses_until_it_is_named():
    model = mlp(20, 30, 10)
    nn.utils.parametrizations.orthogonal(model.fc2)
    assert "refused: its parametrization Orthogonal makes" in describe(model)
    assert "refused" not in describe(model, dense=["fc2"])
