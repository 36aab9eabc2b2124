"""The cost of masks in a step of the optimizer and in a step of training.

    python benchmarks/step.py
    python benchmarks/step.py --quick

Steps of the optimizer alone, on fixed gradients, take turns: dense; masked (the library); as in release 1.0, which
replaced every weight (`weight.data = weight.data * mask.float()`); and a bare `torch._foreach_mul_` over tensors of the
same sizes, the lowest cost of a masked product if masks have the weights' dtype. Whole steps of training (forward,
backward and step) follow, dense and masked.
"""

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
# {model: images per step}
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
    """Return a Masking of the model."""
    masking = Masking(make_optimizer(model.parameters()), CosineDecay(0.5, 10_000))
    masking.add_module(model, DENSITY)
    return masking


def with_gradients(model):
    """Give the weights random gradients, as small as those of training."""
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter) * 1e-3
    return model


def measure_optimizer(args, name, kind):
    """Return a row: the times of the optimizer's step with and without masks."""
    dense = OPTIMIZERS[kind](with_gradients(common.build(name, args.device)).parameters())
    masking = masked(with_gradients(common.build(name, args.device)), OPTIMIZERS[kind])
    old_model = with_gradients(common.build(name, args.device))
    old = OPTIMIZERS[kind](old_model.parameters())
    old_masks = {
        weight: (torch.rand_like(weight) < DENSITY).float() for weight in old_model.parameters() if weight.dim() > 1
    }
    weights = [torch.randn_like(layer.weight) for layer in masking.layers]
    factors = [layer.mask.float() for layer in masking.layers]

    def step_as_1_0():
        old.step()
        for weight, old_mask in old_masks.items():
            weight.data = weight.data * old_mask.float()

    kinds = {
        "dense": dense.step,
        "masked": masking.step,
        "as release 1.0": step_as_1_0,
        "_foreach_mul_ alone": lambda: torch._foreach_mul_(weights, factors),
        "apply_mask alone": masking.apply_mask,
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
        "weights": sum(layer.mask.numel() for layer in masking.layers),
        "seconds": {kind: common.summary(values) for kind, values in seconds.items()},
        "masked / dense": common.ratio(seconds["masked"], seconds["dense"]),
        "release 1.0 / dense": common.ratio(seconds["as release 1.0"], seconds["dense"]),
        "added / _foreach_mul_": common.ratio(added, seconds["_foreach_mul_ alone"]),
        "apply_mask / _foreach_mul_": common.ratio(seconds["apply_mask alone"], seconds["_foreach_mul_ alone"]),
    }
    common.log_ratios(label, row)
    return row


def measure_training(args, name, images):
    """Return a row: the times of a step of training with and without masks."""
    inputs = torch.randn(images, *common.input_shape(name), device=args.device)
    labels = torch.randint(10, (images,), device=args.device)
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
        "masked": step(sparse, masked(sparse, OPTIMIZERS["SGD fused"])),
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
    common.log_ratios(label, row)
    return row


if __name__ == "__main__":
    main()
