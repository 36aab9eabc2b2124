"""Train a sparse ResNet-50, or another network, on ImageNet.

    python main.py DIR --recipe tuned --density 0.1 --amp bf16
    torchrun --nproc_per_node 8 main.py DIR --recipe baseline --density 0.2 --amp bf16
    python main.py DIR --arch resnet18 --image-size 64 --epochs 10 --batch-size 64

DIR holds train/<class>/<image> and val/<class>/<image>; `webdataset:DIR` holds tar shards *train*.tar and *val*.tar.
A run leaves runs/imagenet-<model>-<density>-<seed>-<hash>/ with args.json, log.txt, metrics.jsonl, checkpoint.pt,
checkpoint-best.pt, curves.png and density.png. `--resume <that folder>` goes on where it was stopped, on any number of
processes; a command with `--resume auto` goes on if its run has begun, and begins it if not. On SIGTERM and SIGINT
(Ctrl-C) the run writes a checkpoint after the running step, and exits with status 143 or 130.
"""

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from functools import partial
from itertools import islice

import torch
from torch import nn
from torch.nn import functional as F
from tqdm.contrib.logging import logging_redirect_tqdm

from sparselearning import checkpoint
from sparselearning.core import Masking, add_sparse_args
from sparselearning.experiments.data import photographs as images
from sparselearning.experiments.data.files import DataError
from sparselearning.experiments.report import plots
from sparselearning.experiments.run import resuming
from sparselearning.experiments.run.arguments import (
    ArgumentParser,
    add_checkpoint_args,
    check_sparse_backend,
    fail,
    seed,
)
from sparselearning.experiments.run.costs import describe, flops_of_run, relative_flops
from sparselearning.experiments.run.folder import RunFolder, check_same_run
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
from sparselearning.flags import chosen_method, fraction, non_negative, positive_int, whole_number
from sparselearning.flops import forward_flops
from sparselearning.functions import FunctionError
from sparselearning.models.resnet import RESNETS
from sparselearning.native.allocator import keep_freed_memory
from sparselearning.processes import distributed
from sparselearning.processes.sharded import Whole
from sparselearning.start.maskable import maskable_parameters
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
FAN = {"classic": "fan_out", "fanin": "fan_in"}
USER_ERRORS = (DataError, checkpoint.CheckpointError, NotFinite, FunctionError, OSError, ValueError)

logger = logging.getLogger("imagenet")


def parse_arguments(argv=None):
    form = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("main.py", description=__doc__, formatter_class=form)
    add = parser.add_argument
    of_recipe = "(default: of the recipe)"
    # fmt: off
    add("data_dir", metavar="DIR", nargs="?", help="folder with train/ and val/, or webdataset:FOLDER with tar shards")
    add("--data", dest="data_flag", metavar="DIR", help="the same")
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
    add("--start-epoch", type=positive_int, default=1, metavar="N", help="number of the first epoch (default: 1)")
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
    add("--resume", metavar="PATH", help="run folder or checkpoint to go on from; "
        "auto: the newest good checkpoint of the run with these arguments, if there is one")
    add_checkpoint_args(parser)
    add("-e", "--evaluate", action="store_true", help="evaluate on the validation images, and end")
    add("--pretrained-weights", metavar="FILE", help="checkpoint or state_dict to take the weights from")
    add("--amp", choices=["none", "bf16", "fp16"], default="none", help="mixed precision (default: none)")
    add("--fp16", action="store_true",
        help="fp16 with fp32 master weights: by Apex where it is installed, else --amp fp16")
    add("--static-loss-scale", type=non_negative, metavar="SCALE", help="loss scale of fp16 (default: it adapts)")
    add("--dynamic-loss-scale", action="store_true", help="adapt the loss scale, whatever --static-loss-scale says")
    add("--compile", action="store_true", help="compile the model with torch.compile")
    add("--fsdp", action="store_true", help="shard weights, momenta and masks among the processes (FSDP2)")
    add("--prof", action="store_true", help="profile ten steps, and end")
    add("--benchmark-training", action="store_true", help="measure images per second in training, and end")
    add("--benchmark-inference", action="store_true", help="measure images per second in evaluation, and end")
    add("--bench-iterations", type=positive_int, default=20, metavar="N", help="batches measured (default: 20)")
    add("--bench-warmup", type=positive_int, default=20, metavar="N", help="batches before that (default: 20)")
    add("--seed", type=seed, default=17, help="random seed (default: 17)")
    add("--gather-checkpoints", action="store_true", help="keep the checkpoint of every epoch")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda, ...; under torchrun cuda is the process's own GPU (default: %(default)s)")
    add("--run-dir", default="runs", help="folder of the run folders (default: runs)")
    add("--density-of", choices=["masked", "network"], default="masked",
        help="what --density is a fraction of: the weights that have masks, or all parameters of the network, those of "
        "--dense-layers too (default: masked)")
    # fmt: on
    add_sparse_args(parser)
    recipe = RECIPES[parser.parse_known_args(argv)[0].recipe]
    parser.set_defaults(data="imagenet", prune_rate=0.2, density=0.1, **recipe)
    args = parser.parse_args(argv)
    check(parser, args, recipe)
    return args


