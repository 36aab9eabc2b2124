"""Well-formed files with hostile values, drawn by chance: refused in one line or loaded whole, within bounds.

The files have valid checksums. Another process loads them, whose memory is limited and measured.
"""

import copy
import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch
from helpers import masked, train
from torch import nn

from sparselearning import archive, checkpoint
from sparselearning.sparse import SparseLinear
from sparselearning.sparse.files import pack_positions

SECONDS, MEGABYTES = 1, 200
NUMBERS = [
    *(math.nan, math.inf, -math.inf, -1, -4, 0, 1, 0.5, 1e308, 2**31, 2**40, 2**63, 10**400, True, None, "1", "", b"x"),
    *("x" * 10_000, [], {}, (), [1], {"a": 1}, 1j),
]


@pytest.fixture(params=[100, pytest.param(1000, marks=pytest.mark.slow)])
def examples(request):
    return request.param


def cyclic():
    found: list = []
    found.append(found)
    return found


def nested(depth):
    found = []
    for _ in range(depth):
        found = [found]
    return found


def hostile_tensor(draw, tensor):
    """Return a tensor that resembles another one, in the wrong way."""
    return draw.choice([
        lambda: tensor.to(draw.choice([torch.float64, torch.int8, torch.bool, torch.complex64, torch.bfloat16])),
        lambda: tensor.flatten()[: draw.randrange(4)].clone(),
        lambda: tensor.unsqueeze(0),
        lambda: torch.zeros((), dtype=tensor.dtype).expand(draw.choice([(2**40,), (2**20, 2**20), tensor.shape])),
        lambda: torch.empty(draw.choice([(2**40,), tensor.shape]), device="meta"),
        lambda: tensor.new_zeros(0),
        lambda: torch.full(tensor.shape, draw.randrange(256), dtype=torch.uint8).view(torch.bool),
        lambda: (tensor.double() * draw.choice([math.nan, math.inf, -1, 1e300])).to(tensor.dtype),
        lambda: tensor.flip(0) if tensor.dim() else tensor,
        lambda: tensor.to_sparse() if tensor.dim() else tensor,
    ])()  # fmt: skip


def places(state, depth=6):
    """Return (container, key) of every entry of nested dicts and lists, down to a depth."""
    found = []
    for key in list(state) if isinstance(state, dict) else range(len(state)):
        found.append((state, key))
        if isinstance(state[key], dict | list) and depth:
            found += places(state[key], depth - 1)
    return found


def change(draw, state):
    """Put something hostile at one or two places of a state."""
    for _ in range(draw.choice([1, 1, 2])):
        here = [entry for entry in places(state) if entry[1] not in ("format", "kinds")]
        place, key = draw.choice(here)
        value = place[key]
        what = draw.random()
        plain = isinstance(value, torch.Tensor) and value.layout == torch.strided and value.numel() < 2**20
        if plain and what < 0.7:
            place[key] = hostile_tensor(draw, value)
        elif what < 0.8:
            place[key] = draw.choice([*NUMBERS, cyclic(), nested(300), torch.ones(3)])
        elif what < 0.9 and isinstance(place, dict):
            del place[key]
        elif isinstance(place, dict):
            place[draw.choice(["extra", 5, "", "x" * 1000])] = copy.copy(value)


def model_of():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    masking = masked(model, torch.optim.Adam(model.parameters()), density=0.5)
    train(model, masking, 2, torch.randn(6, 8))
    return dict(model=model, optimizer=masking.optimizer, mask=masking)


def sparse_model():
    torch.manual_seed(0)
    return nn.Sequential(SparseLinear.from_dense(nn.Linear(8, 6), torch.rand(6, 8) < 0.5))


class Given:
    """A part of a checkpoint that saves what it is told to."""

    def __init__(self, kind, state):
        self.kind, self.state = kind, state

    def state_dict(self):
        return self.state


def hostile_checkpoint(draw, path):
    state = {name: copy.deepcopy(part.state_dict()) for name, part in model_of().items()}
    rest = {"random": copy.deepcopy(checkpoint.random_state()), "epoch": 3}
    whole = {name: dict(part) for name, part in state.items()} | rest
    change(draw, whole)
    kinds = {"model": "Sequential", "optimizer": "Adam", "mask": "Masking"}
    whole |= {"format": 2, "kinds": kinds}
    checkpoint.write_atomically(path, lambda file: archive.write(whole, file))


def hostile_weights(draw, path):
    state = dict(copy.deepcopy(sparse_model().state_dict()))
    change(draw, state)
    torch.save(state, path)


