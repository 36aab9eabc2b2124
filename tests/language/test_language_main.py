"""language/main.py through the user's command: runs, sparse weights, resuming, processes, errors, samples."""

import json
import logging
import math
import os
import re
import signal
import sys
from itertools import pairwise
from pathlib import Path

import apex_stand_in
import pytest
import torch
from launch import run as run_processes
from script import assert_equal, checkpoint_of, draw_nothing, metrics_of, run_folder
from small_text import SMALL, parsed, script, type_command

from sparselearning.checkpoint import CheckpointError
from sparselearning.compact import expanded
from sparselearning.experiments.data.tokens import Bytes
from sparselearning.experiments.report import text_plots
from sparselearning.experiments.run.stopping import Stopped
from sparselearning.experiments.run.training import Progress
from sparselearning.sparse import available

TIMES = ("seconds", "tokens_per_second")
OFTEN = ["--growth", "random", "--redistribution", "none", "--prune-every-k-steps", "2"]


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch, caplog):
    caplog.set_level("INFO")
    draw_nothing(monkeypatch)
    monkeypatch.setattr(script, "plot_losses", lambda *_: None)


def train(place, *more):
    """Train in this process; return the folder of the run."""
    return script.run(parsed(place, *more)).path


def without_times(metrics):
    return [{name: value for name, value in record.items() if name not in TIMES} for record in metrics]


def assert_same_run(folder, whole):
    assert_equal(checkpoint_of(folder), checkpoint_of(whole), ignored=(*TIMES, "args"))
    assert without_times(metrics_of(folder)) == without_times(metrics_of(whole))


def masks_of(folder):
    return {name: expanded(layer["mask"]) for name, layer in checkpoint_of(folder)["mask"]["layers"].items()}


