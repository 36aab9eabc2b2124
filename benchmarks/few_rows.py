"""A multilayer perceptron on few rows: sparse layers, torch's dense layers, and torch's own sparse product (CSR).

    python benchmarks/few_rows.py
    python benchmarks/few_rows.py --quick

The network is 784-4096-4096-10 with ReLUs, float32, without gradients. The CSR product is torch.addmm of a
torch.sparse_csr weight and the rows, which lie channel by channel. The kinds take turns of 20 ms; ratios are medians
over rounds. Outputs are compared first.
"""

import itertools
import logging
import warnings

import common
import torch
from torch import Tensor, nn

from sparselearning.sparse import SparseLinear

SIZES = (784, 4096, 4096, 10)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
TURN = 0.02  # seconds


@torch.no_grad()
def network(density: float) -> nn.Sequential:
    """Return the dense network, with zeros."""
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(SIZES):
        layer = nn.Linear(inputs, outputs)
        layer.weight.mul_(torch.rand_like(layer.weight) < density)
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def sparse(dense: nn.Sequential) -> nn.Sequential:
    """Return the same network of sparse layers, which end in their ReLUs."""
    layers = [SparseLinear.from_dense(layer) for layer in dense if isinstance(layer, nn.Linear)]
    for layer in layers[:-1]:
        layer.relu = True
    return nn.Sequential(*layers)


class Compressed(nn.Module):
    """The same network by torch's own sparse product; rows lie channel by channel."""

    def __init__(self, dense: nn.Sequential):
        super().__init__()
        layers = [layer for layer in dense if isinstance(layer, nn.Linear)]
        self.weights = [(layer.weight.detach().to_sparse_csr(), layer.bias.detach()[:, None]) for layer in layers]

    def forward(self, x: Tensor) -> Tensor:
        x = x.t()
        for i, (weight, bias) in enumerate(self.weights):
            x = torch.addmm(bias, weight, x)
            x = x.relu_() if i < len(self.weights) - 1 else x
        return x.t()


@torch.inference_mode()
def main() -> None:
    """Measure, log and save."""
    args = common.parse(__doc__, rounds=15, density=(0.05, "of the weights"))
    warnings.filterwarnings("ignore", message="Sparse CSR")
    dense = network(args.density)
    kinds = {"dense": dense, "csr": Compressed(dense), "sparse": sparse(dense)}
    table = []
    for threads in sorted({1, args.threads}):
        torch.set_num_threads(threads)
        for count in ROWS[::3] if args.quick else ROWS:
            x = torch.randn(count, SIZES[0])
            for model in kinds.values():
                torch.testing.assert_close(model(x), dense(x), atol=1e-4, rtol=1e-4)
            calls = {kind: lambda model=model, x=x: model(x) for kind, model in kinds.items()}
            seconds = common.alternate(calls, args.rounds, least=TURN)
            row = {f"{kind}_ms": 1e3 * common.summary(values)["median"] for kind, values in seconds.items()}
            row |= {f"over_{kind}": common.ratio(seconds[kind], seconds["sparse"]) for kind in ("dense", "csr")}
            table.append(dict(rows=count, threads=threads, density=args.density, **row))
    common.save(args, "few_rows", table)
    for row in table:
        logging.info(
            "%(rows)4d rows, %(threads)d threads: %(sparse_ms).3f ms, dense %(over_dense).1fx, CSR %(over_csr).2fx", row
        )


if __name__ == "__main__":
    main()
