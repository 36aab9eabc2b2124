"""What the command line takes, what it refuses, and which method it describes."""

import argparse
import shlex

import pytest

from sparselearning import core, flags
from sparselearning.experiments.run import arguments
from sparselearning.flags import DEST, FLAGS, add_sparse_args, chosen_method, find_mode, flags_of
from sparselearning.methods import METHODS, PARTS
from sparselearning.parser import ArgumentParser
from sparselearning.prune import magnitude_prune

EXTENSIONS = {"prune_mode": {"mine": magnitude_prune}}
DEFAULTS = dict(
    growth="momentum",
    prune="magnitude",
    redistribution="momentum",
    prune_rate=0.5,
    decay_schedule="cosine",
    prune_every_k_steps=0,
    start_fraction=0.0,
    stop_fraction=1.0,
    density=0.05,
    density_schedule="constant",
    start_density=None,
    sparse_init="constant",
    score_batches=1,
    layer_density={},
    pattern="unstructured",
    dense_layers=[],
    sparse_layers=[],
    reset_state=False,
    regrown="zero",
    regrown_warm_up=0,
    lr_by_density=False,
    rescale=False,
    pull=0.0,
    inactive="zero",
    sparse_backend=None,
    method=None,
    dense=False,
    verbose=False,
)
RIGL = dict(
    redistribution="none",
    growth="gradient",
    sparse_init="erdos_renyi_kernel",
    prune_rate=0.3,
    decay_schedule="cosine_to_zero",
    prune_every_k_steps=100,
    stop_fraction=0.75,
    reset_state=True,
)
# A command line, and what differs from the defaults: names and values of args.json, and of the hash of a run's folder.
COMMANDS = {
    "": {},
    "--dense": dict(dense=True),
    "--sparse --verbose": dict(verbose=True),
    "--death SET --death-rate 0.3": dict(prune="SET", prune_rate=0.3),
    "--prune global_magnitude --prune-rate=0.25": dict(prune="global_magnitude", prune_rate=0.25),
    "--prune mine --growth random": dict(prune="mine", growth="random"),
    "--grow gradient --redis none": dict(growth="gradient", redistribution="none"),
    "--decay-schedule linear --prune-every-k-steps 50": dict(decay_schedule="linear", prune_every_k_steps=50),
    "--start-fraction 0.1 --stop-fraction 1": dict(start_fraction=0.1),
    "--density 1 --layer-density fc*=0.02,conv1=0.3": dict(density=1.0, layer_density={"fc*": 0.02, "conv1": 0.3}),
    "--dense-layers": {},
    "--dense-layers first 'layer1.*'": dict(dense_layers=["first", "layer1.*"]),
    "--sparse-layers '*.A_log' pos_embed": dict(sparse_layers=["*.A_log", "pos_embed"]),
    "--pattern block:16x16 --pattern 2:4": dict(pattern="2:4"),
    "--density-schedule cubic --start-density 0.5": dict(density_schedule="cubic", start_density=0.5),
    "--sparse-init uniform": dict(sparse_init="uniform"),
    "--sparse-init mask:a.pt": dict(sparse_init="mask:a.pt"),
    "--sparse-init linear --rescale --reset-state": dict(sparse_init="linear", rescale=True, reset_state=True),
    "--reset-state --no-reset-state": {},
    "--state-of-regrown zero": dict(reset_state=True),
    "--no-reset-state --state-of-regrown mean": dict(reset_state="mean"),
    "--state-of-regrown mean --no-reset-state": {},
    "--regrown random --pull 1e-4": dict(regrown="random", pull=1e-4),
    "--state-of-regrown restart --regrown-warm-up 50 --lr-by-density": dict(
        reset_state="restart", regrown_warm_up=50, lr_by_density=True
    ),
    "--inactive soft": dict(inactive="soft"),
    "--sparse-backend cpu": dict(sparse_backend="cpu"),
    "--method sparse_momentum": dict(method="sparse_momentum"),
    "--method rigl": dict(method="rigl", **RIGL),
    "--growth random --method=rigl --no-reset-state": dict(method="rigl", **RIGL)
    | dict(growth="random", reset_state=False),
    "--state-of-regrown mean --method rigl": dict(method="rigl", **RIGL | dict(reset_state="mean")),
    "--method set --meth srigl --prune-rate 0.1": dict(method="srigl", **RIGL)
    | dict(prune_rate=0.1, pattern="fan-in:0.3"),
    "--method set --inactive zero": dict(
        method="set", prune="SET", redistribution="none", growth="random", sparse_init="linear", prune_rate=0.3
    ),
    "--method granet --start-density 0.2 --density 0.1": dict(
        method="granet",
        prune="gradual_magnitude",
        redistribution="none",
        growth="gradient",
        sparse_init="erdos_renyi_kernel",
        prune_every_k_steps=1000,
        density=0.1,
        density_schedule="early_cubic",
        start_density=0.2,
        reset_state=True,
    ),
}


