"""The networks: sizes of the published ones, inputs and outputs, what wraps them."""

import math

import pytest
import torch
from torch import nn

from sparselearning.models import INPUT_SHAPES, MODELS, build, check_input
from sparselearning.models.wide_resnet import wide_resnet

# Parameters in all, and those that may be masked: everything but biases and normalisation.
COUNTS = {
    "lenet5": (431_080, 430_500),
    "lenet300-100": (266_610, 266_200),
    "alexnet-s": (5_077_066, 5_066_784),
    "alexnet-b": (8_501_322, 8_484_896),
    "vgg-c": (11_323_466, 11_307_712),
    "vgg-d": (15_255_626, 15_239_872),
    "vgg-like": (14_991_946, 14_977_728),
    "wrn-28-2": (1_467_610, 1_463_984),
    "wrn-22-8": (17_158_106, 17_147_312),
    "wrn-16-8": (10_961_370, 10_954_160),
    "wrn-16-10": (17_116_634, 17_107_632),
}
every_model = pytest.mark.parametrize("name", MODELS)


def images_for(name, count=2):
    return torch.randn(count, *INPUT_SHAPES[name])


def built(name):
    torch.manual_seed(0)
    return build(name).eval()


def test_every_model_has_a_published_count():
    assert MODELS.keys() == COUNTS.keys() == INPUT_SHAPES.keys()


@every_model
def test_parameter_counts_are_the_published_ones(name):
    with torch.device("meta"):
        parameters = list(build(name).parameters())
    maskable = [p for p in parameters if p.ndim > 1]
    assert (sum(p.numel() for p in parameters), sum(p.numel() for p in maskable)) == COUNTS[name]


@every_model
def test_outputs_are_log_probabilities(name):
    output = built(name)(images_for(name))
    assert output.shape == (2, 10)
    torch.testing.assert_close(output.exp().sum(1), torch.ones(2))


@every_model
def test_channels_last_changes_no_output(name):
    model, images = built(name), images_for(name)
    expected = model(images)
    model.to(memory_format=torch.channels_last)
    torch.testing.assert_close(
        model(images.to(memory_format=torch.channels_last)), expected, atol=1e-4, rtol=1e-4
    )


@every_model
def test_compiles_to_one_graph(name):
    torch.compiler.reset()  # all models share one forward, and a process may compile it eight times
    model, images = built(name), images_for(name)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), model(images))


@every_model
def test_input_that_does_not_fit_is_refused(name):
    model, (channels, height, width) = built(name), INPUT_SHAPES[name]
    with pytest.raises(ValueError, match=rf"\[N, {channels}, {height}, {width}\], got \[2, 3, 17, 32\]"):
        model(torch.zeros(2, 3, 17, 32))
    with pytest.raises(ValueError, match=r"got \[\d, \d+, \d+\]"):
        model(torch.zeros(channels, height, width))


@every_model
def test_every_relu_is_a_module_of_its_own(name):
    calls = []
    model = built(name)
    relus = [module for module in model.modules() if isinstance(module, nn.ReLU)]
    for relu in relus:
        relu.register_forward_hook(lambda module, args, output: calls.append(module))
    model(images_for(name))
    assert calls == relus


def test_same_seed_gives_same_weights():
    first, second = built("lenet5").state_dict(), built("lenet5").state_dict()
    assert all(torch.equal(weight, second[key]) for key, weight in first.items())


def test_wide_resnet_initialisation():
    model = built("wrn-28-2")
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] * module.kernel_size[1]
            tolerance = 4 / math.sqrt(
                2 * module.weight.numel()
            )  # four standard errors of a standard deviation
            assert module.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=tolerance), name
            assert module.bias is None
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all()
            assert (module.bias == 0).all()
    assert (model.fc.bias == 0).all()


@pytest.mark.parametrize("depth", [4, 9, 17])
def test_impossible_depth_is_refused(depth):
    with pytest.raises(ValueError, match=f"6n \\+ 4 .*got {depth}"):
        wide_resnet(depth, 8)


def test_unknown_model_lists_choices_and_a_near_one():
    with pytest.raises(
        ValueError, match=r"Unknown model 'wrn-16-9'\. Did you mean 'wrn-16-8'\? Choose from: lenet5"
    ):
        build("wrn-16-9")
    with pytest.raises(ValueError, match=r"Unknown model 'bert'\. Choose from: .*wrn-16-10\.$"):
        build("bert")


def test_check_input_names_the_models_that_fit():
    check_input("lenet5", [1, 28, 28])
    with pytest.raises(
        ValueError, match=r"'lenet5' takes images of 1x28x28, got 3x32x32\. Models .*: alexnet-s, .*wrn"
    ):
        check_input("lenet5", (3, 32, 32))
    with pytest.raises(ValueError, match=r"got 3x64x64\. Resize the images"):
        check_input("vgg-d", (3, 64, 64))
