"""Training on sparse kernels is masked training, with growth scored by gradients of the last steps."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sparselearning import invariants
from sparselearning.core import CosineDecay, Masking
from sparselearning.schedules import Updates
from sparselearning.sparse import available, convert, to_dense
from sparselearning.sparse.batch_last import trained_to_dense
from sparselearning.sparse.observed import SAMPLE, Before, Change, Observed, Pass, change_between
from sparselearning.sparse.observing import WINDOW
from sparselearning.sparse.trained import TrainedLinear
from sparselearning.sparse.trained_conv import TrainedConv2d
from sparselearning.sparse.training import SparseTraining

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),  # before a norm a bias has no gradient but rounding
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 4, 10),
    )


def masked(weights, optimizer="sgd", **kwargs):
    torch.manual_seed(0)
    model = network()
    if optimizer == "sgd":
        stepper = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    else:
        stepper = torch.optim.AdamW(model.parameters(), lr=0.01)
    masking = Masking(stepper, CosineDecay(0.5, 1000), weights=weights, **kwargs)
    masking.add_module(model, density=0.3)
    return model, stepper, masking


def train(model, stepper, masking, steps, batch=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(steps):
        x, target = torch.randn(batch, 3, 8, 8, generator=generator), torch.randint(10, (batch,), generator=generator)
        stepper.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        masking.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("batch", [4, 32])
def test_between_updates_it_is_masked_training(batch, optimizer):
    exact, sparse = masked("zero", optimizer), masked("sparse", optimizer)
    losses = [train(*run, steps=8, batch=batch) for run in (exact, sparse)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)
    state = exact[0].state_dict()
    assert state.keys() == sparse[0].state_dict().keys()
    for name, tensor in sparse[0].state_dict().items():
        torch.testing.assert_close(tensor, state[name], atol=1e-4, rtol=1e-3)


def test_layers_and_optimizer_hold_active_weights_only():
    model, stepper, masking = masked("sparse")
    train(model, stepper, masking, 2)
    assert [type(model[i]) for i in (0, 4, 7)] == [TrainedConv2d, TrainedConv2d, TrainedLinear]
    for index, layer in zip((0, 4, 7), masking.layers, strict=True):
        value = model[index].value
        assert len(value) == layer.nonzeros
        assert stepper.state[value]["momentum_buffer"].shape == value.shape
        assert model[index].weight not in stepper.state
    invariants.check(masking)


@pytest.mark.parametrize("growth", ["momentum", "random", "momentum_neuron", "global_momentum"])
def test_updates_conserve_weights_and_carry_state(growth):
    model, stepper, masking = masked("sparse", growth_mode=growth)
    train(model, stepper, masking, 12)
    momenta = {layer.name: masking.get_momentum_for_weight(layer.weight).clone() for layer in masking.layers}
    before = {layer.name: (layer.mask.clone(), momenta[layer.name]) for layer in masking.layers}
    weights = {layer.name: layer.weight.clone() for layer in masking.layers}
    observed = {name: module.observed.mean() for name, module in masking.held.trained.items() if module.observed.steps}
    total = masking.total_nonzero
    masking.at_end_of_epoch()
    assert masking.total_nonzero == total
    invariants.check(masking)
    for layer in masking.layers:
        old, momentum = before[layer.name]
        assert not torch.equal(layer.mask, old)
        kept, grown = layer.mask & old, layer.mask & ~old
        now = masking.get_momentum_for_weight(layer.weight)
        assert torch.equal(now[kept], momentum[kept])
        start = (
            10 * observed[layer.name][grown] if observed else torch.zeros(int(grown.sum()))
        )  # the gain of momentum 0.9
        torch.testing.assert_close(now[grown], start)
        assert torch.equal(layer.weight[kept], weights[layer.name][kept])
        assert layer.weight[grown].eq(0).all()
    assert train(model, stepper, masking, 5)[-1] < 10


def test_layers_grow_and_shrink_while_the_last_loss_is_held():
    model, stepper, masking = masked("sparse", prune_every_k_steps=3)  # momentum moves weights from layer to layer
    sizes = [layer.nonzeros for layer in masking.layers]
    train(model, stepper, masking, 10)
    assert [layer.nonzeros for layer in masking.layers] != sizes


def test_inactive_weights_are_scored_by_the_mean_of_observed_gradients():
    model, stepper, masking = masked("sparse", prune_every_k_steps=3)  # all three steps lie in the window
    for module in masking.held.trained.values():
        module.observed.observing = True
    train(model, stepper, masking, 2)
    exact, exact_stepper, exact_mask = masked("zero")
    sums = [torch.zeros_like(layer.weight) for layer in exact_mask.layers]
    for step in range(2):
        # The same batches, one at a time, to look at the gradients in between.
        generator = torch.Generator().manual_seed(1)
        batches = [
            (torch.randn(32, 3, 8, 8, generator=generator), torch.randint(10, (32,), generator=generator))
            for _ in range(2)
        ]
        exact_stepper.zero_grad()
        F.cross_entropy(exact(batches[step][0]), batches[step][1]).backward()
        for total, layer in zip(sums, exact_mask.layers, strict=True):
            total += layer.weight.grad
        exact_mask.step()
    for total, layer in zip(sums, masking.layers, strict=True):
        score = masking.get_momentum_for_weight(layer.weight)
        torch.testing.assert_close(score[~layer.mask], (total / 2)[~layer.mask], atol=1e-4, rtol=1e-3)


def test_dense_gradients_are_taken_just_before_updates_only():
    model, stepper, masking = masked("sparse")
    observed = []
    model[0].register_forward_hook(lambda module, *_: observed.append(module.observed.observing))
    train(model, stepper, masking, 30)
    assert sum(observed) == 3  # the distance between updates is not known yet
    masking.at_end_of_epoch()
    observed.clear()
    train(model, stepper, masking, 30)
    assert observed == [False] * (30 - WINDOW) + [True] * WINDOW


def test_where_an_epoch_is_known_only_its_last_steps_are_observed():
    model, stepper, masking = masked("sparse")
    masking.held.expect(50)
    observed = []
    model[0].register_forward_hook(lambda module, *_: observed.append(module.observed.observing))
    train(model, stepper, masking, 100)  # no update comes after the first 50
    assert observed == ([False] * (50 - WINDOW) + [True] * WINDOW) * 2


@pytest.mark.parametrize("updates", [Updates(every=30, last=60), Updates(last=60)])
def test_after_the_last_update_no_dense_gradient_is_observed(updates):
    model, stepper, masking = masked("sparse", updates=updates)
    train(model, stepper, masking, 60)
    observed = []
    model[0].register_forward_hook(lambda module, *_: observed.append(module.observed.observing))
    for _ in range(2):
        train(model, stepper, masking, 30)
        masking.at_end_of_epoch()
    assert not any(observed)


@pytest.mark.parametrize("every", [0, 1, 2, WINDOW + 1])
def test_there_is_a_gradient_before_the_first_update(every):
    modes = dict(growth_mode="gradient", redistribution_mode="none")
    model, stepper, masking = masked("sparse", prune_every_k_steps=every, **modes)
    before = [layer.mask.clone() for layer in masking.layers]
    train(model, stepper, masking, every or 1)
    masking.at_end_of_epoch()
    assert not any(torch.equal(layer.mask, old) for layer, old in zip(masking.layers, before, strict=True))


@pytest.mark.parametrize("stop", [3, 12, 17, 29])  # nothing seen yet; after an update; before one; in between
@pytest.mark.parametrize("every", [0, 12])
def test_resumed_training_is_the_uninterrupted_one(every, stop):
    def go(run, first, last):
        for step in range(first, last):
            losses.extend(train(*run, 1, seed=step))
            if not every and step % 12 == 11:
                run[2].at_end_of_epoch()

    losses = []
    whole = masked("sparse", prune_every_k_steps=every)
    go(whole, 0, stop)
    saved = copy.deepcopy([part.state_dict() for part in whole])
    losses.clear()
    go(whole, stop, 40)
    expected = losses.copy()
    again = masked("sparse", prune_every_k_steps=every)
    train(*again, 15)  # leaves gradients of its own
    for part, state in zip(again, saved, strict=True):
        part.load_state_dict(state)
    losses.clear()
    go(again, stop, 40)
    assert losses == expected
    for one, other in zip(whole[2].layers, again[2].layers, strict=True):
        assert torch.equal(one.mask, other.mask)


def test_a_state_without_gradients_seen_has_seen_none():
    model, stepper, masking = masked("sparse")
    train(model, stepper, masking, 12)
    state = masking.state_dict()
    del state["sparse_training"]  # saved before version 2.0 was complete, or by a Masking without sparse kernels
    masking.load_state_dict(state)
    with pytest.raises(RuntimeError, match="No gradient was observed since the last update"):
        masking.get_gradient_for_weight(masking.layers[0].weight)


def test_a_removed_weight_trains_densely_with_its_state():
    model, stepper, masking = masked("sparse")
    train(model, stepper, masking, 3)
    momentum = masking.get_momentum_for_weight(masking.layers[0].weight) * masking.layers[0].mask
    masking.remove_weight("0")
    assert type(model[0]) is nn.Conv2d
    assert torch.equal(stepper.state[model[0].weight]["momentum_buffer"], momentum)
    train(model, stepper, masking, 2)
    assert model[0].weight.count_nonzero() == model[0].weight.numel()
    masking.remove_weight_partial_name("")
    assert [type(module) for module in model] == [type(module) for module in network()]


def test_a_trained_model_turns_dense_and_converts():
    model, stepper, masking = masked("sparse")
    train(model, stepper, masking, 3)
    model.eval()
    x = torch.randn(16, 3, 8, 8)
    dense = to_dense(model)
    assert [type(module) for module in dense] == [type(module) for module in network()]
    assert all(weight.requires_grad for weight in dense.parameters())
    torch.testing.assert_close(dense(x), model(x), atol=1e-5, rtol=1e-4)
    converted, report = convert(model, x)
    assert [layer.name for layer in report.layers] == ["0", "4", "7"]
    torch.testing.assert_close(converted(x), model(x), atol=1e-5, rtol=1e-4)
    assert type(model[0]) is TrainedConv2d


def test_layers_without_kernels_stay_masked():
    model = nn.Sequential(nn.ConvTranspose1d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 10, 5))
    stepper = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masking = Masking(stepper, None, weights="sparse")
    masking.add_module(model, density=0.5)
    for _ in range(2):
        model(torch.randn(4, 3, 8)).square().sum().backward()
        masking.step()
    assert type(model[0]) is nn.ConvTranspose1d
    assert type(model[2]) is TrainedLinear
    invariants.check(masking)


def test_a_deep_copy_trains_on_its_own():
    model, stepper, masking = masked("sparse")
    train(model, stepper, masking, 3)
    copied = copy.deepcopy((model, stepper, masking))
    weights = copy.deepcopy(model.state_dict())
    expected = train(*copied, steps=4)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert train(model, stepper, masking, 4) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (dict(growth_mode="random", redistribution_mode="none"), 0),
        (dict(growth_mode="gradient", redistribution_mode="none"), 1),
        (dict(growth_mode="momentum"), WINDOW),
        (dict(growth_mode="gradient", redistribution_mode="none", prune_mode="magnitude_gradient"), 1),
    ],
)
def test_as_many_dense_gradients_are_observed_as_the_functions_read(settings, expected):
    model, stepper, masking = masked("sparse", prune_every_k_steps=30, **settings)
    observed = []
    model[0].register_forward_hook(lambda module, *_: observed.append(module.observed.observing))
    train(model, stepper, masking, 30)
    assert observed == [False] * (30 - expected) + [True] * expected


def test_growth_by_gradient_reads_that_of_the_last_step():
    """Also where updates come at the end of epochs, and many steps are observed lest one comes early."""
    model, stepper, masking = masked("sparse", growth_mode="gradient", redistribution_mode="none")
    for steps in (30, 30):
        train(model, stepper, masking, steps)
        masking.at_end_of_epoch()
    train(model, stepper, masking, 29)
    exact = nn.Sequential(*copy.deepcopy(list(model)))
    trained_to_dense(exact)
    train(model, stepper, masking, 1, seed=5)
    generator = torch.Generator().manual_seed(5)
    x, target = torch.randn(32, 3, 8, 8, generator=generator), torch.randint(10, (32,), generator=generator)
    F.cross_entropy(exact(x), target).backward()
    gradient = masking.get_gradient_for_weight(masking.layers[0].weight)
    torch.testing.assert_close(gradient, exact[0].weight.grad, rtol=1e-4, atol=1e-6)


def test_an_object_holds_the_weights_of_one_masking():
    held = SparseTraining(reset_state=True)
    stepper = masked(held)[1]
    with pytest.raises(ValueError, match="holds the weights of another Masking"):
        Masking(stepper, None, weights=held)


def test_a_momentum_that_never_decays_starts_at_zero():
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=1.0)
    masking = Masking(optimizer, None, weights="sparse")
    masking.add_module(model, density=0.3)
    before = {layer.name: layer.mask.clone() for layer in masking.layers}
    train(model, optimizer, masking, 3)
    masking.at_end_of_epoch()
    masking.check()
    layer = masking.layers[0]
    grown = layer.mask & ~before[layer.name]
    assert grown.any()
    assert not masking.get_momentum_for_weight(layer.weight)[grown].any()


def test_of_many_observed_gradients_the_early_ones_fade():
    model, *_ = masked("sparse")
    module, observed = model[7], Observed(WINDOW, observing=True)
    for step in range(4 * WINDOW):
        observed.pending = [Pass(dense=torch.full((10, 32), float(step < WINDOW)))]
        module.value.grad = torch.full_like(module.value, float(step < WINDOW))
        observed.before = Before.of(module.value.grad)
        observed.count(observed.take(module))
    assert observed.steps == WINDOW
    assert 0 < observed.mean().max() < 0.1


@pytest.mark.parametrize("entries", [100, 5 * SAMPLE])
def test_what_became_of_a_gradient_is_told_from_some_of_its_entries(entries):
    gradient = torch.randn(entries).clamp_(-3, 3)
    before = Before.of(gradient)
    assert len(before.some) <= 2 * SAMPLE
    assert change_between(before, gradient.clone()) == Change()
    assert change_between(before, gradient * 0.25).factor == pytest.approx(0.25)
    assert change_between(before, gradient.clamp(-0.5, 0.5)) == Change(bound=0.5)
    gradient[1] = 5  # of a long gradient, not among the entries that are kept
    assert change_between(Before.of(gradient), gradient.clamp(-4, 4)) == Change(bound=4)
    gradient[1] = torch.nan
    assert change_between(before, gradient) is None


def in_format(memory_format, when):
    """Return losses and weights of a training with a convolution's weights in another memory format."""
    torch.manual_seed(0)
    model = network()
    if when == "before":
        model = model.to(memory_format=memory_format)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    masking = Masking(optimizer, None, weights="sparse", prune_every_k_steps=5)
    masking.add_module(model, density=0.3)
    if when == "after":
        model.to(memory_format=memory_format)
    losses = train(model, optimizer, masking, 12)
    masking.check()
    active = {layer.name: layer.weight[layer.mask] for layer in masking.layers}
    masking.remove_weight_partial_name("")
    losses += train(model, optimizer, optimizer, 2)
    return losses, active, model