def hostile_entry(draw, entry):
    sizes = [draw.choice([-1, 0, 1, 30, 2**20, 2**32, 2**40, 2**62]) for _ in range(draw.choice([1, 2, 3, 70]))]
    return draw.choice([
        lambda: entry.to(draw.choice([torch.float64, torch.int64, torch.int8, torch.bool, torch.uint8])),
        lambda: entry[: draw.randrange(1 + len(entry))].clone(),
        lambda: entry.unsqueeze(0),
        lambda: torch.cat([entry, entry]),
        lambda: torch.tensor(sizes),
        lambda: torch.full((draw.randrange(1, 3000),), draw.choice([0, 254, 255]), dtype=torch.uint8),
        lambda: torch.full(entry.shape, 2, dtype=torch.uint8).view(torch.bool),
    ])()  # fmt: skip


def hostile_compressed(draw, path):
    from safetensors.torch import save_file

    weight = torch.rand(30, 40) * (torch.rand(30, 40) < 0.1)
    values, shape = weight[weight != 0], torch.tensor(weight.shape)
    gaps = torch.from_numpy(pack_positions(weight.flatten().nonzero().flatten().numpy()))
    entries = {"w.sparse_values": values, "w.sparse_gaps": gaps, "w.sparse_shape": shape, "b": torch.randn(30)}
    for _ in range(draw.choice([1, 1, 2])):
        name = draw.choice(sorted(entries))
        entry = entries[name].clone()
        entries[name] = hostile_entry(draw, entry)
        if draw.random() < 0.2:
            entries[draw.choice(["w", "b.sparse_gaps", "b.sparse_shape", "v.sparse_values"])] = entries.pop(name)
    save_file(entries, path)


KINDS = {"checkpoint": hostile_checkpoint, "weights": hostile_weights, "compressed": hostile_compressed}


def state_of(parts):
    return copy.deepcopy([*(part.state_dict() for part in parts.values()), checkpoint.random_state()])


def try_file(path):
    """Load one file; return (refusal or None, whether anything changed although it was refused)."""
    from script import assert_equal

    from sparselearning.sparse import load_compressed

    kind = os.path.basename(path).partition(".")[0]
    parts = model_of() if kind == "checkpoint" else {"model": sparse_model()} if kind == "weights" else {}
    before = state_of(parts)
    try:
        if kind == "compressed":
            load_compressed(path)
        elif kind == "weights":
            checkpoint.load_weights(path, **parts)
        else:
            checkpoint.load(path, **parts)
            train(parts["model"], parts["mask"], 1, torch.randn(6, 8))
    except (checkpoint.CheckpointError, ValueError) as error:
        if isinstance(error, ValueError) == (kind != "compressed"):
            raise
        assert_equal(state_of(parts), before, path)
        return str(error)
    if kind == "weights":
        parts["model"](torch.randn(3, 8))
    return None


def main():
    """Load the files that stdin names, one a line; print a line of JSON for each."""
    import resource
    import time

    torch.set_num_threads(1)
    sys.path.insert(0, os.path.dirname(__file__))
    try_file(sys.stdin.readline().strip())  # imports what it needs
    start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for line in sys.stdin:
        began = time.perf_counter()
        try:
            said = try_file(line.strip())
        except BaseException as error:
            said = f"FAILED {type(error).__name__}: {error}"
        seconds = time.perf_counter() - began
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start) / 1024
        print(json.dumps([os.path.basename(line.strip()), said, seconds, grown]), flush=True)


@pytest.mark.long
def test_hostile_values_are_refused_or_load_whole_within_bounds(tmp_path, examples):
    pytest.importorskip("resource")
    paths = []
    for number in range(examples):
        kind = list(KINDS)[number % len(KINDS)]
        paths.append(tmp_path / f"{kind}.{number}")
        KINDS[kind](random.Random(number), paths[-1])
    names = "".join(f"{path}\n" for path in [paths[0], *paths])
    ended = subprocess.run([sys.executable, __file__], input=names, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr[-2000:]
    results = [json.loads(line) for line in ended.stdout.splitlines()]
    assert [name for name, *_ in results] == [path.name for path in paths]
    refused = [(name, said) for name, said, *_ in results if said is not None]
    assert [entry for entry in refused if entry[1].startswith("FAILED")] == []
    assert [entry for entry in refused if "\n" in entry[1] or len(entry[1]) > 2000] == []
    assert [(name, seconds) for name, _, seconds, _ in results if seconds > SECONDS] == []
    assert max(grown for *_, grown in results) < MEGABYTES
    assert len(refused) > 0.5 * examples


if __name__ == "__main__":
    main()
