"""The page of all modes and arguments, made from signatures, docstrings, tables and the parsers of the scripts."""

import argparse
import dataclasses
import importlib.util
import inspect
import re
import sys
import textwrap
from collections.abc import Callable, Container, Iterator, Mapping

from equations import DENSITY, RATE, START, WEIGHTS
from gallery import first_line
from links import ROOT

from sparselearning import Masking, Updates
from sparselearning.flags import FLAGS
from sparselearning.functions import READABLE, is_marked, surely_reads
from sparselearning.methods import DECAYS, DENSITY_SCHEDULES, FUNCTIONS, METHODS, PARTS
from sparselearning.methods import WEIGHTS as HELD
from sparselearning.schedules import CosineDecay, CubicDensity, LinearDecay, SoftDensity, StepDensity
from sparselearning.start.distributions import DISTRIBUTIONS
from sparselearning.start.masks import FIRST_DENSE, MAGNITUDE
from sparselearning.start.scores import SCORES
from sparselearning.weights.zeros import Zeros

INITS = [*DISTRIBUTIONS, *FIRST_DENSE, *MAGNITUDE, *SCORES, "resume"]
PATTERNS = {
    "unstructured": "Single weights, no limit.",
    "N:M": "Single weights, at most N of every M inputs in a row: 2:4.",
    "block:RxC": "Blocks of R outputs and C inputs: block:16x16.",
    "fan-in": "Single weights, the same number for every neuron.",
    "fan-in:G": "The same; neurons with too few important weights are removed, but none of the output layer.",
    "neuron": "All inputs of a neuron, or of a convolution's output channel.",
}
LENGTH = {"p0": "p0", "end": "T", "D0": "D0"}


def page() -> str:
    """Return the page."""
    return "\n".join(
        [
            "# Modes and arguments",
            "",
            "This page is made from the code: signatures, docstrings, tables, and the parsers of the scripts. A mode",
            "is a key of a table, or a function of your own ([how](../How_to_add_your_own_algorithms.md)).",
            "",
            "## Masking",
            *arguments(Masking, Masking.__init__),
            "## Masking.from_method",
            *arguments(Masking.from_method, Masking.from_method, FROM_METHOD),
            "## add_module",
            *arguments(
                Masking.add_module, Masking.add_module, {"module": "any nn.Module, or one in DistributedDataParallel."}
            ),
            "## Updates",
            *arguments(Updates, Updates.__init__),
            "## Zeros",
            "",
            "`Masking(..., weights=Zeros(...))`, with `from sparselearning.weights.zeros import Zeros`.",
            *arguments(Zeros, Zeros.__init__),
            "## Parts of a method",
            "",
            '`Masking.from_method("rigl", ..., growth="random")` replaces parts. The defaults are those of sparse',
            "momentum; every method has its own ([gallery](gallery.md)).",
            "",
            *parts(),
            *(line for argument in FUNCTIONS for line in modes(argument)),
            *choices("sparse_init", {name: START[name] for name in INITS}),
            "A function from a shape to a share, scores by name and masks by name are choices, too.",
            "",
            *choices("pattern", PATTERNS),
            *choices("weights", {name: WEIGHTS[name] for name in HELD}),
            *choices("decay_schedule", {name: f"`{RATE[name].format(**LENGTH)}`" for name in DECAYS}),
            "p is the prune rate at step t, p0 that of the start, T the last step.",
            "",
            *choices("density_schedule", {name: density(name) for name in DENSITY_SCHEDULES}),
            "D0 is the `start_density`, D the density of the end.",
            "",
            "## Schedules in Python",
            "",
            *schedules(),
            "## Flags of mnist_cifar/main.py",
            "",
            *flags("mnist_cifar/main.py"),
            "## Flags of imagenet/main.py",
            "",
            *flags("imagenet/command_line.py", without=FLAGS),
        ]
    )


FROM_METHOD = {
    "method": f"a key of METHODS: {', '.join(METHODS)}; or a `Method`.",
    "module": "as `add_module` takes it.",
    "optimizer": "as `Masking` takes it.",
    "total_steps": "optimizer steps of the training; schedules stretch with it.",
    "density": "of the end, as `add_module` takes it.",
    "parts": "parts of the method to replace (below), and arguments of Masking and add_module.",
}


def arguments(documented: object, called: Callable, more: Mapping[str, str] = {}) -> Iterator[str]:
    """Yield a table of the arguments of a function, with the defaults of its signature and what its docstring says.

    Raises:
        KeyError: for an argument that neither the docstring nor `more` explains.
    """
    meaning = {**dict(entries(documented)), **more}
    yield from ["", "| argument | default | meaning |", "|---|---|---|"]
    for name, parameter in inspect.signature(called).parameters.items():
        if name not in ("self", "cls"):
            yield f"| `{name}` | {default(parameter)} | {cell(meaning[name])} |"
    yield ""


