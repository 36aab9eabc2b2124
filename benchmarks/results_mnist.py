"""Test error on MNIST beside published numbers: sparse momentum and four other methods, or every method.

    python benchmarks/results_mnist.py                                   # what the paper's tables have
    python benchmarks/results_mnist.py --queue methods --models lenet300-100 --epochs 20
    nice -n 19 python benchmarks/results_mnist.py --workers 2 --hours 8  # goes on where it was stopped
    python benchmarks/results_mnist.py --report

Every finished run adds a line to results/runs_mnist.csv and its metrics to results/runs/. At the end, or at once with
--report, it writes tables to results/runs_mnist.md and two pictures for each model and number of epochs beside it.
"""

import sys

from campaign.runs import DENSE, Block, Campaign
from campaign.script import main

from sparselearning.methods import METHODS
from sparselearning.start.distributions import DISTRIBUTIONS

EPOCHS = 100
DECAY_STEPS = 25000  # steps between two decays of the learning rate in 100 epochs; proportional in shorter runs

# At the default learning rate some runs of LeNet-5 stay at chance, dense ones too. At a density of 1% all of ten begin
# to learn at half of it, rescaled (lenet5_starts.py). Weights chosen by a score pass the signal on without that.
FLAGS = {"lenet300-100": [], "lenet5": ["--lr", "0.05", "--rescale", "--sparse-backend", "cpu"]}
OF_DRAWN = {"--rescale", "--sparse-backend", "cpu"}  # for masks that are drawn and weights that are held as zeros


def flags(model: str, method: str, epochs: int) -> list[str]:
    """Return the flags of a run beside model, method, density, seed and epochs."""
    drawn = method != DENSE and METHODS[method].sparse_init in DISTRIBUTIONS and METHODS[method].weights == "zero"
    of_model = [flag for flag in FLAGS[model] if drawn or flag not in OF_DRAWN]
    if method != DENSE and METHODS[method].reset_state == "restart":  # its time steps are Adam's
        of_model = ["--optimizer", "adam", *of_model, "--lr", "0.001"]
    return ["--decay_frequency", str(DECAY_STEPS * epochs // EPOCHS), *of_model]


SMALL_DENSITIES = [0.01, 0.02, 0.03, 0.04, 0.05, 0.1]
QUEUES = {
    "paper": [
        Block("lenet300-100", ["sparse_momentum"], SMALL_DENSITIES, 5),
        Block("lenet5", ["sparse_momentum"], [0.01], 5),
        Block("lenet300-100", [DENSE], [1.0], 5),
        Block("lenet5", ["sparse_momentum"], [0.02, 0.05], 5),
        Block("lenet300-100", ["rigl", "set", "dsr", "deep_rewiring"], [0.01, 0.02, 0.05, 0.1], 3),
        Block("lenet5", [DENSE], [1.0], 5),
    ],
    "methods": [Block(model, [DENSE, *METHODS], [0.05, 0.01, 0.1, 0.02], 3) for model in FLAGS],
}

# Test error in %, and its standard error. Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840, and the
# results in the authors' code, TimDettmers/sparse_learning: first results/MNIST_compression_comparison_*.csv, then (of
# LeNet-300-100) results/MNIST_sparse_summary.csv, where the other methods are those of Mostafa & Wang 2019.
PUBLISHED = {
    "lenet300-100": {
        "sparse_momentum": {
            0.01: [(2.36, 0.044), (2.47, 0.047)],
            0.02: [(1.99, 0.019), (1.80, 0.018)],
            0.03: [(1.70, 0.055)],
            0.04: [(1.58, 0.023)],
            0.05: [(1.53, 0.02), (1.47, 0.033)],
            0.1: [(1.33, 0.026)],
        },
        "dsr": {0.01: [(2.46, 0.016)], 0.02: [(1.86, 0.064)], 0.05: [(1.68, 0.038)], 0.1: [(1.56, 0.045)]},
        "set": {0.01: [(4.20, 0.045)], 0.02: [(2.26, 0.071)], 0.05: [(1.86, None)], 0.1: [(1.61, 0.037)]},
        "deep_rewiring": {0.01: [(6.0, None)], 0.02: [(1.79, 0.135)], 0.05: [(1.94, 0.045)], 0.1: [(1.81, 0.045)]},
        DENSE: {1.0: [(1.34, 0.011), (1.31, 0.011)]},
    },
    "lenet5": {
        "sparse_momentum": {0.01: [(0.83, 0.04)], 0.02: [(0.76, 0.022)], 0.05: [(0.69, 0.021)]},
        DENSE: {1.0: [(0.58, 0.01)]},
    },
}

CAMPAIGN = Campaign("MNIST", "mnist", EPOCHS, QUEUES, flags, PUBLISHED)

if __name__ == "__main__":
    sys.exit(main(CAMPAIGN, __doc__))
