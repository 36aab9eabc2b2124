"""Process memory of training a network of 10^9 dense weights, of which a few are active.

    python benchmarks/billion.py
    python benchmarks/billion.py --quick

Ten linear layers of 10,000 inputs and outputs are built on the meta device, and trained with AdamW and RigL: 64 rows a
step, three updates of the masks. Each density is a process of its own. `memory` is the largest resident size that the
operating system saw, of the whole process: Python, torch and the library too. Dense training needs 16 bytes a weight.
"""

import json
import logging
import subprocess
import sys
import time

import memory
from memory import status

LAYERS, DENSITIES = 10, (0.05, 0.01)


def main():
    """Measure, log and save."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return
    import common

    args = common.parse(__doc__, rounds=1, width=(10_000, "inputs and outputs of a layer"))
    args.width = 1_000 if args.quick else args.width
    rows = []
    for density in DENSITIES:
        settings = dict(width=args.width, density=density, threads=args.threads)
        command = [sys.executable, __file__, "--measure", json.dumps(settings)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        rows.append(settings | json.loads(found.stdout.splitlines()[-1]))
        logging.info(
            "%(weights).2g weights, density %(density)s: %(memory).2e bytes, %(step).2f s a step, %(update).2f s one "
            "with an update",
            rows[-1],
        )
    common.save(args, "billion", rows)


def measure(width, density, threads):
    """Return the peak of memory in bytes, and the seconds of the last step with an update and of the one before."""
    import torch

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    memory.LAYERS = LAYERS
    model, step = memory.build("sparse", width, density, "meta")
    memory.train(model, step, width, 3 * memory.EVERY - 2)
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        memory.train(model, step, width, 1)
        seconds.append(time.perf_counter() - started)
    return dict(weights=LAYERS * width**2, memory=status("VmHWM"), step=seconds[0], update=seconds[1])


if __name__ == "__main__":
    main()
