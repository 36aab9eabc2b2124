"""What the documents name exists: links, files, tests, make's targets, modules."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from sparselearning.grow import GROWTH_FUNCTIONS
from sparselearning.methods import METHODS
from sparselearning.prune import PRUNE_FUNCTIONS
from sparselearning.redistribute import REDISTRIBUTION_FUNCTIONS

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for folder in (".", "docs", "benchmarks", "imagenet", "language")
    for path in (ROOT / folder).glob("*.md")
)
PLACES = ("", "docs", "benchmarks", "imagenet", "language", "mnist_cifar", "sparselearning/sparse")  # where paths begin
OF_A_USER = {"train/", "val/", "my.py", "busy.py", "relative.py", "file.py", "path/to/file.py"}
EXTENSIONS = "py|md|cpp|h|json|csv|png|toml|txt|inc"


def text_of(document):
    return (ROOT / document).read_text()


def links(document):
    """Yield the target of every link and picture that leads into the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(document)):
        if not target.startswith(("http://", "https://")):
            yield target


def anchors(path):
    """Return the anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def paths(document):
    """Yield what looks like a file or a folder of the repository, in code and in commands."""
    text = text_of(document)
    for code in re.findall(r"`([^`\n]+)`", text) + re.findall(r"^    .+$", text, re.MULTILINE):
        for word in re.findall(rf"(?<![\w./<>*:-])[\w./-]+\.(?:{EXTENSIONS})(?![\w./-])", code):
            if word.endswith((".py", ".cpp", ".h", ".md", ".inc")) or "/" in word:
                yield word
        if re.fullmatch(r"\w[\w./]*/", code):
            yield code


def is_there(path):
    """Tell whether there is this path, or for a name alone a file of this name in any folder."""
    folders = ("sparselearning", "tests", "mnist_cifar", "imagenet", "language", "benchmarks", "docs")
    return any((ROOT / place / path).exists() for place in PLACES) or (
        "/" not in path and any(next((ROOT / folder).rglob(path), None) for folder in folders)
    )


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    for target in links(document):
        file, _, anchor = target.partition("#")
        path = (ROOT / document).parent / file if file else ROOT / document
        assert path.exists(), f"{document} links to {target}"
        assert not anchor or anchor in anchors(path), f"{document} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document):
    of_runs = re.compile(r"runs/|.*<|results/.*\.tmp")
    missing = {path for path in paths(document) if not is_there(path) and not of_runs.match(path)} - OF_A_USER
    assert not missing


def test_the_documents_name_many_paths():
    assert sum(len(set(paths(document))) for document in DOCUMENTS) > 80
    assert sum(len([*links(document)]) for document in DOCUMENTS) > 40


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_targets_of_make_exist(document):
    targets = set(re.findall(r"^([\w-]+):", text_of("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    )make ([\w-]+)", text_of(document), re.MULTILINE)) <= targets


def test_the_tests_that_show_faults_exist():
    defined = {
        name for path in ROOT.glob("tests/**/*.py") for name in re.findall(r"def (test_\w+)\(", path.read_text())
    }
    named = set(re.findall(r"`(test_\w+)`", text_of("docs/faults.md")))
    assert len(named) > 20
    assert named <= defined


def rows_of_the_map():
    """Return folder -> files that its row names; the files of `sparselearning/` have rows of their own."""
    rows = re.findall(r"^\| (`.+?) \| (.+) \|$", text_of("README.md").partition("## The map")[2], re.MULTILINE)
    files = {}
    for place, description in rows:
        folders = [name.rstrip("/") for name in re.findall(r"`([^`]+)/`", place)] or ["sparselearning"]
        for folder in folders:
            files.setdefault(folder, set()).update(re.findall(r"`(\w+\.\w+)`", place + description))
    return files


def test_every_file_on_the_map_is_in_its_folder():
    for folder, files in rows_of_the_map().items():
        assert {file for file in files if not (ROOT / folder / file).is_file()} == set(), folder


def test_every_folder_is_on_the_map():
    on_it = rows_of_the_map()
    folders = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "sparselearning").rglob("*.py")}
    assert folders - {"sparselearning/experiments"} <= on_it.keys()
    files = {path.name for path in (ROOT / "sparselearning").glob("*.py")}
    assert files - {"__init__.py"} <= on_it["sparselearning"]


def test_every_method_and_mode_is_on_the_page():
    named = set(re.findall(r"`(\w+)`", text_of("docs/methods.md")))
    assert METHODS.keys() <= named
    for table in (PRUNE_FUNCTIONS, REDISTRIBUTION_FUNCTIONS, GROWTH_FUNCTIONS):
        assert {*table.values()} == {
            function for name, function in table.items() if name in named
        }  # by one of its names


def spelled_out(names):
    """Return the modules that `package.{one, other}` means."""
    prefix, _, rest = names.partition("{")
    return [prefix + name.strip() for name in rest.rstrip("}").split(",")]


def test_modules_are_where_the_changelog_says():
    rows = re.findall(
        r"^\| `(sparselearning\.[^`]+)` \| `(sparselearning\.[^`]+)` \|$", text_of("CHANGELOG.md"), re.MULTILINE
    )
    assert len(rows) > 10
    for old, new in rows:
        assert len(spelled_out(old)) == len(spelled_out(new))
        assert all(map(find_spec, spelled_out(new))), new
