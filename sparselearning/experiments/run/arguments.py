"""Command-line arguments that the scripts share."""

import argparse
import os
import sys
from typing import NoReturn

from sparselearning.flags import parse_value, positive_int


class ArgumentParser(argparse.ArgumentParser):
    """A parser that ends on a mistake with one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        fail(self.prog, message)


def fail(program: str, message: object, status: int = 2) -> NoReturn:
    """Print the message of an error as one line on stderr, and exit; status 2 is a user's mistake."""
    print(f"{program}: error: {' '.join(str(message).split())}", file=sys.stderr)
    sys.exit(status)


def check_sparse_backend(parser: argparse.ArgumentParser, args: argparse.Namespace, device: str) -> None:
    """End with one line where --sparse-backend meets what its kernels cannot do."""
    if not args.sparse_backend:
        return
    reason = (
        "trains active weights only: leave out --dense"
        if args.dense
        else f"computes on the CPU, not on {device}: add --device cpu"
        if device != "cpu"
        else "computes in fp32: leave out --amp and --fp16"
        if args.amp != "none" or args.fp16
        else "trains in one process: leave out torchrun"
        if int(os.environ.get("WORLD_SIZE", 1)) > 1
        else "chooses its own kernels: leave out --compile"
        if args.compile
        else ""
    )
    if reason:
        parser.error(f"--sparse-backend cpu {reason}")


def add_checkpoint_args(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that say when a checkpoint is written besides at the end of an epoch, and how many stay."""
    parser.add_argument(
        "--checkpoint-every",
        type=positive_int,
        metavar="STEPS",
        help="write a checkpoint every so many steps too (default: at the end of an epoch, and on a signal)",
    )
    parser.add_argument(
        "--keep",
        type=positive_int,
        default=2,
        metavar="N",
        help="checkpoints to keep: checkpoint.pt, and checkpoint.1.pt, ... before it (default: %(default)s)",
    )


def seed(text: str) -> int:
    """Parse a whole number that every random-number generator takes as its seed."""
    return parse_value(text, int, lambda n: 0 <= n < 2**31, "a whole number from 0 to 2147483647")
