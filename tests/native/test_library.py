"""The compiled library is found, and chooses its instruction set."""

import pytest

from sparselearning.native import library

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
