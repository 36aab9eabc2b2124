"""A sparse linear layer that trains: ours and SparseLab's, forward and backward.

    PYTHONPATH=DIR python benchmarks/sparselab_layers.py       # pip install --no-deps --target DIR sparselab==0.2.2

Both take turns in one process, on the same number of active weights. Printed are milliseconds and their median ratio.
"""

import logging
import statistics
import time

import common
import torch

from sparselearning import Masking

SHAPES = [(384, 1536, 0.1), (640, 2560, 0.1), (768, 3072, 0.1), (640, 1920, 0.3)]  # inputs, outputs, density
BATCHES = (1024, 2048)


def main():
    """Measure, log and save."""
    import sparselab

    args = common.parse(__doc__, rounds=15)
    rows = []
    for inputs, outputs, density in SHAPES:
        for batch in BATCHES[:1] if args.quick else BATCHES:
            x = torch.randn(batch, inputs, requires_grad=True)
            theirs = sparselab.SparseLinear(inputs, outputs, sparsity=1 - density)
            layers = {"ours": ours(inputs, outputs, density), "SparseLab": theirs}
            dy = torch.randn(batch, outputs)
            steps = {name: step_of(layer, x, dy) for name, layer in layers.items()}
            seconds = {name: [] for name in steps}
            for _ in range(args.rounds + 2):
                for name, step in steps.items():
                    started = time.perf_counter()
                    step()
                    seconds[name].append(time.perf_counter() - started)
            pairs = zip(seconds["SparseLab"][2:], seconds["ours"][2:], strict=True)
            row = dict(inputs=inputs, outputs=outputs, density=density, batch=batch)
            row |= {name: 1000 * statistics.median(times[2:]) for name, times in seconds.items()}
            row["ratio"] = statistics.median(other / own for other, own in pairs)
            rows.append(row)
            logging.info(
                "%(inputs)d x %(outputs)d, %(density)s, %(batch)d rows: ours %(ours).2f ms, SparseLab %(SparseLab).2f "
                "ms, ratio %(ratio).2f",
                row,
            )
    common.save(args, "sparselab_layers", rows)


def ours(inputs, outputs, density):
    """Return a layer that holds its active weights alone."""
    layer = torch.nn.Linear(inputs, outputs)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    masking = Masking(optimizer, None, growth_mode="random", redistribution_mode="none", weights="sparse")
    masking.add_module(layer, density)
    return layer


def step_of(layer, x, dy):
    """Return a function that runs the layer forward and backward."""

    def step():
        layer.zero_grad()
        x.grad = None
        layer(x).backward(dy)

    return step


if __name__ == "__main__":
    main()
