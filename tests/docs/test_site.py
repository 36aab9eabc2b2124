"""The documentation site: every page is on it, what code makes is whole and true, and links lead somewhere."""

import ast
import doctest
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import sparselearning
from sparselearning import Masking
from sparselearning.methods import DECAYS, DENSITY_SCHEDULES, FUNCTIONS, METHODS, WEIGHTS
from sparselearning.weights.start_states import START_STATES

ROOT = Path(__file__).parents[2]
SITE = ROOT / "docs/site"
MODULES = ("arguments", "build", "equations", "gallery", "links", "pictures", "reference")


@pytest.fixture(scope="module")
def site():
    """The modules of docs/site by name."""
    sys.path.insert(0, str(SITE))
    try:
        return SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(SITE))


@pytest.fixture(scope="module")
def collected(site, tmp_path_factory):
    """A folder with the pages of the site."""
    folder = tmp_path_factory.mktemp("pages")
    site.build.collect(folder)
    return folder


def test_examples_of_the_site_s_modules_hold(site):
    for name in ("arguments", "gallery", "links"):
        assert doctest.testmod(getattr(site, name)).failed == 0


def test_every_document_is_on_the_site(site):
    folders = [ROOT, *(ROOT / name for name in ("docs", "imagenet", "language", "benchmarks", "benchmarks/results"))]
    documents = {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.glob("*.md")}
    assert documents - NOT_PAGES == set(site.build.pages()) - set(site.build.GENERATED)
    assert len(site.build.pages()) == len(set(site.build.pages()))


NOT_PAGES = {"CONTRIBUTING.md", "SECURITY.md"}


def test_links_of_the_site_lead_somewhere(site, collected):
    """Those of pages that code makes, too."""
    texts = {page: (collected / page).read_text() for page in site.build.pages()}
    for page, text in texts.items():
        for target in site.links.targets(text, page):
            assert (collected / target).is_file(), f"{page} links to {target}"
        for link in re.findall(r"\]\(([^)\s]*#[^)\s]+)\)", text):
            file, _, place = link.partition("#")
            if "://" not in link:
                other = texts[site.links.target_of(file, page) if file else page]
                headings = {site.gallery.anchor(title) for title in re.findall(r"^#+ (.+)$", other, re.MULTILINE)}
                assert place in headings, f"{page} links to {link}"


def test_a_link_to_a_source_file_becomes_its_text(site):
    page = "See [the code](../a.py), [this](b.md) and\n\n```\n[x](../a.py)\n```\n"
    assert site.links.for_site(page, "docs/c.md", {"docs/b.md"}) == page.replace("[the code](../a.py)", "the code")


def test_equations_know_every_part_and_no_other(site):
    written = site.equations
    for argument, table in [("prune_mode", written.PRUNE), ("growth_mode", written.GROWTH)]:
        assert {FUNCTIONS[argument][name] for name in table} == {*FUNCTIONS[argument].values()}
        assert table.keys() <= FUNCTIONS[argument].keys()
    by_name = FUNCTIONS["redistribution_mode"]
    assert {by_name[name] for name in written.REDISTRIBUTION} == {*by_name.values()}
    assert written.RATE.keys() == DECAYS.keys()
    assert written.DENSITY.keys() == DENSITY_SCHEDULES.keys()
    assert written.WEIGHTS.keys() == WEIGHTS.keys()
    assert written.STATE.keys() == {False, True, *START_STATES} - {"zero"}
    assert written.START.keys() == {*site.arguments.INITS}


def test_the_gallery_has_every_method_with_paper_equation_parts_and_results(site):
    text = site.gallery.page()
    for name, method in METHODS.items():
        section = text.partition(f"\n## {method.name}\n")[2].partition("\n## ")[0]
        assert f"`{name}`" in section
        assert method.paper.rpartition(", ")[2] in section
        assert "```text\nAt the start: " in section
        assert "| start | " in section
        measured = f"| {method.name} " in (ROOT / site.gallery.RESULTS).read_text()
        assert ("| LeNet-300-100, 20 epochs |" in section) == ("| LeNet-5, 5 epochs |" in section) == measured


