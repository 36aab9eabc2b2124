"""mnist_cifar/main.py: what a run leaves, that it repeats and resumes exactly, and that every flag does its work."""

import io
import logging
import os
import re
import sys

import apex_stand_in
import numpy as np
import pytest
import torch
from data_files import write_cifar_records, write_mnist
from script import (
    assert_equal,
    assert_same_run,
    checkpoint_of,
    load_main,
    metrics_of,
    run_folder,
    runner,
    type_command,
    without_times,
)

from sparselearning.compact import expanded
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.prune import PRUNE_FUNCTIONS
from sparselearning.redistribute import REDISTRIBUTION_FUNCTIONS
from sparselearning.sparse import available

TEST_LINE = r"Test evaluation: Average loss: \d+\.\d{4}, Accuracy: (\d+)/(\d+) \(\d+\.\d{3}%\)"
DIGITS = ("--data", "digits", "--epochs", "3", "--device", "cpu")
main = load_main()


@pytest.fixture
def run(tmp_path, monkeypatch, caplog):
    """Make a run on the digits in this process, without its pictures; return its folder."""
    return runner(main, tmp_path, monkeypatch, caplog, *DIGITS, "--max-threads", "1")


@pytest.fixture(scope="module")
def typed(tmp_path_factory):
    """A run typed in another folder than the script's: the process and the run folder."""
    place = tmp_path_factory.mktemp("elsewhere")
    process = type_command(*DIGITS, cwd=place)
    return process, run_folder(place / "runs")


def active_weights(folder):
    """Active weights per epoch."""
    return [record["active_weights"] for record in metrics_of(folder) if "epoch" in record]


def assert_trained(folder, density=0.05, weights=266_200):
    """All epochs are there, the network kept its weights, and no inactive one is other than zero."""
    metrics = metrics_of(folder)
    assert [record.get("epoch") for record in metrics] == [1, 2, 3, None]
    assert active_weights(folder) == [round(density * weights)] * 3
    assert metrics[2]["train_loss"] < metrics[0]["train_loss"]
    saved = checkpoint_of(folder)
    for name, layer in saved["mask"]["layers"].items():
        assert not saved["model"][name][~layer["mask"]].any()


# What a run leaves


def test_a_run_ends_with_the_test_line(typed):
    process, _ = typed
    assert (process.returncode, process.stderr) == (0, "")
    found = re.fullmatch(TEST_LINE, process.stdout.splitlines()[-1])
    assert found
    assert found[2] == "359"


def test_a_run_leaves_its_files(typed):
    process, folder = typed
    files = {"args.json", "log.txt", "metrics.jsonl", "curves.png", "density.png", "checkpoint.pt", "checkpoint.1.pt"}
    assert {path.name for path in folder.iterdir()} == files
    assert re.fullmatch(r"digits-lenet300-100-0\.05-17-[0-9a-f]{8}", folder.name)
    assert (folder / "log.txt").read_text() == process.stdout
    for picture in ("curves.png", "density.png"):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
    assert_trained(folder)