def architecture(text):
    """Parse the name of a network."""
    library, _, name = text.rpartition(":")
    if library not in ("", "torchvision", "timm") or (not library and name not in RESNETS):
        expected = f"{', '.join(RESNETS)}, torchvision:NAME or timm:NAME"
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
    return text


def check(parser, args, recipe):
    """Fill in what depends on other arguments; end with one line and status 2 where they do not fit together."""
    given = [place for place in (args.data_dir, args.data_flag) if place]
    if len(given) != 1:
        parser.error("give the folder of the images once: main.py DIR, or --data DIR")
    args.data_dir = given[0]
    del args.data_flag
    for name in ("warmup", "decay_epochs"):
        if getattr(args, name) == recipe[name]:
            scale = args.epochs / recipe["epochs"]
            setattr(args, name, [e * scale for e in recipe[name]] if name == "decay_epochs" else recipe[name] * scale)
    if args.model not in RESNETS and args.dense_layers == recipe["dense_layers"]:
        args.dense_layers = []
    if args.model in ("resnet18", "resnet34"):
        args.stride_in = "3x3"  # their blocks have no 1x1 convolution
    if args.momentum == 0 and not args.dense and "momentum" in (args.growth, args.redistribution):
        advice = "--momentum 0.9, or --growth random --redistribution nonzeros"
        parser.error(f"--growth momentum and --redistribution momentum need a momentum: {advice}")
    if args.sparse_init == "resume" and not args.pretrained_weights:
        parser.error("--sparse-init resume takes the nonzeros of saved weights: add --pretrained-weights FILE")
    if args.density_of == "network" and args.layer_density:
        parser.error("--density-of network and --layer-density exclude each other: the first sets one density for all")
    if args.start_epoch > args.epochs:
        parser.error(f"--start-epoch {args.start_epoch} is after the last of {args.epochs} epochs")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % (processes * args.accumulate):
        parts = f"{processes} processes x {args.accumulate} parts (--accumulate)"
        parser.error(f"--batch-size {args.batch_size} cannot be divided evenly among {parts}")
    if args.fsdp and processes == 1:
        parser.error("--fsdp shards among processes: start it with torchrun --nproc_per_node N")
    check_sparse_backend(parser, args, args.device)
    if args.static_loss_scale == 0:
        parser.error("--static-loss-scale expects a number above 0")
    if args.dynamic_loss_scale:
        args.static_loss_scale = None
    if args.fp16:
        args.amp = "apex" if find_apex() and not args.fsdp else "fp16"


