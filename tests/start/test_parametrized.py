"""Weights that are computed from others: masks act where zeros stay zeros, and are refused where they would not."""

import pytest
import torch
from helpers import assert_masks_hold, backward, masked, mlp, sgd, train
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from sparselearning import Masking, Updates, describe
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.invariants import InvariantError
from sparselearning.prune import PRUNE_FUNCTIONS
from sparselearning.schedules import StepDensity
from sparselearning.slices import are_empty
from sparselearning.sparse import available

pytestmark = pytest.mark.filterwarnings("ignore:.*weight_norm")

NORMED = {  # layer, input, weights that a normalised weight is computed from, without empty slices
    "linear": (lambda norm: norm(nn.Linear(12, 30)), (4, 12)),
    "linear along inputs": (lambda norm: norm(nn.Linear(12, 30), dim=1), (4, 12)),
    "linear as a whole": (lambda norm: norm(nn.Linear(12, 30), dim=None), (4, 12)),
    "convolution": (lambda norm: norm(nn.Conv2d(3, 20, 3)), (2, 3, 6, 6)),
    "transposed": (lambda norm: norm(nn.ConvTranspose2d(20, 3, 3)), (2, 20, 6, 6)),
    "recurrent": (lambda norm: norm(nn.GRUCell(6, 5), "weight_hh"), (4, 6)),
}
NORMS = {"parametrization": parametrizations.weight_norm, "hook": weight_norm}


def normed_mlp(norm=parametrizations.weight_norm):
    model = mlp(20, 30, 20, 10)
    for layer in (model.fc1, model.fc2):
        norm(layer)
    return model


def stored(name, kind="original1"):
    return f"{name}.parametrizations.weight.{kind}"


def assert_no_slice_is_empty(masking):
    for layer in masking.layers:
        if layer.norm_dim is not None:
            assert not are_empty(layer.mask & (layer.weight != 0), layer.norm_dim).any()


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("layer", NORMED)
def test_weight_norm_trains_with_dense_scales_and_without_empty_slices(layer, norm):
    make, shape = NORMED[layer]
    model, inputs = make(NORMS[norm]), torch.randn(shape)
    masking = masked(model, density=0.12 if "recurrent" not in layer else 0.3, growth_mode="random")
    assert not any(name.endswith(("_g", "original0")) for name in masking.masks)
    assert any(reason == "scale of weight_norm" for _, reason in masking.kept_dense.values()) or "whole" in layer
    count = masking.total_nonzero
    for _ in range(4):
        assert model(inputs).isfinite().all()
        train(model, masking, 2, inputs)
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
        assert_no_slice_is_empty(masking)
        masking.check()
    assert masking.total_nonzero == count
    for name, part in model.named_parameters():
        assert part.isfinite().all(), name


@pytest.mark.parametrize("prune_mode", PRUNE_FUNCTIONS)
@pytest.mark.parametrize("growth", ["random", "momentum", "global_momentum", "dense_magnitude"])
def test_no_function_empties_a_slice(prune_mode, growth):
    model, kept = normed_mlp(), "dense_magnitude" in prune_mode + growth
    modes = dict(prune_mode=prune_mode, growth_mode=growth, prune_rate=0.9, weights="kept" if kept else "zero")
    masking = masked(model, density=0.1, **modes)
    for _ in range(3):
        train(model, masking, 1)
        masking.at_end_of_epoch()
        assert masking.total_nonzero == 140
        assert_no_slice_is_empty(masking)
        assert model(torch.randn(4, 20)).isfinite().all()


def test_a_density_that_falls_stops_at_one_weight_for_each_slice():
    model = normed_mlp()
    updates = Updates(density=StepDensity(0.2, 0.01, 1))
    masking = masked(model, prune_mode="global_magnitude", updates=updates)
    train(model, masking, 1)
    message = "leaves less than one in each of 51 layers, and slices that weight_norm divides by their norms"
    with pytest.warns(UserWarning, match=message):
        masking.at_end_of_epoch()
    assert list(masking.name2nonzeros.values()) == [30, 20, 1]
    assert model(torch.randn(4, 20)).isfinite().all()


