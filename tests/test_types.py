"""The types of the public interface are complete: pyright's strict mode finds nothing unknown in a user's script."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from script import ROOT

import sparselearning

SCRIPT = """
import argparse
import logging

import torch
from torch import Tensor, nn

from sparselearning import CosineDecay, LinearDecay, Masking, Updates, count_to_remove, describe, network_wide, reads
from sparselearning.checkpoint import load, save
from sparselearning.core import add_sparse_args
from sparselearning.flags import chosen_method
from sparselearning.flops import forward_flops, relative_flops
from sparselearning.models import MODELS, LeNet_300_100, build
from sparselearning.schedules import CubicDensity
from sparselearning.selection import add_highest, drop_lowest
from sparselearning.sparse import convert, load_compressed, save_compressed
from sparselearning.weights.zeros import Zeros


@reads("gradient")
def grow(masking: Masking, name: str, new_mask: Tensor, total_regrowth: int, weight: Tensor) -> Tensor:
    return add_highest(masking.get_gradient_for_weight(weight).abs(), new_mask, total_regrowth)


def prune(masking: Masking, mask: Tensor, weight: Tensor, name: str) -> Tensor:
    return drop_lowest(weight.abs(), mask, count_to_remove(masking, name))


@network_wide
def prune_all(masking: Masking) -> dict[str, Tensor]:
    return {name: mask for name, mask in masking.masks.items()}


parser = argparse.ArgumentParser()
add_sparse_args(parser)
args = parser.parse_args()
model = build("lenet5") if len(MODELS) > 3 else LeNet_300_100()
print(describe(model, density={"fc*": 0.02, "*": 0.1}))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
masking = Masking(optimizer, CosineDecay(0.5, 100), prune_mode=prune, growth_mode=grow, weights=Zeros(pull=1e-4))
masking.add_module(model, density=0.1, sparse_init="erdos_renyi_kernel", dense=["first"])
other = Masking.from_method(chosen_method(args), model, optimizer, total_steps=100, density=0.05)
third = Masking(optimizer, LinearDecay(0.5, 9), updates=Updates(every=5, density=CubicDensity(1.0, 0.1, 0, 9)))
images = torch.zeros(8, 1, 28, 28)
loss = nn.functional.nll_loss(model(images), torch.zeros(8, dtype=torch.long))
loss.backward()  # pyright: ignore[reportUnknownMemberType]  # torch has not typed it
masking.step()
masking.at_end_of_epoch()
counts = {name: count + masking.name2zeros[name] for name, count in masking.name2nonzeros.items()}
logging.info("%s %f %s", counts, masking.density, masking.summary())
save("checkpoint.pt", model=model, optimizer=optimizer, mask=masking, epoch=1)
epoch = load("checkpoint.pt", model=model, optimizer=optimizer, mask=masking)["epoch"]
fast, report = convert(model, images)
print(report, fast(images), epoch, relative_flops(forward_flops(model, images[:1]), masking, 100))
save_compressed(model.state_dict(), "small.safetensors")
model.load_state_dict(load_compressed("small.safetensors"))
"""
SETTINGS = '{"typeCheckingMode": "strict", "venvPath": ".", "venv": "venv", "include": ["user.py"]}'


@pytest.mark.long
def test_a_user_s_script_has_no_unknown_types(tmp_path):
    # As an installed package, whose py.typed counts: pyright does not follow the import hook of an editable one.
    packages = tmp_path / "venv/lib/python3.10/site-packages"
    python_alone = shutil.ignore_patterns("*.so", "*.cpp", "*.inc", "*.h", "__pycache__")
    shutil.copytree(Path(sparselearning.__file__).parent, packages / "sparselearning", ignore=python_alone)
    (packages / "others.pth").write_text(str(Path(torch.__file__).parents[1]))
    (tmp_path / "venv/pyvenv.cfg").write_text("home = /usr/bin\n")
    (tmp_path / "pyrightconfig.json").write_text(SETTINGS)
    (tmp_path / "user.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "pyright", "--warnings"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "0 errors, 0 warnings" in done.stdout


def test_the_marker_of_types_is_packaged():
    assert (ROOT / "sparselearning/py.typed").exists()
    assert '"py.typed"' in (ROOT / "setup.py").read_text()
