"""Train a sparse network on MNIST, CIFAR-10 or scikit-learn's digits.

    python main.py --data digits --model lenet300-100 --density 0.05
    python main.py --data mnist --model lenet5 --density 0.05
    python main.py --data cifar --model wrn-16-8 --density 0.05 --amp bf16
    torchrun --nproc_per_node 2 main.py --data cifar --model wrn-16-8 --density 0.05 --amp bf16

A run leaves runs/<data>-<model>-<density>-<seed>-<hash>/ with args.json, log.txt, metrics.jsonl, checkpoint.pt,
curves.png and density.png; a second run with the same arguments is refused while it lives. `--resume <that folder>`
goes on where it was stopped, with the same arguments and on any number of processes; a command with `--resume auto`
goes on if its run has begun, and begins it if not. On SIGTERM and SIGINT (Ctrl-C) the run writes a checkpoint after the
running step, and exits with status 143 or 130.

The masks move at the end of every epoch but the last (or every --prune-every-k-steps steps): a weight that has just
grown is still zero, and after the last epoch no step would train it.
"""

import argparse
import logging
import os
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

# Before torch loads: threads that spin for long fight for shared cores, and one that sleeps at once is slow to wake.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000")}

import torch
from extensions import EXTENSIONS

from sparselearning import checkpoint, models
from sparselearning.core import add_sparse_args
from sparselearning.experiments.data import in_memory as datasets
from sparselearning.experiments.report import features
from sparselearning.experiments.report.bench import LayerBench
from sparselearning.experiments.run import resuming, session
from sparselearning.experiments.run.arguments import add_run_args, check, goes_on, processes
from sparselearning.experiments.run.chance import at_chance, warn_at_chance
from sparselearning.experiments.run.costs import describe, flops_of_run
from sparselearning.experiments.run.folder import RunFolder, defaults_of_run, place
from sparselearning.experiments.run.lock import locked
from sparselearning.experiments.run.precision import choose_precision
from sparselearning.experiments.run.start import build_masking, check_batch_norm, load_first_weights, memory_format
from sparselearning.experiments.run.stopping import StopRequests
from sparselearning.experiments.run.training import Progress, evaluate, progress_bar, train_epoch
from sparselearning.flags import defaults_from, fraction, non_negative, positive_int, proper_fraction
from sparselearning.flops import forward_flops
from sparselearning.parser import ArgumentParser
from sparselearning.processes import distributed
from sparselearning.sparse import convert, to_dense
from sparselearning.start.maskable import maskable_parameters
from sparselearning.weights.optimizer import torch_optimizer

IMAGE_SHAPES = {"digits": (1, 28, 28), "mnist": (1, 28, 28), "cifar": (3, 32, 32)}

logger = logging.getLogger("mnist_cifar")


