"""Entries that leave and come are merged as sorting all places would merge them."""

import pytest
import torch

from sparselearning.compact import positions, rows_of
from sparselearning.sparse import merging
from sparselearning.sparse.merging import merge


@pytest.mark.parametrize("together", [1, 7, 2**17])
def test_merging_is_sorting(together, monkeypatch):
    monkeypatch.setattr(merging, "TOGETHER", together)
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        rows, width = torch.randint(1, 9, (2,), generator=generator).tolist()
        shape, size = torch.Size((rows, width)), rows * width
        active = torch.rand(size, generator=generator) < torch.rand(1, generator=generator)
        position = active.nonzero().flatten()
        kept = torch.rand(len(position), generator=generator) < 0.6
        room = torch.ones(size, dtype=torch.bool)
        room[position[kept]] = False
        grown = (room & (torch.rand(size, generator=generator) < 0.4)).nonzero().flatten()
        start, column = rows_of(position, shape)
        merged = merge(start, column, kept, grown, shape)
        expected = torch.cat([position[kept], grown]).sort().values
        assert torch.equal(positions(merged.start, merged.column, width), expected)
        there = {place: i for i, place in enumerate(position.tolist())}
        assert merged.origin.tolist() == [there.get(place, -1) for place in expected.tolist()]
        assert merged.new.tolist() == [place for place in grown.tolist() if place not in there]
        alone = merge(start, column, None, grown[~torch.isin(grown, position)], shape)
        assert torch.equal(
            positions(alone.start, alone.column, width).unique(), torch.cat([position, alone.new]).unique()
        )
