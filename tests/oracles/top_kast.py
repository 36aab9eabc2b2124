"""Top-KAST: Jayakumar et al. 2020, https://arxiv.org/abs/2106.03517, sections 2.1 to 2.3.

All weights theta are kept. In each layer A are its D largest magnitudes, and B the D + M largest: the network sees
theta on A (alpha), and theta is trained on B. The loss has the exploration term, one for the optimizer's weight decay:

    reg(theta_i) = decay / 2 * theta_i^2 on A, decay / 2 * theta_i^2 / D on B outside A, 0 elsewhere

The paper names a density for A and one for B; the library takes |B| = 2 |A|. It divides D among layers by ERK and,
where the paper chooses A and B before every step, chooses them every 100 steps.
"""

from oracles import rigl
from oracles.network import highest_of_network
from oracles.top_kast_start import largest

start = rigl.start


def moves(step, course):
    return step % course.every == 0


def sets(theta, active):
    """Return A and B of a layer as masks, for so many active weights."""
    size = len(theta)
    (a,) = highest_of_network([[abs(value) for value in theta]], active)
    (b,) = highest_of_network([[abs(value) for value in theta]], min(2 * active, size))
    return a, b


def update(theta, active):
    return sets(theta, active)


def decay_of(in_a, in_b, density, decay):
    """Return the weight decay of an entry, the factor of theta in the gradient of the exploration term."""
    if in_a:
        return decay
    return decay / density if in_b else 0.0


__all__ = ["decay_of", "largest", "moves", "sets", "start", "update"]
