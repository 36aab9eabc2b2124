"""The scripts that summarise and compare finished runs."""

import csv
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch

from sparselearning.experiments.report import features, results

SCRIPTS = Path(__file__).parents[3] / "mnist_cifar"
ARGS = {
    "data": "mnist", "model": "lenet5", "density": 0.05, "dense": False, "growth": "momentum", "prune": "magnitude",
    "redistribution": "momentum", "prune_rate": 0.5, "lr": 0.1, "epochs": 2, "seed": 17, "device": None, "iters": 1,
}  # fmt: skip
OLD_LOG = """\
Namespace(data='mnist', death='SET', death_rate=0.5, density=0.1, iters=3, lr=0.1, model='lenet5', seed=17, sparse=True)

Evaluation: Average loss: 0.0700, Accuracy: 5900/6000 (98.333%)

Test evaluation: Average loss: 0.0600, Accuracy: 9800/10000 (98.000%)

Test evaluation: Average loss: 0.0800, Accuracy: 9840/10000 (98.400%)
"""


def script(name):
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Run the script in an empty folder; return exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def call(*argv, name="get_results_from_logs"):
        try:
            script(name).main([str(a) for a in argv])
            status = 0
        except SystemExit as exit:
            status = exit.code
        out, err = capsys.readouterr()
        return status, out, err

    return call


