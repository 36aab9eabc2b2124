"""Campaigns of runs of mnist_cifar/main.py, whose results are committed as they come.

`runs.py` says what a run and a campaign are, `work.py` makes the runs, `kept.py` keeps what came out, `tables.py` shows
it beside published numbers, and `script.py` is the main function of results_mnist.py and results_cifar.py.
"""
