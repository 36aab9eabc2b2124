"""Pictures: each is written atomically and does not touch matplotlib's global state."""

import math
import subprocess
import sys

import matplotlib
import pytest
import torch

from sparselearning.experiments.report import plots


def run(layers=3, epochs=5, sparse=True):
    """Return records of an invented run whose densities diverge."""
    records = []
    for epoch in range(1, epochs + 1):
        record = {
            "epoch": epoch,
            "train_loss": 1 / epoch,
            "valid_loss": 1.1 / epoch,
            "valid_accuracy": 1 - 0.3 / epoch - 0.02 * sparse,
            "seconds": 1.0,
        }
        if sparse:
            ways = [(i - layers / 2) / layers * epoch / epochs for i in range(layers)]
            record["density_per_layer"] = {f"layer{i}.weight": 0.05 * math.exp(4 * w) for i, w in enumerate(ways)}
        records.append(record)
    return [*records, {"test_loss": 0.2, "test_accuracy": 0.91, "test_correct": 91, "test_total": 100}]


def accuracy_rows():
    rows = [{"label": "dense", "density": 1.0, "accuracy": 0.987, "interval": (0.986, 0.988)}]
    for label, shift in [("momentum", 0.0), ("random", 0.004)]:
        for density in (0.01, 0.02, 0.05, 0.1):
            mean = 0.986 - shift - 0.0001 / density
            interval = (mean - 0.001, mean + 0.001)
            rows.append({"label": label, "density": density, "accuracy": mean, "interval": interval})
    return [*rows, {"label": "single run", "density": 0.05, "accuracy": 0.98, "interval": None}]


def many_rows():
    methods = [{**row, "label": f"{row['label']} {i}"} for i in range(8) for row in accuracy_rows()[1:]]
    return [accuracy_rows()[0], *methods, {"label": "perfect", "density": 0.05, "accuracy": 1.0, "interval": None}]


def counts(layers, seed, sharpness):
    generator = torch.Generator().manual_seed(seed)
    return {f"block{i}.relu": torch.rand(60, 10, generator=generator) ** sharpness for i in range(layers)}


PICTURES = {
    "curves": lambda path: plots.plot_curves(run(), path),
    "curves_dense_without_validation": lambda path: plots.plot_curves(
        [{"epoch": 1, "train_loss": 0.5, "valid_loss": None}], path
    ),
    "curves_of_nothing": lambda path: plots.plot_curves([], path),
    "density_3": lambda path: plots.plot_density(run(3, 20), path),
    "density_50": lambda path: plots.plot_density(run(50, 100), path),
    "density_one_epoch": lambda path: plots.plot_density(run(1, 1), path),
    "density_map_one_epoch": lambda path: plots.plot_density(run(9, 1), path),
    "accuracy_density": lambda path: plots.plot_accuracy_density(accuracy_rows(), path),
    "accuracy_of_many": lambda path: plots.plot_accuracy_density(many_rows(), path, by_error=True),
    "accuracy_against_flops": lambda path: plots.plot_accuracy_density(
        [row | {"training_flops": 3 * row["density"]} for row in accuracy_rows()], path, against="training_flops"
    ),
    "accuracy_dense": lambda path: plots.plot_accuracy_density(accuracy_rows()[:1], path),
    "speed_ups": lambda path: plots.plot_speed_ups({"conv": {"0.1": 3.0, "0.05": 5.5}, "fc": {"0.1": 2.0}}, path),
    "demo": lambda path: plots.plot_demo({"5% density": run(), "dense": run(sparse=False)}, path),
    "demo_dense": lambda path: plots.plot_demo({"dense": run(sparse=False)}, path),
    "features_13": lambda path: plots.plot_feature_histograms(counts(13, 0, 1), counts(13, 1, 2), path),
    "features_1": lambda path: plots.plot_feature_histograms(counts(1, 0, 1), counts(1, 1, 2), path),
}


@pytest.mark.parametrize("name", PICTURES)
def test_picture_is_written(tmp_path, name):
    before = dict(matplotlib.rcParams)
    PICTURES[name](tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.png"]
    assert dict(matplotlib.rcParams) == before


def test_a_layer_without_weights_is_drawn(tmp_path):
    metrics = run(9, 3)
    for record in metrics[:3]:
        record["density_per_layer"]["layer0.weight"] = 0.0
    plots.plot_density(metrics, tmp_path / "map.png")
    assert (tmp_path / "map.png").stat().st_size > 0


def test_a_dead_layer_is_drawn(tmp_path):
    dead = {"relu": torch.zeros(4, 10)}
    plots.plot_feature_histograms(counts(1, 0, 1), {"block0.relu": torch.zeros(4, 10)}, tmp_path / "a.png")
    plots.plot_feature_histograms(dead, dead, tmp_path / "b.png")
    assert len(list(tmp_path.iterdir())) == 2


def test_the_ending_chooses_the_format(tmp_path):
    plots.plot_curves(run(), tmp_path / "curves.svg")
    assert b"<svg" in (tmp_path / "curves.svg").read_bytes()


def test_a_failed_picture_leaves_the_old_one(tmp_path):
    path = tmp_path / "curves.xyz"
    path.write_text("old")
    with pytest.raises(ValueError, match="xyz"):
        plots.plot_curves(run(), path)
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.long
def test_pyplot_is_not_imported(tmp_path):
    """pyplot would choose a backend for the whole process and keep every figure in memory."""
    code = (
        "import sys; from sparselearning.experiments.report import plots; assert 'matplotlib' not in sys.modules;"
        f"plots.plot_curves([{{'epoch': 1, 'train_loss': 1.0}}], {str(tmp_path / 'a.png')!r});"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("accuracies", [(0.9909, 0.9925), (0.9, 0.99), (0.97, 0.9701)])
def test_an_axis_of_accuracies_has_numbers(tmp_path, monkeypatch, accuracies):
    drawn = []
    monkeypatch.setattr(plots, "_write", lambda figure, path: drawn.append(figure))
    row = dict(label="RigL", interval=None, training_flops=1.0)
    rows = [row | dict(density=0.01 * (i + 1), accuracy=accuracy) for i, accuracy in enumerate(accuracies)]
    plots.plot_accuracy_density(rows, tmp_path / "a.png", by_error=True)
    (axes,) = drawn[0].axes
    bottom, top = axes.get_ylim()
    assert sum(bottom <= tick <= top for tick in axes.get_yticks()) >= 2
