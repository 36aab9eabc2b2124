"""What the package says of itself: version, links of the page on an index, configuration of builds."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from script import ROOT

import sparselearning


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The metadata of the package, whose body is the page that an index shows."""
    place = tmp_path_factory.mktemp("egg")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(place)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return (place / "sparselearning.egg-info/PKG-INFO").read_text()


def test_links_and_pictures_of_the_page_are_absolute(metadata):
    targets = re.findall(r"\]\(([^)\s]+)\)", metadata)
    assert len(targets) > 20
    assert not [target for target in targets if not target.startswith(("https://", "#"))]
    at = f"https://github.com/TimDettmers/sparse_learning/{{}}/v{sparselearning.__version__}/"
    for target in targets:
        if target.startswith(at.format("blob")) or target.startswith(at.format("raw")):
            path = re.sub(r"^.*?/v[\d.]+/|#.*", "", target)
            assert (ROOT / path).exists(), target
    assert any(target.startswith(at.format("raw")) and target.endswith(".png") for target in targets)


def test_the_metadata_name_what_an_index_shows(metadata):
    for line in (
        f"Version: {sparselearning.__version__}",
        "Author: sparselearning contributors",
        "Requires-Python: >=3.10",
        "Classifier: Typing :: Typed",
        "Provides-Extra: scripts",
    ):
        assert line in metadata
    assert re.search(r"^License.*: MIT$", metadata, re.MULTILINE)


def test_the_version_is_the_same_everywhere():
    assert f"version: {sparselearning.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert f"## {sparselearning.__version__}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.long
def test_the_source_distribution_holds_what_its_tests_read(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if tracked.returncode:
        pytest.skip("no git history here")
    expected = {path for path in tracked.stdout.splitlines() if (ROOT / path).exists()}
    assert expected - held == set()
    folders = {str(parent) for path in expected for parent in Path(path).parents}
    made = {name for name in held - expected if "egg-info" not in name} - folders
    assert made <= {"", "PKG-INFO", "setup.cfg"}


@pytest.mark.parametrize("script", ["tests.yml", "wheels.yml"])
def test_workflows_ask_for_no_more_rights_than_they_need(script):
    assert "permissions:\n  contents: read" in (ROOT / ".github/workflows" / script).read_text()
