"""Where the time of one masked training step goes, and that of one update of the masks.

    python benchmarks/profiled.py
    python benchmarks/profiled.py --model resnet50

Prints the operators by their own time: of a step by torch.profiler, of an update by cProfile on a CPU, where numpy
selects, and by torch.profiler on a GPU.
"""

import cProfile
import pstats

import common
import torch
from step import OPTIMIZERS, masked
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile


def main():
    """Profile, print."""
    args = common.parse(
        __doc__, rounds=1, model=("vgg-d", f"one of {', '.join(common.MODELS)}"), images=(100, "images of the step")
    )
    name = "lenet300-100" if args.quick else args.model
    on_gpu = args.device.startswith("cuda")
    model = common.build(name, args.device)
    _, mask = masked(model, OPTIMIZERS["SGD fused"])
    size = {"lenet300-100": (1, 28, 28), "resnet50": (3, 224, 224)}.get(name, (3, 32, 32))
    inputs = torch.randn(args.images, *size, device=args.device)
    labels = torch.randint(10, (len(inputs),), device=args.device)

    def train():
        mask.zero_grad()
        F.cross_entropy(model(inputs).float(), labels).backward()
        mask.step()

    train()
    print_operators(train, on_gpu)
    mask.truncate_weights()
    train()
    print_operators(mask.truncate_weights, on_gpu) if on_gpu else print_functions(mask.truncate_weights)


def print_operators(call, on_gpu):
    """Print torch's operators by their own time."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        call()
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40))


def print_functions(call):
    """Print Python's functions by their own time."""
    profiler = cProfile.Profile()
    profiler.runcall(call)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