@pytest.mark.parametrize("when", ["before", "after"])
def test_weights_in_channels_last_train_as_contiguous_ones(when):
    expected, weights, _ = in_format(torch.contiguous_format, when)
    losses, active, model = in_format(torch.channels_last, when)
    assert not model[0].weight.is_contiguous()
    assert losses == pytest.approx(expected, rel=1e-4)
    for name in weights:
        torch.testing.assert_close(active[name], weights[name], rtol=1e-3, atol=1e-5)


def test_layers_without_kernels_are_named_at_once(caplog):
    model = nn.ModuleDict(dict(fc=nn.Linear(4, 4), up=nn.ConvTranspose2d(2, 2, 3)))
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None, weights="sparse")
    masking.add_module(model, density=0.5)
    assert "1 of 2 layers train on sparse kernels; masked on dense kernels: up.weight" in caplog.text
    assert "sparse kernels" in masking.summary()
    assert "masked: it belongs to a ConvTranspose2d" in masking.summary()


def test_no_layer_with_kernels_is_an_error_that_changes_nothing():
    model = nn.ConvTranspose2d(2, 2, 3)
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None, weights="sparse")
    with pytest.raises(ValueError, match="has none that could: it belongs to a ConvTranspose2d"):
        masking.add_module(model, density=0.5)
    assert (masking.layers, masking.modules, (model.weight == 0).sum()) == ([], [], 0)
