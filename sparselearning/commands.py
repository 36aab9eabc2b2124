"""The command `sparselearning`: the scripts, wherever the package is installed, and lists of methods and models.

    sparselearning train mnist --model lenet5 --density 0.05
    sparselearning train cifar --model wrn-16-8 --method rigl
    sparselearning train imagenet DIR --recipe tuned --density 0.1
    sparselearning train language --data FILE --method rigl
    sparselearning results --folder-path runs
    sparselearning methods
    sparselearning describe resnet50 --density 0.1
    sparselearning demo

`train`, `results` and `demo` run the scripts of the repository with all their arguments: `sparselearning train cifar
--lr 0.1` is `python mnist_cifar/main.py --data cifar --lr 0.1`. On several processes, or without the command on the
path: `torchrun --nproc_per_node 2 -m sparselearning train cifar`, `python -m sparselearning train cifar`.
"""

import os
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn

from sparselearning.flags import densities, list_of_methods, positive_fraction
from sparselearning.models import MODELS
from sparselearning.models.resnet import RESNETS
from sparselearning.own_functions import load_function
from sparselearning.parser import COMMAND, ArgumentParser, fail
from sparselearning.reports import describe

# Words of the command -> its script, and the arguments that the script begins with.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "train mnist": ("mnist_cifar/main.py", "--data", "mnist"),
    "train cifar": ("mnist_cifar/main.py", "--data", "cifar"),
    "train digits": ("mnist_cifar/main.py", "--data", "digits"),
    "train imagenet": ("imagenet/main.py",),
    "train language": ("language/main.py",),
    "results": ("mnist_cifar/get_results_from_logs.py",),
    "demo imagenet": ("imagenet/demo.py",),
    "demo language": ("language/demo.py",),
    "demo": ("mnist_cifar/demo.py",),
}
OF_SCRIPTS = ("torchvision", "sklearn", "matplotlib", "tqdm", "tabulate")  # the extra `scripts`, by import names


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command; a user's mistake ends in one line and exit status 2."""
    argv = list(sys.argv[1:] if argv is None else argv)
    for words in (2, 1):
        if (command := " ".join(argv[:words])) in SCRIPTS:
            run_script(command, argv[words:])
    commands = {"methods": methods, "describe": describe_model}
    if argv and argv[0] in commands:
        return commands[argv[0]](argv[1:])
    if argv[:1] in ([], ["-h"], ["--help"]):
        print(__doc__)
        return None
    fail("sparselearning", f"expected one of {', '.join([*SCRIPTS, *commands])}; got {' '.join(argv[:2])!r}")


def run_script(command: str, argv: Sequence[str]) -> NoReturn:
    """Become the process of a script, which begins as if `python` had been called with it.

    It is not imported here: torch is loaded by now, and the scripts set how its threads wait before that.
    """
    if missing := [module for module in OF_SCRIPTS if find_spec(module) is None]:
        fail(f"sparselearning {command}", f'there is no {missing[0]} here: pip install "sparselearning[scripts]"')
    script, *first = SCRIPTS[command]
    environment = {**os.environ, COMMAND: f"sparselearning {command}"}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, str(place_of(script)), *first, *argv], environment)


def place_of(script: str) -> Path:
    """Return the path of a script: in the installed package, or beside it in the repository."""
    installed = Path(__file__).parent / "scripts" / script
    return installed if installed.exists() else Path(__file__).parents[1] / script


def methods(argv: Sequence[str]) -> None:
    """List the methods with their papers, and the flags that make each."""
    ArgumentParser("sparselearning methods", description=methods.__doc__).parse_args(argv)
    print(list_of_methods())


def describe_model(argv: Sequence[str]) -> None:
    """Show every parameter of a model: whether it would have a mask, why not, and what to look at."""
    parser = ArgumentParser("sparselearning describe", description=describe_model.__doc__)
    names = ", ".join([*MODELS, *RESNETS])
    add = parser.add_argument
    # fmt: off
    add("model", metavar="MODEL", help=f"{names}, torchvision:NAME, timm:NAME, or path/to/file.py:function, which "
        "returns a model")
    add("--density", type=positive_fraction, default=0.05, help="fraction of the masked weights (default: 0.05)")
    add("--layer-density", type=densities, default={}, metavar="NAME=DENSITY,...", help="densities by name")
    add("--dense-layers", nargs="*", default=[], metavar="NAME", help="layers that stay dense, as patterns")
    add("--sparse-layers", nargs="*", default=[], metavar="NAME", help="parameters to mask beside the usual ones")
    add("--sparse-embeddings", action="store_true", help="mask embeddings and output layers over a vocabulary too")
    # fmt: on
    args = parser.parse_args(argv)
    density = {**args.layer_density, "*": args.density} if args.layer_density else args.density
    names = dict(sparse=args.sparse_layers, dense=args.dense_layers, sparse_embeddings=args.sparse_embeddings)
    try:
        print(describe(build(args.model), density=density, **names))
    except (ValueError, TypeError, OSError, ImportError) as error:
        parser.error(str(error))


def build(text: str) -> nn.Module:
    """Return the model that a text names; but for those of files, on torch's meta device, without memory for weights.

    Raises:
        ValueError, TypeError, OSError, ImportError: if there is none.
    """
    library, _, name = text.rpartition(":")
    if library.endswith(".py"):
        model = load_function(text)()
        if not isinstance(model, nn.Module):
            raise TypeError(f"{text} returned {type(model).__name__}, and not a model.")
        return model
    if library not in LIBRARIES and text not in {**MODELS, **RESNETS}:
        known = ", ".join(
            [*MODELS, *RESNETS, *(f"{library}:NAME" for library in LIBRARIES), "path/to/file.py:function"]
        )
        raise ValueError(f"expected one of {known}; got {text!r}")
    if library and find_spec(library) is None:
        raise ImportError(f"{text} needs {library}: pip install {library}")
    with torch.device("meta"):
        return LIBRARIES[library](name) if library else {**MODELS, **RESNETS}[text]()


def _of_torchvision(name):
    from torchvision.models import get_model

    return get_model(name, weights=None)


def _of_timm(name):
    try:
        return import_module("timm").create_model(name)
    except RuntimeError as error:
        raise ValueError(str(error)) from None


LIBRARIES: dict[str, Callable[[str], nn.Module]] = {"torchvision": _of_torchvision, "timm": _of_timm}
