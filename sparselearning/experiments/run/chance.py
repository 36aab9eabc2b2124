"""Whether a run learns at all: its training loss beside the loss of guessing."""

import argparse
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

# A network that is stuck guesses the frequencies of the classes: LeNet-5 at a density of 1% had losses of 2.303 and
# 2.302 in its first epochs of MNIST, where log(10) = 2.303. One that learnt, slowly, had 1.96 and 0.30.
MARGIN = 0.01
EPOCHS = 2
STEPS = 200  # short epochs may end where they began: on digits (13 steps) LeNet-5 leaves chance after 65 to 130 steps

logger = logging.getLogger(__name__)


def at_chance(results: Mapping[str, float], classes: int, l1: float = 0.0) -> bool:
    """Tell whether the losses of an epoch are at least 0.99 log(classes), as if the network guessed.

    A network that gives every class the same probability has the loss log(classes), whatever the labels, smoothed or
    mixed ones too. Every higher loss counts: the network does worse than a guess.

    Args:
        results: "train_loss", and perhaps "valid_loss".
        l1: the factor of a penalty in the training loss. Where there is one, the validation loss decides; without that
            the answer is False.
    """
    loss = results.get("valid_loss", 0.0) if l1 else results["train_loss"]
    return loss >= (1 - MARGIN) * math.log(classes)


def warn_at_chance(metrics: Sequence[Mapping[str, Any]], args: argparse.Namespace, classes: int) -> None:
    """Log a warning if all epochs were at chance, when 2 epochs and 200 steps have just been reached.

    The records of the run decide, which its checkpoints hold: a run that goes on neither repeats nor loses the warning.
    """
    epochs = [record for record in metrics if "train_loss" in record]
    seen_enough = [count >= EPOCHS and record["steps"] >= STEPS for count, record in enumerate(epochs, start=1)]
    if seen_enough.count(True) == 1 and all(record.get("at_chance") for record in epochs):
        logger.warning(
            "WARNING: the training loss is still at chance after %d epochs: %.4f, and guessing among %d classes gives "
            "%.4f. The network may never learn. What helps: %s.",
            *(len(epochs), epochs[-1]["train_loss"], classes, math.log(classes), "; ".join(remedies(args))),
        )


def remedies(args: argparse.Namespace) -> list[str]:
    """Return what may help a run with these arguments that does not begin to learn.

    Of ten runs of LeNet-5 at a density of 1%, all learn at half the learning rate with --rescale, or with
    Erdos-Renyi-kernel; neither is enough alone (benchmarks/lenet5_starts.py).
    """
    lower = f"a lower --lr than {args.lr:g}"
    if args.dense:
        return [lower]
    together = []
    if not args.rescale and args.inactive == "zero":
        together.append("--rescale, where masks are drawn at random")
    if args.sparse_init != "erdos_renyi_kernel":
        together.append("--sparse-init erdos_renyi_kernel, which keeps more weights in small layers")
    lower += ", together with " * bool(together) + ", or with ".join(together)
    return [lower, f"a higher --density than {args.density:g}"]
