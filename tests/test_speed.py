"""What keeps masked training fast: nothing allocated, waited for or compiled anew. Times are in benchmarks/."""

import importlib
import json
import sys
import tracemalloc
from pathlib import Path

import pytest
import torch
from helpers import assert_masks_hold, backward, batch_for, masked, mlp, train
from oracles import reference
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparselearning import selection
from sparselearning.native import library
from sparselearning.native.zero import zero_inactive
from sparselearning.selection import add_highest, drop_lowest

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64, torch.complex128]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


@pytest.fixture
def benchmark(monkeypatch):
    """Import a file of benchmarks/, which is no package."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module


@pytest.fixture
def synchronisations(benchmark):
    return benchmark("common").Synchronisations


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("name", ["step", "update", "loop", "epoch", "scaling"])
def test_benchmarks_run(benchmark, name, monkeypatch, tmp_path):
    argv = [name, "--quick", "--rounds", "1", "--threads", "1", "--output", str(tmp_path / "report.json")]
    monkeypatch.setattr(sys, "argv", argv)
    benchmark(name).main()
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["benchmark"] == name
    assert report["machine"]["torch"] == torch.__version__
    assert report["rows"]


@pytest.fixture(params=["kernel", "numpy"])
def on_cpu(request, monkeypatch):
    """Run a test with the compiled kernel and, as where there is no compiler, without."""
    if request.param == "numpy":
        monkeypatch.setattr(library, "LIBRARY", None)
    elif library.LIBRARY is None:
        pytest.skip("installed without a compiler")


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("mask_layout", LAYOUTS)
def test_zero_inactive(dtype, layout, mask_layout):
    tensor, mask = torch.randn(8, 5, 3, 3).to(dtype), torch.rand(8, 5, 3, 3) < 0.5
    tensor[mask.logical_not()] = torch.nan
    tensor[0], mask[0] = torch.inf, False
    expected = [value if active else 0 for value, active in zip(tensor.flatten(), mask.flatten(), strict=True)]
    weight = nn.Parameter(tensor.to(memory_format=layout))
    version, place = weight._version, weight.data_ptr()
    zero_inactive([weight], [mask.to(memory_format=mask_layout)])
    assert weight.flatten().tolist() == expected
    assert weight.data_ptr() == place
    assert weight._version > version  # autograd notices


def test_zero_inactive_in_one_grouped_call(synchronisations):
    class Calls(TorchDispatchMode):
        names = ()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.names += (function.overloadpacket.__name__,)
            return function(*args, **(kwargs or {}))

    tensors = [torch.full((3, 4), torch.inf) for _ in range(5)]
    masks = [torch.rand(3, 4) < 0.5 for _ in tensors]
    with synchronisations() as waits, Calls() as calls:
        zero_inactive(tensors, masks)
    assert set(calls.names) <= {"detach", "view", "_foreach_mul_"}  # views and work in place
    assert calls.names.count("_foreach_mul_") == 1
    assert waits.count == 0
    assert all(torch.equal(tensor == 0, ~mask) for tensor, mask in zip(tensors, masks, strict=True))


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize("threads", [1, 3])
def test_zero_inactive_in_many_pieces(threads):
    sizes = [1, 200_001, 0, 3, 65_536, 65_537, 131_072]
    tensors = [torch.randn(size) for size in sizes]
    masks = [torch.rand(size) < 0.5 for size in sizes]
    expected = [tensor * mask for tensor, mask in zip(tensors, masks, strict=True)]
    torch.set_num_threads(threads)
    try:
        zero_inactive(tensors, masks)
    finally:
        torch.set_num_threads(1)
    assert all(map(torch.equal, tensors, expected))


@pytest.mark.usefixtures("on_cpu")
def test_a_step_allocates_nothing():
    model = mlp(1000, 1000)
    masking = masked(model)
    train(model, masking)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    masking.apply_mask()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - before < 100_000  # bytes; the weights are 4 million


def test_storages_never_change():
    model = mlp(20, 30, 10)
    masking = masked(model)
    places = [tensor.data_ptr() for layer in masking.layers for tensor in (layer.weight, layer.mask)]
    for _ in range(3):
        train(model, masking)
        masking.at_end_of_epoch()
    assert places == [tensor.data_ptr() for layer in masking.layers for tensor in (layer.weight, layer.mask)]


@pytest.mark.parametrize("widths", [(20, 30, 10), (20, 30, 30, 30, 30, 10)])
def test_synchronisations_are_the_same_for_any_number_of_layers(synchronisations, widths):
    model = mlp(*widths)
    masking = masked(model)
    train(model, masking)
    with synchronisations() as per_step:
        masking.step()
    with synchronisations() as per_update:
        masking.at_end_of_epoch()
    assert per_step.count == 0
    assert per_update.count == 4  # all finite; importances; counts after pruning; counts after growing
    assert_masks_hold(masking)


SCORES = {
    "distinct": lambda n: torch.randn(n),
    "tied": lambda n: torch.randn(n).round(),
    "equal": lambda n: torch.zeros(n),
    "sorted": lambda n: torch.arange(n).float(),
    "periodic": lambda n: torch.arange(n).remainder(16).float(),  # every 16th entry is the lowest
}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize("density", [0.05, 0.5, 0.95])
def test_a_sample_that_bounds_the_search_changes_nothing(monkeypatch, kind, density):
    monkeypatch.setattr(selection, "SAMPLE", 64)
    monkeypatch.setattr(selection, "CHUNK", 100)
    score, mask = SCORES[kind](2048), torch.rand(2048) < density
    for k in (1, 30, 100, 1000):
        dropped, added = drop_lowest(score, mask, k).tolist(), add_highest(score, mask, k).tolist()
        assert dropped == reference.drop_lowest(score.tolist(), mask.tolist(), k)
        assert added == reference.add_highest(score.tolist(), mask.tolist(), k)


@pytest.fixture
def compiled():
    """Count the graphs that torch.compile makes, and run them as they are."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    yield lambda function: torch.compile(function, backend=backend), graphs
    torch.compiler.reset()


