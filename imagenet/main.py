"""Train a sparse ResNet-50, or another network, on ImageNet.

    python main.py DIR --recipe tuned --density 0.1 --amp bf16
    torchrun --nproc_per_node 8 main.py DIR --recipe baseline --density 0.2 --amp bf16
    python main.py DIR --arch resnet18 --image-size 64 --epochs 10 --batch-size 64

DIR holds train/<class>/<image> and val/<class>/<image>; `webdataset:DIR` holds tar shards train-*.tar and val-*.tar.
A run leaves runs/imagenet-<model>-<density>-<seed>-<hash>/ with args.json, log.txt, metrics.jsonl, checkpoint.pt,
checkpoint-best.pt, curves.png and density.png. `--resume <that folder>` goes on where it was stopped, with the same
arguments and on any number of processes; a command with `--resume auto` goes on if its run has begun, and begins it if
not. On SIGTERM and SIGINT (Ctrl-C) the run writes a checkpoint after the running step, and exits with status 143 or
130.

The masks move at the end of every epoch but the last (or every --prune-every-k-steps steps): a weight that has just
grown is still zero, and after the last epoch no step would train it.
"""

import argparse
import logging
import os
import time
from collections.abc import Iterator
from functools import partial
from itertools import islice

# Before torch loads: threads that spin for long fight for shared cores, and one that sleeps at once is slow to wake.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ |= {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": os.environ.get("GOMP_SPINCOUNT", "10000")}

import torch
from torch import nn
from torch.nn import functional as F

from sparselearning.core import add_sparse_args
from sparselearning.experiments.data import photographs as images
from sparselearning.experiments.data.files import DataError
from sparselearning.experiments.data.verify import verify
from sparselearning.experiments.run import resuming, session
from sparselearning.experiments.run.arguments import ArgumentParser, add_run_args, check, processes
from sparselearning.experiments.run.chance import at_chance, warn_at_chance
from sparselearning.experiments.run.costs import describe, flops_of_run
from sparselearning.experiments.run.folder import RunFolder, defaults_of_run
from sparselearning.experiments.run.precision import choose_precision
from sparselearning.experiments.run.start import build_masking, load_first_weights, memory_format
from sparselearning.experiments.run.stopping import StopRequests
from sparselearning.experiments.run.training import Progress, evaluate, progress_bar, seed_generators, train_epoch
from sparselearning.flags import defaults_from, fraction, non_negative, positive_int, whole_number
from sparselearning.flops import forward_flops
from sparselearning.models.resnet import RESNETS
from sparselearning.processes import distributed
from sparselearning.start.maskable import maskable_parameters, usual_exceptions
from sparselearning.start.names import named
from sparselearning.weights.optimizer import torch_optimizer

# Defaults of the arguments below. With other --epochs, warm-up and decay keep their place in the run.
RECIPES = {
    # Mostafa and Wang 2019, https://arxiv.org/abs/1902.05967: ResNet-50 v1, dense 74.9% top-1.
    "baseline": dict(
        epochs=100,
        decay_epochs=[30, 60, 90],
        warmup=0,
        label_smoothing=0.0,
        bn_weight_decay=True,
        model_config="classic",
        stride_in="1x1",
        dense_layers=["conv1", "*.downsample.*"],
    ),
    # NVIDIA's ResNet-50 v1.5, dense 77.0% top-1.
    "tuned": dict(
        epochs=90,
        decay_epochs=[30, 60, 80],
        warmup=5,
        label_smoothing=0.1,
        bn_weight_decay=False,
        model_config="fanin",
        stride_in="3x3",
        dense_layers=[],
    ),
}
FILLED_IN = ("warmup", "decay_epochs", "stride_in", "dense_layers")  # they depend on other arguments, too
FAN = {"classic": "fan_out", "fanin": "fan_in"}
WITHOUT_BOTTLENECK = ("resnet18", "resnet34")
logger = logging.getLogger("imagenet")


