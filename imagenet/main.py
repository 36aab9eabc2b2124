"""Train a sparse ResNet-50, or another network, on ImageNet.

    python main.py DIR --recipe tuned --density 0.1 --amp bf16
    torchrun --nproc_per_node 8 main.py DIR --recipe baseline --density 0.2 --amp bf16
    python main.py DIR --arch resnet18 --image-size 64 --epochs 10 --batch-size 64

DIR holds train/<class>/<image> and val/<class>/<image>; `webdataset:DIR` holds tar shards train-*.tar and val-*.tar.
A run leaves runs/imagenet-<model>-<density>-<seed>-<hash>/ with args.json, log.txt, metrics.jsonl, checkpoint.pt,
checkpoint-best.pt, curves.png and density.png; a second run with the same arguments is refused while it lives.
`--resume <that folder>` goes on where it was stopped, with the same arguments and on any number of processes; a command
with `--resume auto` goes on if its run has begun, and begins it if not. `--resume <that folder> --evaluate` prints the
accuracy of its checkpoint, and writes nothing. On SIGTERM and SIGINT (Ctrl-C) the run writes a checkpoint after the
running step, and exits with status 143 or 130.

The masks move at the end of every epoch but the last (or every --prune-every-k-steps steps): a weight that has just
grown is still zero, and after the last epoch no step would train it.
"""

import errno
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

# Before torch loads: threads that spin for long fight for shared cores, and one that sleeps at once is slow to wake.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000")}

import torch
from command_line import build_parser, exclusions, fill_in
from networks import build_model, density_of_masked, shard
from torch.nn import functional as F

from sparselearning.experiments.data import photographs as images
from sparselearning.experiments.data.files import DataError
from sparselearning.experiments.data.verify import verify
from sparselearning.experiments.run import resuming, session
from sparselearning.experiments.run.arguments import check
from sparselearning.experiments.run.chance import at_chance, warn_at_chance
from sparselearning.experiments.run.costs import describe, flops_of_run
from sparselearning.experiments.run.folder import RunFolder, place
from sparselearning.experiments.run.lock import locked
from sparselearning.experiments.run.precision import choose_precision
from sparselearning.experiments.run.pretrained import load_pretrained
from sparselearning.experiments.run.start import build_masking, check_batch_norm, load_first_weights, memory_format
from sparselearning.experiments.run.stopping import StopRequests
from sparselearning.experiments.run.training import Progress, evaluate, progress_bar, seed_generators, train_epoch
from sparselearning.flops import forward_flops
from sparselearning.processes import distributed
from sparselearning.weights.optimizer import torch_optimizer

logger = logging.getLogger("imagenet")


def parse_arguments(argv=None):
    """Return the arguments; end with one line and exit status 2 where they exclude each other."""
    parser = build_parser(__doc__)
    args = parser.parse_args(argv)
    fill_in(args)
    check(parser, args, exclusions(args))
    return args


def run(args):
    """Make one run, and return its folder."""
    if args.verify:
        raise SystemExit(verify(args.data_dir, args.workers))
    device = session.start(args)
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    if args.evaluate:
        return evaluate_weights(args, device)
    with locked(place(args)) as lock:
        return train(args, device, lock)


def evaluate_weights(args, device):
    """Evaluate weights as they are on the validation images, log the result and return it; write nothing."""
    weights = resuming.weights_to_evaluate(args)
    source = images.source_of(args.data_dir, "val")
    loader = load_in_order(args, source, device, images.Skips(args.skip_bad_images))
    batches = images.on_device(loader, device, memory_format(args) is torch.channels_last)
    model = build_model(args, len(source.classes))
    load_pretrained(weights, model, hint=f"The images of {args.data_dir} have {len(source.classes)} classes.")
    model = model.to(device, memory_format=format_of_weights(args))
    if args.compile:
        model.compile()
    if args.fsdp:
        shard(model)
    precision, _ = choose_precision(args, model, build_optimizer(args, model), device)
    result = evaluate(model, batches, precision, F.cross_entropy)
    logger.info("Validation: %s, in five %.3f%%", result, 100 * result.accuracy_in_5)
    return result


