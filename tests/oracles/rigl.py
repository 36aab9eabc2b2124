"""RigL: Evci et al. 2020, https://arxiv.org/abs/1911.11134, algorithm 1; read beside google-research/rigl.

Every dt steps before T_end = 75% of the training, layer by layer: k = f(t) * active weights of smallest |weight| leave,
f(t) = 0.3 / 2 * (1 + cos(pi t / T_end)), and the k of largest |gradient| come, of all that are inactive then. What was
inactive before starts at zero, without momentum (`reset_momentum` of their code); what left and came back goes on.

Their code takes int(f * active), adds noise of 1e-5 to |weight|, and makes an update instead of a step of the
optimizer; docs/methods.md says what the library does.
"""

from oracles import distributions, schedules
from oracles.network import Move, every_steps, exactly, largest_remainders, magnitudes, rounded_up
from oracles.reference import add_highest, drop_lowest

END = 0.75


def start(layers, course):
    total, sizes = exactly(layers, course), [layer.size for layer in layers]
    density = distributions.Fraction(total, sum(sizes))
    real = distributions.erdos_renyi_kernel([layer.shape for layer in layers], density)
    return largest_remainders(total, real, sizes)


def moves(step, course):
    return every_steps(step, course, until=END)


def rate(step, course):
    return schedules.cosine(0.3, step, round(END * course.steps))


def update(layers, step, course):
    found = []
    for layer in layers:
        k = rounded_up(rate(step, course) * layer.active)
        kept = drop_lowest(magnitudes(layer), layer.mask, k)
        found.append(Move(kept, add_highest([abs(g) for g in layer.gradient], kept, k), forget=True))
    return found
