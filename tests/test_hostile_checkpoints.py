"""Checkpoints that are sound files with hostile values: refused with one line, and no part has changed."""

import copy
import math
import zipfile

import numpy as np
import pytest
import torch
from helpers import masked, train
from script import assert_equal
from torch import nn

from sparselearning import checkpoint
from sparselearning.checkpoint import CheckpointError
from sparselearning.sparse import SparseLinear

WORDS = torch.arange(624)
PYTHON = (3, (*range(624), 624), None)


def parts_of(optimizer="SGD"):
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    how = dict(lr=0.1, momentum=0.9) if optimizer == "SGD" else dict(lr=0.01)
    masking = masked(model, getattr(torch.optim, optimizer)(model.parameters(), **how))
    train(model, masking, 2, torch.randn(6, 8))
    return dict(model=model, optimizer=masking.optimizer, mask=masking)


def frozen(parts):
    return copy.deepcopy([*(part.state_dict() for part in parts.values()), checkpoint.random_state()])


def assert_refused(path, parts, message, act=checkpoint.load):
    before = frozen(parts)
    with pytest.raises(CheckpointError, match=message) as refusal:
        act(path, **parts)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 1000
    assert_equal(frozen(parts), before)


def write_hostile(path, parts, change):
    state = {name: part.state_dict() for name, part in parts.items()}
    kinds = {name: type(part).__name__ for name, part in parts.items()}
    state = copy.deepcopy(state) | {"format": 1, "kinds": kinds, "random": checkpoint.random_state()}
    change(state)
    torch.save(state, path)


RANDOM = [
    ("torch", torch.zeros(5056, dtype=torch.uint8)),
    ("torch", torch.zeros(3, dtype=torch.uint8)),
    ("torch", torch.zeros(632)),
    ("torch", "state"),
    ("cuda", 3),
    ("cuda", [3]),
    ("numpy", ["MT19937", WORDS, 10**6, 0, 0.0]),  # numpy takes it, and reads beyond the words
    ("numpy", ["MT19937", WORDS, -5, 0, 0.0]),
    ("numpy", ["MT19937", WORDS.float(), 5, 0, 0.0]),
    ("numpy", ["MT19937", -WORDS, 5, 0, 0.0]),
    ("numpy", ["MT19937", WORDS[1:], 5, 0, 0.0]),
    ("numpy", ["MT19937", WORDS, 5, 7, 0.0]),
    ("numpy", ["MT19937", WORDS, 5, 0, math.nan]),
    ("numpy", ["PCG64", WORDS, 5, 0, 0.0]),
    ("numpy", [1]),
    ("python", (2, PYTHON[1], None)),
    ("python", (3, (*range(624), 625), None)),
    ("python", (3, (*range(624), -1), None)),
    ("python", (3, (2**32, *range(1, 625)), None)),
    ("python", (3, 5, None)),
    ("python", (*PYTHON[:2], "x")),
    ("python", None),
]


@pytest.mark.parametrize(("name", "value"), RANDOM, ids=range(len(RANDOM)))
def test_a_broken_generator_changes_nothing(tmp_path, name, value):
    parts = parts_of()
    write_hostile(tmp_path / "c.pt", parts, lambda state: state["random"].update({name: value}))
    message = f"random of checkpoint .* state of the random-number generator of {name} is damaged"
    assert_refused(tmp_path / "c.pt", parts, message)


def test_a_broken_generator_alone_changes_no_other():
    before = copy.deepcopy(checkpoint.random_state())
    hostile = copy.deepcopy(before) | {"torch": torch.Generator().manual_seed(5).get_state(), "python": None}
    with pytest.raises(RuntimeError, match="generator of python is damaged"):
        checkpoint.set_random_state(hostile)
    assert_equal(checkpoint.random_state(), before)
    checkpoint.set_random_state(before)


def put(place, key, value):
    place[key] = value