def test_a_slice_that_has_only_what_has_just_grown_is_none():
    """A weight that grows is zero, and the norm of its slice would be zero."""
    model = normed_mlp()
    masking = masked(model, density=0.1, prune_rate=1.0, growth_mode="random")
    train(model, masking, 1)
    masking.at_end_of_epoch()
    assert_no_slice_is_empty(masking)
    assert model(torch.randn(4, 20)).isfinite().all()


def test_what_would_empty_slices_is_refused():
    with pytest.raises(ValueError, match=r"Expected at least 50 active weights in .*fc1.*, one for each slice.*got 27"):
        Masking(sgd(model := normed_mlp()), None).add_module(model, 0.0225, dense=["fc3"])
    with pytest.raises(ValueError, match="would become empty with weights='soft', a pattern, or sharded weights"):
        masked(normed_mlp(), density=0.5, pattern="neuron")
    with pytest.raises(ValueError, match="would become empty with weights='soft'"):
        masked(normed_mlp(), density=0.5, weights="soft", growth_mode="dense_magnitude")
    masks = {name: mask.clone() for name, mask in masked(normed_mlp(), density=0.5).masks.items()}
    masks[stored("fc1")][3] = False
    with pytest.raises(ValueError, match=r"fc1.* leaves slices empty that weight_norm divides by"):
        masked(normed_mlp(), sparse_init=masks)


def test_check_finds_a_slice_of_zeros():
    masking = masked(model := normed_mlp(), density=0.5)
    with torch.no_grad():
        model.fc1.parametrizations.weight.original1[2] = 0
    with pytest.raises(InvariantError, match=r"fc1.*a slice has no weight but zeros"):
        masking.check()


def test_names_of_layers_mean_their_parametrized_weights():
    masking = masked(normed_mlp(), density={"fc1": 0.5, "fc2.weight": 0.2, "*": 0.1})
    assert list(masking.name2nonzeros.values()) == [300, 120, 20]
    masking.remove_weight("fc1")
    assert list(masking.masks) == [stored("fc2"), "fc3.weight"]
    masking = Masking(sgd(model := normed_mlp()), None)
    masking.add_module(model, 0.5, dense=["fc1", "last"])
    assert list(masking.masks) == [stored("fc2")]


@pytest.mark.parametrize("norm", [parametrizations.spectral_norm, spectral_norm])
def test_spectral_norm_keeps_the_zeros_of_a_mask(norm):
    model = mlp(20, 30, 20, 10)
    norm(model.fc1)
    vectors = {name: buffer.clone() for name, buffer in model.named_buffers()}
    masking = masked(model, density=0.1)
    assert all(torch.equal(buffer, vectors[name]) for name, buffer in model.named_buffers()), "nothing was computed"
    for _ in range(3):
        train(model, masking, 2)
        masking.at_end_of_epoch()
        assert_masks_hold(masking)
    model(torch.randn(2, 20))
    assert torch.equal(model.fc1.weight != 0, (model.fc1.weight != 0) & masking.layers[0].mask)
    assert int((model.fc1.weight != 0).sum()) > 0
    assert masking.total_nonzero == 140


class Symmetric(nn.Module):
    def forward(self, x):
        return x.triu() + x.triu(1).T


class Halved(nn.Module):
    def forward(self, x):
        return x / 2


ORTHOGONAL = {
    "matrix_exp": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="matrix_exp"),
    "cayley": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="cayley"),
    "householder": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"),
    "symmetric": lambda layer: register_parametrization(layer, "weight", Symmetric()),
}


