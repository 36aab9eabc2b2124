"""imagenet/main.py: recipes, networks, a run that is resumed, several processes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import apex_stand_in
import pytest
import torch
from jpegs import write_folder
from launch import run
from script import ROOT, draw_nothing, load_main, run_folder, small_network, without_times
from torch import nn
from torch._dynamo.utils import counters

from sparselearning.experiments.run.session import USER_ERRORS
from sparselearning.experiments.run.start import build_masking
from sparselearning.experiments.run.stopping import Stopped
from sparselearning.experiments.run.training import Progress
from sparselearning.methods import METHODS
from sparselearning.processes import distributed

OF_SGD = [name for name, method in METHODS.items() if method.reset_state != "restart"]  # the script has no other

SCRIPT = ROOT / "imagenet" / "main.py"
script = load_main("imagenet")


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch):
    draw_nothing(monkeypatch)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("photographs"))


def arguments(folder, place, *more):
    small = "--arch resnet18 --image-size 32 --batch-size 8 --workers 0 --print-freq 1 --epochs 3"
    return [str(folder), "--run-dir", str(place), *small.split(), *map(str, more)]


def train(folder, place, *more):
    """Train in this process; return the run folder's path and its metrics."""
    result = script.run(script.parse_arguments(arguments(folder, place, *more)))
    return result.path, [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]


def same_state(one, other):
    one, other = (torch.load(path, weights_only=True) for path in (one, other))
    torch.testing.assert_close(
        {name: one[name] for name in ("model", "optimizer", "mask")},
        {name: other[name] for name in ("model", "optimizer", "mask")},
        rtol=0,
        atol=0,
    )


@pytest.fixture(scope="module")
def whole_run(folder, tmp_path_factory):
    """A run of three epochs, with the checkpoint of each."""
    torch.manual_seed(0)
    return train(folder, tmp_path_factory.mktemp("whole"), "--gather-checkpoints")


def test_a_run_leaves_its_files_and_keeps_its_density(whole_run):
    path, metrics = whole_run
    names = {"args.json", "checkpoint-1.pt", "checkpoint-2.pt", "checkpoint-3.pt", "checkpoint-best.pt"}
    assert {file.name for file in path.iterdir()} == names | {
        *("checkpoint.pt", "checkpoint.1.pt", "curves.png", "density.png", "log.txt", "metrics.jsonl")
    }
    assert [record["epoch"] for record in metrics] == [1, 2, 3]
    assert len({record["active_weights"] for record in metrics}) == 1
    assert {round(record["density"], 6) for record in metrics} == {0.1}
    assert metrics[0]["density_per_layer"] != metrics[2]["density_per_layer"]


@pytest.mark.long
def test_a_run_that_goes_on_elsewhere_is_the_uninterrupted_one_to_the_bit(whole_run, folder, tmp_path):
    path, metrics = whole_run
    again, resumed = train(folder, tmp_path, "--resume", path / "checkpoint-1.pt", "--gather-checkpoints")
    assert without_times(resumed) == without_times(metrics)
    same_state(again / "checkpoint.pt", path / "checkpoint.pt")


@pytest.mark.long
@pytest.mark.parametrize(
    ("where", "argv"),
    [
        ("step 1 of 2", "--resume auto"),
        ("the evaluation after epoch 2", "--resume auto"),
        ("step 1 of 2", "alone"),
    ],
)
def test_a_run_stopped_inside_an_epoch_goes_on_to_the_bit(whole_run, folder, tmp_path, monkeypatch, where, argv):
    path, metrics = whole_run
    with monkeypatch.context() as patch:
        stop_at(patch, step=3 if "step" in where else 4)
        with pytest.raises(Stopped, match=f"{where}; --resume"):
            train(folder, tmp_path, "--gather-checkpoints")
    stopped = run_folder(tmp_path)
    if argv == "alone":
        script.main(["--resume", str(stopped)])
    else:
        train(folder, tmp_path, "--gather-checkpoints", *argv.split())
    again = run_folder(tmp_path)
    assert again == stopped
    resumed = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert without_times(resumed) == without_times(metrics)
    same_state(again / "checkpoint.pt", path / "checkpoint.pt")
    assert (again / "checkpoint-3.pt").is_file()