OTHER_PARTS = {
    "no random": (lambda s: s.pop("random"), "random of checkpoint .* no such entry"),
    "steps": (lambda s: put(s["mask"], "steps", math.nan), "mask of checkpoint .* 'steps' .* got nan"),
    "a list of a model": (lambda s: put(s, "model", [1]), "no weights of a model, but a list"),
    "numbered weights": (lambda s: put(s["model"], 5, torch.ones(2)), "no weights of a model"),
    "complex weights": (
        lambda s: put(s["model"], "0.weight", torch.ones(6, 8, dtype=torch.complex64)),
        r"another model: 0.weight is complex \(6, 8\) in the file",
    ),
    "weights without data": (
        lambda s: put(s["model"], "0.weight", torch.ones(6, 8, device="meta")), "without dense values in the file",
    ),
    "a number for a 0-d tensor": (
        lambda s: put(s["model"], "1.num_batches_tracked", 3), "num_batches_tracked is no tensor in the file",
    ),
    "a kind of lines": (lambda s: put(s["kinds"], "optimizer", torch.ones(3, 3)), "it is a torch.float32 tensor of"),
    "a momentum of another shape": (
        lambda s: put(s["optimizer"]["state"][0], "momentum_buffer", torch.ones(3)), r"momentum_buffer.* got a torch",
    ),
    "a momentum that is none": (
        lambda s: put(s["optimizer"]["state"][0], "momentum_buffer", 3.0), "momentum_buffer.* got 3.0",
    ),
    "a momentum of one number": (
        lambda s: put(s["optimizer"]["state"][0], "momentum_buffer", torch.ones(1).expand(6, 8)), "one for several",
    ),
    "a lost momentum": (lambda s: put(s["optimizer"]["state"][0], "momentum_buffer", None), "tensor .* got None"),
    "a lost entry": (lambda s: s["optimizer"]["state"].update({0: {"a": 1}}), "got no momentum_buffer"),
    "a state that is none": (lambda s: put(s["optimizer"]["state"], 0, 3), r"'state'\[0\] .* got 3"),
    "no groups": (lambda s: s["optimizer"].pop("param_groups"), "got no param_groups"),
    "groups of numbers": (lambda s: put(s["optimizer"], "param_groups", [3]), "'param_groups' .* got 3"),
    "no learning rate": (lambda s: put(s["optimizer"]["param_groups"][0], "lr", math.nan), "'lr'.* got nan"),
    "a text as decay": (
        lambda s: put(s["optimizer"]["param_groups"][0], "momentum", "much"), "'momentum'.* got 'much'",
    ),
    "no decay": (lambda s: put(s["optimizer"]["param_groups"][0], "weight_decay", None), "'weight_decay'.* got None"),
    "no momentum": (lambda s: s["optimizer"]["param_groups"][0].pop("momentum"), "'momentum'.* got none"),
    "a number beyond floats": (lambda s: put(s["mask"], "prune_threshold", 10**400), "got a long number"),
    "a long name": (lambda s: put(s["model"], "x" * 10**5, torch.ones(3)), r"another model: x{80} is \(3,\)"),
    "a negative rate": (lambda s: put(s["optimizer"]["param_groups"][0], "lr", -1.0), "'lr'.* got -1.0"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), OTHER_PARTS.values(), ids=OTHER_PARTS)
def test_a_hostile_part_changes_nothing(tmp_path, change, message):
    parts = parts_of()
    write_hostile(tmp_path / "c.pt", parts, change)
    assert_refused(tmp_path / "c.pt", parts, message)


@pytest.mark.parametrize("step", [math.nan, -1.0, torch.tensor(math.inf), torch.ones(3)])
def test_a_hostile_step_of_adam_changes_nothing(tmp_path, step):
    parts = parts_of("Adam")
    write_hostile(tmp_path / "c.pt", parts, lambda state: put(state["optimizer"]["state"][0], "step", step))
    assert_refused(tmp_path / "c.pt", parts, r"'step'.* finite number of at least 0")


FILES = {
    "named by numbers": ({1: 2}, "holds a dict, not parts by name"),
    "a tensor as format": ({"format": torch.ones(3), "kinds": {}}, "not a checkpoint of sparselearning"),
    "kinds that are none": ({"format": 1, "kinds": 3}, "not a checkpoint of sparselearning"),
    "a view of one number": (
        {"model": {"w": torch.ones(1).expand(2**40)}},
        r"shape \(1099511627776,\) repeats 4 bytes",
    ),
}


