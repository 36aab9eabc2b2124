"""Summarise test results over runs that differ only by their seed.

    python get_results_from_logs.py
    python get_results_from_logs.py --filter "model=lenet5 density=0.05" --all
    python get_results_from_logs.py --folder-path runs --csv results.csv --plot results.png

Reads run folders of main.py and log files (*.log) of release 1.0. Prints mean, median, standard error and 95% interval
of test accuracy and error (fractions) and of the test loss. The interval is Student's t for the mean of n runs,
mean +- t(0.975, n - 1) * standard error; a single run has no standard error and no interval. The last columns are the
mean FLOPs of inference and training relative to the dense network, and the fraction of weights that were ever active
(explored).
"""

import argparse
import csv
import io
import sys
from pathlib import Path

from tabulate import tabulate

from sparselearning import checkpoint
from sparselearning.experiments.report import plots
from sparselearning.experiments.report.results import OLD_NAMES, ResultsError, find, group, mean_costs, read, summarise
from sparselearning.parser import ArgumentParser, fail

ALWAYS_SHOWN = ["data", "model", "density"]


def parse_arguments(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("get_results_from_logs.py", description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--folder-path", type=Path, default=Path("runs"), help="folder of runs or log files (default: ./runs)")
    add("--recursive", action="store_true", help="also search the folders below")
    add("--agg-config", action="store_true", help="group runs with the same arguments across folders")
    add("--filter", default="", metavar="TERMS", help="key=value terms separated by spaces; runs must match all")
    add("--all", action="store_true", help="also list the individual results")
    add("--csv", type=Path, metavar="FILE", help="write the statistics, one line per configuration")
    add("--plot", type=Path, metavar="FILE", help="draw accuracy against density, with 95%% intervals as error bars")
    return parser.parse_args(argv)


def report(args):
    for path in (args.csv, args.plot):
        if path and not path.parent.is_dir():
            raise ResultsError(f"{path} cannot be written: there is no folder {path.parent}.")
    runs = choose(args.folder_path, args.recursive, parse_filter(args.filter))
    finished = [run for run in runs if run.finished]
    groups = sorted(group(finished, args.agg_config), key=lambda item: order(item[0]))
    lines = [(config, members, summarise(members)) for config, members in groups]
    keys = ALWAYS_SHOWN + varying_keys([config for config, _ in groups])
    if lines:
        print(summary_table(lines, keys))
        if args.all:
            print(f"\n{individual_table(lines, keys)}")
        print(f"\nThe same everywhere: {common_arguments(lines, keys)}")
    superseded = len(finished) - sum(len(members) for _, members in groups)
    say(len(runs) - len(finished), "unfinished")
    say(superseded, "left out for a newer one of the same arguments and seed")
    if not lines and (args.csv or args.plot):
        raise ResultsError("No run has finished, so there is nothing to write.")
    if args.csv:
        write_csv(lines, args.csv)
    if args.plot:
        write_plot(lines, args.plot)


def choose(folder, recursive, terms):
    """Return the runs in `folder` that match all terms; name unreadable runs on stderr."""
    runs = []
    for path in find(folder, recursive):
        try:
            runs += read(path)
        except ResultsError as error:
            print(f"left out: {error}", file=sys.stderr)
    if not runs:
        raise ResultsError(f"No run in {folder}. Pass --folder-path FOLDER, or --recursive to search below it.")
    chosen = [run for run in runs if all(same(run.args.get(key), value) for key, value in terms)]
    if not chosen:
        known = ", ".join(sorted({key for run in runs for key in run.args}))
        raise ResultsError(f"None of {len(runs)} runs matches --filter. The arguments are {known}.")
    return chosen


def parse_filter(text):
    terms = []
    for term in text.split():
        key, equals, value = term.partition("=")
        if not key or not equals:
            raise ResultsError(f"--filter takes key=value terms separated by spaces, got {term!r}.")
        key = key.lstrip("-").replace("-", "_")
        terms.append((OLD_NAMES.get(key, key), value.strip("'\"")))
    return terms


def same(value, text):
    """Tell whether `text` denotes `value`; 5e-4 denotes 0.0005."""
    try:
        return str(value) == text or (not isinstance(value, bool) and float(value) == float(text))
    except (TypeError, ValueError):
        return False


def order(config):
    return str(config.get("data")), str(config.get("model")), config.get("density", 0)


def varying_keys(configs):
    """Return the arguments besides data, model and density that differ between the configurations."""
    keys = dict.fromkeys(key for config in configs for key in config if key not in ALWAYS_SHOWN)
    return [key for key in keys if len({str(config[key]) for config in configs if key in config}) > 1]


def summary_table(lines, keys):
    rows = []
    for config, runs, summary in lines:
        lead = [*(show(config.get(key)) for key in keys), len(runs)]
        costs = [show(number, ".3f") for number in mean_costs(runs).values()]
        costs.append(sum(run.at_chance for run in runs))
        for result, numbers in summary.items():
            mean, median, error, low, high = (show(number, ".5f") for number in numbers.values())
            rows.append([*lead, result, mean, median, error, "-" if low == "-" else f"{low} .. {high}", *costs])
            lead, costs = [""] * len(lead), [""] * len(costs)
    headers = [*keys, "runs", "test", "mean", "median", "std. error", "95% interval"]
    headers += ["inference FLOPs", "training FLOPs", "explored", "at chance"]
    return tabulate(rows, headers, disable_numparse=True)


def individual_table(lines, keys):
    rows = []
    for config, runs, _ in lines:
        for run in sorted(runs, key=lambda run: str(run.sample)):
            lead = [show(value) for value in [*(config.get(key) for key in keys), run.args.get("seed")]]
            rows.append([*lead, *(show(n, ".5f") for n in (run.accuracy, 1 - run.accuracy, run.loss)), run.path])
    return tabulate(rows, [*keys, "seed", "accuracy", "error", "loss", "run"], disable_numparse=True)


def common_arguments(lines, keys):
    common = {key: value for config, _, _ in lines for key, value in config.items() if key not in keys}
    return " ".join(f"{key}={show(value)}" for key, value in common.items())


def show(value, decimals="g"):
    if value is None:
        return "-"
    return f"{value:{decimals}}" if isinstance(value, float) else str(value)


def say(number, what):
    if number:
        print(f"{number} run{'s' if number > 1 else ''} {what}")


def write_csv(lines, path):
    """Write one line per configuration: its arguments, its number of runs, `accuracy_mean` and so on."""
    keys = list(dict.fromkeys(key for config, _, _ in lines for key in config))
    rows = []
    for config, runs, summary in lines:
        flat = {f"{result}_{key}": number for result, numbers in summary.items() for key, number in numbers.items()}
        chance = {"runs_at_chance": sum(run.at_chance for run in runs)}
        rows.append({**config, "runs": len(runs), **chance, **flat, **mean_costs(runs)})
    text = io.StringIO()
    writer = csv.DictWriter(text, dict.fromkeys([*keys, *rows[0]]))
    writer.writeheader()
    writer.writerows(rows)
    checkpoint.write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def write_plot(lines, path):
    """Draw accuracy against density, one series per combination of the other differing arguments."""
    keys = varying_keys([config for config, _, _ in lines])
    rows = []
    for config, _, summary in lines:
        if "density" not in config:
            raise ResultsError(
                "--plot needs runs with a density among their arguments. Leave out the others with --filter."
            )
        names = [config.get("data"), config.get("model"), "dense" if config["density"] == 1 else None]
        names += [f"{key}={show(config[key])}" for key in keys if key in config]
        numbers = summary["accuracy"]
        interval = None if numbers["low"] is None else (numbers["low"], numbers["high"])
        row = {"label": " ".join(filter(None, names)), "density": config["density"]}
        rows.append(row | {"accuracy": numbers["mean"], "interval": interval})
    try:
        plots.plot_accuracy_density(rows, path)
    except ValueError as error:
        raise ResultsError(f"--plot {path}: {error}") from None


def main(argv=None):
    try:
        report(parse_arguments(argv))
    except (ResultsError, OSError) as error:
        fail("get_results_from_logs.py", error)


if __name__ == "__main__":
    main()
