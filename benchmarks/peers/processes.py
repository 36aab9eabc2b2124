"""Peers of the benchmark of engines: virtual environments that have them, and processes that serve them."""

import contextlib
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parents[1] / ".peers"
SERVER = Path(__file__).with_name("server.py")
LONGEST_INSTALL = 1800  # seconds


@dataclass(frozen=True)
class Environment:
    """A virtual environment: its packages, and the Python versions that they have wheels for."""

    packages: tuple[str, ...]
    pythons: tuple[str, ...] = (sys.executable,)


ENVIRONMENTS = {
    "onnxruntime": Environment(("onnxruntime", "onnx", "numpy")),
    "openvino": Environment(("openvino", "nncf", "numpy")),
    "deepsparse": Environment(
        ("deepsparse==1.8.0", "numpy<2", "setuptools<81"), ("python3.10", "python3.11", "python3.9", "python3.8")
    ),
}
PEERS = {  # kind: its environment, and the engine of server.py
    "ONNX Runtime": ("onnxruntime", "onnxruntime"),
    "ONNX Runtime int8": ("onnxruntime", "onnxruntime int8"),
    "OpenVINO": ("openvino", "openvino"),
    "OpenVINO bf16": ("openvino", "openvino bf16"),
    "OpenVINO int8": ("openvino", "openvino int8"),
    "DeepSparse": ("deepsparse", "deepsparse"),
}


def install(name: str, environment: Environment) -> tuple[str, str]:
    """Return (the Python that has the packages, what is wrong); one of them is empty."""
    folder = FOLDER / name
    python, wanted = folder / "bin" / "python", folder / "installed.txt"
    if wanted.exists() and wanted.read_text() == "\n".join(environment.packages):
        return str(python), ""
    why = "no Python of " + ", ".join(environment.pythons)
    for candidate in environment.pythons:
        try:
            subprocess.run([candidate, "-m", "venv", "--clear", folder], check=True, capture_output=True, text=True)
            logging.info("Installing %s into %s", " ".join(environment.packages), folder)
            pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *environment.packages]
            subprocess.run(pip, check=True, capture_output=True, text=True, timeout=LONGEST_INSTALL)
            wanted.write_text("\n".join(environment.packages))
            return str(python), ""
        except subprocess.CalledProcessError as error:
            lines = (error.stderr or "").strip().splitlines() or [str(error)]
            why = f"not installed: {next((line for line in lines if 'ERROR' in line), lines[-1])[:200]}"
        except (OSError, subprocess.TimeoutExpired) as error:
            why = why if isinstance(error, FileNotFoundError) else f"not installed: {error}"
    return "", why


class Skipped(Exception):
    """A peer that cannot be measured here; says why."""


class Process:
    """An engine that has loaded a model. Use it as a context manager."""

    def __init__(self, python: str, engine: str, model: Path, x: np.ndarray, threads: int):
        self.folder = model.parent
        np.save(self.folder / "input.npy", x)
        command = [python, SERVER, engine, model, self.folder / "input.npy", str(threads)]
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        self.child = subprocess.Popen(
            list(map(str, command)),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment | {"OMP_NUM_THREADS": str(threads), "NM_BIND_THREADS_TO_CORES": "0"},
        )
        try:
            first = self.answer()
            if "skipped" in first:
                raise Skipped(first["skipped"])
            self.version = first["version"]
        except BaseException:
            self.close()
            raise

    def answer(self) -> dict:
        assert self.child.stdout is not None
        line = self.child.stdout.readline()
        if not line:
            raise Skipped(f"its process ended with status {self.child.wait()}")
        return json.loads(line)

    def ask(self, command: str) -> dict:
        assert self.child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            print(command, file=self.child.stdin, flush=True)
        return self.answer()

    def turn(self, least: float) -> float:
        """Return the seconds per call of as many calls as fit into `least` seconds."""
        return self.ask(f"turn {least}")["seconds"]

    def output(self) -> np.ndarray:
        """Return what the model computes from its input."""
        return np.load(self.ask(f"output {self.folder / 'output.npy'}")["saved"])

    def close(self) -> None:
        for pipe in (self.child.stdin, self.child.stdout):
            if pipe is not None:
                pipe.close()
        try:
            self.child.wait(10)
        except subprocess.TimeoutExpired:
            self.child.kill()
            self.child.wait()

    def __enter__(self):
        return self

    def __exit__(self, *_exception):
        self.close()