def test_the_gallery_says_where_a_method_differs(site):
    same = {method.name for method in METHODS.values()} - site.gallery.differences().keys()
    assert same == {"Static random"}
    assert site.gallery.differences()["GraSP"].startswith("SNIP, GraSP, SynFlow leave no layer empty.")
    assert "RigL resets the optimizer's state" in site.gallery.section("rigl")


def test_the_page_of_parts_leaves_to_the_gallery_what_is_there(site):
    before = (ROOT / "docs/methods.md").read_text()
    after = site.gallery.without_differences(before)
    assert "**RigL** resets" in before
    assert "**RigL** resets" not in after
    assert "(gallery.md)" in after
    assert "- **Rounding** is one rule" in after
    headings = re.compile(r"^#+ .*$", re.MULTILINE)
    assert headings.findall(before) == headings.findall(after)


def test_an_equation_is_that_of_the_method(site):
    assert site.gallery.equation(METHODS["rigl"]).splitlines() == [
        "At the start: density D; density sum(shape) / prod(shape) times a constant, at random: Erdos-Renyi-kernel",
        "",
        "Every 100 steps until 75% of the training:",
        "    p    = 0.3 (1 + cos(pi t / (0.75 T))) / 2",
        "    k_i  = ceil(p n_i)",
        "    m_i <- drop_lowest(|W_i|, m_i, k_i)",
        "    g_i  = k_i",
        "    m_i <- add_highest(|G_i|, m_i, g_i)",
    ]


