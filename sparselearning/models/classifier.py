"""The class of the image classifiers for 28x28 and 32x32 images: named layers in a row, then a log-softmax."""

from collections import OrderedDict

from torch import Tensor, nn


class Classifier(nn.Sequential):
    """Maps images [N, *input_shape] through `layers`, in their order, to log-probabilities [N, classes]."""

    def __init__(self, input_shape: tuple[int, int, int], **layers: nn.Module):
        super().__init__()
        self.input_shape = input_shape
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.log_softmax = nn.LogSoftmax(dim=1)

    def __getitem__(self, index):  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return a layer, or for a slice an nn.Sequential of several, which takes what they take."""
        return nn.Sequential(OrderedDict(self.named_children()))[index]

    def forward(self, images: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Return log-probabilities [N, classes] of images [N, C, H, W].

        Raises:
            ValueError: if the images do not have the shape `input_shape`.
        """
        if images.ndim != 4 or images.shape[1:] != self.input_shape:
            raise ValueError(
                f"This model takes images of shape [N, {', '.join(map(str, self.input_shape))}], "
                f"got {list(images.shape)}. Resize them, or choose a model made for them."
            )
        return super().forward(images)
