"""One file that serves a model: its steps, its tensors, and the places of its active weights; no code and no pickle.

It is a zip archive of three members. `program.json` holds the steps (programs.py) and what the other two contain.
`tensors` holds the numbers of all tensors, one after another, without the zeros of those that have many. `positions`
holds where the other numbers are, and the columns of sparse layers: gaps of a byte (packing.py), deflated.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparselearning.atomic import write_atomically
from sparselearning.compact import positions
from sparselearning.compact import rows_of as indices_of
from sparselearning.sparse.batch_last import trained_to_dense
from sparselearning.sparse.files import BYTES_PER_BYTE, FREE_BYTES, PACKABLE
from sparselearning.sparse.interface import kernels
from sparselearning.sparse.packing import ESCAPE, pack_positions, unpack_positions
from sparselearning.sparse.programs import Program, described, rebuilt
from sparselearning.sparse.tracing import Description, check_state, example_of, rows_of, traced, with_rows
from sparselearning.sparse.trees import Arguments, alone, own_copy, redrawn
from sparselearning.sparse.verification import difference, run

FORMAT, VERSION = "sparselearning program", 1
PROGRAM, TENSORS, POSITIONS = "program.json", "tensors", "positions"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*PACKABLE, torch.complex128)}


def save(
    model: nn.Module, path: str | os.PathLike[str], example_input: Any = None, *, dynamic_batch: bool = True
) -> int:
    """Write a model that is to be served into one file, and return its bytes.

    `load` needs torch and this package to run it, not the model's class. The file holds no zeros. What it holds is
    compared with the model before it is written: on the example, on other numbers, and on other batches.

    Args:
        model: what `convert` returned, or any other model on a CPU. It is saved in eval mode.
        path: the file.
        example_input: as in `convert`; by default what `convert` was given.
        dynamic_batch: whether the file takes any number of rows, the first dimension of the example's first tensor
            and of all that have as many; otherwise it takes those of the example.

    Raises:
        TypeError: for arguments and outputs other than tensors and numbers, in tuples, lists and dicts.
        ValueError: if no example is known, torch.export cannot trace the model, or the model has what a file of
            numbers cannot hold: control flow on numbers, buffers that it writes, operators of other packages.
        OSError: if the file cannot be written; a file at `path` is then unchanged.
    """
    arguments = example_of(model, example_input)
    with alone():
        own = own_copy(model)
        trained_to_dense(own)
        check_state(own)
        content = written(own, arguments, dynamic_batch)
        if why := difference_of(own, made(content), arguments, dynamic_batch):
            raise ValueError(
                f"The model computes something else than what torch.export makes of it: {why}. "
                "Look for what depends on numbers or on the batch in its forward."
            )
    write_atomically(Path(path), lambda file: file.write(content))
    return len(content)


def load(path: str | os.PathLike[str]) -> Program:
    """Return what `save` wrote: call it as the model. It runs on a CPU, without gradients, on torch's threads.

    No code of the file is executed, and none but functional operators of torch are called.

    Raises:
        FileNotFoundError: if there is no file.
        ValueError: if it is damaged or no such file, or needs operators that this version of torch does not have.
        RuntimeError: if it has sparse layers, and this package was installed without kernels.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"Expected a saved model, but there is no file {path}.")
    content = path.read_bytes()
    try:
        program = made(content)
    except Exception as error:  # zipfile, json and torch raise many types for a damaged file
        first_line = str(error).partition("\n")[0]
        why = f"{type(error).__name__}: {first_line}" if isinstance(error, KeyError) else first_line
        raise ValueError(f"{path} is damaged or no saved model: {why or type(error).__name__}") from None
    if program.stored["layer"]:
        kernels()
    return program


def difference_of(model: nn.Module, program: Program, arguments: Arguments, dynamic: bool) -> str:
    """Return how a program differs from its model, on any of several inputs; an empty text if it does not."""
    others = {"the example": arguments, "other numbers": redrawn(arguments, True)}
    if dynamic:
        tensors, own = list[Tensor](), rows_of(arguments)
        takes = described(list(arguments), tensors)
        others |= {f"{rows} rows": rebuilt(takes, with_rows(tensors, own, rows)) for rows in (1, 3, 16)}
    for name, each in others.items():
        if each is None:
            continue
        try:
            expected = run(model, each)
        except Exception:  # a model that takes no other input
            if name == "the example":
                raise
            continue
        try:
            why = difference(expected, run(program, each))  # pyright: ignore[reportArgumentType]
        except Exception as error:  # what it raises is the answer
            why = f"it raises {type(error).__name__}: {error}"
        if why:
            return f"on {name} {why}"
    return ""


def written(model: nn.Module, arguments: Arguments, dynamic: bool) -> bytes:
    """Return the content of the file for a model."""
    inputs: list[Tensor] = []
    takes = described(list(arguments), inputs)
    rows = rows_of(arguments) if dynamic else 0
    program, returns = traced(model, takes, inputs, rows)
    found = Description(program)
    numbers, places = io.BytesIO(), io.BytesIO()
    description = {
        "format": FORMAT,
        "version": VERSION,
        "torch": torch.__version__,
        "takes": takes,
        "inputs": [
            {
                "dtype": name_of(x.dtype),
                "shape": [None, *x.shape[1:]] if rows and x.shape[:1] == (rows,) else [*x.shape],
            }
            for x in inputs
        ],
        "batch": found.batch(),
        "tensors": [write_tensor(tensor, numbers, places) for tensor in found.tensors],
        "layers": [write_layer(*layer, places) for layer in found.layers],
        "steps": found.steps,
        "results": found.results,
        "returns": returns,
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, kind, content in (
            (PROGRAM, zipfile.ZIP_DEFLATED, json.dumps(description, separators=(",", ":")).encode()),
            (POSITIONS, zipfile.ZIP_DEFLATED, places.getvalue()),
            (TENSORS, zipfile.ZIP_STORED, numbers.getvalue()),
        ):
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return file.getvalue()


def name_of(dtype: torch.dtype) -> str:
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"A saved model holds no tensors of {dtype}. Convert it to one of {', '.join(DTYPES)}.")
    return name


