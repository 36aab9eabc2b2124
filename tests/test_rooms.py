"""The house: which room may know which, and how large a room may be."""

import ast
import inspect
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from sparselearning import Masking

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "sparselearning").rglob("*.py"))
}
TREES = {module: ast.parse(path.read_text()) for module, path in FILES.items()}


def imports_of(module):
    """Return the modules of the package that a module imports, anywhere in it."""
    found = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & FILES.keys()) | ({node.module} if names - FILES.keys() else set())
    return found & FILES.keys() - {module}


def circle_from(module, path=()):
    if module in path:
        return [*path[path.index(module) :], module]
    if module in circle_from.clean:
        return None
    for other in sorted(imports_of(module)):
        if found := circle_from(other, (*path, module)):
            return found
    circle_from.clean.add(module)
    return None


def test_no_modules_import_each_other_in_a_circle():
    """Neither when they are loaded nor later, by an import inside a function."""
    circle_from.clean = set()
    circles = [found for module in FILES if (found := circle_from(module))]
    assert not circles, " -> ".join(circles[0])


def test_the_library_knows_nothing_of_experiments():
    library = [module for module in FILES if not module.startswith("sparselearning.experiments")]
    arrows = {(module, other) for module in library for other in imports_of(module) if ".experiments" in other}
    # The script of release 1.0 imports its loaders from utils, which holds nothing else and which no module imports.
    assert arrows == {("sparselearning.utils", "sparselearning.experiments.release_1_0")}
    assert not [module for module in FILES if "sparselearning.utils" in imports_of(module)]


SCRIPTS = [path for folder in ("imagenet", "language", "mnist_cifar") for path in sorted((ROOT / folder).glob("*.py"))]


def test_no_two_modules_of_the_tests_have_one_name():
    """Their folders all lie on one import path, so that the second of two would not be collected."""
    tests = [path for path in sorted((ROOT / "tests").rglob("*.py")) if not (path.parent / "__init__.py").exists()]
    names = Counter(path.name for path in tests if path.name != "conftest.py")
    assert not [path for path in tests if names[path.name] > 1]


@pytest.mark.parametrize("path", [*FILES.values(), *SCRIPTS], ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_has_one_subject(path):
    lines = path.read_text().count("\n")
    assert lines <= (350 if path == FILES["sparselearning.core"] else 320)


def test_a_function_fits_on_a_screen():
    functions = [
        (module, node.name, (node.end_lineno or 0) - node.lineno + 1)
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef)
    ]
    assert not [entry for entry in functions if entry[2] > 60]


def test_masking_takes_what_release_1_0_took_and_two_more():
    parameters = list(inspect.signature(Masking.__init__).parameters)[1:]
    assert parameters[:3] == ["optimizer", "prune_rate_decay", "prune_rate"]
    assert parameters[-2:] == ["updates", "weights"]
    assert len(parameters) == 11


def test_an_update_reads_like_the_paper():
    source = inspect.getsource(Masking.truncate_weights)
    steps = ["measure", "prune_rates", "prune(", "grow(", "_redistribute", "apply_mask"]
    places = [source.index(step) for step in steps]
    assert places == sorted(places)
    assert source.count("\n") <= 40


@pytest.mark.long
def test_the_library_needs_torch_and_numpy_alone():
    code = (
        "import sys, numpy, torch; before = set(sys.modules); import sparselearning; "
        "more = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names; "
        "assert more <= {'sparselearning', 'torch', 'numpy'}, more"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
