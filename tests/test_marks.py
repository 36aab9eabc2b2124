"""The marks of functions say what they read; the checks before training, FLOPs and sparse kernels rely on them."""

import functools

import pytest
import torch
from helpers import masked, mlp, same, sgd, train

from sparselearning import Masking, network_wide, reads
from sparselearning.flops import dense_gradients
from sparselearning.functions import FunctionError, gives_back, in_proportion, is_marked, may_read, surely_reads
from sparselearning.grow import GROWTH_FUNCTIONS, gradient_growth, momentum_growth
from sparselearning.methods import FUNCTIONS
from sparselearning.selection import add_highest, drop_lowest
from sparselearning.sparse.observing import WINDOW

READ = ("momentum", "gradient", "second_moment", "inactive")
EVERY = [
    pytest.param(argument, name, id=f"{argument}={name}") for argument, table in FUNCTIONS.items() for name in table
]
WITHOUT_MOMENTUM = {"growth_mode": "random", "redistribution_mode": "none"}


def own_prune(masking, mask, weight, name):
    return drop_lowest(weight.abs(), mask, 3)


def own_measure(masking, name, weight, mask):
    return 1.0


def own_growth(masking, name, new_mask, total_regrowth, weight):
    return add_highest(weight.abs(), new_mask, total_regrowth)


OWN = {"prune_mode": own_prune, "redistribution_mode": own_measure, "growth_mode": own_growth}


def copy_of(function):
    """Return a function that does the same, without marks."""
    return lambda *arguments: function(*arguments)


def masked_without_momentum(**modes):
    model = mlp(8, 6, 4)
    return model, masked(model, sgd(model, momentum=0), **(WITHOUT_MOMENTUM | modes))


def refusal(**modes):
    with pytest.raises(RuntimeError) as refused:
        masked_without_momentum(**modes)
    return str(refused.value)


# At the door


@pytest.mark.parametrize(("argument", "name"), EVERY)
def test_a_function_is_refused_for_an_optimizer_without_momentum_as_its_name_is(argument, name):
    function = FUNCTIONS[argument][name]
    modes = {"weights": "kept"} if "dense" in name else {}
    if surely_reads(function, "momentum"):
        said = refusal(**{argument: function})
        assert said == refusal(**{argument: name})
        assert said.startswith("SGD holds no momentum for a weight of shape (6, 8)")
    else:
        model, masking = masked_without_momentum(**{argument: function}, **modes)
        train(model, masking, 1)
        masking.at_end_of_epoch()
        masking.check()


@pytest.mark.parametrize("argument", OWN)
def test_an_own_function_that_reads_the_momentum_is_refused_without_one(argument):
    own = reads("momentum")(copy_of(OWN[argument]))
    assert refusal(**{argument: own}) == refusal(growth_mode="momentum")


@pytest.mark.parametrize("argument", OWN)
@pytest.mark.parametrize("mark", [lambda function: function, reads("gradient"), reads("nothing")])
def test_an_own_function_that_is_not_known_to_read_the_momentum_is_accepted(argument, mark):
    model, masking = masked_without_momentum(**{argument: mark(copy_of(OWN[argument]))})
    train(model, masking, 1)
    masking.at_end_of_epoch()
    masking.check()


def test_a_second_moment_is_required_of_the_optimizer():
    own = reads("second_moment")(copy_of(own_measure))
    with pytest.raises(RuntimeError, match="SGD"):
        masked(mlp(8, 6, 4), redistribution_mode=own)
    model = mlp(8, 6, 4)
    masked(model, torch.optim.Adam(model.parameters()), redistribution_mode=own)


def test_values_of_inactive_weights_are_required_to_be_kept():
    own = reads("inactive")(copy_of(own_growth))
    with pytest.raises(FunctionError, match=r"compares the values of inactive weights: .* weights='kept'"):
        masked(mlp(8, 6, 4), growth_mode=own)
    masked(mlp(8, 6, 4), growth_mode=own, weights="kept")


@pytest.mark.parametrize("what", [["momentun"], ["momentum", "weight"], [], ["nothing", "gradient"]])
def test_unknown_words_are_refused(what):
    with pytest.raises(ValueError, match=r"Expected what a function reads, some of 'momentum', 'gradient', .* got "):
        reads(*what)


# Marks are kept


def test_a_partial_function_keeps_the_marks_of_the_function_inside():
    @network_wide
    @reads("momentum", "gradient")
    def grow(masking, total_regrowth, scale=1.0):
        return masking.masks

    wrapped = functools.partial(functools.partial(grow, scale=2.0), scale=3.0)
    assert is_marked(wrapped, "network_wide")
    assert [may_read(wrapped, what) for what in READ] == [True, True, False, False]
    assert refusal(growth_mode=wrapped) == refusal(growth_mode="momentum")


def test_a_partial_function_may_have_marks_of_its_own():
    wrapped = reads("nothing")(functools.partial(momentum_growth))
    assert not may_read(wrapped, "momentum")
    assert surely_reads(momentum_growth, "momentum")


def test_a_function_without_marks_may_read_everything_and_surely_reads_nothing():
    assert all(may_read(own_growth, what) and not surely_reads(own_growth, what) for what in READ)


def test_an_own_function_that_gives_back_is_as_none():
    def updated(redistribution):
        torch.manual_seed(2)
        model = mlp(20, 30, 10)
        masking = masked(model, redistribution_mode=redistribution)
        train(model, masking)
        masking.at_end_of_epoch()
        return masking

    none = updated("none")
    assert same(updated(gives_back(copy_of(own_measure))).masks, none.masks)
    assert not same(updated(copy_of(own_measure)).masks, none.masks)


