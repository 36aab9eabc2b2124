"""Small runs of language/main.py: a model of 2 layers on the source code of this Python."""

import os
import subprocess
import sys

from script import ROOT, load_main

script = load_main("language")
SMALL = "--layers 2 --width 32 --heads 4 --context 16 --batch-size 4 --eval-windows 8 --print-freq 1 --steps 6"
SMALL += " --eval-every 3 --device cpu --max-threads 1"


def parsed(place, *more):
    """Return the arguments of a small run."""
    return script.parse_arguments([*SMALL.split(), "--run-dir", str(place), *map(str, more)])


def type_command(*argv, cwd, program="main.py"):
    """Run a script of language/ in a process of its own; return it when it has ended."""
    command = [sys.executable, str(ROOT / "language" / program), *map(str, argv)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
