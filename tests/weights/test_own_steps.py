"""Adam with a time step for each weight; tests/oracles/smet.py says what it is, and test_papers.py compares the two."""

import copy

import pytest
import torch
from by_method import begin, go_on
from helpers import assert_masks_hold, masked, mlp, sgd, train
from launch import run
from script import assert_equal
from torch import nn

from sparselearning import Masking
from sparselearning.sparse import available
from sparselearning.sparse.training import SparseTraining
from sparselearning.weights.dense_copy import DenseCopy
from sparselearning.weights.zeros import Zeros

RANDOM = dict(growth_mode="random", redistribution_mode="none")
KINDS = ["zero", pytest.param("sparse", marks=pytest.mark.skipif(not available(), reason="without sparse kernels"))]
LATE = 100_000


def late(held, density=0.5, kind=torch.optim.Adam, **settings):
    """A layer of 4 x 5 in step 100,000 of Adam, and its Masking, right after an update; and which weights grew."""
    torch.manual_seed(0)
    model = nn.Linear(5, 4, bias=False)
    optimizer = kind(model.parameters(), lr=1e-3, **settings)
    masking = masked(model, optimizer, density, weights=held, **RANDOM)
    state = dict(step=torch.tensor(float(LATE)), exp_avg=torch.full((4, 5), 0.1), exp_avg_sq=torch.ones(4, 5))
    optimizer.state[model.weight] = state | ({"max_exp_avg_sq": torch.ones(4, 5)} if settings.get("amsgrad") else {})
    before = masking.masks["weight"].clone()
    masking.at_end_of_epoch()
    grown = masking.masks["weight"] & ~before
    assert grown.any()
    return model, optimizer, masking, grown


def taken(model, optimizer, grown, steps, gradient=1.0):
    """The steps over the learning rate that regrown weights, and others that are active, make."""
    found, others = [], model.weight.detach() != 0
    for _ in range(steps):
        old = model.weight.detach().clone()
        model.weight.grad = torch.full_like(model.weight, gradient)
        optimizer.step()
        moved = (old - model.weight.detach()) / 1e-3
        found.append((moved[grown].mean().item(), moved[others & ~grown].mean().item()))
        assert moved[grown].std() < 1e-4
    return found


@pytest.mark.parametrize(
    ("settings", "expected"),
    [  # of equal gradients each step is the learning rate; with the optimizer's count it would be 3.16, 4.25, ...
        (dict(reset_state=True), [3.16, 4.25, 4.95, 5.44]),
        (dict(reset_state="restart"), [1, 1, 1, 1]),
        (dict(reset_state="restart", regrown_warm_up=4), [0.25, 0.5, 0.75, 1]),
        (dict(reset_state="restart", regrown_warm_up=2, lr_by_density=True), [1, 2, 2, 2]),  # 1 / sqrt(0.25) = 2
        (dict(reset_state=True, regrown_warm_up=2), [1.58, 4.25, 4.95, 5.44]),
    ],
)
def test_the_first_steps_of_a_regrown_weight_are_as_long_as_is_said(settings, expected):
    model, optimizer, _, grown = late(Zeros(**settings), density=0.25 if "lr_by_density" in settings else 0.5)
    steps = [own for own, _ in taken(model, optimizer, grown, 4)]
    assert steps == pytest.approx(expected, abs=0.01)


def test_the_density_lengthens_all_steps_of_a_layer():
    model, optimizer, _, grown = late(Zeros(lr_by_density=True), density=0.25)
    others = [other for _, other in taken(model, optimizer, grown, 2)]
    plain, optimizer, _, grown = late(Zeros(), density=0.25)
    assert others == pytest.approx([2 * other for _, other in taken(plain, optimizer, grown, 2)], rel=1e-3)


def test_decay_of_adamw_follows_the_learning_rate_of_a_weight():
    """A gradient of zero leaves the decay: w (1 - a decay / W) in the first step, of W steps of warm-up."""
    held = Zeros(regrown="random", reset_state="restart", regrown_warm_up=10)
    model, optimizer, _, grown = late(held, kind=torch.optim.AdamW, weight_decay=0.5)
    old = model.weight.detach().clone()
    model.weight.grad = torch.zeros_like(model.weight)
    optimizer.step()
    expected = old[grown] * (1 - 1e-3 * 0.5 / 10)
    torch.testing.assert_close(model.weight.detach()[grown], expected, rtol=1e-6, atol=0)


