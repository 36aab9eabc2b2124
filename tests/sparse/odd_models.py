"""Models that are not chains of layers: each function returns one, an example, and the layers that become sparse."""

from __future__ import annotations

import types
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

ODD = {}


def odd(function):
    ODD[function.__name__] = function
    return function


class Model(nn.Module):
    """Modules by name, and a function that is the forward pass."""

    def __init__(self, function, **modules):
        super().__init__()
        for name, module in modules.items():
            setattr(self, name, module)
        self.function = function

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


def layer_and_norm(outputs):
    """A model that returns outputs(z, y): the output y of a layer, and z of the norm after it."""

    def forward(self, x):
        y = self.layer(x)
        return outputs(self.norm(y), y)

    return Model(forward, layer=nn.Linear(8, 6), norm=nn.BatchNorm1d(6)), torch.randn(4, 8), {"layer"}


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()
        self.steps = [self.conv, self.norm, self.relu]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x.mean((2, 3))


@odd
def layers_in_a_list():
    return Listed(), torch.randn(4, 3, 8, 8), {"conv"}


@odd
def a_norm_only_in_a_list():
    model = Model(lambda self, x: self.rest[0](self.layer(x)), layer=nn.Linear(8, 6))
    model.rest = [nn.BatchNorm1d(6).eval()]
    return model, torch.randn(4, 8), {"layer"}


@odd
def a_weight_read_elsewhere():
    forward = lambda self, x: F.linear(torch.relu(self.norm(self.a(x))), self.a.weight.t())  # noqa: E731
    return Model(forward, a=nn.Linear(8, 6), norm=nn.BatchNorm1d(6)), torch.randn(4, 8), set()


@odd
def a_parent_that_asks_for_the_size():
    forward = lambda self, x: self.b(self.a(x).reshape(-1, self.a.out_features) * self.a.weight.shape[0])  # noqa: E731
    return Model(forward, a=nn.Linear(8, 6), b=nn.Linear(6, 3)), torch.randn(4, 8), {"b"}


@odd
def a_parent_that_asks_for_the_class():
    forward = lambda self, x: self.a(x) if isinstance(self.a, nn.Linear) else x  # noqa: E731
    return Model(forward, a=nn.Linear(8, 6)), torch.randn(4, 8), set()


@odd
def a_compiled_part():
    part = torch.compile(nn.Sequential(nn.Linear(8, 6), nn.ReLU()), backend="eager")
    return nn.Sequential(part, nn.Linear(6, 3)), torch.randn(4, 8), {"0.0", "1"}


@odd
def a_range_and_a_set():
    return layer_and_norm(lambda z, y: (z, range(3), {1, 2}, slice(None).start))


@odd
def layers_without_outputs_or_inputs():
    forward = lambda self, x: torch.cat([self.a(x), self.b(x[:, :0]), self.c(x)], 1)  # noqa: E731
    with pytest.warns(UserWarning, match="zero-element"):
        empty = dict(a=nn.Linear(8, 0), b=nn.Linear(0, 3))
    return Model(forward, **empty, c=nn.Linear(8, 3)), torch.randn(4, 8), {"c"}


@odd
def a_parent_that_asks_for_the_dtype():
    """As T5 does."""
    forward = lambda self, x: self.b(self.a(x).relu().to(self.b.weight.dtype))  # noqa: E731
    return Model(forward, a=nn.Linear(8, 6), b=nn.Linear(6, 3)), torch.randn(4, 8), {"a"}


@odd
def layers_called_by_keyword():
    forward = lambda self, x: self.b(input=self.norm(input=self.a(input=x)))  # noqa: E731
    return Model(forward, a=nn.Linear(8, 6), norm=nn.BatchNorm1d(6), b=nn.Linear(6, 3)), torch.randn(4, 8), set()


@odd
def a_layer_that_reads_a_buffer():
    model = Model(lambda self, x: x + self.layer(self.table), layer=nn.Linear(8, 6))
    model.register_buffer("table", torch.randn(4, 8))
    return model, torch.randn(4, 6), {"layer"}


@odd
def a_norm_over_tokens():
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)), torch.randn(3, 7, 5), {"0"}


@odd
def a_norm_over_more_tokens_than_features():
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(7)), torch.randn(3, 7, 5), {"0"}


@odd
def an_array_of_a_layers_output():
    return layer_and_norm(lambda z, y: (z, y.numpy()))


@odd
def a_list_of_a_layers_output():
    return layer_and_norm(lambda z, y: (z, y.tolist()))


@odd
def a_branch_on_a_layers_output():
    return layer_and_norm(lambda z, y: z + 10 * y.sum(1, keepdim=True).gt(0) if y.max().item() > 0 else z)


@dataclass
class Outputs:
    z: torch.Tensor
    y: torch.Tensor


@odd
def a_dataclass():
    return layer_and_norm(Outputs)


@odd
def a_named_tuple():
    return layer_and_norm(namedtuple("Pair", "z y"))


@odd
def a_dict():
    return layer_and_norm(lambda z, y: OrderedDict(z=z, y={"y": [y]}))


