"""Hypothesis searches for a network, a setting or a moment at which an invariant fails."""

import copy

import pytest
import torch
from helpers import assert_masks_hold
from hypothesis import event, given, reject, settings
from hypothesis import strategies as st
from torch import nn

from sparselearning import CosineDecay, LinearDecay, Masking, Updates
from sparselearning.functions import FunctionError
from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.method import WEIGHTS
from sparselearning.methods import METHODS
from sparselearning.prune import PRUNE_FUNCTIONS
from sparselearning.redistribute import REDISTRIBUTION_FUNCTIONS
from sparselearning.schedules import CubicDensity, SoftDensity, StepDensity
from sparselearning.sparse import available
from sparselearning.start.distributions import DISTRIBUTIONS
from sparselearning.start.scores import SCORES
from sparselearning.weights.regrowth import START_VALUES
from sparselearning.weights.start_states import START_STATES

EXAMPLES = [100, pytest.param(10_000, marks=pytest.mark.slow)]
STEPS = 5
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = st.lists(st.integers(1, 7), min_size=2, max_size=4).map(tuple)
PATTERNS = ["1:2", "2:4", "block:2x2", "block:4x1", "fan-in", "fan-in:0.3", "neuron"]
EVEN_SHAPES = st.lists(st.sampled_from([4, 8]), min_size=2, max_size=3).map(tuple)  # that every pattern fits

OPTIMIZERS = {  # the default eps is zero in float16
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "adam": lambda weights: torch.optim.Adam(weights, lr=0.01, eps=1e-4),
    "rmsprop": lambda weights: torch.optim.RMSprop(weights, lr=0.01, momentum=0.9, eps=1e-4),
}
DECAYS = {
    "cosine": lambda rate: CosineDecay(rate, 6),
    "linear": lambda rate: LinearDecay(rate, 6),
    "none": lambda rate: lambda step: rate,
}


@st.composite
def weights(draw, shapes):
    """Return a module with weights of any shape, dtype and layout, some all equal, and parameters that stay dense."""
    dtype = draw(st.sampled_from(DTYPES))
    module = nn.Module()
    for i, shape in enumerate(draw(st.lists(shapes, min_size=1, max_size=5))):
        tied = draw(st.booleans())
        weight = torch.ones(shape, dtype=dtype) if tied else torch.randn(shape).to(dtype)
        if weight.dim() == 4 and draw(st.booleans()):
            weight = weight.contiguous(memory_format=torch.channels_last)
        module.register_parameter(f"layer{i}", nn.Parameter(weight))
    for i, shape in enumerate(draw(st.lists(st.sampled_from([(), (3,), (0, 4)]), max_size=2))):
        module.register_parameter(f"dense{i}", nn.Parameter(torch.randn(shape).to(dtype)))
    return module


@st.composite
def layers(draw):
    """Return linear and convolution layers, which can train on sparse kernels."""
    sizes = st.integers(1, 6)
    drawn = draw(st.lists(st.tuples(sizes, sizes, st.integers(0, 3)), min_size=1, max_size=4))
    made = [nn.Conv2d(inputs, outputs, kernel) if kernel else nn.Linear(inputs, outputs)
            for inputs, outputs, kernel in drawn]  # fmt: skip
    return nn.ModuleList(made).to(draw(st.sampled_from([torch.float32, torch.float64])))


def fill_gradients(module):
    """Give every parameter the gradient of a random loss."""
    module.zero_grad()
    loss = torch.zeros(())
    for layer in module.children():
        inputs = (4, layer.in_features) if isinstance(layer, nn.Linear) else (4, layer.in_channels, 3, 3)
        loss = loss + (layer(torch.randn(inputs, dtype=layer.bias.dtype)) - 1).square().mean()
    if loss.requires_grad:
        loss.backward()
    for weight in module.parameters(recurse=False):
        weight.grad = torch.randn(weight.shape).to(weight.dtype)


class Settings:
    """Draws the arguments of a Masking and makes one."""

    def __init__(self, data, sparsely, pattern, most):
        self.data, self.most = data, most
        self.weights = "sparse" if sparsely else "zero" if pattern else self.one_of(WEIGHTS.keys() - {"sparse"})
        self.schedule = None

    def one_of(self, table):
        return self.data.draw(st.sampled_from(sorted(table)))

    def fraction(self, low, high=1.0):
        return self.data.draw(st.floats(low, high))

    def mode(self, table):
        # Those that compare inactive weights need them to be kept.
        return self.one_of(name for name in table if "dense" not in name or self.weights in ("kept", "soft"))

    def draw_schedule(self, density):
        least = min(density, self.most / 2)
        kinds = {
            "none": lambda: None,
            "cubic": lambda: CubicDensity(
                density, self.fraction(least, self.most), 1, self.data.draw(st.integers(1, STEPS))
            ),
            "step": lambda: StepDensity(
                density, self.fraction(least, self.most), self.data.draw(st.integers(0, STEPS))
            ),
            "soft": lambda: SoftDensity(least, lambda step: 0.3, STEPS - 1),
        }
        return kinds[self.one_of(kinds)]()

    def masking(self, optimizer, density):
        self.schedule = self.draw_schedule(density)
        every, first = self.data.draw(st.integers(0, 3)), self.data.draw(st.integers(0, 2))
        reset = self.data.draw(st.sampled_from([False, *START_STATES]))
        pull = self.data.draw(st.sampled_from([0.0, 1e-3]))
        regrown = "zero" if self.weights in ("kept", "soft") else self.one_of(START_VALUES)
        return Masking(
            optimizer, DECAYS[self.one_of(DECAYS)](self.fraction(0)), prune_mode=self.mode(PRUNE_FUNCTIONS),
            growth_mode=self.mode(GROWTH_FUNCTIONS), redistribution_mode=self.mode(REDISTRIBUTION_FUNCTIONS),
            updates=Updates(every, first, density=self.schedule),
            weights=WEIGHTS[self.weights](regrown=regrown, reset_state=reset, pull=pull),
        )  # fmt: skip

    def rescale(self):
        return self.weights not in ("kept", "soft") and self.data.draw(st.booleans())


