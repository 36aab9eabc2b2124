"""The gallery of methods: a page made from the rows of `METHODS`, from docs/methods.md and from the results."""

import re
from functools import cache

from equations import COUNT, COUNTS, DENSITY, GROWTH, PRUNE, RATE, REDISTRIBUTION, START, WEIGHTS
from links import ROOT

from sparselearning.flags import flags_of
from sparselearning.methods import FUNCTIONS, METHODS, Method

RESULTS = "benchmarks/results/methods_mnist.md"
DIFFERENCES = "## Where we differ from the papers\n"
FULL_NAMES = {  # of methods that docs/methods.md calls otherwise
    "GMP": "Gradual magnitude pruning",
    "One-shot": "One-shot magnitude pruning",
    "Soft threshold": "Soft threshold (ST-3)",
}
INTRODUCTION = f"""# Gallery of methods

Each method is a row of the table in `sparselearning/methods.py`, and this page is made from it. In Python and on the
command line a method is its name:

    masking = Masking.from_method("rigl", model, optimizer, total_steps=epochs * len(loader), density=0.05)
    python main.py --method rigl --density 0.05

[Parts and schedules](methods.md) says how to change a part of a method; [modes and arguments](arguments.md) has every
choice. The equations are one update of the masks. Of layer i, W_i are the weights, m_i the mask, n_i the number of
active weights, N_i that of all, M_i the momentum, G_i = dL/dW_i the gradient of the last step. A letter without index
stands for all layers together. p is the prune rate and D the density that you ask for; t is the step and T the length
of the training. `drop_lowest` and `add_highest` move exactly as many weights as they are told.

Results are test errors on MNIST in %, the mean and in brackets the standard error over three seeds, of runs that are
shorter than published ones: 20 epochs of LeNet-300-100 and 5 of LeNet-5 ([all numbers](../{RESULTS}),
2 cores of an AMD EPYC, torch 2.14.1). SET, DSR, Deep Rewiring and GraNet have changed since
([what](methods.md#results)).
"""


def anchor(title: str) -> str:
    """Return the anchor of a heading.

    >>> anchor("Soft threshold (ST-3)")
    'soft-threshold-st-3'
    """
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


def page() -> str:
    """Return the page: an overview, then a section for each method."""
    overview = ["| method | prune | redistribute | grow | updates |", "|---|---|---|---|---|"]
    for method in METHODS.values():
        parts = (method.prune, method.redistribution, method.growth) if moves(method) else ("", "", "")
        cells = [f"[{method.name}](#{anchor(method.name)})", *map(code, parts), when(method)]
        overview.append(f"| {' | '.join(cells)} |")
    return "\n".join([INTRODUCTION, *overview, "", *map(section, METHODS)])


def code(text) -> str:
    return f"`{text}`" if text else ""


def moves(method: Method) -> bool:
    """Tell whether the masks of a method ever move."""
    return method.stop_fraction > 0


def grows(method: Method) -> bool:
    """Tell whether a method that moves its masks ever grows a weight: it prunes more than the density falls by."""
    return moves(method) and (method.prune_rate > 0 or method.prune not in ("magnitude", "global_magnitude"))


def when(method: Method) -> str:
    """Return when the masks move.

    >>> when(METHODS["rigl"]), when(METHODS["set"]), when(METHODS["static"])
    ('every 100 steps until 75% of the training', 'at the end of each epoch', 'never')
    """
    if not moves(method):
        return "never"
    if method.start_fraction == method.stop_fraction:
        return f"once, after {method.start_fraction:.0%} of the training"
    every = f"every {method.prune_every_k_steps} steps" if method.prune_every_k_steps else "at the end of each epoch"
    return every if method.stop_fraction == 1 else f"{every} until {method.stop_fraction:.0%} of the training"


def equation(method: Method) -> str:
    """Return one update of a method in letters, a line for each assignment."""
    begin = f"{method.start_density:g}" if method.start_density is not None else "D"
    place = START[str(method.sparse_init)]
    start = "all weights are active" if begin == "1" else f"density {begin}; {place}"
    lines = [f"At the start: {start}"]
    if method.pattern not in (None, "unstructured"):
        lines[0] += f"; pattern {method.pattern}"
    if not moves(method):
        return "\n".join([*lines, "The masks stay."])
    lines += ["", f"{when(method)[0].upper()}{when(method)[1:]}:"]
    end = "T" if method.stop_fraction == 1 else f"({method.stop_fraction:g} T)"
    if method.prune_rate:
        lines.append("    " + RATE[method.decay_schedule].format(p0=f"{method.prune_rate:g}", end=end))
    if density := DENSITY[method.density_schedule].format(D0=begin, end=end):
        lines.append(f"    {density}")
    return "\n".join(lines + [f"    {line}" for line in moving(method)])