@odd
def an_object():
    return layer_and_norm(lambda z, y: types.SimpleNamespace(z=z, y=types.SimpleNamespace(y=y)))


@odd
def an_output_that_is_kept_aside():
    def forward(self, x):
        self.seen = self.layer(x)
        return self.norm(self.seen)

    return Model(forward, layer=nn.Linear(8, 6), norm=nn.BatchNorm1d(6)), torch.randn(4, 8), {"layer"}


@odd
def a_scripted_function_reads_a_layers_output():
    @torch.jit.script
    def twice(y):
        return y * 2

    return layer_and_norm(lambda z, y: z + twice(y))


class ClampedReLU(nn.ReLU):
    def forward(self, x):
        return x.clamp(-1, 1)


class DoubleNorm(nn.BatchNorm1d):
    def forward(self, x):
        return super().forward(x) * 2


class DoubleLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) * 2


@odd
def a_subclass_of_relu():
    return nn.Sequential(nn.Linear(8, 6), ClampedReLU(), nn.Linear(6, 6)), torch.randn(4, 8), {"0", "2"}


@odd
def a_subclass_of_batch_norm():
    return nn.Sequential(nn.Linear(8, 6), DoubleNorm(6), nn.Linear(6, 6)), torch.randn(4, 8), {"0", "2"}


@odd
def a_subclass_of_linear():
    return nn.Sequential(DoubleLinear(8, 6), nn.ReLU(), nn.Linear(6, 6)), torch.randn(4, 8), {"2"}


@odd
def a_forward_of_its_own():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 6))
    model[1].forward = types.MethodType(lambda self, x: x + 1, model[1])
    return model, torch.randn(4, 8), {"0", "2"}


@odd
def hooks_on_norm_and_relu():
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU())
    model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    model[4].register_forward_pre_hook(lambda module, inputs: (inputs[0] + 1,))
    return model, torch.randn(4, 8), {"0", "3"}


@odd
def hooks_on_layers():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3))
    model[0].register_full_backward_hook(lambda *_: None)
    model[1].register_forward_hook(lambda module, inputs, output: output * 2)
    model[2].register_full_backward_pre_hook(lambda *_: None)
    return model, torch.randn(4, 8), {"3"}


@odd
def weight_and_spectral_norm():
    parametrizations = nn.utils.parametrizations
    parts = parametrizations.weight_norm(nn.Linear(8, 6)), nn.ReLU(), parametrizations.spectral_norm(nn.Linear(6, 6))
    return nn.Sequential(*parts, nn.Linear(6, 3)), torch.randn(4, 8), {"3"}


@odd
def torch_pruning():
    model = nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))
    prune.random_unstructured(model[0], "weight", 0.5)
    return model, torch.randn(4, 8), {"2"}


@odd
def norm_over_flattened_pixels():
    parts = nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.BatchNorm1d(4 * 36), nn.Linear(144, 5)
    return nn.Sequential(*parts), torch.randn(4, 1, 8, 8), {"0", "4"}


@odd
def flattened_tokens():
    return nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(12, 5)), torch.randn(4, 3, 5), {"0", "3"}


@odd
def pooled_tokens():
    return nn.Sequential(nn.Linear(5, 6), nn.MaxPool2d((1, 2)), nn.Linear(3, 5)), torch.randn(4, 3, 5), {"0", "2"}


@odd
def flattened_pixels_of_one_image():
    parts = nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)
    return nn.Sequential(*parts), torch.randn(2, 6, 6), {"0", "3"}


@odd
def two_inputs():
    forward = lambda self, a, b: self.a(a) + self.b(b)  # noqa: E731
    return Model(forward, a=nn.Linear(8, 6), b=nn.Linear(5, 6)), (torch.randn(4, 8), torch.randn(4, 5)), {"a", "b"}


@odd
def named_inputs():
    forward = lambda self, *, a, b=None: self.a(a) if b is None else self.a(a) + self.b(b)  # noqa: E731
    example = {"b": torch.randn(4, 5), "a": torch.randn(4, 8)}
    return Model(forward, a=nn.Linear(8, 6), b=nn.Linear(5, 6)), example, {"a", "b"}


@odd
def a_dict_as_the_only_input():
    return Model(lambda self, x: self.a(x["a"]), a=nn.Linear(8, 6)), ({"a": torch.randn(4, 8)},), {"a"}