def test_a_compiled_model_is_not_compiled_again_after_an_update(compiled):
    compile, graphs = compiled
    model = mlp(20, 30, 10)
    masking = masked(model)
    run = compile(model)
    inputs = batch_for(model)
    for _ in range(3):
        for _ in range(2):
            backward(run, inputs)
            masking.step()
        masking.at_end_of_epoch()
        assert len(graphs) == 1
        assert torch.equal(run(inputs), model(inputs))
    assert_masks_hold(masking)


OPTIMIZERS = {
    "sgd foreach": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, foreach=True),
    "sgd fused": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, fused=True),
    "adamw foreach": lambda weights: torch.optim.AdamW(weights, foreach=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_compiled_step_is_not_compiled_again_after_an_update(compiled, kind):
    compile, graphs = compiled
    model, inputs = mlp(20, 30, 10), torch.randn(8, 20)
    masking = masked(model, OPTIMIZERS[kind](model.parameters()))

    @compile
    def step():
        backward(model, inputs)
        masking.step()

    for _ in range(3):  # the optimizer's state appears, then the number of steps becomes a variable
        step()
    made = len(graphs)
    for _ in range(3):
        masking.at_end_of_epoch()
        step()
        step()
        assert len(graphs) == made
        assert_masks_hold(masking)
    assert masking.steps == 9


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_cuda_graphs_follow_an_update():
    model = mlp(20, 30, 10).cuda()
    masking = masked(model)
    run = torch.compile(model, mode="reduce-overhead")
    inputs = torch.randn(8, 20, device="cuda")
    for _ in range(5):
        backward(run, inputs)
        masking.step()
        masking.at_end_of_epoch()
    assert torch.allclose(run(inputs), model(inputs))
    assert_masks_hold(masking)
