"""Functions that a user names: a key of a table, or a function of a file."""

import pytest
import torch

from sparselearning.functions import FunctionError, is_marked
from sparselearning.own_functions import find_mode, load_function
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


def test_a_key_is_itself_and_an_extension_its_function():
    assert find_mode("prune_mode", "SET") == "SET"
    assert find_mode("prune_mode", "mine", {"mine": magnitude_prune}) is magnitude_prune


def test_an_unknown_key_names_the_known_ones():
    with pytest.raises(
        ValueError, match=r"^expected one of magnitude, soft_magnitude, SET, .*, mine, or path/to/file.py:function, got"
    ):
        find_mode("prune_mode", "magnitud", {"mine": magnitude_prune})


def test_own_function_is_found(own):
    grow = find_mode("growth_mode", f"{own}:grow")
    mask = torch.ones(2, dtype=torch.bool)
    assert grow(None, "fc", mask, 0, None) is mask
    assert grow.__doc__ == "Grow nothing."


def test_own_network_wide_function_keeps_its_mark(own):
    assert is_marked(find_mode("growth_mode", f"{own}:grow_everywhere"), "network_wide")


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
def test_what_is_no_growth_function_is_refused(tmp_path, own, spec, message):
    (tmp_path / "syntax.py").write_text("def grow(:\n")
    (tmp_path / "raising.py").write_text("\n{}['missing']\n")
    (tmp_path / "text.txt").write_text("hello")
    with pytest.raises((ValueError, FunctionError, FileNotFoundError)) as refused:
        find_mode("growth_mode", spec.format(own=own, folder=tmp_path))
    assert message.format(own=own, folder=tmp_path) in str(refused.value)


def test_own_redistribution_cannot_be_network_wide(own):
    with pytest.raises(FunctionError, match="cannot be network_wide"):
        find_mode("redistribution_mode", f"{own}:grow_everywhere")
