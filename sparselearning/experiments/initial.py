"""What --sparse-init, --density, --layer-density and --dense-layers mean to `Masking.from_method`."""

import argparse
from collections.abc import Callable
from typing import Any

from sparselearning.before_training import SCORES, Batches, load_masks


def choice_of_weights(args: argparse.Namespace, batches: Callable[[], Batches] | None = None) -> dict[str, Any]:
    """Return the arguments of `from_method` that say how many weights stay, and which.

    `batches` returns images and labels, and is called where scores need them; None for a run that goes on, whose
    masks are in its checkpoint.

    Raises:
        FileNotFoundError, CheckpointError: if --sparse-init mask:PATH names no file of masks.
    """
    density = {**args.layer_density, "*": args.density} if args.layer_density else args.density
    chosen = dict(density=density, sparse_init=args.sparse_init, dense=args.dense_layers)
    kind, _, path = args.sparse_init.partition(":")
    if batches is None:
        chosen["sparse_init"] = "constant" if kind in (*SCORES, "mask") else args.sparse_init
    elif kind == "mask":
        chosen["sparse_init"] = load_masks(path)
    elif kind in SCORES:
        chosen["batches"] = batches()
    return chosen
