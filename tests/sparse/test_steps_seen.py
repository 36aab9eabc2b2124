"""Sparse training scores growth by gradients as steps used them, and nothing in the loop makes it differ silently."""

import copy
import io
import math
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from sparselearning import checkpoint
from sparselearning.core import Masking
from sparselearning.sparse import available
from sparselearning.sparse.held_weight import HeldWeight
from sparselearning.sparse.observing import WINDOW
from sparselearning.sparse.trained import TrainedLinear

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")


def network():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 16, 12), nn.Tanh(), nn.Linear(12, 5)
    )


def begin(weights="sparse", every=0, growth="momentum", make=lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9)):
    torch.manual_seed(0)
    model = network()
    optimizer = make(model.parameters())
    modes = dict(growth_mode=growth, redistribution_mode="none")
    masking = Masking(optimizer, None, 0.3, weights=weights, prune_every_k_steps=every, **modes)
    masking.add_module(model, density=0.4)
    return model, optimizer, masking


def observe(masking):
    for module in masking.held.trained.values():
        module.observed.observing = True


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 2, 4, 4, generator=generator), torch.randint(5, (8,), generator=generator)


def loss_of(model, seed=0):
    x, target = batch(seed)
    return F.cross_entropy(model(x), target)


def dense_gradients(model, seed=0, sign=1):
    """Return the gradients of the dense weights, computed by torch's layers."""
    dense = network()
    dense.load_state_dict(model.state_dict())
    (sign * loss_of(dense, seed)).backward()
    return [p.grad for p in dense.parameters() if p.dim() > 1]


def assert_seen(masking, expected, factor=1.0):
    for layer, gradient in zip(masking.layers, expected, strict=True):
        torch.testing.assert_close(masking.get_gradient_for_weight(layer.weight), gradient * factor)


