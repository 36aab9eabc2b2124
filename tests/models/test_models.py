"""The networks: published sizes, inputs and outputs, compilation; ResNets equal torchvision's."""

import math

import pytest
import torch
from torch import nn

from sparselearning.models import INPUT_SHAPES, MODELS, build, check_input
from sparselearning.models.resnet import RESNETS, ResNet, resnet18, resnet50
from sparselearning.models.wide_resnet import wide_resnet

# Number of all parameters, and of those that may be masked: all but biases and normalisation.
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
    torch.testing.assert_close(model(images.to(memory_format=torch.channels_last)), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["lenet5", "lenet300-100", "alexnet-s", "vgg-c", "wrn-16-8"])
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
            tolerance = 4 / math.sqrt(2 * module.weight.numel())  # four standard errors of a standard deviation
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
    with pytest.raises(ValueError, match=r"Unknown model 'wrn-16-9'\. Did you mean 'wrn-16-8'\? Choose from: lenet5"):
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


# ResNet against torchvision's


def move_stride_to_1x1(model):
    """Turn torchvision's bottlenecks into those of the paper."""
    for stage in (model.layer2, model.layer3, model.layer4):
        stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_parameters_are_named_as_in_torchvision(name):
    torchvision = pytest.importorskip("torchvision")
    with torch.device("meta"):
        ours, theirs = RESNETS[name](), getattr(torchvision.models, name)()
    shapes = [{key: value.shape for key, value in model.state_dict().items()} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    assert list(shapes[0]) == list(shapes[1])


@pytest.mark.parametrize(("name", "stride_in"), [("resnet18", "3x3"), ("resnet50", "3x3"), ("resnet50", "1x1")])
def test_resnet_outputs_are_those_of_torchvision(name, stride_in):
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    ours, theirs = RESNETS[name](10, stride_in=stride_in), getattr(torchvision.models, name)(num_classes=10)
    if stride_in == "1x1":
        move_stride_to_1x1(theirs)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 96, 64)
    assert torch.equal(ours(images), theirs(images)), "training, with the statistics of the batch"
    assert torch.equal(ours.eval()(images), theirs.eval()(images))


@pytest.mark.parametrize("zero_init", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_resnet_begins_as_torchvision_does(name, zero_init):
    torchvision = pytest.importorskip("torchvision")
    ours = RESNETS[name](10, zero_init=zero_init).state_dict()
    theirs = getattr(torchvision.models, name)(num_classes=10, zero_init_residual=zero_init).state_dict()
    for key, value in ours.items():
        if value.ndim == 4:
            tolerance = 5 * math.sqrt(2) / math.sqrt(2 * value.numel())  # five standard errors of the difference
            assert value.std().item() == pytest.approx(theirs[key].std().item(), rel=tolerance), key
        elif "bn" in key or "downsample.1" in key:
            assert torch.equal(value, theirs[key]), key


def test_resnet_fan_in_initialisation():
    torch.manual_seed(0)
    for module in resnet18(10, fan="fan_in").modules():
        if isinstance(module, nn.Conv2d):
            tolerance = 4 / math.sqrt(2 * module.weight.numel())
            expected = math.sqrt(2 / module.weight[0].numel())
            assert module.weight.std().item() == pytest.approx(expected, rel=tolerance)


def test_zero_init_makes_the_blocks_identities():
    torch.manual_seed(0)
    block = resnet50(10, zero_init=True).layer1[1]
    features = torch.rand(2, 256, 4, 4)
    assert torch.equal(block(features), features)


def test_resnet_in_channels_last_and_compiled():
    torch.compiler.reset()
    torch.manual_seed(0)
    model, images = resnet18(10).eval(), torch.randn(2, 3, 64, 64)
    expected = model(images)
    model.to(memory_format=torch.channels_last)
    images = images.to(memory_format=torch.channels_last)
    torch.testing.assert_close(model(images), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(images), model(images))


def test_resnet_refuses_grey_images():
    with pytest.raises(ValueError, match=r"\[N, 3, H, W\], got \[2, 1, 32, 32\]"):
        resnet18(10)(torch.zeros(2, 1, 32, 32))


@pytest.mark.parametrize(
    ("depth", "options", "message"),
    [
        (20, {}, "Unknown depth 20. Choose from 18, 34, 50, 101, 152"),
        (50, {"stride_in": "v1"}, "Unknown stride_in 'v1'. Choose '3x3' or '1x1'"),
        (18, {"stride_in": "1x1"}, "ResNet-18 has no 1x1 convolution"),
        (18, {"fan": "in"}, "Unknown fan 'in'. Choose 'fan_out' or 'fan_in'"),
    ],
)
def test_unknown_resnet_options_are_refused(depth, options, message):
    with pytest.raises(ValueError, match=message):
        ResNet(depth, **options)


def test_some_layers_of_a_model_are_a_model_of_their_own():
    model = build("lenet5")
    x = torch.randn(2, 1, 28, 28)
    first, rest = model[:3], model[3:]
    assert list(first.state_dict()) == ["conv1.weight", "conv1.bias"]
    torch.testing.assert_close(rest(first(x)), model(x))
    assert model[0] is model.conv1
