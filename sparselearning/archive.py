"""The archives that `torch.save` writes: their checksums, and what is in them, read without executing code."""

import json
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sparselearning.loading import check_all_compact

CHECKSUMS = "checksums.json"
REPEATED = 2**24  # bytes that a tensor which repeats its numbers (`expand`) may take


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message says why."""


def write(state: Any, file: BinaryIO) -> None:
    """Write an archive with a list of the checksums of its members."""
    torch.save(state, file)
    with zipfile.ZipFile(file, "a") as archive:
        sums = {entry.filename: entry.CRC for entry in archive.infolist()}
        folder, _, _ = archive.namelist()[0].partition("/")
        archive.writestr(f"{folder}/{CHECKSUMS}", json.dumps(sums))


def read(path: str | Path, device: torch.device | str = "cpu") -> tuple[Any, bool]:
    """Return the content of a file, and whether it lists the checksums of its members.

    Raises:
        FileNotFoundError: if there is no file.
        CheckpointError: if it is damaged or no such file.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no checkpoint {path}.")
    try:
        listed = _check_sums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of pickles that it then refuses
            state = torch.load(path, map_location=device, weights_only=True)
        _check_tensors(state)
        check_all_compact("content", state)
    except pickle.UnpicklingError:  # torch's message would tell how to execute the content of the file
        raise CheckpointError(
            f"{path} is damaged or not a checkpoint: it is no archive of tensors and plain data."
        ) from None
    except Exception as error:  # torch, zipfile and pickle raise many types for a damaged file
        first_line = str(error).partition("\n")[0]
        raise CheckpointError(f"{path} is damaged or not a checkpoint: {first_line or type(error).__name__}.") from None
    return state, listed


def _check_sums(path):
    """Raise if a member of the archive differs from its checksum, which torch ignores; tell whether it lists them."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        _check_members(path, archive.infolist())
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"its member {damaged} differs from its checksum")
        sums = {entry.filename: entry.CRC for entry in archive.infolist()}
        name = next((name for name in sums if name.endswith(f"/{CHECKSUMS}")), None)
        if name is None:
            return False
        listed = json.loads(archive.read(name))
    del sums[name]
    if sums != listed:
        raise zipfile.BadZipFile("its members differ from the checksums it lists")
    return True


def _check_members(path, entries):
    """Refuse an archive that takes more memory than its own size; `torch.save` compresses nothing."""
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise zipfile.BadZipFile("its members are compressed")
    if sum(entry.file_size for entry in entries) > Path(path).stat().st_size:
        raise zipfile.BadZipFile("its members overlap")
    if len({entry.filename for entry in entries}) < len(entries):
        raise zipfile.BadZipFile("two of its members have one name")


def _check_tensors(state):
    """Refuse tensors whose copies would take far more memory than the file: views that repeat a few numbers."""
    left, seen = [state], set()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            if value.layout == torch.strided and not value.is_meta:
                size, held = value.numel() * value.element_size(), value.untyped_storage().nbytes()
                if size > max(held, REPEATED):
                    raise ValueError(f"a tensor of shape {tuple(value.shape)} repeats {held} bytes")
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))  # a list may hold itself
            left += [*value, *value.values()] if isinstance(value, dict) else value
