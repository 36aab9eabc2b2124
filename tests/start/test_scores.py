"""Scores before training: computed by hand and by slow autograd, and the masks made from them."""

import copy
import math

import pytest
import torch
from helpers import assert_masks_hold, masked, mlp, same, train
from launch import run
from oracles.scores_modes import grasp_of, snip_of
from torch import nn
from torch.nn import functional as F

from sparselearning import Masking, checkpoint, models
from sparselearning.start.maskable import maskable_parameters
from sparselearning.start.scores import grasp, load_masks, snip, synflow


def linear(weight):
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight))
    return layer


def half_square(output, target):
    return (output - target).square().sum() / 2


def network():
    """A convolution, batch normalisation, a linear layer; float64."""
    layers = nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 3)
    return nn.Sequential(*layers).double()


def batch(size=6):
    return torch.randn(size, 1, 4, 4, dtype=torch.float64), torch.arange(size) % 3


W = [[1.0, -2.0, 0.5], [0.0, 1.0, -1.0], [2.0, 0.0, 3.0]]


def test_snip_of_three_by_three():
    # x = (1, 2, 3), target 0: outputs (-1.5, -1, 11), dL/dw_ij = output_i x_j.
    scores = snip(linear(W), [(torch.tensor([1.0, 2.0, 3.0]), 0.0)], half_square)
    assert scores["weight"].tolist() == [[1.5, 6.0, 2.25], [0.0, 2.0, 3.0], [22.0, 0.0, 99.0]]


def test_grasp_of_three_by_three():
    # L = |W x|^2 / 2: g_ij = (Wx)_i x_j, and H g = |x|^2 g for each row. |x|^2 = 14.
    scores = grasp(linear(W), [(torch.tensor([1.0, 2.0, 3.0]), 0.0)], half_square, temperature=1)
    expected = 14 * torch.tensor([[-1.5, 6.0, -2.25], [0.0, -2.0, 3.0], [22.0, 0.0, 99.0]])
    torch.testing.assert_close(scores["weight"], expected)


def test_synflow_of_three_by_three():
    # Two layers: R = 1^T |B| |A| 1, so that the score of a_ij is (column sum of |B|)_i |a_ij|, of b_ij |b_ij| (row sum
    # of |A|)_j.
    model = nn.Sequential(linear(W), linear([[1.0, -1.0, 2.0]]))
    scores = synflow(model, torch.zeros(1, 3), density=0.5, rounds=1)
    assert scores["0.weight"].tolist() == [[1.0, 2.0, 0.5], [0.0, 1.0, 1.0], [4.0, 0.0, 6.0]]
    assert scores["1.weight"].tolist() == [[3.5, 2.0, 10.0]]


def loss_without(model, batches, name, position, strength):
    """The loss when one weight is multiplied by `strength`."""
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        dict(model.named_parameters())[name].view(-1)[position] *= strength
    return sum(F.cross_entropy(model(x), y) for x, y in batches).item()


def test_snip_is_the_derivative_by_a_switch_on_each_weight():
    model, batches, step = network(), [batch(), batch()], 1e-5
    scores = snip(model, batches)
    for name, weight in maskable_parameters(model):
        for i in range(weight.numel()):
            high, low = (loss_without(model, batches, name, i, strength) for strength in (1 + step, 1 - step))
            assert scores[name].view(-1)[i].item() == pytest.approx(abs(high - low) / (2 * step), rel=1e-4, abs=1e-9)


def test_grasp_is_the_product_with_a_hessian_written_out():
    model, batches, temperature = network(), [batch(), batch()], 3.0
    scores = grasp(model, batches, temperature=temperature)
    weights = dict(maskable_parameters(model))
    sizes = [weight.numel() for weight in weights.values()]

    def loss(flat):
        parts = [part.view_as(w) for part, w in zip(flat.split(sizes), weights.values(), strict=True)]
        state = dict(zip(weights, parts, strict=True))
        copied = copy.deepcopy(model)
        return sum(F.cross_entropy(torch.func.functional_call(copied, state, x) / temperature, y) for x, y in batches)

    flat = torch.cat([weight.detach().flatten() for weight in weights.values()])
    g = torch.autograd.functional.jacobian(loss, flat)
    hessian = torch.autograd.functional.hessian(loss, flat)
    found = torch.cat([scores[name].flatten() for name in weights])
    torch.testing.assert_close(found, flat * (hessian @ g))


