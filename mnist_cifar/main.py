"""Train a sparse network on MNIST, CIFAR-10 or scikit-learn's digits.

    python main.py --data digits --model lenet300-100 --density 0.05
    python main.py --data mnist --model lenet5 --density 0.05
    python main.py --data cifar --model wrn-16-8 --density 0.05 --amp bf16
    torchrun --nproc_per_node 2 main.py --data cifar --model wrn-16-8 --density 0.05 --amp bf16

A run leaves runs/<data>-<model>-<density>-<seed>-<hash>/ with args.json, log.txt, metrics.jsonl, checkpoint.pt,
curves.png and density.png. `--resume <that folder>` goes on where it was stopped, with the same arguments; a command
with `--resume auto` goes on if its run has begun, and begins it if not. On SIGTERM and SIGINT (Ctrl-C) the run writes a
checkpoint after the running step, and exits with status 143 or 130.
"""

import argparse
import logging
import os
import sys
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch loads: spinning threads fight for shared cores

import torch
from extensions import EXTENSIONS
from tqdm.contrib.logging import logging_redirect_tqdm

from sparselearning import checkpoint, models
from sparselearning.core import Masking, add_sparse_args
from sparselearning.experiments.data import in_memory as datasets
from sparselearning.experiments.report import features, plots
from sparselearning.experiments.report.bench import LayerBench
from sparselearning.experiments.run import resuming
from sparselearning.experiments.run.arguments import (
    ArgumentParser,
    add_checkpoint_args,
    check_sparse_backend,
    fail,
    seed,
)
from sparselearning.experiments.run.costs import describe, flops_of_run, relative_flops
from sparselearning.experiments.run.folder import MAY_CHANGE, RunFolder, arguments_of, check_same_run
from sparselearning.experiments.run.start import choice_of_weights
from sparselearning.experiments.run.training import (
    ApexPrecision,
    NotFinite,
    Precision,
    Progress,
    evaluate,
    find_apex,
    progress_bar,
    seed_generators,
    train_epoch,
)
from sparselearning.flags import chosen_method, fraction, non_negative, positive_int, proper_fraction
from sparselearning.flops import forward_flops
from sparselearning.functions import FunctionError
from sparselearning.native.allocator import keep_freed_memory
from sparselearning.processes import distributed
from sparselearning.sparse import convert, to_dense
from sparselearning.start.maskable import maskable_parameters
from sparselearning.weights.optimizer import torch_optimizer

IMAGE_SHAPES = {"digits": (1, 28, 28), "mnist": (1, 28, 28), "cifar": (3, 32, 32)}

logger = logging.getLogger("mnist_cifar")


