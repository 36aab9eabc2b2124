"""A path of release 1.0, from which its script imports the loaders of its data sets and the features of classes."""

from sparselearning.experiments.release_1_0 import (
    get_cifar10_dataloaders,
    get_mnist_dataloaders,
    plot_class_feature_histograms,
)

__all__ = ["get_cifar10_dataloaders", "get_mnist_dataloaders", "plot_class_feature_histograms"]
