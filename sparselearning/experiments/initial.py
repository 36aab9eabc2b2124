"""What --sparse-init, --density, --layer-density, --dense-layers and --pattern mean to `Masking.add_module`."""

import argparse
from collections.abc import Callable
from typing import Any

from torch import nn

from sparselearning.before_training import Batches, grasp, load_masks, snip, synflow


def choice_of_weights(
    args: argparse.Namespace, model: nn.Module, batches: Callable[[], Batches] | None = None
) -> dict[str, Any]:
    """Return the arguments of `add_module` that say how many weights stay, and which.

    `batches` returns images and labels, and is called where scores need them; None for a run that goes on, whose
    masks are in its checkpoint.

    Raises:
        FileNotFoundError, CheckpointError: if --sparse-init mask:PATH names no file of masks.
    """
    density = {**args.layer_density, "*": args.density} if args.layer_density else args.density
    sparse_init, _, path = args.sparse_init.partition(":")
    if sparse_init == "mask":
        sparse_init = load_masks(path) if batches else "constant"
    elif sparse_init in ("snip", "grasp"):
        score = {"snip": snip, "grasp": grasp}[sparse_init]
        sparse_init = score(model, batches()) if batches else "constant"
    elif sparse_init == "synflow":
        sparse_init = synflow(model, batches()[0][0], density, args.dense_layers) if batches else "constant"
    return dict(density=density, sparse_init=sparse_init, dense=args.dense_layers, pattern=args.pattern)
