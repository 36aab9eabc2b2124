"""A script written for release 1.0 runs without a change: its imports, arguments, loop and functions."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from data_files import write_cifar_records, write_mnist
from helpers import assert_masks_hold, masked, mlp, train
from script import ROOT
from torch import nn

from sparselearning import CosineDecay, LinearDecay, Masking, network_wide, utils
from sparselearning.functions import FunctionError
from sparselearning.models import VGG16, AlexNet, LeNet_5_Caffe, LeNet_300_100, WideResNet

SCRIPT = """
import argparse, os
import torch
import torch.nn.functional as F
import sparselearning
from sparselearning.core import Masking, CosineDecay, LinearDecay
from sparselearning.models import AlexNet, VGG16, LeNet_300_100, LeNet_5_Caffe, WideResNet
from sparselearning.utils import get_mnist_dataloaders, get_cifar10_dataloaders, plot_class_feature_histograms
from variances import by_magnitude_and_variance, by_variance

parser = argparse.ArgumentParser()
parser.add_argument("--batch-size", type=int, default=10)
parser.add_argument("--test-batch-size", type=int, default=10)
parser.add_argument("--max-threads", type=int, default=10)
parser.add_argument("--data", default="mnist")
parser.add_argument("--model", default="lenet5")
parser.add_argument("--optimizer", default="sgd")
parser.add_argument("--save-model", default="./models/model.pt")
parser.add_argument("--decay-schedule", default="cosine")
parser.add_argument("--resume")
sparselearning.core.add_sparse_args(parser)
args = parser.parse_args()

if not os.path.exists("./models"): os.mkdir("./models")
if args.data == "mnist":
    train_loader, valid_loader, test_loader = get_mnist_dataloaders(args, validation_split=0.1)
else:
    train_loader, valid_loader, test_loader = get_cifar10_dataloaders(args, 0.1, max_threads=args.max_threads)
models = {"lenet5": (LeNet_5_Caffe, []), "lenet300-100": (LeNet_300_100, []), "alexnet-s": (AlexNet, ["s", 10])}
network, settings = models[args.model]
model = network(*(settings + [False, False]))
if args.prune == "magnitude_variance":
    args.prune, args.optimizer = by_magnitude_and_variance, "adam"
if args.redistribution == "variance":
    args.redistribution, args.optimizer = by_variance, "adam"
if args.optimizer == "sgd":
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
else:
    optimizer = torch.optim.Adam(model.parameters(), lr=0.001)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 25000, gamma=0.1)
if args.resume:
    model.load_state_dict(torch.load(args.resume)["state_dict"])
    model.feats = []
    plot_class_feature_histograms(args, model, "cpu", train_loader, optimizer)
mask = None
if not args.dense:
    kind = CosineDecay if args.decay_schedule == "cosine" else LinearDecay
    mask = Masking(optimizer, kind(args.prune_rate, len(train_loader) * 2), prune_rate=args.prune_rate,
                   prune_mode=args.prune, growth_mode=args.growth, redistribution_mode=args.redistribution,
                   verbose=args.verbose, fp16=False)
    mask.add_module(model, density=args.density)
for epoch in (1, 2):
    model.train()
    for data, target in train_loader:
        scheduler.step()
        optimizer.zero_grad()
        F.nll_loss(model(data), target).backward()
        mask.step() if mask is not None else optimizer.step()
    torch.save({"state_dict": model.state_dict(), "optimizer": optimizer.state_dict()}, args.save_model)
    if mask is not None and epoch < 2:
        mask.at_end_of_epoch()
        mask.print_nonzero_counts()
model.eval()
for data, target in test_loader:
    model.t = target
    print(model(data).shape)
"""
FUNCTIONS = """
import math
import torch

def by_variance(masking, name, weight, mask):
    return torch.sqrt(masking.optimizer.state[weight]["exp_avg_sq"])[mask.byte()].mean().item()