def write_tensor(tensor: Tensor, numbers: io.BytesIO, places: io.BytesIO) -> dict[str, Any]:
    """Write a tensor, in its own order of memory and without its zeros if it has many; return what it is."""
    order = sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))
    found = {"dtype": name_of(tensor.dtype), "shape": [*tensor.shape], "order": order}
    flat = tensor.resolve_conj().resolve_neg().permute(order).contiguous().flatten()
    position = flat.nonzero().flatten()
    gaps = pack_positions(position.numpy())
    if len(gaps) + len(position) * flat.element_size() < flat.nbytes:
        flat, found["gaps"], found["count"] = flat[position], places.write(gaps.tobytes()), len(position)
    numbers.write(flat.view(torch.uint8).numpy().tobytes())
    return found


def write_layer(start: Tensor, column: Tensor, width: int, turned: int, places: io.BytesIO) -> dict[str, int]:
    """Write the indices of a sparse layer; return what they are."""
    position = positions(start, column, width)
    if bool((position.diff() <= 0).any()):
        raise ValueError("Expected different columns in each row of a sparse layer, in ascending order.")
    gaps = places.write(pack_positions(position.numpy()).tobytes())
    return {"rows": len(start) - 1, "width": width, "turned": turned, "gaps": gaps}


class Pieces:
    """The bytes of a member of the archive, taken piece by piece."""

    def __init__(self, content: bytes):
        self.content, self.taken = content, 0

    def take(self, count: int) -> np.ndarray:
        if not 0 <= count <= len(self.content) - self.taken:
            raise ValueError(f"it ends {count - len(self.content) + self.taken} bytes too early")
        self.taken += count
        return np.frombuffer(self.content, np.uint8, count, self.taken - count)


def made(content: bytes) -> Program:
    """Return the program of a file's content; raise whatever is wrong with it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if sorted(archive.namelist()) != sorted((PROGRAM, TENSORS, POSITIONS)):
            raise ValueError("it is another kind of archive")
        description = json.loads(archive.read(PROGRAM))
        numbers, places = Pieces(archive.read(TENSORS)), Pieces(archive.read(POSITIONS))
    if description["format"] != FORMAT or description["version"] != VERSION:
        raise ValueError(f"it has format {description['format']!r}, version {description['version']!r}")
    check_size(description, FREE_BYTES + BYTES_PER_BYTE * len(content))
    tensors = [read_tensor(numbers, places, **each) for each in description["tensors"]]
    layers = [read_layer(places, **each) for each in description["layers"]]
    try:
        return Program(description, tensors, layers)
    except ValueError as error:
        raise ValueError(f"{error} It was saved with torch {description['torch']}.") from None


def check_size(description: dict[str, Any], most: int) -> None:
    """Refuse a small file whose tensors would fill the memory."""
    size = sum(math.prod(each["shape"]) * DTYPES[each["dtype"]].itemsize for each in description["tensors"])
    size += sum(4 * (each["rows"] + each["turned"]) for each in description["layers"])
    if size > most:
        raise ValueError(f"its tensors take {size} bytes, and expected were at most {most}")


def read_tensor(numbers: Pieces, places: Pieces, dtype: str, shape, order, gaps=None, count=0) -> Tensor:
    """Return a tensor as `write_tensor` wrote it."""
    kind, sizes = DTYPES[dtype], [shape[dim] for dim in order]
    if sorted(order) != [*range(len(shape))]:
        raise ValueError(f"a tensor of shape {shape} has its dimensions in the order {order}")
    piece = numbers.take((math.prod(shape) if gaps is None else count) * kind.itemsize)
    raw = torch.empty(len(piece), dtype=torch.uint8)
    raw.numpy()[:] = piece
    if kind is torch.bool and bool((raw > 1).any()):
        raise ValueError("a bool tensor has bytes other than 0 and 1")
    flat = raw.view(kind)
    if gaps is not None:
        place = read_places(places, gaps, count, math.prod(shape))
        flat = flat.new_zeros(math.prod(shape)).index_put_((place,), flat)
    return flat.reshape(sizes).permute([order.index(dim) for dim in range(len(shape))])


def read_layer(places: Pieces, rows: int, width: int, turned: int, gaps: int) -> tuple[Tensor, ...]:
    """Return the indices of a sparse layer, without those that only gradients read."""
    position = read_places(places, gaps, None, rows * width)
    start, column = indices_of(position, torch.Size((rows, width)))
    empty = column.new_empty(0)
    return start, column, torch.zeros(turned, dtype=torch.int32), empty, empty


def read_places(places: Pieces, gaps: int, count: int | None, size: int) -> Tensor:
    packed = places.take(gaps)
    position = torch.from_numpy(unpack_positions(packed))
    wrong = count is not None and count != len(position)
    if wrong or (gaps and packed[-1] == ESCAPE) or (len(position) and int(position[-1]) >= size):
        raise ValueError("positions do not fit what they are of")
    return position
