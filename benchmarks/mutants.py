"""Mutation testing: change the library in small ways, one at a time, and find changes that no test notices.

    make mutants                                                # all files that pyproject.toml names
    python benchmarks/mutants.py sparselearning/schedules.py    # one file of them
    python benchmarks/mutants.py --only apportion               # functions whose name contains this
    python benchmarks/mutants.py --again tests/test_budget.py  # try the survivors again, with all tests of these files

The changes are those of mutmut (https://mutmut.readthedocs.io): another operator or number, an argument left out, a
branch always taken, and so on. The text of error messages and the `strict` of a zip do not change. mutmut's own runner
skips functions with decorators and collects the tests again for every change. Here pytest collects once; each change is
made in a fork of that process, in the code of the function, and the tests that call the function run, the fastest
first, for 8 seconds.

Writes benchmarks/results/mutants.json with the changes that no test noticed. Needs Linux and Python 3.11.
"""

import argparse
import difflib
import importlib
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import tomllib

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts threads, which do not survive a fork

import libcst as cst
import pytest
from mutmut.mutation.mutators import mutation_operators

ROOT = Path(__file__).parent.parent
OUT = ROOT / "benchmarks" / "results" / "mutants.json"
MESSAGES = ("raise", "logger.", "warnings.warn")  # beginnings of statements that only give messages
MEMORY = 12 << 30  # bytes that a changed function may allocate
SECONDS_EACH = 8  # seconds of tests per change; a change that they do not notice survives


@dataclass
class Function:
    """A function or method of the library, and its source."""

    file: str
    name: str
    live: FunctionType
    node: cst.FunctionDef

    def source(self, node: cst.FunctionDef) -> str:
        return textwrap.dedent(cst.Module([]).code_for_node(node.with_changes(decorators=[], leading_lines=[])))


@dataclass
class Mutant:
    """A changed function."""

    function: Function
    source: str

    def diff(self) -> list[str]:
        before = self.function.source(self.function.node).splitlines()
        lines = difflib.unified_diff(before, self.source.splitlines(), n=0, lineterm="")
        return [line for line in lines if line[0] in "+-" and not line.startswith(("+++", "---"))]

    def key(self) -> tuple[str, str, str]:
        return self.function.file, self.function.name, "\n".join(self.diff())

    def make(self) -> None:
        """Change the function in this process, for all that hold a reference to it."""
        live = self.function.live
        namespace = dict(live.__globals__)
        exec(compile(self.source, self.function.file, "exec"), namespace)
        made = namespace[self.function.node.name.value]
        live.__code__, live.__defaults__, live.__kwdefaults__ = made.__code__, made.__defaults__, made.__kwdefaults__


def functions_of(file: str) -> Iterator[Function]:
    """Yield the functions of a file and the methods of its classes."""
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    for statement in cst.parse_module((ROOT / file).read_text()).body:
        if isinstance(statement, cst.FunctionDef):
            yield Function(file, statement.name.value, _unwrapped(vars(module)[statement.name.value]), statement)
        elif isinstance(statement, cst.ClassDef):
            owner = vars(module)[statement.name.value]
            for node in statement.body.body:
                if isinstance(node, cst.FunctionDef):
                    live = _unwrapped(vars(owner)[node.name.value])
                    yield Function(file, f"{owner.__name__}.{node.name.value}", live, node)


def _unwrapped(held: Any) -> FunctionType:
    held = held.fget if isinstance(held, property) else getattr(held, "__func__", held)
    return _unwrapped(held.__wrapped__) if hasattr(held, "__wrapped__") else held


def mutants_of(function: Function) -> Iterator[Mutant]:
    """Yield a mutant for each change that mutmut would make to the function."""
    seen = {_without_strict(function.source(function.node))}
    for node in _changeable(function.node):
        for kind, operator in mutation_operators:
            for changed in operator(node) if isinstance(node, kind) else ():
                source = function.source(function.node.deep_replace(node, changed))
                if (essence := _without_strict(source)) not in seen:
                    seen.add(essence)
                    yield Mutant(function, source)


def _without_strict(source: str) -> str:
    """Return the source without the `strict` of a zip, which never matters where the lengths are equal."""
    return re.sub(r",\s*(strict=\w+)?\s*\)", ")", source)


def _changeable(node: cst.CSTNode) -> Iterator[cst.CSTNode]:
    if isinstance(node, cst.Annotation | cst.Decorator) or _only_speaks(node):
        return
    yield node
    for child in node.children:
        yield from _changeable(child)


def _only_speaks(node):
    return isinstance(node, cst.SimpleStatementLine) and cst.Module([]).code_for_node(node).strip().startswith(MESSAGES)


