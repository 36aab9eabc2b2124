"""Signals that stop a run: which, with what status, and which are left alone."""

import signal

import pytest
from script import load_main, runner

from sparselearning.experiments.data.photographs import _leave_signals_to_the_trainer
from sparselearning.experiments.run.stopping import SIGNALS, handled
from sparselearning.experiments.run.training import Progress

DIGITS = ("--data", "digits", "--epochs", "1", "--device", "cpu", "--max-threads", "1", "--batch-size", "300")
main = load_main()


@pytest.fixture
def restored():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    ("name", "status"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129), ("SIGUSR1", 138), ("SIGUSR2", 140)]
)
def test_a_signal_stops_a_run_with_its_status(tmp_path, monkeypatch, caplog, capsys, name, status):
    number = signal.Signals[name]
    signal.signal(number, signal.SIG_DFL)
    add = Progress.add

    def signalling(progress, loss):
        add(progress, loss)
        if progress.steps == 2:
            signal.raise_signal(number)

    monkeypatch.setattr(Progress, "add", signalling)
    run = runner(main, tmp_path, monkeypatch, caplog, *DIGITS)
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == status
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"main.py: stopped by {name}; in epoch 1 after step 2 of 5; --resume ")
    assert signal.getsignal(number) == signal.SIG_DFL


@pytest.mark.usefixtures("restored")
def test_a_hangup_that_nohup_ignores_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with handled(lambda *_: None):
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        assert signal.getsignal(signal.SIGUSR1) is not signal.SIG_IGN
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


@pytest.mark.usefixtures("restored")
def test_processes_that_load_images_leave_the_signals_to_the_trainer():
    _leave_signals_to_the_trainer(0)
    assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}
