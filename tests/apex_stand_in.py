"""A stand-in for Apex, which cannot be installed here: the public interface of its FP16_Optimizer."""

import sys
import types

import torch


class LossScaler:
    """An object of Apex's own, which no checkpoint may hold."""

    def __init__(self, init_scale):
        self.cur_scale = init_scale


class FP16Optimizer:
    """What Apex's class does: it steps fp32 masters in an optimizer of its own, and takes no set_to_none."""

    def __init__(self, init_optimizer, static_loss_scale=1.0, dynamic_loss_scale=False, dynamic_loss_args=None):
        groups = init_optimizer.param_groups
        self.fp16_groups = [list(group["params"]) for group in groups]
        self.fp32_from_fp16_groups = [
            [half.detach().clone().float().requires_grad_() for half in halves] for halves in self.fp16_groups
        ]
        for group, masters in zip(groups, self.fp32_from_fp16_groups, strict=True):
            group["params"] = masters
        self.optimizer = type(init_optimizer)(groups)
        self.dynamic_loss_scale = dynamic_loss_scale
        self.loss_scaler = LossScaler(**dynamic_loss_args) if dynamic_loss_scale else LossScaler(static_loss_scale)
        self.overflow = False

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def pairs(self):
        for halves, masters in zip(self.fp16_groups, self.fp32_from_fp16_groups, strict=True):
            yield from zip(halves, masters, strict=True)

    def zero_grad(self):
        self.optimizer.zero_grad()
        for half, _ in self.pairs():
            half.grad = None

    def backward(self, loss, update_master_grads=True):
        (loss * self.loss_scaler.cur_scale).backward()
        if update_master_grads:
            self.update_master_grads()

    def update_master_grads(self):
        grads = [half.grad for half, _ in self.pairs()]
        self.overflow = self.dynamic_loss_scale and not all(grad.isfinite().all() for grad in grads)
        for (_, master), grad in zip(self.pairs(), grads, strict=True):
            master.grad = grad.float() / self.loss_scaler.cur_scale

    def clip_master_grads(self, max_norm):
        if not self.overflow:
            torch.nn.utils.clip_grad_norm_([master for _, master in self.pairs()], max_norm)

    def step(self):
        if self.overflow:
            self.loss_scaler.cur_scale /= 2
            return
        self.optimizer.step()
        with torch.no_grad():
            for half, master in self.pairs():
                half.copy_(master)

    def state_dict(self):
        return {
            "loss_scaler": self.loss_scaler,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "fp32_from_fp16": self.fp32_from_fp16_groups,
        }


def install(patch):
    """Let `import apex` find the stand-in."""
    utils = types.ModuleType("apex.fp16_utils")
    utils.FP16_Optimizer = FP16Optimizer
    patch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    patch.setitem(sys.modules, "apex.fp16_utils", utils)
