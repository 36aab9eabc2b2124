"""Models from the meta device: all but the compact weights become real, by the reset_parameters of their modules."""

import pytest
import torch
from torch import nn

from sparselearning.sparse.unborn import materialise


def on_meta(build):
    with torch.device("meta"):
        return build()


def network():
    return nn.Sequential(
        nn.Embedding(50, 16, padding_idx=3),
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.LayerNorm(8),
        nn.MultiheadAttention(16, 2),
        nn.LSTM(16, 8),
        nn.TransformerEncoderLayer(16, 2, 32),
        nn.Linear(16, 10),
    )


def tensors(model):
    return dict([*model.named_parameters(), *model.named_buffers()])


def test_all_but_the_compact_weights_become_real():
    torch.manual_seed(0)
    model, dense = on_meta(network), network()
    old = dict(model.named_parameters())
    compact = {(model[1], "weight"), (model[4], "in_proj_weight"), (model[7], "weight")}
    new = materialise(model, compact)
    names = {"1.weight", "4.in_proj_weight", "7.weight"}
    assert {name for name, each in tensors(model).items() if each.is_meta} == names
    assert new == {old[name]: each for name, each in model.named_parameters() if name not in names}
    for name, each in tensors(model).items():
        like = tensors(dense)[name]
        assert (each.shape, each.dtype, each.requires_grad) == (like.shape, like.dtype, like.requires_grad)
        assert type(each) is type(like)
        if name in names:
            assert each is old[name]
        elif like.unique().numel() == 1:
            assert torch.equal(each, like), "zeros of biases, ones of normalisation, statistics"
        elif like.numel() > 100:
            assert each.std().item() == pytest.approx(like.std().item(), rel=0.2)
    assert not model[0].weight[3].any(), "the row that pads"


