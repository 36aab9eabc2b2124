"""Optimizers that keep a second copy of the weights, and what wraps an optimizer and writes weights itself."""

import copy
import pickle

import pytest
import torch
from helpers import assert_masks_hold, backward, batch_for, masked, mlp, same, sgd, snapshot, train
from torch import nn

from sparselearning import Masking
from sparselearning.sparse import available
from sparselearning.weights.optimizer import torch_optimizer

STATIC = dict(growth_mode="random", redistribution_mode="none")
external = pytest.mark.filterwarnings("ignore")


class SAM(torch.optim.Optimizer):
    """As the one that most use (davda54/sam): a pass at the highest point near the weights, and a step from there."""

    def __init__(self, params, base_optimizer, rho=0.5, **settings):
        super().__init__(params, dict(rho=rho, **settings))
        self.base_optimizer = base_optimizer(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self, zero_grad=False):
        weights = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.cat([p.grad.flatten() for p in weights]).norm()
        for p in weights:
            self.state[p]["old_p"] = p.data.clone()
            p.add_(p.grad * (self.param_groups[0]["rho"] / norm))
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def second_step(self, zero_grad=False):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()
        if zero_grad:
            self.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        self.first_step(zero_grad=True)
        torch.enable_grad()(closure)()
        self.second_step()


class Ascending:
    """A wrapper that is no Optimizer: `ascent_step`, `descent_step` (SamsungLabs/ASAM)."""

    def __init__(self, optimizer, model, rho=0.5):
        self.optimizer, self.model, self.rho = optimizer, model, rho

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    @torch.no_grad()
    def ascent_step(self):
        self.old = [p.clone() for p in self.model.parameters()]
        for p in self.model.parameters():
            p.add_(p.grad, alpha=self.rho)
        self.optimizer.zero_grad()

    @torch.no_grad()
    def descent_step(self):
        for p, old in zip(self.model.parameters(), self.old, strict=True):
            p.copy_(old)
        self.optimizer.step()
        self.optimizer.zero_grad()


class Lookahead:
    """Slow weights in a list of lists, made before there are masks; every second step they come to the fast ones."""

    def __init__(self, inner, k=2, alpha=0.5):
        self.inner, self.k, self.alpha, self.count = inner, k, alpha, 0
        self.slow_weights = [[p.clone().detach() for p in group["params"]] for group in inner.param_groups]

    @property
    def param_groups(self):
        return self.inner.param_groups

    def zero_grad(self):
        self.inner.zero_grad()

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % self.k == 0:
            for group, slow in zip(self.param_groups, self.slow_weights, strict=True):
                for p, q in zip(group["params"], slow, strict=True):
                    q.add_(p - q, alpha=self.alpha)
                    p.copy_(q)
        return loss


def sam(model, **settings):
    return SAM(model.parameters(), torch.optim.SGD, lr=0.05, momentum=0.9, **settings)


# Sharpness-aware minimisation


def held_in_passes(model, masking):
    """Return a list that every forward pass extends by whether the masks held in it."""
    seen = []
    model.register_forward_pre_hook(
        lambda *_: seen.append(all(not layer.weight[~layer.mask].any() for layer in masking.layers))
    )
    return seen


@pytest.mark.parametrize("with_closure", [False, True])
@pytest.mark.parametrize("weights", ["zero", "sparse"])
def test_sam_perturbs_the_masked_network(weights, with_closure):
    if weights == "sparse" and not available():
        pytest.skip("built without sparse kernels")
    model = mlp(20, 30, 10)
    optimizer = sam(model)
    masking = masked(model, optimizer, weights=weights)
    assert masking.optimizer is optimizer.base_optimizer
    before, seen = snapshot(masking), held_in_passes(model, masking)
    for _ in range(4):
        backward(model)
        if with_closure:
            optimizer.step(lambda: backward(model))
        else:
            optimizer.first_step(zero_grad=True)
            backward(model)
            optimizer.second_step(zero_grad=True)
    assert seen == [True] * 8
    assert masking.steps == 4
    masking.at_end_of_epoch()
    assert not same(before, masking.masks)
    masking.check()


def test_sam_does_what_it_does_on_the_active_weights_alone():
    model = mlp(20, 30, 10)
    twin = copy.deepcopy(model)
    optimizer, other = sam(model), sam(twin)
    masking = masked(model, optimizer)
    inputs = torch.randn(8, 20)
    weights = dict(twin.named_parameters())

    @torch.no_grad()
    def mask_by_hand(part):
        for name, mask in masking.masks.items():
            part(weights[name]).mul_(mask)

    mask_by_hand(lambda weight: weight)
    for _ in range(3):
        backward(model, inputs)
        optimizer.first_step(zero_grad=True)
        backward(model, inputs)
        optimizer.second_step(zero_grad=True)
        for step in (other.first_step, other.second_step):
            backward(twin, inputs)
            mask_by_hand(lambda weight: weight.grad)
            step(zero_grad=True)
    for one, two in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one, two)


