"""Sparse networks on every engine that a user could pick: what `sparse.load` serves against dense and sparse peers.

    python benchmarks/engines.py
    python benchmarks/engines.py --quick
    python benchmarks/engines.py --rows resnet50,"vgg-d 0.05 b32" --threads 1

Peers: the model that `sparse.convert` returned, called from Python, torch eager and torch.compile in both memory
orders, torch's CSR product, ONNX Runtime (fp32, int8), OpenVINO (fp32, bf16, int8) and DeepSparse 1.8. Those that torch
does not hold are installed into virtual environments in benchmarks/.peers, and run in processes of their own; what
does not install or run is skipped by its name. Ours and one peer take turns; a ratio is the median over rounds. Outputs
are compared with torch eager. Every row runs in a fresh process, at the default instruction set and, where there are
more, held to AVX2; on one and on two threads.

Results go to results/engines-cpu.json after each row, with the load of the machine; a row that has its result is not
run again. At the end come results/engines-cpu.md, .csv and .png.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import common
import torch
from peers import measured, rows
from peers.engines_table import write
from peers.processes import ENVIRONMENTS, PEERS, install

AVX2 = {
    "SPARSELEARNING_ISA": "avx2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "NM_ARCH": "avx2",
}
SLOW = ("compiled", "compiled channels_last")  # a minute or more each: not in --quick


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few minutes: three small rows, one thread, no compiler")
    parser.add_argument("--rows", default="", help="parts of the names of rows, separated by commas (default: all)")
    parser.add_argument(
        "--kinds", default="", help=f"peers, separated by commas (default: {', '.join(measured.KINDS)})"
    )
    parser.add_argument("--rounds", type=int, help="turns of each of a pair (default: 11, or 3 with --quick)")
    parser.add_argument("--seconds", type=float, default=0.2, help="least length of a turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, nargs="+", help="CPU threads (default: 1 2)")
    parser.add_argument("--isa", nargs="+", choices=["default", "avx2"], help="instruction sets (default: both)")
    parser.add_argument("--again", action="store_true", help="run rows that have a result too")
    parser.add_argument("--output", type=Path, default=common.RESULTS / "engines-cpu.json", help="default: %(default)s")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    args.rounds = args.rounds or (3 if args.quick else 11)
    args.threads = args.threads or ([1] if args.quick else [1, 2])
    kinds = [kind.strip() for kind in args.kinds.split(",") if kind.strip()]
    if unknown := [kind for kind in kinds if kind not in measured.KINDS]:
        parser.error(f"unknown kind {unknown[0]!r}; choose from {', '.join(measured.KINDS)}")
    args.kinds = kinds or [kind for kind in measured.KINDS if not (args.quick and kind in SLOW)]
    try:
        args.rows = rows.chosen(args.rows or (",".join(rows.QUICK) if args.quick else ""))
    except ValueError as error:
        parser.error(str(error))
    only_avx2 = torch.backends.cpu.get_cpu_capability() == "AVX2"
    args.isa = args.isa or (["default"] if args.quick or only_avx2 else ["default", "avx2"])
    return args


def main(arguments: list[str] | None = None) -> None:
    """Install the peers, measure what has no result yet, write what there is."""
    args = parse(arguments)
    if args.one:
        return measured.answer(args.one)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    records = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    jobs = [dict(row=row, threads=n, isa=isa) for isa in args.isa for n in args.threads for row in args.rows]
    for job in jobs:
        known = {} if args.again else known_results(records, job)
        job["kinds"] = [kind for kind in args.kinds if kind not in known]
    missing = [job for job in jobs if job["kinds"]]
    wanted = {PEERS[kind][0] for kind in args.kinds if kind in PEERS} if missing else set()
    pythons = {name: install(name, ENVIRONMENTS[name]) for name in sorted(wanted)}
    for number, job in enumerate(missing, 1):
        logging.info("%d of %d: %s", number, len(missing), key(job))
        found = in_a_process(job | dict(rounds=args.rounds, least=args.seconds, pythons=pythons))
        if found is not None:
            found["result"] = known_results(records, job) | found["result"]
            machine = common.machine("cpu")
            record = dict(key(job), rounds=args.rounds, machine=machine, **found)
            records = [other for other in records if not same(other, job)] + [record]
            save(records, args.output)
    if not records:
        raise SystemExit("No row was measured.")
    logging.info("%s\nWrote %s and the table beside it.", write_tables(records, args.output), args.output)


def key(job: dict) -> dict:
    """Return what tells the results of rows apart."""
    return dict(name=job["row"].name, isa=job["isa"], threads=job["threads"])


def same(record: dict, job: dict) -> bool:
    return all(record[name] == value for name, value in key(job).items())


def known_results(records: list[dict], job: dict) -> dict:
    """Return what this processor and torch have measured of a row, by kind."""
    machine = common.machine("cpu")
    for record in records:
        if same(record, job) and all(record["machine"][name] == machine[name] for name in ("processor", "torch")):
            return record["result"]
    return {}


def in_a_process(job: dict) -> dict | None:
    """Measure a row in a process that sees its instruction set before torch loads; None if it fails."""
    environment = os.environ | (AVX2 if job["isa"] == "avx2" else {}) | {"OMP_NUM_THREADS": str(job["threads"])}
    command = [sys.executable, __file__, "--one", json.dumps(job)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=False)
    if run.returncode:
        logging.warning("%s failed with status %d", job["row"].name, run.returncode)
        return None
    return json.loads(run.stdout.strip().splitlines()[-1])


def save(records: list[dict], path: Path) -> None:
    """Write the results whole, or leave those of before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps(dict(benchmark="engines", rows=records), indent=1) + "\n")
    scratch.replace(path)


def write_tables(records: list[dict], path: Path) -> str:
    order = {row.name: number for number, row in enumerate(rows.ROWS)}
    ordered = sorted(records, key=lambda record: (record["isa"], record["threads"], order.get(record["name"], 99)))
    return write(ordered, path.parent, path.stem)


if __name__ == "__main__":
    main()