def test_a_real_model_computes_and_trains():
    model = on_meta(lambda: nn.Sequential(nn.Embedding(9, 8), nn.LSTM(8, 8)))
    materialise(model, set())
    output, _ = model[1](model[0](torch.arange(9).view(3, 3)))
    output.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_dtypes_frozen_parameters_memory_formats_and_attributes_stay():
    model = nn.Conv2d(4, 6, 3, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    model.bias.requires_grad_(False)
    model.weight.rate = 3
    materialise(model, set())
    assert model.weight.dtype == torch.bfloat16
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.weight.rate == 3
    assert not model.bias.requires_grad


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(200, 30), "head": nn.Linear(30, 200, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def test_tied_parameters_stay_tied_and_start_as_the_first():
    model = on_meta(tied)
    old = model["embed"].weight
    new = materialise(model, set())
    assert model["head"].weight is model["embed"].weight is new[old]
    assert len(new) == 1
    assert model["embed"].weight.std().item() == pytest.approx(1, rel=0.1), "an embedding's, not a linear layer's"


def test_a_compact_weight_is_compact_wherever_it_is_held():
    model = on_meta(tied)
    old = model["embed"].weight
    assert materialise(model, {(model["head"], "weight")}) == {}
    assert model["head"].weight is model["embed"].weight is old


def test_a_module_that_is_used_twice_is_initialised_once():
    class Counting(nn.Linear):
        resets = 0

        def reset_parameters(self):
            self.resets += 1
            super().reset_parameters()

    shared = Counting(3, 3, device="meta")
    model = nn.Sequential(shared, nn.ReLU(), shared)
    before = shared.resets
    materialise(model, set())
    assert shared.resets == before + 1
    assert model[0].weight is model[2].weight


def test_what_was_real_keeps_its_values():
    model = nn.Sequential(nn.Linear(4, 4, device="meta"), nn.BatchNorm1d(4), nn.MultiheadAttention(4, 1))
    model[0].bias = nn.Parameter(torch.full((4,), 5.0))
    model[2].in_proj_weight = nn.Parameter(torch.empty(12, 4, device="meta"))
    model[2].out_proj.bias.data.fill_(6)
    real = {name: (each, each.clone()) for name, each in tensors(model).items() if not each.is_meta}
    materialise(model, set())
    for name, (each, values) in real.items():
        assert tensors(model)[name] is each
        assert torch.equal(each, values)


def test_a_parent_has_the_last_word_on_its_parts():
    model = on_meta(lambda: nn.MultiheadAttention(8, 2))
    materialise(model, {(model, "in_proj_weight")})
    assert not model.out_proj.bias.any(), "a linear layer alone would draw it"
    assert model.in_proj_weight.is_meta


def test_conventions_beside_reset_parameters_are_not_guessed():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def _init_weights(self, module):
            raise AssertionError("called")

    materialise(on_meta(Model), set())


class Position(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.register_buffer("ids", torch.arange(4), persistent=False)


class Masked(nn.Linear):
    """A linear layer with values that __init__ computed and reset_parameters does not know."""

    def __init__(self):
        super().__init__(4, 4)
        self.register_buffer("causal", torch.ones(4, 4, dtype=torch.bool).tril(), persistent=False)
        self.register_buffer("slopes", torch.ones(4))


def unchanged(model, message):
    before = dict(tensors(model))
    with pytest.raises(ValueError, match=message):
        materialise(model, set())
    assert all(before[name] is each and each.is_meta for name, each in tensors(model).items())


def test_modules_without_a_reset_are_named_together():
    model = on_meta(lambda: nn.Sequential(nn.Linear(4, 4), Position(), Position()))
    unchanged(model, r"1.scale of Position, 1.ids of Position, 2.scale of Position, 2.ids of Position. Give their")


def test_buffers_that_nobody_knows_are_named_together():
    model = on_meta(lambda: nn.Sequential(nn.Linear(4, 4), Masked()))
    unchanged(model, r"1.causal of Masked \(in no state_dict\), 1.slopes of Masked. What __init__ computed")


def test_a_tensor_that_is_written_in_part_is_unwritten():
    class Half(nn.Linear):
        def reset_parameters(self):
            nn.init.zeros_(self.weight)
            nn.init.zeros_(self.bias[1:])

    unchanged(on_meta(lambda: Half(4, 4)), "bias of Half")


def test_buffers_that_reset_parameters_computes_are_known():
    class Known(nn.Linear):
        def reset_parameters(self):
            super().reset_parameters()
            self.register_buffer("ids", torch.arange(4), persistent=False)
            if hasattr(self, "causal"):
                self.causal.copy_(torch.ones(4, 4, dtype=torch.bool).tril())

        def __init__(self):
            super().__init__(4, 4)
            self.register_buffer("causal", torch.ones(4, 4, dtype=torch.bool).tril(), persistent=False)

    model = on_meta(Known)
    materialise(model, set())
    assert torch.equal(model.ids, torch.arange(4))
    assert torch.equal(model.causal, torch.ones(4, 4, dtype=torch.bool).tril())


def test_a_reset_that_fails_is_named_and_undone():
    class Failing(nn.Linear):
        broken = False

        def reset_parameters(self):
            super().reset_parameters()
            if self.broken:
                raise KeyError("gain")

    model = on_meta(lambda: nn.Sequential(nn.Linear(4, 4), Failing(4, 4)))
    model[1].broken = True
    unchanged(model, r"reset_parameters\(\) of 1 \(Failing\) failed \(KeyError: 'gain'\)")


def test_what_a_reset_adds_goes_when_another_fails():
    class Adding(nn.BatchNorm1d):
        late = False

        def reset_parameters(self):
            super().reset_parameters()
            if self.late:
                self.register_buffer("more", torch.ones(4))

    model = on_meta(lambda: nn.Sequential(Masked(), nn.LSTM(4, 4), Adding(4)))
    model[2].late = True
    names = list(model.state_dict())
    unchanged(model, "0.causal")
    assert list(model.state_dict()) == names
    assert all(each.is_meta for each in model[1]._flat_weights)