def saved_and_loaded(module, masking):
    state = copy.deepcopy([part.state_dict() for part in (module, masking.optimizer, masking)])
    for part, saved in zip((module, masking.optimizer, masking), state, strict=True):
        part.load_state_dict(saved)
    return module, masking


MOMENTS = {  # what happens between two steps
    "nothing": lambda module, masking: (module, masking),
    "deepcopy": lambda module, masking: copy.deepcopy((module, masking)),
    "state_dict": saved_and_loaded,
    "weights alone": lambda module, masking: (module.load_state_dict(module.state_dict()), (module, masking))[1],
}


def check_any(data):
    torch.manual_seed(data.draw(st.integers(0, 1000), label="seed"))
    pattern = data.draw(st.sampled_from([None, None, None, *PATTERNS]), label="pattern")
    sparsely = available() and not pattern and data.draw(st.sampled_from([False, False, True]), label="sparsely")
    network = layers() if sparsely else weights(EVEN_SHAPES if pattern else SHAPES)
    module = data.draw(network, label="network")
    most = 0.3 if pattern in ("1:2", "2:4") else 1.0
    drawn = Settings(data, sparsely, pattern, most)
    optimizer = OPTIMIZERS[drawn.one_of(OPTIMIZERS)](list(module.parameters()))
    sizes = [weight.numel() for weight in module.parameters() if weight.dim() > 1 and weight.numel()]
    density = data.draw(st.floats(min(most, (len(sizes) + 1) / sum(sizes)), most), label="density")
    unscored = sorted(name for name, method in METHODS.items() if method.sparse_init not in SCORES)  # without a batch
    method = data.draw(st.sampled_from([None, None, *unscored]), label="method")
    bare = [name for name, _ in module.named_parameters() if name.startswith("layer") and "." not in name]
    where = dict(pattern=pattern, sparse=bare)
    try:
        if method is None:
            masking = drawn.masking(optimizer, density)
            masking.add_module(module, density, drawn.one_of(DISTRIBUTIONS), rescale=drawn.rescale(), **where)
        else:
            held = dict(weights="sparse") if sparsely else {}
            masking = Masking.from_method(
                method, module, optimizer, STEPS, density, prune_every_k_steps=1, **where, **held
            )
    except (ValueError, FunctionError) as error:  # parts that exclude each other, which they say
        if not any(word in str(error) for word in ("pattern", "inactive", "leaves none", "Adam and AdamW")):
            raise
        reject()
    event(f"{pattern or method or 'modes'}{' on sparse kernels' if sparsely else ''}")
    follow(data, module, masking, density, sum(sizes))


def follow(data, module, masking, density, size):
    """Train, and check the invariants after every step."""
    constant = masking.updates.density is None
    exact = all(layer.pattern.most is None and layer.pattern.size == 1 for layer in masking.layers)
    if constant and exact:
        assert masking.total_nonzero == max(round(density * size), len(masking.layers))
    storages = [weight.data_ptr() for weight in module.parameters() if weight.requires_grad and weight.dim() > 1]
    moves = masking.held.kind == "sparse"
    moment, at = data.draw(st.sampled_from(sorted(MOMENTS)), label="moment"), data.draw(st.integers(0, STEPS))
    for step in range(STEPS):
        if step == at:
            module, masking = MOMENTS[moment](module, masking)
            moves |= moment == "deepcopy"
        total = masking.total_nonzero
        fill_gradients(module)
        masking.step()
        masking.check()
        masking.at_end_of_epoch()
        masking.check()
        assert_masks_hold(masking)
        for layer in masking.layers:
            assert layer.weight.isfinite().all()
            assert layer.pattern.holds(layer.mask)
            assert layer.compact or (layer.mask <= layer.ever_active).all()
            assert layer.nonzeros <= layer.explored <= layer.size
        if constant:
            left_over = sum(layer.left_over for layer in masking.layers)
            assert masking.total_nonzero == masking.baseline_nonzero - left_over
            assert masking.total_nonzero == total or any(layer.pattern.ablation for layer in masking.layers)
    if not moves:
        assert storages == [w.data_ptr() for w in module.parameters() if w.requires_grad and w.dim() > 1]
    saved_and_loaded(module, masking)[1].check()


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:A density of")  # which a pattern's units cannot keep in every layer
@pytest.mark.parametrize("examples", EXAMPLES)
def test_invariants_hold_whatever_is_trained(examples):
    settings(max_examples=examples)(given(st.data())(check_any))()
