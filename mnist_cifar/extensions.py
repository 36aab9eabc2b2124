"""Two worked examples of own functions; How_to_add_your_own_algorithms.md walks through them.

Both look at the variance of a weight's gradient, for which Adam's second moment stands.

    python main.py --model lenet5 --optimizer adam --lr 0.001 --prune magnitude_variance --redistribution variance
"""

from sparselearning.functions import reads
from sparselearning.prune import count_to_remove
from sparselearning.selection import drop_lowest


@reads("second_moment")
def variance_redistribution(masking, name, weight, mask):
    """Return the mean gradient variance over active weights: a layer that is pulled about lacks capacity."""
    return second_moment(masking, weight)[mask].mean()


@reads("second_moment")
def magnitude_variance_pruning(masking, mask, weight, name):
    """Drop the weights that are small and whose gradient varies: |w| / sqrt(variance) is lowest.

    A large weight matters, and a weight that is pulled the same way by every batch can be relied on.
    """
    reliability = 1 / (second_moment(masking, weight).sqrt() + 1e-8)
    return drop_lowest(weight.abs() * reliability, mask, count_to_remove(masking, name))


def second_moment(masking, weight):
    """Return the running mean of the squared gradient.

    Raises:
        RuntimeError: if the optimizer keeps none.
    """
    state = masking.optimizer.state[weight]
    if "exp_avg_sq" not in state:
        raise RuntimeError("Variance functions need Adam's second moment: use --optimizer adam --lr 0.001.")
    return state["exp_avg_sq"]


EXTENSIONS = {
    "prune_mode": {"magnitude_variance": magnitude_variance_pruning},
    "redistribution_mode": {"variance": variance_redistribution},
}
