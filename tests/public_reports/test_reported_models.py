"""What users of other libraries reported of models: recurrent layers, attention, tied and shared weights, wrappers.

A comment above each test names the report: project and number on GitHub.
"""

import copy

import pytest
import torch
from helpers import assert_masks_hold, batch_for, masked, mlp, same, sgd, snapshot, train
from torch import nn

from sparselearning import Masking


# TimDettmers/sparse_learning#5, #24: recurrent layers, whose biases are no attribute `bias` that is a tensor.
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_train_with_dense_biases(kind):
    model = kind(8, 16, num_layers=2, bidirectional=True, batch_first=True)
    masking = masked(model)
    assert all("weight" in name for name in masking.masks)
    assert len(masking.masks) == 8
    for _ in range(3):
        model.zero_grad()
        model(torch.randn(4, 5, 8))[0].square().mean().backward()
        masking.step()
        masking.at_end_of_epoch()
    assert_masks_hold(masking)
    assert all((parameter != 0).all() for name, parameter in model.named_parameters() if "bias" in name)


# TimDettmers/sparse_learning#17: layer normalisation of a transformer has to be removed from the masks by hand.
def test_normalisation_of_a_transformer_stays_dense_by_itself():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2)
    masking = masked(model)
    assert not [name for name in masking.masks if "norm" in name]
    assert {reason for name, (_, reason) in masking.kept_dense.items() if "norm" in name} == {"normalisation"}


# pytorch/pytorch#69353: a second backward pass through pruned nn.MultiheadAttention raises a RuntimeError.
@pytest.mark.parametrize("training", [True, False])
def test_attention_trains_step_after_step(training):
    attention = nn.MultiheadAttention(16, 2, batch_first=True).train(training)
    masking = masked(attention)
    assert set(masking.masks) == {"in_proj_weight", "out_proj.weight"}
    for _ in range(3):
        attention.zero_grad()
        inputs = torch.randn(2, 5, 16)
        attention(inputs, inputs, inputs)[0].square().mean().backward()
        masking.step()
        masking.at_end_of_epoch()
    assert_masks_hold(masking)


# tensorflow/model-optimization#270: a layer that a siamese network uses twice cannot be pruned.
def test_a_layer_that_is_used_twice_is_masked_once():
    tower = mlp(20, 30, 10)
    masking = masked(tower)
    for _ in range(3):
        tower.zero_grad()
        (tower(batch_for(tower)) - tower(batch_for(tower))).square().mean().backward()
        masking.step()
    assert list(masking.masks) == ["fc1.weight", "fc2.weight"]
    assert_masks_hold(masking)


class Language(nn.Module):
    """An embedding, a layer, and an output layer whose weight is the embedding's or not."""

    def __init__(self, tied):
        super().__init__()
        self.embedding, self.layer, self.head = nn.Embedding(32, 8), nn.Linear(8, 8), nn.Linear(8, 32, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens):
        return self.head(self.layer(self.embedding(tokens)))


# huggingface/transformers#16283, horseee/LLM-Pruner#55: which of embedding and output layer is pruned, if they are
# tied, or look tied and are not?
@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_have_one_mask_and_others_their_own(tied):
    model = Language(tied)
    assert list(masked(model).masks) == ["layer.weight"]
    model = Language(tied)
    masking = Masking(sgd(model), None)
    masking.add_module(model, 0.25, sparse_embeddings=True)
    assert len(masking.masks) == (2 if tied else 3)
    train(model, masking, 3, torch.randint(32, (4, 6)))
    assert masking.total_nonzero == round(0.25 * (256 + 64 + (0 if tied else 256)))
    assert_masks_hold(masking)
    assert (model.head.weight is model.embedding.weight) == tied


# pytorch/pytorch#37322, WongKinYiu/yolov7#1835: a pruned model cannot be copied.
def test_a_masked_model_is_copied_in_the_middle_of_training():
    model = mlp(20, 30, 10)
    masking = masked(model)
    train(model, masking, 2)
    loss = model(batch_for(model)).square().mean()  # a graph that still lives
    other = copy.deepcopy(model)
    loss.backward()
    assert all(map(torch.equal, model.parameters(), other.parameters()))
    train(other, sgd(other), 1)  # a copy without masks is an ordinary model
    assert_masks_hold(masking)


# microsoft/nni#3901: a model that is pruned twice is wrapped twice, and then hangs.
def test_nothing_wraps_a_model_however_often_it_is_masked():
    model = mlp(20, 30, 10)
    kinds, names = [type(part) for part in model.modules()], list(model.state_dict())
    optimizer = sgd(model)
    masking = masked(model, optimizer)
    assert kinds == [type(part) for part in model.modules()]
    assert names == list(model.state_dict())
    masking.remove_weight_partial_name("")
    again = masked(model, optimizer, density=0.1)
    train(model, optimizer, 3)
    assert_masks_hold(again)
    assert kinds == [type(part) for part in model.modules()]


# IntelLabs/distiller#564: a model that is not inside DataParallel is not pruned at all, and nothing says so.
def test_a_model_has_the_same_masks_with_and_without_data_parallel():
    def masks_of(wrap):
        torch.manual_seed(0)
        return snapshot(masked(wrap(mlp(20, 30, 10))))

    assert same(masks_of(nn.DataParallel), masks_of(lambda model: model))


# intel/neural-compressor#900, huggingface/transformers#24439, #36254: T5 reads `wo.weight` and its dtype itself, and
# wrappers have none.
@pytest.mark.parametrize("weights", ["zero", "sparse"])
def test_t5_reads_the_weights_of_its_layers(weights):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = dict(vocab_size=40, d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=2, decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes))
    masking = Masking(sgd(model, lr=0.01), None, weights=weights)
    masking.add_module(model, 0.2)
    assert any(name.endswith("wo.weight") for name in masking.masks)
    tokens = torch.randint(40, (2, 6))
    for _ in range(3):
        model.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        masking.step()
        masking.at_end_of_epoch()
    assert_masks_hold(masking)