@pytest.mark.long
def test_a_run_as_a_user_starts_it(tmp_path):
    """Files, densities of attention and MLP, losses, a sample, and an evaluation that writes nothing."""
    densities = ["--method", "rigl", "--layer-density", "attention=0.3,mlp=0.1", "--sample", "def ", "--data-dir", "x"]
    done = type_command(*SMALL.split(), *densities, "--sample-tokens", 5, "--top-k", 9, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = run_folder(tmp_path / "runs")
    assert re.fullmatch(r"python-gpt-0\.2-17-[0-9a-f]{8}", folder.name)
    files = {"args.json", "log.txt", "metrics.jsonl", "checkpoint.pt", "checkpoint.1.pt", "checkpoint-best.pt"}
    assert {path.name for path in folder.iterdir()} == files | {"curves.png", "density.png"}
    metrics = metrics_of(folder)
    assert [record["steps"] for record in metrics] == [3, 6]
    for record in metrics:
        assert record["valid_bits_per_byte"] == pytest.approx(record["valid_loss"] / math.log(2))
        assert record["tokens_per_second"] > 0
        assert record["active_weights"] == round(0.3 * 2 * 4 * 32**2 + 0.1 * 2 * 8 * 32**2)
        for name, density in record["density_per_layer"].items():
            assert (".attention." in name) or (".mlp." in name)
            assert 0 < density < 1
        assert 0.3 < record["inference_flops"] < 0.9
    best = min(metrics, key=lambda record: record["valid_loss"])
    assert (metrics[-1]["best_step"], metrics[-1]["best_valid_loss"]) == (best["steps"], best["valid_loss"])
    masks = masks_of(folder)
    attention = [mask for name, mask in masks.items() if "attention" in name]
    assert sum(int(mask.sum()) for mask in attention) == round(0.3 * 2 * 4 * 32**2)
    log = (folder / "log.txt").read_text()
    assert "FLOPs of 16 tokens: " in log
    sample = log[log.index("Sample:\n") :].removeprefix("Sample:\n").removesuffix("\n")
    assert sample.startswith("def ")

    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    again = type_command(
        "--resume",
        folder,
        "--evaluate",
        "--sample",
        "def ",
        "--sample-tokens",
        5,
        "--top-k",
        9,
        "--data-dir",
        "x",
        cwd=tmp_path,
    )
    assert again.returncode == 0, again.stderr
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert f"Validation loss: {metrics[-1]['valid_loss']:.4f} nats" in again.stdout
    assert sample in again.stdout


@pytest.mark.skipif(not available(), reason="built without sparse kernels")
@pytest.mark.parametrize("arch", ["gpt", "llama"])
def test_sparse_weights_train_on_active_weights_alone(arch, tmp_path, caplog):
    """The command trains every masked layer on sparse kernels, and gets what masks get."""
    caplog.set_level("INFO")
    same = ["--arch", arch, "--density", "0.2", *OFTEN]
    sparse, masked = train(tmp_path, *same, "--weights", "sparse"), train(tmp_path, *same)
    layers = 2 * {"gpt": 4, "llama": 7}[arch]
    assert f"{layers} of {layers} layers train on sparse kernels" in caplog.text
    assert f"layers: {layers} sparse kernels" in (sparse / "log.txt").read_text()
    assert not any("held" in str(type(value)) for value in checkpoint_of(sparse)["model"].values())
    for one, other in zip(metrics_of(sparse), metrics_of(masked), strict=True):
        assert one["valid_loss"] == pytest.approx(other["valid_loss"], rel=1e-3)
        assert one["active_weights"] == other["active_weights"]
    smaller, larger = ((folder / "checkpoint.pt").stat().st_size for folder in (sparse, masked))
    assert smaller < 0.8 * larger


@pytest.mark.long
@pytest.mark.parametrize(
    "weights", ["zero", pytest.param("sparse", marks=pytest.mark.skipif(not available(), reason=""))]
)
def test_a_run_that_was_stopped_goes_on_to_the_bit(weights, tmp_path, monkeypatch):
    """Inside an epoch, with dropout and accumulation, after a signal and after a kill."""
    same = ["--weights", weights, *OFTEN, "--dropout", "0.1", "--accumulate", "2"]
    whole = train(tmp_path / "whole", *same)

    def stop_at(count, add=Progress.add):
        def stop(progress, loss):
            stop.steps = getattr(stop, "steps", 0) + 1
            if stop.steps == count:
                signal.raise_signal(signal.SIGUSR1)
            add(progress, loss)

        monkeypatch.setattr(Progress, "add", stop)

    for steps in (2, 3):
        stop_at(steps)
        with pytest.raises(Stopped):
            train(tmp_path / "parts", *same, "--resume", "auto")
    monkeypatch.undo()
    monkeypatch.setattr(script, "plot_losses", lambda *_: None)
    draw_nothing(monkeypatch)
    parts = train(tmp_path / "parts", *same, "--resume", "auto")
    assert_same_run(parts, whole)

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(script, "evaluate", die)  # as if killed: nothing is written any more
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "killed", *same, "--checkpoint-every", "2")
    monkeypatch.undo()
    draw_nothing(monkeypatch)
    monkeypatch.setattr(script, "plot_losses", lambda *_: None)
    killed = train(tmp_path / "killed", *same, "--checkpoint-every", "2", "--resume", "auto")
    assert_same_run(killed, whole)


def train_on_two(place, weights):
    """Train on this process's share; return masks and losses."""
    logging.getLogger().setLevel("WARNING")
    os.environ["WORLD_SIZE"] = "2"
    script.plot_losses = lambda *_: None
    torch.manual_seed(0)
    masks = {}

    def keep(masking, check=script.session.check_agreement):
        masks.update({name: mask.clone() for name, mask in masking.masks.items()})
        check(masking)

    script.session.check_agreement = keep
    folder = script.run(parsed(place, "--weights", weights, "--growth", "gradient", *OFTEN[2:]))
    return masks, without_times(folder.metrics)


