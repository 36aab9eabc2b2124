"""A step of training on sparse kernels, beside the dense network in the faster of its two memory orders.

    python benchmarks/training_steps.py
    python benchmarks/training_steps.py --quick

`weights="sparse"` with SGD, at the density of each row, and the same network without masks, contiguous and
channels_last. The kinds take turns; a ratio is the faster dense time of a round over the sparse one, the median over
rounds. No step here reads dense gradients: in `main.py` those before an update of the masks do (epoch.py).
"""

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselearning import CosineDecay, Masking
from sparselearning.models.gpt import Block


class Row(NamedTuple):
    """A network, its density, and the batch of a step. `goal` is how many times as fast as dense it is to train."""

    model: str
    density: float
    batch: int
    goal: float


ROWS = [
    Row("vgg-d", 0.05, 32, 5),
    Row("wrn-16-8", 0.05, 32, 4.5),
    Row("wrn-28-2", 0.05, 32, 2.5),
    Row("resnet50", 0.1, 8, 3),
    Row("gpt block", 0.05, 4, 6),
]
WIDTH, HEADS, TOKENS = 768, 12, 128  # of the block


def main():
    """Measure, log and save."""
    args = common.parse(__doc__, rounds=7, rows=("", "parts of the names of networks, with commas between"))
    torch.set_num_threads(args.threads)
    wanted = [part for part in args.rows.split(",") if part]
    rows = [row for row in ROWS if not wanted or any(part in row.model for part in wanted)]
    measured = [measure(args, row) for row in (rows[:1] if args.quick else rows)]
    common.save(args, "training_steps", measured)
    for row in measured:
        logging.info(
            "%-10s %d threads: %.2f times as fast, goal %g", row["model"], args.threads, row["ratio"], row["goal"]
        )


def measure(args, row: Row) -> dict[str, Any]:
    """Return the times of a row and the ratio."""
    orders = [torch.contiguous_format] if row.model == "gpt block" else [torch.contiguous_format, torch.channels_last]
    names = ["dense", "dense channels_last"][: len(orders)]
    calls = {name: step_of(row, order) for name, order in zip(names, orders, strict=True)}
    seconds = common.alternate(calls | {"sparse": step_of(row, torch.contiguous_format, sparse=True)}, args.rounds)
    common.show(row.model, seconds)
    dense = [min(each) for each in zip(*(seconds[name] for name in names), strict=True)]
    times = {f"{name}_ms": round(1e3 * common.summary(each)["median"], 1) for name, each in seconds.items()}
    return row._asdict() | times | dict(threads=args.threads, ratio=round(common.ratio(dense, seconds["sparse"]), 3))


def step_of(row: Row, order: torch.memory_format, sparse: bool = False) -> Callable[[], None]:
    """Return a step of training."""
    torch.manual_seed(0)
    model, inputs, loss_of = block(row) if row.model == "gpt block" else classifier(row, order)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    if sparse:
        masking = Masking(optimizer, CosineDecay(0.5, 10_000), weights="sparse")
        masking.add_module(model, row.density, rescale=True)

    def step() -> None:
        optimizer.zero_grad()
        loss_of(model(*inputs)).backward()
        optimizer.step()

    return step


def classifier(row: Row, order: torch.memory_format) -> tuple[nn.Module, tuple, Callable[[Tensor], Tensor]]:
    """Return a network, its images and the loss of its outputs."""
    model = common.build(row.model)
    nn.Module.to(model, memory_format=order)
    images = torch.randn(row.batch, *common.input_shape(row.model)).to(memory_format=order)
    labels = torch.randint(10, (row.batch,))
    return model, (images,), lambda y: F.cross_entropy(y, labels)


def block(row: Row) -> tuple[nn.Module, tuple, Callable[[Tensor], Tensor]]:
    """Return a block of a language model, the features of its tokens and a loss of its outputs."""
    features = torch.randn(row.batch, TOKENS, WIDTH, requires_grad=True)
    return Block(0, WIDTH, HEADS, 0.0), (features, None), lambda y: y.square().mean()


if __name__ == "__main__":
    main()