@pytest.mark.parametrize(("state", "message"), FILES.values(), ids=FILES)
def test_a_hostile_file_is_refused(tmp_path, state, message):
    torch.save(state, tmp_path / "c.pt")
    assert_refused(tmp_path / "c.pt", {}, message)


def test_a_list_that_holds_itself_is_walked_once(tmp_path):
    metrics: list = []
    metrics.append(metrics)
    checkpoint.save(tmp_path / "c.pt", metrics=metrics)
    (found,) = checkpoint.load(tmp_path / "c.pt")["metrics"]
    assert found[0] is found


def test_compressed_members_are_refused(tmp_path):
    """A file of 100 KB could otherwise hold 100 MB."""
    torch.save({"model": {"w": torch.zeros(2**20)}}, tmp_path / "c.pt")
    with zipfile.ZipFile(tmp_path / "c.pt") as archive, zipfile.ZipFile(tmp_path / "d.pt", "w", 8) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, archive.read(name))
    assert (tmp_path / "d.pt").stat().st_size < 10_000
    assert_refused(tmp_path / "d.pt", {}, "d.pt is damaged or not a checkpoint: its members are compressed")


def test_a_part_of_release_1_0_other_than_the_model_is_refused(tmp_path):
    parts = parts_of()
    torch.save({"state_dict": parts["model"].state_dict(), "optimizer": {}}, tmp_path / "c.pt")
    del parts["mask"]
    assert_refused(tmp_path / "c.pt", parts, "optimizer of checkpoint .* it is None in the file and SGD here")


def test_the_extra_state_of_a_module_loads(tmp_path):
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"a": 1}

        def set_extra_state(self, state):
            self.taken = state

    checkpoint.save(tmp_path / "c.pt", model=Extra(2, 2))
    model = Extra(2, 2)
    checkpoint.load_weights(tmp_path / "c.pt", model)
    assert model.taken == {"a": 1}


# Sparse modules, whose indices kernels read


def sparse_model():
    torch.manual_seed(0)
    linear = nn.Linear(8, 6)
    return nn.Sequential(nn.Linear(8, 8), SparseLinear.from_dense(linear, torch.rand(6, 8) < 0.5))


def of(change):
    return lambda tensor: change(tensor.clone())


def entry_set(index, value):
    def change(tensor):
        tensor[index] = value
        return tensor

    return of(change)


INDICES = [
    ("column", entry_set(0, 8)),
    ("column", entry_set(0, -1)),
    ("column", entry_set(-1, 2**31 - 1)),
    ("column", entry_set(slice(None), 0)),
    ("column", lambda column: column.flip(0)),
    ("column", lambda column: column.float()),
    ("column", lambda column: column.long()),
    ("start", entry_set(0, 1)),
    ("start", entry_set(-1, 10**6)),
    ("start", entry_set(2, -5)),
    ("start", entry_set(1, 2**31 - 1)),
    ("value", lambda value: value.to(torch.int32)),
]


@pytest.mark.parametrize(("name", "change"), INDICES, ids=range(len(INDICES)))
def test_hostile_indices_of_sparse_modules_change_nothing(tmp_path, name, change):
    state = copy.deepcopy(dict(sparse_model().state_dict()))
    state["0.weight"] += 1
    state[f"1.{name}"] = change(state[f"1.{name}"])
    torch.save(state, tmp_path / "c.pt")
    model = sparse_model()
    value = model[1].value
    message = r"model of checkpoint .* does not fit: .* 1: (The indices|Expected)"
    assert_refused(tmp_path / "c.pt", {"model": model}, message, checkpoint.load_weights)
    assert model[1].value is value


def test_values_and_columns_of_different_numbers_leave_a_sparse_module_as_it_is():
    layer, state = sparse_model()[1], dict(sparse_model()[1].state_dict())
    before = copy.deepcopy(dict(layer.state_dict()))
    with pytest.raises(RuntimeError, match="Expected one column for each value"):
        layer.load_state_dict(state | {"column": state["column"][1:]})
    assert_equal(dict(layer.state_dict()), before)


def test_numpy_would_read_beyond_its_words():
    """The check above is needed: numpy itself takes the position."""
    generator = np.random.RandomState()
    generator.set_state(("MT19937", np.arange(624, dtype=np.uint32), 10**6, 0, 0.0))