def default(parameter: inspect.Parameter) -> str:
    if parameter.kind is parameter.VAR_KEYWORD:
        return ""
    return "required" if parameter.default is parameter.empty else f"`{parameter.default!r}`"


def entries(documented: object) -> Iterator[tuple[str, str]]:
    """Yield the name and the meaning of every argument in a docstring: `name, name: meaning`, continued deeper.

    >>> def f(a, b): '''Add.\\n\\n    Args:\\n        a, b: numbers,\\n            both whole.\\n    '''
    >>> [*entries(f)]
    [('a', 'numbers, both whole.'), ('b', 'numbers, both whole.')]
    """
    text = inspect.getdoc(documented) or ""
    body = textwrap.dedent(text.partition("Args:\n")[2].partition("\n\n")[0]) or text
    for names, meaning in re.findall(r"^((?:\w+, )*\w+): (.+(?:\n +.+)*)", body, re.MULTILINE):
        for name in names.split(", "):
            yield name, re.sub(r"\n\s+", " ", meaning)


def cell(text: str) -> str:
    """Return a text fit for a cell of a table."""
    return text.replace("|", r"\|").replace("\n", " ")


def parts() -> Iterator[str]:
    """Yield a table of the parts of a method."""
    yield from ["| part | flag | default | meaning |", "|---|---|---|---|"]
    for part in PARTS:
        dest = {"weights": "inactive"}.get(part, part)
        flag = "`--weights`" if part == "weights" else f"`--{part.replace('_', '-')}`"
        yield f"| `{part}` | {flag} | `{getattr(METHODS['sparse_momentum'], part)!r}` | {cell(FLAGS[dest]['help'])} |"
    yield ""


def modes(argument: str) -> Iterator[str]:
    """Yield a table of the functions that an argument of Masking names."""
    by_function: dict[Callable, list[str]] = {}
    for name, function in FUNCTIONS[argument].items():
        by_function.setdefault(function, []).append(name)
    yield from [f"## {argument}", "", "| mode | what it does | reads | for |", "|---|---|---|---|"]
    for function, names in by_function.items():
        read = ", ".join(what for what in READABLE if surely_reads(function, what))
        whole = "the network" if is_marked(function, "network_wide") else "a layer"
        keys = ", ".join(f"`{name}`" for name in names)
        yield f"| {keys} | {first_line(function)} | {read or 'nothing'} | {whole} |"
    yield ""


def choices(part: str, meanings: dict[str, str]) -> Iterator[str]:
    """Yield a table of the choices of a part."""
    yield from [f"## {part}", "", "| choice | meaning |", "|---|---|"]
    yield from (f"| `{name}` | {cell(meaning)} |" for name, meaning in meanings.items())
    yield ""


def density(name: str) -> str:
    """Return how a density schedule goes on."""
    stays = {"constant": "the density stays as it is", "step": "D0 until `start_fraction`, then D"}
    return stays.get(name) or f"`{DENSITY[name].format(**LENGTH)}`"


def schedules() -> Iterator[str]:
    """Yield a table of the schedules in schedules.py."""
    yield from ["| schedule | what it gives |", "|---|---|"]
    for kind in (CosineDecay, LinearDecay, CubicDensity, StepDensity, SoftDensity):
        fields = ", ".join(
            field.name if field.default is dataclasses.MISSING else f"{field.name}={field.default!r}"
            for field in dataclasses.fields(kind)
        )
        yield f"| `{kind.__name__}({fields})` | {first_line(kind)} |"
    yield ""


def parser_of(script: str) -> argparse.ArgumentParser:
    """Return the parser that the `build_parser` of a script makes."""
    place = ROOT / script
    spec = importlib.util.spec_from_file_location(f"parser_of_{place.parent.name}", place)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(place.parent))  # where Python looks for the modules beside a script
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(place.parent))
    return module.build_parser()


def flags(script: str, without: Container[str] = ()) -> Iterator[str]:
    """Yield a table of the flags of a script, without those of some dests."""
    parser = parser_of(script)
    yield from ["| flag | default | meaning |", "|---|---|---|"]
    for action in parser._actions:
        if action.dest in without or action.dest == "help":
            continue
        spelled = ", ".join(f"`{flag}`" for flag in action.option_strings) or f"`{action.metavar or action.dest}`"
        text, stated = meaning_of(parser, action)
        yield f"| {spelled} | {cell(stated)} | {cell(text)} |"
    yield ""


def meaning_of(parser: argparse.ArgumentParser, action: argparse.Action) -> tuple[str, str]:
    """Return what the help says about a flag, and the default that it states at its end."""
    help_text = parser._get_formatter()._expand_help(action) if action.help else ""
    help_text = re.sub(r"(?<!\w)\$(\w+)", r"`$\1`", help_text)
    text, _, stated = help_text.partition(" (default: ")
    if action.choices:
        text += f"; one of {', '.join(map(str, action.choices))}"
    return text, stated.rpartition(")")[0] if stated else ""