def stop_at(patch, step):
    """Send this process a signal in its n-th step."""
    add, seen = Progress.add, []

    def signalling(progress, loss):
        seen.append(loss)
        if len(seen) == step:
            signal.raise_signal(signal.SIGTERM)
        add(progress, loss)

    patch.setattr(Progress, "add", signalling)


def train_and_stop(step, given):
    """Train on this process's share, the second one gets a signal in a step; return metrics, or where it stopped."""
    os.environ["WORLD_SIZE"] = str(distributed.processes())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "build_model", small_network)
        if step and distributed.rank() == 1:
            stop_at(patch, step)
        try:
            return without_times(script.run(script.parse_arguments(given)).metrics)
        except Stopped as stop:
            return str(stop)


@pytest.mark.long
@pytest.mark.parametrize("more", [(), pytest.param(("--fsdp",), marks=pytest.mark.slow)])
def test_processes_stopped_inside_an_epoch_go_on_to_the_bit(folder, tmp_path, more):
    more = ["--epochs", "2", "--checkpoint-every", "1", "--batch-size", "4", *more]  # statistics of BatchNorm differ
    whole = run(train_and_stop, 2, None, arguments(folder, tmp_path / "whole", *more))
    for hint in run(train_and_stop, 2, 2, arguments(folder, tmp_path / "runs", *more)):
        assert "in epoch 1 after step 3 of 4" in hint
    assert run(train_and_stop, 2, None, arguments(folder, tmp_path / "runs", *more, "--resume", "auto")) == whole
    (one,), (other,) = ((tmp_path / place).glob("*/checkpoint.pt") for place in ("runs", "whole"))
    same_state(one, other)


def train_together(*given):
    """Train on this process's share; return the metrics of the last epoch."""
    os.environ["WORLD_SIZE"] = str(distributed.processes())
    folder = script.run(script.parse_arguments(list(given)))
    return without_times(folder.metrics), str(folder.path)


@pytest.mark.long
@pytest.mark.parametrize("more", [(), ("--fsdp",)])
def test_processes_go_on_with_a_run_of_one(whole_run, folder, tmp_path, more):
    path, metrics = whole_run
    given = arguments(folder, tmp_path, "--resume", path / "checkpoint-2.pt", *more)
    (first, place), (second, _) = run(train_together, 2, *given)
    assert first == second, "both know the accuracy of all images"
    assert first[:2] == without_times(metrics[:2])
    assert first[2]["active_weights"] == metrics[2]["active_weights"]
    saved = torch.load(Path(place) / "checkpoint.pt", weights_only=True)
    masks = {name: entry["mask"] for name, entry in saved["mask"]["layers"].items()}
    assert sum(mask.sum() for mask in masks.values()) == metrics[2]["active_weights"]
    assert all(saved["model"][name][~mask].abs().sum() == 0 for name, mask in masks.items())
    evaluated = script.run(
        script.parse_arguments(["--resume", place, "--evaluate"])
    )  # one process reads what two wrote
    assert evaluated.accuracy == first[2]["valid_accuracy"]


@pytest.mark.parametrize("more", [("--accumulate", "2"), ("--dense", "--accumulate", "2")])
def test_accumulated_gradients_make_the_same_number_of_steps(folder, tmp_path, more):
    _, metrics = train(folder, tmp_path, *more, "--epochs", "1")
    assert metrics[0]["steps"] == 2


