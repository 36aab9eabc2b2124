"""What the oracles of all methods share: layers as flat lists, the length of a training, and the library's own laws.

An oracle is a module named as its method. It says what the paper says, in loops over Python numbers:

    start(layers, course) -> the number of active weights of each layer (or the masks themselves)
    moves(step, course) -> whether an update of the masks follows this step
    update(layers, step, course) -> what it does to each layer: a `Move`

The laws that no paper has, and which the library adds to all of them, are here: counts are exact, and no layer stays
empty (docs/methods.md).
"""

import math
from dataclasses import dataclass, field

from oracles.reference import apportion, drop_lowest, round_to


@dataclass
class Layer:
    """A weight as flat lists: its values, the gradient of the last step, the momentum and which entries are active."""

    shape: tuple
    weight: list
    gradient: list
    momentum: list
    mask: list
    memory: dict = field(default_factory=dict)

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def active(self):
        return sum(self.mask)


@dataclass
class Course:
    """A training of `steps` optimizer steps: updates every `every` of them, epochs of `epoch`, this density at last."""

    steps: int
    every: int
    epoch: int
    density: float
    memory: dict = field(default_factory=dict)  # what an oracle keeps from update to update


@dataclass
class Move:
    """What an update does to a layer.

    kept: the mask that pruning leaves. grown: the mask of what becomes active, or how many do at random. score: those
    come whose score is highest, and chance is left to choose among equals. forget: the momentum of what was inactive
    before is zero afterwards. A weight that was inactive before is zero afterwards.
    """

    kept: list
    grown: list | int | None
    score: list | None = None
    forget: bool = False


def at_end_of_epochs(step, course):
    """One update at the end of every epoch but the last, where what grows would never be trained."""
    return step % course.epoch == 0 and step < course.steps


def every_steps(step, course, until):
    """One update every `course.every` steps, before the fraction `until` of the training."""
    return step % course.every == 0 and step < round(until * course.steps)


def rounded_up(number):
    """Return a number rounded up; 7.000000000000001, which is 0.07 * 100, is 7."""
    return math.ceil(round(number, 9))


def exactly(layers, course):
    """Return how many weights of a network are active at its density: round(density * size)."""
    return round(course.density * sum(layer.size for layer in layers))


def largest_remainders(total, real_counts, sizes):
    """Round real numbers that sum to `total`; a layer that has none takes a weight from the one that has most."""
    counts = round_to(total, real_counts, sizes)
    for i, count in enumerate(counts):
        if count == 0:
            counts[counts.index(max(counts))] -= 1
            counts[i] = 1
    return counts


def drop_lowest_of_network(scores, masks, k):
    """Drop the k active entries of the network whose scores are lowest; of equals the earlier, layer after layer."""
    places = [(i, j) for i, mask in enumerate(masks) for j, active in enumerate(mask) if active]
    dropped = set(sorted(places, key=lambda place: (scores[place[0]][place[1]], place))[:k])
    return [[active and (i, j) not in dropped for j, active in enumerate(mask)] for i, mask in enumerate(masks)]


def highest_of_network(scores, k):
    """Return the masks of the k entries of the network whose scores are highest; of equals the earlier."""
    places = [(i, j) for i, score in enumerate(scores) for j in range(len(score))]
    chosen = set(sorted(places, key=lambda place: (-scores[place[0]][place[1]], place))[:k])
    return [[(i, j) in chosen for j in range(len(score))] for i, score in enumerate(scores)]


def none_empty(masks, before, magnitudes):
    """Give each layer that was emptied its largest weight back; the smallest of the others leaves instead.

    `before` is what the masks were before the update. Each layer keeps its own largest.
    """
    masks, added = [list(mask) for mask in masks], 0
    for i, mask in enumerate(masks):
        if not any(mask) and any(before[i]):
            mask[_largest(magnitudes[i], before[i])] = True
            added += 1
    last = [_largest(score, mask) if any(mask) else None for score, mask in zip(magnitudes, masks, strict=True)]
    others = [[active and j != last[i] for j, active in enumerate(mask)] for i, mask in enumerate(masks)]
    left = drop_lowest_of_network(magnitudes, others, added)
    return [[active or j == last[i] for j, active in enumerate(mask)] for i, mask in enumerate(left)]


def _largest(score, mask):
    """Return the place of the largest active score; of equals the last, for the earlier are dropped first."""
    return next(j for j, active in enumerate(drop_lowest(score, mask, sum(mask) - 1)) if active)


def magnitudes(layer):
    return [abs(value) for value in layer.weight]


def fall(layers, total):
    """Return how many weights each layer loses (gains, if negative) until `total` are active.

    In proportion to its active ones, by largest remainders; a layer that would lose its last weight keeps it, and the
    largest loses one more.
    """
    active = [layer.active for layer in layers]
    if total > sum(active):
        rise = apportion(total - sum(active), active, [layer.size - layer.active for layer in layers])
        return [-more for more in rise]
    left = [had - lost for had, lost in zip(active, apportion(sum(active) - total, active, active), strict=True)]
    for i, count in enumerate(left):
        if count == 0 and active[i]:
            left[left.index(max(left))] -= 1
            left[i] = 1
    return [had - count for had, count in zip(active, left, strict=True)]
