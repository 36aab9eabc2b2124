"""Profiles of one masked training step and of one update of the masks.

    python benchmarks/profiled.py
    python benchmarks/profiled.py --model resnet50

Prints the operators with the most time of their own: those of a step from torch.profiler, those of an update from
torch.profiler on a GPU and from cProfile on a CPU, where numpy selects the weights.
"""

import cProfile
import pstats

import common
import torch
from step import OPTIMIZERS, masked
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile


def main():
    """Profile and print."""
    args = common.parse(
        __doc__, rounds=1, model=("vgg-d", f"one of {', '.join(common.MODELS)}"), images=(100, "images of the step")
    )
    name = "lenet300-100" if args.quick else args.model
    on_gpu = args.device.startswith("cuda")
    model = common.build(name, args.device)
    masking = masked(model, OPTIMIZERS["SGD fused"])
    inputs = torch.randn(args.images, *common.input_shape(name), device=args.device)
    labels = torch.randint(10, (len(inputs),), device=args.device)

    def train():
        masking.zero_grad()
        F.cross_entropy(model(inputs).float(), labels).backward()
        masking.step()

    train()
    print_operators(train, on_gpu)
    masking.truncate_weights()
    train()
    print_operators(masking.truncate_weights, on_gpu) if on_gpu else print_functions(masking.truncate_weights)


def print_operators(call, on_gpu):
    """Print torch's operators, sorted by the time of their own."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as found:
        call()
    order = "self_cuda_time_total" if on_gpu else "self_cpu_time_total"
    print(found.key_averages().table(sort_by=order, row_limit=12, max_name_column_width=40))


def print_functions(call):
    """Print Python's functions, sorted by the time of their own."""
    profiler = cProfile.Profile()
    profiler.runcall(call)
    pstats.Stats(profiler).sort_stats("tottime").print_stats(15)


if __name__ == "__main__":
    main()
