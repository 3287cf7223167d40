# demo and test make their environment in .venv by themselves, and again when pyproject.toml changes.
# test-gpu uses the python3 at hand, with the PyTorch, Triton and pytest that it has, and installs nothing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-gpu test-matrix test-oldest test-newest fuzz repeats soak sanitize trust compile-matrix lint bench bench-check

# FILE and TEXT reach the shell as environment variables, unexpanded, so that no quoting and no $ can break them.
override FILE := $(value FILE)
override TEXT := $(value TEXT)
export FILE TEXT

# Threads that wait passively: on 2 cores that others use too, a training step took 0.2 s so and up to 2.5 s else.
demo: .venv/installed
	@OMP_WAIT_POLICY=passive $(BIN)/fuzzytok demo $${FILE:+--file="$$FILE"} $${TEXT:+--text="$$TEXT"}

# Twice: the reference in plain PyTorch, then the kernels themselves through Triton's interpreter.
test: .venv/installed
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadgroup

test-gpu:
	FUZZYTOK_TEST_DEVICE=cuda PYTHONPATH=. $(PYTHON) -m pytest -n auto --maxprocesses 14 --dist loadgroup

# The tests on the oldest PyTorch and Triton that the package allows, and on the newest that pip finds: several GB each, so never in CI.
test-matrix: test-oldest test-newest
pair-oldest := torch==2.11.* triton==3.6.* 'numpy<2.4'  # the interpreter of Triton 3.6 breaks on newer ones
pair-newest := torch triton
test-oldest test-newest: test-%: .venv-%/installed
	.venv-$*/bin/python -m pytest -n auto --maxprocesses 8 --dist loadgroup
	TRITON_INTERPRET=1 .venv-$*/bin/python -m pytest -n auto --maxprocesses 8 --dist loadgroup

# Random problems against the reference, on the GPU: 20,000 of them, or as CASES has it.
fuzz:
	FUZZYTOK_TEST_DEVICE=cuda PYTHONPATH=. $(PYTHON) tests/fuzz.py $(if $(CASES),--cases $(CASES))

# Also on the GPU: the same bits ten thousand times under load; 30,000 training steps; NVIDIA's memcheck, racecheck and initcheck.
repeats soak sanitize:
	FUZZYTOK_TEST_DEVICE=cuda PYTHONPATH=. $(PYTHON) tests/$@.py

# All of these, `fuzzytok check --all`, and the tests of sizes, faults and races: about 7 minutes on 44 cores.
trust:
	PYTHON=$(PYTHON) tests/trust.sh

# Every kernel and shipped config, compiled for all GPUs without having them; MOST limits how many for each. Twice: under the Triton of
# .venv, and under the oldest that the package allows.
compile-matrix: .venv/installed .venv/triton-oldest/installed
	$(BIN)/python -m fuzzytok_kernels.tuning.matrix $(if $(MOST),--most $(MOST))
	PYTHONPATH=.venv/triton-oldest $(BIN)/python -m fuzzytok_kernels.tuning.matrix $(if $(MOST),--most $(MOST))

.venv/triton-oldest/installed: .venv/installed
	$(BIN)/python -m pip install --quiet --upgrade --no-deps --target $(@D) $(filter triton%,$(pair-oldest))
	touch $@

lint: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# On a GPU machine whose python3 has PyTorch, Triton, pytest-benchmark and matplotlib, `python3 -m bench` does the same and installs nothing.
bench: .venv/installed-bench
	OMP_WAIT_POLICY=passive $(BIN)/python -m bench

# Compares the last run with bench/baselines/; `python3 -m bench.check --update` stores it there instead.
bench-check: .venv/installed-bench
	$(BIN)/python -m bench.check

# The paper's evaluation at tiny size, every table; on a GPU machine `python3 -m bench.paper` does the real one and installs nothing.
.PHONY: paper-smoke
paper-smoke: .venv/installed-paper
	for table in table1 table2 radical; do OMP_WAIT_POLICY=passive $(BIN)/python -m bench.paper $$table --smoke || exit; done

.venv/installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear .venv
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	touch $@

.venv-%/installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-$*
	.venv-$*/bin/python -m pip install --quiet $(pair-$*) --editable '.[test]'
	touch $@

.venv/installed-bench: .venv/installed
	$(BIN)/python -m pip install --quiet --editable '.[bench]'
	touch $@

.venv/installed-paper: .venv/installed-bench
	$(BIN)/python -m pip install --quiet --editable '.[paper]'
	touch $@
