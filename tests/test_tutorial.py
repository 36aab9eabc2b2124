"""The Python blocks and the commands of the documents do what they say."""

import inspect
import re
import shlex
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path

import pytest
import torch
from helpers import TORCH
from script import load_main, run_folder
from torch import nn

from sparselearning.commands import SCRIPTS
from sparselearning.experiments.report import plots

ROOT = Path(__file__).parent.parent
WITHOUT_COMMANDS = [
    "docs/algorithm.md",
    "docs/always_sparse.md",
    "docs/averages.md",
    "docs/fine_tuning.md",
    "docs/loops.md",
    "docs/migration.md",
    "docs/own_model.md",
    "docs/sparse.md",
    "docs/start.md",
    "docs/weight_norm.md",
]
COMMANDS_ALONE = ["docs/experiments.md", "docs/results.md"]
RUN_ELSEWHERE = ["docs/processes.md"]  # by tests/processes/test_processes_page.py
OF_LANGUAGE = ["language/README.md"]
DOCUMENTS = ["How_to_add_your_own_algorithms.md", "README.md", "docs/patterns.md", "docs/methods.md", *WITHOUT_COMMANDS]
LIBRARIES = {  # document -> the libraries that it needs
    "docs/models.md": "timm transformers",
    "docs/trainer.md": "transformers accelerate",
    "docs/lightning.md": "lightning",
    "docs/accelerate.md": "accelerate",
    "docs/serving.md": "onnxscript",
}
main = load_main()


def python_blocks(text):
    """Yield the number of the first line and the text of every Python block."""
    for block in re.finditer(r"^( *)```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE):
        yield text[: block.start(2)].count("\n"), textwrap.dedent(block[2])


def files_of(text):
    """Return name -> text of the blocks that begin with the name of a file."""
    blocks = [re.match(r"# (\w+\.py)\n", block) and block for _, block in python_blocks(text)]
    return {block.partition("\n")[0][2:]: block for block in blocks if block}


def commands(document, start=r"python (?:mnist_cifar/)?main\.py"):
    """Return the arguments of every command in a document that begins so, without the comment behind them."""
    text = (ROOT / document).read_text().replace("\\\n", " ")
    lines = re.findall(rf"^[ $]*{start}(.*)$", text, re.MULTILINE) + re.findall(rf"\| `{start}([^`]*)` \|", text)
    return [line.partition(" # ")[0].strip() for line in lines]


def a_training():
    """Return the model, optimizer, loader and number of epochs that a page takes for granted."""
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 30 * 30, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return dict(model=model, optimizer=optimizer, loader=[torch.zeros(4, 3, 32, 32)] * 5, epochs=20)


@pytest.fixture
def threads():
    """Threads as they were, after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("document", [*DOCUMENTS, *OF_LANGUAGE, *LIBRARIES])
def test_python_blocks_run_in_order(document, tmp_path, monkeypatch):
    if document in LIBRARIES:
        for library in LIBRARIES[document].split():
            pytest.importorskip(library, reason=f"{library} is not installed")
        warnings.simplefilter("ignore")  # of trainers, on few workers, a CPU, newer torch
    if document == "docs/patterns.md" and TORCH < (2, 9):
        pytest.skip("torch.optim.Muon needs torch 2.9")
    if document in OF_LANGUAGE and TORCH < (2, 8):
        pytest.skip("a dynamic batch of language models needs torch 2.8")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "document", **a_training()}
    blocks = list(python_blocks((ROOT / document).read_text()))
    assert blocks
    for line, block in blocks:
        exec(compile("\n" * line + block, ROOT / document, "exec"), namespace)


def test_no_document_with_python_blocks_is_forgotten():
    pages = {path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *ROOT.glob("*/*.md")]}
    with_blocks = {page for page in pages if [*python_blocks((ROOT / page).read_text())]}
    assert with_blocks == {*DOCUMENTS, *OF_LANGUAGE, *LIBRARIES, *RUN_ELSEWHERE}


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # of torch.export
def test_a_new_process_serves_what_the_page_saves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, saved, served, exported, loaded = [
        block for _, block in python_blocks((ROOT / "docs/serving.md").read_text())
    ][:5]
    exec(made + saved + exported, {"__name__": "document"})
    subprocess.run([sys.executable, "-c", served + loaded], check=True)


@pytest.fixture
def folder(tmp_path, monkeypatch, caplog):
    """An empty folder with the files that the documents show."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plots, "plot_curves", lambda *_: None)
    monkeypatch.setattr(plots, "plot_density", lambda *_: None)
    for document in DOCUMENTS:
        for name, text in files_of((ROOT / document).read_text()).items():
            (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("document", "command"), [(d, command) for d in (*DOCUMENTS, *COMMANDS_ALONE) for command in commands(d)]
)
def test_commands_are_understood(document, command, folder):
    """Those on the digits are run, of the others the arguments are checked."""
    argv = shlex.split(command)
    if {"--help", "--list-methods"} & {*argv}:
        with pytest.raises(SystemExit, match=r"^0$"):
            main.parse_arguments(argv)
    elif "digits" in argv:
        main.main([*argv, "--device", "cpu", "--max-threads", "1"])
        assert (run_folder(folder / "runs") / "checkpoint.pt").is_file()
    else:
        main.parse_arguments(argv)


def test_commands_of_imagenet_are_understood():
    script = load_main("imagenet")
    shown = commands("imagenet/README.md", r"(?:python|torchrun [^\n]*?) *main\.py(?= DIR)")
    assert len(shown) >= 8
    for command in shown:
        one_of_many = re.sub(r"\|\S+", "", command).removesuffix("...")
        assert script.parse_arguments(shlex.split(one_of_many)).data_dir == "DIR"


def test_installed_commands_are_understood():
    shown = [
        (words, arguments)
        for document in (*DOCUMENTS, *COMMANDS_ALONE)
        for words in ("train mnist", "train cifar", "train digits")
        for arguments in commands(document, f"sparselearning {words}")
    ]
    assert len(shown) >= 2
    for words, arguments in shown:
        _, *first = SCRIPTS[words]
        main.parse_arguments([*first, *shlex.split(arguments)])


def test_commands_of_language_are_understood(tmp_path):
    script = load_main("language")
    (tmp_path / "text").write_text("To be, or not to be")
    shown = commands("language/README.md", r"(?:python|torchrun [^\n]*?) *main\.py")
    assert len(shown) >= 4
    for command in shown:
        argv = shlex.split(command.replace("FILE", str(tmp_path / "text")))
        if "--resume" not in argv:
            script.parse_arguments(argv)


def test_the_documents_show_commands():
    shown = {*DOCUMENTS, *COMMANDS_ALONE} - {*WITHOUT_COMMANDS}
    assert all(map(commands, shown))


def test_worked_examples_are_those_of_extensions():
    text = (ROOT / "How_to_add_your_own_algorithms.md").read_text()
    extensions = inspect.getmodule(main.EXTENSIONS["prune_mode"]["magnitude_variance"])
    for name in ("second_moment", "variance_redistribution", "magnitude_variance_pruning"):
        assert inspect.getsource(getattr(extensions, name)) in text


def test_every_built_in_mode_is_named_in_the_help(capsys):
    with pytest.raises(SystemExit):
        main.parse_arguments(["--help"])
    text = capsys.readouterr().out
    for name in ("magnitude_variance", "variance", "threshold", "momentum_neuron", "nonzeros", "erdos_renyi_kernel"):
        assert name in text
