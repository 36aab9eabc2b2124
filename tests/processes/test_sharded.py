"""Masks of sharded weights are those that one process would select, ties included."""

import math

import pytest
import torch
import torch.distributed as dist
from launch import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from sparselearning import Masking
from sparselearning.processes.sharded import fetch, indices_of, placed_like, shard_of, uniform_like, unsharded
from sparselearning.selection import add_highest_jointly, drop_lowest_jointly

SHAPES = [(5, 3), (1, 7), (64, 9, 3, 3), (2, 2)]  # fewer rows than processes, rows that do not divide evenly


def cases():
    """Scores and masks with many ties, NaN, infinities and zeros of both signs, in three precisions."""
    generator = torch.Generator().manual_seed(1)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        scores = [torch.randint(-4, 5, shape, generator=generator).to(dtype) * 0.25 for shape in SHAPES]
        for score in scores:
            special = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e-40, -1e-40], dtype=dtype)
            where = torch.randint(score.numel(), (6,), generator=generator)
            score.flatten()[where] = special
        masks = [torch.rand(shape, generator=generator) < 0.5 for shape in SHAPES]
        yield scores, masks
        yield [torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES], masks


def select_in_shards(mesh_shape, dimension_of):
    """Compare the selection over shards with that over whole tensors; return the number of comparisons."""
    mesh = init_device_mesh("cpu", mesh_shape)
    replicas = [Replicate()] * (len(mesh_shape) - 1)
    like = [distribute_tensor(torch.zeros(shape), mesh, [*replicas, Shard(dimension_of(shape))]) for shape in SHAPES]
    compared = 0
    for scores, masks in cases():
        score_parts = [shard_of(score, part) for score, part in zip(scores, like, strict=True)]
        mask_parts = [shard_of(mask, part) for mask, part in zip(masks, like, strict=True)]
        for k in (1, 100, 700, 10**6):
            for select, given in ((drop_lowest_jointly, score_parts), (add_highest_jointly, scores)):
                found = select(given, mask_parts, k)  # random scores come whole
                for expected, mask, part in zip(select(scores, masks, k), found, like, strict=True):
                    assert mask.placements == part.placements
                    assert torch.equal(expected, mask.full_tensor()), (k, select.__name__)
                    compared += 1
    return compared


def by_rows(shape):
    return 0


def by_the_longest_dimension(shape):
    return shape.index(max(shape))


@pytest.mark.long
@pytest.mark.parametrize(
    ("mesh_shape", "dimension_of"), [((3,), by_rows), ((2,), by_the_longest_dimension), ((2, 2), by_rows)]
)
def test_selection_over_shards_is_that_over_the_whole(mesh_shape, dimension_of):
    processes = math.prod(mesh_shape)
    assert run(select_in_shards, processes, mesh_shape, dimension_of) == [6 * 4 * 2 * len(SHAPES)] * processes


def fetch_sums():
    """Fetch a number, the sum of a sharded tensor and that of a whole one."""
    mesh = init_device_mesh("cpu", (2,))
    part = distribute_tensor(torch.arange(10), mesh, [Shard(0)])
    return fetch([1.5, part.sum(), torch.arange(10).sum()])


def test_fetched_numbers_of_shards_are_added_up():
    assert run(fetch_sums, 2) == [[1.5, 45, 45]] * 2


def place():
    """Place a whole and a sharded mask like the sharded one; return both gathered, after a change to the original."""
    whole = torch.arange(10) % 3 == 0
    mask = distribute_tensor(whole, init_device_mesh("cpu", (2,)), [Shard(0)])
    copies = [placed_like(mask, value) for value in (whole, mask)]
    mask.to_local().fill_(False)
    return [copy.full_tensor() for copy in copies if copy.placements == mask.placements]


def a_sum_that_is_not_added_up():
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    weight = DTensor.from_local(torch.ones(2, 3), mesh, [Partial()])
    with pytest.raises(ValueError, match=r"sharded or replicated, got .*redistribute on the weight"):
        indices_of(weight)
    return "refused"


def test_weights_that_are_neither_sharded_nor_replicated_are_refused():
    assert run(a_sum_that_is_not_added_up, 2) == ["refused"] * 2


def test_a_mask_is_copied_to_where_another_lies():
    for copies in run(place, 2):
        assert [copy.tolist() for copy in copies] == [[i % 3 == 0 for i in range(10)]] * 2


def test_fetch_takes_numbers_and_0d_tensors():
    weight = torch.ones(3, requires_grad=True)
    assert fetch([2, torch.tensor(3), weight.sum(), torch.tensor(True), 0.25]) == [2, 3, 3, 1, 0.25]
    assert fetch([1, 0.5]) == [1, 0.5]
    assert fetch([]) == []


def draw():
    mesh = init_device_mesh("cpu", (2,))
    part = distribute_tensor(torch.zeros(7, 3), mesh, [Shard(0)])
    torch.manual_seed(dist.get_rank())
    drawn = uniform_like(part).full_tensor()
    return drawn, torch.rand(2)


def test_random_scores_are_those_of_process_0_and_leave_the_others_their_generator():
    (first, after_first), (second, after_second) = run(draw, 2)
    torch.manual_seed(0)
    expected = torch.rand(7, 3)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert torch.equal(after_first, torch.rand(2))
    assert torch.equal(after_second, torch.rand(2, generator=torch.Generator().manual_seed(1)))


def resume(state):
    """Load a whole state into a sharded network."""
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(6, 5)
    fully_shard(model)
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None)
    masking.add_module(model, density=0.5)
    masking.load_state_dict(state)
    return unsharded(masking.state_dict())


def test_a_saved_mask_is_sharded_when_it_is_loaded():
    model = nn.Linear(6, 5)
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None)
    masking.add_module(model, density=0.3)
    for state in run(resume, 2, masking.state_dict()):
        assert torch.equal(state["layers"]["weight"]["mask"], masking.masks["weight"])
        assert state["baseline_nonzero"] == 9


def rescaled(shard):
    """Return the rescaled weights of a network, sharded or whole."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(3)
    model = nn.Linear(9, 7)
    if shard:
        fully_shard(model)
    masking = Masking(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None)
    masking.add_module(model, density=0.3, rescale=True)
    return unsharded(model.state_dict())["weight"].clone()


def test_sharded_weights_are_rescaled_as_whole_ones():
    expected = rescaled(shard=False)
    for weight in run(rescaled, 2, True):
        torch.testing.assert_close(weight, expected)
