"""Flags that decide the defaults of others: a recipe, a method, a run that is resumed."""

import argparse
import itertools

import pytest

from sparselearning.flags import defaults_from, fraction

RECIPES = {"plain": {}, "wide": dict(width=2, layers=["a", "b"]), "rigl": dict(method="rigl")}
METHODS = {"set": dict(rate=0.3, reset=True), "rigl": dict(rate=0.2)}
RUNS = {"old": dict(rate=0.9, width=7, of_another_release=1)}


def of_run(path):
    if path not in RUNS:
        raise ValueError(f"there is no run\n{path!r}")
    return RUNS[path]


def new_parser(**settings):
    parser = argparse.ArgumentParser(prog="main.py", **settings)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--recipe", choices=[*RECIPES], default="plain")
    parser.add_argument("--method", choices=[*METHODS])
    parser.add_argument("--resume", metavar="PATH")
    parser.add_argument("--rate", type=fraction, default=0.5, help="default: %(default)s")
    parser.add_argument("-w", "--width", type=int, default=1)
    parser.add_argument("--layers", nargs="*", default=[])
    parser.add_argument("--reset", action=argparse.BooleanOptionalAction, default=False)
    return parser


@pytest.fixture
def parser():
    """Its defaults come from a recipe, rather from a method, rather from a run."""
    parser = new_parser()
    defaults_from(parser, "--recipe", RECIPES.__getitem__)
    defaults_from(parser, "--method", METHODS.__getitem__)
    defaults_from(parser, "--resume", of_run)
    return parser


def settings(parser, command):
    args = parser.parse_args(command.split())
    return args.rate, args.width, args.layers, args.reset


def refusal(capsys, parser, command):
    with pytest.raises(SystemExit) as end:
        parser.parse_args(command.split())
    assert end.value.code == 2
    return capsys.readouterr().err.partition("main.py: error: ")[2]


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("", (0.5, 1, [], False)),
        ("--recipe wide", (0.5, 2, ["a", "b"], False)),
        ("--method set", (0.3, 1, [], True)),
        ("--resume old", (0.9, 7, [], False)),
        ("--resume old --method set --recipe wide", (0.9, 7, ["a", "b"], True)),
        ("--recipe rigl", (0.2, 1, [], False)),
        ("--recipe rigl --method set", (0.3, 1, [], True)),
        # spellings
        ("--recipe=wide --meth=set", (0.3, 2, ["a", "b"], True)),
        ("--rec wide --resu old", (0.9, 7, ["a", "b"], False)),
        ("--method rigl --method set", (0.3, 1, [], True)),
        ("--method set --method rigl", (0.2, 1, [], False)),
        ("-w3 --layers x -- --recipe", (0.5, 3, ["x"], False)),
    ],
)
def test_the_later_call_is_the_stronger(parser, command, expected):
    assert settings(parser, command) == expected


def test_given_flags_override_in_any_order(parser):
    flags = ["--resume old", "--method set", "--recipe wide", "--rate 0.1", "--layers c", "--no-reset"]
    for order in itertools.permutations(flags):
        assert settings(parser, " ".join(order)) == (0.1, 7, ["c"], False)


def test_names_that_the_parser_does_not_have_are_left_out(parser):
    assert "of_another_release" not in vars(parser.parse_args(["--resume", "old"]))


def test_the_parser_keeps_its_own_defaults(parser):
    assert settings(parser, "--method set --recipe wide") == (0.3, 2, ["a", "b"], True)
    assert settings(parser, "") == (0.5, 1, [], False)
    parser.set_defaults(rate=0.7, width=4)
    assert settings(parser, "--recipe wide") == (0.7, 2, ["a", "b"], False)


def test_a_namespace_that_is_given_counts(parser):
    args = parser.parse_args([], argparse.Namespace(method="set", width=5))
    assert (args.rate, args.width) == (0.3, 5)


def test_help_shows_the_defaults_that_hold(parser, capsys):
    with pytest.raises(SystemExit) as end:
        parser.parse_args(["--help", "--method", "set"])
    assert end.value.code == 0
    assert "default: 0.3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("--resume new", "argument --resume: there is no run"),
        ("--recipe none", "argument --recipe: invalid choice: 'none' (choose from"),
        ("--method", "argument --method: expected one argument\n"),
        ("--re x", "ambiguous option: --re could match --recipe, --resume, --reset"),
        ("--rate 2 --method set", "argument --rate: expected a fraction in [0, 1], got '2'\n"),
        ("--method set --unknown 1", "unrecognized arguments: --unknown"),
    ],
)
def test_what_is_refused_names_the_flag(parser, capsys, command, message):
    assert refusal(capsys, parser, command).startswith(message)


@pytest.mark.parametrize("refuses", [argparse.ArgumentTypeError, ValueError, FileNotFoundError])
def test_what_read_raises_is_the_parser_s_error(capsys, refuses):
    def read(path):
        raise refuses(f"no {path}")

    parser = new_parser()
    defaults_from(parser, "--resume", read)
    assert refusal(capsys, parser, "--resume x") == "argument --resume: no x\n"
    parser.exit_on_error = False
    with pytest.raises(argparse.ArgumentError, match="argument --resume: no x"):
        parser.parse_args(["--resume", "x"])


def test_a_defect_of_read_is_not_hidden():
    parser = new_parser()
    defaults_from(parser, "--resume", {}.__getitem__)
    with pytest.raises(KeyError):
        parser.parse_args(["--resume", "x"])
    assert settings(parser, "") == (0.5, 1, [], False)


def test_read_takes_the_values_of_other_flags_too():
    parser = new_parser()
    defaults_from(parser, "--method", METHODS.__getitem__)
    read = dict(rate=0.9, width=7)
    defaults_from(parser, "--resume", lambda path, rate, folder: read if rate < 0.3 else {}, "--rate", "--recipe")
    assert settings(parser, "--resume old") == (0.5, 1, [], False)
    assert settings(parser, "--resume old --method rigl") == (0.9, 7, [], False)
    assert settings(parser, "--resume old --rate 0.25") == (0.25, 7, [], False)
    assert settings(parser, "--rate 0.25") == (0.25, 1, [], False)


def test_abbreviations_and_files_of_flags_are_the_parser_s(tmp_path, capsys):
    (tmp_path / "flags").write_text("--method\nset\n")
    parser = new_parser(allow_abbrev=False, fromfile_prefix_chars="@")
    defaults_from(parser, "--method", METHODS.__getitem__)
    assert settings(parser, f"@{tmp_path}/flags")[0] == 0.3
    assert "unrecognized arguments: --meth=set" in refusal(capsys, parser, "--meth=set")


def test_a_flag_must_be_there():
    with pytest.raises(ValueError, match="The parser has no flag --recipes yet"):
        defaults_from(new_parser(), "--recipes", RECIPES.__getitem__)
