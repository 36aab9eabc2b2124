"""Growth: which inactive weights come."""

import torch
from torch import Tensor

from sparselearning.functions import FunctionError, network_wide, reads, single_weights
from sparselearning.processes.distributed import send_to_all
from sparselearning.processes.sharded import count_active, fetch, is_sharded, placed_like, uniform_like, unsharded
from sparselearning.selection import add_highest, add_highest_jointly, apportion
from sparselearning.sparse.guided import draw_connections
from sparselearning.weights.dense_copy import dense_weight


@reads("momentum")
def momentum_growth(masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor) -> Tensor:
    """Add the weights whose momentum |M| is largest.

    Dettmers & Zettlemoyer 2019, Sparse Networks from Scratch: Faster Training without Losing Performance,
    https://arxiv.org/abs/1907.04840, section 3.3 and algorithm 1. The momentum is the optimizer's, of the Adam family
    m / sqrt(v).
    """
    return add_highest(masking.get_momentum_for_weight(weight).abs(), new_mask, total_regrowth)


@reads("gradient")
def gradient_growth(masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor) -> Tensor:
    """Add the weights whose gradient in the last step is largest.

    Evci et al. 2020, Rigging the Lottery: Making All Tickets Winners, https://arxiv.org/abs/1911.11134 (RigL),
    section 3(4): ArgTopK of |dL/dW| outside what pruning left, so that a weight may come back at once. Inactive weights
    have gradients, too, for masks act on weights after the step. In the paper an update takes the place of a step;
    here it comes after one, and reads its gradient.
    """
    return add_highest(masking.get_gradient_for_weight(weight).abs(), new_mask, total_regrowth)


@reads("gradient")
def guided_growth(masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor) -> Tensor:
    """Add those weights whose gradient is largest among candidates drawn at random, where it can be large.

    Heddes et al. 2024, Always-Sparse Training by Growing Connections with Guided Stochastic Exploration,
    https://arxiv.org/abs/2401.06898 (GSE), with as many candidates as active weights (gamma = 1), drawn with
    replacement; active ones and duplicates are discarded. The paper draws an output in proportion to |dy| and an input
    in proportion to |x|, whose product bounds the gradient (GraBo). Here x and dy are not known: the sums of the
    |gradient| of the output's and of the input's weights stand for them. If there are too few candidates, the others
    grow at random.
    """
    score = masking.get_gradient_for_weight(weight).abs()
    matrix = masking.orientations[name].matrix(unsharded(score))
    number = int(fetch([count_active(new_mask)])[0]) + total_regrowth
    inputs, outputs = (matrix.sum(dim, dtype=torch.promote_types(matrix.dtype, torch.float32)) for dim in (0, 1))
    drawn = draw_connections(inputs, outputs, number)
    if is_sharded(new_mask):  # whole masks are those of the first process after the update
        send_to_all(drawn)
    candidate = torch.zeros_like(matrix, dtype=torch.bool, memory_format=torch.contiguous_format)
    candidate.view(-1)[drawn] = True
    candidate = masking.orientations[name].tensor(candidate, new_mask.shape)
    # Below every candidate, and nothing in the sum of a pattern's unit that has one.
    others = uniform_like(new_mask) * -1e-30
    return add_highest(torch.where(placed_like(new_mask, candidate), score, others), new_mask, total_regrowth)


@reads("nothing")
def random_growth(masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor) -> Tensor:
    """Add inactive weights at random, each with the same chance.

    Mocanu et al. 2018 (SET), https://arxiv.org/abs/1707.04780, algorithm 1. Also those that have just left, which the
    paper leaves open.
    """
    return add_highest(uniform_like(new_mask), new_mask, total_regrowth)


