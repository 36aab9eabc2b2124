"""Class specialisation: how much of a convolutional channel's activation belongs to a single class.

Dettmers and Zettlemoyer, "Sparse Networks from Scratch" (2019), https://arxiv.org/abs/1907.04840, compare it
between dense and sparse networks. `collect` measures, `specialisation` evaluates, `save` and `load` keep the
measurement.
"""

from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparselearning import checkpoint


@torch.no_grad()
def collect(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], classes: int) -> dict[str, Tensor]:
    """Return the absolute activation of every channel per class, summed over images and positions.

    One entry per `nn.ReLU` whose output has the shape [N, C, H, W], in the order of execution and named as in
    `model.named_modules()` ("relu", and "relu#2" for the second use of a shared one); each is a float32
    tensor [channels, classes]. The model runs in evaluation mode and gets its mode back.

    Args:
        batches: pairs of images [N, ...] and integer labels [N] in [0, classes).

    Raises:
        ValueError: if a label is out of range, or no such ReLU ran.
    """
    device = next((p.device for p in model.parameters()), None)
    counts: dict[str, Tensor] = {}
    uses: Counter[str] = Counter()
    labels = torch.empty(0, dtype=torch.long)

    def add(name: str, _module: nn.Module, _args: tuple, output: Tensor) -> None:
        if output.ndim != 4:
            return
        uses[name] += 1
        key = name if uses[name] == 1 else f"{name}#{uses[name]}"
        if key not in counts:
            counts[key] = output.new_zeros((output.shape[1], classes), dtype=torch.float32)
        counts[key].index_add_(1, labels, output.abs().sum((2, 3), dtype=torch.float32).T)

    relus = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    handles = [module.register_forward_hook(partial(add, name)) for name, module in relus]
    was_training = model.training
    model.eval()
    try:
        for images, labels in batches:
            labels = labels.to(device)
            _check_labels(labels, classes)
            uses.clear()
            model(images.to(device))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if not counts:
        raise ValueError(
            "No nn.ReLU with an output [N, C, H, W] ran, so there are no channels to look at. Class "
            "specialisation needs a convolutional model with nn.ReLU modules, and at least one batch."
        )
    return counts


def specialisation(counts: Tensor, ignored_share: float = 0.05) -> Tensor:
    """Return for each channel that matters the share of its most frequent class in its activation.

    The channels which together hold the lowest `ignored_share` of the layer's activation are left out; the
    others come in their order. Values lie between 1 / classes (no class preferred) and 1 (one class only). A
    layer without any activation gives an empty tensor.

    Args:
        counts: activations >= 0 [channels, classes], as from `collect`.

    >>> specialisation(torch.tensor([[90.0, 10.0], [50.0, 50.0], [4.0, 0.0]]))
    tensor([0.9000, 0.5000])
    """
    totals, order = counts.sum(1).sort(stable=True)
    held = totals.cumsum(0)
    kept = order[(held >= ignored_share * held[-1]) & (totals > 0)].sort().values
    return counts[kept].amax(1) / counts[kept].sum(1)


def save(counts: dict[str, Tensor], path: str | Path) -> None:
    """Write the result of `collect` as a compressed .npz: one array [channels, classes] per layer."""
    arrays: dict[str, Any] = {name: layer.cpu().numpy() for name, layer in counts.items()}
    checkpoint.write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def load(path: str | Path) -> dict[str, Tensor]:
    """Return what `save` wrote, on the CPU.

    Raises:
        ValueError: if the file is missing, cut off, or not such an archive.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            return {name: torch.from_numpy(archive[name]) for name in archive.files}
    except FileNotFoundError:
        hint = "Write one with main.py --resume CHECKPOINT --save-features."
        raise ValueError(f"No feature file {path}. {hint}") from None
    except Exception as error:  # numpy and zipfile raise half a dozen types for a damaged file
        hint = "Expected what main.py --save-features writes."
        raise ValueError(f"{path} is damaged, or not a feature file ({error}). {hint}") from None


def _check_labels(labels: Tensor, classes: int) -> None:
    low, high = torch.stack(labels.aminmax()).tolist()
    if low < 0 or high >= classes:
        hint = "Pass the right `classes`."
        raise ValueError(f"Expected labels from 0 to {classes - 1}, got {low} to {high}. {hint}")
