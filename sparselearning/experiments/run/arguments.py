"""The command line of both scripts: the flags that they share, and which arguments exclude each other."""

import argparse
import os
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from typing import Any

import torch

from sparselearning.experiments.run.precision import find_apex
from sparselearning.flags import chosen_method, holds_active_alone, parse_value, positive_int
from sparselearning.functions import surely_reads
from sparselearning.methods import Method, find_function

Condition = tuple[bool, str]  # whether the arguments exclude each other, and what to say then


def add_run_args(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how and where a run computes, what it goes on from, and what it keeps."""
    add = parser.add_argument
    # fmt: off
    add("--start-epoch", type=positive_int, default=1, metavar="N", help="number of the first epoch (default: 1)")
    add("--seed", type=seed, default=17, help="random seed (default: 17)")
    add("--device", type=available_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, mps, ...; under torchrun cuda is the process's own GPU (default: cuda if "
        "there is a GPU, else cpu)")
    add("--max-threads", type=positive_int, default=10, metavar="N",
        help="CPU threads of a process, at most one a core or OMP_NUM_THREADS (default: 10)")
    add("--amp", choices=["none", "bf16", "fp16"], default="none", help="mixed precision (default: none)")
    add("--fp16", action="store_true",
        help="fp16 with fp32 master weights: by Apex where it is installed, else --amp fp16")
    add("--compile", action=argparse.BooleanOptionalAction, default=False,
        help="compile the model with torch.compile")
    add("--run-dir", default="runs", help="folder of the run folders (default: runs)")
    add("--tensorboard", action="store_true", help="also write the metrics for TensorBoard, in the run folder")
    add("--resume", metavar="PATH",
        help="run folder or checkpoint to go on from; the other arguments default to those of its run. "
        "auto: the newest good checkpoint of the run with these arguments, if there is one")
    add("--checkpoint-every", type=positive_int, metavar="STEPS",
        help="also write a checkpoint every so many steps (default: at the end of an epoch, and on a signal)")
    add("--keep", type=positive_int, default=2, metavar="N",
        help="checkpoints to keep: checkpoint.pt, and checkpoint.1.pt, ... before it (default: %(default)s)")
    # fmt: on


def seed(text: str) -> int:
    """Parse a whole number that every random-number generator takes as its seed."""
    return parse_value(text, int, lambda n: 0 <= n < 2**31, "a whole number from 0 to 2147483647")


def available_device(text: str) -> str:
    """Parse the name of a device that this machine has."""
    try:
        device = torch.device(text)
        if device.type == "cuda" and "LOCAL_RANK" in os.environ:  # see distributed.start
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = re.split("[.\n]", str(error))[0]  # torch may go on with all that it supports
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {reason}") from None
    return text


def check(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    own: Iterable[Condition],
    extensions: Mapping[str, Mapping[str, Callable[..., Any]]] | None = None,
) -> None:
    """End with one line and status 2 if arguments exclude each other, then let `args.amp` say what --fp16 means.

    Args:
        own: the conditions that this script has besides those of both.
        extensions: as `add_sparse_args` got them.
    """
    try:
        of_functions = [] if args.dense else _of_functions(args, chosen_method(args, extensions))
    except ValueError as error:
        parser.error(str(error))
    for excluded, reason in (*_of_both(args), *of_functions, *own):
        if excluded:
            parser.error(reason)
    if args.fp16:
        args.amp = "apex" if find_apex() and not vars(args).get("fsdp") else "fp16"


def processes() -> int:
    """Return the number of processes that torchrun starts; they have not met yet when arguments are parsed."""
    return int(os.environ.get("WORLD_SIZE", 1))


def goes_on(args: argparse.Namespace) -> bool:
    """Tell whether --resume goes on with a run.

    With --sparse-init resume it begins a new one from the weights of a checkpoint, unless --pretrained-weights says
    where these are.
    """
    return bool(args.resume) and (args.sparse_init != "resume" or bool(vars(args).get("pretrained_weights")))


def _of_both(args: argparse.Namespace) -> list[Condition]:
    given = vars(args)  # some flags are of one script alone
    from_nonzeros = args.sparse_init == "resume" and not given.get("pretrained_weights")
    parts = given.get("accumulate", 1)
    among = f"{processes()} processes" + (f" x {parts} parts (--accumulate)" if parts > 1 else "")
    return [
        (
            from_nonzeros and not args.resume,
            "--sparse-init resume takes the nonzeros of a checkpoint: add --resume PATH",
        ),
        (
            from_nonzeros and args.resume == "auto",
            "--sparse-init resume takes the nonzeros of a checkpoint: --resume auto names none",
        ),
        (
            args.score_batches > 1 and not goes_on(args) and args.sparse_init not in ("snip", "grasp"),
            f"--score-batches {args.score_batches} is of --sparse-init snip and grasp, got {args.sparse_init}: leave "
            "it out",
        ),
        (args.start_epoch > args.epochs, f"--start-epoch {args.start_epoch} is after the last of {args.epochs} epochs"),
        (
            args.batch_size % (processes() * parts) != 0,
            f"--batch-size {args.batch_size} cannot be divided evenly among {among}",
        ),
        (
            args.tensorboard and find_spec("tensorboard") is None,
            '--tensorboard needs TensorBoard: pip install "sparselearning[tensorboard]"',
        ),
        (args.fp16 and args.amp == "bf16", "--fp16 and --amp bf16 are two precisions: leave out one"),
        *_of_sparse_backend(args),
    ]


def _of_functions(args: argparse.Namespace, method: Method) -> list[Condition]:
    functions = [find_function(f"{part}_mode", getattr(method, part)) for part in ("prune", "growth", "redistribution")]
    optimizer = vars(args).get("optimizer", "sgd")

    def read(what):
        return any(surely_reads(function, what) for function in functions)

    return [
        (
            read("momentum") and optimizer == "sgd" and args.momentum == 0,
            "--growth momentum and --redistribution momentum need a momentum: --momentum 0.9, or --growth random "
            "--redistribution nonzeros",
        ),
        (
            read("second_moment") and optimizer not in ("adam", "adamw"),
            "variance functions need Adam's second moment: add --optimizer adam --lr 0.001",
        ),
        (
            read("inactive") and args.inactive == "zero",
            "dense_magnitude functions compare the values of inactive weights: add --inactive kept, or soft",
        ),
    ]


def _of_sparse_backend(args: argparse.Namespace) -> list[Condition]:
    if not holds_active_alone(args):
        return []
    reasons = [
        (args.dense, "trains active weights only: leave out --dense"),
        (
            torch.device(args.device).type != "cpu",
            f"computes on the CPU, not on {args.device}: add --device cpu",
        ),
        (args.amp != "none" or args.fp16, "computes in fp32: leave out --amp and --fp16"),
        (args.compile, "chooses its own kernels: leave out --compile"),
    ]
    flag = "--sparse-backend cpu" if args.sparse_backend else "--weights sparse"
    return [(excluded, f"{flag} {reason}") for excluded, reason in reasons]
