"""Layers beyond linear ones and 2d convolutions train sparsely: 1d convolutions, Conv1D, attention, tied layers."""

import copy
import io
import logging

import pytest
import torch
import torch.nn.functional as F
from helpers_coverage import (
    MODELS,
    Conv1D,
    Model,
    of_others,
    of_self,
    pretend_transformers,
    rows,
    tied,
    transformer,
)
from helpers_equal import SITUATIONS, batches, compare, loaded
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparselearning import checkpoint
from sparselearning.core import Masking
from sparselearning.sparse import available, convert
from sparselearning.sparse.batch_last import trained_to_dense
from sparselearning.sparse.files import to_dense
from sparselearning.sparse.held_weight import HeldWeight
from sparselearning.sparse.trained import Trained, TrainedLinear

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")


@pytest.fixture(autouse=True)
def with_transformers(monkeypatch):
    pretend_transformers(monkeypatch)


def masked(model, density=0.5, weights="sparse", growth="random", **settings):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    modes = dict(growth_mode=growth, redistribution_mode="none")
    masking = Masking(optimizer, None, 0.3, weights=weights, **modes)
    masking.add_module(model, density=density, **settings)
    return optimizer, masking


def step(model, optimizer, x, target):
    optimizer.zero_grad()
    F.cross_entropy(model(x), target).backward()
    optimizer.step()


@pytest.mark.parametrize("situation", SITUATIONS, ids=lambda situation: situation.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_sparse_training_is_masked_training(name, situation):
    make, draw = MODELS[name]
    _, sparse = compare("adamw", situation, draw, make=make)
    assert all(layer.compact for layer in sparse.masking.layers)


@pytest.mark.parametrize("optimizer", ["momentum", "adam fused"])
@pytest.mark.parametrize("name", MODELS)
def test_regrown_weights_start_from_the_mean_as_in_masked_training(name, optimizer):
    make, draw = MODELS[name]
    compare(optimizer, loaded, draw, make=make, reset="mean")


@pytest.mark.parametrize("name", MODELS)
def test_gradient_growth_chooses_what_it_chooses_on_the_whole_gradient(name):
    make, draw = MODELS[name]
    masks = []
    for weights in ("zero", "sparse"):
        torch.manual_seed(0)
        model = make()
        optimizer, masking = masked(model, weights=weights, growth="gradient")
        if weights == "sparse":
            masking.held.expect(3)
        for x, target in batches(3, draw):
            step(model, optimizer, x, target)
        masking.at_end_of_epoch()
        masks.append({layer.name: layer.mask.clone() for layer in masking.layers})
    assert masks[0].keys() == masks[1].keys()
    assert all(torch.equal(mask, masks[1][key]) for key, mask in masks[0].items())


@pytest.mark.parametrize("name", MODELS)
def test_observed_gradients_are_those_of_the_dense_weight(name):
    make, draw = MODELS[name]
    torch.manual_seed(0)
    model = make()
    optimizer, masking = masked(model, growth="gradient")
    dense = to_dense(model)
    ((x, target),) = batches(1, draw)
    for held in masking.held.trained.values():
        held.observed.observing = True
    step(model, optimizer, x, target)
    F.cross_entropy(dense(x), target).backward()
    for key, held in masking.held.trained.items():
        expected = dense.get_parameter(key).grad
        torch.testing.assert_close(held.observed.mean(), expected, atol=1e-5, rtol=1e-4)
        seen = held.observed.mean_at(held, held.entries.position)
        torch.testing.assert_close(seen, expected.flatten()[held.entries.position], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_of_gradients_are_those_of_the_dense_model(name):
    make, draw = MODELS[name]
    model = make().double()
    masked(model)
    dense = to_dense(model)
    x = draw(3, torch.Generator().manual_seed(0)).double().requires_grad_()
    found, expected = [], []
    for each, into in ((model, found), (dense, expected)):
        with sdpa_kernel(SDPBackend.MATH):  # the others have no second derivatives
            y = each(x)
        (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        bias = [parameter for parameter in each.parameters() if parameter.dim() == 1]
        into += [dx, *torch.autograd.grad(dx.square().sum(), [x, *bias], allow_unused=True)]
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other)


@pytest.mark.parametrize("name", MODELS)
def test_a_dense_copy_a_converted_copy_and_a_released_model_compute_the_same(name):
    make, draw = MODELS[name]
    torch.manual_seed(0)
    model = make()
    kinds = [type(module) for module in model.modules()]
    optimizer, masking = masked(model)
    for x, target in batches(2, draw):
        step(model, optimizer, x, target)
    model.eval()
    x = draw(16, torch.Generator().manual_seed(5))
    expected = model(x).detach()
    ready, ended = copy.deepcopy(model), copy.deepcopy(model)
    trained_to_dense(ended)
    for each in (ready, to_dense(model), ended, convert(model, x)[0]):
        torch.testing.assert_close(each(x), expected, atol=1e-5, rtol=1e-4)
    assert [type(module) for module in to_dense(model).modules()] == kinds
    for layer in list(masking.layers):
        masking.remove_weight(layer.name)
    assert [type(module) for module in model.modules()] == kinds
    assert not any(isinstance(weight, HeldWeight) for weight in model.parameters())
    torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_goes_on_to_the_bit_and_fits_masked_training(name, tmp_path):
    make, draw = MODELS[name]
    model = make()
    optimizer, masking = masked(model, growth="gradient")
    data = list(batches(4, draw))
    for x, target in data[:3]:
        step(model, optimizer, x, target)
    checkpoint.save(tmp_path / "c.pt", model=model, optimizer=optimizer, mask=masking)
    resumed, plainly = make(), make()
    others = [(resumed, *masked(resumed, growth="gradient")), (plainly, *masked(plainly, weights="zero"))]
    for other, stepper, masks in others:
        checkpoint.load(tmp_path / "c.pt", model=other, optimizer=stepper, mask=masks)
    assert resumed.state_dict().keys() == plainly.state_dict().keys() == model.state_dict().keys()
    step(model, optimizer, *data[3])
    masking.at_end_of_epoch()
    step(resumed, others[0][1], *data[3])
    others[0][2].at_end_of_epoch()
    assert all(torch.equal(one, resumed.state_dict()[key]) for key, one in model.state_dict().items())
    step(plainly, others[1][1], *data[3])


@pytest.mark.parametrize("name", MODELS)
def test_models_change_dtype_and_are_pickled(name):
    make, draw = MODELS[name]
    model = make()
    optimizer, masking = masked(model)
    model.double()
    for x, target in batches(2, draw):
        step(model, optimizer, x.double(), target)
    assert all(held.value.dtype == torch.float64 for held in masking.held.trained.values())
    if model.__class__ is not Model:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        x = draw(4, torch.Generator().manual_seed(3)).double()
        torch.testing.assert_close(again(x), model(x))


def attend(attention, query, key, **settings):
    torch.manual_seed(1)
    return attention(query, key, key, **settings)


ATTENTION = {
    "plain": {},
    "no weights": dict(need_weights=False),
    "weights of heads": dict(average_attn_weights=False),
    "bool mask": dict(attn_mask=torch.ones(5, 5).triu(1).bool()),
    "float mask": dict(attn_mask=torch.randn(5, 5), need_weights=False),
    "mask of heads": dict(attn_mask=torch.randn(4, 5, 5)),
    "padding": dict(key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2])),
    "both": dict(
        key_padding_mask=torch.tensor([[False] * 5, [False] * 3 + [True] * 2]),
        attn_mask=torch.ones(5, 5).triu(1).bool(),
        is_causal=True,
        need_weights=False,
    ),
    "causal": dict(attn_mask=torch.ones(5, 5).triu(1).bool(), is_causal=True, need_weights=False),
    "causal with weights": dict(attn_mask=torch.ones(5, 5).triu(1).bool(), is_causal=True),
}


