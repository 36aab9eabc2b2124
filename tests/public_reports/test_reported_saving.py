"""What users of other libraries reported of saving and loading: prefixes of wrappers, masks, file sizes, going on.

A comment above each test names the report: project and number on GitHub.
"""

import io

import pytest
import torch
from helpers import assert_masks_hold, masked, mlp, same, sgd, snapshot, train
from torch import nn

from sparselearning import checkpoint
from sparselearning.start.maskable import canonical_name


class Inside(nn.Module):
    """A module that compiles a part of itself, so that the prefix stands in the middle of names."""

    def __init__(self, compiled):
        super().__init__()
        self.net = torch.compile(mlp(20, 30, 10)) if compiled else mlp(20, 30, 10)

    def forward(self, inputs):
        return self.net(inputs)


def whole(compiled):
    return torch.compile(mlp(20, 30, 10)) if compiled else mlp(20, 30, 10)


# karpathy/nanoGPT#325, pytorch/pytorch#101107, rasbt/LLMs-from-scratch#580, mlfoundations/open_clip#639,
# Lightning-AI/pytorch-lightning#20233: what a compiled model saved does not load, for `_orig_mod.` in its names.
@pytest.mark.parametrize("build", [whole, Inside])
@pytest.mark.parametrize("first", [True, False])
def test_masks_of_a_compiled_model_load_without_it_and_the_other_way_round(build, first):
    saved, other = masked(build(first)), masked(build(not first))
    assert not [name for name in (*saved.masks, *other.masks) if "_orig_mod" in name]
    assert not same(snapshot(saved), snapshot(other))
    other.load_state_dict(saved.state_dict())
    assert same(snapshot(saved), snapshot(other))


# huggingface/pytorch-image-models#2003: is it `_orig_mod.module.` or `module._orig_mod.`, if DDP wraps, too?
@pytest.mark.parametrize("prefix", ["_orig_mod.module.", "module._orig_mod.", "_orig_mod.", "module."])
def test_prefixes_go_in_any_order(prefix):
    assert canonical_name(f"{prefix}fc1.weight") == "fc1.weight"


# VainF/Torch-Pruning#428, bzantium/pytorch-admm-pruning#3: how are masks saved and loaded?
def test_masks_are_saved_and_loaded_by_torch_alone():
    model = mlp(20, 30, 10)
    masking = masked(model)
    train(model, masking, 3)
    masking.at_end_of_epoch()
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "masks": masking.masks}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other = mlp(20, 30, 10)
    other.load_state_dict(saved["model"])
    again = masked(other, density=1.0, sparse_init=saved["masks"])
    assert same(snapshot(masking), snapshot(again))
    assert all(map(torch.equal, model.parameters(), other.parameters()))


# pytorch/pytorch#34257, ahendriksen/msd_pytorch#3: a pruned model is saved with copies of its masks, under names that a
# dense model does not have.
def test_a_masked_model_saves_what_a_dense_one_saves():
    def size_and_names(model):
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        return file.tell(), list(model.state_dict())

    model = mlp(20, 30, 10)
    before = size_and_names(model)
    masked(model)
    assert size_and_names(model) == before
    mlp(20, 30, 10).load_state_dict(model.state_dict())


# jshilong/FisherPruning#21: pruning that goes on begins with the masks of the first model again.
# KempnerInstitute/KempnerForge#115: momenta are lost, because a new optimizer has none before its first step.
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, sgd])
def test_training_goes_on_with_the_masks_and_momenta_that_were_saved(optimizer, tmp_path):
    def run(model):
        stepper = optimizer(model) if optimizer is sgd else optimizer(model.parameters())
        return model, stepper, masked(model, stepper)

    torch.manual_seed(0)
    model, stepper, masking = run(mlp(20, 30, 10))
    train(model, stepper, 3)
    masking.at_end_of_epoch()
    checkpoint.save(tmp_path / "checkpoint.pt", model=model, optimizer=stepper, mask=masking)
    train(model, stepper, 3)
    masking.at_end_of_epoch()
    torch.manual_seed(7)
    other, again, other_masking = run(mlp(20, 30, 10))
    checkpoint.load(tmp_path / "checkpoint.pt", model=other, optimizer=again, mask=other_masking)
    train(other, again, 3)
    other_masking.at_end_of_epoch()
    assert same(snapshot(masking), snapshot(other_masking))
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    assert_masks_hold(other_masking)