@pytest.mark.long
def test_benchmarks_and_the_profile_end_without_training(folder, tmp_path):
    few = ["--bench-iterations", "1", "--bench-warmup", "1"]
    _, metrics = train(folder, tmp_path, "--benchmark-training", "--benchmark-inference", *few)
    assert [record["benchmark"] for record in metrics] == ["training", "inference"]
    assert all(record["images_per_second"] > 0 for record in metrics)
    path, metrics = train(folder, tmp_path, "--prof")
    assert (path / "trace.json").stat().st_size > 1000
    assert metrics == []


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_fp16_by_apex_accumulates_and_resumes_to_the_bit(folder, tmp_path, monkeypatch, caplog):
    apex_stand_in.install(monkeypatch)
    monkeypatch.setattr(script, "build_model", small_network)
    caplog.set_level("INFO")
    more = ("--fp16", "--accumulate", "2", "--gather-checkpoints")
    path, metrics = train(folder, tmp_path / "whole", *more)
    assert "fp16 by Apex" in caplog.text
    assert len({record["active_weights"] for record in metrics}) == 1
    saved = torch.load(path / "checkpoint.pt", weights_only=True)
    masters = {tuple(master.shape): master for group in saved["precision"]["masters"] for master in group}
    for name, entry in saved["mask"]["layers"].items():
        weight = saved["model"][name]
        assert weight.dtype == torch.float16
        assert not weight[~entry["mask"]].any()
    inactive = ~saved["mask"]["layers"]["fc.weight"]["mask"]
    assert not masters[tuple(inactive.shape)][inactive].any()
    again, resumed = train(folder, tmp_path / "again", *more, "--resume", path / "checkpoint-1.pt")
    assert without_times(resumed) == without_times(metrics)
    same_state(again / "checkpoint.pt", path / "checkpoint.pt")


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_a_static_loss_scale_stays_with_apex_and_without(folder, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(script, "build_model", small_network)
    caplog.set_level("INFO")
    more = ("--fp16", "--static-loss-scale", "128", "--epochs", "1")
    path, _ = train(folder, tmp_path / "torch", *more)
    assert "fp16 by torch.amp" in caplog.text
    assert torch.load(path / "checkpoint.pt", weights_only=True)["precision"]["scale"] == 128
    apex_stand_in.install(monkeypatch)
    path, _ = train(folder, tmp_path / "apex", *more)
    assert torch.load(path / "checkpoint.pt", weights_only=True)["precision"]["loss_scale"]["cur_scale"] == 128


def compiled_by(backend, patch):
    """Let --compile compile with this backend, and count graphs from zero."""
    compile_ = nn.Module.compile
    patch.setattr(nn.Module, "compile", lambda model: compile_(model, backend=backend))
    torch.compiler.reset()
    counters.clear()


# Inductor takes minutes for a ResNet on a CPU.
@pytest.mark.long
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_masks_move_without_compiling_again(folder, tmp_path, monkeypatch, backend):
    compiled_by(backend, monkeypatch)
    _, metrics = train(folder, tmp_path, "--compile", "--prune-every-k-steps", "1")
    assert counters["stats"]["unique_graphs"] == 2, "one for training, one for evaluation"
    explored = [record["exploration_rate"] for record in metrics]
    assert 0.1 < explored[0] < explored[1] < explored[2]
    assert {record["active_weights"] for record in metrics} == {metrics[0]["active_weights"]}


def train_small_together(*given):
    with pytest.MonkeyPatch.context() as patch:
        compiled_by("eager", patch)
        patch.setattr(script, "build_model", small_network)
        return train_together(*given)


@pytest.mark.long
@pytest.mark.parametrize("more", ["--compile", "--fsdp", "--fsdp --compile"])
def test_processes_move_masks_after_an_evaluation(folder, tmp_path, more):
    given = arguments(folder, tmp_path, "--epochs", "2", "--density", "0.3", *more.split())
    (first, _), (second, _) = run(train_small_together, 2, *given)
    assert first == second
    assert first[0]["active_weights"] == first[1]["active_weights"]
    assert first[0]["density_per_layer"] != first[1]["density_per_layer"]


@pytest.mark.long
def test_a_run_begins_with_scores_of_one_step(folder, tmp_path):
    more = ("--epochs", "1", "--accumulate", "2", "--dense-layers", "first", "*.downsample.*", "--density", "0.05")
    path, metrics = train(folder, tmp_path, "--sparse-init", "snip", *more)
    layers = torch.load(path / "checkpoint.pt")["mask"]["layers"]
    assert not any(name.startswith("conv1") or "downsample" in name for name in layers)
    assert metrics[0]["density"] == pytest.approx(0.05, abs=1e-6)
    assert 0.05 < metrics[0]["inference_flops"] < metrics[0]["training_flops"] < 1
    path, _ = train(folder, tmp_path, "--sparse-init", "snip", "--score-batches", "2", *more)
    of_two = torch.load(path / "checkpoint.pt")["mask"]["layers"]
    assert any((of_two[name]["mask"] != layer["mask"]).any() for name, layer in layers.items())


def test_a_method_for_adam_is_refused_in_one_line(folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        script.main(arguments(folder, tmp_path, "--method", "smet"))
    assert end.value.code == 2
    assert "are for steps of torch's Adam and AdamW, got SGD. Use one of these" in capsys.readouterr().err


@pytest.mark.parametrize("method", OF_SGD)
def test_every_method_takes_a_step(method):
    args = parsed("--method", method, "--prune-every-k-steps", "1", "--density", "0.2")
    assert (args.prune_rate, args.pattern) == (METHODS[method].prune_rate, METHODS[method].pattern)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 10))
    batch = torch.randn(4, 3, 8, 8), torch.arange(4)
    masking = build_masking(args, model, script.build_optimizer(args, model), 4, lambda: [batch])
    for _ in range(4):
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        masking.step()
    masking.check()
    assert masking.total_nonzero == round(0.2 * 3096) or method == "srigl"
    assert masking.density == pytest.approx(0.2, abs=0.005)