BUILT = [{}, dict(batch_first=True), dict(bias=False), dict(dropout=0.3), dict(kdim=8, vdim=8)]


@pytest.mark.parametrize("built", BUILT)
@pytest.mark.parametrize("unusual", [{}, dict(add_bias_kv=True), dict(add_zero_attn=True)])
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_is_that_of_torch(name, unusual, built):
    torch.manual_seed(0)
    model = nn.Sequential(nn.MultiheadAttention(8, 2, **built, **unusual))
    masked(model)
    dense = to_dense(model)
    shape = (2, 5, 8) if built.get("batch_first") else (5, 2, 8)
    query, memory = torch.randn(shape), torch.randn(shape)
    for key in (query, memory):
        found = attend(model[0], query, key, **ATTENTION[name])
        expected = attend(dense[0], query, key, **ATTENTION[name])
        torch.testing.assert_close(found[0], expected[0], atol=1e-5, rtol=1e-4)
        assert (found[1] is None) == (expected[1] is None)
        if found[1] is not None:
            torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-4)


def test_attention_takes_single_sequences_and_refuses_what_torch_refuses():
    model = of_self()
    masked(model)
    dense, x = to_dense(model), torch.randn(5, 8)
    torch.testing.assert_close(model.attention(x, x, x), dense.attention(x, x, x))
    x = torch.randn(2, 5, 8)
    with pytest.raises(RuntimeError):
        model.attention(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError):
        model.attention(x, x, x, attn_mask=torch.zeros(4, 4))
    with pytest.raises(AssertionError):
        model.attention(x[..., :7], x, x)


