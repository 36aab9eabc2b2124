"""What users of other libraries reported of masks beside other methods: rewinding, quantization, adapters, patterns.

A comment above each test names the report: project and number on GitHub.
"""

import copy

import pytest
import torch
from helpers import assert_masks_hold, backward, batch_for, masked, mlp, same, sgd, snapshot, train
from torch import nn

from sparselearning import Masking


# Lightning-AI/pytorch-lightning#13643: weights are not rewound to what they were at the start. #21717: the second
# round of pruning and rewinding fails.
def test_weights_are_rewound_round_after_round():
    model = mlp(20, 30, 10)
    start, masks, counts = copy.deepcopy(model.state_dict()), {}, []
    for density in (0.5, 0.25, 0.125):
        masking = Masking(sgd(model), None)
        masking.add_module(model, 1.0, sparse_init=masks or "constant")
        train(model, masking, 3)
        scores = {name: layer.abs() for name, layer in model.named_parameters() if name in masking.masks}
        masking.remove_weight_partial_name("")
        model.load_state_dict(start)
        ticket = Masking(sgd(model), None)
        ticket.add_module(model, density, sparse_init=scores)
        masks = snapshot(ticket)
        for name, weight in model.named_parameters():
            assert torch.equal(weight, start[name] * masks.get(name, 1)), "the first weights, and zeros"
        train(model, ticket, 2)
        assert_masks_hold(ticket)
        counts.append(ticket.total_nonzero)
        ticket.remove_weight_partial_name("")
    assert counts == [450, 225, 112]


# Lightning-AI/pytorch-lightning#13643: the other way to rewind, beneath masks that stay.
def test_rewinding_beneath_masks_needs_one_call_and_an_update_asks_for_it():
    model = mlp(20, 30, 10)
    start = copy.deepcopy(model.state_dict())
    masking = masked(model)
    train(model, masking, 3)
    model.load_state_dict(start)
    with pytest.raises(RuntimeError, match=r"apply_mask\(\) after writing weights"):
        masking.at_end_of_epoch()
    masking.apply_mask()
    masking.check()
    for name, weight in model.named_parameters():
        assert torch.equal(weight, start[name] * masking.masks.get(name, 1))


class FakeQuantized(nn.Module):
    """A network whose layers compute with weights of 4 bits, as quantization-aware training does."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, inputs):
        for part in self.net:
            if isinstance(part, nn.Linear):
                scale = part.weight.detach().abs().max() / 7
                weight = torch.fake_quantize_per_tensor_affine(part.weight, scale, torch.tensor(0), -8, 7)
                inputs = nn.functional.linear(inputs, weight, part.bias)
            else:
                inputs = part(inputs)
        return inputs


# NVIDIA/Model-Optimizer#122, NVIDIA/apex#1338, pytorch/ao#2310: can a sparse network be trained quantization-aware?
# tensorflow/model-optimization#720, #721: its zeros drift away. IntelLabs/distiller#115: nothing but zeros is left.
def test_masks_hold_in_quantization_aware_training():
    net = mlp(20, 30, 10)
    optimizer = sgd(net)
    masking = masked(net, optimizer)
    train(net, masking, 3)
    quantized = FakeQuantized(net)
    for _ in range(3):
        backward(quantized, batch_for(net))
        optimizer.step()
        assert_masks_hold(masking)
    for name, mask in masking.masks.items():
        weight = net.get_parameter(name)
        scale = weight.detach().abs().max() / 7
        rounded = torch.fake_quantize_per_tensor_affine(weight, scale, torch.tensor(0), -8, 7)
        assert not rounded[~mask].any()
        assert rounded[mask].any()


# neuralmagic/sparseml#1486: masks are not applied to the running average of a model, which becomes sparse only slowly.
def test_the_average_of_a_network_with_static_masks_is_as_sparse():
    model = mlp(20, 30, 10)
    masking = Masking.from_method("static", model, sgd(model), total_steps=6, density=0.2)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9))
    for _ in range(3):
        train(model, masking, 2)
        average.update_parameters(model)
    for name, mask in masking.masks.items():
        weight = average.module.get_parameter(name)
        assert not weight[~mask].any()
        assert weight[mask].all()
        assert not torch.equal(weight, model.get_parameter(name))


# tensorflow/model-optimization#847: masks of 2:4 change while a network is fine-tuned.
def test_static_masks_of_a_pattern_stay():
    model = mlp(16, 32, 8)
    masking = Masking.from_method("static", model, sgd(model), total_steps=6, density=0.5, pattern="2:4")
    before = snapshot(masking)
    for _ in range(3):
        train(model, masking, 2)
        masking.at_end_of_epoch()
    assert same(before, snapshot(masking))
    assert all((mask.reshape(-1, 4).sum(1) == 2).all() for mask in masking.masks.values())
    assert_masks_hold(masking)


# horseee/LLM-Pruner#24, #39, pprp/Pruner-Zero#4: merging LoRA makes a sparse model dense.
def test_adapters_stay_dense_and_masks_hold_after_they_are_merged():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = mlp(20, 30, 10)
    masking = masked(model, density=0.3)
    train(model, masking, 2)
    masks, sparse = snapshot(masking), copy.deepcopy(model.state_dict())
    masking.remove_weight_partial_name("")
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["fc1", "fc2"]))
    train(wrapped, torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1), 3, batch_for(model))
    merged = wrapped.merge_and_unload()
    assert (merged.fc1.weight[~masks["fc1.weight"]] != 0).any(), "merged weights are dense"
    merged.requires_grad_(True)
    again = masked(merged, density=1.0, sparse_init=masks)
    assert same(snapshot(again), masks)
    assert_masks_hold(again)
    active = masks["fc1.weight"]
    assert not torch.equal(merged.fc1.weight[active], sparse["fc1.weight"][active]), "what was learned stays"