@pytest.mark.slow
@pytest.mark.parametrize("method", OF_SGD)
def test_every_method_runs(method, folder, tmp_path):
    often = ("--prune-every-k-steps", "2") if METHODS[method].prune_every_k_steps else ()
    args = script.parse_arguments(arguments(folder, tmp_path, "--method", method, "--epochs", "2", *often))
    assert args.prune_rate == METHODS[method].prune_rate
    path = script.run(args).path
    saved = torch.load(path / "checkpoint.pt")
    layers = saved["mask"]["layers"]
    assert all(not saved["model"][name][~layer["mask"]].any() for name, layer in layers.items())
    active, size = (sum(count(layer["mask"]) for layer in layers.values()) for count in (torch.sum, torch.numel))
    assert int(active) == round(args.density * size) or method == "srigl"
    assert active / size == pytest.approx(args.density, rel=0.03)


def parsed(*given):
    return script.parse_arguments(["data", *given])


def test_recipes_are_those_of_the_papers():
    baseline, tuned = parsed("--recipe", "baseline"), parsed("--recipe", "tuned")
    assert (baseline.epochs, baseline.decay_epochs, baseline.warmup, baseline.stride_in) == (
        100,
        [30, 60, 90],
        0,
        "1x1",
    )
    assert (tuned.epochs, tuned.decay_epochs, tuned.warmup, tuned.stride_in) == (90, [30, 60, 80], 5, "3x3")
    assert (tuned.label_smoothing, baseline.label_smoothing) == (0.1, 0)
    assert baseline.lr == tuned.lr == 0.1
    assert baseline.prune_rate == tuned.prune_rate == 0.2


def test_flags_override_the_recipe_and_a_short_run_keeps_its_shape():
    args = parsed("--recipe", "tuned", "--epochs", "9", "--label-smoothing", "0", "--bn-weight-decay")
    assert args.warmup == 0.5
    assert args.decay_epochs == pytest.approx([3, 6, 8])
    assert args.label_smoothing == 0
    assert args.bn_weight_decay
    assert parsed("--epochs", "9", "--decay-epochs", "2", "4").decay_epochs == [2, 4]
    given = parsed("--epochs", "9", "--warmup", "5", "--decay-epochs", "30", "60", "80")
    assert (given.warmup, given.decay_epochs) == (5, [30, 60, 80]), "what is given is not scaled"
    first = ("--recipe", "baseline", "--dense-layers", "conv1", "*.downsample.*")
    assert parsed(*first, "--arch", "torchvision:resnet50").dense_layers == ["conv1", "*.downsample.*"]


