"""`convert` decides where the layers are. Times are given here, none is measured."""

import io
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers_conversion import LAYERS, sparsify, turns_by
from torch import nn

from sparselearning.sparse import available, convert, in_place
from sparselearning.sparse.memory_order import is_turned
from sparselearning.sparse.modules import SparseModule
from sparselearning.sparse.progress import progress_line

pytestmark = pytest.mark.skipif(not available(), reason="built without sparse kernels")


def is_sparse(module):
    return isinstance(module, SparseModule)


def is_channels_last(module):
    return isinstance(module, nn.Conv2d) and not module.weight.is_contiguous()


def network(layers=3):
    torch.manual_seed(0)
    convolutions = [nn.Conv2d(4, 4, 3, padding=1) for _ in range(layers)]
    return sparsify(nn.Sequential(*convolutions, nn.AdaptiveAvgPool2d(1), nn.Flatten()), 0.3)


def normalised():
    convolutions, rest = network()[:3], network()[3:]
    return nn.Sequential(*convolutions, nn.BatchNorm2d(4), *rest).eval()


def replaced(model, batch=2):
    """Return which layers of the converted model are sparse, and the report."""
    converted, report = convert(model, torch.randn(batch, 4, 6, 6))
    layers = [module for module in converted.modules() if isinstance(module, LAYERS)]
    assert [is_sparse(layer) for layer in layers] == [layer.replaced for layer in report.layers]
    return [layer.replaced for layer in report.layers], report


def test_a_layer_that_is_slower_alone_but_faster_in_place_becomes_sparse(timed):
    """As the shortcuts of a wide residual network: a dense layer first turns what the sparse one before it left."""

    def cost(modules, place):
        if place != 2:
            return 1.0 if is_sparse(modules[place]) else 9.0
        return 3.0 if is_sparse(modules[2]) else (4.0 if is_sparse(modules[1]) else 2.0)

    timed(cost)
    assert replaced(network())[0] == [True, True, True]


@pytest.mark.parametrize(("batch", "keeps"), [(8, True), (2, False)])
def test_dense_convolutions_of_single_pixels_keep_the_memory_order_of_sparse_ones(timed, batch, keeps):
    timed(lambda modules, place: 9.0 if is_sparse(modules[place]) == (place == 2) else 1.0)
    first, _, last, *rest = network()
    model = nn.Sequential(first, nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), last, *rest).eval()
    x = torch.randn(batch, 4, 6, 6)
    converted, report = convert(model, x)
    assert [layer.replaced for layer in report.layers] == [True, False, True]
    orders = []
    converted[1].register_forward_hook(lambda module, args, y: orders.append(is_turned(y)))
    with torch.no_grad():
        torch.testing.assert_close(converted(x), model(x), atol=1e-5, rtol=1e-5)
    assert orders == [keeps]
    assert type(converted[3]) is nn.Identity


def test_a_layer_that_makes_the_next_one_slower_stays_dense(timed):
    def cost(modules, place):
        turn = 2.0 if place == 3 and is_sparse(modules[2]) else 0.0
        return turn + (1.0 if is_sparse(modules[place]) else {1: 9.0, 2: 1.5, 3: 9.0}[place])

    timed(cost)
    assert replaced(network())[0] == [True, False, True]


@pytest.mark.parametrize(("sparse_ms", "becomes"), [(1.92, False), (1.88, True), (2.0, False)])
def test_a_gain_within_the_noise_puts_no_sparse_layer_in(timed, sparse_ms, becomes):
    def cost(modules, place):
        if place == 2:
            return sparse_ms if is_sparse(modules[2]) else 2.0
        return 1.0 if is_sparse(modules[place]) else 9.0

    timed(cost)
    assert replaced(network())[0] == [True, becomes, True]


def test_a_model_that_is_slower_as_a_whole_stays_as_it_was(timed):
    timed(
        lambda modules, place: 1.0 if is_sparse(modules[place]) else 2.0,
        lambda modules: 100.0 * any(map(is_sparse, modules)),
    )
    model = normalised()
    found, report = replaced(model)
    assert found == [False, False, False]
    assert {layer.note for layer in report.layers} == {"no gain in the whole model"}
    converted, _ = convert(model, torch.randn(2, 4, 6, 6))
    assert type(converted[3]) is nn.BatchNorm2d


def test_the_faster_memory_order_of_dense_layers_is_kept(timed):
    timed(lambda modules, place: 3.0 if is_sparse(modules[place]) else 2.0 - is_channels_last(modules[place]))
    model = normalised()
    x = torch.randn(2, 4, 6, 6)
    converted, report = convert(model, x)
    assert [is_channels_last(module) for module in converted] == [True, True, True, False, False, False]
    assert type(converted[3]) is nn.Identity
    assert not any(layer.replaced for layer in report.layers)
    assert (report.dense_ms, report.converted_ms) == (3.0, 3.0)
    torch.testing.assert_close(converted(x), model(x), atol=1e-5, rtol=1e-5)


def test_a_whole_model_within_the_noise_stays_as_it_was(timed):
    timed(lambda modules, place: 0.99 if is_sparse(modules[place]) else 1.0)
    assert replaced(network())[0] == [False, False, False]


@pytest.mark.parametrize("layers", [2, 12])
def test_the_number_of_timed_models_does_not_grow_with_the_layers(monkeypatch, layers):
    def cost(modules, place):
        return 1.0 if is_sparse(modules[place]) else 1.5

    timed, turns = [], turns_by(cost)

    def counted(models, *rest, **more):
        timed.append(len(models))
        return turns(models, *rest, **more)

    monkeypatch.setattr(in_place, "time_in_turns", counted)
    assert all(replaced(network(layers))[0])
    assert timed == [3, 3, 2]  # two dense orders and all sparse; the best and two tries; the faster dense and the best


