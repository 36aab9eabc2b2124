"""What users of other libraries reported of the first masks: scores that change the model, zeros that come back.

A comment above each test names the report: project and number on GitHub.
"""

import copy
import warnings

import pytest
import torch
from helpers import assert_masks_hold, masked, mlp, same, sgd, snapshot, train
from torch import nn

from sparselearning import Masking, Updates


def convolutional():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(288, 10)
    )


# neuralmagic/sparseml#756: scoring weights on data changes the statistics of BatchNorm. mil-ad/snip#4: it freezes
# weights. mil-ad/snip#3: it scores other weights than those that are trained.
@pytest.mark.parametrize("scores", ["snip", "grasp", "synflow"])
@pytest.mark.parametrize("training", [True, False])
def test_scoring_weights_leaves_the_model_as_it_was(scores, training):
    model = convolutional().train(training)
    before = copy.deepcopy(model.state_dict())
    batches = [(torch.randn(4, 3, 8, 8), torch.arange(4))]
    masking = Masking.from_method(scores, model, sgd(model), total_steps=5, density=0.2, batches=batches)
    assert model.training == training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name] * masking.masks.get(name, 1)), name


# facebookresearch/fairseq#4664: a pruned model is saved, loaded and trained, and its zeros are updated again.
# microsoft/nni#4422: how is it trained with its masks?
@pytest.mark.parametrize("masks_saved", [True, False])
def test_the_zeros_of_a_loaded_model_stay(masks_saved):
    pruned = mlp(20, 30, 10)
    masks = snapshot(masked(pruned, density=0.25))
    model = mlp(20, 30, 10)
    model.load_state_dict(pruned.state_dict())
    masking = masked(model, density=0.25, sparse_init=masks if masks_saved else "resume")
    assert same(snapshot(masking), masks)
    assert all(map(torch.equal, model.parameters(), pruned.parameters()))
    train(model, masking, 4)
    assert_masks_hold(masking)
    assert same(snapshot(masking), masks)


# neuralmagic/sparseml#589: two functions round a number of weights differently, so that pruning to the same sparsity
# once more brings a weight back.
@pytest.mark.parametrize("density", [0.1, 0.333, 0.0617, 1 / 3])
def test_an_update_to_the_density_that_is_there_moves_nothing(density):
    model = mlp(21, 31, 11)
    updates = Updates(every=2, density=lambda step: density)
    masking = masked(model, density=density, prune_rate=0.0, prune_rate_decay=None, updates=updates)
    before = snapshot(masking)
    train(model, masking, 6)
    assert masking.total_nonzero == round(density * (21 * 31 + 31 * 11))
    assert same(snapshot(masking), before)


# qualcomm/aimet#689, tensorflow/model-optimization#133, mathmanu/caffe-jacinto#14: are depthwise convolutions masked?
@pytest.mark.parametrize("dense", [(), ("depthwise",), ("first", "last", "depthwise")])
def test_depthwise_layers_are_masked_unless_they_are_named(dense):
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, groups=16), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 4, 1)
    )
    masking = Masking(sgd(model), None)
    masking.add_module(model, 0.2, dense=dense)
    named = {"first": "0.weight", "last": "3.weight", "depthwise": "1.weight"}
    expected = {f"{i}.weight" for i in range(4)} - {named[word] for word in dense}
    assert masking.masks.keys() == expected
    assert all(f"{named[word]} " in masking.summary() for word in dense)


# openvinotoolkit/nncf#1405: an export in the middle of training overwrites the weights.
def test_an_export_leaves_training_alone():
    def run(exported):
        torch.manual_seed(0)
        model = mlp(20, 30, 10)
        masking = masked(model)
        inputs = torch.randn(8, 20)
        for _ in range(3):
            train(model, masking, 2, inputs)
            if exported:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # torch's own
                    program = torch.export.export(model, (inputs,))
                assert torch.equal(program.module()(inputs), model(inputs))
            masking.at_end_of_epoch()
        return [parameter.detach() for parameter in model.parameters()]

    assert all(map(torch.equal, run(True), run(False)))