def test_synflow_is_the_rounds_of_the_paper():
    """Round t keeps density^(t/T) of the weights; here in a slow loop over Python numbers."""
    model, density, rounds = network(), 0.3, 5
    model[1].running_mean.fill_(-0.5)
    model[1].running_var.fill_(2.0)
    positive = copy.deepcopy(model).eval()
    weights = dict(maskable_parameters(positive))
    size = sum(weight.numel() for weight in weights.values())
    with torch.no_grad():
        for tensor in positive.state_dict().values():
            tensor.abs_()
    active = {(name, i) for name, weight in weights.items() for i in range(weight.numel())}
    for t in range(1, rounds + 1):
        positive.zero_grad()
        positive(torch.ones(1, 1, 4, 4, dtype=torch.float64)).sum().backward()
        score = {(name, i): (weights[name] * weights[name].grad).view(-1)[i].item() for name, i in active}
        active = set(sorted(active, key=score.get, reverse=True)[: round(density ** (t / rounds) * size)])
        with torch.no_grad():
            for name, weight in weights.items():
                for i in range(weight.numel()):
                    weight.view(-1)[i] *= (name, i) in active
    masking = masked(model, density=density, sparse_init=synflow(model, batch()[0], density, rounds=rounds))
    found = {(name, i) for name, mask in masking.masks.items() for i in mask.flatten().nonzero().flatten().tolist()}
    assert found == active


def test_synflow_keeps_weights_in_every_layer_of_a_very_sparse_network():
    # Tanaka et al. 2020, theorem 3: rounds do not collapse a layer while weights are left for each.
    model = mlp(100, 100, 100, 100, 10)
    density = 60 / 31_000
    masking = masked(model, density=density, sparse_init=synflow(model, torch.zeros(1, 100), density))
    assert min(masking.name2nonzeros.values()) > 1


def test_synflow_sees_the_logits_of_a_classifier():
    model = models.build("lenet300-100")
    scores = synflow(model, torch.zeros(2, 1, 28, 28), density=0.1)
    masking = masked(model, density=0.1, sparse_init=scores)
    totals = [scores[name].clamp(min=0).sum().item() for name in masking.masks]
    assert min(totals) > 0
    # Flow is conserved from layer to layer, up to the biases.
    assert max(totals) / min(totals) < 1.5


SCORES = {
    "snip": lambda model: snip(model, [batch()]),
    "grasp": lambda model: grasp(model, [batch()]),
    "synflow": lambda model: synflow(model, batch()[0], 0.3),
}


@pytest.mark.parametrize("score", SCORES)
def test_the_highest_scores_of_the_network_stay_and_the_model_is_as_it_was(score):
    model = network()
    before = copy.deepcopy(model.state_dict())
    scores = SCORES[score](model)
    assert same(before, model.state_dict())
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    masking = masked(model, density=0.3, sparse_init=scores)
    assert masking.total_nonzero == round(0.3 * 51)
    assert_masks_hold(masking)
    if all(masking.name2nonzeros.values()):
        active = torch.cat([scores[name][mask] for name, mask in masking.masks.items()])
        others = torch.cat([scores[name][~mask] for name, mask in masking.masks.items()])
        assert score == "synflow" or active.min() >= others.max()


def with_dropout():
    return nn.Sequential(network(), nn.Dropout(0.5), nn.Linear(3, 3).double())


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("score", SCORES)
def test_scores_leave_mode_gradients_statistics_and_random_numbers_as_they_were(score, mode):
    model = with_dropout().train(mode)
    model[0][1].train(not mode)
    modes = [module.training for module in model.modules()]
    F.cross_entropy(model(batch()[0]), batch()[1]).backward()
    before = copy.deepcopy(model.state_dict()), [parameter.grad.clone() for parameter in model.parameters()]
    torch.manual_seed(1)
    given = batch()
    state = torch.get_rng_state()
    for training in (True, False, None):
        settings = dict(training=training)
        if score == "synflow":
            synflow(model, given[0], 0.3, rounds=2, **settings)
        else:
            {"snip": snip, "grasp": grasp}[score](model, [given], **settings)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert same(before[0], model.state_dict())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before[1], strict=True))


