"""Command-line arguments that the scripts share."""

import argparse
from collections.abc import Callable, Mapping
from functools import cache
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from sparselearning.distributions import DISTRIBUTIONS
from sparselearning.functions import resolve
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.prune import PRUNE_FUNCTIONS
from sparselearning.redistribute import REDISTRIBUTION_FUNCTIONS

TABLES: dict[str, Mapping[str, Callable]] = {
    "prune_mode": PRUNE_FUNCTIONS,
    "redistribution_mode": REDISTRIBUTION_FUNCTIONS,
    "growth_mode": GROWTH_FUNCTIONS,
}


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
        "--sparse-init",
        choices=[*DISTRIBUTIONS, "resume"],
        default="constant",
        help="how active weights are divided among layers at the start; resume takes the nonzeros of the "
        "checkpoint given to --resume (default: %(default)s)",
    )
    kind_of_run = group.add_mutually_exclusive_group()
    kind_of_run.add_argument("--dense", action="store_true", help="train the dense model")
    kind_of_run.add_argument("--sparse", action="store_false", dest="dense", help="train sparse (default)")
    group.add_argument("--verbose", action="store_true", help="log the density of every layer per update")


def fraction(text: str) -> float:
    """Parse a number in [0, 1]."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a fraction in [0, 1], got {text}")
    return value


def positive_fraction(text: str) -> float:
    """Parse a number in (0, 1]."""
    value = fraction(text)
    if value == 0:
        raise argparse.ArgumentTypeError(f"expected a fraction in (0, 1], got {text}")
    return value


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text}")
    return value


def find_mode(argument: str, text: str, extensions: Mapping[str, Callable] | None = None) -> str | Callable:
    """Return what `Masking` takes for a mode given on the command line: a key of its table, or a function.

    `argument` is 'prune_mode', 'redistribution_mode' or 'growth_mode'; `text` a key, the name of an
    extension, or 'path/to/file.py:function'.

    Raises:
        ValueError, TypeError, FileNotFoundError, AttributeError: if it is none of them.
    """
    extensions = extensions or {}
    mode = load_function(text) if ":" in text else extensions.get(text, text)
    resolve(argument, mode, {**TABLES[argument], **extensions})
    return mode


@cache
def load_function(spec: str) -> Callable:
    """Return the function named by 'path/to/file.py:function'; the file is executed, once.

    Raises:
        FileNotFoundError: if there is no such file.
        AttributeError: if it has no such function.
    """
    path, _, name = spec.rpartition(":")
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path!r} to take the function {name!r} from.")
    loader = SourceFileLoader(Path(path).stem, path)
    module = ModuleType(loader.name)
    module.__file__ = path
    loader.exec_module(module)
    if not callable(getattr(module, name, None)):
        raise AttributeError(f"{path} has no function {name!r}.")
    return getattr(module, name)


def _mode(argument, extensions):
    def parse(text: str) -> str:
        try:
            find_mode(argument, text, extensions)
        except Exception as error:  # a user's file may raise anything
            raise argparse.ArgumentTypeError(f"{type(error).__name__}: {error}") from None
        return text

    return parse
