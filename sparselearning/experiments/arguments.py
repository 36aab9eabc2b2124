"""Command-line arguments that the scripts share."""

import argparse
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache, wraps
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any, NoReturn

from sparselearning.before_training import SCORES
from sparselearning.distributions import DISTRIBUTIONS
from sparselearning.functions import FunctionError, resolve
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.prune import PRUNE_FUNCTIONS
from sparselearning.redistribute import REDISTRIBUTION_FUNCTIONS

TABLES: dict[str, Mapping[str, Callable]] = {
    "prune_mode": PRUNE_FUNCTIONS,
    "redistribution_mode": REDISTRIBUTION_FUNCTIONS,
    "growth_mode": GROWTH_FUNCTIONS,
}


class ArgumentParser(argparse.ArgumentParser):
    """A parser that ends on a mistake with one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        fail(self.prog, message)


def fail(program: str, message: object) -> NoReturn:
    """Print the message of a user's mistake as one line on stderr, and exit with status 2."""
    print(f"{program}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(2)


def add_sparse_args(
    parser: argparse.ArgumentParser, extensions: Mapping[str, Mapping[str, Callable]] | None = None
) -> None:
    """Add the arguments of sparse training: how to prune, redistribute and grow, how much, how dense.

    `extensions` holds more functions by argument and name: {"prune_mode": {"mine": my_prune}}.
    """
    group = parser.add_argument_group("sparse training")
    for flags, argument, default, meaning in [
        (["--growth"], "growth_mode", "momentum", "which weights grow"),
        (["--prune", "--death"], "prune_mode", "magnitude", "which weights are pruned"),
        (["--redistribution"], "redistribution_mode", "momentum", "which layers receive the pruned weights"),
    ]:
        more = (extensions or {}).get(argument, {})
        names = ", ".join([*TABLES[argument], *more])
        group.add_argument(
            *flags,
            type=_mode(argument, more),
            default=default,
            metavar="MODE",
            help=f"{meaning}: {names}, or path/to/file.py:function (default: %(default)s)",
        )
    group.add_argument(
        *("--prune-rate", "--death-rate"),
        type=fraction,
        default=0.5,
        metavar="RATE",
        help="fraction of active weights that the first update moves (default: %(default)s)",
    )
    group.add_argument(
        "--density",
        type=positive_fraction,
        default=0.05,
        help="fraction of weights that is active, in (0, 1] (default: %(default)s)",
    )
    group.add_argument(
        "--layer-density",
        type=densities,
        default={},
        metavar="NAME=DENSITY,...",
        help="densities of the layers that these patterns mean, such as 'fc*=0.02,conv1=0.3'; the first that matches "
        "counts, and all others have --density (default: none)",
    )
    group.add_argument(
        "--dense-layers",
        nargs="*",
        default=[],
        metavar="NAME",
        help="layers that stay dense, as patterns such as conv1 or 'layer1.*'; first and last mean these "
        "(default: %(default)s)",
    )
    group.add_argument(
        "--sparse-init",
        type=sparse_init,
        default="constant",
        metavar="INIT",
        help=f"which weights are active at the start: {', '.join(DISTRIBUTIONS)} divide them among layers, and chance "
        f"within; {', '.join(SCORES)} score the weights on one batch; mask:PATH takes the masks of a checkpoint, or of "
        "a dict from names to bool tensors; resume takes the nonzeros of the checkpoint given to --resume "
        "(default: %(default)s)",
    )
    kind_of_run = group.add_mutually_exclusive_group()
    kind_of_run.add_argument("--dense", action="store_true", help="train the dense model")
    kind_of_run.add_argument("--sparse", action="store_false", dest="dense", help="train sparse (default)")
    group.add_argument("--verbose", action="store_true", help="log the density of every layer per update")


def densities(text: str) -> dict[str, float]:
    """Parse densities by name.

    >>> densities("fc*=0.02,conv1=0.3")
    {'fc*': 0.02, 'conv1': 0.3}
    """
    by_name = {}
    for term in text.split(","):
        name, equals, density = term.partition("=")
        if not name or not equals or name in by_name:
            raise argparse.ArgumentTypeError(f"expected terms NAME=DENSITY of different names, got {text!r}")
        by_name[name.strip()] = positive_fraction(density)
    return by_name


def sparse_init(text: str) -> str:
    """Parse which weights are active at the start."""
    names = [*DISTRIBUTIONS, *SCORES, "resume"]
    if text not in names and not (text.startswith("mask:") and text != "mask:"):
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, or mask:PATH, got {text!r}")
    return text


def fraction(text: str) -> float:
    """Parse a number in [0, 1]."""
    return _parse(text, float, lambda x: 0 <= x <= 1, "a fraction in [0, 1]")


def positive_fraction(text: str) -> float:
    """Parse a number in (0, 1]."""
    return _parse(text, float, lambda x: 0 < x <= 1, "a fraction in (0, 1]")


def proper_fraction(text: str) -> float:
    """Parse a number in [0, 1)."""
    return _parse(text, float, lambda x: 0 <= x < 1, "a fraction in [0, 1)")


def non_negative(text: str) -> float:
    """Parse a finite number of at least 0."""
    return _parse(text, float, lambda x: 0 <= x < math.inf, "a finite number of at least 0")


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    return _parse(text, int, lambda n: n >= 1, "a whole number of at least 1")


def seed(text: str) -> int:
    """Parse a whole number that every random-number generator takes as its seed."""
    return _parse(text, int, lambda n: 0 <= n < 2**31, "a whole number from 0 to 2147483647")


def _parse(text: str, convert: Callable[[str], Any], holds: Callable[[Any], bool], expected: str) -> Any:
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


def find_mode(argument: str, text: str, extensions: Mapping[str, Callable] | None = None) -> str | Callable:
    """Return what `Masking` takes for a mode given on the command line: a key of its table, or a function.

    `argument` is 'prune_mode', 'redistribution_mode' or 'growth_mode'; `text` a key, the name of an
    extension, or 'path/to/file.py:function'.

    Raises:
        ValueError: if it is none of them.
        FunctionError, FileNotFoundError: if there is no such function, or it is of another kind.
    """
    extensions = extensions or {}
    table = {**TABLES[argument], **extensions}
    if ":" not in text:
        if text not in table:
            raise ValueError(f"expected one of {', '.join(table)}, or path/to/file.py:function, got {text!r}")
        return extensions.get(text, text)
    function = load_function(text)
    resolve(argument, function, table)
    return function


def load_function(spec: str) -> Callable:
    """Return the function named by 'path/to/file.py:function'; the file is executed, once.

    What the function raises becomes a FunctionError that names the line.

    Raises:
        FileNotFoundError: if there is no such file.
        FunctionError: if the file cannot be executed, or has no such function.
    """
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path!r} to take the function {name!r} from")
    try:
        function = getattr(_execute(str(Path(path).absolute())), name, None)
    except Exception as error:
        raise FunctionError(_describe(path, path, error)) from error
    if not callable(function):
        raise FunctionError(f"{path} has no function {name!r}")

    @wraps(function)
    def guarded(*arguments):
        try:
            return function(*arguments)
        except Exception as error:
            raise FunctionError(_describe(spec, path, error)) from error

    return guarded


@cache
def _execute(path: str) -> Any:
    name = f"own functions in {path}"  # no name that an import could mean
    spec = spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("its name does not end with .py")
    sys.modules[name] = module = module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _describe(what: str, path: str, error: Exception) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(Path(path).absolute())]
    place = f" in line {lines[-1]}" if lines else ""
    return f"{what} raised {type(error).__name__}{place}: {error}"


def _mode(argument, extensions):
    def parse(text: str) -> str:
        try:
            find_mode(argument, text, extensions)
        except (ValueError, TypeError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return parse