@single_weights
@reads("momentum")
def momentum_neuron_growth(masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor) -> Tensor:
    """Give each neuron a number of new weights in proportion to its mean |momentum|, largest first.

    A variant of Dettmers & Zettlemoyer 2019, https://arxiv.org/abs/1907.04840, section 3.3, of release 1.0. A neuron
    (output channel) has a row of its own in the weight's matrix (orientation.py). A full neuron's surplus goes to the
    others, so that exactly `total_regrowth` weights grow.
    """
    if is_sharded(new_mask):
        raise FunctionError(
            "growth_mode='momentum_neuron' expects whole neurons, and sharded weights may hold parts of them. "
            "Use growth_mode='momentum', or DistributedDataParallel."
        )
    orientation = masking.orientations[name]
    score = orientation.matrix(masking.get_momentum_for_weight(weight)).abs().float().nan_to_num(0)
    mask = orientation.matrix(new_mask)
    room = (~mask).sum(dim=1)
    importance, room = torch.stack([score.mean(dim=1), room.float()]).tolist()
    total = min(total_regrowth, int(sum(room)))
    counts = apportion(total, importance, [int(r) for r in room])
    # Each row has its own count: rank the inactive entries of every row, keep the first counts[row].
    order = score.masked_fill(mask, -1).argsort(dim=1, descending=True, stable=True)
    rank = torch.arange(mask.shape[1], device=mask.device).expand_as(order)
    chosen = rank < torch.tensor(counts, device=mask.device).unsqueeze(1)
    grown = torch.zeros_like(mask, memory_format=torch.contiguous_format).scatter(1, order, chosen)
    return new_mask | orientation.tensor(grown, new_mask.shape)


@reads("nothing")
def rewiring_growth(masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor) -> Tensor:
    """Add inactive weights at random; prune_mode="sign_flip" knows the sign that each has to have.

    Bellec et al. 2018, Deep Rewiring, https://arxiv.org/abs/1711.05136, algorithm 1. The number of connections of a
    layer stays, as in the authors' code (guillaumeBellec/deep_rewiring).
    """
    return random_growth(masking, name, new_mask, total_regrowth, weight)


@reads("inactive")
def dense_magnitude_growth(masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor) -> Tensor:
    """Add the weights whose value is largest, which they keep while they are inactive.

    Jayakumar et al. 2020 (Top-KAST), https://arxiv.org/abs/2106.03517, section 2.1; see `dense_magnitude_prune`.
    """
    return add_highest(dense_weight(masking, name).abs(), new_mask, total_regrowth)


@network_wide
@reads("inactive")
def global_dense_magnitude_growth(masking, total_regrowth: int) -> dict[str, Tensor]:
    """Add the weights of the network whose value is largest, which they keep while they are inactive.

    Vanderschueren & De Vleeschouwer 2023 (ST-3), https://arxiv.org/abs/2212.01076; see `global_dense_magnitude_prune`.
    """
    scores = [dense_weight(masking, name).abs() for name in masking.masks]
    masks = add_highest_jointly(scores, list(masking.masks.values()), total_regrowth)
    return dict(zip(masking.masks, masks, strict=True))


@reads("nothing")
def cannistraci_hebb_growth(masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor) -> Tensor:
    """Add the links of a linear layer that its paths of length three speak for most; random ones elsewhere.

    Zhang et al. 2024, Epitopological learning and Cannistraci-Hebb network shape intelligence brain-inspired theory
    for ultra-sparse advantage in deep learning, ICLR, https://openreview.net/forum?id=iayEcORsGd. The score needs no
    gradient, only the mask; see `path_scores`. Links without such a path come after all others, at random. Only this
    regrowth is the paper's: its correlated start and the removal of inactive neurons are left out.
    """
    if new_mask.dim() != 2:
        return random_growth(masking, name, new_mask, total_regrowth, weight)
    _refuse_parts(new_mask, "cannistraci_hebb")
    score = path_scores(new_mask)
    return add_highest(torch.where(score > 0, score, -uniform_like(new_mask)), new_mask, total_regrowth)


@reads("nothing")
def cannistraci_hebb_soft_growth(masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor) -> Tensor:
    """Draw the links of a linear layer in proportion to what its nodes speak for them; random ones elsewhere.

    Zhang et al. 2025, Brain network science modelling of sparse neural networks enables Transformers and LLMs to
    perform as fully connected, NeurIPS, https://arxiv.org/abs/2501.19107 (CHTs), section 3.1. The score is CH2-L3n,
    see `node_scores`. Links are drawn without replacement, which is the same as to take the highest score / E with a
    random E of the exponential distribution for each. Links of score zero come after all others, at random. Neurons
    that have links on one side alone keep them, as in `cannistraci_hebb_growth`; the paper removes these links.
    """
    if new_mask.dim() != 2:
        return random_growth(masking, name, new_mask, total_regrowth, weight)
    _refuse_parts(new_mask, "cannistraci_hebb_soft")
    score, drawn = node_scores(new_mask), uniform_like(new_mask)
    return add_highest(torch.where(score > 0, score / -drawn.log(), -drawn), new_mask, total_regrowth)


