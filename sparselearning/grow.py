"""Growth: which inactive weights come."""

import torch
from torch import Tensor

from sparselearning.functions import FunctionError, network_wide, single_weights
from sparselearning.selection import add_highest, add_highest_jointly, apportion
from sparselearning.sharded import is_sharded, uniform_like


def momentum_growth(masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor) -> Tensor:
    """Add the weights whose momentum is largest (Dettmers & Zettlemoyer 2019, section 3.3)."""
    return add_highest(masking.get_momentum_for_weight(weight).abs(), new_mask, total_regrowth)


def gradient_growth(masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor) -> Tensor:
    """Add the weights whose gradient in the last step is largest.

    Evci et al. 2020, Rigging the Lottery: Making All Tickets Winners, https://arxiv.org/abs/1911.11134 (RigL),
    section 3(4). Inactive weights have gradients, too, for masks act on weights after the step.
    """
    return add_highest(masking.get_gradient_for_weight(weight).abs(), new_mask, total_regrowth)


def random_growth(masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor) -> Tensor:
    """Add inactive weights at random, each with the same chance (Mocanu et al. 2018)."""
    return add_highest(uniform_like(new_mask), new_mask, total_regrowth)


@single_weights
def momentum_neuron_growth(masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor) -> Tensor:
    """Give each neuron a number of new weights in proportion to its mean |momentum|, largest first.

    A neuron (output channel) is a slice along the first dimension. A full neuron's surplus goes to the
    others, so that exactly `total_regrowth` weights grow.
    """
    if is_sharded(new_mask):
        raise FunctionError(
            "growth_mode='momentum_neuron' expects whole neurons, and sharded weights may hold parts of them. "
            "Use growth_mode='momentum', or DistributedDataParallel."
        )
    score = masking.get_momentum_for_weight(weight).abs().flatten(start_dim=1).float().nan_to_num(0)
    mask = new_mask.flatten(start_dim=1)
    room = (~mask).sum(dim=1)
    importance, room = torch.stack([score.mean(dim=1), room.float()]).tolist()
    total = min(total_regrowth, int(sum(room)))
    counts = apportion(total, importance, [int(r) for r in room])
    # Each row has its own count: rank the inactive entries of every row, keep the first counts[row].
    order = score.masked_fill(mask, -1).argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(mask.shape[1], device=mask.device).expand_as(order)
    chosen = rank < torch.tensor(counts, device=mask.device).unsqueeze(1)
    return new_mask | torch.zeros_like(mask).scatter(1, order, chosen).view_as(new_mask)


@network_wide
def global_momentum_growth(masking, total_regrowth: int) -> dict[str, Tensor]:
    """Add the weights whose momentum is largest in the whole network, whatever their layer."""
    scores = [masking.get_momentum_for_weight(layer.master).abs() for layer in masking.layers]
    masks = add_highest_jointly(scores, list(masking.masks.values()), total_regrowth)
    return dict(zip(masking.masks, masks, strict=True))


GROWTH_FUNCTIONS = {
    "momentum": momentum_growth,
    "gradient": gradient_growth,
    "random": random_growth,
    "momentum_neuron": momentum_neuron_growth,
    "global_momentum": global_momentum_growth,
    "global_momentum_growth": global_momentum_growth,
}
