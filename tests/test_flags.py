"""What the command line takes, what it refuses, and functions from a user's own file."""

import argparse

import pytest
import torch

from sparselearning import flags
from sparselearning.experiments.run import arguments
from sparselearning.experiments.run.arguments import ArgumentParser
from sparselearning.flags import add_sparse_args, find_mode, load_function
from sparselearning.functions import FunctionError, is_network_wide
from sparselearning.prune import magnitude_prune

OWN = '''
from __future__ import annotations

from dataclasses import dataclass

from sparselearning.functions import network_wide


@dataclass
class Settings:
    rate: float = 0.5


def grow(masking, name, new_mask, total_regrowth, weight):
    """Grow nothing."""
    return new_mask


@network_wide
def grow_everywhere(masking, total_regrowth):
    return masking.masks


def fails(masking, name, new_mask, total_regrowth, weight):
    return 1 / 0


def too_few(masking, name):
    return None


constant = 3
'''


@pytest.fixture
def own(tmp_path):
    path = tmp_path / "my.py"
    path.write_text(OWN)
    return str(path)


def parse(*argv):
    parser = ArgumentParser(prog="main.py")
    add_sparse_args(parser, {"prune_mode": {"mine": magnitude_prune}})
    return parser.parse_args(argv)


def refusal(capsys, *argv):
    """The one line that `argv` ends with."""
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def test_defaults_are_the_paper_s():
    expected = dict(
        growth="momentum",
        prune="magnitude",
        redistribution="momentum",
        prune_rate=0.5,
        decay_schedule="cosine",
        prune_every_k_steps=0,
        start_fraction=0.0,
        stop_fraction=1.0,
        density=0.05,
        density_schedule="constant",
        start_density=None,
        sparse_init="constant",
        layer_density={},
        pattern="unstructured",
        dense_layers=[],
        reset_state=False,
        regrown="zero",
        rescale=False,
        pull=0.0,
        inactive="zero",
        sparse_backend=None,
        method=None,
        dense=False,
        verbose=False,
    )
    assert vars(parse()) == expected


def test_old_spellings_are_the_new_ones():
    old = parse("--death", "SET", "--death-rate", "0.3", "--sparse")
    assert old == parse("--prune", "SET", "--prune-rate", "0.3")


def test_an_ordinary_parser_takes_the_arguments():
    parser = argparse.ArgumentParser()
    add_sparse_args(parser)
    assert parser.parse_args(["--growth", "random"]).growth == "random"


@pytest.mark.parametrize("density", ["0", "-0.1", "1.5", "nan", "inf", "five"])
def test_density_outside_its_range_is_refused(capsys, density):
    expected = f"main.py: error: argument --density: expected a fraction in (0, 1], got '{density}'\n"
    assert refusal(capsys, "--density", density) == expected


@pytest.mark.parametrize(
    ("parser", "good", "bad"),
    [
        (flags.fraction, ["0", "1", "0.5"], ["-1", "1.1", "nan", "x", ""]),
        (flags.positive_fraction, ["1e-9", "1"], ["0", "1.1", "nan", "x"]),
        (flags.proper_fraction, ["0", "0.9"], ["1", "-0.1", "nan", "x"]),
        (flags.non_negative, ["0", "1e10"], ["-1", "inf", "nan", "1e999", "x"]),
        (flags.positive_int, ["1", "100"], ["0", "-1", "1.5", "x"]),
        (arguments.seed, ["0", "17"], ["-1", "99999999999999999999", "1.5", "x"]),
    ],
)
def test_numbers_are_parsed_or_refused_with_what_was_expected(parser, good, bad):
    assert [parser(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^expected .*, got '{text}'$"):
            parser(text)


@pytest.mark.parametrize("text", ["", "fc1", "fc1=", "=0.1", "fc1=2", "fc1=0.1,", "fc1=0.1,fc1=0.2"])
def test_densities_by_name_are_refused_where_they_say_none(capsys, text):
    assert "argument --layer-density: expected " in refusal(capsys, "--layer-density", text)


@pytest.mark.parametrize("text", ["snipp", "mask:", "mask"])
def test_unknown_sparse_init_names_the_known_ones(capsys, text):
    line = refusal(capsys, "--sparse-init", text)
    assert f"snip, grasp, synflow, resume, or mask:PATH, got '{text}'" in line


def test_unknown_mode_names_the_known_ones(capsys):
    line = refusal(capsys, "--prune", "magnitud")
    for name in ("magnitude, SET", "mine", "path/to/file.py:function", "'magnitud'"):
        assert name in line


def test_dense_and_sparse_exclude_each_other(capsys):
    assert "not allowed with argument --dense" in refusal(capsys, "--dense", "--sparse")


def test_own_function_is_found(own):
    grow = find_mode("growth_mode", f"{own}:grow")
    mask = torch.ones(2, dtype=torch.bool)
    assert grow(None, "fc", mask, 0, None) is mask
    assert grow.__doc__ == "Grow nothing."


def test_own_network_wide_function_keeps_its_mark(own):
    assert is_network_wide(find_mode("growth_mode", f"{own}:grow_everywhere"))


def test_own_file_is_executed_once(tmp_path):
    path = tmp_path / "counting.py"
    path.write_text(
        "import pathlib\n"
        "log = pathlib.Path(__file__).with_suffix('.log')\n"
        "log.write_text(log.read_text() + 'x' if log.exists() else 'x')\n"
        "def a(masking, name, weight, mask): return 1\n"
        "def b(masking, mask, weight, name): return mask\n"
    )
    for _ in range(2):
        find_mode("redistribution_mode", f"{path}:a")
        find_mode("prune_mode", f"{path}:b")
    assert path.with_suffix(".log").read_text() == "x"


def test_own_function_that_raises_is_named_with_its_line(own):
    line = OWN.splitlines().index("    return 1 / 0") + 1
    with pytest.raises(FunctionError, match=rf"my\.py:fails raised ZeroDivisionError in line {line}: division by zero"):
        load_function(f"{own}:fails")(None, "fc", None, 0, None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{folder}/none.py:grow", "there is no file '{folder}/none.py'"),
        ("{folder}:grow", "there is no file '{folder}'"),
        ("{own}:shrink", "{own} has no function 'shrink'"),
        ("{own}:constant", "{own} has no function 'constant'"),
        ("{own}:", "{own} has no function ''"),
        ("{own}", "path/to/file.py:function, got '{own}'"),
        ("{own}:too_few", "too_few(masking, name) cannot be called as too_few(masking, name, new_mask, total_"),
        ("{folder}/syntax.py:grow", "{folder}/syntax.py raised SyntaxError"),
        ("{folder}/raising.py:grow", "{folder}/raising.py raised KeyError in line 2"),
        ("{folder}/text.txt:grow", "its name does not end with .py"),
    ],
)
def test_what_is_no_growth_function_is_refused(capsys, tmp_path, own, spec, message):
    (tmp_path / "syntax.py").write_text("def grow(:\n")
    (tmp_path / "raising.py").write_text("\n{}['missing']\n")
    (tmp_path / "text.txt").write_text("hello")
    line = refusal(capsys, "--growth", spec.format(own=own, folder=tmp_path))
    assert line.startswith("main.py: error: argument --growth: ")
    assert message.format(own=own, folder=tmp_path) in line


def test_own_redistribution_cannot_be_network_wide(capsys, own):
    assert "cannot be network_wide" in refusal(capsys, "--redistribution", f"{own}:grow_everywhere")