def test_layers_that_are_surely_sparse_are_not_tried(monkeypatch):
    timed = []

    def counted(models, *rest, **more):
        timed.append(len(models))
        return turns_by(lambda modules, place: 1.0 if is_sparse(modules[place]) else 9.0)(models, *rest, **more)

    monkeypatch.setattr(in_place, "time_in_turns", counted)
    assert all(replaced(network())[0])
    assert timed == [3, 2]


class Clock:
    """Stands for the module `time`; what runs lets it advance."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now


class Slow(nn.Module):
    def __init__(self, clock, seconds):
        super().__init__()
        self.clock, self.seconds = clock, seconds

    def __deepcopy__(self, memo):
        return self

    def forward(self, x):
        self.clock.now += self.seconds
        return x


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(in_place, "time", clock)
    return clock


def test_times_in_place_are_of_calls_and_of_what_follows_them(clock):
    model = nn.Sequential(Slow(clock, 1.0), Slow(clock, 2.0), Slow(clock, 4.0), Slow(clock, 8.0))
    (times,) = in_place.time_in_turns([model], [2, 4], ((torch.ones(1),), {}), 0.0)
    assert times.whole == [15_000.0, 15_000.0]
    assert times.own == {2: 2_000.0, 4: 8_000.0}
    assert times.span == {2: 6_000.0, 4: 8_000.0}  # the third is between
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_is_called_twice_takes_both_calls(clock):
    layer = Slow(clock, 1.0)
    (times,) = in_place.time_in_turns([nn.Sequential(layer, Slow(clock, 2.0), layer)], [1], ((torch.ones(1),), {}), 0)
    assert times.own == {1: 2_000.0}
    assert times.span == {1: 4_000.0}


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 2), (2.0, 2), (5.0, 5), (1e9, in_place.MOST_ROUNDS)])
def test_turns_take_about_the_seconds_and_two_rounds_at_least(clock, seconds, rounds):
    models = [nn.Sequential(Slow(clock, 0.5)), nn.Sequential(Slow(clock, 0.5))]
    shares = []
    times = in_place.time_in_turns(models, [], ((torch.ones(1),), {}), seconds, show=shares.append)
    assert [len(each.whole) for each in times] == [rounds, rounds]
    assert shares == sorted(shares)
    assert max(shares) <= 1


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize(
    ("stream", "progress", "shown"),
    [(Terminal, None, True), (io.StringIO, None, False), (Terminal, False, False), (io.StringIO, True, True)],
)
@pytest.mark.usefixtures("always_faster")
def test_progress_is_shown_where_it_is_seen(monkeypatch, stream, progress, shown):
    monkeypatch.setattr(sys, "stderr", stream())
    convert(network(), torch.randn(2, 4, 6, 6), progress=progress)
    text = sys.stderr.getvalue()
    assert ("convert [" in text) == shown
    assert not shown or ("100% done" in text and text.endswith("\n"))


def test_a_progress_line_ends_where_an_error_ends_it(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    def stop():
        with progress_line("convert", True) as show:
            show(0.5, "half")
            raise ValueError

    with pytest.raises(ValueError, match=r"^$"):
        stop()
    assert sys.stderr.getvalue() == f"\rconvert [{'#' * 12:<24}]  50% {'half':<24}\n"


def test_seconds_are_not_negative():
    with pytest.raises(ValueError, match=r"Expected seconds >= 0 .*, got -1.0\. Pass None"):
        convert(network(), torch.randn(2, 4, 6, 6), seconds=-1.0)


class Compiled(nn.Module):
    def __init__(self, model, factor=1.0):
        super().__init__()
        self.model, self.factor = model, factor

    def forward(self, x):
        return self.model(x) * self.factor


@pytest.mark.parametrize(("compiled_ms", "factor", "wins"), [(0.5, 1.0, True), (1.0, 1.0, False), (0.5, 2.0, False)])
def test_the_compiled_dense_model_is_returned_where_it_is_fastest_and_right(monkeypatch, compiled_ms, factor, wins):
    def cost(modules, place):
        return 1.0 if is_sparse(modules[place]) else compiled_ms if isinstance(modules[0], Compiled) else 2.0

    monkeypatch.setattr(in_place, "time_in_turns", turns_by(cost))
    monkeypatch.setattr(torch, "compile", lambda model: Compiled(model, factor))
    model, x = network(), torch.randn(2, 4, 6, 6)
    converted, report = convert(model, x, compiled=True)
    assert isinstance(converted, Compiled) == wins
    assert all(layer.replaced != wins for layer in report.layers)
    assert report.converted_ms == (1.5 if wins else 3.0)
    assert bool(report.notes) == (factor != 1)


def test_a_bar_needs_no_stderr(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with progress_line("convert", None) as show:
        show(0.5, "half")


def test_layers_are_told_apart_by_the_order_of_calls(timed):
    """Neighbours are those that follow each other in the run, not in the list of modules."""

    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = network()

        def forward(self, x):
            for layer in reversed(self.layers[:3]):
                x = layer(x)
            return self.layers[3:](x)

    def cost(modules, place):
        layer = modules[place]
        own = 1.0 if is_sparse(layer) else 1.5
        after = SimpleNamespace(turns=place == 3 and is_sparse(modules[4]) and is_sparse(layer))
        return own + 4.0 * after.turns

    timed(cost)
    found, _ = replaced(Backwards())
    assert sum(found) == 2
    assert found[0]
