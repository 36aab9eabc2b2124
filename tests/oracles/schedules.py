"""Prune rates and densities over the steps of a training, as papers write them."""

import math


def cosine(rate, step, end, lowest=0.0):
    """Evci et al. 2020, equation 1: rate / 2 * (1 + cos(pi t / T_end)); release 1.0 ends at 0.005 and not at 0."""
    return lowest + (rate - lowest) / 2 * (1 + math.cos(math.pi * min(step, end) / end))


def cubic(first, last, step, end):
    """Zhu & Gupta 2017, equation 1: s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (n dt))^3, for densities from step 0."""
    sparsity_first, sparsity_last = 1 - first, 1 - last
    left = max(1 - step / end, 0)
    if not left:
        return last
    return 1 - (sparsity_last + (sparsity_first - sparsity_last) * left**3)