def test_a_weight_that_leaves_and_comes_back_in_one_update_goes_on():
    model = mlp(20, 30, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    held = Zeros(reset_state="restart", regrown_warm_up=5)
    back = lambda masking, name, mask, number, weight: before[name].clone()  # noqa: E731
    masking = masked(model, optimizer, weights=held, growth_mode=back, redistribution_mode="none")
    before = {name: mask.clone() for name, mask in masking.masks.items()}
    train(model, optimizer, 3)
    masking.at_end_of_epoch()
    assert all(not layer.memory["grown_at"].any() for layer in masking.layers)


@pytest.mark.parametrize("kind", KINDS)
def test_the_times_are_those_of_the_last_update_a_weight_grew_in(kind):
    model, optimizer, masking = begin("smet", weights=kind, prune_every_k_steps=3)
    before = {layer.name: layer.mask.clone() for layer in masking.layers}
    expected = {name: torch.zeros(mask.shape, dtype=torch.int32) for name, mask in before.items()}
    for step in go_on(model, optimizer, masking):
        for layer in masking.layers:
            mask, times = layer.mask.clone(), layer.memory["grown_at"]
            expected[layer.name][mask & ~before[layer.name]] = step
            assert torch.equal(times if times.dim() == 1 else times[mask], expected[layer.name][mask])
            before[layer.name] = mask
    assert all(times.any() for times in expected.values())


@pytest.mark.parametrize("held", KINDS)
@pytest.mark.parametrize("then", KINDS)
def test_a_run_goes_on_as_it_would_have_also_on_the_other_kernels(held, then):
    torch.manual_seed(0)
    parts = begin("smet", weights=held, regrown_warm_up=3)
    list(go_on(*parts, last=13))
    saved = copy.deepcopy([part.state_dict() for part in parts]), torch.get_rng_state()
    again = begin("smet", weights=then, regrown_warm_up=3)
    for part, state in zip(again, saved[0], strict=True):
        part.load_state_dict(state)
    torch.set_rng_state(saved[1])
    list(go_on(*parts, first=13))
    torch.set_rng_state(saved[1])
    list(go_on(*again, first=13))
    for layer, other in zip(parts[2].layers, again[2].layers, strict=True):
        assert torch.equal(layer.mask, other.mask)
        first, second = (torch.where(x.mask, x.weight.detach(), 0) for x in (layer, other))
        if held == then:
            assert_equal(first, second)
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def test_damaged_times_are_refused():
    *_, masking = begin("smet")
    state = masking.state_dict()
    state["layers"]["fc1.weight"]["memory"]["grown_at"] = torch.zeros(3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"grown_at.* expected a torch.int32 tensor of shape \(30, 20\)"):
        masking.load_state_dict(state)


def test_groups_have_rates_of_their_own_also_those_that_come_later():
    """Twice the rate, twice the step; of a group that is added to the optimizer, too."""
    steps = []
    for factor in (1, 2):
        torch.manual_seed(0)
        model = mlp(20, 30, 10)
        optimizer = torch.optim.AdamW(model.fc1.parameters(), lr=0.01, weight_decay=0.0)
        optimizer.add_param_group(dict(params=[*model.fc2.parameters()], lr=0.01 * factor))
        masking = masked(model, optimizer, weights=Zeros(reset_state="restart", regrown_warm_up=4), **RANDOM)
        train(model, optimizer, 1)
        before = masking.masks["fc2.weight"].clone()
        masking.at_end_of_epoch()
        grown = masking.masks["fc2.weight"] & ~before
        train(model, optimizer, 1)
        steps.append(model.fc2.weight.detach()[grown].abs())
        assert steps[-1].max() == pytest.approx(0.01 * factor / 4, rel=1e-3)
    assert grown.any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_that_gradscaler_skips_changes_nothing(kind):
    model = mlp(20, 30, 10)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    parts = dict(weights=kind, prune_every_k_steps=2)
    masking = Masking.from_method("smet", model, optimizer, 100, 0.3, **parts)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def step(broken):
        optimizer.zero_grad()
        scaler.scale(model(torch.ones(4, 20)).square().sum()).backward()
        for group in optimizer.param_groups if broken else ():
            group["params"][0].grad.fill_(torch.inf)
        scaler.step(masking)
        scaler.update()

    for _ in range(3):
        step(broken=False)
    old = [torch.where(layer.mask, layer.weight.detach(), 0) for layer in masking.layers]
    step(broken=True)
    assert masking.steps == 3
    assert all(torch.equal(was, torch.where(x.mask, x.weight, 0)) for was, x in zip(old, masking.layers, strict=True))
    step(broken=False)
    assert masking.steps == 4


def test_a_closure_and_accumulated_gradients_make_one_step_each():
    results = []
    for way in ("plain", "closure", "accumulated"):
        torch.manual_seed(0)
        model, optimizer, masking = begin("smet", regrown_warm_up=3)
        for step in range(8):
            x = torch.randn(8, 20, generator=torch.Generator().manual_seed(step))

            def evaluate(x=x, model=model, optimizer=optimizer):
                optimizer.zero_grad()
                loss = model(x).square().sum()
                loss.backward()
                return loss

            if way == "closure":
                optimizer.step(evaluate)
            elif way == "accumulated":
                optimizer.zero_grad()
                for part in x.split(4):
                    model(part).square().sum().backward()
                optimizer.step()
            else:
                evaluate()
                optimizer.step()
        assert_masks_hold(masking)
        results.append([layer.weight.detach().clone() for layer in masking.layers])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    torch.testing.assert_close(results[2], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    torch.manual_seed(0)
    model = mlp(20, 30, 10).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-4)
    masking = masked(model, optimizer, weights=Zeros(reset_state="restart", regrown_warm_up=4), **RANDOM)
    train(model, optimizer, 3)
    before = masking.masks["fc1.weight"].clone()
    masking.at_end_of_epoch()
    grown = masking.masks["fc1.weight"] & ~before
    model.fc1.weight.grad = torch.ones_like(model.fc1.weight)
    optimizer.step()
    steps = -model.fc1.weight.detach()[grown].float()
    torch.testing.assert_close(steps, torch.full_like(steps, 0.01 / 4), rtol=5e-3, atol=0)


# Processes


def trained(shard):
    from torch.distributed.fsdp import fully_shard

    from sparselearning.processes.sharded import unsharded

    torch.manual_seed(3)
    model = mlp(9, 7, 5)
    if shard:
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, amsgrad=True)
    masking = Masking.from_method("smet", model, optimizer, 20, 0.4, prune_every_k_steps=2, growth="gradient")
    for step in range(7):
        optimizer.zero_grad()
        model(torch.randn(8, 9, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        optimizer.step()
    return unsharded([[layer.weight.detach(), layer.mask, layer.memory["grown_at"]] for layer in masking.layers])


def replicas():
    torch.manual_seed(0)
    model, optimizer, masking = begin("smet", weights="sparse", prune_every_k_steps=2)
    network = nn.parallel.DistributedDataParallel(model)
    torch.manual_seed(torch.distributed.get_rank())
    for _ in range(7):
        optimizer.zero_grad()
        network(torch.randn(8, 20)).square().sum().backward()
        optimizer.step()
    return {"mask": masking.state_dict(), "weights": [x.value.detach() for x in masking.held.trained.values()]}


def of_processes():
    return trained(shard=True), replicas() if available() else None


@pytest.mark.long
def test_shards_and_replicas_make_the_same_steps():
    torch.manual_seed(0)
    (first, mine), (second, other) = run(of_processes, 2)
    assert_equal(mine, other)
    torch.manual_seed(0)
    expected = trained(shard=False)
    for (weight, mask, times), one, two in zip(expected, first, second, strict=True):
        for found in (one, two):
            assert torch.equal(found[1], mask)
            assert torch.equal(found[2], times)
            torch.testing.assert_close(found[0], weight, rtol=1e-5, atol=1e-7)


# What cannot be


@pytest.mark.parametrize("parts", [dict(reset_state="restart"), dict(regrown_warm_up=3), dict(lr_by_density=True)])
def test_other_optimizers_and_dense_copies_are_refused(parts):
    model = mlp(20, 30, 10)
    for optimizer in (sgd(model), torch.optim.NAdam(model.parameters()), torch.optim.RMSprop(model.parameters())):
        with pytest.raises(ValueError, match=rf"Adam and AdamW, got {type(optimizer).__name__}\. Use one of these"):
            masked(model, optimizer, weights=Zeros(**parts), **RANDOM)
    with pytest.raises(ValueError, match="With weights='kept' inactive weights train, too"):
        DenseCopy(**parts)
    both = [torch.optim.Adam(model.fc1.parameters()), torch.optim.Adam(model.fc2.parameters())]
    with pytest.raises(ValueError, match="with steps of single weights needs one optimizer, got several"):
        Masking(both, None, weights=Zeros(**parts), **RANDOM)


@pytest.mark.parametrize("steps", [-1, 2.5, "3"])
def test_a_warm_up_that_is_no_number_of_steps_is_refused(steps):
    with pytest.raises(ValueError, match="Expected regrown_warm_up to be a number of steps, 0 or more, got"):
        (SparseTraining if available() else Zeros)(regrown_warm_up=steps)