def test_a_wrapper_that_ascends_and_is_no_optimizer_perturbs_the_masked_network():
    model = mlp(20, 30, 10)
    wrapper = Ascending(sgd(model), model)
    masking = masked(model, wrapper)
    seen = held_in_passes(model, masking)
    for _ in range(3):
        backward(model)
        wrapper.ascent_step()
        backward(model)
        wrapper.descent_step()
    assert seen == [True] * 6
    masking.at_end_of_epoch()
    masking.check()


@pytest.mark.parametrize("weights", ["kept", "soft"])
def test_perturbing_weights_that_keep_their_values_is_refused(weights):
    model = mlp(20, 30, 10)
    with pytest.raises(ValueError, match=rf"weights='{weights}' takes .* SAM\.first_step writes perturbed ones\. Use"):
        masked(model, sam(model), weights=weights)


# Copies of the weights that optimizers keep


def schedule_free(name, parameters):
    optimizer = getattr(pytest.importorskip("schedulefree"), name)(parameters, lr=0.05)
    optimizer.train()
    return optimizer


def wrapped_schedule_free(parameters):
    optimizer = pytest.importorskip("schedulefree").ScheduleFreeWrapper(torch.optim.SGD(parameters, lr=0.1))
    optimizer.train()
    return optimizer


def lookahead_of_timm(parameters):
    optim = pytest.importorskip("timm.optim")
    return optim.Lookahead(torch.optim.SGD(parameters, lr=0.1, momentum=0.9), k=2)


COPYING = {
    "ASGD": (lambda p: torch.optim.ASGD(p, lr=0.1, t0=2), "ax"),
    "SGDScheduleFree": (lambda p: schedule_free("SGDScheduleFree", p), "z"),
    "AdamWScheduleFree": (lambda p: schedule_free("AdamWScheduleFree", p), "z"),
    "RAdamScheduleFree": (lambda p: schedule_free("RAdamScheduleFree", p), "z"),
    "ScheduleFreeWrapper": (wrapped_schedule_free, "z"),
    "Lookahead of timm": (lookahead_of_timm, "lookahead_slow_buff"),
    "Lookahead": (lambda p: Lookahead(torch.optim.SGD(p, lr=0.1, momentum=0.9)), "Lookahead.slow_weights"),
}


@external
@pytest.mark.parametrize("name", COPYING)
@pytest.mark.parametrize("how", ["masking", "optimizer"])
def test_a_copy_that_an_optimizer_keeps_is_masked(name, how):
    make, key = COPYING[name]
    model = mlp(20, 30, 10)
    optimizer = make(list(model.parameters()))
    masking = masked(model, optimizer, **STATIC)
    for _ in range(3):
        train(model, masking if how == "masking" else optimizer, 4)
        assert_masks_hold(masking)
        for layer in masking.layers:
            copies = dict(masking.held.copies.of(layer.master, layer.mask))
            assert copies.keys() == {key}
            assert not copies[key][~layer.mask].any()
            assert copies[key][layer.mask].any()
        if hasattr(optimizer, "eval"):
            optimizer.eval()
            masking.check()
            optimizer.train()
        masking.at_end_of_epoch()
        masking.check()
    assert masking.steps == 12


class Averaging(torch.optim.SGD):
    """Keeps an average of the weights under a name that nobody knows."""

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        for weight in self.param_groups[0]["params"]:
            self.state[weight].setdefault("polyak", weight.clone()).lerp_(weight, 0.1)


def test_a_copy_of_an_unknown_name_is_found_by_its_values():
    model = mlp(20, 30, 10)
    masking = masked(model, Averaging(model.parameters(), lr=0.01, momentum=0.9))
    for _ in range(3):
        train(model, masking, 2)
        masking.at_end_of_epoch()
    for layer in masking.layers:
        state = masking.optimizer.state[layer.weight]
        assert not state["polyak"][~layer.mask].any()
        assert state["momentum_buffer"][~layer.mask].any(), "growth reads the momentum of inactive weights"


@external
@pytest.mark.parametrize("name", ["ASGD", "AdamWScheduleFree", "Lookahead"])
@pytest.mark.parametrize("weights", ["kept", "soft"])
def test_a_copy_beside_weights_that_keep_their_values_is_refused(name, weights):
    make, key = COPYING[name]
    model = mlp(20, 30, 10)
    optimizer = make(list(model.parameters()))
    with pytest.raises(RuntimeError, match=rf"{name} keeps a copy of the weights of its own, '{key}', which is dense"):
        train(model, masked(model, optimizer, weights=weights, **STATIC), 1)


