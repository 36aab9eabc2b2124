"""`--pretrained-weights`: files of other programs, other classifiers, and networks that only look the same."""

import argparse
import re
import sys

import pytest
import torch
from script import draw_nothing, small_network
from small import SMALL, parsed, script
from torch import nn
from torch.optim.swa_utils import AveragedModel

from sparselearning import checkpoint
from sparselearning.checkpoint import CheckpointError
from sparselearning.experiments.run.pretrained import heads_of, load_pretrained, stride_of
from sparselearning.models.resnet import RESNETS

REFERENCE = argparse.Namespace(model="resnet50", lr=0.1)  # torchvision's scripts save their arguments


@pytest.fixture(autouse=True)
def _small(monkeypatch):
    draw_nothing(monkeypatch)
    monkeypatch.setattr(script, "build_model", small_network)


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.pth"


def trained(classes=4):
    """A network whose weights are not those of a fresh one."""
    torch.manual_seed(3)
    return small_network(None, classes)


def prefixed(state, *prefixes):
    return {"".join(prefixes) + name: value for name, value in state.items()}


def in_between(state):
    """The names of a model whose second convolution alone was compiled."""
    return {name.replace("conv2.", "conv2._orig_mod."): value for name, value in state.items()}


def first_weights(given):
    """The weights that a run with these arguments begins with: it trains with a learning rate of zero, densely."""
    args = script.parse_arguments([*given, "--dense", "--lr", "0"])
    return torch.load(script.run(args).path / "checkpoint.pt", weights_only=True)["model"]


FILES = {
    "state_dict": lambda model, state: state,
    "ours": lambda model, state: {"model": state, "epoch": 3, "args": {"model": "resnet18", "stride_in": "3x3"}},
    "release 1.0": lambda model, state: {"state_dict": state, "epoch": 3, "best_prec1": torch.tensor(70.0)},
    "torchvision": lambda model, state: {"model": state, "optimizer": {"state": {}}, "args": REFERENCE, "epoch": 89},
    "pytorch": lambda model, state: {"arch": "resnet18", "state_dict": prefixed(state, "module."), "epoch": 89},
    "lightning": lambda model, state: {"state_dict": prefixed(state, "model."), "global_step": 5},
    "replicas": lambda model, state: prefixed(state, "module."),
    "compiled": lambda model, state: {"model": prefixed(state, "_orig_mod.")},
    "both": lambda model, state: {"state_dict": {"model": prefixed(state, "module.", "_orig_mod.")}},
    "both, the other way": lambda model, state: prefixed(state, "_orig_mod.", "module."),
    "in between": lambda model, state: in_between(state),
    "average": lambda model, state: {"model": AveragedModel(model).state_dict()},
    "FSDP": lambda model, state: prefixed(state, "_fsdp_wrapped_module."),
    "auxiliary": lambda model, state: state | {"aux1.fc.weight": torch.ones(4, 3), "AuxLogits.fc.bias": torch.ones(4)},
    "without counts": lambda model, state: {name: state[name] for name in state if "num_batches" not in name},
    "parameters": lambda model, state: state | dict(model.named_parameters()),
    "half": lambda model, state: {name: value.half() for name, value in state.items()},
}


@pytest.mark.parametrize("program", FILES)
def test_a_file_of_any_program_is_read(program, file):
    model, fresh = trained(), small_network(None, 4)
    torch.save(FILES[program](model, model.state_dict()), file)
    load_pretrained(file, fresh)
    tolerance = 1e-3 if program == "half" else 0
    torch.testing.assert_close(fresh.state_dict(), model.state_dict(), rtol=tolerance, atol=tolerance)


def test_a_run_begins_with_the_weights(photograph_folder, tmp_path, file):
    model = trained()
    torch.save({"model": prefixed(model.state_dict(), "module.")}, file)
    given = [str(photograph_folder), *SMALL.split(), "--run-dir", str(tmp_path)]
    begun = first_weights([*given, "--pretrained-weights", str(file)])
    assert torch.equal(begun["conv1.weight"], model.conv1.weight)
    assert torch.equal(begun["fc.weight"], model.fc.weight)
    more = ("--sparse-init", "resume", "--resume", file, "--lr", "0", "--density", "1")
    masked = torch.load(script.run(parsed(photograph_folder, tmp_path, *more)).checkpoint)
    assert torch.equal(masked["model"]["conv2.weight"], model.conv2.weight)


