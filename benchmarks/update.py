"""The cost of one update of the masks, compared with sorting every layer.

    python benchmarks/update.py
    python benchmarks/update.py --quick

Compares sparse momentum in the library with the same update as release 1.0 made it: per layer a full sort of the
magnitudes and one of the momentum, each followed by a read from the device. Weights and masks are restored before every
update. Measured are seconds, how often the host waits for the device, and the memory used beside weights, momentum and
masks.
"""

import logging
import math

import common
import torch

from sparselearning import CosineDecay, Masking
from sparselearning.selection import apportion

OPTIMIZERS = {
    "SGD": lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=0.9, fused=True),
    "AdamW": lambda weights: torch.optim.AdamW(weights, fused=True),
}


def main():
    """Measure, log and save."""
    args = common.parse(__doc__, rounds=9)
    names = ["lenet300-100"] if args.quick else list(common.MODELS)
    densities = [0.05] if args.quick else [0.05, 0.2]
    rows = [measure(args, name, kind, density) for name in names for kind in OPTIMIZERS for density in densities]
    common.save(args, "update", rows)


def measure(args, name, kind, density):
    """Return a row: time, waits and memory of the two updates of one network."""
    model = common.build(name, args.device)
    masking = Masking(OPTIMIZERS[kind](model.parameters()), CosineDecay(0.5, 10_000))
    masking.add_module(model, density)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 1e-2
        masking.step()
    model.zero_grad()
    before = [(layer.weight.detach().clone(), layer.mask.clone()) for layer in masking.layers]

    @torch.no_grad()
    def put_back():
        for layer, (weight, active) in zip(masking.layers, before, strict=True):
            layer.weight.copy_(weight)
            layer.mask.copy_(active)
            layer.nonzeros = int(active.count_nonzero())

    kinds = {"library": masking.truncate_weights, "full sort": lambda: update_by_sorting(masking)}
    seconds = common.alternate(kinds, args.rounds, device=args.device, prepare=put_back)
    waits, memory = {}, {}
    for update, run in kinds.items():
        put_back()
        memory[update] = common.peak_memory(run, args.device)
        put_back()
        with common.Synchronisations() as waited:
            run()
        waits[update] = waited.count
    label = f"{name}, {kind}, {density}"
    common.show(label, seconds)
    row = {
        "model": name,
        "optimizer": kind,
        "density": density,
        "layers": len(masking.layers),
        "weights": sum(layer.mask.numel() for layer in masking.layers),
        "seconds": {update: common.summary(values) for update, values in seconds.items()},
        "synchronisations": waits,
        "peak extra bytes": memory,
        "full sort / library": common.ratio(seconds["full sort"], seconds["library"]),
    }
    logging.info("%-32s synchronisations: %s; peak extra bytes: %s", label, waits, memory)
    logging.info("%-32s full sort / library = %.1f", label, row["full sort / library"])
    return row


@torch.no_grad()
def update_by_sorting(masking):
    """Prune by magnitude, redistribute and grow by momentum; sort all entries of every layer twice."""
    importance, removed = [], []
    for layer in masking.layers:
        momentum = masking.get_momentum_for_weight(layer.weight)
        importance.append(momentum[layer.mask].abs().mean().item())
        nonzeros = layer.mask.sum().item()
        k = math.ceil(masking.prune_rate * nonzeros)
        _, order = torch.sort(layer.weight.abs().flatten())
        layer.mask.flatten()[order[: layer.mask.numel() - nonzeros + k]] = False
        removed.append(nonzeros - layer.mask.sum().item())
    room = [int(0.99 * (layer.mask.numel() - layer.mask.sum().item())) for layer in masking.layers]
    for layer, count in zip(masking.layers, apportion(sum(removed), importance, room), strict=True):
        score = masking.get_momentum_for_weight(layer.weight).abs() * ~layer.mask
        _, order = torch.sort(score.flatten(), descending=True)
        layer.mask.flatten()[order[:count]] = True
        layer.nonzeros = layer.mask.sum().item()
    for layer in masking.layers:
        layer.weight.mul_(layer.mask)


if __name__ == "__main__":
    main()
