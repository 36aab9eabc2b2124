"""Which weights are active first in layers that never were dense: positions drawn without a mask or a score."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparselearning.orientation import PLAIN, Orientation
from sparselearning.patterns import UNSTRUCTURED, Pattern
from sparselearning.start.masks import (
    MAGNITUDE,
    RECEPTIVE,
    Density,
    SparseInit,
    check_distribution,
    check_fit,
    counts_of,
    shares_of,
    total_of,
)
from sparselearning.start.names import by_density
from sparselearning.start.scores import SCORES


def draw_positions(size: int, k: int) -> Tensor:
    """Return k distinct numbers of range(size) in ascending order, int64 on the CPU; every subset is equally likely.

    They come from torch's default generator, and take memory in proportion to k.

    >>> draw_positions(4, 4)
    tensor([0, 1, 2, 3])

    Raises:
        ValueError: unless 0 <= k <= size.
    """
    if not 0 <= k <= size:
        raise ValueError(f"Expected between 0 and {size} positions, got {k}. Pass a density in [0, 1].")
    if 2 * k <= size:
        return _draw_few(size, k)
    active = torch.ones(size, dtype=torch.bool, device="cpu")
    active[_draw_few(size, size - k)] = False
    return active.nonzero().flatten()


def _draw_few(size, k):
    """Return at most size / 2 positions.

    Nothing depends on which numbers are found, only on how many: every subset is equally likely.
    """
    found = torch.empty(0, dtype=torch.int64, device="cpu")
    while len(found) < k:
        # To find k distinct numbers after j takes size * log((size - j) / (size - k)) draws on average.
        draws = size * math.log1p((k - len(found)) / (size - k))
        # Remainders of 63 bits: torch.randint takes those of 32 bits for sizes below 2^28, and prefers some by 1/16.
        numbers = torch.empty(math.ceil(draws + 2 * math.sqrt(draws)), dtype=torch.int64, device="cpu").random_()
        found = torch.unique(torch.cat([found, numbers.remainder_(size)]))
    if len(found) == k:
        return found
    kept = torch.ones(len(found), dtype=torch.bool, device="cpu")
    kept[torch.randperm(len(found), device="cpu")[k:]] = False
    return found[kept]


def initial_positions(
    shapes: Mapping[str, torch.Size],
    density: Density,
    sparse_init: SparseInit,
    orientations: Mapping[str, Orientation] | None = None,
    patterns: Mapping[str, Pattern] | None = None,
    norm_dims: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Return {name: positions of the active weights, ascending, in row-major order} of weights without values.

    Each layer has the number of weights that `masks.initial_masks` gives it, drawn at random by `draw_positions`. If
    `sparse_init` maps names to masks (bool), these say which weights are active, and the density is not used.

    Raises:
        ValueError: for a `sparse_init` that needs values (magnitudes, scores, 'resume'), patterns other than
            unstructured and weights under weight_norm (`norm_dims`), and for densities, distributions and masks as
            `masks.initial_masks`.
    """
    _refuse(sparse_init, patterns or {}, norm_dims or {})
    if isinstance(sparse_init, Mapping):
        check_fit(
            {name: torch.empty(shape, dtype=torch.bool, device="meta") for name, shape in shapes.items()}, sparse_init
        )
        return {name: sparse_init[name].detach().cpu().flatten().nonzero().flatten() for name in shapes}
    check_distribution(sparse_init)
    counts = {}
    for _, part, names in by_density(list(shapes), density):
        group = [shapes[name] for name in names]
        shares = shares_of(sparse_init, group, [(orientations or {}).get(name, PLAIN) for name in names])
        plain = [UNSTRUCTURED for _ in names]
        counts |= zip(names, counts_of(total_of(part, group), shares, group, plain), strict=True)
    return {name: draw_positions(math.prod(shape), counts[name]) for name, shape in shapes.items()}


def _refuse(sparse_init, patterns: Mapping[str, Pattern], norm_dims: Mapping[str, int | None]) -> None:
    """Raise if something asks for the values of weights that have none, or for a structure of their mask."""
    needs: list[str] = []
    if isinstance(sparse_init, str) and (sparse_init in (*MAGNITUDE, *SCORES, "resume", "magnitude:uniform")):
        needs.append(f"sparse_init={sparse_init!r} reads the values of weights")
    if isinstance(sparse_init, str) and sparse_init in RECEPTIVE:
        needs.append(f"sparse_init={sparse_init!r} draws scores, which are as large as the dense weights")
    if isinstance(sparse_init, Mapping) and any(tensor.dtype != torch.bool for tensor in sparse_init.values()):
        needs.append("sparse_init gives scores, which are as large as the dense weights")
    structured = sorted(f"{name} ({pattern.name})" for name, pattern in patterns.items() if pattern != UNSTRUCTURED)
    if structured:
        needs.append(f"there are patterns for {', '.join(structured)}")
    normed: Sequence[str] = sorted(name for name, dim in norm_dims.items() if dim is not None)
    if normed:
        needs.append(f"weight_norm computes {', '.join(normed)}")
    if needs:
        raise ValueError(
            f"Weights on the meta device hold no values, and start unstructured: {'; '.join(needs)}. Choose "
            "sparse_init='erdos_renyi_kernel', 'constant', 'linear', a function or masks (bool) by name; or build the "
            "model on a real device."
        )