def test_the_learning_rate_warms_up_and_falls():
    args = parsed("--epochs", "90", "--batch-size", "512")
    factor = script.learning_rate(args, steps_per_epoch=10)
    assert [factor(step) for step in (0, 24, 49, 50, 299)] == pytest.approx([0.02, 0.5, 1, 1, 1])
    assert [factor(step) for step in (300, 600, 800, 899)] == pytest.approx([0.1, 0.01, 0.001, 0.001])
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    conv, rest = script.build_optimizer(args, model).param_groups
    assert (conv["lr"], conv["weight_decay"], rest["weight_decay"]) == (0.2, 1e-4, 0)


def masking_of(args, model):
    """Return the Masking that the script would build, for a training of 100 steps."""
    density = script.density_of_masked(args, model) if args.density_of == "network" else args.density
    return build_masking(args, model, script.build_optimizer(args, model), 100, density=density)


@pytest.mark.parametrize(("density", "millions"), [(0.1, 5.1), (0.2, 7.4)])
def test_the_baseline_keeps_first_and_downsampling_convolutions_dense(density, millions):
    # Millions of parameters: the dense convolutions come on top of the sparse layers' tenth and fifth.
    args = parsed("--recipe", "baseline", "--density", str(density))
    model = script.build_model(args, 1000)
    masking = masking_of(args, model)
    left = sum(parameter.numel() for parameter in model.parameters()) - masking.total_zero
    assert left / 1e6 == pytest.approx(millions, abs=0.05)
    dense = {name for name, weight in model.named_parameters() if weight.dim() > 1 and name not in masking.masks}
    assert dense == {"conv1.weight", *(f"layer{i}.0.downsample.0.weight" for i in range(1, 5))}


def baseline_masking(*given):
    """Return the Masking of ResNet-50 by the baseline recipe, and the network's number of parameters."""
    args = parsed("--recipe", "baseline", *given)
    model = script.build_model(args, 1000)
    return masking_of(args, model), sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("density", [0.2, 0.5])
def test_a_density_of_the_network_counts_what_stays_dense(density):
    masking, parameters = baseline_masking("--density", str(density), "--density-of", "network")
    assert parameters - masking.total_zero == round(density * parameters)
    masking, parameters = baseline_masking("--density", str(density), "--density-of", "network", "--dense-layers")
    assert parameters - masking.total_zero == round(density * parameters), "all layers sparse"


def test_the_uniform_distribution_of_rigl_keeps_the_first_convolution_dense():
    uniform = ("--sparse-init", "uniform", "--dense-layers", "--density", "0.2")
    masking, _ = baseline_masking(*uniform)
    assert "conv1.weight" not in masking.masks
    assert all(abs(layer.nonzeros - 0.2 * layer.mask.numel()) <= 1 for layer in masking.layers)
    masking, parameters = baseline_masking(*uniform, "--density-of", "network")
    assert parameters - masking.total_zero == round(0.2 * parameters)


def test_parameters_are_masked_that_sparse_layers_names():
    args = parsed("--recipe", "tuned", "--sparse-layers", "*A_log", "--density-of", "network", "--density", "0.5")
    model = nn.Sequential(nn.Linear(6, 4))
    model[0].A_log = nn.Parameter(torch.ones(6, 4))
    masking = masking_of(args, model)
    assert list(masking.masks) == ["0.weight", "0.A_log"]
    assert 52 - masking.total_zero == 26