@pytest.mark.long
@pytest.mark.parametrize(
    "weights", ["zero", pytest.param("sparse", marks=pytest.mark.skipif(not available(), reason=""))]
)
def test_two_processes_have_the_same_masks_and_read_all_windows(weights, tmp_path):
    (masks, metrics), (other, others) = run_processes(train_on_two, 2, tmp_path / "two", weights)
    assert masks.keys() == other.keys()
    assert len(masks) == 8
    assert all(torch.equal(masks[name], other[name]) for name in masks)
    assert [record["valid_loss"] for record in metrics] == [record["valid_loss"] for record in others]
    alone = metrics_of(train(tmp_path / "one", "--weights", weights, "--growth", "gradient", *OFTEN[2:]))
    for one, both in zip(alone, metrics, strict=True):
        assert one["train_loss"] == pytest.approx(both["train_loss"], rel=1e-3)
        assert one["valid_loss"] == pytest.approx(both["valid_loss"], rel=1e-3)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--arch gtp", "expected gpt, llama or transformers:CONFIG, got 'gtp'"),
        ("--width 33", "width that 4 heads divide, got 33"),
        ("--kv-heads 2", "--kv-heads is of llama"),
        ("--eval-every 4", "--eval-every 4 does not divide --steps 6"),
        ("--tokens words", "--tokens expects bytes, characters or a file FILE.json, got 'words'"),
        ("--tokens none.json", "none.json"),
        ("--data none.txt", "There is no file or folder none.txt"),
        ("--data empty.txt", "empty.txt is empty"),
        ("--data short.txt", "short.txt is too short"),
        ("--data latin.txt --tokens characters", "latin.txt is not UTF-8 at byte 3"),
        ("--data ascii.txt --tokens characters --sample ~", "character '~' is not in the text"),
        ("--evaluate", "--evaluate needs the weights to evaluate: add --resume RUN_FOLDER"),
        ("--evaluate --resume none", "none"),
        ("--sparse-init synflow", "--sparse-init synflow reads an input of ones"),
        ("--batch-size 4 --accumulate 3", "--batch-size 4 cannot be divided evenly among 1 processes x 3 parts"),
        ("--layer-density embedding=0.3", "'embedding'"),
        ("--weights sparse --amp bf16", "computes in fp32"),
        (
            "--arch transformers:gpt2",
            "--layers, --width, --heads of transformers:gpt2: its configuration has the sizes",
        ),
    ],
)
def test_a_mistake_ends_in_one_line_with_status_2(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, content in dict(empty=b"", short=b"short", latin=b"caf\xe9" * 99, ascii=b"abc\n" * 99).items():
        (tmp_path / f"{name}.txt").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        script.main([*SMALL.split(), *argv.split()])
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert error.startswith("main.py: error: ")
    assert error.count("\n") == 1
    assert message in error


def test_an_empty_sample_is_refused(capsys):
    with pytest.raises(SystemExit):
        script.parse_arguments([*SMALL.split(), "--sample", ""])
    assert "--sample expects at least one character" in capsys.readouterr().err


def test_transformers_is_named_where_it_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(SystemExit) as ended:
        script.main(["--arch", "transformers:gpt2", "--context", "16", "--run-dir", str(tmp_path)])
    assert ended.value.code == 2
    assert (
        "--arch transformers:gpt2 needs the package transformers: pip install transformers" in capsys.readouterr().err
    )


def test_a_run_does_not_go_on_with_another_text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("one " * 300)
    folder = train(tmp_path / "runs", "--data", path)
    path.write_text("two " * 300)
    with pytest.raises(CheckpointError, match="is of a run with text_sha256="):
        train(tmp_path / "runs", "--data", path, "--resume", folder)


def test_characters_and_a_written_sample(tmp_path, caplog):
    """A text of one sentence is learnt by heart, and written down."""
    caplog.set_level("INFO")
    (tmp_path / "a.txt").write_text("abcdefgh" * 200)
    more = ["--data", tmp_path / "a.txt", "--tokens", "characters", "--steps", 120, "--eval-every", 60, "--lr", 0.01]
    folder = train(tmp_path / "runs", *more, "--dense", "--sample", "abc", "--sample-tokens", 21, "--temperature", 0)
    assert "a.txt-gpt-1-17-" in folder.name
    assert "Sample:\n" + "abcdefgh" * 3 in caplog.text
    assert metrics_of(folder)[-1]["valid_loss"] < 0.5


def test_the_learning_rate_warms_up_and_falls_to_a_tenth(tmp_path):
    factor = script.learning_rate(parsed(tmp_path, "--steps", 1000, "--eval-every", 100, "--warmup", 50))
    factors = [factor(step) for step in range(1001)]
    assert factors[0] == pytest.approx(1 / 51)
    assert max(factors) == factors[50] == 1
    assert factors[525] == pytest.approx(0.55)
    assert factors[1000] == pytest.approx(0.1)
    assert all(a < b for a, b in pairwise(factors[:51]))
    assert all(a > b for a, b in pairwise(factors[50:]))


def test_weight_decay_is_on_matrices_alone(tmp_path):
    args = parsed(tmp_path, "--wd", "0.3")
    model = script.build_model(args, 256)
    decayed, others = script.build_optimizer(args, model).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0)
    assert {weight.dim() for weight in decayed["params"]} == {2}
    assert {weight.dim() for weight in others["params"]} == {1}
    assert len(decayed["params"]) + len(others["params"]) == len([*model.parameters()])


