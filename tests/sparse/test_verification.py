"""Whatever a model does, the converted one does the same; the report says what was compared, and what stayed."""

import copy
import logging
import threading

import pytest
import torch
import torch.nn.functional as F
from helpers_conversion import outputs_differ, sparsify
from odd_models import ODD, Model
from torch import nn

from sparselearning.sparse import SparseLinear, available, convert, in_place, remove_dead_units
from sparselearning.sparse.modules import SparseModule

pytestmark = [
    pytest.mark.skipif(not available(), reason="built without sparse kernels"),
    pytest.mark.usefixtures("always_faster"),
    pytest.mark.filterwarnings("ignore:.*(nested|torch.jit|weight_norm):"),
]


def state_of(model):
    """Return what a caller can see of a model: tensors, gradients, flags, hooks and attributes."""
    tensors = [*model.parameters(), *model.buffers()]
    modules = [
        (type(module), module.training, sorted(vars(module)), len(module._forward_hooks)) for module in model.modules()
    ]
    numbers = [value for module in model.modules() for value in vars(module).values() if isinstance(value, int)]
    return [(id(t), t._version, t.requires_grad, t.grad is None) for t in tensors], modules, numbers


def has_global_hooks():
    module = torch.nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


@pytest.mark.parametrize("name", ODD)
def test_converted_models_do_the_same(name):
    model, example, sparse = ODD[name]()
    sparsify(model, 0.4)
    before = state_of(model)
    converted, report = convert(model, example)
    assert not outputs_differ(model, converted, example)
    assert sparse <= {layer.name for layer in report.layers if layer.replaced}
    assert sum(isinstance(module, SparseModule) for module in converted.modules()) >= len(sparse)
    assert all(layer.replaced or layer.note for layer in report.layers)
    assert not sparse or report.verified.startswith("outputs equal on the example")
    assert state_of(model) == before
    assert not has_global_hooks()


class Broken(SparseLinear):
    """A sparse layer that computes something else."""

    def forward(self, x):
        return super().forward(x) + 1e-2


def break_layers(monkeypatch, *outputs):
    """Let the sparse forms of linear layers with so many outputs be wrong."""
    from_dense = SparseLinear.from_dense.__func__

    def broken(cls, linear, mask=None):
        return from_dense(Broken if linear.out_features in outputs else cls, linear, mask)

    monkeypatch.setattr(SparseLinear, "from_dense", classmethod(broken))


def many_layers(count=40):
    sizes = range(8, 8 + count)
    return sparsify(nn.Sequential(*(nn.Linear(size, size + 1) for size in sizes)), 0.5)


def runs_of(model):
    """Return a list that grows with each run of a copy of `model`, so with each check."""
    runs = []
    model[0].register_forward_hook(lambda *_: runs.append(1))
    return runs


def test_a_wrong_layer_is_found_and_stays_dense(monkeypatch):
    break_layers(monkeypatch, 20, 33)
    model = many_layers()
    runs = runs_of(model)
    converted, report = convert(model, torch.randn(3, 8))
    kept = [layer for layer in report.layers if not layer.replaced and "hooks" not in layer.note]
    assert [layer.name for layer in kept] == ["11", "24"]
    assert all("the model differs: on the example output differs by" in layer.note for layer in kept)
    assert "outputs equal on the example, a second input" in str(report)
    assert len(runs) < 100
    assert not outputs_differ(model, converted, torch.randn(3, 8))


def test_a_model_that_converts_runs_few_times():
    model = many_layers()
    runs = runs_of(model)
    convert(model, torch.randn(3, 8))
    assert len(runs) < 12


@pytest.mark.long
def test_the_search_ends_where_every_layer_is_wrong(monkeypatch):
    break_layers(monkeypatch, *range(100))
    model = many_layers()
    runs = runs_of(model)
    converted, report = convert(model, torch.randn(3, 8))
    assert not any(layer.replaced for layer in report.layers)
    assert "too many changes do: on the example output differs by" in report.layers[1].note
    assert len(runs) < 300
    assert not outputs_differ(model, converted, torch.randn(3, 8))


def test_a_layer_that_only_the_second_input_shows_to_be_wrong(monkeypatch):
    class Wrong(SparseLinear):
        def forward(self, x):
            return super().forward(x) + (x > 0.75).any() * 1.0

    wrong = SparseLinear.from_dense.__func__
    monkeypatch.setattr(
        SparseLinear, "from_dense", classmethod(lambda cls, linear, mask=None: wrong(Wrong, linear, mask))
    )
    x = torch.zeros(9, 8)
    _, report = convert(sparsify(nn.Sequential(nn.Linear(8, 4)), 0.5), x)
    assert not report.layers[0].replaced
    assert "on a second input" in report.layers[0].note


@pytest.mark.parametrize("function", [convert, remove_dead_units])
def test_random_models_stay_as_they_are(function, caplog):
    model = sparsify(Model(lambda self, x: F.dropout(self.layer(x)), layer=nn.Linear(8, 6)), 0.4)
    with caplog.at_level(logging.WARNING):
        changed, report = function(model, torch.randn(4, 8))
    assert type(changed.layer) is nn.Linear
    assert "the model gives other outputs when it runs again" in report.verified
    assert "other outputs when it runs again" in caplog.text
    assert changed.layer.out_features == 6