def test_a_run_that_goes_on_needs_the_file_no_more(photograph_folder, tmp_path, file):
    torch.save(trained().state_dict(), file)
    path = script.run(parsed(photograph_folder, tmp_path, "--pretrained-weights", file)).path
    file.unlink()
    script.main(["--resume", str(path), "--epochs", "2", "--run-dir", str(tmp_path / "longer")])
    assert len(list((tmp_path / "longer").glob("*/checkpoint.pt"))) == 1


# Other classifiers


def test_another_classifier_is_drawn_anew_where_asked_for(photograph_folder, tmp_path, file):
    model = trained(classes=1000)
    torch.save(model.state_dict(), file)
    given = [str(photograph_folder), *SMALL.split(), "--run-dir", str(tmp_path), "--pretrained-weights", str(file)]
    with pytest.raises(CheckpointError) as refused:
        first_weights(given)
    assert str(refused.value) == (
        f"{file} has another classifier: fc.weight is (1000, 16) in the file and (4, 16) here; "
        "fc.bias is (1000,) in the file and (4,) here. Add --new-head to draw it anew."
    )
    begun = first_weights([*given, "--new-head"])
    assert torch.equal(begun["conv2.weight"], model.conv2.weight)
    assert begun["fc.weight"].shape == (4, 16)


@pytest.mark.parametrize("left_out", [(), ("fc.weight", "fc.bias")])
def test_the_new_classifier_is_fresh_even_if_one_of_its_shape_is_in_the_file(file, left_out):
    model, fresh = trained(), small_network(None, 4)
    torch.save({name: value for name, value in model.state_dict().items() if name not in left_out}, file)
    drawn = fresh.fc.weight.clone()
    load_pretrained(file, fresh, new_head=True)
    assert torch.equal(fresh.fc.weight, drawn)
    assert torch.equal(fresh.conv2.weight, model.conv2.weight)


@pytest.mark.parametrize("new_head", [False, True])
def test_only_the_classifier_may_differ(file, new_head):
    state = trained(classes=1000).state_dict() | {"conv2.weight": torch.ones(16, 8, 5, 5), "more": torch.ones(2)}
    torch.save(state, file)
    fresh = small_network(None, 4)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"of another model: conv2\.weight is \(16, 8, 5, 5\) in the file and"):
        load_pretrained(file, fresh, new_head)
    torch.testing.assert_close(fresh.state_dict(), before)


def test_new_head_needs_weights(photograph_folder, capsys):
    with pytest.raises(SystemExit) as end:
        script.parse_arguments([str(photograph_folder), "--new-head"])
    assert end.value.code == 2
    assert "--new-head keeps the other weights of a trained network: add --pretrained-weights FILE" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"), ("mobilenet_v3_small", "classifier.3"), ("squeezenet1_1", "classifier.1"),
        ("densenet121", "classifier"), ("vit_b_16", "heads.head"), ("swin_t", "head"),
        ("convnext_tiny", "classifier.2"),
        ("shufflenet_v2_x0_5", "fc"),
    ],
)  # fmt: skip
def test_the_classifier_of_a_network_of_torchvision_is_found(name, head):
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        assert heads_of(models.get_model(name)) == [head]


def test_timm_says_what_its_classifiers_are():
    model = trained()
    model.get_classifier = lambda: (model.fc, model.conv1)
    assert heads_of(model) == ["fc", "conv1"]


# What is refused


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "holds nothing, and no weights"),
        ({"epoch": 3, "model": {}}, "holds epoch, model, and no weights"),
        ({"model": {"lr": 0.1}}, "holds model, and no weights. Expected a state_dict, or one under model, state_dict,"),
        ([torch.ones(2)], "holds a list, not weights by name: save its state_dict"),
        (torch.ones(2), "holds a Tensor, not weights by name"),
        (nn.Linear(2, 2), "is no archive of tensors and plain data"),
        ({3: torch.ones(2)}, "and no weights"),
        (
            {"fc.weight": torch.ones(2)},
            r"another model: conv1\.weight is absent in the file and \(8, 3, 3, 3\) here",
        ),
    ],
)
def test_what_holds_no_weights_is_refused_in_a_line(content, message, file, photograph_folder, tmp_path, capsys):
    torch.save(content, file)
    given = [str(photograph_folder), *SMALL.split(), "--run-dir", str(tmp_path / "runs")]
    with pytest.raises(SystemExit) as end:
        script.main([*given, "--pretrained-weights", str(file)])
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("main.py: error: ")
    assert str(file) in line
    assert re.search(message, line)
    assert not (tmp_path / "runs").exists()