def build_parser():
    """Return the parser of the command line."""
    form = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("main.py", description=__doc__, formatter_class=form)
    place = parser.add_mutually_exclusive_group()
    add = parser.add_argument
    of_recipe = "(default: of the recipe)"
    # fmt: off
    place.add_argument("place", metavar="DIR", nargs="?",
        help="folder with train/ and val/, or webdataset:FOLDER with tar shards")
    place.add_argument("--data", dest="data_dir", metavar="DIR", help="the same")
    add("--verify", action="store_true",
        help="list all bad images, shards and labels, and end; status 1 if there are any")
    add("--skip-bad-images", type=whole_number, default=0, metavar="N",
        help="leave out up to N images that cannot be read (default: 0)")
    add("--recipe", choices=[*RECIPES], default="tuned", help="sets the defaults (default: tuned)")
    add("-a", "--arch", dest="model", type=architecture, default="resnet50", metavar="NAME",
        help=f"{', '.join(RESNETS)}, torchvision:NAME or timm:NAME (default: resnet50)")
    add("-c", "--model-config", choices=[*FAN], help=f"initialise ResNets by outputs or by inputs {of_recipe}")
    add("--stride-in", choices=["1x1", "3x3"],
        help=f"which convolution of a ResNet's bottleneck halves the image: v1's or v1.5's {of_recipe}")
    add("--image-size", type=positive_int, default=224, metavar="PIXELS", help="side of an image (default: 224)")
    add("-j", "--workers", type=whole_number, default=min(5, os.cpu_count() or 1), metavar="N",
        help="processes that load images, for each training process (default: 5, or one a core)")
    add("--epochs", type=positive_int, metavar="N", help=f"epochs to train {of_recipe}")
    add("-b", "--batch-size", type=positive_int, default=256, metavar="N",
        help="images per step, of all processes and parts together (default: 256)")
    add("--accumulate", type=positive_int, default=1, metavar="N",
        help="parts that a step's images are computed in, one after the other (default: 1)")
    add("--lr", "--learning-rate", type=non_negative, default=0.1,
        help="learning rate per 256 images of a step (default: 0.1)")
    add("--warmup", type=non_negative, metavar="EPOCHS", help=f"epochs of linear warm-up {of_recipe}")
    add("--decay-epochs", type=non_negative, nargs="*", metavar="EPOCH",
        help=f"epochs after which the learning rate is multiplied by 0.1 {of_recipe}")
    add("--label-smoothing", type=fraction, help=f"share of the target spread over all classes {of_recipe}")
    add("--momentum", type=fraction, default=0.9, help="momentum of SGD (default: 0.9)")
    add("--wd", "--weight-decay", type=non_negative, default=1e-4, help="weight decay (default: 1e-4)")
    add("--bn-weight-decay", action=argparse.BooleanOptionalAction,
        help=f"weight decay on normalisation and biases too {of_recipe}")
    add("-p", "--print-freq", type=positive_int, default=10, metavar="STEPS",
        help="steps between two losses shown (default: 10)")
    add("-e", "--evaluate", action="store_true", help="evaluate on the validation images, and end")
    add("--pretrained-weights", metavar="FILE", help="checkpoint or state_dict to take the weights from")
    add_run_args(parser)
    add("--static-loss-scale", type=non_negative, metavar="SCALE", help="loss scale of fp16 (default: it adapts)")
    add("--dynamic-loss-scale", action="store_true", help="adapt the loss scale, whatever --static-loss-scale says")
    add("--fsdp", action="store_true", help="shard weights, momenta and masks among the processes (FSDP2)")
    add("--prof", action="store_true", help="profile ten steps, and end")
    add("--benchmark-training", action="store_true", help="measure images per second in training, and end")
    add("--benchmark-inference", action="store_true", help="measure images per second in evaluation, and end")
    add("--bench-iterations", type=positive_int, default=20, metavar="N", help="batches measured (default: 20)")
    add("--bench-warmup", type=positive_int, default=20, metavar="N", help="batches before that (default: 20)")
    add("--gather-checkpoints", action="store_true", help="keep the checkpoint of every epoch")
    add("--density-of", choices=["masked", "network"], default="masked",
        help="what --density is a fraction of: the weights that have masks, or all parameters of the network, those of "
        "--dense-layers too (default: masked)")
    # fmt: on
    add_sparse_args(parser)
    parser.set_defaults(data="imagenet", prune_rate=0.2, density=0.1, dense_layers=None)
    defaults_from(parser, "--recipe", defaults_of_recipe)
    defaults_from(parser, "--resume", defaults_of_run, "--sparse-init", "--pretrained-weights")
    return parser


