"""Train small networks by the library and by the oracle of a method side by side, and compare them bit for bit."""

import importlib
import random
from itertools import pairwise

import torch
from oracles.network import Course, Layer, Move, rounded_up
from torch import nn

from sparselearning import Masking
from sparselearning.methods import METHODS

LAYERS = [
    lambda draw: nn.Linear(draw.randint(2, 12), draw.randint(2, 12), bias=False),
    lambda draw: nn.Linear(draw.randint(2, 12), draw.randint(2, 12), bias=False),
    lambda draw: nn.Conv2d(draw.randint(1, 4), draw.randint(1, 5), draw.choice([1, 2, 3]), bias=False),
    lambda draw: nn.Linear(draw.randint(1, 3), draw.randint(1, 2), bias=False),  # a few weights
]


def oracle_of(method):
    """Return the module that says what the paper of a method says."""
    return importlib.import_module(f"oracles.{method}")


class Case:
    """A random network, its training, and what is particular in it: ties, full layers, dense and frozen ones."""

    def __init__(self, method, seed, freezes=True, ties=True, layers=LAYERS, uniform=False):
        draw = random.Random(f"{method} {seed}")
        torch.manual_seed(seed)
        self.module = nn.ModuleList([draw.choice(layers)(draw) for _ in range(draw.randint(2, 4))])
        self.ties = ties and draw.random() < 0.4
        self.dense = ["first"] if uniform or draw.random() < 0.3 else []
        self.frozen_at = draw.randint(1, 20) if freezes and draw.random() < 0.3 else None
        self.course = Course(
            steps=draw.choice([24, 30, 37]), every=draw.choice([2, 3, 5]), epoch=draw.choice([5, 6]), density=1.0
        )
        masked = list(self.module)[len(self.dense) :]
        size, layers = sum(part.weight.numel() for part in masked), len(masked)
        start = METHODS[method].start_density or 1.0
        enough = [d for d in (0.11, 0.23, 0.31, 0.43, 0.59, 0.87) if round(d * size) >= 2 * layers and d < start]
        self.course.density = draw.choice(enough or [min(start, 0.87)])
        self.weights = [part.weight for part in masked]
        if self.ties:
            with torch.no_grad():
                for weight in self.weights:
                    weight.mul_(8).round_().div_(8)
        self.parts = dict(sparse_init="uniform") if uniform else dict(dense=self.dense)
        if METHODS[method].prune_every_k_steps:
            self.parts["prune_every_k_steps"] = self.course.every

    def gradients(self):
        """Return random gradients, many of them equal in a case of ties."""
        drawn = [torch.randn_like(weight) for weight in self.weights]
        return [(2 * gradient).round() / 2 if self.ties else gradient for gradient in drawn]

    def trains(self, i, step):
        """Tell whether a layer trains in this step; the last one may be frozen from some step on."""
        return self.frozen_at is None or step < self.frozen_at or i != len(self.weights) - 1


