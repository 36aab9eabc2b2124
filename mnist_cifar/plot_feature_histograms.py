"""Compare the class specialisation of convolutional channels between a dense and a sparse run.

    python main.py --data cifar --model alexnet-s --dense --save-features
    python main.py --data cifar --model alexnet-s --density 0.1 --save-features
    python plot_feature_histograms.py runs/<dense run>/features.npz runs/<sparse run>/features.npz --out pictures

The specialisation of a channel is the share of its most frequent class in its total activation: 0.1 if it prefers none
of 10 classes, 1 if it reacts to only one. The weakest channels, which together hold 5% of a layer's activation, are
left out. Prints the median per layer and writes feature_histograms.png.
"""

import argparse
import sys
from pathlib import Path

from tabulate import tabulate

from sparselearning.experiments.report import features, plots


def parse_arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, metavar="DENSE.npz", help="features.npz of the dense run")
    parser.add_argument("sparse", type=Path, metavar="SPARSE.npz", help="features.npz of the sparse run")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR", help="folder of the picture (default: .)")
    return parser.parse_args(argv)


def load_both(dense_path, sparse_path):
    """Return the activations of both runs, each {layer name: [channels, classes]}.

    Raises:
        ValueError: if a file cannot be read, or the runs are not of the same model.
    """
    dense, sparse = features.load(dense_path), features.load(sparse_path)
    shapes = [{name: tuple(layer.shape) for name, layer in counts.items()} for counts in (dense, sparse)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"{dense_path} and {sparse_path} are not of the same model: {describe(dense)} and {describe(sparse)}. "
            "Pass features of two runs with the same --model."
        )
    return dense, sparse


def describe(counts):
    return f"{len(counts)} layers with {sum(len(layer) for layer in counts.values())} channels"


def median_table(dense, sparse):
    """Return a table of the median specialisation per layer, and the number of channels that are not left out."""
    rows = []
    for name in dense:
        row = [name]
        for counts in (dense[name], sparse[name]):
            values = features.specialisation(counts)
            row += [f"{values.quantile(0.5):.4f}" if len(values) else "-", f"{len(values)}/{len(counts)}"]
        rows.append(row)
    headers = ["layer", "dense median", "channels", "sparse median", "channels"]
    return tabulate(rows, headers, disable_numparse=True)


def main(argv=None):
    args = parse_arguments(argv)
    picture = args.out / "feature_histograms.png"
    try:
        dense, sparse = load_both(args.dense, args.sparse)
        args.out.mkdir(parents=True, exist_ok=True)
        plots.plot_feature_histograms(dense, sparse, picture)
    except (ValueError, OSError) as error:
        print(f"plot_feature_histograms.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    print(median_table(dense, sparse))
    print(f"Picture: {picture}")


if __name__ == "__main__":
    main()
