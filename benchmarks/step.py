"""What masks add to a step of the optimizer, and to a step of training.

    python benchmarks/step.py
    python benchmarks/step.py --quick

Steps of the optimizer alone, on fixed gradients, take turns: dense; masked (the library); as release 1.0 did, which
made every weight anew (`weight.data = weight.data * mask.float()`); and a bare `torch._foreach_mul_` over tensors of
the same sizes, the least that a masked product could cost with masks in the weights' own dtype. Then whole steps of
training, dense and masked: forward, backward and step.
"""

import logging

import common
import torch
from torch.nn import functional as F

from sparselearning import CosineDecay, Masking

DENSITY = 0.05
SGD = dict(lr=1e-3, momentum=0.9, nesterov=True, weight_decay=5e-4)
OPTIMIZERS = {
    "SGD fused": lambda weights: torch.optim.SGD(weights, **SGD, fused=True),
    "SGD foreach": lambda weights: torch.optim.SGD(weights, **SGD, foreach=True),
    "AdamW fused": lambda weights: torch.optim.AdamW(weights, fused=True),
    "AdamW foreach": lambda weights: torch.optim.AdamW(weights, foreach=True),
}
# Model -> images per step; ResNet-50 sees ImageNet's 224x224.
TRAINED = {
    "cpu": {"lenet300-100": 100, "vgg-d": 100, "wrn-16-8": 32},
    "cuda": {"lenet300-100": 100, "vgg-d": 128, "wrn-16-8": 128, "resnet50": 256},
}


def main():
    """Measure, log and save."""
    args = common.parse(__doc__, rounds=30)
    device = args.device.partition(":")[0]
    names = ["lenet300-100"] if args.quick else list(common.MODELS)
    rows = [measure_optimizer(args, name, kind) for name in names for kind in OPTIMIZERS]
    trained = {"lenet300-100": 100} if args.quick else TRAINED[device]
    rows += [measure_training(args, name, images) for name, images in trained.items()]
    common.save(args, "step", rows)


def masked(model, make_optimizer):
    """Return an optimizer of the model and masks on it."""
    optimizer = make_optimizer(model.parameters())
    mask = Masking(optimizer, CosineDecay(0.5, 10_000))
    mask.add_module(model, DENSITY)
    return optimizer, mask


def with_gradients(model):
    """Give the weights gradients as small as those of training."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return model


def measure_optimizer(args, name, kind):
    """Return a row: the optimizer's step with and without masks."""
    dense = OPTIMIZERS[kind](with_gradients(common.build(name, args.device)).parameters())
    _, mask = masked(with_gradients(common.build(name, args.device)), OPTIMIZERS[kind])
    old_model = with_gradients(common.build(name, args.device))
    old = OPTIMIZERS[kind](old_model.parameters())
    old_masks = {
        weight: (torch.rand_like(weight) < DENSITY).float() for weight in old_model.parameters() if weight.dim() > 1
    }
    weights = [torch.randn_like(layer.weight) for layer in mask.layers]
    factors = [layer.mask.float() for layer in mask.layers]

    def step_as_1_0():
        old.step()
        for weight, old_mask in old_masks.items():
            weight.data = weight.data * old_mask.float()

    kinds = {
        "dense": dense.step,
        "masked": mask.step,
        "as release 1.0": step_as_1_0,
        "_foreach_mul_ alone": lambda: torch._foreach_mul_(weights, factors),
        "apply_mask alone": mask.apply_mask,
    }
    calls = 50 if name == "lenet300-100" else 2
    seconds = common.alternate(kinds, args.rounds, calls, args.device)
    label = f"{name}, {kind}"
    common.show(label, seconds)
    added = [one - other for one, other in zip(seconds["masked"], seconds["dense"], strict=True)]
    row = {
        "model": name,
        "optimizer": kind,
        "density": DENSITY,
        "weights": sum(layer.mask.numel() for layer in mask.layers),
        "seconds": {kind: common.summary(values) for kind, values in seconds.items()},
        "masked / dense": common.ratio(seconds["masked"], seconds["dense"]),
        "release 1.0 / dense": common.ratio(seconds["as release 1.0"], seconds["dense"]),
        "added / _foreach_mul_": common.ratio(added, seconds["_foreach_mul_ alone"]),
        "apply_mask / _foreach_mul_": common.ratio(seconds["apply_mask alone"], seconds["_foreach_mul_ alone"]),
    }
    log_ratios(label, row)
    return row


def measure_training(args, name, images):
    """Return a row: a step of training with and without masks."""
    size = {"lenet300-100": (1, 28, 28), "resnet50": (3, 224, 224)}.get(name, (3, 32, 32))
    inputs, labels = torch.randn(images, *size, device=args.device), torch.randint(10, (images,), device=args.device)
    on_gpu = args.device.startswith("cuda")
    if on_gpu:
        inputs = inputs.to(memory_format=torch.channels_last)

    def make():
        model = common.build(name, args.device)
        return model.to(memory_format=torch.channels_last) if on_gpu else model

    def step(model, stepper):
        def run():
            stepper.zero_grad()
            with torch.autocast("cuda", torch.bfloat16, enabled=on_gpu):
                loss = F.cross_entropy(model(inputs).float(), labels)
            loss.backward()
            stepper.step()

        return run

    dense, sparse = make(), make()
    kinds = {
        "dense": step(dense, OPTIMIZERS["SGD fused"](dense.parameters())),
        "masked": step(sparse, masked(sparse, OPTIMIZERS["SGD fused"])[1]),
    }
    calls = 20 if name == "lenet300-100" else 1
    seconds = common.alternate(kinds, args.rounds, calls, args.device)
    label = f"training {name}, {images} images"
    common.show(label, seconds)
    row = {
        "training step of": name,
        "images": images,
        "precision": "bf16" if on_gpu else "fp32",
        "density": DENSITY,
        "seconds": {kind: common.summary(values) for kind, values in seconds.items()},
        "masked / dense": common.ratio(seconds["masked"], seconds["dense"]),
    }
    log_ratios(label, row)
    return row


def log_ratios(label, row):
    """Log what one row found."""
    for name, value in row.items():
        if " / " in name:
            logging.info("%-32s %s = %.3f", label, name, value)


if __name__ == "__main__":
    main()