def test_a_density_of_the_network_that_the_dense_layers_exceed_is_refused():
    tenth = ("--density", "0.1", "--density-of", "network")
    with pytest.raises(ValueError, match=r"--density 0\.1 of the network .* layers that stay dense are 0\.1108 of it"):
        baseline_masking(*tenth)
    with pytest.raises(ValueError, match=r"are 0\.1910 of it"):
        baseline_masking(*tenth, "--dense-layers", "conv1", "*.downsample.*", "fc")
    with pytest.raises(ValueError, match=r"are 1\.0000 of it"):
        baseline_masking(*tenth, "--dense-layers", "*")


@pytest.mark.parametrize("recipe", ["baseline", "tuned"])
def test_resnet50_takes_a_step(recipe):
    args = parsed("--recipe", recipe, "--density", "0.1")
    model = script.build_model(args, 10)
    masking = masking_of(args, model)
    active = masking.total_nonzero
    nn.functional.cross_entropy(model(torch.randn(2, 3, 64, 64)), torch.tensor([1, 2])).backward()
    masking.step()
    masking.at_end_of_epoch()
    assert masking.total_nonzero == active


def test_networks_of_torchvision_and_timm_are_built(tmp_path):
    model = script.build_model(parsed("--arch", "torchvision:mobilenet_v3_small"), 7)
    assert model(torch.ones(2, 3, 64, 64)).shape == (2, 7)
    auxiliary = script.build_model(parsed("--arch", "torchvision:googlenet"), 7)
    assert auxiliary.train()(torch.ones(2, 3, 64, 64)).shape == (2, 7), "one output in training too"
    pytest.importorskip("timm")
    args = parsed("--arch", "timm:vit_tiny_patch16_224", "--recipe", "baseline")
    model = script.build_model(args, 7)
    assert "blocks.0.attn.qkv.weight" in masking_of(args, model).masks
    assert args.dense_layers == []


def test_a_network_that_is_no_classifier_is_refused(monkeypatch):
    torchvision = pytest.importorskip("torchvision")
    monkeypatch.setattr(torchvision.models, "get_model", lambda *_, **__: nn.Conv2d(3, 7, 1))
    with pytest.raises(USER_ERRORS, match=r"torchvision:fcn is no classifier: it gives no logits of shape \[N, 7"):
        script.build_model(parsed("--arch", "torchvision:fcn"), 7)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--arch", "resnet51"], "argument -a/--arch: expected resnet18, .*, torchvision:NAME or timm:NAME, got"),
        (["--batch-size", "10", "--accumulate", "4"], "10 cannot be divided evenly among 1 processes x 4 parts"),
        (["--fsdp"], "--fsdp shards among processes: start it with torchrun"),
        (["--static-loss-scale", "0"], "--static-loss-scale expects a number above 0"),
        (["--data", "elsewhere"], "argument --data: not allowed with argument DIR"),
        (["--arch", "resnet34", "--stride-in", "1x1"], "the blocks of resnet34 have none: leave it out"),
        (["--density-of", "network", "--layer-density", "fc=0.3"], "--density-of network and --layer-density exclude"),
    ],
)
def test_mistakes_end_in_one_line(given, message, capsys):
    with pytest.raises(SystemExit) as exit_:
        parsed(*given)
    assert exit_.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("main.py: error: ")
    assert re.search(message, line)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--arch", "torchvision:resnet1"], "--arch torchvision:resnet1 cannot be built for images of 32x32: Unknown"),
        (["--batch-size", "32"], "--batch-size 32 is more than the 16 images of"),
    ],
)
def test_mistakes_that_show_later_are_one_line_too(folder, tmp_path, given, message):
    with pytest.raises(USER_ERRORS, match=message):
        train(folder, tmp_path, *given)


@pytest.mark.long
def test_torchrun_starts_it(folder, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    given = arguments(folder, tmp_path, "--epochs", "1", "--device", "cpu")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        [*torchrun, str(SCRIPT), *given], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "2 processes on cpu, 2 steps an epoch" in done.stdout
    assert done.stdout.count("epoch 1") == 1, "one process speaks"
    assert len(list(tmp_path.iterdir())) == 1
