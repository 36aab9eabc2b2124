"""The precision that a step computes in: fp32, bf16 or fp16 by torch.amp, and fp16 by Apex."""

import argparse
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparselearning.core import Masking
from sparselearning.loading import check_alike, check_schedule


@dataclass
class Precision:
    """How a step computes: in what precision, and with what loss scale.

    amp: 'none' (fp32), 'bf16' or 'fp16' by torch.amp. fp16 comes with a GradScaler, which adapts the loss scale
    unless there is a static one. A step clips the norm of the gradients to `clip_norm`; 0 leaves them as they are.
    """

    amp: str
    device: torch.device
    static_loss_scale: float | None = None
    clip_norm: float = 0.0

    def __post_init__(self):
        scale = self.static_loss_scale or 2.0**16
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=scale, enabled=self.amp == "fp16")

    def autocast(self) -> AbstractContextManager:
        """Return the context for the forward pass."""
        dtype = {"none": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.amp]
        return torch.autocast(self.device.type, dtype, enabled=self.amp != "none")

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradients of the loss to the present ones; `last` says that a step follows."""
        self.scaler.scale(loss).backward()

    def step(self, optimizer: Any) -> None:
        """Step with the gradients; an overflow in fp16 skips the step."""
        if self.clip_norm:
            self.scaler.unscale_(optimizer)
            clip(optimizer, self.clip_norm)
        self.scaler.step(optimizer)
        self.scaler.update(self.static_loss_scale)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the loss scale."""
        return self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state of the loss scale."""
        check_schedule("precision", self.scaler, state)
        self.scaler.load_state_dict(state)


class ApexPrecision:
    """fp16 with fp32 master weights by Apex's FP16_Optimizer; it has the methods of `Precision`.

    `optimizer` is the one to step, or to give to Masking. The model computes in half precision from then on, and
    still takes fp32 images. The loss scale adapts unless there is a static one. `clip_norm` is as in `Precision`.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        static_loss_scale: float | None = None,
        clip_norm: float = 0.0,
    ):
        self.clip_norm = clip_norm
        model.half().register_forward_pre_hook(lambda _, inputs: tuple(map(_halved, inputs)))
        adapting = dict(dynamic_loss_scale=True, dynamic_loss_args={"init_scale": 2**16})
        fixed = dict(static_loss_scale=static_loss_scale)
        self.optimizer = find_apex()(optimizer, **(fixed if static_loss_scale else adapting))

    def autocast(self) -> AbstractContextManager:
        """Return the context for the forward pass, which needs none."""
        return nullcontext()

    def backward(self, loss: Tensor, last: bool = True) -> None:
        """Add the gradients of the loss to the present ones; the last call also gives them to the master weights."""
        self.optimizer.backward(loss, **({} if last else {"update_master_grads": False}))

    def step(self, optimizer: Any) -> None:
        """Step `optimizer`, the FP16_Optimizer or a Masking of it; an overflow skips the step."""
        if self.clip_norm:
            self.optimizer.clip_master_grads(self.clip_norm)
        optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the fp32 master weights and the numbers of the loss scale, without Apex's own classes."""
        masters = [[master.detach() for master in group] for group in self.optimizer.fp32_from_fp16_groups]
        return {"masters": masters, "loss_scale": dict(vars(self.optimizer.loss_scaler))}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the master weights and the loss scale."""
        check_alike("'precision'['loss_scale']", state["loss_scale"], dict(vars(self.optimizer.loss_scaler)))
        for group, saved in zip(self.optimizer.fp32_from_fp16_groups, state["masters"], strict=True):
            for master, value in zip(group, saved, strict=True):
                master.copy_(value)
        vars(self.optimizer.loss_scaler).update(state["loss_scale"])


def _halved(value):
    """Return images in half precision; the numbers of tokens, and what is no tensor, as they are."""
    return value.half() if isinstance(value, Tensor) and value.is_floating_point() else value


def clip(optimizer: Any, max_norm: float) -> None:
    """Scale the gradients that a torch optimizer or a Masking steps with down to this norm, if theirs is larger."""
    if isinstance(optimizer, Masking):
        optimizer.clip_grad_norm_(max_norm)
        return
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    torch.nn.utils.clip_grad_norm_(weights, max_norm)


def find_apex() -> Any:
    """Return Apex's FP16_Optimizer, or None where Apex is absent or no longer has it."""
    try:
        from apex.fp16_utils import FP16_Optimizer  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    return FP16_Optimizer


def choose_precision(
    args: argparse.Namespace, model: nn.Module, optimizer: torch.optim.Optimizer, device: torch.device
) -> tuple[Any, Any]:
    """Return the precision that the arguments ask for, and the optimizer to step: Apex puts its own around it."""
    given = vars(args)  # some flags are of one script alone
    settings: dict[str, Any] = dict(static_loss_scale=given.get("static_loss_scale"), clip_norm=given.get("clip", 0.0))
    if args.amp != "apex":
        return Precision(args.amp, device, **settings), optimizer
    precision = ApexPrecision(model, optimizer, **settings)
    return precision, precision.optimizer
