"""A table and a bar chart of the measurements of sparse_layers.py and sparse_models.py.

    python benchmarks/sparse_table.py
    python benchmarks/sparse_table.py --layers LAYERS.json --models MODELS.json --out NAME

Reads from results/, and writes results/NAME.md and results/NAME.png.
"""

import argparse
import json
import logging

import common
from tabulate import tabulate

from sparselearning.experiments.report import plots


def main():
    """Read the measurements, write the table, draw the chart."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default="sparse_layers-cpu.json", help="default: %(default)s")
    parser.add_argument("--models", default="sparse_models-cpu.json", help="default: %(default)s")
    parser.add_argument("--out", default="sparse-cpu", help="name of the files to write (default: %(default)s)")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    layers, models = (json.loads((common.RESULTS / name).read_text()) for name in (args.layers, args.models))
    parts = [
        machine(layers),
        "Forward: times faster than dense, at each density; last, than SparseProp at 0.05.",
        layer_table(layers["rows"], "forward"),
        "Forward and backward:",
        layer_table(layers["rows"], "both"),
        "Forward, a single call a turn:",
        layer_table(layers["rows"], "forward_alone"),
        "Forward, from NCHW in memory:",
        layer_table(layers["rows"], "forward_from_nchw"),
        machine(models),
        model_table(models["rows"]),
    ]
    text = "\n\n".join(parts) + "\n"
    (common.RESULTS / f"{args.out}.md").write_text(text)
    plots.plot_speed_ups(bars(layers["rows"]), common.RESULTS / f"{args.out}.png")
    logging.info("%s\nWrote %s.md and %s.png", text, common.RESULTS / args.out, common.RESULTS / args.out)


def machine(report):
    """Return a sentence on the hardware and the rounds of a report."""
    m = report["machine"]
    return (
        f"{report['benchmark']}: {m['processor']}, {m.get('cpu_capability', 'AVX2')}, {m['cores']} cores, torch "
        f"{m['torch']}, commit {m['commit']}, median of {report['settings']['rounds']} rounds."
    )


def layer_table(rows, part):
    """Return a table of speed-ups over dense by density, and over SparseProp; one line per layer and thread count."""
    densities = sorted({row["density"] for row in rows}, reverse=True)
    cells = {(row["layer"], row["threads"], row["density"]): row for row in rows}
    peer = f"{part}_over_sparseprop"
    measured = any(peer in row for row in rows)
    lines = []
    for layer, threads in dict.fromkeys((row["layer"], row["threads"]) for row in rows):
        times = [times_faster(cells[layer, threads, density][part]) for density in densities]
        over = [times_faster(cells.get((layer, threads, 0.05), {}).get(peer))] if measured else []
        lines.append([layer, threads, *times, *over])
    headers = ["layer", "threads", *(f"{density:g}" for density in densities), *(["over SparseProp"] * measured)]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def model_table(rows):
    """Return a table of times and speed-ups; one line per model, batch and thread count."""
    lines = [
        [
            *(row[key] for key in ("model", "what", "batch", "threads")),
            f"{min(row[key] for key in DENSE if key in row):.1f}",
            f"{row.get('converted_ms', row.get('sparse_ms')):.1f}",
            times_faster(row["ratio"]),
        ]
        for row in rows
    ]
    headers = ["model", "what", "batch", "threads", "dense ms", "sparse ms", "faster"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


DENSE = ("contiguous_ms", "channels_last_ms", "masked_ms")


def bars(rows):
    """Return {layer: {series: speed-up}} for the forward pass on one thread."""
    chosen = [row for row in rows if row["threads"] == 1]
    return {
        layer: {f"density {row['density']:g}": row["forward"] for row in chosen if row["layer"] == layer}
        for layer in dict.fromkeys(row["layer"] for row in chosen)
    }


def times_faster(ratio):
    return "" if ratio is None else f"{ratio:.1f}x"


if __name__ == "__main__":
    main()