@pytest.mark.parametrize("kind", ORTHOGONAL)
def test_what_does_not_keep_zeros_is_refused_with_the_reason(kind):
    model = mlp(10, 10, 10)
    ORTHOGONAL[kind](model.fc2)
    with pytest.raises(ValueError, match=r"fc2\..*, its parametrization \w+ makes the zeros of a mask other numbers"):
        masked(model, density=0.5)
    assert (model.fc1.weight != 0).all(), "nothing was masked"
    assert "refused: its parametrization" in describe(model)
    masking = Masking(sgd(model), None)
    masking.add_module(model, 0.5, dense=["fc2"])
    train(model, masking)
    assert masking.total_nonzero == 50


def test_what_keeps_zeros_is_masked():
    model = mlp(10, 10, 10)
    register_parametrization(model.fc2, "weight", Halved())
    masking = masked(model, density=0.5, growth_mode="random")
    assert list(masking.masks) == ["fc1.weight", "fc2.parametrizations.weight.original"]
    train(model, masking)
    assert int((model.fc2.weight != 0).sum()) == 50


def test_a_parametrized_weight_of_no_known_layer_stays_dense():
    model = nn.Sequential(parametrizations.spectral_norm(nn.Embedding(10, 4)), nn.Flatten(), nn.Linear(8, 4))
    masking = masked(model, density=0.5)
    assert list(masking.masks) == ["2.weight"]
    assert masking.kept_dense["0.parametrizations.weight.original"][1] == "embedding"


# torch.nn.utils.prune


def test_pruning_by_torch_below_is_refused():
    model = mlp(10, 10, 10)
    prune.l1_unstructured(model.fc1, "weight", 0.5)
    with pytest.raises(ValueError, match=r"fc1.weight_orig, torch.nn.utils.prune masks it too; call prune.remove\(mod"):
        masked(model, density=0.5)
    prune.remove(model.fc1, "weight")
    with pytest.warns(UserWarning, match="weights are not zero"):
        masking = masked(model, density=0.5, sparse_init="resume")
    assert masking.name2nonzeros == {"fc1.weight": 50, "fc2.weight": 100}


def put_on_later(model, kind):
    if kind == "prune":
        prune.l1_unstructured(model.fc1, "weight", 0.5)
    else:
        parametrizations.orthogonal(model.fc1)


@pytest.mark.parametrize(("kind", "words"), [("prune", "fc1.weight: torch.nn.utils.prune"), ("orthogonal", "fc1.weig")])
def test_what_is_put_on_top_later_is_refused_by_the_next_update(kind, words):
    model = mlp(10, 10, 10)
    masking = masked(model, density=0.5)
    train(model, masking, 1)
    put_on_later(model, kind)
    backward(model)
    masking.optimizer.step()
    for look in (masking.at_end_of_epoch, masking.check):
        with pytest.raises(InvariantError, match=words):
            look()


def test_a_parametrization_that_is_removed_leaves_the_weights_to_a_new_masking():
    model = mlp(10, 10, 10)
    parametrizations.weight_norm(model.fc1)
    masking = masked(model, density=0.5)
    train(model, masking)
    remove_parametrizations(model.fc1, "weight")
    with pytest.raises(InvariantError, match="the module holds another parameter now"):
        masking.check()


@pytest.mark.parametrize("growth", GROWTH_FUNCTIONS)
def test_growth_of_every_kind_keeps_slices(growth):
    model = normed_mlp()
    masking = masked(model, density=0.2, growth_mode=growth, weights="kept" if "dense" in growth else "zero")
    train(model, masking, 2)
    masking.at_end_of_epoch()
    assert_no_slice_is_empty(masking)
    assert masking.total_nonzero == 280


@pytest.mark.skipif(not available(), reason="no sparse kernels here")
def test_parametrized_layers_stay_masked_beside_sparse_kernels():
    model = normed_mlp()
    masking = masked(model, density=0.2, weights="sparse")
    for _ in range(2):
        train(model, masking, 2)
        masking.at_end_of_epoch()
        masking.check()
    assert_no_slice_is_empty(masking)
    assert masking.total_nonzero == 280