def architecture(text):
    """Parse the name of a network."""
    library, _, name = text.rpartition(":")
    if library not in ("", "torchvision", "timm") or (not library and name not in RESNETS):
        expected = f"{', '.join(RESNETS)}, torchvision:NAME or timm:NAME"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return text


def defaults_of_recipe(name):
    """Return the defaults that a recipe sets, but for those that `fill_in` makes of other arguments."""
    return {flag: value for flag, value in RECIPES[name].items() if flag not in FILLED_IN}


def parse_arguments(argv=None):
    """Return the arguments; end with one line and exit status 2 where they exclude each other."""
    parser = build_parser()
    args = parser.parse_args(argv)
    fill_in(args)
    check(parser, args, exclusions(args))
    return args


def fill_in(args):
    """Fill in what follows from other arguments: warm-up and decay keep their place in a run of other length."""
    args.data_dir = args.place or args.data_dir
    del args.place
    recipe = RECIPES[args.recipe]
    scale = args.epochs / recipe["epochs"]
    if args.warmup is None:
        args.warmup = recipe["warmup"] * scale
    if args.decay_epochs is None:
        args.decay_epochs = [epoch * scale for epoch in recipe["decay_epochs"]]
    if args.stride_in is None:
        args.stride_in = "3x3" if args.model in WITHOUT_BOTTLENECK else recipe["stride_in"]
    if args.dense_layers is None:
        args.dense_layers = recipe["dense_layers"] if args.model in RESNETS else []
    if args.dynamic_loss_scale:
        args.static_loss_scale = None


def exclusions(args):
    """Return (condition, reason) pairs of arguments that exclude each other in this script alone."""
    return [
        (not args.data_dir, "expected the folder of the images: main.py DIR, or --data DIR"),
        (
            args.density_of == "network" and bool(args.layer_density),
            "--density-of network and --layer-density exclude each other: the first sets one density for all",
        ),
        (
            args.model in WITHOUT_BOTTLENECK and args.stride_in == "1x1",
            f"--stride-in 1x1 is of bottlenecks, and the blocks of {args.model} have none: leave it out",
        ),
        (
            args.fsdp and processes() == 1,
            "--fsdp shards among processes: start it with torchrun --nproc_per_node N",
        ),
        (args.static_loss_scale == 0, "--static-loss-scale expects a number above 0"),
    ]