@pytest.mark.parametrize("function", [convert, remove_dead_units])
def test_outputs_that_cannot_be_compared_are_named(function):
    class Iterator:
        __slots__ = ()

    model = Model(lambda self, x: (x, Iterator(), iter([self.layer(x)])), layer=nn.Linear(8, 6))
    _, report = function(sparsify(model, 0.4), torch.randn(4, 8))
    assert "cannot be compared" in report.verified
    for outputs in (lambda y: [][: y.dim() * 0], lambda y: y[:0], lambda y: y * float("nan")):
        model.function = lambda self, x, outputs=outputs: outputs(self.layer(x))
        changed, report = function(model, torch.randn(4, 8))
        assert "returns no finite numbers on the example" in report.verified
        assert type(changed.layer) is nn.Linear


@pytest.mark.parametrize("function", [convert, remove_dead_units])
@pytest.mark.parametrize("training", [True, False])
def test_the_callers_model_stays_untouched_when_something_raises(function, training, monkeypatch):
    model = sparsify(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), 0.4)
    model.train(training)
    model(torch.randn(4, 8)).sum().backward()
    before, state = state_of(model), copy.deepcopy(model.state_dict())
    random_state = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        function(model, torch.randn(4, 9))
    monkeypatch.setattr("sparselearning.sparse.dataflow.Dataflow.only_reader", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        function(model, torch.randn(4, 8))
    assert state_of(model) == before
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not has_global_hooks()
    assert not torch.equal(random_state, torch.get_rng_state())  # of the examples drawn here
    random_state = torch.get_rng_state()
    with pytest.raises(ZeroDivisionError):
        function(model, torch.ones(4, 8))
    assert torch.equal(random_state, torch.get_rng_state())


@pytest.mark.parametrize("function", [convert, remove_dead_units])
def test_models_that_cannot_be_copied_are_refused(function):
    model = nn.Sequential(nn.Linear(8, 6))
    model.lines = (line for line in "abc")
    with pytest.raises(TypeError, match=r"that copy.deepcopy can copy, got a Sequential where it fails: .*generator"):
        function(model, torch.randn(4, 8))

    class Single(nn.Linear):
        def __deepcopy__(self, memo):
            return self

    with pytest.raises(TypeError, match=r"__deepcopy__ that returns the same module \(0\)"):
        function(nn.Sequential(Single(8, 6)), torch.randn(4, 8))


@pytest.mark.parametrize("function", [convert, remove_dead_units])
def test_lazy_models_are_refused_until_they_have_weights(function):
    model = nn.Sequential(nn.LazyLinear(6), nn.ReLU(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match=r"lazy ones \(0.weight\). Run the model once before"):
        function(model, torch.randn(4, 8))
    model(torch.randn(4, 8))
    sparsify(model, 0.4)
    changed, _ = function(model, torch.randn(4, 8))
    assert not outputs_differ(model, changed, torch.randn(4, 8))


def test_keyword_arguments_have_names():
    with pytest.raises(TypeError, match=r"keyword arguments by name; got a key that is not a string.*\(that dict,\)"):
        convert(nn.Linear(8, 6), {0: torch.randn(4, 8)})


@pytest.mark.parametrize("function", [convert, remove_dead_units])
def test_models_convert_in_inference_mode(function):
    with torch.inference_mode():
        model = sparsify(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), 0.4)
        x = torch.randn(4, 8)
        changed, report = function(model, x)
        torch.testing.assert_close(changed(x), model(x))
    x = torch.randn(4, 8)
    assert function is remove_dead_units or all(layer.replaced for layer in report.layers)
    changed(x).sum().backward()
    assert not outputs_differ(model, changed, x)


def test_a_model_that_fills_up_stays_dense(monkeypatch):
    def forward(self, x):
        self.calls += 1
        if self.calls > 3:
            raise RuntimeError("full")
        return self.layer(x)

    def often(models, places, arguments, seconds, least=2, show=None):
        for _ in range(9):
            for model in models:
                model(*arguments[0])

    model = sparsify(Model(forward, layer=nn.Linear(8, 6)), 0.4)
    model.calls = 0
    monkeypatch.setattr(in_place, "time_in_turns", often)
    converted, report = convert(model, torch.randn(4, 8))
    assert type(converted.layer) is nn.Linear
    assert "raises RuntimeError when it runs again and again" in report.layers[0].note


def test_scripted_modules_are_named_in_the_report():
    model, example, _ = ODD["a_scripted_module"]()
    _, report = convert(sparsify(model, 0.4), example)
    assert "a ScriptModule stays as it is" in str(report)


def test_compiled_models_convert_without_the_compiler():
    model = sparsify(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), 0.4)
    converted, report = convert(torch.compile(model, backend="eager"), torch.randn(4, 8))
    assert isinstance(converted, nn.Sequential)
    assert report.layers[0].replaced


@pytest.mark.parametrize("function", [convert, remove_dead_units])
def test_only_models_are_taken(function):
    with pytest.raises(TypeError, match=r"Expected a model, an nn.Module, got a function"):
        function(lambda x: x, torch.randn(4, 8))


def test_models_of_other_threads_do_not_disturb():
    """Hooks that see all modules see those of other threads too."""
    other, stop = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), threading.Event()

    def serve():
        with torch.no_grad():
            while not stop.is_set():
                other(torch.ones(1, 4))

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        for _ in range(5):
            model = sparsify(nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3)), 0.4)
            converted, report = convert(model, torch.randn(4, 8))
            assert [layer.replaced for layer in report.layers] == [True, True]
            assert type(converted[1]) is nn.Identity
    finally:
        stop.set()
        thread.join()


def test_a_converted_model_converts_again():
    model = sparsify(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)), 0.4)
    x = torch.randn(16, 3, 12, 12)
    once, _ = convert(model, x)
    twice, report = convert(once, x)
    assert not outputs_differ(model, twice, x)
    assert not report.layers