def test_a_scaled_loss_is_scaled_back():
    model, _optimizer, masking = begin()
    observe(masking)
    expected = dense_gradients(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(loss_of(model)).backward()
    scaler.step(masking)
    assert_seen(masking, expected)


def test_fused_optimizers_scale_back_inside_their_step():
    model, optimizer, masking = begin(make=lambda p: torch.optim.Adam(p, lr=0.01, fused=True))
    observe(masking)
    expected = dense_gradients(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    scaler.scale(loss_of(model)).backward()
    scaler.step(optimizer)
    assert_seen(masking, expected)
    scaler.update()
    optimizer.zero_grad()
    observe(masking)
    scaler.scale(loss_of(model) * math.inf).backward()
    scaler.step(optimizer)  # its kernel skips this step
    assert_seen(masking, expected)


@pytest.mark.parametrize("kind", ["norm", "value"])
def test_clipped_gradients_are_clipped(kind):
    model, optimizer, masking = begin()
    observe(masking)
    expected = dense_gradients(model)
    (loss_of(model) * 100).backward()
    if kind == "norm":
        before = model[3].weight.grad.clone()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        factor = (model[3].weight.grad.norm() / before.norm()).item()
        assert factor < 0.1
        expected = [gradient * 100 * factor for gradient in expected]
    else:
        torch.nn.utils.clip_grad_value_(model.parameters(), 0.3)
        expected = [(gradient * 100).clamp(-0.3, 0.3) for gradient in expected]
    optimizer.step()
    assert_seen(masking, expected)


def test_clipping_holds_for_grown_weights():
    """Steps after an update stay as small as the clipping says: 200 times less than the raw gradients'."""
    model, optimizer, masking = begin(every=4)
    for step in range(12):
        optimizer.zero_grad()
        (loss_of(model, step) * 1000).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        momenta = [optimizer.state[m.value]["momentum_buffer"] for m in masking.held.trained.values()]
        assert max(momentum.abs().max() for momentum in momenta) < 0.2


def test_an_ascending_optimizer_has_an_ascending_momentum():
    model, optimizer, masking = begin(make=lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, maximize=True))
    observe(masking)
    before = [layer.mask.clone() for layer in masking.layers]
    expected = dense_gradients(model, sign=-1)
    (-loss_of(model)).backward()
    optimizer.step()
    for layer, gradient in zip(masking.layers, expected, strict=True):
        momentum = masking.get_momentum_for_weight(layer.weight)
        torch.testing.assert_close(momentum[~layer.mask], -gradient[~layer.mask])
    masking.at_end_of_epoch()
    for layer, old, gradient in zip(masking.layers, before, expected, strict=True):
        grown = layer.mask & ~old
        assert grown.any()
        torch.testing.assert_close(masking.get_momentum_for_weight(layer.weight)[grown], -10 * gradient[grown])


@pytest.mark.parametrize("clear", ["before the forward pass", "before the backward pass", "set to zero"])
def test_a_batch_that_the_loop_skips_is_not_seen(clear):
    model, optimizer, masking = begin()
    observe(masking)
    expected = dense_gradients(model, seed=2)
    for seed in range(3):
        if clear != "before the backward pass":
            optimizer.zero_grad(set_to_none=clear != "set to zero")
        loss = loss_of(model, seed) * (1 if seed == 2 else math.nan)
        if clear == "before the backward pass":
            optimizer.zero_grad()
        loss.backward()
        if loss.isfinite():
            optimizer.step()
    assert_seen(masking, expected)


def test_a_backward_pass_for_another_purpose_is_not_seen():
    model, optimizer, masking = begin()
    observe(masking)
    expected = dense_gradients(model)
    x, _ = batch(1)
    x.requires_grad_()
    torch.autograd.grad(model(x).square().sum(), x)  # adversarial examples, say
    loss_of(model, 3).backward()  # and a gradient norm for the log
    optimizer.zero_grad()
    loss_of(model).backward()
    torch.autograd.grad(model(x).square().sum(), x)
    optimizer.step()
    assert_seen(masking, expected)


def test_accumulated_gradients_are_seen_as_one():
    model, optimizer, masking = begin()
    observe(masking)
    expected = [one + other for one, other in zip(dense_gradients(model, 1), dense_gradients(model, 2), strict=True)]
    loss_of(model, 1).backward()
    loss_of(model, 2).backward()
    optimizer.step()
    assert_seen(masking, expected)


def test_a_layer_called_twice_is_seen_once_with_both():
    model, optimizer, masking = begin()
    observe(masking)
    expected = [one + other for one, other in zip(dense_gradients(model, 1), dense_gradients(model, 2), strict=True)]
    (loss_of(model, 1) + loss_of(model, 2)).backward()
    optimizer.step()
    assert_seen(masking, expected)


def test_a_closure_is_seen():
    model, optimizer, masking = begin()
    observe(masking)
    expected = dense_gradients(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    masking.step(closure)
    assert_seen(masking, expected)


def test_a_checkpointed_layer_is_seen():
    model, optimizer, masking = begin()
    observe(masking)
    expected = dense_gradients(model)
    x, target = batch()
    for reentrant in (False, True):
        hidden = torch.utils.checkpoint.checkpoint(model[:4], x.requires_grad_(), use_reentrant=reentrant)
        optimizer.zero_grad()
        F.cross_entropy(model[4:](hidden), target).backward()
    optimizer.step()
    assert_seen(masking, expected)


def test_a_penalty_on_weights_reaches_the_values():
    model, optimizer, masking = begin()
    observe(masking)
    expected = [g + 0.1 * layer.weight.sign() for g, layer in zip(dense_gradients(model), masking.layers, strict=True)]
    (loss_of(model) + 0.1 * sum(p.abs().sum() for p in model.parameters() if p.dim() > 1)).backward()
    for layer, gradient in zip(masking.layers, expected, strict=True):
        torch.testing.assert_close(layer.weight.grad, gradient[layer.mask])
    optimizer.step()
    assert_seen(masking, expected)


def test_a_tied_decoder_reaches_the_values():
    model, optimizer, masking = begin()
    observe(masking)
    x = batch()[0].flatten(1)[:, :12]
    expected = [torch.zeros_like(p) for p in model.parameters() if p.dim() > 1]
    expected[2] = (2 * (x @ model[5].weight.detach().t())).t() @ x
    F.linear(x, model[5].weight).square().sum().backward()
    optimizer.step()
    layer = masking.layers[2]
    torch.testing.assert_close(masking.get_gradient_for_weight(layer.weight), expected[2])


def test_frozen_layers_stay():
    model, optimizer, _masking = begin()
    before = copy.deepcopy(model[3].state_dict())
    model[3].requires_grad_(False)
    loss_of(model).backward()
    optimizer.step()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model[3].state_dict().items())
    model[3].requires_grad_(True)
    loss_of(model).backward()
    optimizer.step()
    assert not torch.equal(model[3].weight, before["weight"])


def test_a_copy_of_the_model_alone_is_a_dense_model():
    model, optimizer, _masking = begin()
    loss_of(model).backward()
    optimizer.step()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), *in_a_file(model)):
        torch.testing.assert_close(copied(batch()[0]), model(batch()[0]))
        assert [type(p) for p in copied.parameters()] == [nn.Parameter] * 6
        torch.testing.assert_close([p.shape for p in copied.parameters()], [p.shape for p in model.parameters()])
        stepper = torch.optim.SGD(copied.parameters(), lr=0.1)
        before = model[3].weight.clone()
        loss_of(copied).backward()
        stepper.step()
        assert not torch.equal(copied[3].weight, before)
        assert torch.equal(model[3].weight, before)