def parse(*argv):
    parser = ArgumentParser(prog="main.py")
    add_sparse_args(parser, EXTENSIONS)
    return parser.parse_args(argv)


def refusal(capsys, *argv):
    """The one line that `argv` ends with."""
    with pytest.raises(SystemExit) as end:
        parse(*argv)
    captured = capsys.readouterr()
    assert end.value.code == 2
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


@pytest.mark.parametrize("command", COMMANDS)
def test_arguments_have_the_names_and_values_of_earlier_runs(command):
    arguments, expected = vars(parse(*shlex.split(command))), DEFAULTS | COMMANDS[command]
    assert {name: repr(value) for name, value in arguments.items()} == {
        name: repr(value) for name, value in expected.items()
    }


def test_every_part_of_a_method_has_a_flag_and_the_default_of_sparse_momentum():
    parts = {DEST.get(part, part): getattr(METHODS["sparse_momentum"], part) for part in PARTS}
    assert parts.keys() == {dest for dest, settings in FLAGS.items() if "default" not in settings}
    assert parts == {dest: value for dest, value in vars(parse()).items() if dest in parts}


@pytest.mark.parametrize("method", METHODS)
def test_the_flags_listed_for_a_method_make_it(method, capsys):
    chosen, listed = parse("--method", method), parse(*flags_of(method).split())
    listed.method = method
    assert chosen == listed
    parts = {part: getattr(chosen_method(chosen), part) for part in PARTS}
    assert parts == {part: getattr(METHODS[method], part) for part in PARTS}


def test_methods_are_listed_with_paper_and_flags(capsys):
    with pytest.raises(SystemExit) as end:
        parse("--list-methods")
    assert end.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 * len(METHODS)
    assert lines[2:4] == [
        "set: SET. Mocanu et al. 2018, https://arxiv.org/abs/1707.04780",
        "    --prune SET --redistribution none --growth random --sparse-init linear --prune-rate 0.3",
    ]


@pytest.mark.parametrize(("command", "steps"), [("--help", 0), ("--help --method rigl", 100)])
def test_help_shows_the_defaults_that_hold(command, steps, capsys):
    with pytest.raises(SystemExit):
        parse(*command.split())
    text = " ".join(capsys.readouterr().out.split())
    assert f"at the end of every epoch but the last (default: {steps})" in text
    assert text.count("(default") > len(FLAGS)


def test_own_functions_and_extensions_are_of_the_method_chosen(tmp_path):
    path = tmp_path / "my.py"
    path.write_text("def grow(masking, name, new_mask, total_regrowth, weight): return new_mask\n")
    method = chosen_method(parse("--prune", "mine", "--growth", f"{path}:grow", "--method", "set"), EXTENSIONS)
    assert method.name == "set"
    assert method.prune is magnitude_prune
    assert method.growth.__name__ == "grow"
    assert method.redistribution == "none"
    assert chosen_method(parse()).name == "own"