def test_a_damaged_file_is_refused(file):
    torch.save(trained().state_dict(), file)
    whole = file.read_bytes()
    file.write_bytes(whole[:-500])
    with pytest.raises(CheckpointError, match="is damaged or not a checkpoint"):
        load_pretrained(file, trained())
    with pytest.raises(FileNotFoundError, match=r"There is no checkpoint nowhere\.pt"):
        load_pretrained("nowhere.pt", trained())


def test_safetensors_are_read_where_they_are_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    (tmp_path / "w.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"w\.safetensors needs safetensors: pip install safetensors"):
        load_pretrained(tmp_path / "w.safetensors", trained())
    monkeypatch.undo()
    safetensors = pytest.importorskip("safetensors.torch")
    model, fresh = trained(), small_network(None, 4)
    safetensors.save_file(model.state_dict(), tmp_path / "w.safetensors")
    load_pretrained(tmp_path / "w.safetensors", fresh)
    torch.testing.assert_close(fresh.state_dict(), model.state_dict())


# Strides


class Bottleneck(nn.Module):
    def __init__(self, first, second):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 1, first), nn.Conv2d(4, 4, 3, second, padding=1)
        self.conv3 = nn.Conv2d(4, 4, 1)


def bottlenecks(stride_in):
    """A network with the names and strides that matter."""
    model = nn.Module()
    model.layer2 = nn.Sequential(Bottleneck(*((2, 1) if stride_in == "1x1" else (1, 2))))
    model.fc = nn.Linear(4, 4)
    return model


@pytest.mark.parametrize(
    ("more", "stride"),
    [
        ({"args": {"model": "resnet50", "stride_in": "1x1"}}, "1x1"),
        ({"args": {"model": "resnet50", "stride_in": "3x3"}}, "3x3"),
        ({"args": {"model": "torchvision:resnet50", "stride_in": "1x1"}}, "3x3"),  # it says nothing of those
        ({"args": REFERENCE}, "3x3"),
        ({"arch": "resnet50"}, "3x3"),
        ({"args": argparse.Namespace(arch="x", model=None)}, None),
        ({"args": {"model": "resnet50", "stride_in": 7}}, "3x3"),
        ({"args": [1]}, None),
        ({}, None),
    ],
)
@pytest.mark.parametrize("here", ["1x1", "3x3"])
def test_a_stride_that_differs_is_said(file, caplog, more, stride, here):
    torch.save({"model": bottlenecks("3x3").state_dict(), **more}, file)
    load_pretrained(file, bottlenecks(here))
    assert (f"add --stride-in {stride}." in caplog.text) == (stride not in (None, here))


def test_strides_are_those_of_the_networks(file, caplog):
    with torch.device("meta"):
        for stride in ("1x1", "3x3"):
            assert stride_of(RESNETS["resnet50"](10, stride_in=stride)) == stride
        assert stride_of(RESNETS["resnet18"](10)) is None
        models = pytest.importorskip("torchvision.models")
        assert stride_of(models.resnet50()) == "3x3"
        assert stride_of(models.vgg11()) is None


def test_a_checkpoint_of_a_run_says_its_stride(photograph_folder, tmp_path, monkeypatch, caplog):
    checkpoint.save(tmp_path / "v1.pt", model=bottlenecks("1x1"), args={"model": "resnet50", "stride_in": "1x1"})
    network = bottlenecks("3x3")
    network.forward = lambda images: network.fc(images[:, :1, :2, :2].flatten(1))
    monkeypatch.setattr(script, "build_model", lambda *_: network)
    script.run(parsed(photograph_folder, tmp_path, "--pretrained-weights", tmp_path / "v1.pt", "--evaluate"))
    assert "is of a network that halves the image in the first 1x1 convolution of a bottleneck (v1)" in caplog.text