@pytest.mark.parametrize("name", METHODS)
def test_a_method_grows_weights_if_its_equation_says_so(name, site):
    """By training: a weight that becomes active in an update was not before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))
    method = METHODS[name]
    if method.reset_state == "restart":
        optimizer = torch.optim.AdamW(model.parameters())
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    batches = [(torch.randn(50, 20), torch.randint(5, (50,)))]
    every = {"prune_every_k_steps": 5} if method.prune_every_k_steps else {}
    masking = Masking.from_method(name, model, optimizer, total_steps=40, density=0.2, batches=batches, **every)
    moved = grown = False
    for step in range(1, 41):
        before = {layer: mask.clone() for layer, mask in masking.masks.items()}
        nn.functional.cross_entropy(model(batches[0][0]), batches[0][1]).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        if step % 10 == 0 and step < 40:
            masking.at_end_of_epoch()
        grown |= any((masking.masks[layer] & ~mask).any().item() for layer, mask in before.items())
        moved |= any((masking.masks[layer] != mask).any().item() for layer, mask in before.items())
    assert moved == site.gallery.moves(method)
    assert grown == site.gallery.grows(method)
    assert ("add" in site.gallery.equation(method)) == grown


def test_results_are_those_of_the_file(site):
    row = "| LeNet-300-100, 20 epochs | 3.53 (0.19) | 2.50 (0.15) | 1.82 (0.06) | 1.49 (0.05) |"
    assert row in site.gallery.results("RigL")
    assert (
        "| RigL                       | 3.53 (0.19)  | 2.50 (0.15) | 1.82 (0.06) | 1.49 (0.05) |"
        in (ROOT / site.gallery.RESULTS).read_text()
    )


def test_every_argument_and_flag_has_a_default_and_a_meaning(site):
    rows = re.findall(r"^\| (`.+?`.*?) \|(.*)\|$", site.arguments.page(), re.MULTILINE)
    named = {name for cell, _ in rows for name in re.findall(r"`([^`]+)`", cell)}
    for called in (Masking.__init__, Masking.add_module, Masking.from_method, sparselearning.Updates.__init__):
        assert {*inspect.signature(called).parameters} - {"self", "cls"} <= named
    for script in ("mnist_cifar/main.py", "imagenet/command_line.py", "language/command_line.py"):
        actions = [action for action in site.arguments.parser_of(script)._actions if action.dest != "help"]
        assert {flag for action in actions for flag in action.option_strings} <= named
        assert all(action.help for action in actions)
    assert {name for table in FUNCTIONS.values() for name in table} <= named
    assert all(rest.rpartition("|")[2].strip() for _, rest in rows)


def test_the_page_of_arguments_is_the_same_on_every_machine(site, monkeypatch):
    here = site.arguments.page()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not torch.cuda.device_count())
    assert site.arguments.page() == here


def names_of(module):
    """Return module -> names that the Python blocks of all documents import from the package."""
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for block in re.findall(r"^ *```python\n(.*?)^ *```", path.read_text(), re.DOTALL | re.MULTILINE):
            for line in re.findall(rf"^ *(from {module}\S* import .+)$", block, re.MULTILINE):
                node = ast.parse(line.strip()).body[0]
                yield from ((node.module, alias.name) for alias in node.names)


def test_what_documents_import_is_in_the_reference(site):
    public = {name: None for _, _, names in site.reference.PAGES.values() for name in names}
    missing = set()
    for module, name in {*names_of("sparselearning"), *((m, n) for m in PUBLIC for n in exported(m))}:
        try:
            value = getattr(importlib.import_module(module), name)
        except ImportError:
            continue  # of a trainer that is not installed
        place = value.__name__ if inspect.ismodule(value) else f"{value.__module__}.{name}"
        if place not in public and place.rpartition(".")[0] not in public:
            missing.add(place)
    assert not missing


PUBLIC = ("sparselearning", "sparselearning.sparse")


def exported(module):
    return importlib.import_module(module).__all__


def test_every_name_of_the_reference_is_where_it_says(site):
    for _, _, names in site.reference.PAGES.values():
        for name in names:
            module, _, last = name.rpartition(".")
            if "integrations" in module:
                continue  # of libraries that may be absent; mkdocstrings reads their source
            try:
                value = importlib.import_module(name)
            except ModuleNotFoundError:
                value = getattr(importlib.import_module(module), last)
                assert value.__module__ == module, name
            assert value.__doc__, name


def test_the_picture_shows_what_the_page_says(site):
    first, second = site.pictures.one_update().values()

    def counts(layer):
        leave, come = layer["before"] & ~layer["pruned"], layer["after"] & ~layer["pruned"]
        return int(leave.sum()), int(come.sum())

    (left, came), (left_too, came_too) = counts(first), counts(second)
    assert left + left_too == came + came_too
    text = " ".join((ROOT / "docs/algorithm.md").read_text().split())
    assert f"the second layer gets {came_too} of {left + left_too} places though it lost {left_too}" in text


@pytest.mark.long
def test_pictures_are_drawn(site, tmp_path):
    site.pictures.draw_update(tmp_path / "update.png")
    site.pictures.draw_results(tmp_path / "results.png")
    assert {path.name for path in (ROOT / "docs/pictures").iterdir()} == {"update.png", "results.png"}
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())


@pytest.fixture(scope="module")
def built():
    """The site as `make docs` builds it; half a minute."""
    for library in ("mkdocs", "material", "mkdocstrings"):
        pytest.importorskip(library, reason="the docs extra is not installed")
    ended = subprocess.run([sys.executable, SITE / "build.py"], capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    return {path: path.read_text() for path in (ROOT / "build/site").rglob("*.html")}


def test_the_site_is_built_without_a_warning(built, site):
    assert len(built) >= len(site.build.pages())


def test_tables_lists_and_code_look_as_such(built):
    """Python-Markdown shows some as plain text that other programs show as tables and lists."""
    for path, text in built.items():
        body = re.sub(r"<(pre|code|script)\b.*?</\1>", "", text, flags=re.DOTALL)
        for paragraph in re.findall(r"<p>(.*?)</p>", body, re.DOTALL):
            assert not re.search(r"^(\|.*\|$|```|[-*] |\d+\. |&gt;&gt;&gt;)", paragraph, re.MULTILINE), (
                f"{path}: {paragraph}"
            )


def test_the_site_names_no_other_hosts_to_load_from_and_no_folders_of_this_machine(built):
    for path, text in built.items():
        assert str(ROOT) not in text, path
        loaded = re.findall(r'<(?:script|img|link rel="stylesheet")[^>]*(?:src|href)="([^"]+)"', text)
        assert not [source for source in loaded if "://" in source], path