@external
@pytest.mark.parametrize("name", ["SGDScheduleFree", "AdamWScheduleFree"])
def test_an_optimizer_that_keeps_no_momentum_after_all_is_an_error_after_the_first_step(name):
    model = mlp(20, 30, 10)
    masking = masked(model, schedule_free(name, list(model.parameters())))
    backward(model)
    with pytest.raises(RuntimeError, match=f"{name} holds no momentum for a weight of shape"):
        masking.step()


class Nameless(torch.optim.Optimizer):
    """Promises a momentum in its settings, and keeps none in its state."""

    def __init__(self, parameters, lr=0.1):
        super().__init__(parameters, dict(lr=lr, momentum=0.9))

    @torch.no_grad()
    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            weight.sub_(weight.grad, alpha=self.param_groups[0]["lr"])


def test_a_stepped_weight_without_state_is_an_error_after_the_first_step():
    model = mlp(20, 30, 10)
    masking = masked(model, Nameless(model.parameters()))
    backward(model)
    with pytest.raises(RuntimeError, match=r"Nameless holds no momentum for a weight of shape \(30, 20\)"):
        masking.step()
    train(model, masked(model, masking.optimizer, **STATIC), 2)


# Wrappers


class Holder:
    """Holds an optimizer under a name of its own."""

    def __init__(self, name, optimizer):
        setattr(self, name, optimizer)

    @property
    def inner(self):
        return next(value for value in vars(self).values() if hasattr(value, "step"))

    def step(self, closure=None):
        return self.inner.step(closure)


@pytest.mark.parametrize("name", ["optimizer", "base_optimizer", "optim", "_base", "anything"])
def test_an_optimizer_is_found_under_any_attribute(name):
    model = mlp(20, 30, 10)
    inner = sgd(model)
    assert torch_optimizer(Holder(name, inner)) is inner
    masking = masked(model, Holder(name, inner))
    train(model, masking, 2)
    assert masking.steps == 2
    masking.at_end_of_epoch()
    masking.check()


def test_an_optimizer_that_holds_one_for_other_parameters_is_not_a_wrapper():
    model = mlp(20, 30, 10)
    outer = torch.optim.SGD([*model.fc1.parameters(), *model.fc2.parameters()], lr=0.1, momentum=0.9)
    outer.of_biases = torch.optim.Adam([model.fc1.bias, model.fc2.bias])
    assert torch_optimizer(outer) is outer


def test_a_wrapper_of_several_optimizers_is_refused_with_what_to_do():
    model = mlp(20, 30, 10)
    several = Holder("optimizers", [sgd(model.fc1), torch.optim.AdamW(model.fc2.parameters())])
    with pytest.raises(TypeError, match=r"got Holder\. It holds SGD, AdamW: make one Masking for each"):
        Masking(several, None)


def test_sharded_states_of_one_process_are_found(tmp_path):
    zero = pytest.importorskip("torch.distributed.optim").ZeroRedundancyOptimizer
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = mlp(20, 30, 10)
        optimizer = zero(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9)
        masking = masked(model, optimizer)
        before = snapshot(masking)
        train(model, optimizer, 2)
        masking.at_end_of_epoch()
        assert masking.steps == 2
        assert not same(before, masking.masks)
        masking.check()
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_watched_wrapper_takes_an_lr_scheduler(when):
    model = mlp(20, 30, 10)
    optimizer = sam(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1) if when == "before" else None
    masking = masked(model, optimizer)
    scheduler = scheduler or torch.optim.lr_scheduler.StepLR(optimizer, 1)
    for _ in range(2):
        backward(model)
        optimizer.step(lambda: backward(model))
        scheduler.step()
    assert masking.param_groups[0]["lr"] == pytest.approx(0.0005)
    assert_masks_hold(masking)
    masking.release()
    assert "first_step" not in vars(optimizer)


def through_pickle(objects):
    return pickle.loads(pickle.dumps(objects))


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_a_copy_of_a_watched_wrapper_masks_the_copied_model(copied):
    model = mlp(20, 30, 10)
    wrapper = Lookahead(sgd(model))
    masking = masked(model, wrapper)
    train(model, wrapper, 1)
    before = [parameter.clone() for parameter in model.parameters()]
    twin, other, second = copied((model, wrapper, masking))
    train(twin, other, 3)
    assert_masks_hold(second)
    assert (masking.steps, second.steps) == (1, 4)
    assert all(map(torch.equal, before, model.parameters()))
    assert not torch.equal(twin.fc1.weight, model.fc1.weight)


def test_a_wrapper_that_hands_on_its_closure_pulls_once():
    from sparselearning.weights.zeros import Zeros

    def trained(wrap):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(20, 10))
        optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1))
        masking = masked(model, optimizer, weights=Zeros(pull=0.1), **STATIC)
        inputs = batch_for(model)
        masking.step(lambda: backward(model, inputs))
        return model[0].weight

    assert torch.equal(trained(lambda optimizer: optimizer), trained(lambda optimizer: Holder("base", optimizer)))
