"""The networks of main.py: their names, how they are built and sharded, and how many of their weights have masks."""

import argparse

import torch
from torch import nn

from sparselearning.experiments.data.files import DataError
from sparselearning.models.resnet import RESNETS
from sparselearning.start.maskable import maskable_parameters, usual_exceptions
from sparselearning.start.masks import first_dense
from sparselearning.start.names import named

FAN = {"classic": "fan_out", "fanin": "fan_in"}
WITHOUT_BOTTLENECK = ("resnet18", "resnet34")


def architecture(text):
    """Parse the name of a network; what follows `torchvision:` or `timm:` may have colons of its own."""
    library, colon, name = text.partition(":")
    if not (name and library in LIBRARIES if colon else text in RESNETS):
        expected = f"{', '.join(RESNETS)}, torchvision:NAME or timm:NAME"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return text


def build_model(args, classes):
    """Return the network that the arguments ask for, freshly initialised; it maps images to logits [N, classes]."""
    if args.model in RESNETS:
        return RESNETS[args.model](classes, stride_in=args.stride_in, fan=FAN[args.model_config])
    library, _, name = args.model.partition(":")
    try:
        model = LIBRARIES[library](name, classes, args.image_size)
        output = model.eval()(torch.zeros(1, 3, args.image_size, args.image_size))
    except ImportError as error:
        raise DataError(f"--arch {args.model} needs {library}: pip install {library} ({error}).") from None
    except Exception as error:  # the libraries raise many types for a name or a size they do not know
        shape = f"{args.image_size}x{args.image_size}"
        raise DataError(f"--arch {args.model} cannot be built for images of {shape}: {error}") from None
    if not isinstance(output, torch.Tensor) or output.shape != (1, classes):
        raise DataError(f"--arch {args.model} is no classifier: it gives no logits of shape [N, {classes}].")
    return model


def of_torchvision(name, classes, size):
    """Return a network of torchvision for images of `size` pixels a side, with one output in training too."""
    from torchvision.models import get_model

    more = dict(aux_logits=False, init_weights=True) if name.lower() in ("googlenet", "inception_v3") else {}
    if name.lower().startswith("vit_"):  # its position embedding has an entry for each patch
        more = dict(image_size=size)
    if name.lower().startswith("maxvit"):
        more = dict(input_size=(size, size))
    return get_model(name, weights=None, num_classes=classes, **more)


def of_timm(name, classes, size):
    """Return a network of timm for images of `size` pixels a side; those whose weights depend on it take img_size."""
    from timm import create_model

    try:
        return create_model(name, num_classes=classes, img_size=size)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
        return create_model(name, num_classes=classes)


LIBRARIES = {"torchvision": of_torchvision, "timm": of_timm}


def shard(model):
    """Shard the model among the processes, block by block."""
    from torch.distributed.fsdp import fully_shard

    for stage in model.children():
        for block in stage.children() if isinstance(stage, nn.Sequential | nn.ModuleList) else []:
            fully_shard(block)
    fully_shard(model)


def density_of_masked(args, model):
    """Return the density of the weights that have masks at which --density of all parameters are active.

    Raises:
        ValueError: if the parameters without masks are more than that.
    """
    weights = {name: weight.numel() for name, weight in maskable_parameters(model, sparse=args.sparse_layers)}
    dense = named(list(weights), first_dense(args.dense_layers, args.sparse_init)[0], usual_exceptions(model))
    masked = sum(size for name, size in weights.items() if name not in dense)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    density = 1 - (1 - args.density) * parameters / max(masked, 1)
    if density <= 0:
        raise ValueError(
            f"--density {args.density} of the network cannot be reached: the layers that stay dense are "
            f"{1 - masked / parameters:.4f} of it. Ask for more, or name fewer --dense-layers."
        )
    return density
