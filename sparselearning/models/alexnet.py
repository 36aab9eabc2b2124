"""AlexNet for 32x32 colour images, after Lee et al., "SNIP" (2019), https://arxiv.org/abs/1810.02340."""

from torch import nn

from sparselearning.models.classifier import Classifier

INPUT_SHAPE = (3, 32, 32)
# in, out, kernel size, padding; every convolution has stride 2: 32 -> 13 -> 7 -> 4 -> 2 -> 1
CONVOLUTIONS = [(3, 96, 11, 2), (96, 256, 5, 2), (256, 384, 3, 1), (384, 384, 3, 1), (384, 256, 3, 1)]


def alexnet(width: int, classes: int = 10) -> Classifier:
    """Five strided convolutions, two hidden layers of `width` units: 1024 in AlexNet-s, 2048 in AlexNet-b."""
    features = []
    for inputs, outputs, kernel, padding in CONVOLUTIONS:
        features += [
            nn.Conv2d(inputs, outputs, kernel, stride=2, padding=padding),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
        ]
    return Classifier(
        INPUT_SHAPE,
        features=nn.Sequential(*features),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(
            *[nn.Linear(256, width), nn.BatchNorm1d(width), nn.ReLU()],
            *[nn.Linear(width, width), nn.BatchNorm1d(width), nn.ReLU()],
            nn.Linear(width, classes),
        ),
    )
