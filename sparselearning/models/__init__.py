"""The networks of the MNIST and CIFAR-10 experiments, by name."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import partial

from torch import nn

from sparselearning.models.alexnet import alexnet
from sparselearning.models.lenet import lenet5, lenet300_100
from sparselearning.models.release_1_0 import VGG16, AlexNet, LeNet_5_Caffe, LeNet_300_100, WideResNet
from sparselearning.models.vgg import vgg_c, vgg_d, vgg_like
from sparselearning.models.wide_resnet import wide_resnet

__all__ = [
    "INPUT_SHAPES",
    "MODELS",
    "VGG16",
    "AlexNet",
    "LeNet_5_Caffe",
    "LeNet_300_100",
    "WideResNet",
    "build",
    "check_input",
]

MODELS: dict[str, Callable[[], nn.Module]] = {
    "lenet5": lenet5,
    "lenet300-100": lenet300_100,
    "alexnet-s": partial(alexnet, 1024),
    "alexnet-b": partial(alexnet, 2048),
    "vgg-c": vgg_c,
    "vgg-d": vgg_d,
    "vgg-like": vgg_like,
    "wrn-28-2": partial(wide_resnet, 28, 2),
    "wrn-22-8": partial(wide_resnet, 22, 8),
    "wrn-16-8": partial(wide_resnet, 16, 8),
    "wrn-16-10": partial(wide_resnet, 16, 10),
}
INPUT_SHAPES = {name: (1, 28, 28) if name.startswith("lenet") else (3, 32, 32) for name in MODELS}


def build(name: str) -> nn.Module:
    """Return a newly initialised network, which maps images [N, C, H, W] to log-probabilities [N, 10].

    Raises:
        ValueError: if no network has this name.
    """
    _check_name(name)
    return MODELS[name]()


def check_input(name: str, shape: Sequence[int]) -> None:
    """Check that the network `name` takes images of `shape` (C, H, W), before it is built.

    Raises:
        ValueError: if no network has this name, or it takes another shape; the message names the networks that fit.
    """
    _check_name(name)
    if tuple(shape) == INPUT_SHAPES[name]:
        return
    fitting = [other for other, expected in INPUT_SHAPES.items() if expected == tuple(shape)]
    advice = f"Models for these images: {', '.join(fitting)}." if fitting else "Resize the images."
    expected, got = ("x".join(map(str, s)) for s in (INPUT_SHAPES[name], shape))
    raise ValueError(f"Model {name!r} takes images of {expected}, got {got}. {advice}")


def _check_name(name: str) -> None:
    if name not in MODELS:
        close = get_close_matches(name.lower(), MODELS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"Unknown model {name!r}.{hint} Choose from: {', '.join(MODELS)}.")