def run(args):
    """Make one run, and return its folder."""
    device = distributed.start(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    rank, processes = distributed.rank(), distributed.processes()
    seed_generators(args.seed)
    torch.backends.cudnn.benchmark = True  # all batches have one shape
    found = resuming.find(args)
    args.resume = found and str(found[0])
    if found:
        check_same_run(args.resume, found[1].get("args", {}), args)

    train_source, valid_source = images.sources(args.data_dir)
    train_images = images.Photographs(train_source, args.image_size, train=True, seed=args.seed)
    valid_images = images.Photographs(valid_source, args.image_size, train=False)
    if args.batch_size > len(train_images):
        raise DataError(
            f"--batch-size {args.batch_size} is more than the {len(train_images)} images of {args.data_dir}."
        )
    share = dict(rank=rank, processes=processes)
    batches = images.TrainingBatches(len(train_images), args.batch_size, args.accumulate, **share, seed=args.seed)
    in_order = images.EvaluationBatches(len(valid_images), args.batch_size // processes // args.accumulate, **share)
    train_loader = images.load(train_images, batches, args.workers, device)
    valid_loader = images.load(valid_images, in_order, args.workers, device)
    steps_per_epoch = len(batches) // args.accumulate

    def loaded(loader):
        return images.on_device(loader, device, channels_last=True)

    model = build_model(args, len(train_source.classes))
    if args.pretrained_weights:
        checkpoint.load_weights(args.pretrained_weights, model)
    # fully_shard takes no weights in channels_last; images in it make the convolutions compute so.
    model = model.to(device, memory_format=torch.contiguous_format if args.fsdp else torch.channels_last)
    flops = forward_flops(model, torch.zeros(1, 3, args.image_size, args.image_size, device=device))
    if args.compile:
        model.compile()
    if args.fsdp:
        shard(model)
    optimizer = build_optimizer(args, model)
    precision = Precision(args.amp, device, args.static_loss_scale)
    if args.amp == "apex":
        precision = ApexPrecision(model, optimizer, args.static_loss_scale)
        optimizer = precision.optimizer
    scheduler = torch.optim.lr_scheduler.LambdaLR(torch_optimizer(optimizer), learning_rate(args, steps_per_epoch))
    to_score = None if args.resume else lambda: list(islice(loaded(train_loader), args.accumulate))
    mask = None if args.dense else build_mask(args, model, optimizer, args.epochs * steps_per_epoch, to_score)

    parts = dict(model=model, optimizer=torch_optimizer(optimizer))
    if mask is not None:
        parts["mask"] = mask
    if args.fsdp:
        parts = {name: Whole(part) for name, part in parts.items()}
    parts |= dict(scheduler=scheduler, precision=precision)
    # Before a checkpoint is loaded: it sends the first process's statistics of BatchNorm to all.
    network = model if args.fsdp else distributed.replicate(model)
    first_epoch, begun, metrics = args.start_epoch, None, None
    if rank:  # each process drops out units of its own
        seed_generators(args.seed + 1000 * first_epoch + rank)
    if found:
        first_epoch, begun = resuming.take(*found, parts, model)
        metrics = found[1]["metrics"]
    folder = RunFolder(args, metrics)

    # From here on `train` and `validate` are all there is to know of data, precision and processes.
    loss_function = partial(F.cross_entropy, label_smoothing=args.label_smoothing)
    settings = dict(loss_function=loss_function, report_every=args.print_freq, accumulate=args.accumulate)

    def train(batches, **more):
        return train_epoch(network, batches, mask or optimizer, scheduler, precision, **settings, **more)

    def validate(batches):
        return evaluate(model, batches, precision, F.cross_entropy)

    with folder.log():
        logger.info("%s: %s", folder.path, " ".join(f"{name}={value}" for name, value in sorted(vars(args).items())))
        logger.info("%d processes on %s, %d steps an epoch", processes, device.type, steps_per_epoch)
        if args.fp16:
            logger.info("fp16 by %s", "Apex" if args.amp == "apex" else "torch.amp, for Apex is not installed")
        if mask is not None:
            logger.info("density %.4f: %d weights active, %d not", mask.density, mask.total_nonzero, mask.total_zero)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        active = parameters - (mask.total_zero if mask is not None else 0)
        logger.info("the whole network: %d of %d parameters, %.4f", active, parameters, active / parameters)
        logger.info(describe(flops, relative_flops(flops, mask, steps_per_epoch)))

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

        with resuming.StopRequests() as stop:
            checkpoints = resuming.Checkpoints(folder, parts, model, args, stop, steps_per_epoch)
            for epoch in range(first_epoch, args.epochs + 1):
                progress, begun = begun or Progress(), None
                batches.epoch, batches.start = epoch, progress.steps * args.accumulate
                after_step = partial(checkpoints.after_step, epoch, progress)
                try:
                    with progress_bar(f"epoch {epoch}", steps_per_epoch) as report:
                        loss = train(loaded(train_loader), progress=progress, after_step=after_step, report=report)
                    training_seconds = progress.seconds
                    valid = validate(checkpoints.watch(loaded(valid_loader), epoch, progress))
                except NotFinite as error:
                    raise NotFinite(f"Epoch {epoch}: {error}. {folder.kept()} Try a lower --lr.") from None
                record = dict(epoch=epoch, steps=epoch * steps_per_epoch, train_loss=loss, valid_loss=valid.loss)
                record |= dict(valid_accuracy=valid.accuracy, valid_accuracy_5=valid.correct_in_5 / valid.total)
                record |= dict(lr=scheduler.get_last_lr()[0], density=1.0, active_weights=active)
                record |= relative_flops(flops, mask, steps_per_epoch)
                if mask is not None:
                    densities = {layer.name: layer.density for layer in mask.layers}
                    record |= dict(density=mask.density, active_weights=mask.total_nonzero, density_per_layer=densities)
                    record |= dict(prune_rate=mask.prune_rate, exploration_rate=mask.exploration_rate)
                    if epoch < args.epochs:
                        mask.at_end_of_epoch()
                record |= dict(images_per_second=steps_per_epoch * args.batch_size / training_seconds)
                folder.add(**record, seconds=progress.seconds)
                logger.info(folder.line())
                is_best = valid.accuracy >= max(entry.get("valid_accuracy", 0) for entry in folder.metrics)
                copies = ["checkpoint-best.pt"] * is_best + [f"checkpoint-{epoch}.pt"] * args.gather_checkpoints
                checkpoints.after_epoch(epoch, copies)

        if mask is not None and distributed.in_process_group():
            distributed.check_agreement(list(mask.masks.values()))
        if rank == 0:
            plots.plot_curves(folder.metrics, folder.path / "curves.png")
            if mask is not None:
                plots.plot_density(folder.metrics, folder.path / "density.png")
        logger.info(describe(flops, flops_of_run(folder.metrics)))
        last = folder.metrics[-1]
        logger.info("Validation accuracy: %.4f, in five %.4f", last["valid_accuracy"], last["valid_accuracy_5"])
    return folder


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


def build_mask(args, model, optimizer, steps, to_score=None):
    """Return the masks that the arguments ask for, for a training of `steps`.

    `to_score` returns the batches that scores before training are computed on: those of one step. Of several
    processes the first one's scores count.
    """
    kind = dict(verbose=args.verbose, fp16=args.amp == "apex", sparse_backend=args.sparse_backend)
    if args.density_of == "network":
        args = argparse.Namespace(**{**vars(args), "density": density_of_masked(args, model)})
    chosen = choice_of_weights(args, to_score)
    return Masking.from_method(chosen_method(args), model, optimizer, steps, **chosen, **kind)


def density_of_masked(args, model):
    """Return the density of the weights that have masks at which --density of all parameters are active.

    Raises:
        ValueError: if the parameters without masks are more than that.
    """
    weights = {name: weight.numel() for name, weight in maskable_parameters(model)}
    dense = named(list(weights), args.dense_layers)
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
    in_5 = valid.correct_in_5 / valid.total
    folder.add(valid_loss=valid.loss, valid_accuracy=valid.accuracy, valid_accuracy_5=in_5, valid_total=valid.total)
    logger.info("Validation: %s, in five %.3f%%", valid, 100 * in_5)


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
    args = parse_arguments(argv)
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR  # one process of many speaks
    logging.basicConfig(level=level, format="%(message)s", stream=sys.stdout)
    # The schedule follows the data: it steps also where fp16 overflowed, so perhaps before the optimizer.
    warnings.filterwarnings("ignore", "Detected call of `lr_scheduler.step")
    try:
        with logging_redirect_tqdm(), resuming.handled(resuming.stop_at_once), distributed.noticing_losses():
            run(args)
    except USER_ERRORS as error:
        fail("main.py", error)
    except distributed.ProcessError as error:
        fail("main.py", error, status=1)
    except KeyboardInterrupt as stop:
        resuming.end_stopped("main.py", stop)
    finally:
        distributed.stop()


if __name__ == "__main__":
    main()
