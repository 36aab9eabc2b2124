"""Flags of sparse training for any argument parser, and functions from a user's own file."""

import argparse
import math
import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache, wraps
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from sparselearning.functions import FunctionError, resolve
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.methods import DECAYS, DENSITY_SCHEDULES, METHODS, PARTS, Method, table
from sparselearning.patterns import check_name
from sparselearning.prune import PRUNE_FUNCTIONS
from sparselearning.redistribute import REDISTRIBUTION_FUNCTIONS
from sparselearning.start.distributions import DISTRIBUTIONS
from sparselearning.start.scores import SCORES
from sparselearning.weights.regrowth import START_VALUES

TABLES: dict[str, Mapping[str, Callable]] = {
    "prune_mode": PRUNE_FUNCTIONS,
    "redistribution_mode": REDISTRIBUTION_FUNCTIONS,
    "growth_mode": GROWTH_FUNCTIONS,
}


def add_sparse_args(
    parser: argparse.ArgumentParser, extensions: Mapping[str, Mapping[str, Callable]] | None = None
) -> None:
    """Add the arguments of sparse training: how to prune, redistribute and grow, how much, how dense.

    `--method NAME` sets the defaults of the others to the parts of that method. `extensions` holds more functions by
    argument and name: {"prune_mode": {"mine": my_prune}}.
    """
    group = parser.add_argument_group("sparse training")
    add = group.add_argument
    add(
        "--method",
        type=_key_of(METHODS),
        metavar="NAME",
        help=f"take the parts below from a published method, but for those given: {', '.join(METHODS)} (default: the "
        "parts as they are, which make sparse_momentum)",
    )
    add("--list-methods", action=_ListMethods, help="print the methods with paper and parts, and exit")
    for flags, argument, default, meaning in [
        (["--growth"], "growth_mode", "momentum", "which weights grow"),
        (["--prune", "--death"], "prune_mode", "magnitude", "which weights are pruned"),
        (["--redistribution"], "redistribution_mode", "momentum", "which layers receive the pruned weights"),
    ]:
        more = (extensions or {}).get(argument, {})
        names = ", ".join([*TABLES[argument], *more])
        add(
            *flags,
            type=_mode(argument, more),
            default=default,
            metavar="MODE",
            help=f"{meaning}: {names}, or path/to/file.py:function (default: %(default)s)",
        )
    add(
        *("--prune-rate", "--death-rate"),
        type=fraction,
        default=0.5,
        metavar="RATE",
        help="fraction of active weights that the first update moves (default: %(default)s)",
    )
    add(
        "--decay-schedule",
        choices=[*DECAYS],
        default="cosine",
        help="how the prune rate decays until --stop-fraction (default: %(default)s)",
    )
    add(
        "--prune-every-k-steps",
        type=whole_number,
        default=0,
        metavar="K",
        help="steps between two updates of the masks; 0: one at the end of every epoch but the last "
        "(default: %(default)s)",
    )
    add(
        "--start-fraction",
        type=fraction,
        default=0.0,
        metavar="F",
        help="fraction of the training before which the masks stay (default: %(default)s)",
    )
    add(
        "--stop-fraction",
        type=fraction,
        default=1.0,
        metavar="F",
        help="fraction of the training after which the masks stay (default: %(default)s)",
    )
    add(
        "--density",
        type=positive_fraction,
        default=0.05,
        help="fraction of weights that is active, in (0, 1], at the end (default: %(default)s)",
    )
    add(
        "--layer-density",
        type=densities,
        default={},
        metavar="NAME=DENSITY,...",
        help="densities of the layers that these patterns mean, such as 'fc*=0.02,conv1=0.3'; the first that matches "
        "counts, and all others have --density (default: none)",
    )
    add(
        "--dense-layers",
        nargs="*",
        default=[],
        metavar="NAME",
        help="layers that stay dense, as patterns such as conv1 or 'layer1.*'; first and last mean these "
        "(default: %(default)s)",
    )
    add(
        "--pattern",
        type=_pattern,
        default="unstructured",
        help="which weights may be active together: unstructured, N:M such as 2:4, block:RxC such as block:16x16, "
        "fan-in, fan-in:0.3 (with neurons given up), neuron (default: %(default)s)",
    )
    add(
        "--density-schedule",
        choices=[*DENSITY_SCHEDULES],
        default="constant",
        help="how the density goes from --start-density at --start-fraction to --density at --stop-fraction "
        "(default: %(default)s)",
    )
    add(
        "--start-density",
        type=positive_fraction,
        metavar="DENSITY",
        help="density to begin with, where there is a --density-schedule (default: --density)",
    )
    add(
        "--sparse-init",
        type=sparse_init,
        default="constant",
        metavar="INIT",
        help=f"which weights are active at the start: {', '.join(DISTRIBUTIONS)} divide them among layers, and chance "
        f"within; {', '.join(SCORES)} score the weights on one batch; mask:PATH takes the masks of a checkpoint, or of "
        "a dict from names to bool tensors; resume takes the nonzeros of the checkpoint given to --resume "
        "(default: %(default)s)",
    )
    add(
        "--reset-state",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="forget the optimizer's state of a weight that grows (default: no)",
    )
    add(
        "--regrown",
        choices=START_VALUES,
        default="zero",
        help="what a weight is when it grows; random is as torch initialises layers (default: %(default)s)",
    )
    add(
        "--rescale",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="enlarge the weights at the start until every layer has the norm it had without masks, for networks of a "
        "few percent that do not begin to learn (default: no)",
    )
    add(
        "--sparse-backend",
        choices=["cpu"],
        help="train on sparse kernels, in time that follows the active weights; docs/sparse.md says how growth differs "
        "then (default: dense kernels and masks)",
    )
    add(
        "--pull",
        type=non_negative,
        default=0.0,
        help="how strongly active weights are pulled to zero, added to their gradients (default: %(default)s)",
    )
    add(
        "--inactive",
        choices=["zero", "kept", "soft"],
        default="zero",
        help="what becomes of a weight that leaves: zero forgets its value, kept and soft train it beside the network "
        "(default: %(default)s)",
    )
    kind_of_run = group.add_mutually_exclusive_group()
    kind_of_run.add_argument("--dense", action="store_true", help="train the dense model")
    kind_of_run.add_argument("--sparse", action="store_false", dest="dense", help="train sparse (default)")
    add("--verbose", action="store_true", help="log the density of every layer per update")
    _let_method_set_defaults(parser)


