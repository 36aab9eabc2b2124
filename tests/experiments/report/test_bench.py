"""The per-layer benchmark: shares counted by hand, estimates, and a model that stays as it was."""

import re

import pytest
import torch
from helpers import needs_torch
from torch import nn

from sparselearning.experiments.report import bench
from sparselearning.experiments.report.bench import LayerBench
from sparselearning.sparse import LayerReport, Report

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def bench_of(model, *inputs):
    with LayerBench(model) as measured, torch.no_grad():
        for x in inputs:
            model(x)
    return measured


@torch.no_grad()
def test_convolution_counted_by_hand(device):
    conv = nn.Conv2d(4, 2, 3, bias=False).to(device)
    conv.weight.zero_()
    conv.weight[0, 0, 0, 0] = conv.weight[1, 2, 1, 1] = 5.0  # channels 1 and 3 of 4 are never read
    x = torch.zeros(2, 4, 6, 6, device=device)
    x[0, 0] = 1.0
    x[1, 3, 2, 2] = 1.0  # 2 of 8 channels are alive
    (layer,) = bench_of(conv, x, x).layers()
    assert layer.weight_density == pytest.approx(2 / 72)
    assert layer.dead_weight_channels == pytest.approx(0.5)
    assert layer.input_density == pytest.approx(37 / 288)
    assert layer.dead_input_channels == pytest.approx(0.75)
    assert layer.seconds > 0
    assert layer.channel_sparse_seconds == pytest.approx(layer.seconds * 0.5 * 0.25)
    assert layer.zero_free_seconds == pytest.approx(layer.seconds * 2 / 72 * 37 / 288)


@torch.no_grad()
def test_linear_counted_by_hand(device):
    linear = nn.Linear(4, 2).to(device)
    linear.weight.copy_(torch.tensor([[1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 0.0, 3.0]]))
    (layer,) = bench_of(linear, torch.tensor([[1.0, 2.0, 3.0, 0.0]], device=device)).layers()
    assert (layer.name, layer.weight_density, layer.dead_weight_channels) == ("Linear", 3 / 8, 0.5)
    assert (layer.input_density, layer.dead_input_channels) == (0.75, 0.25)


@torch.no_grad()
def test_dead_channels_of_a_grouped_convolution():
    conv = nn.Conv2d(4, 4, 1, groups=2)
    conv.weight.fill_(1.0)
    conv.weight[2:, 0] = 0.0  # input channel 2, the first of the second group
    (layer,) = bench_of(conv, torch.ones(1, 4, 2, 2)).layers()
    assert layer.dead_weight_channels == 0.25


def test_statistics_are_the_mean_over_calls():
    model = nn.Sequential(nn.Linear(2, 2))
    (layer,) = bench_of(model, torch.ones(3, 2), torch.zeros(3, 2)).layers()
    assert layer.input_density == 0.5


def test_a_layer_used_twice_counts_twice_per_pass(monkeypatch):
    seconds = iter(range(1000))
    monkeypatch.setattr(bench.time, "perf_counter", lambda: float(next(seconds)))
    linear = nn.Linear(2, 2)
    model = nn.Sequential(linear, nn.Sequential(linear), nn.Linear(2, 2))
    shared, once = bench_of(model, *[torch.ones(1, 2)] * 5).layers()
    assert (shared.name, shared.seconds) == ("0", 2.0)
    assert (once.name, once.seconds) == ("2", 1.0)


def test_slow_first_calls_do_not_count(monkeypatch):
    instants = iter([0.0, 90.0, 100.0, 101.0, 102.0, 103.0])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(instants))
    (layer,) = bench_of(nn.Linear(2, 2), *[torch.ones(1, 2)] * 3).layers()
    assert layer.seconds == 1.0


@needs_torch(2, 8, "a model that compiles after it was forced to run eagerly")
def test_a_compiled_model_runs_eagerly_meanwhile():
    graphs = []
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    model.compile(backend=lambda graph, _inputs: graphs.append(graph) or graph.forward)
    assert len(bench_of(model, torch.ones(1, 2)).layers()) == 2
    assert not graphs
    model(torch.ones(1, 2))
    assert graphs


def test_the_table_marks_estimates_and_adds_up(monkeypatch):
    instants = iter([0.0, 0.001, 0.002, 0.005])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(instants))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        model[0].bias.fill_(1.0)
        model[1].weight.fill_(1.0)
    lines = bench_of(model, torch.ones(1, 2)).table().splitlines()
    assert lines[1].split()[-8:] == ["measured", "ms", "measured", "ms", "estimated", "ms", "estimated", "ms"]
    cells = {line.split()[0]: line.split()[1:] for line in lines[2:]}
    assert cells["0"] == ["0.5000", "1.0000", "0.5000", "0.0000", "1.0000", "-", "0.5000", "0.5000"]
    assert cells["total"] == ["4.0000", "4.0000", "3.5000", "3.5000"]
    assert cells["speed-up"] == ["1.00x", "1.00x", "1.14x", "1.14x"]
    assert "ESTIMATES" in "\n".join(lines)


def test_measured_sparse_times_stand_beside_the_estimates(monkeypatch):
    instants = iter([0.0, 0.001, 0.002, 0.005])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(instants))
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    layers = [LayerReport("0", 0.5, 1.0, 0.25, True), LayerReport("1", 1.0, 3.0, 9.0, False, "no zeros")]
    lines = bench_of(model, torch.ones(1, 2)).table(Report(layers, 4.0, 2.0)).splitlines()
    cells = {line.split()[0]: line.split()[5:7] for line in lines[3:5]}
    assert cells == {"0": ["1.0000", "0.2500"], "1": ["3.0000", "-"]}
    total, gain = (next(line for line in lines if line.startswith(word)).split() for word in ("total", "speed-up"))
    assert total[1:3] == ["4.0000", "3.2500"]
    assert gain[1:3] == ["1.00x", "1.23x"]
    assert re.search(r"threads: dense 4\.0000 ms, sparse 2\.0000 ms, 2\.00x$", lines[-1])


def test_an_all_zero_layer_has_no_speed_up():
    model = nn.Linear(2, 2)
    nn.init.zeros_(model.weight)
    assert "speed-up" in bench_of(model, torch.ones(1, 2)).table()


def test_no_hook_stays_behind():
    model = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Flatten(), nn.Linear(4, 2))
    with pytest.raises(RuntimeError, match="mat1"), LayerBench(model):
        model(torch.ones(1, 1, 3, 3))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_failed_pass_is_not_counted():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    with LayerBench(model) as measured:
        with pytest.raises(RuntimeError, match="mat1"):
            model(torch.zeros(1, 9))
        model(torch.ones(1, 4))
    assert [layer.input_density for layer in measured.layers()] == [1.0]


def test_training_goes_on_under_the_benchmark():
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with LayerBench(model) as measured:
        model(input=torch.rand(5, 4)).sum().backward()
    assert len(measured.layers()) == 2
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Sequential(nn.ReLU())])
def test_a_benchmark_without_a_run_is_refused(model):
    with LayerBench(model) as measured:
        if isinstance(model, nn.Sequential):
            model(torch.ones(1))
    with pytest.raises(RuntimeError, match="saw no such run"):
        measured.table()


def test_other_devices_are_refused():
    model = nn.Linear(2, 2, device="meta")
    with LayerBench(model), pytest.raises(ValueError, match="got meta"):
        model(torch.ones(1, 2, device="meta"))
