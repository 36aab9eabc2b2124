"""What the optimizer keeps for a weight: its momentum, and its master copy."""

import pytest
import torch
from torch import nn

from sparselearning.weights.optimizer import keeps_momentum, master_weights, momentum_of, torch_optimizer


def stepped(optimizer_type, gradients, **settings):
    """Return an optimizer and its weight after one step per gradient."""
    weight = nn.Parameter(torch.zeros(2, 2))
    optimizer = optimizer_type([weight], lr=0.5, **settings)
    for gradient in gradients:
        weight.grad = torch.tensor(gradient)
        optimizer.step()
    return optimizer, weight


def test_sgd_sums_gradients():
    optimizer, weight = stepped(torch.optim.SGD, [[[1.0, 0], [0, -2]], [[1.0, 4], [0, 0]]], momentum=0.5)
    assert momentum_of(optimizer, weight).tolist() == [[1.5, 4], [0, -1]]


def test_adam_is_the_mean_over_the_root_of_the_mean_square():
    optimizer, weight = stepped(torch.optim.Adam, [[[1.0, 0], [0, -2]]], betas=(0.5, 0.75))
    # m = 0.5 g and v = 0.25 g^2, so m / sqrt(v) is the sign of g; 0 where nothing came.
    torch.testing.assert_close(momentum_of(optimizer, weight), torch.tensor([[1.0, 0], [0, -1]]))


def test_adamax_is_the_mean_over_the_largest_gradient():
    optimizer, weight = stepped(torch.optim.Adamax, [[[1.0, 0], [0, -2]], [[0.0, 0], [0, -2]]], betas=(0.5, 0.75))
    # m = 0.25, -1.5 and u = max(0.75 * 1, 0), 2
    torch.testing.assert_close(momentum_of(optimizer, weight), torch.tensor([[0.25 / 0.75, 0], [0, -0.75]]))


def test_an_average_alone_is_the_momentum():
    optimizer, weight = stepped(torch.optim.Adam, [[[1.0, 0], [0, -2]]])
    optimizer.state[weight] = {"exp_avg": torch.ones(2, 2)}
    assert torch.equal(momentum_of(optimizer, weight), torch.ones(2, 2))


@pytest.mark.parametrize("settings", [{"momentum": 0.9}, {"momentum": 0.9, "nesterov": True}])
def test_momentum_is_zero_before_the_first_step(settings):
    optimizer, weight = stepped(torch.optim.SGD, [], **settings)
    assert torch.equal(momentum_of(optimizer, weight), torch.zeros(2, 2))
    assert not optimizer.state, "asking must not create state"


def test_a_weight_that_got_no_gradient_has_momentum_zero():
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([used, unused])
    used.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(momentum_of(optimizer, unused), torch.zeros(2, 2))


@pytest.mark.parametrize("optimizer_type", [torch.optim.Adam, torch.optim.Adamax])
def test_small_half_precision_moments_do_not_divide_by_zero(optimizer_type):
    weight = nn.Parameter(torch.zeros(1, 2, dtype=torch.float16))
    optimizer = optimizer_type([weight])
    second = "exp_avg_sq" if optimizer_type is torch.optim.Adam else "exp_inf"
    optimizer.state[weight] = {
        "exp_avg": torch.tensor([[1e-4, 0]], dtype=torch.float16),
        second: torch.zeros(1, 2, dtype=torch.float16),  # 1e-4 squared is 0 in fp16
    }
    momentum = momentum_of(optimizer, weight)
    assert momentum.isfinite().all()
    assert momentum[0, 0] > momentum[0, 1] == 0


@pytest.mark.parametrize("name", ["SGD", "RMSprop", "Adagrad", "Adadelta", "Adafactor", "ASGD", "Rprop", "LBFGS"])
def test_without_momentum_the_error_names_what_works(name):
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = getattr(torch.optim, name)([weight], lr=0.1)
    assert not keeps_momentum(optimizer)
    message = (
        rf"{name} holds no momentum for a weight of shape \(2, 2\). Use SGD\(momentum=0.9\), Adam or "
        r"AdamW, or growth_mode='random' and redistribution_mode='nonzeros'"
    )
    with pytest.raises(RuntimeError, match=message):
        momentum_of(optimizer, weight)

    def closure():
        weight.grad = torch.ones(2, 2)
        return weight.sum()

    optimizer.step(closure)
    with pytest.raises(RuntimeError, match=message):
        momentum_of(optimizer, weight)


class Wrapper:
    """Holds an optimizer as `.optimizer`, as the wrappers of Apex and many others do."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


class SubclassingWrapper(torch.optim.Optimizer):
    """An Optimizer that only wraps another, as that of Accelerate: its own hooks never run."""

    def __init__(self, optimizer):
        self.optimizer = optimizer


def test_the_optimizer_inside_wrappers_is_found():
    inner = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    assert torch_optimizer(inner) is inner
    assert torch_optimizer(Wrapper(Wrapper(inner))) is inner
    assert torch_optimizer(SubclassingWrapper(inner)) is inner


@pytest.mark.parametrize("wrong", [None, [], nn.Linear(1, 1), Wrapper(None)])
def test_anything_but_an_optimizer_is_refused(wrong):
    with pytest.raises(TypeError, match=f"Expected a torch.optim.Optimizer, got {type(wrong).__name__}"):
        torch_optimizer(wrong)


def test_master_weights_are_found_by_the_half_precision_weight():
    half, master = torch.zeros(2, dtype=torch.float16), torch.zeros(2)
    wrapper = Wrapper(None)
    wrapper.fp16_groups, wrapper.fp32_from_fp16_groups = [[half]], [[master]]
    assert master_weights(wrapper, required=True) == {half: master}
    assert master_weights(Wrapper(None)) == {}


def test_missing_master_weights_are_an_error_where_they_are_required():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(RuntimeError, match=r"fp16=True expects .* got SGD. With torch.amp .* leave fp16=False"):
        master_weights(optimizer, required=True)