def run(args):
    """Make one run, and return its folder."""
    if args.verify:
        raise SystemExit(verify(args.data_dir, args.workers))
    device = session.start(args)
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    found = resuming.find(args)

    classes, batches, train_loader, valid_loader = load_images(args, device)
    steps_per_epoch = len(batches) // args.accumulate
    loaded = partial(images.on_device, device=device, channels_last=memory_format(args) is torch.channels_last)

    def batches_to_score():
        return list(islice(loaded(train_loader), args.score_batches * args.accumulate))

    model = build_model(args, classes)
    load_first_weights(args, model)
    # fully_shard takes no weights in channels_last. The images are in it, which is enough for the convolutions.
    model = model.to(device, memory_format=torch.contiguous_format if args.fsdp else memory_format(args))
    flops = forward_flops(model, torch.zeros(1, 3, args.image_size, args.image_size, device=device))
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
    folder = RunFolder(args, metrics)

    # The rest needs only `train` and `validate`: they know precision, processes and the parts of a step.
    def train(batches, **more):
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

        if args.evaluate:
            report_evaluation(folder, validate(loaded(valid_loader)))
            return folder
        if args.prof:
            profile(folder, device, lambda: train(islice(endless(loaded, train_loader), 10 * args.accumulate)))
            return folder
        if args.benchmark_training or args.benchmark_inference:
            for kind, work, loader in [("training", train, train_loader), ("inference", validate, valid_loader)]:
                if getattr(args, f"benchmark_{kind}"):
                    benchmark(args, folder, kind, work, endless(loaded, loader), args.batch_size // args.accumulate)
            return folder

        with StopRequests() as stop:
            checkpoints = resuming.Checkpoints(folder, parts, model, args, stop, steps_per_epoch)
            for epoch in range(first_epoch, args.epochs + 1):
                progress, begun = begun or Progress(), None
                batches.epoch, batches.start = epoch, progress.steps * args.accumulate
                after_step = partial(checkpoints.after_step, epoch, progress)
                with session.naming_errors(epoch, folder):
                    with progress_bar(f"epoch {epoch}", steps_per_epoch) as report:
                        loss = train(loaded(train_loader), progress=progress, after_step=after_step, report=report)
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
                is_best = valid.accuracy >= max(entry.get("valid_accuracy", 0) for entry in folder.metrics)
                copies = ["checkpoint-best.pt"] * is_best + [f"checkpoint-{epoch}.pt"] * args.gather_checkpoints
                checkpoints.after_epoch(epoch, copies)

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
    valid_images = images.Photographs(valid_source, args.image_size, train=False, skips=skips)
    if args.batch_size > len(train_images):
        raise DataError(
            f"--batch-size {args.batch_size} is more than the {len(train_images)} images of {args.data_dir}."
        )
    share = dict(rank=distributed.rank(), processes=distributed.processes())
    batches = images.TrainingBatches(len(train_images), args.batch_size, args.accumulate, **share, seed=args.seed)
    of_a_part = args.batch_size // distributed.processes() // args.accumulate
    in_order = images.EvaluationBatches(len(valid_images), of_a_part, **share)
    train_loader = images.load(train_images, batches, args.workers, device)
    valid_loader = images.load(valid_images, in_order, args.workers, device)
    return len(train_source.classes), batches, train_loader, valid_loader


def build_model(args, classes):
    """Return the network that the arguments ask for, freshly initialised; it maps images to logits [N, classes]."""
    if args.model in RESNETS:
        return RESNETS[args.model](classes, stride_in=args.stride_in, fan=FAN[args.model_config])
    library, _, name = args.model.partition(":")
    try:
        if library == "torchvision":
            from torchvision.models import get_model

            # These two would give more than one output in training.
            one = dict(aux_logits=False, init_weights=True) if name in ("googlenet", "inception_v3") else {}
            model = get_model(name, weights=None, num_classes=classes, **one)
        else:
            from timm import create_model

            model = create_model(name, num_classes=classes)
        output = model.eval()(torch.zeros(1, 3, args.image_size, args.image_size))
    except ImportError as error:
        raise DataError(f"--arch {args.model} needs {library}: pip install {library} ({error}).") from None
    except Exception as error:  # the libraries raise many types for a name or a size they do not know
        shape = f"{args.image_size}x{args.image_size}"
        raise DataError(f"--arch {args.model} cannot be built for images of {shape}: {error}") from None
    if not isinstance(output, torch.Tensor) or output.shape != (1, classes):
        raise DataError(f"--arch {args.model} is no classifier: it gives no logits of shape [N, {classes}].")
    return model


def shard(model):
    """Shard the model among the processes, block by block."""
    from torch.distributed.fsdp import fully_shard

    for stage in model.children():
        for block in stage.children() if isinstance(stage, nn.Sequential | nn.ModuleList) else []:
            fully_shard(block)
    fully_shard(model)


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


def density_of_masked(args, model):
    """Return the density of the weights that have masks at which --density of all parameters are active.

    Raises:
        ValueError: if the parameters without masks are more than that.
    """
    weights = {name: weight.numel() for name, weight in maskable_parameters(model, sparse=args.sparse_layers)}
    dense = named(list(weights), args.dense_layers, usual_exceptions(model))
    masked = sum(size for name, size in weights.items() if name not in dense)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    density = 1 - (1 - args.density) * parameters / max(masked, 1)
    if density <= 0:
        raise ValueError(
            f"--density {args.density} of the network cannot be reached: the layers that stay dense are "
            f"{1 - masked / parameters:.4f} of it. Ask for more, or name fewer --dense-layers."
        )
    return density


def report_evaluation(folder, valid):
    """Log an evaluation and keep it."""
    results = dict(valid_loss=valid.loss, valid_accuracy=valid.accuracy, valid_accuracy_5=valid.accuracy_in_5)
    folder.add(**results, valid_total=valid.total)
    logger.info("Validation: %s, in five %.3f%%", valid, 100 * valid.accuracy_in_5)


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
        profiler.export_chrome_trace(str(folder.path / "trace.json"))
        by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
        logger.info(profiler.key_averages().table(sort_by=by, row_limit=20))


def main(argv=None):
    session.main("main.py", partial(parse_arguments, argv), run)


if __name__ == "__main__":
    main()