@pytest.mark.parametrize("mode", [True, False])
def test_scores_are_those_of_the_authors_mode_whatever_that_of_the_model(mode):
    model, batches = network().train(mode), [batch(), batch()]
    model[1].running_mean.fill_(0.3)
    for found, training in ((snip(model, batches), False), (snip(model, batches, training=True), True)):
        assert_same_scores(found, snip_of(model, batches, training))
    for found, training in ((grasp(model, batches), True), (grasp(model, batches, training=False), False)):
        assert_same_scores(found, grasp_of(model, batches, training))
    assert_same_scores(snip(model, batches, training=None), snip_of(model, batches, mode))
    assert not torch.allclose(snip_of(model, batches, True)["0.weight"], snip_of(model, batches, False)["0.weight"])
    flow = synflow(model, batches[0][0], 0.3, rounds=2)
    assert same(flow, synflow(copy.deepcopy(model).train(not mode), batches[0][0], 0.3, rounds=2))
    assert not same(flow, synflow(model, batches[0][0], 0.3, rounds=2, training=True))


def assert_same_scores(found, expected):
    assert found.keys() == expected.keys()
    for name, score in found.items():
        torch.testing.assert_close(score, expected[name])


def test_an_empty_layer_gets_its_highest_score():
    model = mlp(3, 2, 2)
    scores = {"fc1.weight": torch.arange(6.0).view(2, 3) + 10, "fc2.weight": torch.tensor([[1.0, 3.0], [2.0, 0.0]])}
    masking = masked(model, density=0.4, sparse_init=scores)
    assert masking.masks["fc1.weight"].tolist() == [[False] * 3, [True] * 3]
    assert masking.masks["fc2.weight"].tolist() == [[False, True], [False, False]]


def test_a_compiled_model_is_scored():
    model = mlp(4, 3, 2)
    model.compile(backend="eager")
    scores = grasp(model, [(torch.randn(5, 4), torch.tensor([0, 1, 0, 1, 0]))])
    assert scores.keys() == {"fc1.weight", "fc2.weight"}


def test_scores_by_density_of_each_name():
    model = mlp(10, 20, 5)
    density = {"fc1": 0.1, "*": 0.5}
    for scores in (
        snip(model, [(torch.randn(8, 10), torch.arange(8) % 5)]),
        synflow(model, torch.ones(1, 10), density),
    ):
        masking = masked(copy.deepcopy(model), density=density, sparse_init=scores)
        assert masking.name2nonzeros == {"fc1.weight": 20, "fc2.weight": 50}


def test_scores_of_dense_layers_do_not_count():
    model = mlp(10, 20, 5)
    scores = synflow(model, torch.ones(1, 10), 0.1, dense=["last"])
    assert scores.keys() == {"fc1.weight"}
    snipped = copy.deepcopy(model)
    masking = masked(snipped, sparse_init=snip(model, [(torch.randn(8, 10), torch.arange(8) % 5)]), density=0.1)
    assert masking.total_nonzero == 30
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masking = Masking(optimizer, None)
    masking.add_module(model, 0.1, scores, dense=["last"])
    assert masking.name2nonzeros == {"fc1.weight": 20}


def test_add_module_scores_what_it_masks():
    model, inputs = mlp(10, 20, 20, 5), torch.randn(8, 10)

    def masks(scores, **given):
        copied = copy.deepcopy(model)
        masking = Masking(torch.optim.SGD(copied.parameters(), lr=0.1, momentum=0.9), None)
        masking.add_module(copied, 0.1, scores, dense=["fc2"], **given)
        return masking.masks

    found = masks("synflow", batches=[(inputs, torch.arange(8) % 5)])
    assert same(found, masks(synflow(model, inputs, 0.1, dense=["fc2.weight"])))
    assert not same(found, masks(synflow(model, inputs, 0.9, dense=["fc2.weight"])))
    assert not same(found, masks(synflow(model, inputs, 0.1)))


