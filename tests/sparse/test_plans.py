"""A saved program that is called again with inputs of the same layout runs its kernels from a list laid out before."""

import copy
import random
import threading

import pytest
import torch
from helpers import needs_torch
from helpers_conversion import sparsify
from helpers_serving import NAMES, served_model
from helpers_sparse import instruction_sets
from torch import nn

from sparselearning.sparse import SparseConv2d, SparseLinear, available, convert, load, planning, save
from sparselearning.sparse.interface import kernels, watched
from sparselearning.sparse.planning import MOST_LAYOUTS, SEEN, Watcher
from sparselearning.sparse.plans import Block, Kernels, Plan, Step, lay_out

pytestmark = [
    needs_torch(2, 8, "a dynamic batch of convolutions"),
    pytest.mark.skipif(not available(), reason="built without sparse kernels"),
]


def sparse_conv(*shape, **options):
    return SparseConv2d.from_dense(sparsify(nn.Conv2d(*shape, **options), 0.3))


def sparse_linear(*shape):
    return SparseLinear.from_dense(sparsify(nn.Linear(*shape), 0.3))


def served(model, x, path):
    """Return a module after a file."""
    torch.manual_seed(0)
    save(model, path / "model.sparse", x)
    return load(path / "model.sparse")


def plan_of(program, x):
    """Return the plan of a program for x, after the calls that it takes to get one."""
    program(x), program(x)
    (plan,) = [each for each in program.plans.known.values() if isinstance(each, Plan)]
    return plan


@pytest.fixture
def small(tmp_path):
    """Two convolutions and a linear layer, with steps between that are no kernels."""
    layers = sparse_conv(3, 8, 3, padding=1), nn.ReLU(), nn.Sigmoid(), sparse_conv(8, 8, 3), nn.Flatten()
    return served(nn.Sequential(*layers, sparse_linear(8 * 36, 5)), torch.randn(8, 3, 8, 8), tmp_path)


@pytest.mark.long
@pytest.mark.usefixtures("always_faster")
@pytest.mark.parametrize("name", NAMES)
def test_planned_calls_give_what_the_first_call_gives(tmp_path, name):
    torch.manual_seed(0)
    model, inputs = served_model(name)
    fast, _ = convert(model, inputs(8))
    serve = served(fast, inputs(8), tmp_path)
    for rows in (1, 3, 8, 16):
        given = [inputs(rows) for _ in range(3)]
        with torch.no_grad():
            expected = [fast(x) for x in given]
        for _ in range(2):
            for x, y in zip(given, expected, strict=True):
                assert torch.equal(serve(x), y)
    assert len(serve.plans.known) == 4
    if name not in ("gpt", "alexnet-s"):
        assert all(isinstance(plan, Plan) for plan in serve.plans.known.values())


@pytest.mark.parametrize("isa", instruction_sets())
def test_kernels_with_nothing_between_are_one_call(tmp_path, monkeypatch, isa):
    layers = sparse_conv(3, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), sparse_conv(8, 8, 3), nn.ReLU(), nn.Flatten()
    serve = served(nn.Sequential(*layers, sparse_linear(32, 5)), torch.randn(2, 3, 8, 8), tmp_path)
    monkeypatch.setattr(kernels(), "instruction_set", isa)
    x = torch.randn(2, 3, 8, 8)
    first, called = serve(x), []
    serve(x)
    call = kernels().call
    monkeypatch.setattr(kernels(), "call", lambda name, *rest: called.append(name) or call(name, *rest))
    assert torch.equal(serve(x), first)
    assert called == ["sl_run"]


def test_steps_between_kernels_run_as_they_did(small):
    for rows in (1, 2, 8, 16):
        x, other = torch.randn(rows, 3, 8, 8), torch.randn(rows, 3, 8, 8)
        expected, of_other = small(x), small(other)
        assert torch.equal(small(x), expected)
        assert torch.equal(small(other), of_other)
        kinds = [type(item) for item in plan_of(copy.deepcopy(small), x).items]
        assert kinds == [Kernels, Step, Kernels]  # a convolution, the sigmoid, and the others


