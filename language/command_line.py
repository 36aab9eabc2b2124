"""The command line of main.py: its flags, what follows from others, and what excludes each other."""

import argparse

from networks import NETWORKS, PARTS, architecture

from sparselearning.core import add_sparse_args
from sparselearning.experiments.run.arguments import add_run_args
from sparselearning.experiments.run.folder import defaults_of_run
from sparselearning.flags import defaults_from, non_negative, positive_int, proper_fraction, whole_number
from sparselearning.parser import ArgumentParser

SIZES = dict(layers=6, width=384, heads=6, dropout=0.0)  # of gpt and llama


def build_parser(description=None):
    """Return the parser of the command line; --help shows the description."""
    form = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("main.py", description=description, formatter_class=form)
    add = parser.add_argument
    # fmt: off
    add("--data", default="python", metavar="TEXT",
        help="python (the source code of the Python that runs this), shakespeare, or a file or folder of text; the "
        "last tenth is held out (default: python)")
    add("--data-dir", help="folder of downloads and of large texts' tokens (default: $SPARSELEARNING_DATA or ./data)")
    add("--tokens", default="bytes", metavar="KIND",
        help="bytes, characters, or a tokenizer's file FILE.json of the package tokenizers (default: bytes)")
    add("-a", "--arch", dest="model", type=architecture, default="gpt", metavar="NAME",
        help=f"{', '.join(NETWORKS)}, or transformers:CONFIG, a model type or a JSON file (default: gpt)")
    add("--layers", type=positive_int, metavar="N", help="blocks of gpt and llama (default: 6)")
    add("--width", type=positive_int, metavar="N", help="entries of a token's vector in them (default: 384)")
    add("--heads", type=positive_int, metavar="N", help="heads of their attention (default: 6)")
    add("--kv-heads", type=positive_int, metavar="N", help="heads of llama's keys and values (default: as --heads)")
    add("--tied-head", action=argparse.BooleanOptionalAction,
        help="let the head be the embedding (default: in gpt, not in llama)")
    add("--dropout", type=proper_fraction, metavar="F", help="fraction of activations dropped in them (default: 0)")
    add("--context", type=positive_int, default=128, metavar="TOKENS",
        help="tokens that the model reads at a time (default: 128)")
    add("-b", "--batch-size", type=positive_int, default=16, metavar="N",
        help="windows of text per step, of all processes and parts together (default: 16)")
    add("--accumulate", type=positive_int, default=1, metavar="N",
        help="parts that a step's windows are computed in, one after the other (default: 1)")
    add("--steps", type=positive_int, default=5000, metavar="N", help="steps to train (default: 5000)")
    add("--eval-every", type=positive_int, metavar="STEPS",
        help="steps between two evaluations, which divide --steps; an epoch of the other flags "
        "(default: the highest of 50 to 250 that does, or else --steps)")
    add("--eval-windows", type=positive_int, default=256, metavar="N",
        help="windows of held-out text, at most as many as there are (default: 256)")
    add("--lr", "--learning-rate", type=non_negative, default=1e-3,
        help="highest learning rate; a cosine lowers it to a tenth (default: 0.001)")
    add("--warmup", type=whole_number, metavar="STEPS",
        help="steps of linear warm-up (default: 100, or a tenth of the steps if that is less)")
    add("--wd", "--weight-decay", type=non_negative, default=0.1,
        help="AdamW's weight decay, on matrices alone (default: 0.1)")
    add("--clip", type=non_negative, default=1.0, metavar="NORM",
        help="norm that gradients are clipped to; 0: none (default: 1)")
    add("-p", "--print-freq", type=positive_int, default=10, metavar="STEPS",
        help="steps between two losses shown (default: 10)")
    add("-e", "--evaluate", action="store_true",
        help="evaluate the weights of --resume, write nothing, and end; with --sample also write text")
    add("--sample", metavar="TEXT", help="write text that goes on from this one with the trained model")
    add("--sample-tokens", type=positive_int, default=300, metavar="N", help="tokens to write (default: 300)")
    add("--temperature", type=non_negative, default=0.8,
        help="what the logits are divided by; 0 takes the likeliest token (default: 0.8)")
    add("--top-k", type=positive_int, metavar="K", help="draw from the K likeliest tokens alone (default: all)")
    add_run_args(parser)
    # fmt: on
    add_sparse_args(parser, {})
    parser.set_defaults(optimizer="adamw", density=0.2)
    defaults_from(parser, "--resume", defaults_of_run, "--sparse-init")
    return parser


def fill_in(args):
    """Fill in what follows from other arguments; `epochs` is the number of evaluations."""
    if args.model in NETWORKS:
        for name, value in SIZES.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        if args.tied_head is None:
            args.tied_head = args.model == "gpt"
    if args.eval_every is None:
        args.eval_every = max((every for every in range(50, 251) if args.steps % every == 0), default=args.steps)
    if args.warmup is None:
        args.warmup = min(100, args.steps // 10)
    args.epochs = max(args.steps // args.eval_every, 1)
    args.layer_density = {PARTS.get(name, name): density for name, density in args.layer_density.items()}


def exclusions(args):
    """Return (condition, reason) pairs of arguments that exclude each other in this script alone."""
    of_sizes = [*SIZES, "kv_heads", "tied_head"]
    given = [f"--{name.replace('_', '-')}" for name in of_sizes if getattr(args, name) is not None]
    return [
        (
            args.steps % args.eval_every != 0,
            f"--eval-every {args.eval_every} does not divide --steps {args.steps}: the last evaluation is at the end",
        ),
        (
            args.model not in NETWORKS and bool(given),
            f"{', '.join(given)} of {args.model}: its configuration has the sizes; write them into a JSON file, --arch "
            "transformers:FILE.json",
        ),
        (
            bool(args.kv_heads) and args.model == "gpt",
            "--kv-heads is of llama: leave it out, or add --arch llama",
        ),
        (
            args.tokens not in ("bytes", "characters") and not args.tokens.endswith(".json"),
            f"--tokens expects bytes, characters or a file FILE.json, got {args.tokens!r}",
        ),
        (args.evaluate and not args.resume, "--evaluate needs the weights to evaluate: add --resume RUN_FOLDER"),
        (
            args.evaluate and args.sparse_init == "resume",
            "--evaluate trains nothing, and --sparse-init resume begins a run: leave out one of them",
        ),
        (
            args.sparse_init == "synflow" and not args.dense,
            "--sparse-init synflow reads an input of ones, and language models read the numbers of tokens: take snip, "
            "grasp or a distribution",
        ),
        (args.sample == "", "--sample expects at least one character to go on from"),
    ]
