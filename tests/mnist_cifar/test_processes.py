"""mnist_cifar/main.py on several processes: one order of the images, one that writes, any number that go on."""

import logging
import os
import signal

import pytest
import torch
from launch import run as run_processes
from script import checkpoint_of, load_main, metrics_of, run_folder

from sparselearning.experiments.run.stopping import Stopped
from sparselearning.experiments.run.training import Progress
from sparselearning.processes import distributed

DIGITS = "--data digits --epochs 3 --device cpu --max-threads 1 --batch-size 300 --growth random --resume auto"
STEPS = 5  # of an epoch


def train(place, stop_at):
    """Train on this process's share; return the orders of the images, and where it stopped, if it did."""
    logging.getLogger().setLevel("INFO")  # as the script does where it is typed
    os.environ["WORLD_SIZE"] = str(distributed.processes())
    main, orders = load_main(), []
    torch.manual_seed(distributed.rank())

    def note(progress, loss, add=Progress.add):
        if not orders or orders[-1] != progress.order.tolist():
            orders.append(progress.order.tolist())
        if stop_at and len(orders) == stop_at and distributed.rank() == distributed.processes() - 1:
            signal.raise_signal(signal.SIGUSR1)
        add(progress, loss)
        torch.rand(distributed.rank() + 1)  # as a function of the user's that draws more on one process

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "add", note)
        try:
            main.run(main.parse_arguments([*DIGITS.split(), "--run-dir", str(place)]))
        except Stopped as stop:
            return orders, str(stop)
    return orders, None


@pytest.mark.long
def test_a_run_goes_on_on_any_number_of_processes(tmp_path):
    for processes, stop_at in ((2, 1), (1, 2), (3, None)):
        (orders, where), *others = run_processes(train, processes, tmp_path, stop_at)
        assert all(other == (orders, where) for other in others), "one order, and one end"
        assert (where is None) == (stop_at is None)
        for order in orders:
            assert sorted(order) == [*range(len(order))]
    folder = run_folder(tmp_path)
    assert [record.get("epoch") for record in metrics_of(folder)] == [1, 2, 3, None]
    assert {record["active_weights"] for record in metrics_of(folder)[:-1]} == {13_310}
    assert metrics_of(folder)[-1]["test_total"] == 359
    saved = checkpoint_of(folder)
    assert sum(int(layer["mask"].sum()) for layer in saved["mask"]["layers"].values()) == 13_310
    log = (folder / "log.txt").read_text()
    assert [log.count(f"epoch {epoch} ") for epoch in (1, 2, 3)] == [1, 1, 1]
    assert not (folder / "run.lock").exists()
