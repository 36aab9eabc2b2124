"""Epoch functions: train once over the data, evaluate once over the data."""

import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm


class NotFinite(RuntimeError):
    """The loss or a weight became NaN or infinite."""


def seed_generators(seed: int) -> None:
    """Seed the generators of torch, numpy and Python; own functions may draw from any."""
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    random.seed(seed)


@dataclass
class Precision:
    """How a step computes: in what precision, and with what loss scale.

    amp: 'none' (fp32), 'bf16' or 'fp16' by torch.amp; fp16 comes with a GradScaler.
    """

    amp: str
    device: torch.device

    def __post_init__(self):
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == "fp16")

    def autocast(self) -> AbstractContextManager:
        """Return the context for the forward pass."""
        dtype = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.amp]
        return torch.autocast(self.device.type, dtype, enabled=self.amp != "none")

    def step(self, loss: Tensor, optimizer: Any) -> None:
        """Backpropagate the loss and step; an overflow in fp16 skips the step."""
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loss scale."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of the loss scale."""
        self.scaler.load_state_dict(state)


class ApexPrecision:
    """fp16 with fp32 master weights by Apex's FP16_Optimizer: the same methods as `Precision`.

    `optimizer` is what to step, or to give to Masking. The model is in half precision from then on and takes fp32
    images still.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        model.half().register_forward_pre_hook(lambda _, inputs: tuple(x.half() for x in inputs))
        self.optimizer = find_apex()(optimizer, dynamic_loss_scale=True, dynamic_loss_args={"init_scale": 2**16})

    def autocast(self) -> AbstractContextManager:
        """Return the context for the forward pass: none is needed."""
        return nullcontext()

    def step(self, loss: Tensor, optimizer: Any) -> None:
        """Backpropagate the loss and step `optimizer`, the FP16_Optimizer or a Masking of it."""
        self.optimizer.backward(loss)
        optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the fp32 master weights and the numbers of the loss scale, free of Apex's own classes."""
        masters = [[master.detach() for master in group] for group in self.optimizer.fp32_from_fp16_groups]
        return {"masters": masters, "loss_scale": dict(vars(self.optimizer.loss_scaler))}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the master weights and the loss scale."""
        for group, saved in zip(self.optimizer.fp32_from_fp16_groups, state["masters"], strict=True):
            for master, value in zip(group, saved, strict=True):
                master.copy_(value)
        vars(self.optimizer.loss_scaler).update(state["loss_scale"])


def find_apex() -> Any:
    """Return Apex's FP16_Optimizer, or None where Apex is absent or no longer has it."""
    try:
        from apex.fp16_utils import FP16_Optimizer  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return FP16_Optimizer


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: Any,
    scheduler: Any,
    precision: Any,
    l1: float = 0.0,
    report: Callable[[int, float], None] | None = None,
    report_every: int = 100,
) -> float:
    """Train once over `batches` of images and labels; return the mean loss of the steps.

    Args:
        optimizer: a torch optimizer or a Masking.
        scheduler: stepped after every step.
        precision: a `Precision`, or what offers the same two methods.
        l1: factor of the sum of |weights| that is added to the loss, biases and 1-d parameters excepted.
        report: called with the number of steps and the mean loss since the last report.

    Raises:
        NotFinite: if the loss is NaN or infinite, noticed at the next report, or a weight is after the last step.
    """
    model.train()
    losses: list[Tensor] = []
    total, done = 0.0, 0

    def fetch():  # the only time the host waits for the device
        nonlocal total, done
        values = torch.stack(losses).tolist()
        for value in values:
            done += 1
            if not math.isfinite(value):
                raise NotFinite(f"the loss is {value} at step {done} of the epoch")
        total += sum(values)
        losses.clear()
        if report is not None:
            report(done, sum(values) / len(values))

    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    for images, labels in batches:
        optimizer.zero_grad()
        with precision.autocast():
            loss = F.nll_loss(model(images).float(), labels)
            if l1:
                sums = [weight.abs().sum(dtype=torch.float32) for weight in weights]
                loss = loss + l1 * torch.stack(sums).sum()
        precision.step(loss, optimizer)
        scheduler.step()
        losses.append(loss.detach())
        if len(losses) == report_every:
            fetch()
    if losses:
        fetch()
    if not torch.stack([parameter.isfinite().all() for parameter in model.parameters()]).all():
        raise NotFinite(f"the weights are no longer finite after step {done} of the epoch")
    return total / max(done, 1)


@contextmanager
def progress_bar(title: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """Show a bar on a terminal, nothing elsewhere; yield the function that moves it to (steps done, loss)."""
    with tqdm(total=steps, desc=title, leave=False, disable=None) as bar:

        def report(done: int, loss: float) -> None:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            bar.update(done - bar.n)

        yield report


@dataclass
class Evaluation:
    """Mean loss and number of right answers over a data set."""

    loss: float
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Fraction of right answers."""
        return self.correct / self.total

    def __str__(self) -> str:
        return f"Average loss: {self.loss:.4f}, Accuracy: {self.correct}/{self.total} ({self.accuracy:.3%})"


@torch.no_grad()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], precision: Any) -> Evaluation:
    """Return mean loss and accuracy of the model over `batches` of images and labels.

    Raises:
        NotFinite: if the loss is NaN or infinite.
    """
    model.eval()
    sums = []
    total = 0
    for images, labels in batches:
        with precision.autocast():
            output = model(images).float()
        loss = F.nll_loss(output, labels, reduction="sum")
        sums.append(torch.stack([loss.double(), (output.argmax(dim=1) == labels).sum().double()]))
        total += len(labels)
    loss, correct = torch.stack(sums).sum(dim=0).tolist()
    if not math.isfinite(loss):
        raise NotFinite(f"the loss is {loss} over {total} images that are evaluated")
    return Evaluation(loss / total, int(correct), total)
