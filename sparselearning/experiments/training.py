"""Epoch functions: train once over the data, evaluate once over the data."""

import math
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from sparselearning.distributed import add_up, average_buffers, processes, rank, without_sync
from sparselearning.sharded import local_part

LossFunction = Callable[..., Tensor]


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

    amp: 'none' (fp32), 'bf16' or 'fp16' by torch.amp; fp16 comes with a GradScaler, which adapts the loss scale
    unless there is a static one.
    """

    amp: str
    device: torch.device
    static_loss_scale: float | None = None

    def __post_init__(self):
        scale = self.static_loss_scale or 2.0**16
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=scale, enabled=self.amp == "fp16")

    def autocast(self) -> AbstractContextManager:
        """Return the context for the forward pass."""
        dtype = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.amp]
        return torch.autocast(self.device.type, dtype, enabled=self.amp != "none")

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradients of the loss to those there are; `last` before the next step."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: Any) -> None:
        """Step with the gradients; an overflow in fp16 skips the step."""
        self.scaler.step(optimizer)
        self.scaler.update(self.static_loss_scale)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loss scale."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of the loss scale."""
        self.scaler.load_state_dict(state)


class ApexPrecision:
    """fp16 with fp32 master weights by Apex's FP16_Optimizer: the same methods as `Precision`.

    `optimizer` is what to step, or to give to Masking. The model is in half precision from then on and takes fp32
    images still. The loss scale adapts unless there is a static one.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, static_loss_scale: float | None = None):
        model.half().register_forward_pre_hook(lambda _, inputs: tuple(x.half() for x in inputs))
        adapting = dict(dynamic_loss_scale=True, dynamic_loss_args={"init_scale": 2**16})
        fixed = dict(static_loss_scale=static_loss_scale)
        self.optimizer = find_apex()(optimizer, **(fixed if static_loss_scale else adapting))

    def autocast(self) -> AbstractContextManager:
        """Return the context for the forward pass: none is needed."""
        return nullcontext()

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradients of the loss to those there are; the last time those of the master weights follow."""
        self.optimizer.backward(loss, **({} if last else {"update_master_grads": False}))

    def step(self, optimizer: Any) -> None:
        """Step `optimizer`, the FP16_Optimizer or a Masking of it; an overflow skips the step."""
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