def _let_method_set_defaults(parser):
    """Let whatever parses with `parser` look for --method first: flags given override its parts in any order."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--method", nargs="?")
    parse = parser.parse_known_args

    def parse_known_args(args=None, namespace=None):
        method = METHODS.get(first.parse_known_args(args)[0].method)
        if method:
            parser.set_defaults(**{part: getattr(method, part) for part in PARTS}, inactive=method.weights)
        return parse(args, namespace)

    parser.parse_known_args = parse_known_args


class _ListMethods(argparse.Action):
    def __init__(self, option_strings, dest, **settings):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser, namespace, values, option_string=None):
        print(table())
        parser.exit()


def chosen_method(args: argparse.Namespace, extensions: Mapping[str, Mapping[str, Callable]] | None = None) -> Method:
    """Return the method that the arguments of `add_sparse_args` describe, for `Masking.from_method`.

    Raises:
        ValueError: if they do not fit together.
    """
    parts = {part: getattr(args, part) for part in PARTS if part != "weights"}
    parts["weights"] = "sparse" if args.sparse_backend else args.inactive
    for argument in TABLES:
        part = argument.removesuffix("_mode")
        parts[part] = find_mode(argument, parts[part], (extensions or {}).get(argument))
    return Method(name=args.method or "own", paper="", **parts)


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


def _pattern(text: str) -> str:
    try:
        return check_name(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def fraction(text: str) -> float:
    """Parse a number in [0, 1]."""
    return parse_value(text, float, lambda x: 0 <= x <= 1, "a fraction in [0, 1]")


def positive_fraction(text: str) -> float:
    """Parse a number in (0, 1]."""
    return parse_value(text, float, lambda x: 0 < x <= 1, "a fraction in (0, 1]")


def proper_fraction(text: str) -> float:
    """Parse a number in [0, 1)."""
    return parse_value(text, float, lambda x: 0 <= x < 1, "a fraction in [0, 1)")


def non_negative(text: str) -> float:
    """Parse a finite number of at least 0."""
    return parse_value(text, float, lambda x: 0 <= x < math.inf, "a finite number of at least 0")


def whole_number(text: str) -> int:
    """Parse a whole number of at least 0."""
    return parse_value(text, int, lambda n: n >= 0, "a whole number of at least 0")


def positive_int(text: str) -> int:
    """Parse a whole number of at least 1."""
    return parse_value(text, int, lambda n: n >= 1, "a whole number of at least 1")


def parse_value(text: str, convert: Callable[[str], Any], holds: Callable[[Any], bool], expected: str) -> Any:
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


def _key_of(table):
    def parse(text: str) -> str:
        if text not in table:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(table)}, got {text!r}")
        return text

    return parse


def _mode(argument, extensions):
    def parse(text: str) -> str:
        try:
            find_mode(argument, text, extensions)
        except (ValueError, TypeError, OSError) as error:
            raise argparse.ArgumentTypeError(str(error)) from None
        return text

    return parse