def norm_of(argv, place, monkeypatch):
    """Return the largest norm of the gradients that the optimizer stepped with."""
    norms = []

    def noting(args, model, build=script.build_optimizer):
        optimizer = build(args, model)
        optimizer.register_step_pre_hook(
            lambda *_: norms.append(float(torch.nn.utils.get_total_norm([w.grad for w in model.parameters()])))
        )
        return optimizer

    with monkeypatch.context() as patch:
        patch.setattr(script, "build_optimizer", noting)
        train(place, "--dense", *argv)
    return max(norms)


def test_gradients_are_clipped(tmp_path, monkeypatch):
    free = norm_of(["--clip", "0"], tmp_path, monkeypatch)
    assert free > 0.3
    for precision in ("none", "bf16"):
        clipped = norm_of(["--clip", "0.1", "--amp", precision], tmp_path, monkeypatch)
        assert clipped == pytest.approx(0.1, rel=1e-2)


def test_apex_reads_tokens_and_clips_its_master_weights(tmp_path, monkeypatch, caplog):
    apex_stand_in.install(monkeypatch)
    clipped = []
    monkeypatch.setattr(apex_stand_in.FP16Optimizer, "clip_master_grads", lambda _, norm: clipped.append(norm))
    folder = train(tmp_path, "--fp16", "--clip", "0.5", "--sample", "def ", "--sample-tokens", 3)
    assert "fp16 by Apex" in caplog.text
    assert clipped == [0.5] * 6
    assert checkpoint_of(folder)["model"]["blocks.0.mlp.up.weight"].dtype == torch.float16


@pytest.mark.parametrize("kind", ["snip", "grasp"])
def test_scores_before_training_use_the_loss_of_text(kind, tmp_path):
    """The scores decide: other windows of text give other masks."""
    same = ["--sparse-init", kind, "--steps", 1, "--eval-every", 1, "--prune-rate", 0]
    one, other = (masks_of(train(tmp_path, *same, *more)) for more in ([], ["--score-batches", "2"]))
    assert sum(int(mask.sum()) for mask in one.values()) == sum(int(mask.sum()) for mask in other.values())
    assert any(not torch.equal(one[name], other[name]) for name in one)


# {flag: (arguments, whether the metrics of a run with them and of one without show it)}
def last(run):
    return metrics_of(run)[-1]