class Progress:
    """How far an epoch has come: its steps done, the sum of their losses over all processes, the seconds it took.

    Losses are added on the device, and fetched from it now and then. `order` is the order of the training images,
    where it was drawn.
    """

    def __init__(self, steps: int = 0, loss: float = 0.0, seconds: float = 0.0, order: Tensor | None = None):
        self.steps = steps
        self.loss = loss
        self.order = order
        self._fresh: list[Tensor] = []
        self._started = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Seconds since the epoch began, without those between a stop and going on."""
        return time.perf_counter() - self._started

    def add(self, loss: Tensor) -> None:
        """Count a step."""
        self.steps += 1
        self._fresh.append(loss)

    def fetch(self) -> float:
        """Wait for the device and the other processes; return the mean loss of the steps since the last time.

        Raises:
            NotFinite: if the loss of a step is NaN or infinite.
        """
        if not self._fresh:
            return 0.0
        losses = (add_up(torch.stack(self._fresh)) / processes()).tolist()
        first = self.steps - len(losses) + 1
        self._fresh.clear()
        for step, loss in enumerate(losses, start=first):
            if not math.isfinite(loss):
                raise NotFinite(f"the loss is {loss} at step {step} of the epoch")
            self.loss += loss  # one by one: the sum is the same whenever it is fetched
        return sum(losses) / len(losses)

    def state_dict(self) -> dict[str, Any]:
        """Return what `Progress(**state)` goes on from."""
        self.fetch()
        return {"steps": self.steps, "loss": self.loss, "seconds": self.seconds, "order": self.order}


def check_weights(model: nn.Module, step: int) -> None:
    """Check that all weights are finite.

    Raises:
        NotFinite: if one is not.
    """
    if not torch.stack([local_part(parameter).isfinite().all() for parameter in model.parameters()]).all():
        raise NotFinite(f"the weights are no longer finite after step {step} of the epoch")


def train_epoch(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    optimizer: Any,
    scheduler: Any,
    precision: Any,
    l1: float = 0.0,
    report: Callable[[int, float], None] | None = None,
    report_every: int = 100,
    loss_function: LossFunction = F.nll_loss,
    accumulate: int = 1,
    progress: Progress | None = None,
    after_step: Callable[[], None] | None = None,
) -> float:
    """Train once over `batches` of images and labels; return the mean loss of the steps, over all processes.

    The statistics of BatchNorm are averaged over the processes at the end.

    Args:
        optimizer: a torch optimizer or a Masking.
        scheduler: stepped after every step.
        precision: a `Precision`, or what offers the same methods.
        l1: factor of the sum of |weights| that is added to the loss, biases and 1-d parameters excepted.
        report: called with the number of steps and the mean loss since the last report.
        loss_function: of the model's output in fp32 and the labels; a mean over images.
        accumulate: batches whose mean gradient makes a step.
        progress: of an epoch that goes on; `batches` are those that are left of it.
        after_step: called after every step, when `progress` counts it.

    Raises:
        NotFinite: if the loss is NaN or infinite, noticed at the next report, or a weight is after the last step.
    """
    model.train()
    progress = progress or Progress()
    before = progress.steps
    weights = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    losses: list[Tensor] = []  # of the parts of a step
    for images, labels in batches:
        first, last = not losses, len(losses) + 1 == accumulate
        if first:
            optimizer.zero_grad()
        with nullcontext() if last else without_sync(model):
            with precision.autocast():
                loss = loss_function(model(images).float(), labels)
                if l1:
                    sums = [weight.abs().sum(dtype=torch.float32) for weight in weights]
                    loss = loss + l1 * torch.stack(sums).sum()
            precision.backward(loss / accumulate if accumulate > 1 else loss, last)
        losses.append(loss.detach())
        if not last:
            continue
        precision.step(optimizer)
        scheduler.step()
        progress.add(losses[0] if accumulate == 1 else torch.stack(losses).mean())
        losses.clear()
        if progress.steps % report_every == 0:
            mean = progress.fetch()  # the only time the host waits for the device
            if report is not None:
                report(progress.steps, mean)
        if after_step is not None:
            after_step()
    mean = progress.fetch()
    if report is not None and progress.steps % report_every:
        report(progress.steps, mean)
    check_weights(model, progress.steps)
    if progress.steps > before:
        average_buffers(model)
    return progress.loss / max(progress.steps, 1)


@contextmanager
def progress_bar(title: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """Show a bar on a terminal, nothing elsewhere; yield the function that moves it to (steps done, loss).

    Of several processes the first one alone shows it.
    """
    with tqdm(total=steps, desc=title, leave=False, disable=True if rank() else None) as bar:

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
    correct_in_5: int = 0  # images whose class is among the five most likely

    @property
    def accuracy(self) -> float:
        """Fraction of right answers."""
        return self.correct / self.total

    def __str__(self) -> str:
        return f"Average loss: {self.loss:.4f}, Accuracy: {self.correct}/{self.total} ({self.accuracy:.3%})"


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    precision: Any,
    loss_function: LossFunction = F.nll_loss,
) -> Evaluation:
    """Return mean loss and accuracy of the model over the `batches` of all processes; a label -1 does not count.

    Raises:
        NotFinite: if the loss is NaN or infinite.
    """
    model.eval()
    sums = []
    for images, labels in batches:
        with precision.autocast():
            output = model(images).float()
        loss = loss_function(output, labels, reduction="sum", ignore_index=-1)
        first, first_5 = output.argmax(dim=1), output.topk(min(5, output.shape[1])).indices
        counts = (first == labels).sum(), (first_5 == labels[:, None]).sum(), (labels >= 0).sum()
        sums.append(torch.stack([value.double() for value in (loss, *counts)]))
    loss, *counts = add_up(torch.stack(sums).sum(dim=0)).tolist()
    correct, correct_in_5, total = map(int, counts)
    if not math.isfinite(loss):
        raise NotFinite(f"the loss is {loss} over {total} images that are evaluated")
    return Evaluation(loss / total, correct, total, correct_in_5)
