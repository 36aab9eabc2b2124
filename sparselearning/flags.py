"""Flags of sparse training for any argument parser: one for each part of a `Method`, and those of a run.

    parser = argparse.ArgumentParser()
    add_sparse_args(parser)
    args = parser.parse_args()
    masking = Masking.from_method(chosen_method(args), model, optimizer, total_steps, density=args.density)

`--method NAME` decides the defaults, and a flag that is given overrides its part of the method.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from sparselearning.defaults import defaults_from
from sparselearning.method import DECAYS, DENSITY_SCHEDULES, WEIGHTS, Method
from sparselearning.methods import FUNCTIONS, METHODS, PARTS, find_method
from sparselearning.own_functions import find_mode
from sparselearning.patterns import check_names
from sparselearning.start.distributions import DISTRIBUTIONS
from sparselearning.start.masks import FIRST_DENSE, MAGNITUDE, RECEPTIVE
from sparselearning.start.scores import SCORES
from sparselearning.weights.regrowth import START_VALUES
from sparselearning.weights.start_states import START_STATES

Extensions = Mapping[str, Mapping[str, Callable[..., Any]]]  # argument -> name -> function


def parse_value(text: str, convert: Callable[[str], Any], holds: Callable[[Any], bool], expected: str) -> Any:
    """Return the value that `convert` makes of a text; refuse it unless `holds`, and say what was `expected`."""
    try:
        value = convert(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return value


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


def patterns(text: str) -> str | dict[str, str]:
    """Parse a pattern, or patterns by name.

    >>> patterns("2:4"), patterns("fc3=fan-in,*=fan-in:0.3")
    ('2:4', {'fc3': 'fan-in', '*': 'fan-in:0.3'})
    """
    if "=" not in text:
        return _checked(check_names, text)
    by_name = {}
    for term in text.split(","):
        name, equals, pattern = term.partition("=")
        if not name or not equals or name in by_name:
            raise argparse.ArgumentTypeError(f"expected terms NAME=PATTERN of different names, got {text!r}")
        by_name[name.strip()] = pattern
    return _checked(check_names, by_name)


def sparse_init(text: str) -> str:
    """Parse which weights are active at the start."""
    names = [*DISTRIBUTIONS, *MAGNITUDE, *RECEPTIVE, *FIRST_DENSE, *SCORES, "resume"]
    if text not in names and not (text.startswith("mask:") and text != "mask:"):
        raise argparse.ArgumentTypeError(f"expected one of {', '.join(names)}, or mask:PATH, got {text!r}")
    return text


def start_state(text: str) -> str | bool:
    """Parse what the optimizer's state of a regrown weight starts from; zero is True, as by --reset-state.

    >>> start_state("zero"), start_state("mean")
    (True, 'mean')
    """
    name = parse_value(text, str, START_STATES.__contains__, f"one of {', '.join(START_STATES)}")
    return True if name == "zero" else name


def _checked(check, text):
    """Return the text if `check` takes it; its errors become the parser's."""
    try:
        check(text)
    except (ValueError, TypeError, OSError) as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