def test_attention_does_not_compute_its_dense_weight(monkeypatch):
    model = of_others()
    masking = masked(model)[1]
    for held in masking.held.trained.values():
        monkeypatch.setattr(held.entries, "dense", None)
    model(torch.randn(4, 5, 8)).sum().backward()


def test_a_layer_of_an_encoder_takes_no_fast_path():
    model = transformer()
    masked(model)
    dense = to_dense(model)
    model.eval(), dense.eval()
    x = torch.randn(4, 5, 8)
    with torch.no_grad():
        torch.testing.assert_close(model(x), dense(x), atol=1e-5, rtol=1e-4)


def test_autocast_computes_attention_in_its_dtype():
    model = of_self()
    masked(model)
    x = torch.randn(4, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = model.attention(x, x, x)
        expected, _ = to_dense(model).attention(x, x, x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, atol=2e-2, rtol=2e-2)


def test_a_part_of_attention_may_stay_dense():
    for dense in (["*in_proj*"], ["*out_proj*"]):
        model = of_others()
        masking = masked(model, dense=dense)[1]
        assert all(layer.compact for layer in masking.layers)
        expected = to_dense(model)
        x = torch.randn(4, 5, 8)
        torch.testing.assert_close(model(x), expected(x), atol=1e-5, rtol=1e-4)


def test_tied_layers_share_their_values():
    model = tied()
    optimizer, masking = masked(model)
    assert type(model.first) is type(model.second) is TrainedLinear
    assert model.first.weight is model.second.weight
    assert model.first.value is model.second.value
    assert [layer.name for layer in masking.layers] == ["first.weight", "head.weight"]
    copied, _, _ = copy.deepcopy((model, optimizer, masking))
    assert copied.first.value is copied.second.value is not model.first.value
    assert copied.first.weight is copied.second.weight
    alone = copy.deepcopy(model)
    assert alone.first.weight is alone.second.weight
    assert not isinstance(alone.first.weight, HeldWeight)


def kept_masked(model, caplog, **settings):
    with caplog.at_level(logging.WARNING):
        masked(model, **settings)
    return caplog.text


def test_a_weight_of_an_embedding_or_of_layers_that_differ_stays_masked(caplog):
    def decode(model, x):
        return model.decoder(model.embedding(x))

    model = Model(decode, embedding=nn.Embedding(9, 4), decoder=nn.Linear(4, 9), other=nn.Linear(4, 4))
    model.decoder.weight = model.embedding.weight
    assert "belongs to an Embedding" in kept_masked(model, caplog, sparse_embeddings=True)
    assert type(model.decoder) is nn.Linear
    convolutions = nn.Sequential(nn.Conv1d(3, 3, 3), nn.Conv1d(3, 3, 3, stride=2), nn.Conv1d(3, 3, 3))
    convolutions[1].weight = convolutions[0].weight
    assert "multiply with it in different ways" in kept_masked(convolutions, caplog)
    assert [isinstance(module, Trained) for module in convolutions] == [False, False, True]


def test_layers_of_other_modules_of_the_name_stay_masked(caplog):
    class Mine(Conv1D):
        pass

    model = nn.Sequential(Mine(8, 8), Conv1D(8, 8))
    Mine.__module__ = "transformers.pytorch_utils"
    assert "belongs to a Mine" in kept_masked(model, caplog)


def test_attention_from_the_meta_device():
    with torch.device("meta"):
        model = nn.Sequential(nn.MultiheadAttention(64, 4), nn.Conv1d(3, 4, 3))
    _, masking = masked(model)
    assert all(layer.compact for layer in masking.layers)
    assert not any(tensor.is_meta for tensor in model.parameters())
    value = masking.held.trained["0.in_proj_weight"].value.detach()
    assert value.abs().max() <= (6 / (4 * 64)) ** 0.5
    assert value.std() == pytest.approx((2 / (4 * 64)) ** 0.5, rel=0.05)


def test_conv1d_of_transformers_itself(monkeypatch):
    monkeypatch.undo()
    real = pytest.importorskip("transformers.pytorch_utils")
    torch.manual_seed(0)
    model = nn.Sequential(real.Conv1D(12, 8), nn.Tanh(), real.Conv1D(7, 12))
    optimizer, masking = masked(model)
    assert all(layer.compact for layer in masking.layers)
    for x, target in batches(3, rows):
        step(model, optimizer, x, target)
    x = torch.randn(4, 8)
    torch.testing.assert_close(to_dense(model)(x), model(x), atol=1e-5, rtol=1e-4)
