"""Memory and time of training a multilayer perceptron with three hidden layers of up to a million neurons.

    python benchmarks/million.py
    python benchmarks/million.py --data-dir DIR
    python benchmarks/million.py --quick

Each neuron has 20 links on average; inputs are the 3,072 numbers of CIFAR-10's images in DIR, or random ones. The
network is built on the meta device, and trained with SGD: 32 rows a step, an update of the masks after every third.
`memory` is the largest resident size of the whole process. Each row is a process of its own. Compare Curci et al. 2021,
Truly Sparse Neural Networks at Scale, https://arxiv.org/abs/2102.01732.
"""

import itertools
import json
import logging
import subprocess
import sys
import time

from memory import status

PIXELS, CLASSES, LINKS, BATCH, EVERY, STEPS = 3072, 10, 20, 32, 3, 7
METHODS = {"SET": "random", "guided": "guided"}  # growth_mode


def main():
    """Measure, log and save."""
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(**json.loads(sys.argv[2]))))
        return
    import common

    args = common.parse(__doc__, rounds=1, data_dir=("", "a folder that has CIFAR-10"))
    rows = []
    for method, neurons in itertools.product(METHODS, (1_000, 3_000) if args.quick else (100_000, 300_000, 1_000_000)):
        settings = dict(method=method, neurons=neurons, threads=args.threads, data_dir=args.data_dir)
        command = [sys.executable, __file__, "--measure", json.dumps(settings)]
        found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        settings["data_dir"] = "CIFAR-10" if args.data_dir else ""  # of a folder, no more than that
        rows.append(settings | json.loads(found.stdout.splitlines()[-1]))
        logging.info(
            "%(method)s, %(neurons)d neurons: %(memory).2e bytes, %(step).2f s a step, %(update).2f s with an update",
            rows[-1],
        )
    common.save(args, "million", rows)


def measure(method, neurons, threads, data_dir):
    """Return links, the peak of memory in bytes, and the median seconds of a step, without and with an update."""
    import torch
    from torch import nn

    from sparselearning import Masking

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with torch.device("meta"):
        sizes = (PIXELS, neurons, neurons, neurons, CLASSES)
        layers = [nn.Linear(*pair) for pair in itertools.pairwise(sizes)]
        parts = [part for layer in layers for part in (layer, nn.ReLU())]
        model = nn.Sequential(*parts[:-1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    modes = dict(prune_mode="magnitude", growth_mode=METHODS[method], redistribution_mode="none")
    masking = Masking(optimizer, None, 0.3, **modes, prune_every_k_steps=EVERY, weights="sparse")
    # Of a hidden layer's neuron as many links come in; the output layer has as many for each of its inputs.
    shares = [LINKS / PIXELS, LINKS / neurons, LINKS / neurons, 1.0]
    masking.add_module(model, {f"{2 * i}.weight": min(share, 1.0) for i, share in enumerate(shares)})
    seconds = []
    for x, y in batches(data_dir):
        started = time.perf_counter()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        seconds.append(time.perf_counter() - started)
    updates = seconds[EVERY - 1 :: EVERY]
    steps = sorted(set(seconds[1:]) - set(updates))
    return dict(links=masking.total_nonzero, memory=status("VmHWM"), step=steps[len(steps) // 2], update=min(updates))


def batches(data_dir):
    """Yield as many batches as there are steps: images of CIFAR-10 in a row, normalised, or random numbers."""
    import torch

    if not data_dir:
        for _ in range(STEPS):
            yield torch.randn(BATCH, PIXELS), torch.randint(CLASSES, (BATCH,))
        return
    from sparselearning.experiments.data import in_memory

    data = in_memory.load("cifar", data_dir)
    found = in_memory.batches(data.train, BATCH, shuffle=True, mean=data.mean, std=data.std)
    for images, labels in itertools.islice(found, STEPS):
        yield images.flatten(1), labels


if __name__ == "__main__":
    main()
