"""Pruning before training: scores of the weights of an untrained network, and masks from a file.

    masking.add_module(model, density=0.05, sparse_init="snip", batches=[(images, labels)])
    masking.add_module(model, density=0.05, sparse_init=snip(model, [(images, labels)], loss_function))

Scores are tensors of their weights' shapes; `add_module` keeps the weights of the network with the highest scores.
Every maskable weight gets scores, even one that stays dense; SynFlow, which prunes in rounds, is told which ones stay
dense. The scores are those of a copy in the mode that `training` names (True: batch normalisation by the batch, and
dropout; False: by its running statistics; None: each module as it is), by default that of the authors' code. The model,
its mode, gradients and statistics do not change, nor do the random numbers drawn afterwards.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparselearning import checkpoint
from sparselearning.compact import expanded
from sparselearning.processes.sharded import is_sharded
from sparselearning.selection import drop_lowest_jointly
from sparselearning.start.maskable import maskable_parameters
from sparselearning.start.masks import Density
from sparselearning.start.names import by_density, named

Batches = Sequence[tuple[Tensor, Tensor]]
LossFunction = Callable[[Tensor, Tensor], Tensor]
SCORES = ("snip", "grasp", "synflow")


def scores_of(
    kind: str,
    model: nn.Module,
    batches: Batches | None,
    density: Density,
    dense: Sequence[str] = (),
    sparse: Iterable[str] = (),
) -> dict[str, Tensor]:
    """Return the scores called `kind`, one of `SCORES`, with cross-entropy as the loss.

    Args:
        batches: (inputs, labels) pairs; SynFlow uses only the shape of the first inputs.
        density, dense, sparse: as `synflow` takes them.

    Raises:
        ValueError: if there is no batch.
    """
    batches = list(batches or ())
    if not batches:
        raise ValueError(
            f"sparse_init={kind!r} scores the weights before training. Pass batches=[(inputs, labels)], or for another "
            f"loss the scores themselves: sparse_init={kind}(model, ...) from sparselearning.start.scores."
        )
    if kind == "synflow":
        return synflow(model, batches[0][0], density, dense, sparse=sparse)
    return {"snip": snip, "grasp": grasp}[kind](model, batches, sparse=sparse)


def snip(
    model: nn.Module,
    batches: Batches,
    loss_function: LossFunction = F.cross_entropy,
    sparse: Iterable[str] = (),
    training: bool | None = False,
) -> dict[str, Tensor]:
    """Return |w * dL/dw| for every maskable weight: how strongly the weight's presence affects the loss.

    Lee, Ajanthan and Torr 2019, SNIP: single-shot network pruning based on connection sensitivity,
    https://arxiv.org/abs/1810.02340, section 4: |dL(c * w)/dc| at c = 1 for a factor c on every weight. The paper
    divides by the sum of all scores, which does not change their order.

    Args:
        batches: (inputs, targets) pairs, whose gradients are added up.
        loss_function: function of the model's output and the targets.
        sparse: the argument of `add_module`.
        training: the mode of the model; False, as in the authors' code (namhoonlee/snip-public).
    """
    with _copy(model, training, sparse=sparse) as (model, weights):
        gradients = _gradients(model, weights, batches, loss_function)
    return {name: (w * g).abs().detach() for (name, w), g in zip(weights.items(), gradients, strict=True)}


def grasp(
    model: nn.Module,
    batches: Batches,
    loss_function: LossFunction = F.cross_entropy,
    temperature: float = 200.0,
    sparse: Iterable[str] = (),
    training: bool | None = True,
) -> dict[str, Tensor]:
    """Return w * (H g) for every maskable weight: how much of the gradient's norm its removal would take away.

    Wang, Zhang and Grosse 2020, Picking winning tickets before training by preserving gradient flow,
    https://arxiv.org/abs/2002.07376, section 4. The paper's score, -w * (H g), has the opposite sign, and the paper
    removes the highest. g is the gradient of the loss and H its second derivative over the maskable weights, both at
    outputs divided by `temperature`. The paper's code initialises linear layers again before scoring; this one does
    not.

    Args:
        batches: (inputs, targets) pairs, whose gradients are added up.
        loss_function: function of outputs (logits or log-probabilities) and targets.
        sparse: the argument of `add_module`.
        training: the mode of the model; True, as in the authors' code (alecwangcq/GraSP). Dropout then switches off
            other units for g than for H g.
    """

    def softened(output: Tensor, targets: Tensor) -> Tensor:
        return loss_function(output / temperature, targets)

    with _copy(model, training, sparse=sparse) as (model, weights):
        g = _gradients(model, weights, batches, softened)
        product = [torch.zeros_like(w) for w in weights.values()]
        for batch in batches:
            # The derivative of g^T dL/dw, g held fixed, is H g.
            dL = _gradients(model, weights, [batch], softened, differentiable=True)
            flow = torch.stack([(a * b).sum() for a, b in zip(g, dL, strict=True)]).sum()
            Hg = torch.autograd.grad(flow, list(weights.values()), allow_unused=True, materialize_grads=True)
            product = [a + b for a, b in zip(product, Hg, strict=True)]
    return {name: (w * h).detach() for (name, w), h in zip(weights.items(), product, strict=True)}


def synflow(
    model: nn.Module,
    inputs: Tensor,
    density: Density,
    dense: Sequence[str] = (),
    rounds: int = 100,
    sparse: Iterable[str] = (),
    training: bool | None = False,
) -> dict[str, Tensor]:
    """Return |w * dR/dw|, where R is the sum of the outputs of the network with absolute weights for an input of ones.

    Tanaka, Kunin, Yamins and Ganguli 2020, Pruning neural networks without any data by iteratively conserving synaptic
    flow, https://arxiv.org/abs/2006.05467, algorithm 1. Round t of T leaves density^(t/T) of the weights. The scores
    are those of round T, and -1 for weights pruned in earlier rounds, so that the highest scores are the paper's
    choice. Computed in float64 (float32 on MPS, which has no float64), because products over many layers are large. As
    in the paper's code (ganguli-lab/Synaptic-Flow), batch normalisation uses its running statistics, absolute like all
    tensors of the model, and softmax modules are left out.

    Args:
        inputs: an example; only its shape without the first dimension, its device and its dtype matter.
        density, dense, sparse: the arguments of `add_module`.
        training: the mode of the model; False, as in the authors' code without --prune-train-mode.
    """
    with _copy(model, training, dense, sparse) as (model, weights):
        return _synflow(model, weights, inputs, density, rounds)


def _synflow(model, weights, inputs, density, rounds):
    """Return the scores of a copy of the model, which is changed."""
    model.to(torch.float32 if inputs.device.type == "mps" else torch.float64)
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.Softmax | nn.LogSoftmax):
                setattr(module, name, nn.Identity())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.abs_()
    ones = inputs.new_ones((1, *inputs.shape[1:]), dtype=next(iter(weights.values())).dtype)
    masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in weights.items()}
    groups = by_density(list(weights), density)
    scores = {}
    for done in range(1, rounds + 1):
        gradients = torch.autograd.grad(
            model(ones).sum(), list(weights.values()), allow_unused=True, materialize_grads=True
        )
        scores = {
            name: (w.detach() * g).abs().masked_fill(~masks[name], -1)
            for (name, w), g in zip(weights.items(), gradients, strict=True)
        }
        if done == rounds:
            break
        for _, part, names in groups:
            among = [masks[name] for name in names]
            active = sum(int(mask.sum()) for mask in among)
            left = round(part ** (done / rounds) * sum(mask.numel() for mask in among))
            masks |= zip(
                names, drop_lowest_jointly([scores[name] for name in names], among, active - left), strict=True
            )
        with torch.no_grad():
            for name, w in weights.items():
                w.mul_(masks[name])
    return scores


def load_masks(path: str | Path) -> dict[str, Tensor]:
    """Return the masks in a checkpoint, or in a file that holds a dict from names to bool tensors.

    Raises:
        FileNotFoundError: if there is no such file.
        CheckpointError: if it is damaged or holds no masks.
    """
    state = checkpoint.read(path)
    masks = state.get("model", {})
    if "mask" in state:
        masks = {name: expanded(layer["mask"]) for name, layer in state["mask"]["layers"].items()}
    if not masks or not all(isinstance(mask, Tensor) and mask.dtype == torch.bool for mask in masks.values()):
        raise checkpoint.CheckpointError(
            f"{path} holds no masks. Expected a checkpoint of a sparse run, or a dict from names to bool tensors that "
            "torch.save wrote."
        )
    return masks


@contextmanager
def _copy(
    model: nn.Module, training: bool | None, dense: Sequence[str] = (), sparse: Iterable[str] = ()
) -> Iterator[tuple[nn.Module, Mapping[str, Tensor]]]:
    """Give a copy of the model in a mode, and its maskable weights by name without the dense ones.

    What is drawn at random meanwhile, as by dropout, leaves the generators of the CPU and of CUDA as they were.

    Raises:
        ValueError: for weights that are sharded among processes.
    """
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "Scores before training need whole weights, got sharded ones. Save the masks of one process, and start "
            "from them: sparse_init=load_masks(path), or --sparse-init mask:PATH."
        )
    model = copy.deepcopy(model)
    if training is not None:
        model.train(training)
    weights = dict(maskable_parameters(model, sparse=sparse))
    kept_dense = named(list(weights), dense)
    devices = {weight.device for weight in model.parameters() if weight.device.type == "cuda"}
    with torch.random.fork_rng(devices):
        yield model, {name: weight for name, weight in weights.items() if name not in kept_dense}


def _gradients(model, weights, batches, loss_function, differentiable=False):
    """Return the gradient of each weight, added up over batches."""
    total = [torch.zeros_like(weight) for weight in weights.values()]
    for inputs, targets in batches:
        loss = loss_function(model(inputs), targets)
        gradients = torch.autograd.grad(
            loss, list(weights.values()), create_graph=differentiable, allow_unused=True, materialize_grads=True
        )
        total = [a + b for a, b in zip(total, gradients, strict=True)]
    return total