# What argparse takes for each flag, by dest. A part of a method becomes a flag by one entry here: it is spelled as the
# part, and its default is that of sparse momentum. `also` holds other spellings. Other flags have a default here.
# fmt: off
FLAGS: dict[str, dict[str, Any]] = {
    "density": dict(type=positive_fraction, default=0.05,
        help="fraction of weights that is active, in (0, 1], at the end"),
    "layer_density": dict(type=densities, default={}, metavar="NAME=DENSITY,...",
        help="densities of the layers that these patterns mean, such as 'fc*=0.02,conv1=0.3'; the first that matches "
        "counts, all others have --density, and every update keeps the density of each pattern (default: none)"),
    "dense_layers": dict(nargs="*", default=[], metavar="NAME",
        help="layers that stay dense, as patterns such as conv1 or 'layer1.*'; first and last mean these"),
    "sparse_layers": dict(nargs="*", default=[], metavar="NAME",
        help="parameters to mask beside the weights of layers that multiply, as patterns such as '*.A_log'; embeddings "
        "and output layers over a vocabulary too (default: none)"),
    "sparse_init": dict(type=sparse_init, metavar="INIT",
        help=f"which weights are active at the start: {', '.join(DISTRIBUTIONS)} divide them among layers, and draw "
        "them at random within a layer; magnitude and magnitude:DISTRIBUTION take each layer's largest magnitudes, "
        "and receptive_field and receptive_field:DISTRIBUTION link outputs to inputs near their own place, constant if "
        "none is named; uniform and magnitude:uniform are constant and magnitude with the first layer "
        f"dense, as RigL's uniform distribution; {', '.join(SCORES)} score the weights on --score-batches; mask:PATH "
        "takes the masks of a checkpoint, or of a dict from names to bool tensors; resume takes the nonzeros of the "
        "checkpoint given to --resume, and zeros at random where the density asks for more"),
    "score_batches": dict(type=positive_int, default=1, metavar="N",
        help="training steps whose images --sparse-init snip and grasp score the weights on"),
    "prune": dict(also=["--death"], help="which weights are pruned"),
    "redistribution": dict(help="which layers receive the pruned weights"),
    "growth": dict(help="which weights grow"),
    "prune_rate": dict(type=fraction, also=["--death-rate"], metavar="RATE",
        help="fraction of active weights that the first update moves"),
    "decay_schedule": dict(choices=[*DECAYS], help="how the prune rate decays until --stop-fraction"),
    "prune_every_k_steps": dict(type=whole_number, metavar="K",
        help="steps between two updates of the masks; 0: one at the end of every epoch but the last"),
    "start_fraction": dict(type=fraction, metavar="F",
        help="fraction of the training before which the masks stay the same"),
    "stop_fraction": dict(type=fraction, metavar="F",
        help="fraction of the training after which the masks stay the same"),
    "density_schedule": dict(choices=[*DENSITY_SCHEDULES],
        help="how the density goes from --start-density at --start-fraction to --density at --stop-fraction; "
        "early_cubic arrives after three quarters of this time"),
    "start_density": dict(type=positive_fraction, metavar="DENSITY",
        help="density at the start of a --density-schedule; None: that of --density"),
    "pattern": dict(type=patterns, metavar="PATTERN",
        help="which weights may be active together: unstructured, N:M such as 2:4, block:RxC such as block:16x16, "
        "fan-in, fan-in:0.3 (neurons that matter little are removed, but none of the output layer), neuron; or by "
        "layers, such as 'fc3=fan-in,*=fan-in:0.3'"),
    "reset_state": dict(action=argparse.BooleanOptionalAction,
        help="set the optimizer's state of a weight that grows to zero"),
    "regrown": dict(choices=START_VALUES,
        help="value of a weight when it grows; random: as torch initialises the layer"),
    "regrown_warm_up": dict(type=whole_number, metavar="STEPS",
        help="steps over which the learning rate of a weight that has grown rises to its value, with Adam and AdamW"),
    "lr_by_density": dict(action=argparse.BooleanOptionalAction,
        help="divide the learning rate of each sparse layer by the square root of its density, with Adam and AdamW"),
    "rescale": dict(action=argparse.BooleanOptionalAction,
        help="enlarge the weights at the start until every layer has the norm it had without masks, for networks of a "
        "few percent that do not begin to learn"),
    "pull": dict(type=non_negative,
        help="how strongly active weights are pulled to zero; it is added to their gradients"),
    "inactive": dict(choices=[*WEIGHTS], also=["--weights"],
        help="how weights are held: zero sets those that are pruned to zero; kept and soft train them beside the "
        "network; sparse holds active weights alone and trains them on sparse kernels, in time and memory that follow "
        "their number; docs/always_sparse.md says how growth differs then"),
    "sparse_backend": dict(choices=["cpu"], default=None, help="the same as --weights sparse (default: none)"),
}
# fmt: on
DEST = {"weights": "inactive"}  # of a part whose flag has another name
STATE = "--state-of-regrown"  # names a start of START_STATES