def parse_arguments(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("main.py", description=__doc__, formatter_class=form)
    add = parser.add_argument
    # fmt: off
    add("--data", choices=[*datasets.SOURCES], default="mnist", help="data set (default: mnist)")
    add("--model", default="lenet300-100", help=f"{', '.join(models.MODELS)} (default: lenet300-100)")
    add("--batch-size", type=positive_int, default=100, metavar="N", help="images per step (default: 100)")
    add("--test-batch-size", type=positive_int, default=100, metavar="N", help="the same in evaluation (default: 100)")
    add("--epochs", type=positive_int, default=100, metavar="N", help="epochs to train (default: 100)")
    add("--start-epoch", type=positive_int, default=1, metavar="N", help="number of the first epoch (default: 1)")
    add("--optimizer", choices=["sgd", "adam"], default="sgd", help="sgd is Nesterov's (default: sgd)")
    add("--lr", type=non_negative, default=0.1, help="learning rate (default: 0.1)")
    add("--momentum", type=fraction, default=0.9, help="momentum of sgd (default: 0.9)")
    add("--l2", type=non_negative, default=5e-4, help="weight decay (default: 5e-4)")
    add("--l1", type=non_negative, default=0.0, help="factor of the sum of |weights| in the loss (default: 0)")
    add("--decay_frequency", type=positive_int, default=25000, metavar="STEPS",
        help="multiply lr by 0.1 every so many steps (default: 25000)")
    add("--valid_split", type=proper_fraction, default=0.1,
        help="last fraction of the training images, held out for validation (default: 0.1)")
    add("--seed", type=seed, default=17, help="random seed (default: 17)")
    add("--iters", type=positive_int, default=1, metavar="N",
        help="runs to make, with seeds seed, seed + 1, ... (default: 1)")
    add("--device", type=available_device, default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, cuda:1, mps, ... (default: %(default)s)")
    add("--no-cuda", action="store_const", const="cpu", dest="device", help="the same as --device cpu")
    add("--amp", choices=["none", "bf16", "fp16"], default="none", help="mixed precision (default: none)")
    add("--fp16", action="store_true",
        help="fp16 with fp32 master weights: by Apex where it is installed, else --amp fp16")
    add("--compile", action="store_true", help="compile the model with torch.compile")
    add("--max-threads", type=positive_int, default=10, metavar="N",
        help="CPU threads, at most one a core (default: 10)")
    add("--data-dir", help="folder of the data files (default: $SPARSELEARNING_DATA or ./data)")
    add("--run-dir", default="runs", help="folder of the run folders (default: runs)")
    add("--resume", metavar="PATH",
        help="run folder or checkpoint to go on from, the arguments default to those of its run then; "
        "auto: the newest good checkpoint of the run with these arguments, if there is one")
    add_checkpoint_args(parser)
    add("--save-model", metavar="FILE", help="write the trained model's state_dict there too")
    add("--log-interval", type=positive_int, default=100, metavar="STEPS",
        help="steps between two losses shown (default: 100)")
    add("--save-features", action="store_true",
        help="write features.npz, for plot_feature_histograms.py; with --resume, of the saved model")
    add("--bench", action="store_true", help="time the layers on the test set, dense and on sparse kernels")
    # fmt: on
    add_sparse_args(parser, EXTENSIONS)
    args = parser.parse_args(argv)
    if goes_on(args) and args.resume != "auto":
        take_defaults_of_run(parser, args)
        args = parser.parse_args(argv)
    check(parser, args)
    return args


def goes_on(args):
    """Tell whether a run goes on, rather than begins (from weights that exist, perhaps)."""
    return bool(args.resume) and args.sparse_init != "resume"


def take_defaults_of_run(parser, args):
    """Let the arguments of the run to be resumed be the defaults."""
    try:
        saved = arguments_of(args.resume)
    except (checkpoint.CheckpointError, OSError) as error:
        parser.error(str(error))
    kept = vars(args).keys() - MAY_CHANGE | {"epochs"}
    if saved.get("sparse_init") != "resume":
        kept |= {"sparse_init"}
    parser.set_defaults(**{name: saved[name] for name in kept & saved.keys()})
    folder = Path(args.resume) if Path(args.resume).is_dir() else Path(args.resume).parent
    if (folder / "args.json").is_file():
        parser.set_defaults(run_dir=str(folder.parent))


def available_device(text):
    """Parse the name of a device that this machine has."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"no device {text!r} here: {str(error).splitlines()[0]}") from None
    return text


def check(parser, args):
    """End with one line and exit status 2 where arguments do not fit together."""
    sparse, modes = not args.dense, {args.growth, args.redistribution}
    no_momentum = args.optimizer == "sgd" and args.momentum == 0
    if sparse and no_momentum and any("momentum" in mode for mode in modes if ":" not in mode):
        advice = "--momentum 0.9, or --growth random --redistribution nonzeros"
        parser.error(f"--growth momentum and --redistribution momentum need a momentum: {advice}")
    if sparse and args.optimizer != "adam" and {args.prune, args.redistribution} & {"magnitude_variance", "variance"}:
        parser.error("variance functions need Adam's second moment: add --optimizer adam --lr 0.001")
    if args.sparse_init == "resume" and not args.resume:
        parser.error("--sparse-init resume takes the nonzeros of a checkpoint: add --resume PATH")
    if args.sparse_init == "resume" and args.resume == "auto":
        parser.error("--sparse-init resume takes the nonzeros of a checkpoint: --resume auto names none")
    if args.iters > 1 and goes_on(args) and args.resume != "auto":
        parser.error("--resume goes on with one run: leave out --iters")
    if args.iters > 1 and args.save_model:
        parser.error("--save-model keeps one model: leave out --iters, every run keeps a checkpoint")
    if args.save_model and not Path(args.save_model).absolute().parent.is_dir():
        parser.error(f"--save-model {args.save_model}: there is no folder {Path(args.save_model).parent}")
    if args.save_features and args.model == "lenet300-100":
        parser.error("--save-features looks at the channels of convolutions, and lenet300-100 has none: --model lenet5")
    if args.start_epoch > args.epochs:
        parser.error(f"--start-epoch {args.start_epoch} is after the last of {args.epochs} epochs")
    try:
        models.check_input(args.model, IMAGE_SHAPES[args.data])
    except ValueError as error:
        parser.error(str(error))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % processes:
        parser.error(f"--batch-size {args.batch_size} cannot be divided evenly among {processes} processes")
    if processes > 1 and (args.save_features or args.bench):
        parser.error("--save-features and --bench look at one process: --resume the run without torchrun for them")
    check_sparse_backend(parser, args, args.device)
    if args.fp16:
        args.amp = "apex" if find_apex() else "fp16"


def run(args):
    """Make one run, and return its folder."""
    device = distributed.start(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    torch.set_num_threads(min(args.max_threads, os.cpu_count() or 1))
    seed_generators(args.seed)
    found = resuming.find(args)
    args.resume = found and str(found[0])
    if found and goes_on(args):
        check_same_run(args.resume, found[1].get("args", {}), args)

    data = datasets.load(args.data, args.data_dir, device, args.valid_split)
    look = dict(mean=data.mean, std=data.std, channels_last=True)
    steps_per_epoch = datasets.count_batches(data.train, args.batch_size)

    def in_order(split, watch=iter):
        return datasets.share(watch(datasets.batches(split, args.test_batch_size, **look)))

    def one_batch():
        return list(islice(datasets.batches(data.train, args.batch_size, shuffle=True, **look), 1))

    model = models.build(args.model).to(device, memory_format=torch.channels_last)
    if args.sparse_init == "resume":
        checkpoint.load_weights(args.resume, model)
    flops = forward_flops(model, torch.zeros(1, *IMAGE_SHAPES[args.data], device=device))
    if args.compile:
        model.compile()
    optimizer = build_optimizer(args, model)
    precision = Precision(args.amp, device)
    if args.amp == "apex":
        precision = ApexPrecision(model, optimizer)
        optimizer = precision.optimizer
    scheduler = torch.optim.lr_scheduler.StepLR(torch_optimizer(optimizer), args.decay_frequency, gamma=0.1)
    weights = sum(weight.numel() for _, weight in maskable_parameters(model))
    to_score = None if goes_on(args) else one_batch
    mask = None if args.dense else build_mask(args, model, optimizer, args.epochs * steps_per_epoch, to_score)

    parts = dict(model=model, optimizer=torch_optimizer(optimizer), scheduler=scheduler, precision=precision)
    if mask is not None:
        parts["mask"] = mask
    # Before a checkpoint is loaded: it sends the first process's statistics of BatchNorm to all.
    network = distributed.replicate(model)
    first_epoch, begun, metrics = args.start_epoch, None, None
    if found and goes_on(args):
        first_epoch, begun = resuming.take(*found, parts, model)
        metrics = found[1]["metrics"]
    folder = RunFolder(args, metrics)

    with folder.log():
        logger.info("%s: %s", folder.path, " ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))
        if args.fp16:
            logger.info("fp16 by %s", "Apex" if args.amp == "apex" else "torch.amp, for Apex is not installed")
        if mask is not None:
            logger.info("density %.4f: %d weights active, %d not", mask.density, mask.total_nonzero, mask.total_zero)
        logger.info(describe(flops, relative_flops(flops, mask, steps_per_epoch)))

        with resuming.StopRequests() as stop:
            checkpoints = resuming.Checkpoints(folder, parts, model, args, stop, steps_per_epoch)
            for epoch in range(first_epoch, args.epochs + 1):
                progress = begun or Progress(order=torch.randperm(len(data.train)))
                begun = None
                left = dict(order=progress.order, start=progress.steps)
                batches = datasets.batches(data.train, args.batch_size, augment=data.augment, **left, **look)
                batches = datasets.share(batches, evenly=True)
                after_step = partial(checkpoints.after_step, epoch, progress)
                try:
                    with progress_bar(f"epoch {epoch}", steps_per_epoch) as report:
                        shown = dict(report=report, report_every=args.log_interval)
                        settings = dict(l1=args.l1, progress=progress, after_step=after_step, **shown)
                        loss = train_epoch(network, batches, mask or optimizer, scheduler, precision, **settings)
                    watch = partial(checkpoints.watch, epoch=epoch, progress=progress)
                    valid = None if data.valid is None else evaluate(model, in_order(data.valid, watch), precision)
                except NotFinite as error:
                    raise NotFinite(f"Epoch {epoch}: {error}. {folder.kept()} Try a lower --lr.") from None
                record = dict(epoch=epoch, steps=epoch * steps_per_epoch, train_loss=loss)
                if valid is not None:
                    record |= dict(valid_loss=valid.loss, valid_accuracy=valid.accuracy)
                record |= dict(lr=scheduler.get_last_lr()[0], density=1.0, active_weights=weights)
                record |= relative_flops(flops, mask, steps_per_epoch)
                if mask is not None:
                    densities = {layer.name: layer.density for layer in mask.layers}
                    record |= dict(density=mask.density, active_weights=mask.total_nonzero, density_per_layer=densities)
                    record |= dict(prune_rate=mask.prune_rate, exploration_rate=mask.exploration_rate)
                    if epoch < args.epochs:
                        try:
                            mask.at_end_of_epoch()
                        except ValueError as error:  # an importance is infinite
                            raise NotFinite(f"Epoch {epoch}: {error} {folder.kept()}") from None
                folder.add(**record, seconds=progress.seconds)
                logger.info(folder.line())
                checkpoints.after_epoch(epoch)

        if mask is not None and distributed.in_process_group():
            distributed.check_agreement(list(mask.masks.values()))
        test = evaluate(model, in_order(data.test), precision)
        whole_run = flops_of_run(folder.metrics)
        folder.add(
            **dict(test_loss=test.loss, test_accuracy=test.accuracy, test_correct=test.correct, test_total=test.total),
            **whole_run,
        )
        if not folder.writes:
            return folder
        if args.save_model:
            checkpoint.write_atomically(args.save_model, lambda file: torch.save(model.state_dict(), file))
        # A compiled model does not call hooks that come later.
        with torch.compiler.set_stance("force_eager") if args.compile else nullcontext():
            if args.save_features:
                seen = features.collect(model, in_order(data.test), data.classes)
                features.save(seen, folder.path / "features.npz")
            if args.bench:
                plain = to_dense(model)
                with LayerBench(plain) as bench:
                    evaluate(plain, in_order(data.test), precision)
                images = next(iter(in_order(data.test)))[0]
                logger.info(bench.table(convert(plain, images)[1]))
        plots.plot_curves(folder.metrics, folder.path / "curves.png")
        if mask is not None:
            plots.plot_density(folder.metrics, folder.path / "density.png")
        logger.info(describe(flops, whole_run))
        logger.info("Test evaluation: %s", test)
    return folder


def build_optimizer(args, model):
    """Return the optimizer that the arguments ask for."""
    settings = dict(lr=args.lr, weight_decay=args.l2, fused=args.device.startswith(("cpu", "cuda")))
    if args.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), **settings)
    return torch.optim.SGD(model.parameters(), momentum=args.momentum, nesterov=args.momentum > 0, **settings)


def build_mask(args, model, optimizer, steps, to_score=None):
    """Return the masks that the arguments ask for, for a training of `steps`.

    `to_score` returns the batches that scores before training are computed on.
    """
    kind = dict(verbose=args.verbose, fp16=args.amp == "apex", sparse_backend=args.sparse_backend)
    chosen = choice_of_weights(args, to_score)
    return Masking.from_method(chosen_method(args, EXTENSIONS), model, optimizer, steps, **chosen, **kind)


def main(argv=None):
    args = parse_arguments(argv)
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR  # one process of many speaks
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    try:
        with logging_redirect_tqdm(), resuming.handled(resuming.stop_at_once), distributed.noticing_losses():
            for i in range(args.iters):
                run(argparse.Namespace(**{**vars(args), "seed": args.seed + i}))
    except (datasets.DataError, checkpoint.CheckpointError, NotFinite, FunctionError, OSError, ValueError) as error:
        fail("main.py", error)
    except distributed.ProcessError as error:
        fail("main.py", error, status=1)
    except KeyboardInterrupt as stop:
        resuming.end_stopped("main.py", stop)
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