def in_a_file(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


def test_pickled_together_model_optimizer_and_masks_go_on():
    whole = begin(every=3)
    for step in range(4):
        whole[1].zero_grad()
        loss_of(whole[0], step).backward()
        whole[1].step()
    copied = pickle.loads(pickle.dumps(whole))
    for step in range(4, 9):
        losses = []
        for model, optimizer, _ in (whole, copied):
            optimizer.zero_grad()
            loss = loss_of(model, step)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[0] == losses[1]
    copied[2].check()


@pytest.mark.parametrize("average", [None, get_ema_multi_avg_fn(0.5)], ids=["swa", "ema"])
def test_averages_are_those_of_the_weights(average):
    model, optimizer, _masking = begin(every=2)
    averaged = AveragedModel(model, multi_avg_fn=average)
    dense = AveragedModel(nn.ParameterList(p.detach().clone() for p in model.parameters()), multi_avg_fn=average)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        averaged.update_parameters(model)
        dense.update_parameters(nn.ParameterList(p.detach().clone() for p in model.parameters()))
    for one, other in zip(averaged.module.parameters(), dense.module.parameters(), strict=True):
        torch.testing.assert_close(one, nn.Parameter(other))
    expected = network()
    expected.load_state_dict(averaged.module.state_dict())
    torch.testing.assert_close(averaged(batch()[0]), expected(batch()[0]))


def test_written_weights_are_used_and_masks_hold():
    model, optimizer, masking = begin()
    for write in (
        lambda w: w.copy_(torch.randn_like(w)),
        lambda w: w.data.copy_(torch.randn_like(w)),
        lambda w: model.load_state_dict({n: torch.randn_like(t) for n, t in model.state_dict().items()}),
        lambda w: model.load_state_dict({n: torch.randn_like(t) for n, t in model.state_dict().items()}, assign=True),
    ):
        with torch.no_grad():
            write(model[5].weight)
        expected = network()
        expected.load_state_dict(model.state_dict())
        masks = [layer.mask for layer in masking.layers]
        with torch.no_grad():
            for index, mask in zip((0, 3, 5), masks, strict=True):
                expected[index].weight.mul_(mask)
        torch.testing.assert_close(model(batch()[0]), expected(batch()[0]))
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
        masking.check()
        assert model[5].weight.count_nonzero() == masking.layers[2].nonzeros


def test_weights_that_are_loaded_before_their_masks_stay_whole():
    model, optimizer, masking = begin(every=1)
    saved = copy.deepcopy([part.state_dict() for part in (model, optimizer, masking)])
    for step in range(3):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
    model.load_state_dict(saved[0])
    model(batch()[0])  # a look at it in between
    masking.load_state_dict(saved[2])
    optimizer.load_state_dict(saved[1])
    assert all(torch.equal(tensor, saved[0][name]) for name, tensor in model.state_dict().items())
    masking.check()


@pytest.mark.parametrize("with_optimizer", [True, False])
@pytest.mark.parametrize("way", [("sparse", "zero"), ("zero", "sparse"), ("sparse", "sparse")])
def test_checkpoints_fit_the_other_way_to_hold_weights(tmp_path, way, with_optimizer):
    losses = []
    parts = dict(zip(("model", "optimizer", "mask"), begin(way[0]), strict=True))
    step(parts, 3)
    if not with_optimizer:
        del parts["optimizer"]
    checkpoint.save(tmp_path / "c.pt", **parts)
    for kind in (way[1], way[1]):
        again = dict(zip(("model", "optimizer", "mask"), begin(kind), strict=True))
        if kind == way[1]:
            step(again, 2)
        loaded = {name: part for name, part in again.items() if name in parts}
        checkpoint.load(tmp_path / "c.pt", **loaded)
        losses.append(step(again, 4))
        again["mask"].check()
    assert losses[0] == losses[1] or not with_optimizer
    if with_optimizer:
        assert losses[0] == pytest.approx(step(parts, 4), rel=1e-4)


def step(parts, count):
    losses = []
    for seed in range(count):
        parts["optimizer"].zero_grad()
        loss = loss_of(parts["model"], seed)
        loss.backward()
        parts["optimizer"].step()
        losses.append(loss.item())
    return losses


def test_an_optimizer_state_has_the_shapes_of_dense_training():
    model, optimizer, _masking = begin()
    loss_of(model).backward()
    optimizer.step()
    saved = optimizer.state_dict()
    assert [state["momentum_buffer"].shape for state in saved["state"].values()] == [
        p.shape for p in model.parameters()
    ]
    value = model[3].value
    assert optimizer.state[value]["momentum_buffer"].shape == value.shape  # what is trained stays as it is


@pytest.mark.parametrize("kind", ["Muon", "Adafactor", "LBFGS"])
def test_optimizers_that_step_whole_weights_are_refused(kind):
    if not hasattr(torch.optim, kind):
        pytest.skip(f"torch has no {kind}")
    model = nn.Linear(8, 8, bias=False)
    masking = Masking(getattr(torch.optim, kind)(model.parameters()), None, growth_mode="random",
                      redistribution_mode="none", weights="sparse")  # fmt: skip
    with pytest.raises(ValueError, match=f"{kind} does not step each entry on its own"):
        masking.add_module(model, density=0.5)
    assert type(model) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gives_what_dense_layers_give(dtype):
    model, _optimizer, masking = begin()
    dense = network()
    dense.load_state_dict(model.state_dict())
    x, target = batch()
    with torch.autocast("cpu", dtype):
        out, expected = model(x.to(dtype)), dense(x.to(dtype))
        assert out.dtype == expected.dtype
        F.cross_entropy(out, target).backward()
        F.cross_entropy(expected, target).backward()
    torch.testing.assert_close(out, expected, rtol=0.05, atol=0.02)
    for layer, parameter in zip(masking.layers, (dense[0], dense[3], dense[5]), strict=True):
        gradient = parameter.weight.grad[layer.mask]
        torch.testing.assert_close(layer.weight.grad, gradient, rtol=0.2, atol=0.02)


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")  # jvp's own
def test_function_transforms_give_what_dense_layers_give():
    model, _optimizer, masking = begin()
    dense = network()
    dense.load_state_dict(model.state_dict())
    x, _ = batch()
    weights = {name: p.detach() for name, p in dense.named_parameters()}

    def gradient(network):
        return torch.func.grad(lambda w: torch.func.functional_call(network, w, (x,)).square().sum())(weights)

    for name, found in gradient(model).items():
        torch.testing.assert_close(found, gradient(dense)[name])
    for network_of in (lambda n: torch.func.jacrev(n)(x[:1]), lambda n: torch.vmap(n)(x[:, None])):
        torch.testing.assert_close(network_of(model), network_of(dense))
    pushed = [torch.func.jvp(n, (x,), (torch.ones_like(x),)) for n in (model, dense)]
    torch.testing.assert_close(pushed[0], pushed[1])
    per_sample = torch.vmap(model)(x[:, None]).square().sum()
    per_sample.backward()
    torch.vmap(dense)(x[:, None]).square().sum().backward()
    torch.testing.assert_close(model[3].weight.grad, dense[3].weight.grad[masking.layers[1].mask])


def test_hooks_on_gradients_are_called_or_refused():
    torch.manual_seed(0)
    model = network()
    called = []
    model[3].weight.register_hook(called.append)
    model[5].weight.register_post_accumulate_grad_hook(called.append)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masking = Masking(optimizer, None, weights="sparse")
    masking.add_module(model, density=0.4)
    assert masking.summary().count("masked: hooks read its gradient") == 2
    loss_of(model).backward()
    assert len(called) == 2
    for register in (model[0].weight.register_hook, model[0].weight.register_post_accumulate_grad_hook):
        with pytest.raises(RuntimeError, match="it would never be called"):
            register(called.append)


def test_a_parametrization_put_on_later_is_used():
    model, optimizer, masking = begin()
    expected = network()
    expected.load_state_dict(model.state_dict())
    for net in (model, expected):
        nn.utils.parametrize.register_parametrization(net[3], "weight", nn.Softsign())
        loss_of(net).backward()
    torch.testing.assert_close(model(batch()[0]), expected(batch()[0]))
    gradient = expected[3].parametrizations.weight.original.grad[masking.layers[1].mask]
    torch.testing.assert_close(masking.held.trained["3.weight"].value.grad, gradient)
    optimizer.step()


def test_wrong_inputs_raise_what_dense_layers_raise():
    model, _, _ = begin()
    for layer, shapes in ((model[3], [(2, 63), (65,), ()]), (model[0], [(2, 3, 4, 4), (2, 4), (1, 2, 2, 4, 4)])):
        dense = type(layer).plain
        for shape in shapes:
            with pytest.raises(RuntimeError) as expected:
                dense.forward(copy.deepcopy(layer), torch.zeros(shape))
            with pytest.raises(RuntimeError) as raised:
                layer(torch.zeros(shape))
            assert str(raised.value) == str(expected.value)


def test_other_dtypes_train_with_dense_weights():
    model, optimizer, masking = begin("sparse", 0, "random", make=lambda p: torch.optim.SGD(p, lr=0.05))
    model.to(torch.bfloat16)
    x, target = batch()
    before = model[5].weight.detach().clone()
    F.cross_entropy(model(x.bfloat16()), target).backward()
    optimizer.step()
    masking.check()
    assert not torch.equal(model[5].weight, before)
    model.float()
    loss_of(model).backward()


def test_no_operation_on_a_mask_loses_a_step():
    model, optimizer, masking = begin()
    expected = begin()
    for seed in range(3):
        for network, stepper in ((model, optimizer), expected[:2]):
            stepper.zero_grad()
            loss_of(network, seed).backward()
            if network is model:
                for layer in masking.layers:
                    layer.mask.logical_or_(torch.zeros_like(layer.mask))
            stepper.step()
    for one, other in zip(model.parameters(), expected[0].parameters(), strict=True):
        assert torch.equal(one, other)


def test_parameters_are_those_of_the_dense_model():
    model, optimizer, _masking = begin()
    dense = network()
    assert [(name, p.shape) for name, p in model.named_parameters()] == [
        (name, p.shape) for name, p in dense.named_parameters()
    ]
    assert isinstance(model[3], TrainedLinear)
    assert isinstance(model[3].weight, HeldWeight)
    loss_of(model).backward()
    assert all(p.grad is not None for p in model.parameters())
    model.zero_grad()
    assert all(p.grad is None for group in optimizer.param_groups for p in group["params"])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # dynamo's own, at a graph break
def test_a_compiled_model_trains_the_same():
    model, optimizer, _masking = begin(every=3)
    compiled = torch.compile(model, backend="aot_eager")
    expected = begin(every=3)
    for seed in range(WINDOW // 3):
        losses = []
        for network, stepper in ((compiled, optimizer), (expected[0], expected[1])):
            stepper.zero_grad()
            loss = loss_of(network, seed)
            loss.backward()
            stepper.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
