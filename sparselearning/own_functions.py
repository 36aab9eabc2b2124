"""Functions that a user names on the command line: by a key of a table, or as path/to/file.py:function."""

import sys
import traceback
from collections.abc import Callable, Mapping
from functools import cache, wraps
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from sparselearning.functions import FunctionError, resolve
from sparselearning.methods import FUNCTIONS


def find_mode(
    argument: str, text: str, extensions: Mapping[str, Callable[..., Any]] | None = None
) -> str | Callable[..., Any]:
    """Return what `Masking` takes for a mode given on the command line: a key of its table, or a function.

    `argument` is 'prune_mode', 'redistribution_mode' or 'growth_mode'; `text` a key, the name of an
    extension, or 'path/to/file.py:function'.

    Raises:
        ValueError: if it is none of them.
        FunctionError, FileNotFoundError: if there is no such function, or it is of another kind.
    """
    extensions = extensions or {}
    table = {**FUNCTIONS[argument], **extensions}
    if ":" not in text:
        if text not in table:
            raise ValueError(f"expected one of {', '.join(table)}, or path/to/file.py:function, got {text!r}")
        return extensions.get(text, text)
    function = load_function(text)
    resolve(argument, function, table)
    return function


def load_function(spec: str) -> Callable[..., Any]:
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