def test_an_own_function_says_how_the_excess_is_divided():
    """A nearly full layer takes few of its weights; the two others take the rest in equal parts, or by importance."""

    def counts(mark):
        def important(masking, name, weight, mask):
            return {"fc1.weight": 100, "fc2.weight": 20, "fc3.weight": 5}[name]

        torch.manual_seed(2)
        model = mlp(20, 20, 10, 4)
        masking = Masking(sgd(model), None, 0.5, redistribution_mode=mark(important), growth_mode="random")
        masking.add_module(model, {"fc1": 0.9, "*": 0.6})
        for layer in masking.layers:  # one budget, with layers of different densities
            layer.budget = masking.common
        masking.baseline_nonzero = masking.total_nonzero
        train(model, masking)
        masking.at_end_of_epoch()
        return list(masking.name2nonzeros.values())

    equal, by_importance = counts(lambda function: function), counts(in_proportion)
    # 36, 60 and 12 weights leave; of the 108 the first layer has room for 75 (99%), or 76, of 86.4.
    assert equal == [399, 83, 22]
    assert by_importance == [400, 86, 18]


# Marks are true


class Watched(dict):
    """The memory of a layer, which tells of every reading of the dense copy."""

    def __init__(self, memory, seen):
        super().__init__(memory)
        self.seen = seen

    def get(self, key, default=None):
        self.seen |= {"inactive"} if key == "dense" else set()
        return super().get(key, default)

    def __getitem__(self, key):
        self.seen |= {"inactive"} if key == "dense" else set()
        return super().__getitem__(key)


def call(argument, function, masking):
    """Call a function for all layers, and return its results."""
    torch.manual_seed(3)
    if is_marked(function, "network_wide"):
        return list(function(masking, *([5] if argument == "growth_mode" else [])).values())
    arguments = {
        "prune_mode": lambda layer: (layer.mask, layer.master, layer.name),
        "redistribution_mode": lambda layer: (layer.name, layer.master, layer.mask),
        "growth_mode": lambda layer: (layer.name, layer.mask.clone(), 5, layer.master),
    }[argument]
    return [torch.as_tensor(function(masking, *arguments(layer))) for layer in masking.layers]


def scramble(masking, what):
    """Change the momenta, gradients or inactive values that a function could read."""
    for layer in masking.layers:
        place = {
            "momentum": lambda layer: masking.optimizer.state[layer.weight]["momentum_buffer"],
            "gradient": lambda layer: layer.weight.grad,
            "inactive": lambda layer: layer.memory["dense"],
        }[what](layer)
        changed = torch.randn_like(place)
        place.copy_(changed.where(~layer.mask, place) if what == "inactive" else changed)


@torch.no_grad()
@pytest.mark.parametrize(("argument", "name"), EVERY)
def test_every_function_of_the_tables_is_marked_with_what_it_reads(argument, name, monkeypatch):
    function = FUNCTIONS[argument][name]
    marked = {what for what in READ if surely_reads(function, what)}
    assert marked == {what for what in READ if may_read(function, what)}, f"{name} is not marked"

    model = mlp(8, 6, 4)
    masking = masked(model, density=0.5, weights="kept")
    with torch.enable_grad():
        train(model, masking, 2)
    for layer in masking.layers:
        layer.prune_rate = 0.3
    seen = set()
    for what in ("momentum", "gradient"):
        inner = getattr(masking, f"get_{what}_for_weight")
        spy = lambda weight, what=what, inner=inner: (seen.add(what), inner(weight))[1]  # noqa: E731
        monkeypatch.setattr(masking, f"get_{what}_for_weight", spy)
    for layer in masking.layers:
        layer.memory = Watched(layer.memory, seen)
    first = call(argument, function, masking)
    assert seen == marked

    for what in {"momentum", "gradient", "inactive"} - marked:
        scramble(masking, what)
    assert all(map(torch.equal, first, call(argument, function, masking))), "it reads more than its mark says"


# What follows from marks


@pytest.mark.parametrize(
    ("growth", "steps"),
    [(momentum_growth, WINDOW), (gradient_growth, 1), (GROWTH_FUNCTIONS["random"], 0), (own_growth, WINDOW)],
)
def test_sparse_training_observes_the_dense_gradients_that_functions_may_read(growth, steps):
    assert masked(mlp(8, 6), growth_mode=growth, redistribution_mode="none").held.window == steps


@pytest.mark.parametrize("name", GROWTH_FUNCTIONS)
@pytest.mark.parametrize("steps", [1, 9, 100])
def test_the_dense_gradients_of_a_function_are_those_of_its_marks(name, steps):
    function = GROWTH_FUNCTIONS[name]
    own = reads(*([what for what in READ if surely_reads(function, what)] or ["nothing"]))(copy_of(function))
    assert dense_gradients(own, steps) == dense_gradients(function, steps)
    assert dense_gradients(functools.partial(function), steps) == dense_gradients(function, steps)


def test_dense_gradients_by_mark():
    assert dense_gradients(momentum_growth, 99) == 1
    assert dense_gradients(gradient_growth, 99) == 1 / 100
    assert dense_gradients(reads("nothing")(copy_of(own_growth)), 99) == 0
    assert dense_gradients(own_growth, 99) == 1, "a function without marks may read the momentum"
