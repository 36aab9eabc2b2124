"""Texts to train language models on: the source code of this Python, files of your own, Tiny Shakespeare."""

import hashlib
import mmap
import os
import sysconfig
import urllib.request
from pathlib import Path
from typing import NamedTuple

from sparselearning.experiments.data.files import DataError, download, printable, reason

SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SOURCES = ("python", "shakespeare")

Content = bytes | mmap.mmap


class Text(NamedTuple):
    """A text, and where its held-out part begins."""

    name: str
    content: Content
    cut: int  # in bytes


def data_folder(folder: str | Path | None) -> Path:
    """Return the folder of the data files: this one, or the environment's SPARSELEARNING_DATA, or ./data."""
    return Path(folder or os.environ.get("SPARSELEARNING_DATA") or "data").expanduser()


def read_text(source: str, folder: Path) -> Text:
    """Return the text that --data means: 'python', 'shakespeare', or the path of a file or a folder.

    The last tenth is held out: of 'python' that of the files, of others that of the bytes, cut before a character.

    Raises:
        DataError: if it is missing, empty or cannot be read or downloaded.
    """
    if source == "python":
        return python_source()
    if source == "shakespeare":
        return cut_last_tenth(source, read_shakespeare(folder))
    place = Path(source).expanduser()
    files = [place] if place.is_file() else files_in(place) if place.is_dir() else []
    if not place.exists():
        raise DataError(
            f"There is no file or folder {printable(source)}. Expected one of text, or {' or '.join(SOURCES)}."
        )
    try:
        content = mapped(files[0]) if len(files) == 1 else b"".join(path.read_bytes() for path in files)
    except OSError as error:
        raise DataError(f"{printable(error.filename or source)} cannot be read: {reason(error)}.") from error
    if not content:
        raise DataError(f"{printable(source)} is empty. Expected text to train on.")
    return cut_last_tenth(source, content)


def python_source(library: str | Path | None = None) -> Text:
    """Return the modules of the standard library of the Python that runs, sorted by name, the last tenth held out.

    Raises:
        DataError: if this Python has no such files (`library` is another folder of them).
    """
    library = Path(library or sysconfig.get_paths()["stdlib"])
    files = [path.read_bytes() for path in sorted(library.glob("*.py"))]
    if len(files) < 10:
        raise DataError(
            f"Expected the standard library's *.py in {printable(library)}, got {len(files)} of them. "
            "Take another text: --data FILE."
        )
    kept = len(files) - len(files) // 10
    return Text("python", b"".join(files), sum(map(len, files[:kept])))


def files_in(place: Path) -> list[Path]:
    """Return the files of a folder and of the folders in it, sorted by path, but for hidden ones."""
    paths = sorted(place.rglob("*"))
    return [p for p in paths if p.is_file() and not any(part.startswith(".") for part in p.relative_to(place).parts)]


def mapped(path: Path) -> Content:
    """Return the bytes of a file, which are read where they are used."""
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.fstat(file.fileno()).st_size else b""


def cut_last_tenth(name: str, content: Content) -> Text:
    """Hold out the last tenth of a text, and begin it where a character begins in UTF-8."""
    cut = len(content) * 9 // 10
    while 0 < cut < len(content) and content[cut] & 0xC0 == 0x80:
        cut -= 1
    return Text(name, content, cut)


def read_shakespeare(folder: Path) -> bytes:
    """Return Tiny Shakespeare, 1,115,394 characters, downloaded if not in `folder`.

    Raises:
        DataError: if the file has another hash, or is missing and cannot be downloaded.
    """
    if not (found := find_shakespeare(folder)):
        place = folder / "tinyshakespeare"
        wanted = ["input.txt"], place, "--data python"
        download("Tiny Shakespeare", folder, find_shakespeare, fetch_shakespeare, *wanted)
        found = find_shakespeare(folder)
    content = found[0].read_bytes()
    check_hash(printable(found[0]), content)
    return content


def find_shakespeare(folder: Path) -> list[Path]:
    """Return the path of the file in a list, which is empty if there is none."""
    path = folder / "tinyshakespeare" / "input.txt"
    return [path] if path.is_file() else []


def fetch_shakespeare(folder: Path) -> None:
    """Download the file, and keep it if it has the known hash."""
    with urllib.request.urlopen(SHAKESPEARE) as answer:
        content = answer.read()
    check_hash(SHAKESPEARE, content)
    path = folder / "tinyshakespeare" / "input.txt"
    path.parent.mkdir()
    path.write_bytes(content)


def check_hash(name: str, content: bytes) -> None:
    """Check that this is Tiny Shakespeare.

    Raises:
        DataError: if it is not.
    """
    found = hashlib.sha256(content).hexdigest()
    if found != SHAKESPEARE_SHA256:
        raise DataError(
            f"{name} ({len(content):,} bytes) is not Tiny Shakespeare: expected the SHA-256 {SHAKESPEARE_SHA256}, got "
            f"{found}. Replace it, or delete it to have it downloaded."
        )