def test_what_a_call_returned_stays(small):
    x = torch.randn(4, 3, 8, 8)
    results = [small(x) for _ in range(4)]
    kept = [y.clone() for y in results]
    small(torch.randn(4, 3, 8, 8))
    assert all(map(torch.equal, results, kept))


def test_calls_in_inference_mode_and_outside_share_a_plan_and_its_memory(small):
    x = torch.randn(4, 3, 8, 8)
    expected = small(x)
    with torch.inference_mode():
        assert all(torch.equal(small(x), expected) for _ in range(3))
    weight = torch.ones(5, requires_grad=True)
    (small(x) * weight).sum().backward()  # what an inference tensor would refuse
    assert torch.allclose(weight.grad, expected.sum(0))
    with torch.inference_mode():
        assert torch.equal(small(x), expected)


def test_threads_may_call_one_program(small):
    given = [torch.randn(4, 3, 8, 8) for _ in range(4)]
    expected = [small(x) for x in given]
    wrong = []

    def work(x, y):
        wrong.extend(1 for _ in range(50) if not torch.equal(small(x), y))

    threads = [threading.Thread(target=work, args=pair) for pair in zip(given, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_copy_has_plans_of_its_own(small):
    x = torch.randn(4, 3, 8, 8)
    plan_of(small, x)
    other = copy.deepcopy(small)
    assert not other.plans.known
    for tensor in other.stored["tensor"]:
        tensor.zero_()
    assert not any(other(x).any() for _ in range(3))
    assert small(x).any()


def test_other_layouts_have_plans_of_their_own(small):
    plain = torch.randn(8, 3, 8, 8)
    turned = plain.movedim(0, -1).contiguous().movedim(-1, 0)
    expected = small(plain)
    for x in (
        plain,
        turned,
        plain.flip(0).flip(0),
        plain.expand(8, 3, 8, 8),
        plain.to(memory_format=torch.channels_last),
    ):
        for _ in range(3):
            assert torch.equal(small(x), expected)


def test_steps_that_give_another_layout_end_a_plan(small):
    x = torch.randn(4, 3, 8, 8)
    expected, plan = small(x), plan_of(small, x)
    step = next(item for item in plan.items if isinstance(item, Step) and item.slot)
    run = step.run
    step.run = lambda *given: run(*given).double()
    assert torch.equal(small(x), expected)
    assert list(small.plans.known.values()) == [None]
    assert torch.equal(small(x), expected)


def test_a_plan_that_gives_something_else_is_not_kept(small, monkeypatch):
    planned = Watcher.planned

    def wrong(self, values):
        plan = planned(self, values)
        for step in plan.items:
            if isinstance(step, Step):
                step.run = lambda *given, run=step.run: run(*given) + 1
        return plan

    monkeypatch.setattr(Watcher, "planned", wrong)
    x = torch.randn(4, 3, 8, 8)
    results = [small(x) for _ in range(4)]
    assert list(small.plans.known.values()) == [None]
    assert all(torch.equal(y, results[0]) for y in results)


class Odd(nn.Module):
    """Steps whose results do not follow from the layout of x."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.layer = kind, sparse_linear(6, 6)

    def forward(self, x):
        y = self.layer(x)
        if self.kind == "random":
            return y + torch.rand_like(y)
        if self.kind == "several":
            left, right = self.layer(y).chunk(2, dim=1)
            return self.layer(torch.cat((right, left), 1)), left, right.T
        if self.kind == "input":
            return x, y, x.T
        if self.kind == "sizes":
            return y.view(x.shape[0] * 2, 3) * x.shape[0]
        if self.kind == "nothing":
            return x + 1
        return self.layer(x), x.isnan().any()


@pytest.mark.parametrize("kind", ["several", "input", "sizes", "nothing", "flag"])
def test_odd_programs_give_the_same_each_time(tmp_path, kind):
    serve = served(Odd(kind), torch.randn(4, 6), tmp_path)
    for rows in (1, 2, 9):
        x, other = torch.randn(rows, 6), torch.randn(rows, 6)
        x[0, 0] = float("nan")
        expected = [serve(x), serve(other)]
        for _ in range(2):
            for found, wanted in ((serve(x), expected[0]), (serve(other), expected[1])):
                for a, b in zip(listed(found), listed(wanted), strict=True):
                    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def listed(y):
    return [y] if isinstance(y, torch.Tensor) else list(y)


def test_programs_that_draw_numbers_have_no_plan(small):
    given = copy.deepcopy(small)
    place = next(i for i, step in enumerate(given.steps) if "sigmoid" in str(step[1]))
    number, _, args, *rest = given.steps[place]
    given.steps[place] = (number, torch.ops.aten.rand_like.default, args[:1], *rest)
    x = torch.randn(4, 3, 8, 8)
    assert len({float(given(x).sum()) for _ in range(4)}) > 1
    assert list(given.plans.known.values()) == [None]


@torch.no_grad()
def test_no_plan_where_something_looks_at_the_call(small):
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", enabled=True, dtype=torch.bfloat16):
        assert planning.layouts_of({0: x}) is None
    assert planning.layouts_of({0: x}) is not None
    assert planning.layouts_of({0: nn.Parameter(x)}) is None
    assert planning.layouts_of({0: torch._neg_view(x)}) is None
    assert planning.layouts_of({0: x[:0]}) is None
    assert planning.layouts_of({}) is None
    emptied = x.clone()
    emptied.untyped_storage().resize_(0)
    assert planning.layouts_of({0: emptied}) is None


def test_layouts_that_came_long_ago_are_forgotten(small):
    for rows in range(1, MOST_LAYOUTS + 10):
        small(torch.randn(rows, 3, 8, 8))
    assert list(small.plans.known.values()) == [SEEN] * MOST_LAYOUTS


def test_memory_is_used_again(tmp_path):
    serve = served(nn.Sequential(*(sparse_linear(64, 64) for _ in range(10))), torch.randn(4, 64), tmp_path)
    plan = plan_of(serve, torch.randn(32, 64))
    assert plan.bytes == 2 * 32 * 64 * 4


def test_the_memory_of_a_call_is_that_of_the_next(small):
    large, few = torch.randn(16, 3, 8, 8), torch.randn(2, 3, 8, 8)
    plan_of(small, large)
    small(large)
    (memory,) = small.plans.spare
    for x in (few, large, few):
        expected = copy.deepcopy(small)(x)
        for _ in range(3):
            assert torch.equal(small(x), expected)
    assert small.plans.spare[0] is memory
    assert not copy.deepcopy(small).plans.spare


class Views(nn.Module):
    """Views of what a sparse layer gives, by steps that are no kernels."""

    def __init__(self):
        super().__init__()
        self.layer = sparse_linear(6, 6)

    def forward(self, x):
        y = self.layer(x)
        left, right = y.chunk(2, dim=1)
        return y, y.T, left, right


def test_results_are_no_views_of_memory_that_is_used_again(tmp_path):
    serve = served(Views(), torch.randn(4, 6), tmp_path)
    x = torch.randn(4, 6)
    results = [serve(x) for _ in range(4)]
    kept = [[y.clone() for y in each] for each in results]
    serve(torch.randn(4, 6))
    for found, wanted in zip(results, kept, strict=True):
        assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("seed", range(20))
def test_blocks_that_are_needed_together_lie_apart(seed):
    draw = random.Random(seed)
    blocks = []
    for _ in range(draw.randint(0, 40)):
        first = draw.randint(0, 30)
        blocks.append(Block(draw.randint(1, 1000), first, first + draw.randint(0, 8)))
    size = lay_out(blocks)
    assert all(block.begin >= 0 and block.end <= size and block.begin % 64 == 0 for block in blocks)
    for i, one in enumerate(blocks):
        for other in blocks[:i]:
            assert not one.is_needed_with(other) or one.end <= other.begin or other.end <= one.begin
    assert size <= sum(block.bytes + 64 for block in blocks)


def test_kernels_are_watched_by_the_thread_that_asks(small):
    x = torch.randn(4, 3, 8, 8)
    with watched() as calls:
        thread = threading.Thread(target=small.run, args=({("input", 0): x},))
        thread.start()
        thread.join()
        assert not calls
        with torch.no_grad():
            small.run({("input", 0): x})
    assert calls
