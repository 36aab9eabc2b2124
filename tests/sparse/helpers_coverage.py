"""Models of layers beyond linear ones and 2d convolutions, with 7 outputs, and inputs for them."""

import sys
import types

import torch
from torch import nn


class Conv1D(nn.Module):
    """What transformers.pytorch_utils.Conv1D computes, for installations without transformers."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.empty(nx, nf)), nn.Parameter(torch.zeros(nf))
        nn.init.normal_(self.weight, std=0.2)

    def forward(self, x):
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


def pretend_transformers(monkeypatch):
    """Let `Conv1D` be that of transformers, which is not installed."""
    module = types.ModuleType("transformers.pytorch_utils")
    module.Conv1D = Conv1D
    monkeypatch.setitem(sys.modules, "transformers", types.ModuleType("transformers"))
    monkeypatch.setitem(sys.modules, "transformers.pytorch_utils", module)
    monkeypatch.setattr(Conv1D, "__module__", "transformers.pytorch_utils")


class Model(nn.Module):
    """Parts, and a function from them and the input to the output."""

    def __init__(self, function, **parts):
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.function(self, x)


def sequence(count, generator):
    return torch.randn(count, 5, 8, generator=generator)


def signals(count, generator):
    return torch.randn(count, 3, 12, generator=generator)


def rows(count, generator):
    return torch.randn(count, 8, generator=generator)


def conv1d():
    return nn.Sequential(
        nn.Conv1d(3, 6, 3, padding=1, bias=False),
        nn.BatchNorm1d(6),
        nn.ReLU(),
        nn.Conv1d(6, 6, 3, stride=2, padding="valid", dilation=2, groups=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, 7),
    )


def conv1D():
    return nn.Sequential(Conv1D(12, 8), nn.Tanh(), Conv1D(6, 12), nn.Flatten(), nn.Linear(30, 7))


def read(model, x):
    return model.head(x.flatten(1))


def self_attention(model, x):
    y, weights = model.attention(x, x, x)
    return read(model, y) + weights.square().sum((1, 2))[:, None]


def of_self():
    return Model(self_attention, attention=nn.MultiheadAttention(8, 2, batch_first=True), head=nn.Linear(40, 7))


def cross_attention(model, x):
    memory = model.memory(x[:, :3])
    hidden = model.attention(x, memory, memory, need_weights=False)[0]
    return read(model, model.attention(hidden, memory, x[:, 1:4])[0])


def of_others():
    attention = nn.MultiheadAttention(8, 4, bias=False, batch_first=True)
    return Model(cross_attention, memory=nn.Linear(8, 8), attention=attention, head=nn.Linear(40, 7))


def wide_attention(model, x):
    x = x.transpose(0, 1)
    y = model.attention(x, model.keys(x), model.values(x), average_attn_weights=False)[0]
    return read(model, y.transpose(0, 1))


def of_other_widths():
    attention = nn.MultiheadAttention(8, 2, kdim=6, vdim=5)
    return Model(
        wide_attention, keys=nn.Linear(8, 6), values=nn.Linear(8, 5), attention=attention, head=nn.Linear(40, 7)
    )


def translate(model, x):
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    padding = torch.arange(5) > torch.arange(len(x))[:, None] % 4 + 1
    memory = model.encoder(x, src_key_padding_mask=padding)
    return read(model, model.decoder(x, memory, causal, None, None, padding, tgt_is_causal=True))


def transformer():
    settings = dict(dim_feedforward=12, dropout=0.0, batch_first=True)
    layer = nn.TransformerEncoderLayer(8, 2, **settings)
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
    return Model(
        translate, encoder=encoder, decoder=nn.TransformerDecoderLayer(8, 2, **settings), head=nn.Linear(40, 7)
    )


def run_twice(model, x):
    return model.head(model.second(torch.tanh(model.first(x))))


def tied():
    model = Model(run_twice, first=nn.Linear(8, 8), second=nn.Linear(8, 8, bias=False), head=nn.Linear(8, 7))
    model.second.weight = model.first.weight
    return model


MODELS = {
    "conv1d": (conv1d, signals),
    "Conv1D": (conv1D, sequence),
    "self-attention": (of_self, sequence),
    "cross-attention": (of_others, sequence),
    "kdim and vdim": (of_other_widths, sequence),
    "transformer": (transformer, sequence),
    "tied": (tied, rows),
}