def build_parser():
    """Return the parser of the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("main.py", description=__doc__, formatter_class=form)
    add = parser.add_argument
    # fmt: off
    add("--data", choices=[*datasets.SOURCES], default="mnist", help="data set (default: mnist)")
    add("--model", default="lenet300-100", help=f"{', '.join(models.MODELS)} (default: lenet300-100)")
    add("-b", "--batch-size", type=positive_int, default=100, metavar="N", help="images per step (default: 100)")
    add("--test-batch-size", type=positive_int, default=100, metavar="N", help="the same in evaluation (default: 100)")
    add("--epochs", type=positive_int, default=100, metavar="N", help="epochs to train (default: 100)")
    add("--optimizer", choices=["sgd", "adam"], default="sgd", help="sgd is Nesterov's (default: sgd)")
    add("--lr", "--learning-rate", type=non_negative, default=0.1, help="learning rate (default: 0.1)")
    add("--momentum", type=fraction, default=0.9, help="momentum of sgd (default: 0.9)")
    add("--l2", type=non_negative, default=5e-4, help="weight decay (default: 5e-4)")
    add("--l1", type=non_negative, default=0.0, help="factor of the sum of |weights| in the loss (default: 0)")
    add("--decay_frequency", type=positive_int, default=25000, metavar="STEPS",
        help="multiply lr by 0.1 every so many steps (default: 25000)")
    add("--valid_split", type=proper_fraction, default=0.1,
        help="last fraction of the training images, held out for validation (default: 0.1)")
    add("--iters", type=positive_int, default=1, metavar="N",
        help="runs to make, with seeds seed, seed + 1, ... (default: 1)")
    add("--data-dir", help="folder of the data files (default: $SPARSELEARNING_DATA or ./data)")
    add_run_args(parser)
    add("--no-cuda", action="store_const", const="cpu", dest="device", help="the same as --device cpu")
    add("--save-model", metavar="FILE", help="also write the trained model's state_dict to this file")
    add("--log-interval", type=positive_int, default=100, metavar="STEPS",
        help="steps between two losses shown (default: 100)")
    add("--save-features", action="store_true",
        help="write features.npz, for plot_feature_histograms.py; with --resume, of the saved model")
    add("--bench", action="store_true", help="time the layers on the test set, dense and on sparse kernels")
    # fmt: on
    add_sparse_args(parser, EXTENSIONS)
    defaults_from(parser, "--resume", defaults_of_run, "--sparse-init")
    return parser


def parse_arguments(argv=None):
    """Return the arguments; end with one line and exit status 2 where they exclude each other."""
    parser = build_parser()
    args = parser.parse_args(argv)
    check(parser, args, exclusions(args), EXTENSIONS)
    try:
        models.check_input(args.model, IMAGE_SHAPES[args.data])
    except ValueError as error:
        parser.error(str(error))
    return args


def exclusions(args):
    """Return (condition, reason) pairs of arguments that exclude each other in this script alone."""
    folder = next(place for place in Path(args.save_model or "model.pt").absolute().parents if place.exists())
    return [
        (
            args.iters > 1 and goes_on(args) and args.resume != "auto",
            "--resume goes on with one run: leave out --iters",
        ),
        (
            args.iters > 1 and bool(args.save_model),
            "--save-model keeps one model: leave out --iters, every run keeps a checkpoint",
        ),
        (not folder.is_dir(), f"--save-model {args.save_model}: {folder} is no folder"),
        (
            args.save_features and args.model == "lenet300-100",
            "--save-features looks at the channels of convolutions, and lenet300-100 has none: --model lenet5",
        ),
        (
            processes() > 1 and (args.save_features or args.bench),
            "--save-features and --bench look at one process: --resume the run without torchrun for them",
        ),
    ]


def run(args):
    """Make one run, and return its folder."""
    device = session.start(args)
    with locked(place(args)) as lock:
        return train(args, device, lock)


def train(args, device, lock):
    """Make the run in its folder, which nobody else writes into."""
    found = resuming.find(args)

    data = datasets.load(args.data, args.data_dir, device, args.valid_split)
    look = dict(mean=data.mean, std=data.std, channels_last=memory_format(args) is torch.channels_last)
    steps_per_epoch = datasets.count_batches(data.train, args.batch_size)

    def in_order(split, watch=iter):
        return datasets.share(watch(datasets.batches(split, args.test_batch_size, **look)))

    def batches_to_score():
        return list(islice(datasets.batches(data.train, args.batch_size, shuffle=True, **look), args.score_batches))

    model = models.build(args.model).to(device, memory_format=memory_format(args))
    load_first_weights(args, model)
    example = torch.zeros(1, *IMAGE_SHAPES[args.data], device=device)
    flops = forward_flops(model, example)
    check_batch_norm(model, example, args.batch_size // distributed.processes(), args.batch_size)
    if args.compile:
        model.compile()
    precision, optimizer = choose_precision(args, model, build_optimizer(args, model), device)
    scheduler = torch.optim.lr_scheduler.StepLR(torch_optimizer(optimizer), args.decay_frequency, gamma=0.1)
    weights = sum(weight.numel() for _, weight in maskable_parameters(model))
    masking = None
    if not args.dense:
        steps = args.epochs * steps_per_epoch
        masking = build_masking(args, model, optimizer, steps, batches_to_score, extensions=EXTENSIONS)

    parts = resuming.parts_of_checkpoint(model, torch_optimizer(optimizer), scheduler, precision, masking)
    # Before a checkpoint is loaded: it sends the first process's statistics of BatchNorm to all.
    network = distributed.replicate(model)
    first_epoch, begun, metrics = resuming.take(args, found, parts, model, len(data.train))
    folder = RunFolder(args, metrics, lock)

    with folder.log():
        session.log_head(folder, args, masking, flops, steps_per_epoch)

        with StopRequests() as stop:
            checkpoints = resuming.Checkpoints(folder, parts, model, args, stop, steps_per_epoch)
            for epoch in range(first_epoch, args.epochs + 1):
                progress, begun = begun or Progress(order=draw_order(len(data.train))), None
                left = dict(order=progress.order, start=progress.steps)
                batches = datasets.batches(data.train, args.batch_size, augment=data.augment, **left, **look)
                batches = datasets.share(batches, evenly=True)
                after_step = partial(checkpoints.after_step, epoch, progress)
                watch = partial(checkpoints.watch, epoch=epoch, progress=progress)
                with session.naming_errors(epoch, folder):
                    with progress_bar(f"epoch {epoch}", steps_per_epoch) as report:
                        shown = dict(report=report, report_every=args.log_interval)
                        settings = dict(l1=args.l1, progress=progress, after_step=after_step, **shown)
                        loss = train_epoch(network, batches, masking or optimizer, scheduler, precision, **settings)
                    training_seconds = progress.seconds
                    results = dict(train_loss=loss)
                    if data.valid is not None:
                        valid = evaluate(model, in_order(data.valid, watch), precision)
                        results |= dict(valid_loss=valid.loss, valid_accuracy=valid.accuracy)
                    results |= dict(at_chance=at_chance(results, data.classes, args.l1))
                    lr = scheduler.get_last_lr()[0]
                    record = session.record_of(epoch, steps_per_epoch, results, lr, flops, masking, weights)
                    if masking is not None and epoch < args.epochs:
                        masking.at_end_of_epoch()
                record |= dict(images_per_second=progress.steps * args.batch_size / training_seconds)
                folder.add(**record, seconds=progress.seconds)
                logger.info(folder.line())
                warn_at_chance(folder.metrics, args, data.classes)
                checkpoints.after_epoch(epoch)

        session.check_agreement(masking)
        test = evaluate(model, in_order(data.test), precision)
        tested = dict(
            test_loss=test.loss, test_accuracy=test.accuracy, test_correct=test.correct, test_total=test.total
        )
        whole_run = flops_of_run(folder.metrics)
        folder.add(**tested, **whole_run)
        if folder.writes:
            examine(args, model, precision, data, partial(in_order, data.test), folder)
        session.draw_pictures(folder, masking)
        logger.info(describe(flops, whole_run))
        logger.info("Test evaluation: %s", test)
    return folder


def draw_order(images):
    """Return an order of the training images, one for all processes, whatever each of them has drawn before."""
    return distributed.from_first(torch.randperm(images))


def build_optimizer(args, model):
    """Return the optimizer that the arguments ask for."""
    settings = dict(lr=args.lr, weight_decay=args.l2, fused=args.device.startswith(("cpu", "cuda")))
    if args.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), **settings)
    return torch.optim.SGD(model.parameters(), momentum=args.momentum, nesterov=args.momentum > 0, **settings)


def examine(args, model, precision, data, test_batches, folder):
    """Write the trained model, its features and the time of its layers, where the arguments ask for them."""
    if args.save_model:
        with folder.writing(args.save_model):
            Path(args.save_model).parent.mkdir(parents=True, exist_ok=True)
            checkpoint.write_atomically(args.save_model, lambda file: torch.save(model.state_dict(), file))
    # A compiled model does not call hooks that come later.
    with torch.compiler.set_stance("force_eager") if args.compile else nullcontext():
        if args.save_features:
            seen = features.collect(model, test_batches(), data.classes)
            with folder.writing("features.npz"):
                features.save(seen, folder.path / "features.npz")
        if args.bench:
            plain = to_dense(model)
            with LayerBench(plain) as bench:
                evaluate(plain, test_batches(), precision)
            images = next(iter(test_batches()))[0]
            logger.info(bench.table(convert(plain, images)[1]))


def run_all(args):
    """Make --iters runs, each with its own seed."""
    for i in range(args.iters):
        run(argparse.Namespace(**{**vars(args), "seed": args.seed + i}))


def main(argv=None):
    session.main("main.py", partial(parse_arguments, argv), run_all)


if __name__ == "__main__":
    main()
