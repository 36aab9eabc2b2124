"""Wide residual networks for 32x32 colour images.

Zagoruyko and Komodakis, "Wide Residual Networks" (2016), https://arxiv.org/abs/1605.07146.
"""

from torch import Tensor, nn

from sparselearning.models.classifier import Classifier
from sparselearning.models.dropout import Dropout

INPUT_SHAPE = (3, 32, 32)


def wide_resnet(depth: int, factor: int, dropout: float = 0.3, classes: int = 10) -> Classifier:
    """Three groups of (depth - 4) / 6 blocks with 16, 32 and 64 times `factor` channels: WRN-depth-factor.

    Raises:
        ValueError: if `depth` is not 6n + 4 with n >= 1.
    """
    if depth < 10 or depth % 6 != 4:
        raise ValueError(f"The depth of a wide ResNet is 6n + 4 (10, 16, 22, 28, ...), got {depth}.")
    blocks = (depth - 4) // 6
    narrow, middle, wide = 16 * factor, 32 * factor, 64 * factor
    model = Classifier(
        INPUT_SHAPE,
        conv1=_conv(3, 16, 3),
        block1=_group(blocks, 16, narrow, stride=1, dropout=dropout),
        block2=_group(blocks, narrow, middle, stride=2, dropout=dropout),
        block3=_group(blocks, middle, wide, stride=2, dropout=dropout),
        bn1=nn.BatchNorm2d(wide),
        relu=nn.ReLU(),
        pool=nn.AdaptiveAvgPool2d(1),
        flatten=nn.Flatten(),
        fc=nn.Linear(wide, classes),
    )
    _initialize(model)
    return model


class PreactivationBlock(nn.Module):
    """Two 3x3 convolutions, each after batch normalisation and ReLU, added to the input.

    If the block changes the width, a 1x1 convolution of the normalised and rectified input replaces the input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, dropout: float):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.relu1 = nn.ReLU()
        self.conv1 = _conv(inputs, outputs, 3, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.dropout = Dropout(dropout)
        self.conv2 = _conv(outputs, outputs, 3)
        self.shortcut = None if inputs == outputs else _conv(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Return features [N, outputs, H / stride, W / stride] of features [N, inputs, H, W]."""
        activated = self.relu1(self.bn1(x))
        residual = self.relu2(self.bn2(self.conv1(activated)))
        residual = self.conv2(self.dropout(residual))
        return residual + (x if self.shortcut is None else self.shortcut(activated))


def _group(blocks: int, inputs: int, outputs: int, stride: int, dropout: float) -> nn.Sequential:
    first = PreactivationBlock(inputs, outputs, stride, dropout)
    return nn.Sequential(first, *[PreactivationBlock(outputs, outputs, 1, dropout) for _ in range(blocks - 1)])


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


def _initialize(model: nn.Module) -> None:
    """He initialisation that keeps the variance of the gradients, std sqrt(2 / (k * k * outputs))."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