class Twin:
    """The same weights, stepped by an optimizer of their own and masked by an oracle."""

    def __init__(self, case, masks):
        self.weights = [nn.Parameter(weight.detach().clone()) for weight in case.weights]
        self.optimizer = torch.optim.SGD(self.weights, lr=0.1, momentum=0.9)
        self.masks = [mask.clone() for mask in masks]
        self.memory = [{} for _ in self.weights]

    def momentum(self, i):
        buffer = self.optimizer.state[self.weights[i]].get("momentum_buffer")
        return torch.zeros_like(self.weights[i]) if buffer is None else buffer

    def layers(self):
        """Return the network as flat lists."""
        return [
            Layer(
                tuple(weight.shape),
                weight.flatten().tolist(),
                (torch.zeros_like(weight) if weight.grad is None else weight.grad).flatten().tolist(),
                self.momentum(i).flatten().tolist(),
                self.masks[i].flatten().tolist(),
                self.memory[i],
            )
            for i, weight in enumerate(self.weights)
        ]

    @torch.no_grad()
    def step(self, gradients, pull):
        for weight, gradient in zip(self.weights, gradients, strict=True):
            weight.grad = gradient
        if pull is not None:
            for weight, layer in zip(self.weights, self.layers(), strict=True):
                if weight.grad is not None:
                    weight.grad = weight.grad + torch.tensor(pull(layer)).reshape(weight.shape)
        self.optimizer.step()
        self.apply()

    @torch.no_grad()
    def apply(self):
        for weight, mask in zip(self.weights, self.masks, strict=True):
            weight.masked_fill_(~mask, 0)

    @torch.no_grad()
    def move(self, moves, chosen, where):
        """Take what an oracle says; where it leaves the choice to chance, what the library has `chosen`, if it may."""
        for i, (move, choice) in enumerate(zip(moves, chosen, strict=True)):
            if move is None:
                continue
            before, shape = self.masks[i], self.masks[i].shape
            if not move.kept:  # a pattern says how many weights each neuron has, at the most
                numbers = choice.flatten(1).sum(1).tolist()
                assert len({*numbers} - {0}) == 1, f"{where}: layer {i} has neurons of {numbers} weights"
                assert move.grown in (None, numbers), f"{where}: layer {i} has {numbers}, not {move.grown}"
                self.masks[i] = choice.clone()
                self.momentum(i).masked_fill_(self.masks[i] & ~before, 0)
                continue
            kept = torch.tensor(move.kept).reshape(shape)
            if isinstance(move.grown, int):
                assert (choice & kept == kept).all(), f"{where}: layer {i} pruned what the paper keeps"
                grown = choice & ~kept
                assert int(grown.sum()) == move.grown, f"{where}: layer {i} grew {int(grown.sum())}, not {move.grown}"
                if move.score is not None and grown.any() and not choice.all():
                    score = torch.tensor(move.score).reshape(shape)
                    assert score[grown].min() > score[~choice].max() - 1e-5, f"{where}: layer {i} grew a lower score"
            else:
                grown = torch.tensor(move.grown).reshape(shape)
            self.masks[i] = kept | grown
            if move.forget:
                self.momentum(i).masked_fill_(self.masks[i] & ~before, 0)
        self.apply()


def train_kept(method, seed, oracle):
    """Train a random network whose inactive weights keep their values, by a method and by its oracle.

    The twin is set to the library's weights after each step, so that rounding errors do not add up.
    """
    case = Case(method, seed, freezes=False)
    course, total = case.course, case.course.steps
    decay, momentum = random.Random(seed).choice([(0.0, 0.9), (0.02, 0.0)])
    settings = dict(lr=0.1, momentum=momentum)
    theta = [weight.detach().clone() for weight in case.weights]
    optimizer = torch.optim.SGD(case.module.parameters(), weight_decay=decay, **settings)
    masking = Masking.from_method(method, case.module, optimizer, total, course.density, **case.parts)
    model = oracle.Network(theta, list(masking.name2nonzeros.values()))
    assert model.counts() == oracle.start(model.layers(), course)
    twin = torch.optim.SGD(model.theta, **settings)
    for step in range(total + 1):
        where = f"{method}, seed {seed}, step {step}"
        if step:
            for weight, mine, gradient in zip(case.weights, model.theta, case.gradients(), strict=True):
                weight.grad, mine.grad = gradient.clone(), gradient
            optimizer.step()
            model.train(twin, decay)
        for mine, layer in zip(model.theta, masking.layers, strict=True):
            torch.testing.assert_close(layer.memory["dense"], mine, msg=f"{where}: {layer.name}")
            mine.copy_(layer.memory["dense"])
        if oracle.moves(step, course):
            model.move(step, course)
        for layer, mask, seen in zip(masking.layers, model.masks, model.seen(), strict=True):
            assert torch.equal(layer.mask, mask), f"{where}: mask of {layer.name}"
            torch.testing.assert_close(layer.weight.detach(), seen, msg=f"{where}: {layer.name}")


