"""VGG for 32x32 colour images with batch normalisation, after Lee et al., "SNIP" (2019).

https://arxiv.org/abs/1810.02340; the networks are those of Simonyan and Zisserman (2015),
https://arxiv.org/abs/1409.1556.
"""

from torch import nn

from sparselearning.models.classifier import Classifier

INPUT_SHAPE = (3, 32, 32)
# Five stages of convolutions (output channels, kernel size); each stage ends with a 2x2 max-pool.
STAGES_C = [
    [(64, 3), (64, 3)],
    [(128, 3), (128, 3)],
    [(256, 3), (256, 3), (256, 1)],
    [(512, 3), (512, 3), (512, 1)],
    [(512, 3), (512, 3), (512, 1)],
]
STAGES_D = [[(channels, 3) for channels, _ in stage] for stage in STAGES_C]


def vgg_c(classes: int = 10) -> Classifier:
    """13 convolutions; the last of each large stage is 1x1 and padded, so that 2x2 pixels remain at the end."""
    return _vgg(STAGES_C, [4 * 512, 512, 512], classes)


def vgg_d(classes: int = 10) -> Classifier:
    """13 convolutions of 3x3 and three fully connected layers, known as VGG-16."""
    return _vgg(STAGES_D, [512, 512, 512], classes)


def vgg_like(classes: int = 10) -> Classifier:
    """VGG-D with one hidden layer less."""
    return _vgg(STAGES_D, [512, 512], classes)


def _vgg(stages: list[list[tuple[int, int]]], widths: list[int], classes: int) -> Classifier:
    features: list[nn.Module] = []
    inputs = 3
    for stage in stages:
        for outputs, kernel in stage:
            features += [nn.Conv2d(inputs, outputs, kernel, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            inputs = outputs
        features.append(nn.MaxPool2d(2))
    hidden: list[nn.Module] = []
    for i in range(len(widths) - 1):
        hidden += [nn.Linear(widths[i], widths[i + 1]), nn.ReLU(), nn.BatchNorm1d(widths[i + 1])]
    return Classifier(
        INPUT_SHAPE,
        features=nn.Sequential(*features),
        flatten=nn.Flatten(),
        classifier=nn.Sequential(*hidden, nn.Linear(widths[-1], classes)),
    )