def leave_run(folder, accuracy=None, loss=0.1, costs=None, chance=None, **changes):
    """Write the folder of a run as main.py does; without an accuracy, that of an interrupted run."""
    args = ARGS | changes
    path = Path(folder) / f"run{len(list(Path(folder).glob('run*'))) if Path(folder).exists() else 0}"
    path.mkdir(parents=True)
    (path / "args.json").write_text(json.dumps(args))
    records = [{"epoch": epoch, "valid_accuracy": 0.5} | (costs or {}) for epoch in (1, 2)]
    records[-1] |= {} if chance is None else {"at_chance": chance}
    if accuracy is not None:
        of_run = {key: value / 2 for key, value in (costs or {}).items() if key != "exploration_rate"}
        records.append({"test_loss": loss, "test_accuracy": accuracy} | of_run)
    (path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_statistics_of_an_example():
    """1, 2, 6: deviation sqrt(7), t(0.975, 2) = 4.302653."""
    found = results.statistics([1.0, 2.0, 6.0])
    error, half = 1.527525, 6.572411
    expected = {"mean": 3.0, "median": 2.0, "standard_error": error, "low": 3 - half, "high": 3 + half}
    assert found == pytest.approx(expected, rel=1e-6)


def test_runs_at_chance_are_counted(call):
    for seed, chance in [(17, True), (18, False), (19, None)]:
        leave_run("runs", 0.98, seed=seed, chance=chance)
    _, out, _ = call("--csv", "table.csv")
    lines = out.splitlines()
    (header,) = (i for i, line in enumerate(lines) if line.endswith("at chance"))
    assert lines[header + 2].split()[-1] == "1"
    assert read_csv("table.csv")[0]["runs_at_chance"] == "1"


def test_student_t_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    for freedom in (1, 2, 3, 4, 9, 29, 100, 10_000):
        for probability in (0.5, 0.9, 0.975, 0.995):
            assert results.student_t(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-6)


def test_runs_that_differ_by_seed_are_one_line(call):
    for seed, accuracy in [(17, 0.98), (18, 0.982), (19, 0.987)]:
        leave_run(
            "runs",
            accuracy,
            loss=1 - accuracy,
            seed=seed,
            device=f"cuda:{seed}",
            verbose=seed == 18,
            keep=seed,
            workers=seed,
        )
    leave_run("runs", 0.99, seed=17, density=0.1)
    status, out, err = call("--csv", "table.csv")
    assert (status, err) == (0, "")
    words = " ".join(out.split())
    assert "mnist lenet5 0.05 3 accuracy 0.98300 0.98200 0.00208 0.97404 .. 0.99196 " in words
    assert "error 0.01700 0.01800 0.00208 0.00804 .. 0.02596 " in words
    assert "mnist lenet5 0.1 1 accuracy 0.99000 0.99000 - - " in words
    several, one = read_csv("table.csv")
    assert [several["runs"], several["density"], one["runs"]] == ["3", "0.05", "1"]
    assert float(several["accuracy_mean"]) == pytest.approx(0.983)
    assert float(several["loss_median"]) == pytest.approx(0.018)
    assert one["accuracy_standard_error"] == one["error_low"] == ""


def test_the_table_shows_flops_and_exploration(call):
    for seed, share in [(1, 0.1), (2, 0.2)]:
        costs = dict(inference_flops=share, training_flops=4 * share, exploration_rate=3 * share)
        leave_run("runs", 0.98, seed=seed, costs=costs)  # the whole run costs half of what an epoch says here
    leave_run("runs", 0.97, seed=1, density=0.1)
    status, out, err = call("--csv", "table.csv")
    assert (status, err) == (0, "")
    header, _, first, *_ = out.splitlines()
    assert header.endswith("inference FLOPs    training FLOPs    explored    at chance")
    assert first.split()[-4:] == ["0.075", "0.300", "0.450", "0"]
    several, old = read_csv("table.csv")
    assert [float(several[key]) for key in ("training_flops", "exploration_rate")] == pytest.approx([0.3, 0.45])
    assert old["training_flops"] == ""


def test_arguments_that_change_the_result_separate_runs(call):
    leave_run("runs", 0.98, seed=1)
    leave_run("runs", 0.97, seed=2, growth="random")
    _, out, _ = call()
    assert "growth" in out
    assert out.count("accuracy") == 2


def test_dense_runs_do_not_depend_on_sparse_arguments(call):
    leave_run("runs", 0.98, seed=1, dense=True, density=0.05)
    leave_run("runs", 0.99, seed=2, dense=True, density=0.1, growth="random", inactive="kept")
    call("--csv", "table.csv")
    (line,) = read_csv("table.csv")
    assert (line["runs"], line["density"]) == ("2", "1.0")


def test_unfinished_runs_are_counted(call):
    leave_run("runs", 0.98)
    leave_run("runs", seed=18)
    (leave_run("runs", seed=19) / "metrics.jsonl").unlink()
    status, out, _ = call()
    assert status == 0
    assert "2 runs unfinished" in out


def test_a_repeated_seed_counts_once_and_the_newest_wins(call):
    old, new = leave_run("runs", 0.5), leave_run("runs", 0.98)
    os.utime(old, (1, 1))
    os.utime(new, (2, 2))
    _, out, _ = call()
    assert "0.98000" in out
    assert "1 run left out for a newer one of the same arguments and seed" in out


def test_individual_results_are_listed(call):
    leave_run("runs", 0.98)
    leave_run("runs", 0.97, seed=18)
    _, out, _ = call("--all")
    assert [line.split()[3:5] for line in out.splitlines() if "run0" in line or "run1" in line] == [
        ["17", "0.98000"],
        ["18", "0.97000"],
    ]


def test_folders_are_apart_unless_aggregated(call):
    leave_run("runs/a", 0.98, seed=1)
    leave_run("runs/b", 0.97, seed=2)
    assert call()[0] == 2
    _, apart, _ = call("--recursive")
    assert "runs/a" in apart
    assert apart.count("accuracy") == 2
    _, together, _ = call("--recursive", "--agg-config")
    assert together.count("accuracy") == 1
    assert "0.97500" in together
    assert call("--folder-path", "runs/a")[0] == 0


@pytest.mark.parametrize(
    ("terms", "accuracies"),
    [
        ("density=0.05", {"0.98000", "0.97000"}),
        ("density=5e-2 growth=random", {"0.97000"}),
        ("--prune-rate=0.5 model='lenet5' density=0.1", {"0.96000"}),
        ("dense=False seed=2", {"0.97000"}),
    ],
)
def test_a_filter_needs_all_its_terms(call, terms, accuracies):
    leave_run("runs", 0.98, seed=1)
    leave_run("runs", 0.97, seed=2, growth="random")
    leave_run("runs", 0.96, seed=3, density=0.1)
    _, out, _ = call("--filter", terms, "--all")
    individual = out.split("\n\n")[1]
    assert {word for word in individual.split() if word in ("0.98000", "0.97000", "0.96000")} == accuracies


def test_logs_of_release_1_are_read(call):
    Path("logs").mkdir()
    Path("logs/lenet5.log").write_text(OLD_LOG)
    status, out, err = call("--folder-path", "logs", "--filter", "death=SET", "--csv", "table.csv")
    assert (status, err) == (0, "")
    (line,) = read_csv("table.csv")
    assert (line["runs"], line["prune"], line["prune_rate"]) == ("2", "SET", "0.5")
    assert float(line["accuracy_mean"]) == pytest.approx(0.982)
    assert float(line["loss_mean"]) == pytest.approx(0.07)
    assert "1 run unfinished" in out


def test_an_appended_log_holds_several_commands(tmp_path):
    log = tmp_path / "a.log"
    log.write_text(OLD_LOG + OLD_LOG.replace("density=0.1", "density=0.2"))
    runs = results.read(log)
    assert [(run.args["density"], run.accuracy) for run in runs] == [
        *[(0.1, 0.98), (0.1, 0.984), (0.1, None)],
        *[(0.2, 0.98), (0.2, 0.984), (0.2, None)],
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("broken.log", "Namespace(f=<function f at 0x7f>)\n"),
        ("broken.log", "Test evaluation: Average loss: 0.06, Accuracy: 1/2 (50%)\n"),
        ("broken/args.json", "{"),
        ("broken/args.json", "[]"),
    ],
)
def test_an_unreadable_run_is_named_and_the_others_count(call, name, text):
    leave_run("runs", 0.98)
    path = Path("runs") / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    status, out, err = call()
    assert status == 0
    assert "0.98000" in out
    assert err.startswith("left out: runs/broken")


