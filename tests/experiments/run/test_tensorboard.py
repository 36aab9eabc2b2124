"""--tensorboard: event files that hold the numbers of metrics.jsonl, also of a run that goes on."""

import pytest
from helpers import masked, mlp, train
from script import load_main, metrics_of, runner

from sparselearning.experiments.run import arguments
from sparselearning.experiments.run.tensorboard import flat

DIGITS = ["--data", "digits", "--model", "lenet300-100", "--batch-size", "300", "--max-threads", "1", "--device", "cpu"]


@pytest.fixture
def run(tmp_path, monkeypatch, caplog):
    return runner(load_main(), tmp_path, monkeypatch, caplog, *DIGITS)


def curves_of(folder):
    """Return what TensorBoard shows: name -> {step: number}."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {name: {event.step: event.value for event in events.Scalars(name)} for name in events.Tags()["scalars"]}


@pytest.mark.filterwarnings("ignore")  # of TensorBoard's own imports
def test_tensorboard_shows_what_the_metrics_say(run, tmp_path):
    pytest.importorskip("tensorboard")
    plain = run("--epochs", "2", place="plain")
    folder = run("--epochs", "2", "--tensorboard")
    assert folder.name == plain.name  # it changes nothing that is computed
    assert_shows_the_metrics(folder, epochs=2)
    (folder / "checkpoint.pt").unlink()
    run("--resume", folder)  # again from the first epoch, in the same folder
    assert_shows_the_metrics(folder, epochs=2)
    main = load_main()
    main.main(["--resume", str(folder), "--epochs", "3"])  # in a folder of its own
    (longer,) = set(folder.parent.iterdir()) - {folder}
    assert_shows_the_metrics(longer, epochs=3)


def assert_shows_the_metrics(folder, epochs):
    *records, test = metrics_of(folder)
    curves = curves_of(folder)
    assert [record["epoch"] for record in records] == [*range(1, epochs + 1)]
    for name in ("train_loss", "valid_accuracy", "density", "prune_rate"):
        assert curves[name] == {record["steps"]: pytest.approx(record[name]) for record in records}
    layers = {record["steps"]: pytest.approx(record["density_per_layer"]["fc1.weight"]) for record in records}
    assert curves["density_per_layer/fc1.weight"] == layers
    assert curves["test_accuracy"] == {records[-1]["steps"]: pytest.approx(test["test_accuracy"])}


def test_without_tensorboard_the_line_says_what_to_install(run, monkeypatch, capsys):
    monkeypatch.setattr(arguments, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        run("--tensorboard")
    assert end.value.code == 2
    expected = '--tensorboard needs TensorBoard: pip install "sparselearning[tensorboard]"'
    assert capsys.readouterr().err == f"main.py: error: {expected}\n"


def test_what_is_no_number_is_left_out():
    assert dict(flat({"a": {"b": {"c": 1}}, "text": "x", "list": [1], "none": None})) == {"a/b/c": 1.0}


def test_metrics_are_flat_numbers_for_any_logger():
    model = mlp(20, 30, 10)
    masking = masked(model)
    train(model, masking, 3)
    masking.at_end_of_epoch()
    metrics = masking.metrics()
    assert all(isinstance(number, int | float) for number in metrics.values())
    assert metrics["steps"] == 3
    assert metrics["active_weights"] == masking.total_nonzero == 180
    assert metrics["removed_weights"] == masking.total_removed > 0
    assert metrics["density/fc1.weight"] == masking.densities["fc1.weight"]
    assert metrics["importance/fc1.weight"] + metrics["importance/fc2.weight"] == pytest.approx(1)
    assert set(metrics) >= {"density", "inactive_weights", "prune_rate", "exploration_rate"}