def add_sparse_args(parser: argparse.ArgumentParser, extensions: Extensions | None = None) -> None:
    """Add the flags of sparse training: how to prune, redistribute and grow, how much, and how dense.

    `--method NAME` sets the defaults of the others to the parts of that method. `extensions` holds more functions by
    argument and name: {"prune_mode": {"mine": my_prune}}. Without it other names are left to the caller, who may mean
    functions by them, as scripts of release 1.0 do; so is a --decay-schedule that the parser has already.
    """
    group = parser.add_argument_group("sparse training")
    group.add_argument(
        "--method",
        type=partial(_checked, find_method),
        metavar="NAME",
        help=f"take the parts below from a published method, except those given: {', '.join(METHODS)} (default: the "
        "parts as they are, which make sparse_momentum)",
    )
    group.add_argument("--list-methods", action=_ListMethods, help="print the methods with paper and flags, and exit")
    parts = _parts("sparse_momentum")
    for dest, settings in FLAGS.items():
        if dest != "decay_schedule" or _spelling(dest) not in parser._option_string_actions:
            _add_flag(group, dest, **{"default": parts.get(dest), **settings, **_mode(dest, extensions)})
    # Not a value of --reset-state, which would take the folder that follows it on a command line.
    group.add_argument(
        STATE,
        dest="reset_state",
        type=start_state,
        metavar=f"{{{','.join(START_STATES)}}}",
        default=parts["reset_state"],
        help="what the optimizer's state of a weight that grows is set to: zero, as by --reset-state, the mean over "
        "the active weights of its layer, or restart, zero with a time step of Adam's own for each weight (default: "
        "that of --reset-state)",
    )
    kind_of_run = group.add_mutually_exclusive_group()
    kind_of_run.add_argument("--dense", action="store_true", help="train the dense model, whatever the flags above say")
    kind_of_run.add_argument("--sparse", action="store_false", dest="dense", help="train sparse (default)")
    group.add_argument("--verbose", action="store_true", help="log the density of every layer per update")
    defaults_from(parser, "--method", _parts)


def _parts(method: str) -> dict[str, Any]:
    """Return the parts of a method by the dests of their flags."""
    return {DEST.get(part, part): getattr(find_method(method), part) for part in PARTS}


def _add_flag(group, dest, *, help, also=(), **settings):
    if "(default" not in help:
        help += " (default: %(default)s)"
    group.add_argument(_spelling(dest), *also, dest=dest, help=help, **settings)


def _spelling(dest):
    return f"--{dest.replace('_', '-')}"


def _mode(dest, extensions):
    """Return what a flag of functions takes besides: their names, and how they are found."""
    argument = f"{dest}_mode"
    if argument not in FUNCTIONS:
        return {}
    more = {} if extensions is None else extensions.get(argument, {})
    names = ", ".join([*FUNCTIONS[argument], *more])
    return dict(
        type=partial(
            _checked, lambda text: (extensions is None and ":" not in text) or find_mode(argument, text, more)
        ),
        metavar="MODE",
        help=f"{FLAGS[dest]['help']}: {names}, or path/to/file.py:function",
    )


class _ListMethods(argparse.Action):
    def __init__(self, option_strings, dest, **settings):
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **settings)

    def __call__(self, parser, namespace, values, option_string=None):
        print(list_of_methods())
        parser.exit()


def list_of_methods() -> str:
    """Return the methods, each with its paper and the flags that make it."""
    return "\n".join(f"{name}: {method.name}. {method.paper}\n    {flags_of(name)}" for name, method in METHODS.items())


def flags_of(method: str) -> str:
    """Return the flags that make a method: its functions, and its other parts that differ from sparse momentum.

    >>> flags_of("set")
    '--prune SET --redistribution none --growth random --sparse-init linear --prune-rate 0.3'
    """
    others = _parts("sparse_momentum")
    return " ".join(
        _spelling(dest) if value is True else f"{STATE if dest == 'reset_state' else _spelling(dest)} {value}"
        for dest, value in _parts(method).items()
        if f"{dest}_mode" in FUNCTIONS or value != others[dest]
    )


def holds_active_alone(args: argparse.Namespace) -> bool:
    """Tell whether the arguments ask for weights="sparse"."""
    return args.sparse_backend is not None or args.inactive == "sparse"


def chosen_method(args: argparse.Namespace, extensions: Extensions | None = None) -> Method:
    """Return the method that the arguments of `add_sparse_args` describe, for `Masking.from_method`.

    Raises:
        ValueError: if they do not fit together.
    """
    if args.sparse_backend and args.inactive not in ("zero", "sparse"):
        raise ValueError(
            f"--inactive {args.inactive} trains inactive weights, and --sparse-backend {args.sparse_backend} does not "
            "hold them: leave out one of them."
        )
    parts = {part: getattr(args, DEST.get(part, part)) for part in PARTS}
    if holds_active_alone(args):
        parts["weights"] = "sparse"
    for argument in FUNCTIONS:
        part = argument.removesuffix("_mode")
        parts[part] = find_mode(argument, parts[part], (extensions or {}).get(argument))
    return Method(name=args.method or "own", paper="", **parts)
