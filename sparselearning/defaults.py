"""Defaults that a flag decides: the parts of a method, the settings of a recipe, the arguments of a resumed run."""

import argparse
from collections.abc import Callable, Mapping
from copy import copy
from functools import partial
from typing import Any


def defaults_from(
    parser: argparse.ArgumentParser, flag: str, read: Callable[..., Mapping[str, Any]], *others: str
) -> None:
    """Let the value of a flag such as --method, --recipe or --resume decide the defaults of the other flags.

        defaults_from(parser, "--recipe", RECIPES.__getitem__)
        defaults_from(parser, "--resume", arguments_of_run)

    `read(value)` returns values by dest. Flags that are given override them, wherever they stand on the command line.
    Of several calls for one parser the last is the strongest: here a resumed run overrides a recipe.

    A flag that is given twice has its last value. One that is not given has its default, which an earlier call may
    have decided; `read` is not called for None. A value that `read` refuses with an ArgumentTypeError, ValueError or
    OSError ends in the parser's error. Names that the parser does not have are left out: a run of another release may
    have had other flags.

    Args:
        others: flags whose values `read` takes as further arguments.

    Raises:
        ValueError: if the parser has no such flag yet.
    """
    for name in (flag, *others):
        if name not in parser._option_string_actions:
            raise ValueError(f"The parser has no flag {name} yet. Add it before defaults_from is called.")
    sources = vars(parser).setdefault("sources_of_defaults", [])
    if not sources:
        parser.parse_known_args = partial(_parse, parser, sources, parser.parse_known_args)
    sources.append(([parser._option_string_actions[name] for name in (flag, *others)], read))


def _parse(parser: argparse.ArgumentParser, sources, parse, args=None, namespace=None):
    """Parse with the defaults that `sources` decide, in their order; the parser's own are back afterwards."""
    wanted = {action.dest for actions, _ in sources for action in actions}
    own = [(action, action.default) for action in parser._actions]
    try:
        given = {**vars(namespace or argparse.Namespace()), **_given(parser, wanted, args)}
        for actions, read in sources:
            values = [given.get(action.dest, action.default) for action in actions]
            defaults = {} if values[0] is None else _read(actions[0], read, values)
            for action in parser._actions:
                action.default = defaults.get(action.dest, action.default)
        return parse(args, namespace)
    except argparse.ArgumentError as error:
        if not parser.exit_on_error:
            raise
        parser.error(str(error))
    finally:
        for action, default in own:
            action.default = default


def _given(parser, wanted, args):
    """Return the values by dest that a command line gives to the flags `wanted`, and skip the others.

    All flags of the parser are known here, so that an abbreviation means the same as in the parser, and --help waits
    until the defaults are there.
    """
    probe = argparse.ArgumentParser(
        add_help=False,
        exit_on_error=False,
        prefix_chars=parser.prefix_chars,
        fromfile_prefix_chars=parser.fromfile_prefix_chars,
        allow_abbrev=parser.allow_abbrev,
    )
    probe.error, probe.convert_arg_line_to_args = parser.error, parser.convert_arg_line_to_args
    for action in parser._actions:
        if action.option_strings:
            twin = copy(action) if action.dest in wanted else _Skip(action.option_strings, "", action.nargs)
            twin.default, twin.required = argparse.SUPPRESS, False
            probe._add_action(twin)
    return vars(probe.parse_known_args(args)[0])


class _Skip(argparse.Action):
    def __call__(self, *_):
        pass


def _read(action, read, values):
    try:
        return read(*values)
    except (argparse.ArgumentTypeError, ValueError, OSError) as error:
        raise argparse.ArgumentError(action, str(error)) from None