EFFECTS = {
    "--context": (["--context", "8"], lambda a, b: "FLOPs of 8 tokens" in log_of(a)),
    "--layers": (["--layers", "1"], lambda a, b: len(masks_of(a)) == 4),
    "--heads": (["--heads", "2"], lambda a, b: last(a)["valid_loss"] != last(b)["valid_loss"]),
    "--tied-head": (
        ["--no-tied-head"],
        lambda a, b: (
            not torch.equal(*(checkpoint_of(a)["model"][f"{n}.weight"] for n in ("head", "tokens")))
            and torch.equal(*(checkpoint_of(b)["model"][f"{n}.weight"] for n in ("head", "tokens")))
        ),
    ),
    "--kv-heads": (
        ["--arch", "llama", "--kv-heads", "2"],
        lambda a, b: masks_of(a)["blocks.0.attention.key.weight"].shape == (16, 32),
    ),
    "--dropout": (["--dropout", "0.5"], lambda a, b: last(a)["train_loss"] != last(b)["train_loss"]),
    "--eval-windows": (["--eval-windows", "3"], lambda a, b: last(a)["valid_loss"] != last(b)["valid_loss"]),
    "--warmup": (["--warmup", "5"], lambda a, b: last(a)["valid_loss"] > last(b)["valid_loss"]),
    "--lr": (["--lr", "0.005"], lambda a, b: last(a)["lr"] == pytest.approx(5 * last(b)["lr"])),
    "--amp": (["--amp", "bf16"], lambda a, b: last(a)["valid_loss"] != last(b)["valid_loss"]),
    "--data": (["--data", __file__], lambda a, b: a.name.startswith("test_language_main.py-")),
    "--accumulate": (
        ["--accumulate", "2"],
        lambda a, b: last(a)["valid_loss"] == pytest.approx(last(b)["valid_loss"], rel=1e-3),
    ),
}


def log_of(folder):
    return (folder / "log.txt").read_text()


@pytest.mark.long
def test_every_flag_has_its_effect(tmp_path):
    plain = train(tmp_path / "plain")
    for number, (flag, (argv, shows)) in enumerate(EFFECTS.items()):
        assert shows(train(tmp_path / str(number), *argv), plain), flag


def test_every_flag_of_this_script_is_tested():
    from command_line import build_parser

    here = Path(__file__).read_text()
    shared = {"--help"}
    own = [action.option_strings for action in build_parser()._actions if action.option_strings]
    names = own[: [("--start-epoch" in names) for names in own].index(True)]
    assert [
        spellings
        for spellings in names
        if not {*spellings} & shared and not any(s in here or s in SMALL for s in spellings)
    ] == []


def test_defaults_follow_from_other_arguments(tmp_path):
    for argv, expected in {
        "": (5000, 250, 20, 100),
        "--steps 300": (300, 150, 2, 30),
        "--steps 997": (997, 997, 1, 99),
        "--steps 20": (20, 20, 1, 2),
    }.items():
        args = script.parse_arguments(argv.split())
        assert (args.steps, args.eval_every, args.epochs, args.warmup) == expected
    assert args.tied_head
    assert not script.parse_arguments(["--arch", "llama"]).tied_head
    assert script.parse_arguments(["--layer-density", "attention=0.3"]).layer_density == {"*[Aa]tt*n*": 0.3}


def test_pictures_of_losses(tmp_path):
    metrics = [
        dict(steps=s, epoch=s, train_loss=3 / s, valid_loss=4 / s, valid_bits_per_byte=6 / s, best_step=s,
             best_valid_loss=4 / s, density_per_layer={"a": 0.1 * s})
        for s in (1, 2)
    ]  # fmt: skip
    text_plots.plot_losses(metrics, tmp_path / "losses.png")
    text_plots.plot_runs({"sparse": metrics, "dense": metrics}, tmp_path / "runs.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("losses.png", "runs.png"))
    assert Bytes().vocabulary == 256
    assert json.dumps(metrics)