def train(args, device, lock):
    """Make the run in its folder, which nobody else writes into."""
    found = resuming.find(args)

    classes, batches, train_loader, valid_loader = load_images(args, device)
    steps_per_epoch = len(batches) // args.accumulate
    loaded = partial(images.on_device, device=device, channels_last=memory_format(args) is torch.channels_last)

    def batches_to_score():
        return list(islice(loaded(train_loader), args.score_batches * args.accumulate))

    model = build_model(args, classes)
    load_first_weights(args, model)
    model = model.to(device, memory_format=format_of_weights(args))
    example = torch.zeros(1, 3, args.image_size, args.image_size, device=device)
    flops = forward_flops(model, example)
    check_batch_norm(model, example, images_of_a_part(args), args.batch_size, args.accumulate)
    if args.compile:
        model.compile()
    if args.fsdp:
        shard(model)
    precision, optimizer = choose_precision(args, model, build_optimizer(args, model), device)
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch_optimizer(optimizer), learning_rate(args, steps_per_epoch))
    masking = None
    if not args.dense:
        density = density_of_masked(args, model) if args.density_of == "network" else args.density
        masking = build_masking(args, model, optimizer, args.epochs * steps_per_epoch, batches_to_score, density)

    parts = resuming.parts_of_checkpoint(model, torch_optimizer(optimizer), scheduler, precision, masking, args.fsdp)
    # Before a checkpoint is loaded: it sends the first process's statistics of BatchNorm to all.
    network = model if args.fsdp else distributed.replicate(model)
    if rank := distributed.rank():  # each process drops out units of its own
        seed_generators(args.seed + 1000 * args.start_epoch + rank)
    first_epoch, begun, metrics = resuming.take(args, found, parts, model)
    folder = RunFolder(args, metrics, lock)

    # The rest needs only `train_on` and `validate`: they know precision, processes and the parts of a step.
    def train_on(batches, **more):
        loss_function = partial(F.cross_entropy, label_smoothing=args.label_smoothing)
        settings = dict(loss_function=loss_function, report_every=args.print_freq, accumulate=args.accumulate)
        return train_epoch(network, batches, masking or optimizer, scheduler, precision, **settings, **more)

    def validate(batches):
        return evaluate(model, batches, precision, F.cross_entropy)

    with folder.log():
        session.log_head(folder, args, masking, flops, steps_per_epoch)
        logger.info("%d processes on %s, %d steps an epoch", distributed.processes(), device.type, steps_per_epoch)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        active = parameters - (masking.total_zero if masking is not None else 0)
        logger.info("the whole network: %d of %d parameters, %.4f", active, parameters, active / parameters)

        if args.prof:
            profile(folder, device, lambda: train_on(islice(endless(loaded, train_loader), 10 * args.accumulate)))
            return folder
        if args.benchmark_training or args.benchmark_inference:
            for kind, work, loader in [("training", train_on, train_loader), ("inference", validate, valid_loader)]:
                if getattr(args, f"benchmark_{kind}"):
                    benchmark(args, folder, kind, work, endless(loaded, loader), args.batch_size // args.accumulate)
            return folder

        with StopRequests() as stop:
            checkpoints = resuming.Checkpoints(folder, parts, model, args, stop, steps_per_epoch)
            if metrics and begun is None:
                checkpoints.copy(found[0], copies_of(args, metrics))
            for epoch in range(first_epoch, args.epochs + 1):
                progress, begun = begun or Progress(), None
                batches.epoch, batches.start = epoch, progress.steps * args.accumulate
                after_step = partial(checkpoints.after_step, epoch, progress)
                with session.naming_errors(epoch, folder):
                    with progress_bar(f"epoch {epoch}", steps_per_epoch) as report:
                        loss = train_on(loaded(train_loader), progress=progress, after_step=after_step, report=report)
                    training_seconds = progress.seconds
                    valid = validate(checkpoints.watch(loaded(valid_loader), epoch, progress))
                    results = dict(train_loss=loss, valid_loss=valid.loss, valid_accuracy=valid.accuracy)
                    results |= dict(valid_accuracy_5=valid.accuracy_in_5, at_chance=at_chance(results, classes))
                    lr = scheduler.get_last_lr()[0]
                    record = session.record_of(epoch, steps_per_epoch, results, lr, flops, masking, active)
                    if masking is not None and epoch < args.epochs:
                        masking.at_end_of_epoch()
                record |= dict(images_per_second=steps_per_epoch * args.batch_size / training_seconds)
                folder.add(**record, seconds=progress.seconds)
                logger.info(folder.line())
                warn_at_chance(folder.metrics, args, classes)
                checkpoints.after_epoch(epoch, copies_of(args, folder.metrics))

        session.check_agreement(masking)
        session.draw_pictures(folder, masking)
        logger.info(describe(flops, flops_of_run(folder.metrics)))
        last = folder.metrics[-1]
        logger.info("Validation accuracy: %.4f, in five %.4f", last["valid_accuracy"], last["valid_accuracy_5"])
    return folder


def load_images(args, device):
    """Return the number of classes, the order of the training batches, and loaders for training and evaluation."""
    train_source, valid_source = images.sources(args.data_dir)
    skips = images.Skips(args.skip_bad_images)
    train_images = images.Photographs(train_source, args.image_size, train=True, seed=args.seed, skips=skips)
    if args.batch_size > len(train_images):
        raise DataError(
            f"--batch-size {args.batch_size} is more than the {len(train_images)} images of {args.data_dir}."
        )
    share = dict(rank=distributed.rank(), processes=distributed.processes())
    batches = images.TrainingBatches(len(train_images), args.batch_size, args.accumulate, **share, seed=args.seed)
    train_loader = images.load(train_images, batches, args.workers, device)
    return len(train_source.classes), batches, train_loader, load_in_order(args, valid_source, device, skips)


def load_in_order(args, source, device, skips):
    """Return a loader of this process's share of the images to evaluate."""
    valid_images = images.Photographs(source, args.image_size, train=False, skips=skips)
    share = dict(rank=distributed.rank(), processes=distributed.processes())
    in_order = images.EvaluationBatches(len(valid_images), images_of_a_part(args), **share)
    return images.load(valid_images, in_order, args.workers, device)


def images_of_a_part(args):
    """Return how many images a process computes at a time."""
    return args.batch_size // distributed.processes() // args.accumulate


def format_of_weights(args):
    """Return the memory format of the weights: NCHW for fully_shard, which takes no other.

    There the images are in channels_last, which is enough for the convolutions.
    """
    return torch.contiguous_format if args.fsdp else memory_format(args)


def build_optimizer(args, model):
    """Return SGD, without weight decay on normalisation and biases unless asked for."""
    parameters = list(model.parameters())
    groups = [
        dict(params=[p for p in parameters if p.dim() > 1], weight_decay=args.wd),
        dict(params=[p for p in parameters if p.dim() <= 1], weight_decay=args.wd if args.bn_weight_decay else 0.0),
    ]
    settings = dict(lr=args.lr * args.batch_size / 256, momentum=args.momentum)
    return torch.optim.SGD([group for group in groups if group["params"]], **settings)


def learning_rate(args, steps_per_epoch):
    """Return the function from the step to the factor of the learning rate: a linear warm-up, then steps of 0.1."""
    warmup = round(args.warmup * steps_per_epoch)
    decays = [round(epoch * steps_per_epoch) for epoch in args.decay_epochs]
    return lambda step: min((step + 1) / (warmup or 1), 1) * 0.1 ** sum(step >= decay for decay in decays)


def copies_of(args, metrics):
    """Return the names that the checkpoint of the last epoch has besides checkpoint.pt."""
    epochs = [record for record in metrics if "epoch" in record]
    is_best = epochs[-1]["valid_accuracy"] >= max(record["valid_accuracy"] for record in epochs)
    return ["checkpoint-best.pt"] * is_best + [f"checkpoint-{epochs[-1]['epoch']}.pt"] * args.gather_checkpoints


def endless(loaded, loader) -> Iterator:
    """Yield batches without end."""
    while True:
        yield from loaded(loader)


def benchmark(args, folder, kind, work, batches, images_per_batch):
    """Log how many images a second all processes together read and compute with."""
    work(islice(batches, args.bench_warmup * args.accumulate))
    started = time.perf_counter()
    work(islice(batches, args.bench_iterations * args.accumulate))  # ends by fetching the loss
    seconds = time.perf_counter() - started
    speed = args.bench_iterations * args.accumulate * images_per_batch / seconds
    folder.add(benchmark=kind, images_per_second=speed, iterations=args.bench_iterations)
    logger.info("%s: %.1f images per second, data loading included", kind, speed)


def profile(folder, device, work):
    """Profile ten steps: a table in the log, and trace.json for chrome://tracing or Perfetto."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        work()
    if distributed.rank() == 0:
        with folder.writing("trace.json"):
            write_trace(profiler, folder.path / "trace.json")
        by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        logger.info(profiler.key_averages().table(sort_by=by, row_limit=20))


def write_trace(profiler, path):
    """Write the trace of a profiler, which itself would leave half a file on a full disk and say nothing."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        written = Path(scratch) / path.name
        profiler.export_chrome_trace(str(written))
        trace = written.read_bytes() if written.exists() else b""
        if not trace.rstrip().endswith(b"}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.replace(path)


def main(argv=None):
    session.main("main.py", partial(parse_arguments, argv), run)


if __name__ == "__main__":
    main()
