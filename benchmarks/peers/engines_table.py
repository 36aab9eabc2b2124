"""The table, the CSV and the bar chart of the benchmark of engines."""

import csv
from collections.abc import Iterable
from pathlib import Path

from peers.measured import CONVERTED, KINDS, OURS
from peers.rows import ROWS
from tabulate import tabulate

from sparselearning.experiments.report import plots

DENSE_FP32 = ("eager", "eager channels_last", "compiled", "compiled channels_last", "ONNX Runtime", "OpenVINO")
FP32 = (*DENSE_FP32, CONVERTED, "CSR", "DeepSparse")
FEWER_BITS = tuple(kind for kind in KINDS if kind not in FP32)
ERRORS = ("error of ours", "of fp32 peers", "of fewer bits")
GOALS = {row.name: row.goal for row in ROWS}


def over_best_dense(result: dict) -> tuple[str, float]:
    """Return the fastest dense fp32 engine of a row, and its time over ours; ratios are those of each pair's turns."""
    ratios = {kind: result[kind]["ratio"] for kind in DENSE_FP32 if "ratio" in result.get(kind, {})}
    best = min(ratios, key=lambda kind: ratios[kind], default="")
    return best, ratios.get(best, float("nan"))


def largest(result: dict, kinds: Iterable[str]) -> float:
    """Return the largest difference from eager's outputs, as a share of the largest output; nan for kinds not run."""
    found = [result[kind] for kind in kinds if "largest_difference" in result.get(kind, {})]
    return max((each["largest_difference"] / each["largest_output"] for each in found), default=float("nan"))


def cell(found: dict | None) -> str:
    """Return the milliseconds of a kind, with its time over ours in brackets."""
    if found is None:
        return ""
    return "skipped" if "skipped" in found else f"{found['ms']:.3g} ({found['ratio']:.2f})"


def table(records: list[dict]) -> str:
    """Return the rows as a table, and below it which kinds were skipped and why."""
    kinds = [kind for kind in KINDS if any("ms" in record["result"].get(kind, {}) for record in records)]
    lines, skipped = [], {}
    for record in records:
        result = record["result"]
        best, faster = over_best_dense(result)
        goal = GOALS.get(record["name"])
        share = 1 / faster if best else float("nan")
        lines.append(
            [
                *(record[key] for key in ("name", "isa", "threads")),
                f"{result[OURS]['ms']:.3g}",
                *(cell(result.get(kind)) for kind in kinds),
                f"{best}: {faster:.2f}" if best else "",
                "" if goal is None else f"{share:.2f} of {goal:.2f}{' met' if share <= goal else ''}",
                *(f"{largest(result, kinds):.1g}" for kinds in ([OURS], FP32, FEWER_BITS)),
                f"{record['load_average'][0]:.1f}",
            ]
        )
        for kind, found in result.items():
            if "skipped" in found:
                skipped.setdefault((kind, found["skipped"]), []).append(record["name"])
    headers = ["row", "set", "threads", "ours", *kinds, "best dense fp32", "goal", *ERRORS, "load"]
    notes = [f"{kind} was skipped: {why} ({len(names)} rows)" for (kind, why), names in skipped.items()]
    text = (
        "Milliseconds, and in brackets the time over ours: the median of the ratios of turns. Ours is what `load` "
        "serves, `converted` the same model called from Python. Errors are the largest differences from torch eager, "
        "as shares of the largest output."
    )
    return "\n\n".join([text, tabulate(lines, headers, tablefmt="github", disable_numparse=True), *notes]) + "\n"


def write_csv(records: list[dict], path: Path) -> None:
    """Write one line per row and kind."""
    fields = ["row", "isa", "threads", "kind", "ms", "ratio", "ours_ms", "largest_difference", "skipped", "load"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields, extrasaction="ignore")
        writer.writeheader()
        for record in records:
            same = dict(row=record["name"], isa=record["isa"], threads=record["threads"])
            for kind, found in record["result"].items():
                writer.writerow({**same, "load": record["load_average"][0], "kind": kind, **found})


def bars(records: list[dict]) -> dict[str, dict[str, float]]:
    """Return {row: {engine: how many times faster it is than the best dense fp32 engine}}, on one thread."""
    found = {}
    for record in records:
        result = record["result"]
        best, faster = over_best_dense(result)
        if record["threads"] != 1 or record["isa"] != "default" or not best:
            continue
        others = {kind: result[kind]["ratio"] for kind in KINDS if "ratio" in result.get(kind, {})}
        series = {OURS: faster}
        for kind in ("DeepSparse", "CSR", "OpenVINO bf16", "OpenVINO int8", "ONNX Runtime int8"):
            if kind in others:
                series[kind] = faster / others[kind]
        found[record["name"].replace(" erdos_renyi_kernel", "\nerdos-renyi").replace(" b", "\nbatch ")] = series
    return found


def write(records: list[dict], folder: Path, name: str) -> str:
    """Write the table, the CSV and the chart; return the table."""
    text = table(records)
    (folder / f"{name}.md").write_text(text)
    write_csv(records, folder / f"{name}.csv")
    if chart := bars(records):
        plots.plot_speed_ups(chart, folder / f"{name}.png")
    return text
