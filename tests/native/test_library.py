"""The compiled library is found, and chooses its instruction set."""

import shutil
import subprocess

import pytest
import torch

from sparselearning.native import library
from sparselearning.sparse import SparseLinear
from sparselearning.sparse.interface import check_structs

needs_library = pytest.mark.skipif(library.LIBRARY is None, reason="installed without a compiler")


@needs_library
def test_environment_chooses_the_instruction_set(monkeypatch):
    monkeypatch.setenv("SPARSELEARNING_ISA", "portable")
    assert library.load().instruction_set == 0
    monkeypatch.setenv("SPARSELEARNING_ISA", "nonsense")
    with pytest.raises(ValueError, match="Unknown or unsupported SPARSELEARNING_ISA 'nonsense'"):
        library.load()


def test_without_a_built_file_there_is_no_library(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "__file__", str(tmp_path / "library.py"))
    assert library.load() is None


def test_elsewhere_built_libraries_are_refused(tmp_path):
    """A library of earlier sources tells no interface; one of other sources tells another, or other structs."""
    compiler = shutil.which("cc") or pytest.skip("needs a C compiler")
    told = "long long sl_interface(long long* sizes) {{ sizes[0] = {}; return {}; }}"
    instruction_set = "int sl_instruction_set() { return 0; }"
    for i, more in enumerate(("", told.format(24, library.INTERFACE - 1), told.format(1, library.INTERFACE))):
        source, built = tmp_path / f"{i}.c", tmp_path / f"{i}.so"
        source.write_text(f"{instruction_set} {more}")
        subprocess.run([compiler, "-shared", "-fPIC", source, "-o", built], check=True)
        with pytest.raises(ImportError, match=r"built from other sources .* Reinstall sparselearning"):
            library.Library(built)


@needs_library
def test_structs_of_another_size_are_refused(monkeypatch):
    loaded = library.load()
    monkeypatch.setattr(loaded, "sizes", [*loaded.sizes[:-1], 8])
    with pytest.raises(ImportError, match="Reinstall sparselearning"):
        check_structs(loaded)


@needs_library
def test_an_instruction_set_that_there_is_not_is_refused(monkeypatch):
    layer = SparseLinear.from_dense(torch.nn.Linear(3, 4))
    for index in (-1, 3, 2**40):
        monkeypatch.setattr(library.LIBRARY, "instruction_set", index)
        with pytest.raises(ValueError, match="do not have the sizes"):
            layer(torch.ones(2, 3))
