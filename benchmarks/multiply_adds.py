"""How many multiply-adds a core makes when each reads its input from a buffer: what sparse kernels can reach.

    python benchmarks/multiply_adds.py

A sparse product reads 64 neighbouring numbers for each nonzero, at random places of the buffer, and keeps 64 sums in
registers. The smallest buffer is half of a first-level cache; its numbers are fp32, or bf16 or fp16, which are widened
when they are read. Figures are 10^9 multiply-adds a second, on one thread. Needs g++ and a processor with AVX2.
"""

import ctypes
import logging
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import common
import torch

KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NUMBERS = (4096, 16384, 65536, 262144)  # in the buffer
ROWS, NONZEROS, TILE = 128, 57, 64  # a row of 128 channels, 3x3, at density 0.05


def main():
    """Measure, log and save."""
    args = common.parse(__doc__, rounds=15)
    torch.set_num_threads(1)
    library = built()
    rows = [measure(args, library, numbers) for numbers in (NUMBERS[:2] if args.quick else NUMBERS)]
    for row in rows:
        logging.info(" ".join(f"{key}={value}" for key, value in row.items()))
    common.save(args, "multiply_adds", rows)


def built() -> ctypes.CDLL:
    """Return the compiled product."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "multiply_adds.so"
        source = Path(__file__).with_suffix(".cpp")
        subprocess.run(["g++", "-O3", "-mavx2", "-mfma", "-mf16c", "-shared", "-fPIC", source, "-o", file], check=True)
        return ctypes.CDLL(str(file))


def measure(args, library, numbers: int) -> dict:
    """Return the rates of each kind of number, from a buffer of so many; the outputs are checked."""
    torch.manual_seed(0)
    buffer, value = torch.randn(numbers), torch.randn(ROWS * NONZEROS)
    offset = torch.randint((numbers - TILE) // 16, (ROWS * NONZEROS,), dtype=torch.int32) * 16
    read = buffer[offset.long()[:, None] + torch.arange(TILE)]
    calls, kept = {}, []
    for number, (name, dtype) in enumerate(KINDS.items()):
        tensors = [buffer.to(dtype), offset, value, torch.empty(ROWS, TILE)]
        kept += tensors  # as long as the calls, which hold their addresses alone
        *given, sums = (ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors)
        calls[name] = partial(library.product_of, number, *given, ctypes.c_int64(ROWS), ctypes.c_int64(NONZEROS), sums)
        calls[name]()
        expected = (value[:, None] * read.to(dtype).float()).view(ROWS, NONZEROS, TILE).sum(1)
        torch.testing.assert_close(tensors[-1], expected, atol=1e-3, rtol=1e-4)
    seconds = common.alternate(calls, args.rounds, calls=20)
    rates = {name: ROWS * NONZEROS * TILE / common.summary(each)["median"] / 1e9 for name, each in seconds.items()}
    return dict(numbers=numbers, kib_fp32=numbers // 256) | {name: round(rate, 1) for name, rate in rates.items()}


if __name__ == "__main__":
    main()
