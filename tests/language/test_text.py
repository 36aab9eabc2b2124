"""Texts, tokens and windows: what is held out, what is refused, what large texts leave in files."""

import math
import urllib.request
from io import BytesIO

import numpy as np
import pytest
import torch

from sparselearning.experiments.data import text, tokens
from sparselearning.experiments.data.files import DataError

ROMEO = "Wherefore art thou, Roméo?\n" * 40


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "romeo.txt"
    path.write_text(ROMEO, encoding="utf-8")
    return path


def test_the_source_code_of_python_is_there_and_its_last_files_are_held_out(tmp_path):
    found = text.python_source()
    assert b"import" in found.content[: found.cut]
    for i in range(20):
        (tmp_path / f"m{i:02}.py").write_text(f"x{i:02}\n")
    (tmp_path / "no.txt").write_text("no")
    small = text.python_source(tmp_path)
    assert small.content.split() == [b"x%02d" % i for i in range(20)]
    assert small.content[small.cut :].split() == [b"x18", b"x19"]
    with pytest.raises(DataError, match=r"standard library's \*.py in .*, got 0 of them"):
        text.python_source(tmp_path / "none")


def test_the_last_tenth_is_held_out_and_begins_with_a_character(file):
    found = text.read_text(str(file), file.parent)
    assert found.cut in range(len(found.content) * 9 // 10 - 1, len(found.content) * 9 // 10 + 1)
    assert bytes(found.content) == ROMEO.encode()
    assert text.cut_last_tenth("", "é".encode() * 10).cut == 18
    assert text.cut_last_tenth("", "aé".encode() + b"a" * 2).cut == 4
    assert text.cut_last_tenth("", b"a" + "é".encode()).cut == 1


def test_a_folder_is_its_files_by_name(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    for name, content in (("b/2.txt", "two"), ("a.txt", "one"), (".git/HEAD", "no"), (".hidden", "no")):
        (tmp_path / name).write_text(content)
    assert text.read_text(str(tmp_path), tmp_path).content == b"onetwo"


def test_bytes_characters_and_their_text(file):
    found = text.read_text(str(file), file.parent)
    as_bytes, as_characters = tokens.Bytes(), tokens.Characters(found)
    assert as_bytes.decode(as_bytes.encode("é!".encode()).tolist()) == "é!"
    assert as_characters.vocabulary == len(set(ROMEO))
    encoded = as_characters.encode(ROMEO.encode())
    assert encoded.dtype == np.uint8
    assert len(encoded) == len(ROMEO)
    assert as_characters.decode(encoded.tolist()) == ROMEO
    assert encoded[0] == sorted(set(ROMEO)).index("W")
    for unknown in ("~", "!", "z"):
        with pytest.raises(DataError, match=f"character '{unknown}' is not in the text"):
            as_characters.encode(unknown.encode())


def test_bits_per_byte():
    """A model that gives each of 256 bytes the same probability needs 8 bits, whatever its tokens are."""
    assert tokens.bits_per_byte(math.log(256), 1.0) == pytest.approx(8)
    assert tokens.bits_per_byte(3 * math.log(256), 3.0) == pytest.approx(8)
    assert tokens.bits_per_byte(1.0, 1.0) == pytest.approx(1.442695)


def test_a_character_of_two_bytes_counts_as_two(tmp_path):
    path = tmp_path / "e.txt"
    path.write_text("é" * 1000, encoding="utf-8")
    assert tokens.load(str(path), "characters", tmp_path, 16).bytes_per_token == 2
    assert tokens.load(str(path), "bytes", tmp_path, 16).bytes_per_token == 1


def test_large_texts_are_tokenized_once(file, tmp_path, monkeypatch):
    small = tokens.load(str(file), "characters", tmp_path, 16)
    assert not (tmp_path / "tokens").exists()
    monkeypatch.setattr(tokens, "LARGE", 100)
    large = tokens.load(str(file), "characters", tmp_path, 16)
    assert isinstance(large.train, np.memmap)
    assert np.array_equal(large.train, small.train)
    assert np.array_equal(large.valid, small.valid)
    assert large.digest == small.digest
    assert {path.name for path in (tmp_path / "tokens").iterdir()} == {
        f"{large.digest}-{p}" for p in ("train", "valid")
    }
    monkeypatch.setattr(tokens.Characters, "encode", lambda *_: pytest.fail("tokenized again"))
    tokens.load(str(file), "characters", tmp_path, 16)
    monkeypatch.undo()
    file.write_text(ROMEO + "more")
    assert tokens.load(str(file), "characters", tmp_path, 16).digest != large.digest
    assert tokens.load(str(file), "bytes", tmp_path, 16).digest != large.digest


def test_a_tokenizer_of_a_file(file, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.train_from_iterator([ROMEO], tokenizers.trainers.BpeTrainer(vocab_size=80, show_progress=False))
    made.save(str(tmp_path / "small.json"))
    corpus = tokens.load(str(file), str(tmp_path / "small.json"), tmp_path, 4)
    assert corpus.tokens.decode(corpus.train.tolist()) + corpus.tokens.decode(corpus.valid.tolist()) == ROMEO
    assert corpus.bytes_per_token > 1
    (tmp_path / "wrong.json").write_text("{}")
    with pytest.raises(DataError, match=r"wrong.json cannot be read as a tokenizer's file"):
        tokens.load(str(file), str(tmp_path / "wrong.json"), tmp_path, 4)


@pytest.mark.parametrize(
    ("content", "kind", "message"),
    [
        (None, "bytes", "There is no file or folder .*text.txt. Expected one of text, or python or shakespeare"),
        (b"", "bytes", "text.txt is empty"),
        (b"a" * 169, "bytes", "too short: its held-out part has 17 tokens, and a context of 17 needs at least 18"),
        (b"a" * 500 + b"\xff", "characters", "not UTF-8 at byte 500: invalid start byte. Take --tokens bytes"),
    ],
)
def test_texts_that_cannot_be_used_are_refused(content, kind, message, tmp_path):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        tokens.load(str(path), kind, tmp_path, 17)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match="is empty"):
        tokens.load(str(tmp_path), "bytes", tmp_path, 16)


def test_shakespeare_is_downloaded_once_and_checked(tmp_path, monkeypatch):
    content = b"First Citizen:\n" * 100
    answers = []

    def answer(url):
        answers.append(url)
        return BytesIO(content)

    monkeypatch.setattr(urllib.request, "urlopen", answer)
    with pytest.raises(DataError, match=r"downloading it failed .*expected the SHA-256 86c4e6aa.*use --data python"):
        text.read_text("shakespeare", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    monkeypatch.setattr(text, "SHAKESPEARE_SHA256", text.hashlib.sha256(content).hexdigest())
    assert text.read_text("shakespeare", tmp_path / "data").content == content
    assert text.read_text("shakespeare", tmp_path / "data").cut == 1350
    assert answers == [text.SHAKESPEARE] * 2
    (tmp_path / "data" / "tinyshakespeare" / "input.txt").write_bytes(b"other")
    with pytest.raises(DataError, match=r"input.txt \(5 bytes\) is not Tiny Shakespeare.*delete it"):
        text.read_text("shakespeare", tmp_path / "data")


def test_windows_of_a_step_depend_on_its_number_alone():
    numbers = np.arange(1000, dtype=np.uint16)
    one = [*tokens.batches(numbers, 8, range(6), seed=1, batch_size=4)]
    assert all(torch.equal(x + 1, y) and x.shape == (4, 8) for x, y in one)
    later = [*tokens.batches(numbers, 8, range(4, 6), seed=1, batch_size=4)]
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(one[4:], later, strict=True))
    others = [*tokens.batches(numbers, 8, range(6), seed=2, batch_size=4)]
    assert not torch.equal(one[0][0], others[0][0])
    shares = [[*tokens.batches(numbers, 8, range(6), 1, 4, parts=2, share=(rank, 2))] for rank in range(2)]
    for step in range(6):
        rows = [shares[rank][2 * step + part][0] for part in range(2) for rank in range(2)]
        assert torch.equal(torch.cat(rows), one[step][0])
    ends = np.concatenate([y.numpy().flatten() for _, y in tokens.batches(numbers[:10], 8, range(99), 1, 4)])
    assert (ends.min(), ends.max()) == (1, 9)


@pytest.mark.parametrize("processes", [1, 2, 3, 5])
def test_windows_to_evaluate_count_once(processes):
    """The same windows on any number of processes, which all have as many batches."""
    numbers = np.arange(103, dtype=np.uint8)
    found = [[*tokens.windows_to_evaluate(numbers, 10, 99, 2, (rank, processes))] for rank in range(processes)]
    assert len({len(batches) for batches in found}) == 1
    targets = torch.cat([y.flatten() for batches in found for _, y in batches])
    assert sorted(targets[targets >= 0].tolist()) == [*range(1, 101)]
    few = [*tokens.windows_to_evaluate(numbers, 10, 4, 8)]
    assert [x[:, 0].tolist() for x, _ in few] == [[0, 20, 50, 70]]
