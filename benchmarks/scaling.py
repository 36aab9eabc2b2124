"""Growth of the time and memory of an update with the number of weights and with the density.

    python benchmarks/scaling.py
    python benchmarks/scaling.py --largest 1e8
    python benchmarks/scaling.py --quick

Layers have at most 2^26 weights, with random weights and momenta and no gradients. The exponent is the slope of a line
fitted to the logarithms; 1 means linear. Memory is what an update uses beside weights, momenta and masks. It grows with
the largest layer: the last row is a single layer with a third of the largest number of weights.
"""

import gc
import logging

import common
import numpy as np
import torch
from torch import nn

from sparselearning import CosineDecay, Masking

LAYER = 1 << 26
DENSITIES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)


def main():
    """Measure, log and save."""
    args = common.parse(__doc__, rounds=5, largest=(1e9, "weights in the largest network"))
    args.largest = 1e5 if args.quick else args.largest
    sizes = [round(10 ** (half / 2)) for half in range(10, 19) if 10 ** (half / 2) <= args.largest * 1.001]
    rows = [measure(args, size, 0.05) for size in sizes]
    linear = [row for row in rows if row["weights"] >= 1e6]
    if len(linear) > 1:
        log_exponent(linear, "weights")
    by_density = [measure(args, min(sizes[-1], 31_622_776), density) for density in DENSITIES]
    log_exponent(by_density, "density")
    alone = measure(args, sizes[-1] // 3, 0.05, largest_layer=sizes[-1])
    common.save(args, "scaling", [*rows, *by_density, alone])


def measure(args, size, density, largest_layer=LAYER):
    """Return a row: the update of a network of `size` weights."""
    gc.collect()
    masking = network(args.device, size, density, largest_layer)
    memory = common.peak_memory(masking.truncate_weights, args.device)
    rounds = args.rounds if size < 1e8 else 2
    seconds = common.alternate(
        {"update": masking.truncate_weights}, rounds, device=args.device, prepare=lambda: rewrite(masking)
    )
    common.show(f"{size:.3g} weights, density {density}", seconds)
    logging.info("%-32s peak extra memory %.2f GiB, %.2f bytes per weight", "", memory / 2**30, memory / size)
    return {
        "weights": size,
        "layers": len(masking.layers),
        "density": density,
        "seconds": common.summary(seconds["update"]),
        "peak extra bytes": memory,
        "peak extra bytes per weight": memory / size,
    }


def network(device, size, density, largest_layer):
    """Return a Masking of layers without gradients, with random momenta."""
    parts = -(-size // largest_layer)
    sizes = [size // parts] * (parts - 1)
    weights = nn.ParameterList(torch.empty(1, n, device=device) for n in [*sizes, size - sum(sizes)])
    optimizer = torch.optim.SGD(weights, lr=0.1, momentum=0.9)
    masking = Masking(optimizer, CosineDecay(0.5, 100))
    masking.add_module(weights, density, sparse=["*"])
    rewrite(masking)
    for weight in weights:
        optimizer.state[weight]["momentum_buffer"] = torch.randn_like(weight)
    return masking


@torch.no_grad()
def rewrite(masking):
    """Give all active weights new values, as training would."""
    for layer in masking.layers:
        layer.weight.normal_()
    masking.apply_mask()


def log_exponent(rows, what):
    """Log the exponent of the time as a power of `what`, a column of the rows."""
    times = [row["seconds"]["median"] for row in rows]
    exponent = np.polyfit(np.log([row[what] for row in rows]), np.log(times), 1)[0]
    logging.info("seconds = constant * %s ^ %.3f", what, exponent)
    for row in rows:
        row[f"exponent in {what}"] = exponent


if __name__ == "__main__":
    main()
