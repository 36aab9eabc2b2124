"""Layers on sparse kernels against torch's dense ones, forward and forward plus backward.

    python benchmarks/sparse_layers.py
    python benchmarks/sparse_layers.py --quick
    SPARSELEARNING_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 ATEN_CPU_CAPABILITY=avx2 \\
        python benchmarks/sparse_layers.py --output results/sparse_layers-avx2.json

Dense is the faster of contiguous and channels_last, float32. Both take activations in the memory order that they
give them in: the sparse layer gets the batch last, as from a sparse layer before it; 'from_nchw_ms' adds the turn.
The kinds take turns of 20 ms; a ratio is the median over rounds of dense over sparse, printed last. 'alone' is the same
with a single call a turn, which finds in the caches what the other kinds left. Where SparseProp (pip install
sparseprop) is installed it is measured too, up to density 0.05 (above it takes seconds a call).
"""

import importlib.util
import logging

import common
import torch
from torch import nn

from sparselearning.sparse import SparseConv2d, SparseLinear
from sparselearning.sparse.memory_order import in_order, is_batch_last

CONVOLUTIONS = [(64, 32), (128, 16), (256, 8), (512, 4)]  # channels, height and width; 3x3, padding 1
LINEARS = [1024, 4096]
DENSITIES = [0.2, 0.1, 0.05, 0.02]
TURN = 0.02  # seconds


def main():
    """Measure, log and save."""
    args = common.parse(__doc__, rounds=15, images=(32, "images per call of a convolution"), rows=(128, "of a linear"))
    threads = [args.threads] if args.quick or args.threads == 1 else [1, args.threads]
    densities = [0.05] if args.quick else DENSITIES
    rows = []
    for count in threads:
        torch.set_num_threads(count)
        for density in densities:
            for channels, size in CONVOLUTIONS:
                rows.append(measure_convolution(args, channels, size, density) | dict(threads=count))
            for features in LINEARS[: 1 if args.quick else None]:
                rows.append(measure_linear(args, features, density) | dict(threads=count))
    common.save(args, "sparse_layers", rows)
    for row in rows:
        logging.info(
            "%-11s density %.2f  %d threads: forward %5.1fx (alone %.1fx)  and back %5.1fx (%.1fx)  over SparseProp %s",
            *(row[key] for key in ("layer", "density", "threads", "forward", "forward_alone", "both", "both_alone")),
            "  ".join(f"{row[key]:.1f}x" for key in row if key.endswith("over_sparseprop")) or "not measured",
        )


def measure_convolution(args, channels, size, density):
    """Return times and ratios of one convolution."""
    layer = nn.Conv2d(channels, channels, 3, padding=1)
    x = torch.randn(args.images, channels, size, size)
    last = nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last)
    prune(layer, density)
    last.load_state_dict(layer.state_dict())
    sparse = SparseConv2d.from_dense(layer)
    kinds = {
        "contiguous": (layer, x),
        "channels_last": (last, x.to(memory_format=torch.channels_last)),
        "sparse": (sparse, in_order(x, is_batch_last(len(x)))),
        "from_nchw": (sparse, x),
    }
    return measure(args, f"conv {channels}@{size}", density, kinds)


def measure_linear(args, features, density):
    """Return times and ratios of one linear layer."""
    layer = nn.Linear(features, features)
    prune(layer, density)
    sparse = SparseLinear.from_dense(layer)
    x = torch.randn(args.rows, features)
    ready = in_order(x, is_batch_last(len(x)))
    kinds = {"contiguous": (layer, x), "sparse": (sparse, ready), "from_nchw": (sparse, x)}
    return measure(args, f"linear {features}", density, kinds)


def measure(args, name, density, kinds):
    """Return median milliseconds of each kind, and by how much sparse is faster than the faster dense one."""
    row = dict(layer=name, density=density)
    if importlib.util.find_spec("sparseprop") and density <= 0.05:
        dense, x = kinds["contiguous"]
        kinds |= {f"sparseprop_{i}": (layer, x) for i, layer in enumerate(peers(dense))}
    for part, call in (("forward", forward), ("both", both)):
        calls = {kind: call(layer, x) for kind, (layer, x) in kinds.items()}
        seconds = common.alternate(calls, args.rounds, least=TURN)
        common.show(f"{name} {density} {part}", seconds)
        row |= {f"{part}_{kind}_ms": 1e3 * common.summary(values)["median"] for kind, values in seconds.items()}
        dense = fastest(seconds, "contiguous", "channels_last")
        row[part] = common.ratio(dense, seconds["sparse"])
        row[f"{part}_from_nchw"] = common.ratio(dense, seconds["from_nchw"])
        if peer := fastest(seconds, "sparseprop_0", "sparseprop_1"):
            row[f"{part}_over_sparseprop"] = common.ratio(peer, seconds["sparse"])
        alone = common.alternate({kind: call for kind, call in calls.items() if "prop" not in kind}, args.rounds)
        row[f"{part}_alone"] = common.ratio(fastest(alone, "contiguous", "channels_last"), alone["sparse"])
    return row


def fastest(seconds, *kinds):
    """Return the shortest time of each round among those of these kinds that were measured."""
    return [min(turn) for turn in zip(*(seconds[kind] for kind in kinds if kind in seconds), strict=True)]


def forward(layer, x):
    """Return a call of the layer without gradients."""

    @torch.no_grad()
    def call():
        layer(x)

    return call


def both(layer, x):
    """Return a call of the layer and of its backward pass, for its weights and its input."""
    x = x.detach().requires_grad_()
    with torch.no_grad():
        dy = torch.ones_like(layer(x))

    def call():
        torch.autograd.grad(layer(x), [x, *layer.parameters()], dy)

    return call


@torch.no_grad()
def prune(layer, density):
    """Keep a random share of the weights."""
    layer.weight.mul_(torch.rand_like(layer.weight) < density)


def peers(layer):
    """Return SparseProp's forms of a dense layer with zeros: its convolution has two ways to vectorise."""
    from sparseprop.modules import SparseConv2d as PeerConv2d
    from sparseprop.modules import SparseLinear as PeerLinear

    if isinstance(layer, nn.Linear):
        return [PeerLinear.from_dense(layer)]
    return [PeerConv2d.from_dense(layer, vectorizing_over_on=over) for over in (False, True)]


if __name__ == "__main__":
    main()
