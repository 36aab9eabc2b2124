"""LeNet-300-100 and LeNet-5 for 28x28 grey images.

LeCun, Bottou, Bengio and Haffner, "Gradient-based learning applied to document recognition" (1998).
LeNet-5 has the widths and the ReLU of Caffe's example, as is usual in papers on pruning.
"""

from torch import nn

from sparselearning.models.classifier import Classifier

INPUT_SHAPE = (1, 28, 28)


def lenet300_100(classes: int = 10) -> Classifier:
    """Three fully connected layers, 784-300-100-classes."""
    return Classifier(
        INPUT_SHAPE,
        flatten=nn.Flatten(),
        fc1=nn.Linear(28 * 28, 300),
        relu1=nn.ReLU(),
        fc2=nn.Linear(300, 100),
        relu2=nn.ReLU(),
        fc3=nn.Linear(100, classes),
    )


def lenet5(classes: int = 10) -> Classifier:
    """Two convolutions without padding, then two fully connected layers."""
    return Classifier(
        INPUT_SHAPE,
        conv1=nn.Conv2d(1, 20, kernel_size=5),  # 28 -> 24
        relu1=nn.ReLU(),
        pool1=nn.MaxPool2d(2),  # 12
        conv2=nn.Conv2d(20, 50, kernel_size=5),  # 8
        relu2=nn.ReLU(),
        pool2=nn.MaxPool2d(2),  # 4
        flatten=nn.Flatten(),
        fc3=nn.Linear(50 * 4 * 4, 500),
        relu3=nn.ReLU(),
        fc4=nn.Linear(500, classes),
    )