def score(method, seed, oracle):
    """Choose the first weights of a random network by its oracle's scores; they need not be the same to the bit."""
    draw = random.Random(f"{method} {seed}")
    torch.manual_seed(seed)
    widths = [draw.randint(2, 9) for _ in range(draw.choice([3, 4]))]
    layers = [part for pair in pairwise(widths) for part in (nn.Linear(*pair), nn.ReLU())][:-1]
    model = nn.Sequential(*layers).double()
    size = sum(a * b for a, b in pairwise(widths))
    density = draw.choice([d for d in (0.13, 0.23, 0.31, 0.59) if round(d * size) > 2 * len(widths)] or [0.59])
    batches = [(torch.randn(5, widths[0]).double(), torch.arange(5) % widths[-1]) for _ in range(2)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = oracle.masks(model, batches, density)
    masking = Masking.from_method(method, model, optimizer, 10, density, batches=batches)
    assert masking.total_nonzero == round(density * size)
    assert list(masking.masks) == list(expected)
    for name, mask in masking.masks.items():
        assert torch.equal(mask, expected[name]), f"{method}, seed {seed}: {name}"
    first = {name: mask.clone() for name, mask in masking.masks.items()}
    for step in range(1, 11):
        model(batches[0][0]).sum().backward()
        optimizer.step()
        assert not oracle.moves(step, None)
        masking.at_end_of_epoch()
    assert all(torch.equal(mask, first[name]) for name, mask in masking.masks.items())


def know_signs(twin, masking):
    """Tell the oracle the signs that were drawn by chance, once: those of weights are their own."""
    for weight, memory, layer in zip(twin.weights, twin.memory, masking.layers, strict=True):
        if "sign" not in memory and "sign" in layer.memory:
            drawn = layer.memory["sign"].flatten().tolist()
            assert set(drawn) <= {-1, 1}
            own = weight.sign().flatten().tolist()
            memory["sign"] = [int(sign) or other for sign, other in zip(own, drawn, strict=True)]


def train_both(method, seed, oracle, **of_case):
    """Train a random network by a method and by its oracle, and assert after every step that they are equal."""
    case = Case(method, seed, **of_case)
    course, total = case.course, case.course.steps
    optimizer = torch.optim.SGD(case.module.parameters(), lr=0.1, momentum=0.9)
    masking = Masking.from_method(method, case.module, optimizer, total, course.density, **case.parts)
    twin = Twin(case, list(masking.masks.values()))
    assert list(masking.name2nonzeros.values()) == oracle.start(twin.layers(), course), "active weights at the start"
    for step in range(1, total + 1):
        where = f"{method}, seed {seed}, step {step}"
        gradients = case.gradients()
        for i, weight in enumerate(case.weights):
            if not case.trains(i, step):
                gradients[i] = None
                weight.requires_grad_(False)
            weight.grad = None if gradients[i] is None else gradients[i].clone()
        optimizer.step()
        if step % course.epoch == 0 and step < total:
            masking.at_end_of_epoch()
        twin.step(gradients, getattr(oracle, "pull", None))
        if oracle.moves(step, course):
            training = [i for i in range(len(case.weights)) if case.trains(i, step)]
            if method == "deep_rewiring":
                know_signs(twin, masking)
            layers = twin.layers()
            found = dict(zip(training, oracle.update([layers[i] for i in training], step, course), strict=True))
            chosen = list(masking.masks.values())
            twin.move([found.get(i) for i in range(len(layers))], chosen, where)
        for i, (mask, weight) in enumerate(zip(masking.masks.values(), case.weights, strict=True)):
            assert torch.equal(mask, twin.masks[i]), f"{where}: masks of layer {i}"
            assert torch.equal(weight, twin.weights[i]), f"{where}: weights of layer {i}"
            buffer = optimizer.state[weight].get("momentum_buffer", torch.zeros_like(weight))
            assert torch.equal(buffer, twin.momentum(i)), f"{where}: momenta of layer {i}"


def train_adam(method, seed, oracle):
    """Train a random network by a method that counts steps of single weights, and by its oracle, with Adam or AdamW.

    The oracle's weights are set to the library's after each step, so that rounding errors do not add up.
    """
    case, draw = Case(method, seed), random.Random(seed)
    course, warm_up = case.course, draw.choice([0, 1, 4, 9])
    decoupled, amsgrad, maximize = (draw.random() < 0.5 for _ in range(3))
    settings = dict(lr=0.01, betas=draw.choice([(0.9, 0.999), (0.8, 0.95), (0.0, 0.9)]), eps=draw.choice([1e-8, 1e-3]))
    settings |= dict(weight_decay=draw.choice([0.0, 0.1]), amsgrad=amsgrad, maximize=maximize)
    kind, way = torch.optim.AdamW if decoupled else torch.optim.Adam, draw.choice(["foreach", "fused", "plain"])
    optimizer = kind(case.module.parameters(), foreach=way == "foreach", fused=way == "fused", **settings)
    parts = dict(regrown_warm_up=warm_up, **case.parts)
    masking = Masking.from_method(method, case.module, optimizer, course.steps, course.density, **parts)
    masks = list(masking.masks.values())
    twin = [
        list(map(oracle.Weight, flat(weight), flat(mask))) for weight, mask in zip(case.weights, masks, strict=True)
    ]
    for step in range(1, course.steps + 1):
        where = f"{method}, seed {seed}, step {step}"
        trained = [i for i in range(len(twin)) if case.trains(i, step)]
        before = [[weight.active for weight in layer] for layer in twin]
        for i, (weight, gradient) in enumerate(zip(case.weights, case.gradients(), strict=True)):
            weight.requires_grad_(i in trained)
            weight.grad = gradient if i in trained else None
            for each, g in zip(twin[i], flat(gradient), strict=True) if i in trained else ():
                each.step(g, sum(before[i]) / len(twin[i]), warm_up, decoupled=decoupled, **settings)
        optimizer.step()
        if oracle.moves(step, course):
            layers = [
                Layer(tuple(case.weights[i].shape), [w.value for w in twin[i]], [], [], before[i]) for i in trained
            ]
            for i, layer, move in zip(trained, layers, oracle.update(layers, step, course), strict=True):
                chosen = flat(list(masking.masks.values())[i])
                sizes = list(map(abs, layer.weight))
                # All weights that came together have made equal steps, but for rounding errors.
                limit = max(
                    (x for x, was, kept in zip(sizes, layer.mask, move.kept, strict=True) if was > kept), default=0
                )
                left = [x for x, was, active in zip(sizes, layer.mask, chosen, strict=True) if was > active]
                assert max(left, default=0) <= limit + 1e-6, f"{where}: layer {i} pruned what the paper keeps"
                assert sum(chosen) == sum(move.kept) + move.grown, f"{where}: layer {i}"
                for each, active in zip(twin[i], chosen, strict=True):
                    each.become(active)
        for i, (weight, layer) in enumerate(zip(case.weights, masking.layers, strict=True)):
            assert flat(layer.mask) == [each.active for each in twin[i]], f"{where}: masks of layer {i}"
            expected = torch.tensor([each.value for each in twin[i]]).reshape(weight.shape)
            torch.testing.assert_close(weight.detach(), expected, rtol=2e-6, atol=2e-7, msg=f"{where}: layer {i}")
            for each, value in zip(twin[i], flat(weight), strict=True):
                each.value = value


def flat(tensor):
    """Return the numbers of a tensor."""
    return tensor.detach().flatten().tolist()


def train_soft(method, seed, oracle):
    """Train a random network by a method that draws what leaves and what comes: numbers, candidates and weights."""
    case = Case(method, seed, freezes=False)
    course = case.course
    optimizer = torch.optim.SGD(case.module.parameters(), lr=0.1, momentum=0.9)
    masking = Masking.from_method(method, case.module, optimizer, course.steps, course.density, **case.parts)
    twin, pruned = Twin(case, list(masking.masks.values())), {}
    assert list(masking.name2nonzeros.values()) == oracle.start(twin.layers(), course), "active weights at the start"
    prune = masking.prune
    masking.prune = lambda *given: pruned.setdefault(given[3], prune(*given)).clone()
    masking.prune.entrywise = masking.prune.single_weights = True
    for step in range(1, course.steps + 1):
        where, gradients = f"{method}, seed {seed}, step {step}", case.gradients()
        for weight, gradient in zip(case.weights, gradients, strict=True):
            weight.grad = gradient.clone()
        pruned.clear()
        optimizer.step()
        twin.step(gradients, None)
        if oracle.moves(step, course):
            moves = []
            for layer, (name, mask) in zip(twin.layers(), masking.masks.items(), strict=True):
                kept, k = flat(pruned[name]), rounded_up(oracle.rate(step, course) * layer.active)
                assert sum(kept) == layer.active - k, f"{where}: {name}"
                assert all(was or not stays for was, stays in zip(layer.mask, kept, strict=True)), f"{where}: {name}"
                grown = [active and not stays for active, stays in zip(flat(mask), kept, strict=True)]
                assert sum(grown) == k, f"{where}: {name}"
                if len(layer.shape) == 2:
                    found = [value for row in oracle.scores(kept, *layer.shape) for value in row]
                    enough = min(k, sum(value > 0 for value in found))  # links that have a path come before others
                    assert sum(value > 0 for value, new in zip(found, grown, strict=True) if new) == enough, where
                moves.append(Move(kept, grown, forget=True))
            twin.move(moves, list(masking.masks.values()), where)
        for i, (mask, weight) in enumerate(zip(masking.masks.values(), case.weights, strict=True)):
            assert torch.equal(mask, twin.masks[i]), f"{where}: masks of layer {i}"
            assert torch.equal(weight, twin.weights[i]), f"{where}: weights of layer {i}"
            buffer = optimizer.state[weight].get("momentum_buffer", torch.zeros_like(weight))
            assert torch.equal(buffer, twin.momentum(i)), f"{where}: momenta of layer {i}"
