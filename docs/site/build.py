"""Build the documentation site: collect its pages in build/pages and run mkdocs on them. A warning is an error.

    python docs/site/build.py            # build/site/index.html
    python docs/site/build.py --pages    # the pages alone, which need no mkdocs

The pages lie as in the repository, so that links between them lead to the same places. A few are made here from the
code: the gallery of methods, modes and arguments, the reference.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import arguments
import gallery
import reference
from links import ROOT, SHOWN, for_site, targets

HERE = Path(__file__).parent
BUILD = ROOT / "build"
GENERATED: dict[str, Callable[[], str]] = {
    "docs/gallery.md": gallery.page,
    "docs/arguments.md": arguments.page,
    **{path: lambda path=path: reference.page(path) for path in reference.PAGES},
}
CHANGED: dict[str, Callable[[str], str]] = {"docs/methods.md": gallery.without_differences}


def pages() -> list[str]:
    """Return the pages that mkdocs.yml names, in their order, as paths from the root of the repository."""
    return re.findall(r"^ +- .+: (\S+\.md)$", (HERE / "mkdocs.yml").read_text(), re.MULTILINE)


def text_of(page: str) -> str:
    """Return the text of a page as the repository has it, or as the code makes it."""
    text = GENERATED[page]() if page in GENERATED else (ROOT / page).read_text()
    return CHANGED.get(page, lambda text: text)(text)


def collect(folder: Path) -> None:
    """Write all pages, and the pictures and files that they link to, into an empty folder."""
    names = set(pages())
    for page in names:
        text = text_of(page)
        (folder / page).parent.mkdir(parents=True, exist_ok=True)
        (folder / page).write_text(for_site(text, page, names))
        for target in targets(text, page):
            if Path(target).suffix in SHOWN:
                (folder / target).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / target, folder / target)
    shutil.copyfile(HERE / "style.css", folder / "style.css")


def main() -> int:
    shutil.rmtree(BUILD / "pages", ignore_errors=True)
    (BUILD / "pages").mkdir(parents=True)
    collect(BUILD / "pages")
    if "--pages" in sys.argv[1:]:
        return 0
    command = [
        sys.executable,
        "-m",
        "mkdocs",
        "build",
        "--strict",
        "--clean",
        "--config-file",
        str(HERE / "mkdocs.yml"),
    ]
    return subprocess.call(command, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"})  # a notice; see mkdocs.yml


if __name__ == "__main__":
    sys.exit(main())
