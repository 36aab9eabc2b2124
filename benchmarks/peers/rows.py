"""The rows of the benchmark of engines, and the sparse networks that they run."""

import copy
import warnings
from pathlib import Path
from typing import NamedTuple

import common
import few_rows
import torch
from torch import Tensor, nn

from sparselearning import CosineDecay, Masking

KERNEL = "erdos_renyi_kernel"


class Row(NamedTuple):
    """A network, its masks and the batch. `goal` is the time aimed at over that of the best dense fp32 engine."""

    model: str
    density: float
    start: str  # of the masks: a sparse_init of Masking
    batch: int
    goal: float

    @property
    def name(self) -> str:
        masks = {"constant": ""}.get(self.start, f" {self.start}")
        return f"{self.model} {self.density:g}{masks} b{self.batch}"


ROWS = [
    Row("resnet50", 0.1, "constant", 1, 13 / 35.2),
    Row("resnet50", 0.1, "constant", 8, 100 / 284),
    Row("resnet50", 0.1, KERNEL, 1, 18 / 35.2),
    Row("resnet50", 0.1, KERNEL, 8, 150 / 284),
    Row("resnet50", 0.2, KERNEL, 1, 27 / 35.2),
    Row("resnet50", 0.2, KERNEL, 8, 220 / 284),
    Row("vgg-d", 0.05, "constant", 1, 1.2 / 3.79),
    Row("vgg-d", 0.05, "constant", 8, 5 / 21.6),
    Row("vgg-d", 0.05, "constant", 32, 11 / 83.7),
    Row("vgg-d", 0.05, KERNEL, 32, 15 / 83.7),
    Row("wrn-16-8", 0.05, "constant", 1, 3 / 13.5),
    Row("wrn-16-8", 0.05, "constant", 32, 50 / 380),
    Row("wrn-16-8", 0.05, KERNEL, 32, 65 / 380),
    Row("mlp", 0.05, "constant", 1, 0.35 / 1.92),
    Row("mlp", 0.05, "constant", 8, 0.7 / 3.55),
]
QUICK = ("mlp 0.05 b1", "mlp 0.05 b8", "vgg-d 0.05 b1")


def chosen(names: str) -> list[Row]:
    """Return the rows whose names contain one of the given parts, separated by commas; all for an empty text.

    Raises:
        ValueError: if a part is in no name.
    """
    parts = [part.strip() for part in names.split(",") if part.strip()]
    for part in parts:
        if not any(part in f"{row.name} " for row in ROWS):
            raise ValueError(f"No row has {part!r} in its name. Choose from: {'; '.join(row.name for row in ROWS)}.")
    return [row for row in ROWS if not parts or any(part in f"{row.name} " for part in parts)]


@torch.no_grad()
def network(row: Row) -> tuple[nn.Module, Tensor]:
    """Return the network of a row in eval mode, random at its density, and a batch for it."""
    torch.manual_seed(0)
    if row.model == "mlp":
        return few_rows.network(row.density).eval(), torch.randn(row.batch, few_rows.SIZES[0])
    model = common.build(row.model)
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), CosineDecay(0.5, 10_000))
    masking.add_module(model, row.density, sparse_init=row.start, rescale=True)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = None  # plain averages: after few passes, running ones would still shrink the signal
    shape = common.input_shape(row.model)
    for _ in range(3):
        model(torch.randn(4 if row.model == "resnet50" else 32, *shape))
    return copy.deepcopy(model).eval(), torch.randn(row.batch, *shape)


def export(model: nn.Module, x: Tensor, path: Path) -> None:
    """Write the model as ONNX in a version that the oldest peer reads; its input is called `input`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (x,), str(path), dynamo=False, opset_version=13, input_names=["input"])
