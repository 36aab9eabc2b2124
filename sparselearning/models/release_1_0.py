"""The networks under the names and arguments of release 1.0."""

from sparselearning.models.alexnet import alexnet
from sparselearning.models.classifier import Classifier
from sparselearning.models.lenet import lenet5, lenet300_100
from sparselearning.models.vgg import vgg_c, vgg_d, vgg_like
from sparselearning.models.wide_resnet import wide_resnet

VGGS = {"C": vgg_c, "D": vgg_d, "like": vgg_like}


def AlexNet(
    config: str = "s", num_classes: int = 1000, save_features: bool = False, bench_model: bool = False
) -> Classifier:
    """Return `alexnet` with hidden layers of 1024 units ('s') or 2048 ('b')."""
    _refuse(save_features, bench_model)
    return alexnet(1024 if config == "s" else 2048, num_classes)


def VGG16(config: str, num_classes: int = 10, save_features: bool = False, bench_model: bool = False) -> Classifier:
    """Return `vgg_c` ('C'), `vgg_d` ('D') or `vgg_like` ('like')."""
    _refuse(save_features, bench_model)
    return VGGS[config](num_classes)


def LeNet_300_100(save_features: bool | None = None, bench_model: bool = False) -> Classifier:
    """Return `lenet300_100`."""
    _refuse(save_features, bench_model)
    return lenet300_100()


def LeNet_5_Caffe(save_features: bool | None = None, bench_model: bool = False) -> Classifier:
    """Return `lenet5`."""
    _refuse(save_features, bench_model)
    return lenet5()


def WideResNet(
    depth: int,
    widen_factor: int,
    num_classes: int = 10,
    dropRate: float = 0.3,
    save_features: bool = False,
    bench_model: bool = False,
) -> Classifier:
    """Return `wide_resnet`."""
    _refuse(save_features, bench_model)
    return wide_resnet(depth, widen_factor, dropRate, num_classes)


def _refuse(save_features, bench_model):
    for asked, flag in ((save_features, "--save-features"), (bench_model, "--bench")):
        if asked:
            raise ValueError(f"Models have no part in {flag} any more: mnist_cifar/main.py {flag} looks at any model.")