class Trial:
    """A pytest plugin that runs the tests once for each mutant."""

    def __init__(self, functions: list[Function], log: Any, again: set[tuple[str, str, str]] | None = None):
        self.functions = functions
        self.log = log
        self.again = again  # keys of the mutants to try; None tries all
        self.seconds_each = SECONDS_EACH if again is None else math.inf
        self.outcome: dict[int, str] = {}
        self.failed: list[str] = []
        self.mutants: list[Mutant] = []

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_runtestloop(self, session):
        self.items = session.items
        seconds, callers = self._measure()
        self._check_that_nothing_notices_nothing(seconds)
        for function in self.functions:
            order = sorted(callers[function.name], key=seconds.__getitem__)
            for mutant in mutants_of(function):
                if self.again is not None and mutant.key() not in self.again:
                    continue
                outcome = self._try(mutant, order, seconds)
                self.outcome[len(self.mutants)] = outcome
                self.mutants.append(mutant)
                print(outcome, function.file, function.name, *mutant.diff(), sep="\t", file=self.log, flush=True)
        return True

    def _measure(self):
        """Return the duration of each test in seconds, and the tests that call each function."""
        reading, writing = os.pipe()
        if not os.fork():
            seconds, callers = [], defaultdict(list)
            names = {function.live.__code__: function.name for function in self.functions}
            for i in range(len(self.items)):
                seen: set[CodeType] = set()
                sys.setprofile(lambda frame, *_, seen=seen: seen.add(frame.f_code))
                started = time.process_time()
                self._run(i)
                sys.setprofile(None)
                seconds.append(time.process_time() - started)
                for code in seen & names.keys():
                    callers[names[code]].append(i)
            answer = {"seconds": seconds, "callers": callers, "failed": self.failed}
            with os.fdopen(writing, "w") as pipe:
                json.dump(answer, pipe)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            answer = json.load(pipe)
        os.wait()
        if answer["failed"]:
            raise pytest.UsageError(f"Without any change, these tests fail: {answer['failed']}")
        return answer["seconds"], defaultdict(list, answer["callers"])

    def _check_that_nothing_notices_nothing(self, seconds):
        same = Mutant(self.functions[0], self.functions[0].source(self.functions[0].node))
        order = sorted(range(len(self.items)), key=seconds.__getitem__)
        if (outcome := self._try(same, order, seconds)) != "survived":
            raise pytest.UsageError(f"Without any change, in the order of a trial: {outcome}")

    def _run(self, i, following=None):
        item = self.items[i]
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=following)

    def _try(self, mutant, order, seconds):
        """Return 'survived', 'timeout', or 'killed by' with the name of the test."""
        reading, writing = os.pipe()
        child = os.fork()
        if not child:
            null = os.open(os.devnull, os.O_WRONLY)
            for stream in (1, 2):
                os.dup2(null, stream)
            resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
            try:
                mutant.make()
                started = time.process_time()
                for i in order:
                    if time.process_time() - started > self.seconds_each:
                        break
                    limit = int(time.process_time() + 5 + 20 * seconds[i]) + 1
                    resource.setrlimit(
                        resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY)
                    )  # a hard limit could not be raised
                    self._run(i)
                    if self.failed:
                        os.write(writing, self.failed[0].encode())
                        os._exit(1)
            except BaseException as error:
                os.write(writing, repr(error)[:200].encode())
                os._exit(1)
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading) as pipe:
            killer = pipe.read()
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            return "timeout" if os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL) else "killed by a crash"
        return f"killed by {killer}" if os.WEXITSTATUS(status) else "survived"


def main():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutants"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=settings["files"])
    parser.add_argument("--only", default="", help="try only functions whose name contains this, and write no file")
    parser.add_argument("--again", nargs="+", metavar="TESTS", help="test files to try on the changes that survived")
    args = parser.parse_args()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    functions = [function for file in args.files for function in functions_of(file) if args.only in function.name]
    started = time.time()
    trial = Trial(functions, sys.stdout, survivors() if args.again else None)
    tests = args.again or settings["tests"]
    status = pytest.main([*tests, *settings["options"], "-p", "no:cacheprovider", "-s"], plugins=[trial])
    if status:
        sys.exit(status)
    if args.again:
        write_again(trial)
    elif not args.only:
        write(trial, args.files)
    print(f"{time.time() - started:.0f} seconds")


def survivors() -> set[tuple[str, str, str]]:
    """Return the keys of the mutants that no test has noticed so far."""
    found = json.loads(OUT.read_text())["survived"]
    return {(file, one["function"], "\n".join(one["change"])) for file, rows in found.items() for one in rows}


def write_again(trial: Trial) -> None:
    """Remove from the list the changes that a test notices now, and those that no longer exist in the code."""
    result = json.loads(OUT.read_text())
    outcomes = {mutant.key(): trial.outcome[i] for i, mutant in enumerate(trial.mutants)}
    tried = {(function.file, function.name) for function in trial.functions}
    for file in {file for file, _ in tried}:
        left = []
        for one in result["survived"][file]:
            if (file, one["function"]) not in tried:
                left.append(one)
                continue
            outcome = outcomes.get((file, one["function"], "\n".join(one["change"])))
            counts = result["files"][file]
            counts["survived"] -= outcome != "survived"
            if outcome is None:
                counts["mutants"] -= 1
            elif outcome == "survived":
                left.append(one)
            else:
                counts["timeout" if outcome == "timeout" else "killed"] += 1
        result["survived"][file] = left
    OUT.write_text(json.dumps(result, indent=1) + "\n")


def write(trial: Trial, files: list[str]) -> None:
    """Write the number of changes of each file that no test noticed, and the changes."""
    result = json.loads(OUT.read_text()) if OUT.is_file() else {"files": {}, "survived": {}}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for file in files:
        outcomes = [trial.outcome[i] for i, mutant in enumerate(trial.mutants) if mutant.function.file == file]
        counts = {
            kind: sum(outcome.startswith(kind) for outcome in outcomes) for kind in ("killed", "timeout", "survived")
        }
        result["files"][file] = {"mutants": len(outcomes), **counts, "commit": commit}
        result["survived"][file] = [
            {"function": mutant.function.name, "change": mutant.diff()}
            for i, mutant in enumerate(trial.mutants)
            if mutant.function.file == file and trial.outcome[i] == "survived"
        ]
    result |= {"command": "make mutants", "mutmut": version("mutmut"), "tests": len(trial.items)}
    OUT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
