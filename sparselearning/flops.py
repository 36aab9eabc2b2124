"""FLOPs of a sparse network, as papers report them: what an implementation that skips inactive weights would compute.

A multiplication and an addition are two. Counted are products with weights (linear layers and convolutions, forward for
one example) and between activations (attention); biases, normalisation and activation functions are not.

For f_D, the FLOPs of the dense forward pass, and f_S, in which every weight's product counts by the weight's density
(Evci et al. 2020, Rigging the Lottery, https://arxiv.org/abs/1911.11134, appendix):

    inference   f_S
    training    f_S forward, f_S for the gradient of the inputs, and for that of the weights f_S, or f_D on steps whose
                dense gradient growth reads; that of more weights, where more are trained than are active
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sparselearning.maskable import canonical_name

WITHOUT_GRADIENT = ("random", "rewiring", "cannistraci_hebb", "dense_magnitude", "global_dense_magnitude")


@dataclass(frozen=True)
class Flops:
    """FLOPs of a dense network's forward pass for one example: of each weight's products by name, and of others."""

    of_weights: Mapping[str, int]
    others: int = 0

    @property
    def dense(self) -> int:
        """f_D: of the dense forward pass."""
        return sum(self.of_weights.values()) + self.others

    def sparse(self, densities: Mapping[str, float]) -> float:
        """Return f_S: of the forward pass with weights of these densities; those not named are dense.

        >>> Flops({"fc1.weight": 100, "fc2.weight": 20}).sparse({"fc1.weight": 0.1})
        30.0
        """
        return sum(count * densities.get(name, 1.0) for name, count in self.of_weights.items()) + self.others

    def inference(self, densities: Mapping[str, float]) -> float:
        """Return the FLOPs of inference relative to the dense network's."""
        return self.sparse(densities) / self.dense

    def training(
        self, densities: Mapping[str, float], dense_gradients: float, trained: Mapping[str, float] | None = None
    ) -> float:
        """Return the FLOPs of training relative to the dense network's.

        `dense_gradients` is the fraction of steps on which the gradient of all weights is needed, see the function of
        that name; `trained` the densities of the weights whose gradient is needed on all other steps (None: those that
        are active).
        """
        share = self.inference(densities)
        of_weights = share if trained is None else self.inference(trained)
        return (2 * share + (1 - dense_gradients) * of_weights + dense_gradients) / 3


def forward_flops(model: nn.Module, inputs: Tensor) -> Flops:
    """Count the FLOPs of the forward pass by running `model` once on `inputs`, [1, ...], in evaluation mode.

    Whole weights are expected: count before sharding and compiling. A product with a weight that is the result of an
    operation, such as weight normalisation, counts as one between activations.
    """
    names = {_memory(parameter): canonical_name(name) for name, parameter in model.named_parameters()}
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # With gradients, for without them torch fuses a transformer's layer into one operation; and attention as its
        # products, for torch does not know the FLOPs of all its kernels.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), _Counter(names) as counter:
            model(inputs)
    finally:
        for module, mode in training.items():
            module.training = mode
    others = counter.counts.pop("", 0)
    return Flops(counter.counts, others)


def dense_gradients(growth_mode: object, steps_between_updates: int) -> float:
    """Return the fraction of steps whose dense gradient growth reads.

    None where growth is random or looks at masks and values; all where it reads the momentum, which gathers all
    gradients, or is not known to read less; for 'gradient' those of updates, 1 / (steps between updates + 1) as in Evci
    et al. 2020.
    """
    if growth_mode in WITHOUT_GRADIENT:
        return 0.0
    return 1 / (steps_between_updates + 1) if growth_mode == "gradient" else 1.0


class _Counter(TorchDispatchMode):
    """Adds up the FLOPs of every operation, by the name of the weight that it takes."""

    def __init__(self, names: Mapping[int, str]):
        super().__init__()
        self.names = names
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        count = flop_registry.get(func._overloadpacket)
        if count is None:
            with self:
                result = func.decompose(*args, **kwargs)
            return result if result is not NotImplemented else func(*args, **kwargs)
        result = func(*args, **kwargs)
        tensors = [argument for argument in args if isinstance(argument, Tensor)]
        name = next((self.names[_memory(t)] for t in tensors if t.dim() > 1 and _memory(t) in self.names), "")
        self.counts[name] = self.counts.get(name, 0) + count(*args, **kwargs, out_val=result)
        return result


def _memory(tensor: Tensor) -> int:
    """Return a number that tensors of the same memory share, such as a weight and its transpose."""
    return tensor.untyped_storage()._cdata
