"""The command line of main.py: its flags, the recipes that set their defaults, and what excludes each other."""

import argparse
import os

from networks import FAN, WITHOUT_BOTTLENECK, architecture

from sparselearning.core import add_sparse_args
from sparselearning.experiments.run.arguments import add_run_args, processes
from sparselearning.experiments.run.folder import defaults_of_run
from sparselearning.flags import defaults_from, fraction, non_negative, positive_int, whole_number
from sparselearning.models.resnet import RESNETS
from sparselearning.parser import ArgumentParser

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


def build_parser(description=None):
    """Return the parser of the command line; --help shows the description."""
    form = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser("main.py", description=description, formatter_class=form)
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
    add("-e", "--evaluate", action="store_true",
        help="evaluate the weights of --resume or --pretrained-weights, write nothing, and end")
    add("--pretrained-weights", metavar="FILE", help="checkpoint or state_dict of any program to take the weights from")
    add("--new-head", action="store_true", help="draw the classifier anew, and take the others of --pretrained-weights")
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
    add_sparse_args(parser, {})
    parser.set_defaults(data="imagenet", prune_rate=0.2, density=0.1, dense_layers=None)
    defaults_from(parser, "--recipe", defaults_of_recipe)
    defaults_from(parser, "--resume", defaults_of_run, "--sparse-init", "--pretrained-weights")
    return parser


def defaults_of_recipe(name):
    """Return the defaults that a recipe sets, but for those that `fill_in` makes of other arguments."""
    return {flag: value for flag, value in RECIPES[name].items() if flag not in FILLED_IN}


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
        (
            args.evaluate and not (args.resume or args.pretrained_weights),
            "--evaluate needs the weights to evaluate: add --resume RUN_FOLDER, or --pretrained-weights FILE",
        ),
        (
            args.new_head and not args.pretrained_weights,
            "--new-head keeps the other weights of a trained network: add --pretrained-weights FILE",
        ),
        (
            args.evaluate and args.new_head and not args.resume,
            "--evaluate with --new-head would evaluate a classifier that is not trained: leave out one",
        ),
        (args.static_loss_scale == 0, "--static-loss-scale expects a number above 0"),
    ]
