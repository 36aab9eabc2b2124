"""Train on sparse kernels: forward and both gradients touch active weights only.

Differences from exact sparse momentum (Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840), whose momentum
is dense: here the optimizer keeps state for active weights alone. An inactive weight is scored for growth by the mean
of its gradient over the last `WINDOW` steps before an update (as RigL does with one step, Evci et al. 2020,
https://arxiv.org/abs/1911.11134). When it grows, SGD's momentum starts as if that mean had been its gradient all along;
other optimizers' state starts at zero. Pruning and redistribution, which read active weights, are the paper's.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparselearning.layers import SparseLayer
from sparselearning.processes import distributed
from sparselearning.sparse import ops
from sparselearning.sparse.batch_last import forget_order, keep_order
from sparselearning.sparse.interface import conv_shape, kernels
from sparselearning.sparse.modules import numeric_padding
from sparselearning.weights.optimizer import momentum_of

logger = logging.getLogger(__name__)

WINDOW = 20  # dense gradients that are averaged, of the steps before an update: as many as a momentum of 0.9 averages
EVERY = 10  # until the first update has shown how far apart updates are, one step in so many, and the first


class Trained(nn.Module, ABC):
    """What a linear or convolution layer needs to train on its active weights.

    `value` (nonzeros,) is the parameter that is trained. `weight` stays, with zeros, for whoever reads it: it follows
    `value` after each step, and is what a state_dict holds.
    """

    weight: Tensor
    value: nn.Parameter
    position: Tensor  # of each value in the flattened weight
    indices: tuple[Tensor, ...]  # start, column, t_start, t_column, t_order

    def begin(self, observing: bool) -> None:
        self.weight.requires_grad_(False)
        self.value = nn.Parameter(self.weight.new_empty(0))
        self.observing, self.observed = observing, 0
        self.gradient: Tensor | None = None  # sum of dense gradients over `observed` steps

    @torch.no_grad()
    def follow(self, mask: Tensor) -> None:
        """Take the weights that `mask` marks as the new values; set the others to zero."""
        rows = mask.flatten(1)
        self.position = rows.flatten().nonzero().flatten()
        start = F.pad(rows.sum(1).cumsum(0), (1, 0)).int()
        column = (self.position % rows.shape[1]).int()
        self.indices = (start, column, *ops.transposed(start, column, self.conv_shape()))
        self.read()
        self.weight.zero_()
        self.write()

    @torch.no_grad()
    def read(self) -> None:
        """Set the values to those of the dense weight."""
        # Where the caller still holds the loss of the last step, its graph would expect gradients of the size that
        # there was. Only another dtype makes torch forget that.
        self.value.data = self.value.new_empty(0, dtype=torch.float16)
        self.value.data = self.weight.flatten()[self.position]

    @torch.no_grad()
    def write(self) -> None:
        """Set the active places of the dense weight to the values."""
        self.weight.reshape(-1).scatter_(0, self.position, self.value.detach())

    def end(self) -> None:
        """Become the dense layer again, zeros included."""
        del self.value
        self.weight.requires_grad_(True)
        self.__class__ = next(kind for kind, trained in KINDS.items() if trained is type(self))

    @abstractmethod
    def conv_shape(self) -> Any:
        """Return the layer as a convolution of one image, as the kernels take it."""

    @abstractmethod
    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        """Return the gradient of the dense weight."""

    def watch(self, x: Tensor, y: Tensor) -> Tensor:
        """Let the backward pass of y add the dense gradient, if this step is observed."""
        if self.observing and y.requires_grad:
            x = x.detach()
            y.register_hook(lambda dy: self.collect(x, dy))
        return y

    @torch.no_grad()
    def collect(self, x: Tensor, dy: Tensor) -> None:
        gradient = self.weight_gradient(x, dy)
        self.gradient = gradient if self.gradient is None else self.gradient.add_(gradient)

    @torch.no_grad()
    def count_observed(self) -> None:
        """Count a step. Of more than WINDOW that were observed the earlier ones fade, as they do from a momentum."""
        self.observed += self.observing
        if self.observed > WINDOW and self.gradient is not None:
            self.gradient.mul_(WINDOW / self.observed)
            self.observed = WINDOW

    def arguments(self):
        start, column, *turned = self.indices
        return self.value, self.bias, start, column, *turned

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "value"]

    def _load_from_state_dict(self, *args, **kwargs):
        value = self._parameters.pop("value")
        super()._load_from_state_dict(*args, **kwargs)
        self.register_parameter("value", value)
        self.read()


class TrainedLinear(Trained, nn.Linear):
    """nn.Linear that trains on its active weights."""

    def conv_shape(self):
        return ops.row_shape(1, self.in_features, self.out_features)

    def forward(self, input: Tensor) -> Tensor:
        rows = input.reshape(-1, input.shape[-1])
        y = self.watch(rows, torch.ops.sparselearning.linear(rows, *self.arguments(), False))
        return y if input.dim() == 2 else y.reshape(*input.shape[:-1], y.shape[-1])

    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        return dy.t() @ x


class TrainedConv2d(Trained, nn.Conv2d):
    """nn.Conv2d that trains on its active weights."""

    def geometry(self):
        return self.kernel_size, self.stride, numeric_padding(self), self.dilation, self.groups

    def conv_shape(self):
        kernel, stride, padding, dilation, groups = self.geometry()
        shape = (1, self.in_channels, *kernel, self.out_channels)
        return conv_shape(*shape, kernel, stride, padding, dilation, groups, False)[0]

    def forward(self, input: Tensor) -> Tensor:
        images = input if input.dim() == 4 else input.unsqueeze(0)
        y = self.watch(images, torch.ops.sparselearning.conv2d(images, *self.arguments(), *self.geometry(), False))
        return y if input.dim() == 4 else y.squeeze(0)

    def weight_gradient(self, x: Tensor, dy: Tensor) -> Tensor:
        _, stride, padding, dilation, groups = self.geometry()
        x, dy = ops.to_batch_first(x), ops.to_batch_first(dy)
        settings = (None, stride, padding, dilation, False, (0, 0), groups, (False, True, False))
        return torch.ops.aten.convolution_backward(dy, x, self.weight, *settings)[1]


KINDS = {nn.Linear: TrainedLinear, nn.Conv2d: TrainedConv2d}


class SparseTraining:
    """The layers of a Masking that train on sparse kernels, and the optimizer's state of their active weights."""

    def __init__(self, optimizer: torch.optim.Optimizer, backend: str | None, reset_state: bool = False):
        if backend not in (None, "cpu"):
            raise ValueError(f"Unknown sparse_backend {backend!r}. Choose 'cpu', or None to train with masks.")
        if backend == "cpu":
            kernels()  # says so if there are none
        self.optimizer, self.reset_state = optimizer, reset_state
        self.active = backend == "cpu"
        self.roots: list[nn.Module] = []
        self.trained: dict[str, Trained] = {}  # by the layer's name
        self.versions: dict[str, int] = {}  # of the mask that a layer's values follow
        self.since_update = 0
        self.interval: int | None = None  # steps between the last two updates
        self.carry = True

    def add(self, root: nn.Module, layers: Sequence[SparseLayer], left: float, by_steps: bool) -> None:
        """Train `layers`, masked weights inside `root`, on the kernels wherever there are some.

        Weights of other modules, tied weights, and dtypes without kernels stay masked, and are named in the log;
        `observes` says what the other two arguments mean.
        """
        if not self.active:
            return
        if distributed.in_process_group():
            raise ValueError("sparse_backend='cpu' trains in one process; leave it out under torchrun.")
        owners: dict[int, list[nn.Module]] = {}
        for module in root.modules():
            for parameter in module.parameters(recurse=False):
                owners.setdefault(id(parameter), []).append(module)
        for layer in layers:
            reason = why_not(layer, owners[id(layer.weight)])
            if reason:
                logger.info("%s trains masked, not on sparse kernels: %s.", layer.name, reason)
                continue
            (module,) = owners[id(layer.weight)]
            module.__class__ = KINDS[type(module)]
            assert isinstance(module, Trained)
            module.begin(observing=self.observes(left, by_steps))
            self.trained[layer.name] = module
            self.exchange(layer.weight, module.value)
        self.roots.append(root)
        keep_order(root)

    def exchange(self, old: Tensor, new: Tensor) -> None:
        """Let the optimizer step `new` in place of `old`, and move its state."""
        for group in self.optimizer.param_groups:
            group["params"] = [new if parameter is old else parameter for parameter in group["params"]]
        if old in self.optimizer.state:
            self.optimizer.state[new] = self.optimizer.state.pop(old)

    def release(self, layers: Sequence[SparseLayer]) -> None:
        """Train these weights densely again."""
        for layer in layers:
            module = self.trained.pop(layer.name, None)
            if module is None:
                continue
            self.versions.pop(layer.name)
            self.exchange(module.value, layer.weight)
            for key, tensor in self.vectors(layer.weight, len(module.value)):
                self.optimizer.state[layer.weight][key] = spread(tensor, module.position, layer.weight)
            module.end()
        if not self.trained:
            for root in self.roots:
                forget_order(root)

    def stepped_weights(self) -> set[int]:
        """Return the ids of the dense weights whose values the optimizer steps."""
        return {id(module.weight) for module in self.trained.values()}

    def stepped_for(self, layer: SparseLayer) -> Tensor:
        """Return what the optimizer steps for a layer: its values here, or its dense weight."""
        module = self.trained.get(layer.name)
        return layer.master if module is None else module.value

    def state_dict(self) -> dict[str, Any]:
        """Return the gradients seen since the last update of the masks, and when the next one is expected."""
        layers = {
            name: {"gradient": module.gradient, "observed": module.observed, "observing": module.observing}
            for name, module in self.trained.items()
        }
        return {"since_update": self.since_update, "interval": self.interval, "layers": layers}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take what `state_dict` returned; without it no gradient was seen.

        Masks, weights and optimizer state are expected from the same checkpoint, and belong together already.
        """
        self.carry = False
        self.since_update, self.interval = state.get("since_update", 0), state.get("interval")
        for name, module in self.trained.items():
            seen = state.get("layers", {}).get(name, {})
            gradient = seen.get("gradient")
            module.gradient = None if gradient is None else gradient.to(module.weight.device, copy=True)
            module.observed, module.observing = seen.get("observed", 0), seen.get("observing", module.observing)

    def vectors(self, parameter: Tensor, size: int) -> list[tuple[Any, Tensor]]:
        """Return the optimizer's state of a parameter that has an entry for each of `size` values."""
        state = self.optimizer.state.get(parameter, {})
        return [(key, item) for key, item in state.items() if isinstance(item, Tensor) and item.shape == (size,)]

    def apply(self, layers: list[SparseLayer]) -> list[SparseLayer]:
        """Make weights and values agree after a step or a move of masks; return the layers not trained here."""
        if not self.trained:
            return layers
        for layer in layers:
            module = self.trained.get(layer.name)
            if module is None:
                continue
            if self.versions.get(layer.name) != layer.mask._version:
                self.move(layer, module)
            else:
                module.write()
        self.carry = True
        return [layer for layer in layers if layer.name not in self.trained]

    def move(self, layer: SparseLayer, module: Trained) -> None:
        """Let values and optimizer state follow a mask."""
        size, position = len(module.value), getattr(module, "position", None)
        module.follow(layer.mask)
        state = self.optimizer.state.get(module.value, {})
        if self.carry and position is not None:
            for key, tensor in self.vectors(module.value, size):
                state[key] = self.start_of(key, module).scatter(0, position, tensor).reshape(layer.weight.shape)
        for key, tensor in state.items():
            if isinstance(tensor, Tensor) and tensor.shape == layer.weight.shape:
                state[key] = tensor.flatten()[module.position]
        module.value.grad = None
        self.versions[layer.name] = layer.mask._version

    def start_of(self, key: Any, module: Trained) -> Tensor:
        """Return what an optimizer's state would start from where a weight grows, for the flattened weight.

        A momentum is that of a weight whose gradient has long been the mean of those observed; all else is zero, and
        with `reset_state` everything.
        """
        if self.reset_state or key != "momentum_buffer" or module.gradient is None:
            return torch.zeros_like(module.weight).reshape(-1)
        group = next(group for group in self.optimizer.param_groups if any(p is module.value for p in group["params"]))
        # RMSprop's momentum is one of scaled gradients; one that never decays has no such sum.
        if "dampening" not in group or group["momentum"] >= 1:
            return torch.zeros_like(module.weight).reshape(-1)
        gain = (1 - group["dampening"]) / (1 - group["momentum"])
        return module.gradient.reshape(-1) * (gain / max(module.observed, 1))

    def stepped(self, left: float, by_steps: bool) -> None:
        """Count a step; decide whether the next one observes dense gradients; see `observes`."""
        if not self.trained:
            return
        self.since_update += 1
        for module in self.trained.values():
            module.count_observed()
        for module in self.trained.values():
            module.observing = self.observes(left, by_steps)

    def observes(self, left: float, by_steps: bool) -> bool:
        """Tell whether the next step observes dense gradients.

        It does if steps bring about an update in `left` of them, at most `WINDOW`. Unless all updates are due to steps
        (`by_steps`), the next one may also be as far from the last one as that was from the one before.
        """
        if left <= WINDOW or by_steps:
            return left <= WINDOW
        if self.interval is None:
            return self.since_update % EVERY == 0
        return self.since_update >= self.interval - WINDOW

    def updated(self, left: float, by_steps: bool) -> None:
        """Forget the gradients seen; an update of the masks is over."""
        if not self.trained:
            return
        self.interval, self.since_update = self.since_update, 0
        for module in self.trained.values():
            module.gradient, module.observed = None, 0
            module.observing = self.observes(left, by_steps)

    def momentum_of(self, weight: Tensor) -> Tensor | None:
        """Return momentum where `weight` is active and the mean of its observed gradients elsewhere."""
        module = self.owner_of(weight)
        if module is None:
            return None
        momentum = momentum_of(self.optimizer, module.value)
        seen = torch.zeros_like(weight) if module.gradient is None else module.gradient / max(module.observed, 1)
        return seen.reshape(-1).scatter(0, module.position, momentum).reshape(weight.shape)

    def gradient_of(self, weight: Tensor) -> Tensor | None:
        """Return the mean of the gradients observed since the last update.

        Raises:
            RuntimeError: if none was observed.
        """
        module = self.owner_of(weight)
        if module is None:
            return None
        if module.gradient is None:
            raise RuntimeError("No gradient was observed since the last update of the masks. Train a step in between.")
        return module.gradient / max(module.observed, 1)

    def owner_of(self, weight: Tensor) -> Trained | None:
        """Return the layer that trains `weight` here, if there is one."""
        return next((module for module in self.trained.values() if module.weight is weight), None)


def trained_to_dense(model: nn.Module) -> None:
    """Turn, in place, a model that was trained on sparse kernels into one of torch's own layers, zeros included."""
    for module in list(model.modules()):
        if isinstance(module, Trained):
            module.end()
    forget_order(model)


def why_not(layer: SparseLayer, owners: Sequence[nn.Module]) -> str:
    """Return why a weight cannot be trained on the kernels, or nothing if it can."""
    weight = layer.weight
    if weight.device.type != "cpu" or weight.dtype not in ops.DTYPES:
        return f"no kernels for {weight.dtype} on {weight.device.type}"
    if weight is not layer.master or not weight.is_contiguous() or len(owners) != 1:
        return "it is tied, a copy, or not contiguous"
    if type(owners[0]) not in KINDS:
        return f"it belongs to a {type(owners[0]).__name__}"
    if isinstance(owners[0], nn.Conv2d):
        try:
            numeric_padding(owners[0])
        except ValueError as error:
            return str(error).rstrip(".")
    return ""


def spread(values: Tensor, position: Tensor, like: Tensor) -> Tensor:
    """Return a tensor like `like` with `values` at `position` of its flattened form, zero elsewhere."""
    return values.new_zeros(like.numel()).scatter(0, position, values).reshape(like.shape)