def test_a_run_says_per_epoch_what_happened(typed):
    process, _ = typed
    epochs = [line for line in process.stdout.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 3
    for words in ("train loss", "valid accuracy", "lr 0.1", "prune rate", "density 0.05", "seconds"):
        assert words in epochs[0]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.long
def test_a_bar_is_shown_on_a_terminal(run, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    log = run("--log-interval", "1") / "log.txt"
    assert "epoch 1:" in sys.stderr.getvalue()
    assert "epoch 1:" not in log.read_text()


# Runs repeat


def test_the_same_seed_gives_the_same_run(typed, run):
    _, expected = typed
    folder = run()
    assert folder.name == expected.name
    assert_same_run(folder, expected)


@pytest.mark.long
def test_iters_are_runs_of_their_own_with_further_seeds(typed, run, tmp_path):
    with pytest.raises(ValueError, match="too many values"):
        run("--iters", "2")
    first, second = sorted((tmp_path / "runs").iterdir(), key=lambda folder: folder.name.split("-")[-2])
    assert [folder.name.split("-")[-2] for folder in (first, second)] == ["17", "18"]
    alone = run("--seed", "18", place="alone")
    assert without_times(metrics_of(first)) == without_times(metrics_of(typed[1]))
    assert without_times(metrics_of(second)) == without_times(metrics_of(alone))
    assert metrics_of(first)[0]["train_loss"] != metrics_of(second)[0]["train_loss"]


def test_a_second_run_keeps_the_first(run, tmp_path):
    folder = run("--epochs", "1")
    before = (folder / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="too many values"):
        run("--epochs", "1")
    assert (tmp_path / "runs" / f"{folder.name}.1" / "metrics.jsonl").read_bytes() == before


# Resuming


@pytest.fixture
def interrupt(monkeypatch):
    """Make a run that is interrupted in its third epoch."""

    def interrupt(run, *argv):
        epochs, train_epoch = [], main.train_epoch

        def train_two(*arguments, **more):
            epochs.append(len(epochs) + 1)
            if len(epochs) == 3:
                raise KeyboardInterrupt
            return train_epoch(*arguments, **more)

        with monkeypatch.context() as patch:
            patch.setattr(main, "train_epoch", train_two)
            with pytest.raises(SystemExit):
                run(*argv)

    return interrupt


@pytest.mark.parametrize(
    "modes",
    [
        "",
        "--optimizer adam --lr 0.001 --growth random",
        "--dense",
        "--prune threshold",
        "--growth random --density 0.1 --lr 0.05 --sparse-init linear",
        "--sparse-init snip --layer-density fc1=0.02 --dense-layers last",
    ],
)
def test_a_run_resumed_by_its_folder_alone_is_bitwise_the_uninterrupted_one(
    run, interrupt, tmp_path, monkeypatch, modes
):
    whole = run(*modes.split(), place="whole")
    interrupt(run, *modes.split())
    folder = run_folder(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    torch.rand(7)
    main.main(["--resume", str(folder)])
    assert sorted(os.listdir()) == ["runs", "whole"]
    assert run_folder(tmp_path / "runs") == folder
    assert_same_run(folder, whole)


@pytest.mark.parametrize("init", ["snip", "grasp", "synflow", "magnitude:erdos_renyi_kernel"])
def test_a_run_begins_with_scores_before_training(run, init):
    folder = run("--sparse-init", init, "--epochs", "1")
    assert active_weights(folder) == [13310]
    layers = checkpoint_of(folder)["mask"]["layers"].values()
    assert all(layer["mask"].any() for layer in layers)


@pytest.mark.long
def test_a_run_begins_with_the_masks_of_another(run, tmp_path):
    first = run("--sparse-init", "synflow", "--epochs", "1", "--density", "0.1", place="first")
    masks = {name: layer["mask"] for name, layer in checkpoint_of(first)["mask"]["layers"].items()}
    torch.save(masks, tmp_path / "masks.pt")
    for place, source in (("second", first / "checkpoint.pt"), ("third", tmp_path / "masks.pt")):
        folder = run("--sparse-init", f"mask:{source}", "--epochs", "1", place=place)
        layers = checkpoint_of(folder)["mask"]["layers"]
        assert_equal({name: layer["mask"] for name, layer in layers.items()}, masks)


def test_flops_are_those_of_the_densities(run):
    first, *_, last = metrics_of(run("--growth", "random", "--density", "0.1"))
    assert [first["inference_flops"], first["training_flops"]] == pytest.approx([0.1, 0.1])
    assert last["training_flops"] == pytest.approx(0.1)
    first, *_, last = metrics_of(run("--dense", place="dense"))
    assert first["inference_flops"] == last["training_flops"] == 1


@pytest.mark.parametrize("more", [(), ("--method", "gmp", "--prune-every-k-steps", "10")], ids=["constant", "falls"])
def test_layers_have_densities_of_their_own(run, more):
    folder = run("--epochs", "2", "--layer-density", "fc1=0.02", "--dense-layers", "fc3", *more)
    densities = metrics_of(folder)[1]["density_per_layer"]
    assert densities == {"fc1.weight": 4704 / 235200, "fc2.weight": 1500 / 30000}


def test_densities_by_layer_are_those_of_a_run_that_was_interrupted(run, interrupt, tmp_path):
    argv = ("--layer-density", "fc1=0.02", "--prune", "adaptive_threshold")
    whole = run(*argv, place="whole")
    interrupt(run, *argv)
    assert_same_run(run("--resume", run_folder(tmp_path / "runs"), place="goes on"), whole)


@pytest.mark.filterwarnings("ignore:.* weights are not zero")
def test_a_run_that_began_from_a_checkpoint_goes_on(run, interrupt, tmp_path):
    save_release_1_0(tmp_path / "old.pt")
    argv = ("--sparse-init", "resume", "--resume", tmp_path / "old.pt")
    whole = run(*argv, place="whole")
    interrupt(run, *argv)
    assert_same_run(run("--resume", run_folder(tmp_path / "runs"), place="goes on"), whole)


def test_a_finished_run_is_evaluated_again_and_not_doubled(run):
    folder = run()
    before = metrics_of(folder)
    assert run("--resume", folder / "checkpoint.pt") == folder
    assert metrics_of(folder) == before


def test_a_longer_run_has_a_folder_of_its_own(run):
    folder = run()
    longer = run("--epochs", "4", "--resume", folder, place="longer")
    assert [record.get("epoch") for record in metrics_of(longer)] == [1, 2, 3, 4, None]
    assert without_times(metrics_of(longer)[:3]) == without_times(metrics_of(folder)[:3])


# Every flag


def kept(mode):
    """The arguments that functions need which compare inactive weights."""
    return ["--inactive", "kept"] if "dense_magnitude" in mode else []


@pytest.mark.parametrize("prune", PRUNE_FUNCTIONS)
def test_every_pruning_function_trains(run, prune):
    assert_trained(run("--prune", prune, *kept(prune)))


@pytest.mark.parametrize("growth", GROWTH_FUNCTIONS)
def test_every_growth_function_trains(run, growth):
    assert_trained(run("--growth", growth, *kept(growth)))


@pytest.mark.parametrize("redistribution", REDISTRIBUTION_FUNCTIONS)
def test_every_redistribution_function_trains(run, redistribution):
    assert_trained(run("--redistribution", redistribution))


@pytest.mark.parametrize("sparse_init", ["linear", "erdos_renyi_kernel"])
def test_every_distribution_trains(run, sparse_init):
    assert_trained(run("--sparse-init", sparse_init, "--density", "0.1"), density=0.1)


def test_extensions_train(run):
    adam = ("--optimizer", "adam", "--lr", "0.001")
    assert_trained(run(*adam, "--prune", "magnitude_variance", "--redistribution", "variance"))


def test_own_functions_train(run, tmp_path):
    (tmp_path / "my.py").write_text(
        "import numpy as np\n"
        "import torch\n"
        "from sparselearning.selection import add_highest, drop_lowest\n"
        "def prune(masking, mask, weight, name):\n"
        "    return drop_lowest(weight.abs(), mask, int(0.3 * masking.name2nonzeros[name]))\n"
        "def redistribute(masking, name, weight, mask):\n"
        "    return weight.std()\n"
        "def grow(masking, name, new_mask, total_regrowth, weight):\n"
        "    score = torch.from_numpy(np.random.rand(*weight.shape))\n"
        "    return add_highest(score, new_mask, total_regrowth)\n"
    )
    own = [f"--{flag}={tmp_path}/my.py:{name}" for flag, name in
           [("prune", "prune"), ("redistribution", "redistribute"), ("growth", "grow")]]  # fmt: skip
    folder = run(*own)
    assert_trained(folder)
    assert_equal(checkpoint_of(run(*own, place="again"))["mask"], checkpoint_of(folder)["mask"])


def test_old_spellings_mean_the_same_run(run):
    old = run("--sparse", "--death", "SET", "--death-rate", "0.4")
    assert old.name == run("--prune", "SET", "--prune-rate", "0.4", place="new").name


def test_dense(run):
    folder = run("--dense")
    assert folder.name.startswith("digits-lenet300-100-1-17-")
    assert active_weights(folder) == [266_200] * 3
    assert "density_per_layer" not in metrics_of(folder)[0]
    assert "mask" not in checkpoint_of(folder)
    assert all(weight.all() for name, weight in checkpoint_of(folder)["model"].items() if "weight" in name)


def test_decay_schedules(run):
    rates = {
        schedule: [record.get("prune_rate") for record in metrics_of(run("--decay-schedule", schedule, place=schedule))]
        for schedule in ("cosine", "linear")
    }
    assert rates["linear"][:3] == pytest.approx([1 / 3, 1 / 6, 0])
    assert rates["cosine"][:3] == pytest.approx([0.37625, 0.12875, 0.005])


def test_decay_frequency_counts_steps(run):
    folder = run("--decay_frequency", "13")  # 13 steps are an epoch
    assert [record["lr"] for record in metrics_of(folder)[:3]] == pytest.approx([0.01, 0.001, 0.0001])
    assert [record["steps"] for record in metrics_of(folder)[:3]] == [13, 26, 39]


def test_l1_shrinks_the_weights(run):
    def size(folder):
        return sum(weight.abs().sum() for name, weight in checkpoint_of(folder)["model"].items() if "weight" in name)

    assert size(run("--l1", "1e-3", place="l1")) < 0.5 * size(run())


def test_valid_split_of_zero_leaves_no_validation(run):
    metrics = metrics_of(run("--valid_split", "0"))
    assert "valid_loss" not in metrics[0]
    assert metrics[0]["steps"] == 15  # all 1,438 images


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # a skipped first step
def test_mixed_precision_trains(run, amp):
    folder = run("--amp", amp, place=amp)
    assert_trained(folder)
    saved = checkpoint_of(folder)
    assert saved["model"]["fc1.weight"].dtype == torch.float32
    assert ("scale" in saved["precision"]) == (amp == "fp16")


def test_fp16_without_apex_says_what_it_does(run):
    folder = run("--fp16", "--epochs", "1")
    assert "fp16 by torch.amp, for Apex is not installed" in (folder / "log.txt").read_text()
    assert checkpoint_of(folder)["precision"]["scale"] > 0


@pytest.fixture
def apex(monkeypatch):
    apex_stand_in.install(monkeypatch)


@pytest.mark.long
@pytest.mark.usefixtures("apex")
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")
def test_fp16_with_apex_trains_and_resumes(run, interrupt, tmp_path):
    folder = run("--fp16", place="whole")
    assert "fp16 by Apex" in (folder / "log.txt").read_text()
    assert_trained(folder)
    saved = checkpoint_of(folder)
    assert saved["model"]["fc1.weight"].dtype == torch.float16
    master = saved["precision"]["masters"][0][0]
    assert master.dtype == torch.float32
    assert torch.equal(master.half(), saved["model"]["fc1.weight"])
    interrupt(run, "--fp16")
    assert_same_run(run("--fp16", "--resume", run_folder(tmp_path / "runs")), folder)


def test_verbose_logs_every_layer(run):
    log = (run("--verbose", "--growth", "random", "--redistribution", "none", "--epochs", "2") / "log.txt").read_text()
    assert "fc3.weight: 50 of 1000 active, density 0.0500" in log


# Measuring and saving a model


@pytest.fixture(params=[(), ("--compile",)], ids=["eager", "compiled"])
def measured(request, run, tmp_path, monkeypatch):
    """A run of lenet5 that saves its model and features and times its layers; compiled without a C++ compiler."""
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: eager(self))
    model = tmp_path / "models" / "of" / "mine.pt"  # whose folders are made
    flags = ("--save-features", "--bench", "--save-model", model)
    return run("--model", "lenet5", "--epochs", "1", *flags, *request.param), model


def eager(model, compile_=torch.nn.Module.compile):
    compile_(model, backend="eager")


@pytest.mark.long
def test_features_bench_and_model_are_kept(measured):
    folder, model = measured
    with np.load(folder / "features.npz") as seen:
        assert {name: seen[name].shape for name in seen.files} == {"relu1": (20, 10), "relu2": (50, 10)}
    log = (folder / "log.txt").read_text()
    assert re.search(r"conv2 +0\.0\d+ ", log)
    assert "ESTIMATES" in log
    assert re.search(r"Whole model on one batch.*: dense \d+\.\d+ ms, sparse", log) or not available()
    assert_equal(dict(torch.load(model)), dict(checkpoint_of(folder)["model"]))
    assert log.splitlines()[-1].startswith("Test evaluation: ")


@pytest.mark.slow
def test_a_compiled_run_trains(run):
    assert_trained(run("--compile"))


# Training on sparse kernels


@pytest.mark.skipif(not available(), reason="built without sparse kernels")
def test_all_layers_of_a_run_train_on_sparse_kernels(run, caplog):
    with caplog.at_level(logging.INFO):
        run("--sparse-backend", "cpu", "--model", "lenet5", "--epochs", "1")
    assert "4 of 4 layers train on sparse kernels." in caplog.text


@pytest.mark.skipif(not available(), reason="built without sparse kernels")
def test_sparse_kernels_train_resume_and_are_measured(run):
    begun = run("--sparse-backend", "cpu", "--epochs", "2", "--bench")
    assert "Whole model on one batch" in (begun / "log.txt").read_text()
    resumed = run("--resume", begun, "--epochs", "3", place="resumed")
    *epochs, _ = metrics_of(resumed)
    assert [record["epoch"] for record in epochs] == [1, 2, 3]
    assert len(set(active_weights(resumed))) == 1
    assert epochs[2]["train_loss"] < epochs[0]["train_loss"]


@pytest.mark.skipif(not available(), reason="built without sparse kernels")
def test_a_penalty_on_weights_acts_on_sparse_kernels(run):
    sums = []
    for l1 in (0, 0.01):
        ended = run("--sparse-backend", "cpu", "--epochs", "2", "--l1", l1, place=str(l1))
        weights = expanded(checkpoint_of(ended)["model"]).values()
        sums.append(sum(weight.abs().sum().item() for weight in weights if weight.dim() > 1))
    assert sums[1] < 0.5 * sums[0]


# Starting from weights that exist


def save_release_1_0(path, density=0.1):
    """Write a checkpoint of release 1.0 of a sparse lenet300-100; return its weights."""
    model = main.models.build("lenet300-100")
    with torch.no_grad():
        for weight in model.parameters():
            weight *= torch.rand_like(weight) < density
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    state = {"epoch": 7, "state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(state, path, _use_new_zipfile_serialization=False)
    return model.state_dict()


def test_nonzeros_of_a_checkpoint_of_release_1_0_are_the_masks(run, tmp_path):
    weights = save_release_1_0(tmp_path / "old.pt")
    with pytest.warns(UserWarning, match="all of them stay active"):
        folder = run("--sparse-init", "resume", "--resume", tmp_path / "old.pt")
    nonzeros = sum(int(weight.count_nonzero()) for name, weight in weights.items() if "weight" in name)
    assert active_weights(folder) == [nonzeros] * 3
    assert [record.get("epoch") for record in metrics_of(folder)] == [1, 2, 3, None]


def test_the_weights_of_a_checkpoint_after_an_update_are_filled_up(run):
    first = run(place="first")  # the masks moved after the second epoch, that of checkpoint.1.pt
    with pytest.warns(UserWarning, match=r"of 266200 weights are not zero, and a density of 0\.05 asks for 13310: "):
        folder = run("--sparse-init", "resume", "--resume", first / "checkpoint.1.pt")
    assert active_weights(folder) == [13_310] * 3


def test_nonzeros_of_a_saved_model_are_the_masks(run, tmp_path):
    run("--epochs", "1", "--save-model", tmp_path / "model.pt", place="first")
    folder = run("--sparse-init", "resume", "--resume", tmp_path / "model.pt")
    assert active_weights(folder) == [13_310] * 3


# The standard files of the data sets


def test_mnist_files_train(run, tmp_path):
    write_mnist(tmp_path / "data" / "MNIST" / "raw", train=60, test=20)
    folder = run("--data", "mnist", "--data-dir", tmp_path / "data", "--batch-size", "10")
    assert active_weights(folder) == [13_310] * 3
    assert (metrics_of(folder)[0]["steps"], metrics_of(folder)[-1]["test_total"]) == (6, 20)


@pytest.mark.long
def test_cifar_files_train_a_convolutional_network(run, tmp_path, monkeypatch):
    write_cifar_records(tmp_path / "data", count=20)
    monkeypatch.setenv("SPARSELEARNING_DATA", str(tmp_path / "data"))
    folder = run("--data", "cifar", "--model", "alexnet-s", "--batch-size", "30", "--epochs", "2")
    assert active_weights(folder) == [round(0.05 * 5_066_784)] * 2
    assert metrics_of(folder)[-1]["test_total"] == 20
