"""ResNet-18 to ResNet-152 for ImageNet, with torchvision's parameter names.

He, Zhang, Ren and Sun, "Deep Residual Learning for Image Recognition" (2016), https://arxiv.org/abs/1512.03385.
"""

from functools import partial
from typing import Literal

from torch import Tensor, nn

# Blocks in each of the four stages, whose widths are 64, 128, 256 and 512.
STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
StrideIn = Literal["3x3", "1x1"]


class ResNet(nn.Module):
    """Maps images [N, 3, H, W] to logits [N, classes]; those of ImageNet are 224x224.

    With 50 layers or more the blocks are bottlenecks. `stride_in` chooses their convolution that halves the image: the
    3x3 one (torchvision's ResNet, also called v1.5) or the first 1x1 one (v1, as published). Convolutions start from a
    normal distribution of variance 2 / fan; the fan counts outputs (the default) or inputs. With `zero_init` the last
    normalisation of a block starts at 0, so that each block begins as the identity (Goyal et al. 2017,
    https://arxiv.org/abs/1706.02677).

    Raises:
        ValueError: for an unknown depth or option, or `stride_in="1x1"` if the blocks have no 1x1 convolution.
    """

    def __init__(
        self,
        depth: int,
        classes: int = 1000,
        *,
        stride_in: StrideIn = "3x3",
        fan: Literal["fan_out", "fan_in"] = "fan_out",
        zero_init: bool = False,
    ):
        super().__init__()
        _check(depth, stride_in, fan)
        self.conv1 = _conv(3, 64, 7, stride=2)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        channels = 64
        for i, blocks in enumerate(STAGES[depth]):
            stage = nn.Sequential()
            for j in range(blocks):
                stride = 2 if i > 0 and j == 0 else 1
                block = _block(depth, channels, 64 * 2**i, stride, stride_in)
                channels = block.outputs
                stage.append(block)
            self.add_module(f"layer{i + 1}", stage)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(channels, classes)
        _initialize(self, fan, zero_init)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits [N, classes] of images [N, 3, H, W].

        Raises:
            ValueError: if the images do not have this shape.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"This model takes images of shape [N, 3, H, W], got {list(images.shape)}.")
        for layer in self.children():
            images = layer(images)
        return images


class BasicBlock(nn.Module):
    """Two 3x3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.outputs = width
        self.conv1 = _conv(inputs, width, 3, stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(width, width, 3)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = _shortcut(inputs, self.outputs, stride)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return features [N, outputs, H / stride, W / stride] of features [N, inputs, H, W]."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return self.relu2(y + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(nn.Module):
    """A 3x3 convolution of `width` channels between two 1x1 ones, the last four times as wide, beside a shortcut."""

    def __init__(self, inputs: int, width: int, stride: int, stride_in: StrideIn):
        super().__init__()
        self.outputs = 4 * width
        first, second = (1, stride) if stride_in == "3x3" else (stride, 1)
        self.conv1 = _conv(inputs, width, 1, first)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(width, width, 3, second)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = _conv(width, self.outputs, 1)
        self.bn3 = nn.BatchNorm2d(self.outputs)
        self.downsample = _shortcut(inputs, self.outputs, stride)
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Return features [N, outputs, H / stride, W / stride] of features [N, inputs, H, W]."""
        y = self.relu1(self.bn1(self.conv1(x)))
        y = self.relu2(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu3(y + (x if self.downsample is None else self.downsample(x)))


def _block(depth: int, inputs: int, width: int, stride: int, stride_in: StrideIn) -> BasicBlock | Bottleneck:
    return BasicBlock(inputs, width, stride) if depth < 50 else Bottleneck(inputs, width, stride, stride_in)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(_conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _initialize(model: nn.Module, fan: Literal["fan_out", "fan_in"], zero_init: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode=fan, nonlinearity="relu")
        elif zero_init and isinstance(module, BasicBlock):
            nn.init.zeros_(module.bn2.weight)
        elif zero_init and isinstance(module, Bottleneck):
            nn.init.zeros_(module.bn3.weight)


def _check(depth: int, stride_in: str, fan: str) -> None:
    if depth not in STAGES:
        raise ValueError(f"Unknown depth {depth}. Choose from {', '.join(map(str, STAGES))}.")
    if stride_in not in ("3x3", "1x1"):
        raise ValueError(f"Unknown stride_in {stride_in!r}. Choose '3x3' or '1x1'.")
    if stride_in == "1x1" and depth < 50:
        raise ValueError(f"ResNet-{depth} has no 1x1 convolution in its blocks. Use stride_in='3x3'.")
    if fan not in ("fan_out", "fan_in"):
        raise ValueError(f"Unknown fan {fan!r}. Choose 'fan_out' or 'fan_in'.")


resnet18 = partial(ResNet, 18)
resnet34 = partial(ResNet, 34)
resnet50 = partial(ResNet, 50)
resnet101 = partial(ResNet, 101)
resnet152 = partial(ResNet, 152)

RESNETS = {
    "resnet18": resnet18,
    "resnet34": resnet34,
    "resnet50": resnet50,
    "resnet101": resnet101,
    "resnet152": resnet152,
}
