"""Where the links of a page lead, in the repository and on the site."""

import posixpath
import re
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
FENCE = re.compile(r"(^ *```.*?^ *```$)", re.DOTALL | re.MULTILINE)
SHOWN = {".png", ".svg", ".csv", ".json"}  # files beside the pages that the site has, too


def outside_code(text: str, change: Callable[[str], str]) -> str:
    """Return a page with everything but its fenced blocks changed.

    >>> outside_code("a\\n```\\na\\n```\\na", str.upper)
    'A\\n```\\na\\n```\\nA'
    """
    return "".join(part if index % 2 else change(part) for index, part in enumerate(FENCE.split(text)))


def target_of(link: str, page: str) -> str | None:
    """Return the path in the repository that a link of a page means; None for other hosts and places in the page.

    >>> target_of("../README.md#results", "docs/methods.md"), target_of("#parts", "docs/methods.md")
    ('README.md', None)
    """
    path = link.partition("#")[0]
    if not path or "://" in path or path.startswith("mailto:"):
        return None
    return posixpath.normpath(posixpath.join(posixpath.dirname(page), path))


def targets(text: str, page: str) -> Iterator[str]:
    """Yield the paths in the repository that a page links to or shows."""
    for index, part in enumerate(FENCE.split(text)):
        for link in LINK.finditer(part) if index % 2 == 0 else ():
            if target := target_of(link[3], page):
                yield target


def for_site(text: str, page: str, pages: set[str]) -> str:
    """Return a page whose links to source files and folders are their text alone, for the site has no such files."""

    def keep_or_name(link):
        target = target_of(link[3], page)
        on_it = target is None or target in pages or Path(target).suffix in SHOWN
        return link[0] if on_it else link[2]

    return outside_code(text, lambda part: LINK.sub(keep_or_name, part))