def test_masks_of_a_checkpoint_and_of_a_file(tmp_path):
    model = mlp(10, 20, 5)
    masking = masked(model, density=0.1)
    train(model, masking)
    checkpoint.save(tmp_path / "c.pt", model=model, mask=masking)
    torch.save(masking.masks, tmp_path / "masks.pt")
    for path in ("c.pt", "masks.pt"):
        other = masked(mlp(10, 20, 5), density=0.9, sparse_init=load_masks(tmp_path / path))
        assert same(other.masks, masking.masks)
        assert other.total_nonzero == 30
        assert_masks_hold(other)


def test_a_file_without_masks_is_refused(tmp_path):
    torch.save(mlp(3, 2).state_dict(), tmp_path / "model.pt")
    with pytest.raises(
        checkpoint.CheckpointError, match=r"model\.pt holds no masks. Expected a checkpoint of a sparse"
    ):
        load_masks(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint nowhere"):
        load_masks("nowhere")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"fc1.weight": torch.ones(20, 10)}, r"scores do not fit: fc2\.weight is absent in sparse_init and \(5, 20\)"),
        (
            {"fc1.weight": torch.ones(2, 2).bool(), "fc2.weight": torch.ones(5, 20).bool(), "x": torch.ones(1).bool()},
            r"masks do not fit: fc1\.weight is \(2, 2\) in sparse_init and \(20, 10\) here; x is \(1,\) in sparse_init",
        ),
        ({"fc1.weight": torch.ones(20, 10), "fc2.weight": torch.ones(5, 20).bool()}, "got both kinds"),
        ({}, "scores do not fit"),
    ],
)
def test_scores_and_masks_of_another_model_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        masked(mlp(10, 20, 5), sparse_init=given)


def test_a_second_module_takes_scores_by_its_own_names():
    first, second = mlp(4, 3), mlp(4, 3)
    optimizer = torch.optim.SGD([*first.parameters(), *second.parameters()], lr=0.1, momentum=0.9)
    masking = masked(first, optimizer)
    masking.add_module(second, 0.25, sparse_init={"fc1.weight": torch.arange(12.0).view(3, 4)})
    assert masking.masks["1.fc1.weight"].sum(1).tolist() == [0, 0, 3]


def test_nothing_is_nan():
    model = network()
    for score in SCORES.values():
        assert all(math.isfinite(tensor.sum()) for tensor in score(model).values())


def score_in_two_processes():
    rank = torch.distributed.get_rank()
    model = mlp(20, 30, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    found = []
    for i in range(6):
        batch = torch.randn(4, 20, generator=torch.Generator().manual_seed(10 * i + rank)), torch.arange(4)
        masking = Masking(optimizer, None, growth_mode="random", redistribution_mode="none")
        masking.add_module(model, 0.3, "snip", pattern="fan-in", batches=[batch])
        found.append(([layer.pattern.most for layer in masking.layers], masking.name2nonzeros))
        masking.remove_weight_partial_name("")
    return found


def test_scores_of_the_first_process_decide_how_many_inputs_a_neuron_has():
    first, second = run(score_in_two_processes, 2)
    assert first == second


@pytest.mark.parametrize("score", SCORES)
def test_what_is_masked_by_name_has_scores_too(score):
    model = network()
    model.register_parameter("mixing", nn.Parameter(torch.ones(3, 3, dtype=torch.float64)))
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None)
    masking.add_module(model, 0.5, score, batches=[batch()], sparse=["mixing"])
    assert "mixing" in masking.masks
    assert masking.total_nonzero == round(0.5 * (18 + 24 + 9 + 9))


@pytest.mark.parametrize("score", ["snip", "grasp"])
def test_embeddings_that_are_masked_have_scores_too(score):
    model = nn.Sequential(nn.Embedding(8, 4), nn.Flatten(), nn.Linear(12, 5))
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None)
    batches = [(torch.arange(6).reshape(2, 3), torch.zeros(2, dtype=torch.long))]
    masking.add_module(model, 0.5, score, batches=batches, sparse_embeddings=True)
    assert list(masking.masks) == ["0.weight", "2.weight"]