def by_magnitude_and_variance(masking, mask, weight, name):
    steadiness = 1.0 / torch.sqrt(masking.optimizer.state[weight]["exp_avg_sq"])
    count = math.ceil(masking.name2prune_rate[name] * masking.name2nonzeros[name])
    if count == 0.0: return weight.data != 0.0
    score = (steadiness / steadiness[mask.byte()].max().item()) * torch.abs(weight.data) * mask
    score[mask == 0] = 0.0
    _, order = torch.sort(score.view(-1))
    mask.data.view(-1)[order[: math.ceil(masking.name2zeros[name] + count)]] = 0.0
    return mask
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Return a folder with the script and its functions; one of MNIST is beside it, as in release 1.0."""
    folder = tmp_path_factory.mktemp("of_1_0")
    (folder / "mnist_cifar").mkdir()
    (folder / "mnist_cifar" / "main.py").write_text(SCRIPT)
    (folder / "mnist_cifar" / "variances.py").write_text(FUNCTIONS)
    write_mnist(folder / "data", train=100, test=20)
    write_cifar_records(folder / "mnist_cifar" / "_dataset", count=20)
    return folder / "mnist_cifar"


def call(place, *argv):
    environment = {name: text for name, text in os.environ.items() if name != "SPARSELEARNING_DATA"}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "main.py", *argv]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.parametrize(
    "argv",
    [
        "--model lenet5 --prune magnitude_variance --redistribution variance --verbose",
        "--model lenet300-100 --growth random --prune SET --redistribution nonzeros --decay-schedule linear",
        "--data cifar --model alexnet-s --growth momentum_neuron --redistribution none --density 0.1",
    ],
)
def test_the_script_runs(place, argv):
    said = call(place, *argv.split())
    assert "Active weights: " in said  # print_nonzero_counts prints
    assert "torch.Size([10, 10])" in said


@pytest.mark.long
def test_the_script_goes_on_from_its_checkpoint(place):
    call(place, "--model", "lenet5")
    call(place, "--model", "lenet5", "--resume", "./models/model.pt")
    seen = np.load(place / "results" / "alexnet_sparse_feat_data_layer_1.npy")
    assert seen.ndim == 1
    assert ((seen >= 0.1) & (seen <= 1)).all()


def test_a_name_without_a_function_is_refused_by_the_masking():
    with pytest.raises(ValueError, match=r"Unknown prune_mode 'magnitude_variance'. Pass a function, or one of"):
        Masking(torch.optim.SGD(mlp(3, 4).parameters(), 0.1, 0.9), None, prune_mode="magnitude_variance")


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (lambda: LeNet_300_100(None, False), 266_610),
        (lambda: LeNet_5_Caffe(), 431_080),
        (lambda: AlexNet("s", 10), 5_077_066),
        (lambda: AlexNet("b", 10, False, False), 8_501_322),
        (lambda: VGG16("C"), 11_323_466),
        (lambda: VGG16("D", 10), 15_255_626),
        (lambda: VGG16("like", 10, False, False), 14_991_946),
        (lambda: WideResNet(28, 2, 10, 0.3), 1_467_610),
    ],
)
def test_the_networks_have_their_names_and_sizes(network, parameters):
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in network().parameters()) == parameters


def test_models_without_features_and_bench_say_what_has_them():
    with pytest.raises(ValueError, match=r"Models have no part in --save-features any more: mnist_cifar/main\.py"):
        LeNet_5_Caffe(True)
    with pytest.raises(ValueError, match=r"--bench"):
        VGG16("D", 10, False, True)


def test_loaders_have_the_length_of_their_passes(monkeypatch, tmp_path):
    monkeypatch.setenv("SPARSELEARNING_DATA", str(tmp_path))
    write_mnist(tmp_path)

    class Arguments:
        batch_size, test_batch_size = 4, 5

    train_loader, valid_loader, test_loader = utils.get_mnist_dataloaders(Arguments, 0.1)
    assert [len(loader) for loader in (train_loader, valid_loader, test_loader)] == [7, 1, 2]
    first, second = (torch.cat([labels for _, labels in train_loader]) for _ in range(2))
    assert len(first) == 27
    assert not torch.equal(first, second)  # shuffled anew
    assert utils.get_mnist_dataloaders(Arguments)[1] is None


# Schedules


@pytest.mark.parametrize("decay", [CosineDecay(0.5, 10), LinearDecay(0.5, 10)])
def test_a_schedule_that_is_stepped_tells_its_rate(decay):
    rates = [decay.get_dr(0.5)]
    for _ in range(12):
        decay.step()
        rates.append(decay.get_dr(rates[-1]))
    assert rates == [decay(step) for step in range(13)]


class Halving:
    """A schedule as users wrote it for 1.0."""

    def __init__(self):
        self.factor = 1.0

    def step(self):
        self.factor = 0.5

    def get_dr(self, prune_rate):
        return prune_rate * self.factor


class HalvingCosine(CosineDecay):
    """One that derives from the library's."""

    def step(self):
        pass

    def get_dr(self, prune_rate):
        return prune_rate * 0.5


