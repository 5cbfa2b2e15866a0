# make demo   the bundled model answers questions about bundled pictures
# make test   the whole test suite
# Both make .venv by themselves and need nothing but Python 3.11 or 3.12 (and, for the fast kernels, a C++ compiler).

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core-installed
DEV := $(VENV)/.dev-installed
SOURCES := pyproject.toml constraints.txt setup.py \
    $(wildcard src/smolvlm_fms/engine/kernels/csrc/* src/smolvlm_fms/processing/csrc/*)
PYTEST := $(BIN)/python -m pytest -n 2 --dist loadfile
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-transformers-4 test-torchvision test-torchao check clean

demo: $(CORE)
	$(BIN)/smolvlm demo

test: $(DEV)
	$(PYTEST)

# What compares with the processors of transformers that need torchvision. It has no CPU build and stays out of .venv;
# the plug-in declares the compiled operators that its Python code asks for.
TENSOR_PARITY := tests/parity/test_image_tensor_parity.py tests/parity/test_video_parity.py \
    tests/parity/test_processor_parity.py
test-torchvision: export SMOLVLM_REQUIRE_TORCHVISION = 1
test-torchvision: $(DEV) .peers/torchvision
	PYTHONPATH=.peers/torchvision $(PYTEST) -p tests.torchvision_ops $(TENSOR_PARITY)

# The parity tests once more against the oldest transformers that we promise to work with. What it lacks is skipped, and
# the skips say what.
test-transformers-4: export SMOLVLM_REQUIRE_TORCHVISION = 1
test-transformers-4: $(DEV) .peers/transformers-4 .peers/torchvision
	PYTHONPATH=.peers/transformers-4:.peers/torchvision $(PYTEST) -p tests.torchvision_ops \
	    tests/parity -rs

# Quantised weights by torchao. It is for GPUs, and stays out of .venv: it complains there about libraries of CUDA's.
test-torchao: export SMOLVLM_REQUIRE_TORCHAO = 1
test-torchao: $(DEV) .peers/torchao
	PYTHONPATH=.peers/torchao $(BIN)/python -m pytest tests/unit/test_engine_torchao.py

check: $(DEV)
	scripts/check

$(VENV)/bin/pip:
	$(PYTHON) -m venv $(VENV)

$(CORE): $(VENV)/bin/pip $(SOURCES)
	$(BIN)/pip install --quiet --editable . --constraint constraints.txt
	@touch $@

$(DEV): $(VENV)/bin/pip $(SOURCES)
	$(BIN)/pip install --quiet --editable '.[dev]' --constraint constraints.txt
	@touch $@ $(CORE)

.peers/transformers-4: | $(DEV)
	$(BIN)/pip install --quiet --no-deps --target $@ 'transformers==4.57.6' 'huggingface_hub==0.36.2' \
	    'tokenizers==0.22.2' 'datasets==4.4.1'

.peers/torchvision: | $(DEV)
	$(BIN)/pip install --quiet --no-deps --target $@ 'torchvision==0.28.0'

.peers/torchao: | $(DEV)
	$(BIN)/pip install --quiet --no-deps --target $@ 'torchao==0.18.0'

clean:
	rm -rf $(VENV) .peers build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
