# make demo       trains a small world of the built-in stories for two minutes and tells one
# make test       lint, types and the tests to run before every commit
# make test-all   the same with every test there is
# make test-cuda  compiles every GPU kernel for an H200, with NVIDIA's newest compilers and with those
#                 of CUDA 13.0; needs no GPU, but 5 GB (TESTS='-m ""': every block size, width, mask)
# make ablations  every question in configs/ablations on two cores, with verdicts
# make card       what a few minutes on this machine's GPU tell: values, speed, block sizes
#                 (MINUTES=8, CARD=runs/card, QUICK=1 for tiny sizes, on a CPU too, and the
#                 Python that has JAX: see docs/gpu.md)
# make bench      speed on this machine against PyTorch
# PYTHON=python3.12 chooses the Python, which is else the newest here that the newest JAX runs on.
.PHONY: demo check test test-all test-cuda ablations card bench clean

PYTHON ?= $(shell .ci/newest-python)
VENV ?= .venv
INSTALLED = $(VENV)/.installed
PEER = .venv-torch
CUDA = .venv-cuda
CUDA_13_0 = $(CUDA)/cuda-13.0
MINUTES = 8
CARD = runs/card

demo: $(INSTALLED)
	$(VENV)/bin/python train.py configs/demo.toml
	$(VENV)/bin/python sample.py runs/demo --prompt "Once upon a time" --temperature 0.4

check: $(INSTALLED)
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

test: check
	$(VENV)/bin/python -m pytest -n 2 $(TESTS)

test-all: check
	$(VENV)/bin/python -m pytest -n 2 -m "not gpu" $(TESTS)

test-cuda: $(CUDA)/.installed
	for root in "" $(CURDIR)/$(CUDA_13_0)/nvidia/cu13; do \
		env -u CUDA_ROOT $${root:+CUDA_ROOT=$$root} JAX_PLATFORMS=cpu $(CUDA)/bin/python -m pytest -n 2 \
			$(TESTS) $(wildcard tests/test_*compile*.py) tests/test_step_memory.py || exit 1; \
	done

ablations: $(INSTALLED)
	for file in configs/ablations/*.toml; do $(VENV)/bin/python ablate.py $$file || exit 1; done

# Installs nothing: such a machine has JAX for its card, and perhaps no network.
card:
	$(PYTHON) -m benchmarks.card --minutes $(MINUTES) --out $(CARD) $(if $(QUICK),--quick)

bench: $(INSTALLED) $(PEER)/.installed
	$(VENV)/bin/python -m benchmarks.train_cpu --peer-python $(PEER)/bin/python
	$(VENV)/bin/python -m benchmarks.sample_cpu --peer-python $(PEER)/bin/python

$(INSTALLED): pyproject.toml requirements.txt requirements-test.txt
	@python="$(PYTHON)"; echo "$(VENV): $$python, $$($$python --version)"; $$python -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --upgrade pip
	$(VENV)/bin/python -m pip install --quiet -r requirements-test.txt -e .
	touch $@

# JAX with NVIDIA's compilers, for Python 3.12 and later.
$(CUDA)/.installed: requirements.txt requirements-test.txt $(wildcard requirements-test-cuda*.txt)
	$(PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/python -m pip install --quiet --upgrade pip
	$(CUDA)/bin/python -m pip install --quiet -r requirements-test-cuda.txt
	rm -rf $(CUDA_13_0)
	$(CUDA)/bin/python -m pip install --quiet --no-deps --target $(CUDA_13_0) \
		-r requirements-test-cuda-13.0.txt
	touch $@

# The peer of the benchmarks, kept apart: nothing here needs PyTorch.
$(PEER)/.installed:
	$(PYTHON) -m venv $(PEER)
	$(PEER)/bin/python -m pip install --quiet "torch==2.13.0" transformers
	touch $@

clean:
	rm -rf $(VENV) $(PEER) $(CUDA) .cache runs