@pytest.mark.parametrize(
    ("command", "weights"),
    [
        ("", "zero"),
        ("--inactive kept", "kept"),
        ("--method soft_threshold", "soft"),
        ("--sparse-backend cpu", "sparse"),
        ("--weights sparse", "sparse"),
        ("--weights sparse --sparse-backend cpu", "sparse"),
        ("--weights soft", "soft"),
    ],
)
def test_two_flags_say_how_weights_are_held(command, weights):
    assert chosen_method(parse(*command.split())).weights == weights


def test_sparse_kernels_do_not_hold_what_inactive_asks_for():
    args = parse("--method", "top_kast", "--sparse-backend", "cpu")
    with pytest.raises(ValueError, match=r"--inactive kept trains inactive weights, .*: leave out one"):
        chosen_method(args)


def test_an_ordinary_parser_takes_the_arguments():
    parser = argparse.ArgumentParser()
    add_sparse_args(parser)
    assert parser.parse_args(["--growth", "random"]).growth == "random"


def test_names_stay_importable():
    assert core.add_sparse_args is add_sparse_args
    assert find_mode("growth_mode", "random") == "random"


@pytest.mark.parametrize("density", ["0", "-0.1", "1.5", "nan", "inf", "five"])
def test_density_outside_its_range_is_refused(capsys, density):
    expected = f"main.py: error: argument --density: expected a fraction in (0, 1], got '{density}'\n"
    assert refusal(capsys, "--density", density) == expected


@pytest.mark.parametrize(
    ("parser", "good", "bad"),
    [
        (flags.fraction, ["0", "1", "0.5"], ["-1", "1.1", "nan", "x", ""]),
        (flags.positive_fraction, ["1e-9", "1"], ["0", "1.1", "nan", "x"]),
        (flags.proper_fraction, ["0", "0.9"], ["1", "-0.1", "nan", "x"]),
        (flags.non_negative, ["0", "1e10"], ["-1", "inf", "nan", "1e999", "x"]),
        (flags.positive_int, ["1", "100"], ["0", "-1", "1.5", "x"]),
        (arguments.seed, ["0", "17"], ["-1", "99999999999999999999", "1.5", "x"]),
    ],
)
def test_numbers_are_parsed_or_refused_with_what_was_expected(parser, good, bad):
    assert [parser(text) for text in good] == [float(text) for text in good]
    for text in bad:
        with pytest.raises(argparse.ArgumentTypeError, match=f"^expected .*, got '{text}'$"):
            parser(text)


@pytest.mark.parametrize("text", ["", "fc1", "fc1=", "=0.1", "fc1=2", "fc1=0.1,", "fc1=0.1,fc1=0.2"])
def test_densities_by_name_are_refused_where_they_say_none(capsys, text):
    assert "argument --layer-density: expected " in refusal(capsys, "--layer-density", text)


@pytest.mark.parametrize("text", ["snipp", "mask:", "mask"])
def test_unknown_sparse_init_names_the_known_ones(capsys, text):
    line = refusal(capsys, "--sparse-init", text)
    assert f"snip, grasp, synflow, resume, or mask:PATH, got '{text}'" in line


def test_unknown_mode_names_the_known_ones(capsys):
    line = refusal(capsys, "--prune", "magnitud")
    for name in ("magnitude, SET", "mine", "path/to/file.py:function", "'magnitud'"):
        assert name in line


def test_dense_and_sparse_exclude_each_other(capsys):
    assert "not allowed with argument --dense" in refusal(capsys, "--dense", "--sparse")


def test_unknown_method_names_the_known_ones(capsys):
    assert refusal(capsys, "--method", "rigel").startswith(
        "main.py: error: argument --method: Unknown method 'rigel'. Choose one of 'sparse_momentum', 'set', "
    )


@pytest.mark.parametrize("spec", ["none.py:grow", "{folder}/my.py:shrink", "{folder}/my.py:grow"])
def test_own_functions_that_cannot_be_are_refused(capsys, tmp_path, spec):
    (tmp_path / "my.py").write_text("def grow(masking): return 1\n")
    line = refusal(capsys, "--growth", spec.format(folder=tmp_path))
    assert line.startswith("main.py: error: argument --growth: ")