def moving(method: Method) -> list[str]:
    """Return the lines of an update that prune, redistribute and grow."""
    prune, redistribution, growth = str(method.prune), str(method.redistribution), str(method.growth)
    falls = method.density_schedule != "constant" and prune not in ("gradual_magnitude", "global_dense_magnitude")
    lines = list(PRUNE[prune])
    if falls and not method.prune_rate:
        lines = ["k    = n - D(t) N" if line == COUNTS else line for line in lines]
    elif falls:
        lines = [f"{COUNT}, and its share of n - D(t) N" if line == COUNT else line for line in lines]
    if not grows(method):
        return lines
    if prune != "global_dense_magnitude":
        lines += REDISTRIBUTION[redistribution]
        if falls:
            lines[-1] += ", less what the density falls by"
    return lines + GROWTH[growth]


def section(name: str) -> str:
    """Return all that there is to say about a method."""
    method = METHODS[name]
    authors, _, link = method.paper.rpartition(", ")
    parts = [
        f"## {method.name}",
        f"`{name}`, [{authors}]({link})",
        f"```text\n{equation(method)}\n```",
        table_of_parts(method),
        f"The same in flags: `{flags_of(name)}`",
    ]
    if others := differences().get(method.name):
        parts.append(f"**Where we differ.** {others}")
    return "\n\n".join([*parts, results(method.name)]) + "\n"


def table_of_parts(method: Method) -> str:
    """Return the parts that a method moves its masks with, as a table."""
    rows = ["| part | choice | meaning |", "|---|---|---|"]
    kinds = [("prune", method.prune), ("redistribution", method.redistribution), ("growth", method.growth)]
    for part, mode in kinds if grows(method) else kinds[:1] if moves(method) else []:
        rows.append(f"| {part} | `{mode}` | {first_line(FUNCTIONS[f'{part}_mode'][str(mode)])} |")
    rows.append(f"| start | `{method.sparse_init}` | {START[str(method.sparse_init)].replace('|', chr(92) + '|')} |")
    rows.append(f"| weights | `{method.weights}` | {WEIGHTS[method.weights]} |")
    if method.reset_state:
        rows.append("| state | `True` | The optimizer's state of a weight that grows is set to zero. |")
    if method.pull:
        rows.append(f"| pull | {method.pull:g} | Active weights are pulled to zero: an L1 term. |")
    return "\n".join(rows)


def first_line(function) -> str:
    """Return the sentence that begins a docstring, fit for a cell of a table."""
    return (function.__doc__ or "").partition("\n")[0].replace("|", r"\|")


@cache
def differences() -> dict[str, str]:
    """Return name -> the item of docs/methods.md that says where a method differs from its paper."""
    text = (ROOT / "docs/methods.md").read_text().partition(DIFFERENCES)[2].partition("\n## ")[0]
    items = re.findall(r"^- \*\*(.+?)\*\*:?((?:.|\n(?!- ))+)", text, re.MULTILINE)
    found = {}
    for title, body in items:
        sentences = re.sub(r"\n  ", "\n", body).strip()
        for name in title.rstrip(".").split(", "):
            # The bold name is the subject of the first sentence where a verb follows.
            text = sentences if sentences[:1].isupper() else f"{title} {sentences}"
            found[FULL_NAMES.get(name, name)] = text
    return found


def without_differences(text: str) -> str:
    """Return docs/methods.md for the site: what is in the gallery, method by method, is left out."""
    head, title, rest = text.partition(DIFFERENCES)
    section, more, tail = rest.partition("\n## ")
    kept = {"Guided growth", "Rounding"}
    first, *items = re.split(r"(?m)^(?=- \*\*)", section)
    general = [first, *(item for item in items if item.split("**")[1].rstrip(".") in kept)]
    here = "Each method's own differences stand beside it in the [gallery](gallery.md).\n\n"
    return head + title + "\n" + here + "".join(general).lstrip("\n") + more + tail


def results(name: str) -> str:
    """Return the test errors of a method on MNIST, a row for each network, with the published ones."""
    rows, densities = [], []
    for network, text in zip(("LeNet-300-100, 20 epochs", "LeNet-5, 5 epochs"), tables_of_errors(), strict=True):
        densities, *errors = text
        for row in errors:
            if row[0] in (name, f"{name}, published"):
                label = network if row[0] == name else f"{network.partition(',')[0]}, published"
                rows.append([label, *row[1:]])
    if not rows:
        return "No results were measured."
    head = ["test error in %", *densities[1:]]
    keep = [0, *(i for i in range(1, len(head)) if any(row[i] for row in rows))]
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line[i] for i in keep)} |" for line in lines)


@cache
def tables_of_errors() -> list[list[list[str]]]:
    """Return the rows of the tables of all methods' test errors: LeNet-300-100 for 20 epochs, LeNet-5 for 5."""
    tables = re.findall(
        r"^MNIST, .*?(?:20|\b5) epochs: test error.*\n\n((?:\|.*\n)+)", (ROOT / RESULTS).read_text(), re.MULTILINE
    )
    return [
        [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in table.strip().split("\n")
            if "---" not in line
        ]
        for table in tables
    ]
