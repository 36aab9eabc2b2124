"""A short run of imagenet/main.py on photographs: two processes train it; it is killed, resumed and evaluated.

    python benchmarks/photographs.py DIR       where DIR holds train/<class>/<image> and val/<class>/<image>

Writes results/photographs-cpu.json: the accuracy per epoch, the step at which the run was killed, the accuracy of its
checkpoint when one process evaluates it, and the images per second of training and inference.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, machine

from sparselearning import checkpoint

SCRIPT = Path(__file__).parents[1] / "imagenet" / "main.py"
NETWORK = "--recipe tuned --arch resnet18 --image-size 64 --density 0.2 -b 64 --lr 0.2 --workers 1 --device cpu"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
KEPT = ("epoch", "steps", "train_loss", "valid_accuracy", "valid_accuracy_5", "active_weights", "images_per_second")


def main():
    """Make the runs and save their numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", metavar="DIR", help="photographs")
    parser.add_argument("--epochs", type=int, default=12, help="epochs to train (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS / "photographs-cpu.json", help="default: %(default)s")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    settings = f"{NETWORK} --epochs {args.epochs}"
    given = [str(SCRIPT), args.folder, *settings.split(), "--run-dir"]
    with tempfile.TemporaryDirectory() as scratch:
        train = [*TORCHRUN, *given, f"{scratch}/run", "--checkpoint-every", "20"]
        stopped = kill_inside_epoch(train, Path(scratch, "run"), epoch=3)
        subprocess.run([*train, "--resume", "auto"], check=True)
        (run,) = Path(scratch, "run").iterdir()
        alone = [sys.executable, *given, f"{scratch}/alone", "--evaluate", "--resume", str(run)]
        said = subprocess.run(alone, check=True, stdout=subprocess.PIPE, text=True).stdout
        subprocess.run([*TORCHRUN, *given, f"{scratch}/speed", "--benchmark-training"], check=True)
        subprocess.run([*TORCHRUN, *given, f"{scratch}/speed", "--benchmark-inference"], check=True)
        epochs, speeds = (records(Path(scratch, part)) for part in ("run", "speed"))
    report = {
        "command": f"torchrun --nproc_per_node 2 main.py DIR {settings}",
        "machine": machine("cpu"),
        "killed": f"all processes by SIGKILL; went on from {stopped}",
        "epochs": [{name: record[name] for name in KEPT} for record in epochs],
        "evaluated by one process": said.splitlines()[-1],
        "images per second": speeds,
    }
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(args.output)


def kill_inside_epoch(command, place, epoch):
    """Start a run, kill all its processes after a checkpoint inside `epoch`, and return epoch and step of the last."""
    started = subprocess.Popen(command)
    while True:
        time.sleep(0.2)
        if started.poll() is not None:
            sys.exit(f"The run ended before it was killed, with status {started.returncode}.")
        for path in place.glob("*/checkpoint.pt"):
            saved = checkpoint.read(path)
            if saved["epoch"] == epoch - 1 and saved["progress"]:
                for process in Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split():
                    os.kill(int(process), signal.SIGKILL)
                started.wait()
                saved = checkpoint.read(path)
                return f"epoch {saved['epoch'] + 1}, step {saved['progress']['steps']}"


def records(place):
    """Return the lines of the metrics.jsonl of all runs in a folder."""
    return [json.loads(line) for path in place.glob("*/metrics.jsonl") for line in path.read_text().splitlines()]


if __name__ == "__main__":
    main()