@odd
def a_transformer_layer():
    """In eval mode it reads the weights of its layers in one call."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    return nn.Sequential(layer, nn.Linear(16, 4)), torch.randn(3, 5, 16), {"1"}


@odd
def multihead_attention():
    forward = lambda self, x: (self.layer(self.attention(x, x, x)[0]), self.attention(x, x, x)[1])  # noqa: E731
    parts = dict(attention=nn.MultiheadAttention(16, 2), layer=nn.Linear(16, 4))
    return Model(forward, **parts), torch.randn(3, 5, 16), {"layer"}


@odd
def images_that_are_viewed():
    forward = lambda self, x: self.layer(self.conv(x).relu().view(-1, 16)).view(x.shape[0], -1)  # noqa: E731
    return Model(forward, conv=nn.Conv2d(3, 4, 3), layer=nn.Linear(16, 3)), torch.randn(16, 3, 6, 6), {"conv", "layer"}


@odd
def images_that_are_viewed_in_larger_batches():
    forward = lambda self, x: self.layer(self.conv(x).relu().view(-1, 16)).view(x.shape[0], -1)  # noqa: E731
    return Model(forward, conv=nn.Conv2d(3, 4, 3), layer=nn.Linear(16, 3)), torch.randn(2, 3, 6, 6), {"conv", "layer"}


@odd
def a_scripted_module():
    scripted = torch.jit.script(nn.Sequential(nn.Linear(6, 6), nn.ReLU()))
    return nn.Sequential(nn.Linear(8, 6), scripted, nn.Linear(6, 3)), torch.randn(4, 8), {"0", "2"}


@odd
def a_counter():
    def forward(self, x):
        self.count += 1
        self.total += x.sum()
        return self.layer(x) + self.count

    model = Model(forward, layer=nn.Linear(8, 6))
    model.count = 0
    model.register_buffer("total", torch.zeros(()))
    return model, torch.randn(4, 8), {"layer"}


@odd
def norm_without_statistics():
    parts = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, track_running_stats=False), nn.ReLU(), nn.Conv2d(8, 8, 3)
    return nn.Sequential(*parts), torch.randn(16, 3, 8, 8), {"0", "3"}


@odd
def a_layer_called_three_times():
    layer = nn.Linear(8, 8)
    return nn.Sequential(layer, nn.BatchNorm1d(8), nn.ReLU(), layer, nn.ReLU(), layer), torch.randn(4, 8), {"0"}


@odd
def tied_weights():
    embedding, layer = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    layer.weight = embedding.weight
    return nn.Sequential(embedding, nn.Linear(8, 8), layer), torch.randint(20, (3, 7)), {"1", "2"}


@odd
def one_image():
    parts = nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3)
    return nn.Sequential(*parts), torch.randn(3, 10, 10), {"0", "3"}


@odd
def one_row():
    return nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(32), {"0", "2"}


@odd
def no_rows():
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)), torch.randn(0, 8), set()


@odd
def an_input_changed_in_place():
    return Model(lambda self, x: (x.add_(1), self.layer(x)), layer=nn.Linear(8, 6)), torch.randn(4, 8), {"layer"}


@odd
def pooling_that_returns_indices():
    forward = lambda self, x: self.unpool(*self.pool(self.conv(x)))  # noqa: E731
    pool, unpool = nn.MaxPool2d(2, return_indices=True), nn.MaxUnpool2d(2)
    return Model(forward, conv=nn.Conv2d(3, 4, 3), pool=pool, unpool=unpool), torch.randn(16, 3, 10, 10), {"conv"}


@odd
def a_synchronised_norm():
    parts = nn.Conv2d(3, 8, 3), nn.SyncBatchNorm(8), nn.ReLU(), nn.Conv2d(8, 8, 3)
    return nn.Sequential(*parts), torch.randn(16, 3, 8, 8), {"0", "3"}


@odd
def a_gradient_inside():
    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(self.b(self.a(x).tanh()).sum(), x)[0]

    return Model(forward, a=nn.Linear(8, 6), b=nn.Linear(6, 1)), torch.randn(4, 8), {"a", "b"}


@odd
def inference_mode_inside():
    def forward(self, x):
        with torch.inference_mode():
            return self.b(self.norm(self.a(x)).relu())

    return Model(forward, a=nn.Linear(8, 6), norm=nn.BatchNorm1d(6), b=nn.Linear(6, 1)), torch.randn(4, 8), {"a", "b"}


@odd
def a_layer_that_raises():
    def forward(self, x):
        try:
            x = self.b(x)
        except RuntimeError:
            x = self.a(x)
        return self.c(x)

    parts = dict(a=nn.Linear(8, 6), b=nn.Linear(7, 6), c=nn.BatchNorm1d(6))
    return Model(forward, **parts), torch.randn(4, 8), {"a"}


@odd
def channels_last():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)
    return model, torch.randn(16, 3, 8, 8).to(memory_format=torch.channels_last), {"0", "2"}


@odd
def float64():
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6)).double(), torch.randn(4, 8, dtype=torch.float64), {"0"}


@odd
def token_ids():
    """An id beyond those in the table raises, so a second input draws from those seen."""
    return nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 6)), torch.randint(5, 20, (3, 7)), {"1"}


@odd
def a_sum_over_tokens_that_pooling_mixes():
    return nn.Sequential(nn.Linear(5, 6), nn.AvgPool2d((2, 1)), nn.Linear(6, 5)), torch.randn(4, 4, 5), {"0", "2"}


@odd
def a_convolution_over_the_features_of_a_linear_layer():
    return nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Conv2d(6, 4, 3)), torch.randn(2, 6, 6, 6), {"0", "2"}