def _refuse_parts(mask, mode):
    if is_sharded(mask):
        raise FunctionError(
            f"growth_mode={mode!r} follows paths through whole layers, and sharded weights are parts of them. "
            "Use growth_mode='gradient', or DistributedDataParallel."
        )


def path_scores(mask: Tensor) -> Tensor:
    """Return the CH3-L3p score of every link of a layer that is absent from its mask (outputs, inputs), float32.

    For an output v and an input u it is the sum over all paths u - z1 - z2 - v (z1 an output, z2 an input) of
    1 / sqrt((1 + e(z1)) (1 + e(z2))), e(z) being the links of z that lead neither to u or v nor to a node of
    another such path. Of z1 these are all but the one to u and those to inputs of v: 1 + e(z1) = k(z1) - P[z1, v], with
    the degree k and P = M M^T, how many inputs two outputs share; of z2 likewise with M^T M. Takes active weights *
    outputs * inputs multiplications.
    """
    links = mask.float()
    outputs = (links.sum(dim=1, keepdim=True) - links @ links.T).clamp(min=1).rsqrt()  # [z1, v]
    inputs = (links.sum(dim=0).unsqueeze(1) - links.T @ links).clamp(min=1).rsqrt()  # [z2, u]
    scores = torch.zeros_like(links)
    neighbours = mask.nonzero()[:, 1].split(mask.sum(dim=1).tolist())
    for v, z2 in enumerate(neighbours):
        paths = (links[:, z2] * outputs[:, v : v + 1]).T @ links  # [z2, u], summed over z1
        scores[v] = (paths * inputs[z2]).sum(dim=0)
    return scores.masked_fill_(mask, 0)


def node_scores(mask: Tensor) -> Tensor:
    """Return the CH2-L3n score of every link of a layer that is absent from its mask (outputs, inputs), float32.

    For an output v and an input u it is the sum of (1 + i(z)) / (1 + e(z)) over all nodes z between them, outputs z1
    and inputs z2 of paths u - z1 - z2 - v: i(z) are the links of z to other such nodes, and e(z) those to nodes that
    are neither such nor u or v. For z1, i = P[v, z1] with P = M M^T, how many inputs two outputs share, and 1 + e =
    k(z1) - i with the degree k; for z2 likewise with M^T M. Takes 2 outputs inputs (outputs + inputs) multiplications,
    and memory for several tables of inputs^2, outputs^2 and outputs inputs numbers.
    """
    links = mask.float()
    return (_between(links) @ links + (_between(links.T) @ links.T).T).masked_fill_(mask, 0)


def _between(links):
    """Return [v, z]: (1 + i(z)) / (1 + e(z)) of a node z on the side of v, or 0 where the two share no neighbour."""
    shared = links @ links.T
    return torch.where(shared > 0, (1 + shared) / (links.sum(dim=1) - shared).clamp(min=1), 0)


@network_wide
@reads("momentum")
def global_momentum_growth(masking, total_regrowth: int) -> dict[str, Tensor]:
    """Add the weights whose momentum |M| is largest in the whole network, whatever their layer.

    As `momentum_growth`, where Dettmers & Zettlemoyer 2019 divide the weights among layers before.
    """
    scores = [masking.get_momentum_for_weight(layer.master).abs() for layer in masking.layers]
    masks = add_highest_jointly(scores, list(masking.masks.values()), total_regrowth)
    return dict(zip(masking.masks, masks, strict=True))


GROWTH_FUNCTIONS = {
    "momentum": momentum_growth,
    "gradient": gradient_growth,
    "random": random_growth,
    "guided": guided_growth,
    "momentum_neuron": momentum_neuron_growth,
    "global_momentum": global_momentum_growth,
    "global_momentum_growth": global_momentum_growth,
    "rewiring": rewiring_growth,
    "cannistraci_hebb": cannistraci_hebb_growth,
    "cannistraci_hebb_soft": cannistraci_hebb_soft_growth,
    "dense_magnitude": dense_magnitude_growth,
    "global_dense_magnitude": global_dense_magnitude_growth,
}
