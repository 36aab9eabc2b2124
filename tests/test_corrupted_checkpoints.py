"""Checkpoints damaged by chance or by intent: each is refused with one line, or loads what was saved."""

import io
import os
import pickle
import random
import struct
import subprocess
import zipfile
from itertools import combinations

import pytest
import torch
from helpers import masked, mlp, train
from script import assert_equal
from torch import nn

from sparselearning import checkpoint
from sparselearning.checkpoint import CheckpointError


@pytest.fixture(params=[100, pytest.param(1000, marks=pytest.mark.slow)])
def examples(request):
    return request.param


@pytest.fixture
def files(tmp_path):
    """Return two checkpoints of one run, as bytes."""
    model = nn.Sequential(mlp(8, 16, 4), nn.BatchNorm1d(4))
    masking = masked(model)
    contents = []
    for epoch in range(2):
        train(model, masking, 2)
        parts = dict(model=model, optimizer=masking.optimizer, mask=masking)
        checkpoint.save(tmp_path / "c.pt", **parts, epoch=epoch, metrics=[{"loss": 0.5}])
        contents.append((tmp_path / "c.pt").read_bytes())
    return contents


class Command:
    """A pickle that calls a function when it is loaded."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def truncate(draw, content, other):
    return content[: draw.randrange(len(content))]


def flip_bits(draw, content, other):
    content = bytearray(content)
    for _ in range(draw.choice([1, 1, 1, 2, 8])):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    return bytes(content)


def zero_a_block(draw, content, other):
    """Zero one block, as a file system leaves one that it had not written yet."""
    start = draw.randrange(len(content))
    return content[:start] + bytes(len(content[start : start + 512])) + content[start + 512 :]


def swap_blocks(draw, content, other):
    one, two = sorted(draw.sample(range(0, len(content) - 512, 512), 2))
    blocks = content[two : two + 512], content[one + 512 : two], content[one : one + 512]
    return content[:one] + b"".join(blocks) + content[two + 512 :]


def append(draw, content, other):
    return content + draw.randbytes(draw.randrange(1, 2000))


def join_two(draw, content, other):
    """Join the beginning of one file with the end of another, as when one is written over the other."""
    cut = draw.randrange(len(content))
    return content[:cut] + other[cut:]


def members(content):
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def archive_of(entries):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return content.getvalue()


def swap_members(draw, content, other):
    """Exchange two tensors, in an archive that is otherwise whole."""
    entries = members(content)
    data = [name for name in entries if "/data/" in name]
    pairs = [
        (a, b) for a, b in combinations(data, 2) if len(entries[a]) == len(entries[b]) and entries[a] != entries[b]
    ]
    one, two = draw.choice(pairs)
    entries[one], entries[two] = entries[two], entries[one]
    return archive_of(entries)


def take_a_member_of_another(draw, content, other):
    entries, others = members(content), members(other)
    name = draw.choice(sorted(entries.keys() & others.keys()))
    return archive_of(entries | {name: others[name]})


def leave_a_member_out(draw, content, other):
    entries = members(content)
    del entries[draw.choice(sorted(entries))]
    return archive_of(entries)


def flip_the_bits_of_a_member(draw, content, other):
    """Change a member and the archive's own checksum with it."""
    entries = members(content)
    name = draw.choice(sorted(entries))
    return archive_of(entries | {name: flip_bits(draw, entries[name], b"") if entries[name] else b"x"})


def write_a_pickle_with_code(draw, content, other):
    """Write a pickle that would run code, bare or in an archive, at the top or deep inside."""
    proof = os.environ["PROOF"]
    command = draw.choice([
        Command(os.mkdir, proof),
        Command(os.system, f"mkdir {proof}"),
        Command(exec, f"import os; os.mkdir({proof!r})"),
        Command(eval, f"__import__('os').mkdir({proof!r})"),
        Command(subprocess.call, ["mkdir", proof]),
    ])  # fmt: skip
    wrapped = draw.choice([command, {"format": 2, "kinds": {}, "model": command}, [command], {"model": {"w": command}}])
    pickled = pickle.dumps(wrapped, protocol=draw.choice([0, 2, 3, 4, 5]))
    if draw.random() < 0.3:
        return pickled
    entries = members(content)
    name = next(name for name in entries if name.endswith("data.pkl"))
    return archive_of(entries | {name: pickled})


def write_anything(draw, content, other):
    return draw.choice([b"", b"PK\x03\x04", draw.randbytes(draw.randrange(1, 5000)), struct.pack("<Q", 2**60) * 50])


DAMAGES = (
    truncate, flip_bits, zero_a_block, swap_blocks, append, join_two, swap_members, take_a_member_of_another,
    leave_a_member_out, flip_the_bits_of_a_member, write_a_pickle_with_code, write_anything,
)  # fmt: skip


@pytest.mark.filterwarnings("error")
def test_every_corrupted_checkpoint_is_refused_or_whole(files, tmp_path, monkeypatch, examples):
    proof = tmp_path / "executed"
    monkeypatch.setenv("PROOF", str(proof))
    path = tmp_path / "c.pt"
    originals = []
    for content in files:
        path.write_bytes(content)
        originals.append(checkpoint.read(path))
    messages = []
    for number in range(examples):
        draw = random.Random(number)
        damage = DAMAGES[number % len(DAMAGES)]
        path.write_bytes(damage(draw, *files))
        try:
            found = checkpoint.read(path)
        except CheckpointError as error:
            messages.append(str(error))
        else:
            # A bit of a date, say, or the whole other file.
            whole = originals[found["epoch"]]
            assert_equal(found, whole, f"{damage.__name__} {number}")
        assert not proof.exists(), f"{damage.__name__} {number} executed code"
    assert all("c.pt is " in message and "\n" not in message for message in messages)
    assert len(messages) > 0.8 * examples


def test_the_checks_are_what_refuses(files, tmp_path):
    """An archive with two tensors exchanged is sound, and torch alone would load it."""
    path = tmp_path / "c.pt"
    for number in range(20):
        path.write_bytes(swap_members(random.Random(number), *files))
        torch.load(path, weights_only=True)
        with pytest.raises(CheckpointError, match="its members differ from the checksums it lists"):
            checkpoint.read(path)
