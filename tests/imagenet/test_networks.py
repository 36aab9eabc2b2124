"""Networks of torchvision and timm by name and size of image, and what batch norm needs."""

import sys
from types import ModuleType

import pytest
import torch
from script import draw_nothing, small_network
from small import SMALL, parsed, script
from torch import nn

from sparselearning.experiments.run.start import check_batch_norm

ONE_STEP = ("--epochs", "1", "--device", "cpu")


@pytest.fixture
def timm(monkeypatch):
    """A stand-in for timm: one network whose weights depend on the size of the images, one that takes no size."""
    asked = []

    def create_model(name, num_classes, **more):
        asked.append((name, more))
        if name == "sizeless" and "img_size" in more:
            raise TypeError("ResNet.__init__() got an unexpected keyword argument 'img_size'")
        if name == "broken":
            raise TypeError("__init__() missing 1 required positional argument: 'depth'")
        size = more.get("img_size", 64)
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * size * size, num_classes))

    module = ModuleType("timm")
    module.create_model = create_model
    monkeypatch.setitem(sys.modules, "timm", module)
    return asked


@pytest.mark.parametrize("name", ["hf_hub:timm/vit_tiny.a:b", "hf-hub:timm/vit_tiny", "vit_tiny", "local-dir:/a/b"])
def test_a_name_of_timm_may_have_colons(name, timm, tmp_path):
    args = parsed("data", tmp_path, "--arch", f"timm:{name}", "--image-size", "48")
    assert script.build_model(args, 7)(torch.zeros(1, 3, 48, 48)).shape == (1, 7)
    assert timm == [(name, {"img_size": 48})]
    folder = script.place(args)
    assert folder.parent == tmp_path, "one folder, whatever the name"
    assert ":" not in folder.name


@pytest.mark.parametrize("name", ["timm:", "torchvision:", "hf_hub:timm/vit", "timm", "resnet51", ":resnet18", ""])
def test_other_names_are_refused(name, capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments(["data", "--arch", name])
    assert f"torchvision:NAME or timm:NAME, got {name!r}" in capsys.readouterr().err


def test_a_network_that_takes_no_size_gets_none(timm, tmp_path):
    args = parsed("data", tmp_path, "--arch", "timm:sizeless", "--image-size", "64")
    assert script.build_model(args, 7)(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert timm == [("sizeless", {"img_size": 64}), ("sizeless", {})]
    with pytest.raises(script.DataError, match=r"--arch timm:broken cannot be built for images of 32x32: .*'depth'"):
        script.build_model(parsed("data", tmp_path, "--arch", "timm:broken"), 7)


def test_the_size_of_images_reaches_transformers_of_torchvision(tmp_path, monkeypatch):
    models = pytest.importorskip("torchvision.models")
    args = parsed("data", tmp_path, "--arch", "torchvision:vit_b_32", "--image-size", 64)
    model = script.build_model(args, 7)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)
    assert model.encoder.pos_embedding.shape[1] == 2 * 2 + 1
    asked = {}

    def get_model(name, **more):  # they take seconds
        asked[name] = more
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64 * 64, 7))

    monkeypatch.setattr(models, "get_model", get_model)
    for name in ("ViT_L_16", "maxvit_t", "swin_t", "resnet18"):
        script.build_model(parsed("data", tmp_path, "--arch", f"torchvision:{name}", "--image-size", 64), 7)
    of_all = dict(weights=None, num_classes=7)
    assert asked == {
        "ViT_L_16": of_all | {"image_size": 64},
        "maxvit_t": of_all | {"input_size": (64, 64)},
        "swin_t": of_all,
        "resnet18": of_all,
    }


def test_a_size_that_a_transformer_cannot_take_is_refused_in_a_line(tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(script.DataError, match=r"--arch torchvision:vit_b_32 cannot be built for images of 40x40: "):
        script.build_model(parsed("data", tmp_path, "--arch", "torchvision:vit_b_32", "--image-size", "40"), 7)


# Batch norm


def log_of(caplog, monkeypatch, photograph_folder, tmp_path, *more):
    draw_nothing(monkeypatch)
    monkeypatch.setattr(script, "build_model", small_network)
    caplog.set_level("INFO")
    script.main([str(photograph_folder), *SMALL.split(), "--run-dir", str(tmp_path), *more])
    return [record.getMessage() for record in caplog.records if "batch norm" in record.getMessage()]


def test_parts_say_how_many_images_batch_norm_sees(caplog, monkeypatch, photograph_folder, tmp_path):
    log = (caplog, monkeypatch, photograph_folder, tmp_path)
    (line,) = log_of(*log, "-b", "4", "--accumulate", "4")
    assert line.startswith(
        "batch norm sees 1 at a time of the 4 images of a step, which are divided among 4 parts (--accumulate). "
        "Mean and deviation of so few are rough"
    )
    caplog.clear()
    assert log_of(*log, "-b", "8") == [], "whole batches"
    caplog.clear()
    monkeypatch.setattr(nn, "BatchNorm2d", lambda channels: nn.GroupNorm(1, channels))
    assert log_of(*log, "-b", "4", "--accumulate", "4") == [], "no batch norm"


def test_many_images_are_no_warning(caplog):
    caplog.set_level("INFO")
    check_batch_norm(small_network(None, 4), torch.zeros(1, 3, 32, 32), 64, 256, 4)
    (record,) = caplog.records
    assert record.levelname == "INFO"
    assert record.getMessage().endswith("divided among 4 parts (--accumulate).")


def test_one_value_per_channel_is_refused_before_training(photograph_folder, tmp_path, capsys):
    given = [str(photograph_folder), *SMALL.split(), "--run-dir", str(tmp_path), "-b", "4", "--accumulate", "4"]
    with pytest.raises(SystemExit) as end:
        script.main(given)  # ResNet-18 ends with 1x1 features of 32x32 images
    assert end.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert (
        "that is one value per channel, which cannot be normalised. Take a larger --batch-size, larger images" in line
    )
    assert not list(tmp_path.iterdir())


def test_the_model_is_as_it_was():
    model = small_network(None, 4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    check_batch_norm(model, torch.ones(1, 3, 32, 32), 1, 4, 4)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert model.training
    assert not model.bn1._forward_pre_hooks