def test_a_missing_folder_is_one_line_and_status_2(call):
    status, out, err = call("--folder-path", "none")
    assert (status, out) == (2, "")
    assert err == (
        "get_results_from_logs.py: error: There is no folder none. "
        "Train with main.py first, or pass --folder-path FOLDER.\n"
    )


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--filter", "density"], "--filter takes key=value terms"),
        (["--filter", "colour=red"], "None of 1 runs matches --filter"),
        (["--csv", "none/table.csv"], "there is no folder none"),
        (["--plot", "picture.xyz"], "Format 'xyz' is not supported"),
        (["--folder-path", "empty"], "No run in empty"),
    ],
)
def test_mistakes_are_one_line_and_status_2(call, argv, message):
    Path("empty").mkdir()
    leave_run("runs", 0.98)
    status, _, err = call(*argv)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in Path().iterdir()) == ["empty", "runs"]


def test_nothing_finished_is_nothing_to_write(call):
    leave_run("runs")
    status, out, err = call("--csv", "table.csv")
    assert (status, out) == (2, "1 run unfinished\n")
    assert "No run has finished" in err


def test_the_picture_is_drawn(call):
    for density in (0.01, 0.05):
        for seed in (1, 2):
            leave_run("runs", 0.97 + density / 10 + seed / 1000, density=density, seed=seed)
    leave_run("runs", 0.99, dense=True)
    assert call("--plot", "picture.png")[0] == 0
    assert Path("picture.png").read_bytes().startswith(b"\x89PNG")


def test_feature_histograms_compare_two_runs(call):
    dense = {"relu1": torch.tensor([[6.0, 4.0], [7.0, 3.0], [8.0, 2.0]]), "relu2": torch.zeros(2, 2)}
    sparse = {"relu1": torch.tensor([[9.0, 1.0], [0.1, 0.1], [8.0, 2.0]]), "relu2": torch.eye(2)}
    features.save(dense, "dense.npz")
    features.save(sparse, "sparse.npz")
    status, out, err = call("dense.npz", "sparse.npz", "--out", "new/pictures", name="plot_feature_histograms")
    assert (status, err) == (0, "")
    lines = [line.split() for line in out.splitlines()]
    assert ["relu1", "0.7000", "3/3", "0.8500", "2/3"] in lines
    assert ["relu2", "-", "0/2", "1.0000", "2/2"] in lines
    assert Path("new/pictures/feature_histograms.png").stat().st_size > 0


def test_features_of_different_models_are_refused(call):
    features.save({"relu1": torch.ones(3, 10)}, "dense.npz")
    features.save({"relu1": torch.ones(4, 10)}, "sparse.npz")
    status, _, err = call("dense.npz", "sparse.npz", "--out", "new", name="plot_feature_histograms")
    assert status == 2
    assert "1 layers with 3 channels and 1 layers with 4 channels" in err
    assert not Path("new").exists()


def test_a_missing_feature_file_is_one_line(call):
    status, _, err = call("none.npz", "none.npz", name="plot_feature_histograms")
    assert status == 2
    assert err.startswith("plot_feature_histograms.py: error: No feature file none.npz.")
    assert err.count("\n") == 1