@pytest.mark.parametrize("decay", [Halving(), HalvingCosine(0.8, 10)])
def test_an_own_schedule_is_stepped_once_a_step(decay):
    model = mlp(20, 30, 10)
    masking = masked(model, prune_rate_decay=decay, prune_rate=0.8)
    for expected in (0.8, 0.4, 0.2, 0.1):
        assert masking.prune_rate == masking.prune_rate == pytest.approx(expected)
        train(model, masking, 1)
    before = masking.total_nonzero
    masking.at_end_of_epoch()
    assert masking.total_removed == math.ceil(0.05 * 120) + math.ceil(0.05 * 60)
    assert masking.total_nonzero == before


# Functions for the whole network


def below_a_threshold(masking):
    """Search the threshold with the names that 1.0's masks had for it, write into the masks, return a number."""
    wanted = math.ceil(0.2 * masking.baseline_nonzero)
    for _ in range(200):
        removed = sum(
            masking.name2nonzeros[name] - (weight.data.abs() > masking.prune_threshold).sum().item()
            for module in masking.modules
            for name, weight in module.named_parameters()
            if name in masking.masks
        )
        if abs(removed - wanted) <= masking.tolerance * wanted:
            break
        masking.prune_threshold *= 1 + masking.increment if removed < wanted else 1 - masking.increment
        masking.increment *= 0.99
    for module in masking.modules:
        for name, weight in module.named_parameters():
            if name in masking.masks:
                masking.masks[name][:] = weight.data.abs() > masking.prune_threshold
    return int(removed)


def anywhere(masking, total_regrowth):
    """Grow in the first layers that have room."""
    left = total_regrowth
    for name in masking.names:
        free = torch.nonzero(masking.masks[name].flatten() == 0).flatten()[:left]
        masking.masks[name].view(-1)[free] = 1.0
        left -= len(free)
    return total_regrowth - left


def test_marked_functions_write_into_the_masks_and_return_a_number():
    model = mlp(20, 30, 10)
    masking = masked(model, prune_mode=network_wide(below_a_threshold), growth_mode=network_wide(anywhere))
    train(model, masking, 3)
    masking.at_end_of_epoch()
    assert_masks_hold(masking)
    assert masking.total_removed == pytest.approx(0.2 * 180, abs=5)
    assert masking.total_nonzero == masking.baseline_nonzero == 180


@pytest.mark.parametrize(("argument", "function"), [("prune_mode", lambda m: 3), ("growth_mode", lambda m, total: 3)])
def test_functions_without_the_mark_get_the_hint(argument, function):
    with pytest.raises(FunctionError, match=r"It treats all layers at once: mark it with @network_wide"):
        masked(mlp(20, 30), **{argument: function})


def test_other_wrong_signatures_get_no_hint():
    with pytest.raises(FunctionError, match=r"cannot be called as") as raised:
        masked(mlp(20, 30), prune_mode=lambda one, two: one)
    assert "network_wide" not in str(raised.value)


# What else a Masking is asked


def test_the_attributes_of_1_0_are_there():
    model = mlp(20, 30, 10)
    masking = masked(model)
    assert masking.names == ["fc1.weight", "fc2.weight"]
    assert masking.prune_func is masking.prune
    assert masking.growth_func is masking.grow
    assert masking.redistribution_func is masking.measure
    assert (masking.half, masking.name_to_32bit) == (False, {})
    assert (masking.growth_threshold, masking.growth_increment, masking.increment) == (0.001, 0.2, 0.2)
    masking.remove_weight_partial_name("fc1", verbose=True)
    masking.remove_type(nn.Conv2d, verbose=True)
    assert masking.names == ["fc2.weight"]


def test_print_nonzero_counts_prints_and_verbose_logs(capsys, caplog):
    caplog.set_level("INFO")
    masked(mlp(20, 30), verbose=True)
    assert capsys.readouterr().out == ""
    assert "fc1.weight: 120 of 600 active, density 0.2000" in caplog.text
    masked(mlp(20, 30)).print_nonzero_counts()
    said = capsys.readouterr().out
    assert said == "fc1.weight: 120 of 600 active, density 0.2000\nPrune rate: 0.5000. Active weights: 120.\n"
