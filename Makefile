# A fresh clone needs Python 3.11 or newer and a C++ compiler; every target sets up .venv by itself.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip install --quiet --constraint constraints.txt
STAMP := $(VENV)/.installed
SOURCES := pyproject.toml constraints.txt CMakeLists.txt $(wildcard cmake/*) $(shell find csrc -type f)
BUILD := build/check
BENCH := $(PY) -m pytest benchmarks --benchmark-group-by=group --benchmark-columns=median,iqr,rounds

TEST := OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest tests --require native,cuda,triton -n auto --dist worksteal

.PHONY: demo test soak bench check tiny install
.DELETE_ON_ERROR:

demo: $(STAMP)  ## a video from a prompt, with the checkpoint inside the package
	$(PY) -m cogvx demo

test: $(STAMP)  ## every test but those of soak; CUDA kernels are compiled for the host too, Triton ones interpreted
	$(TEST)

soak: $(STAMP)  ## the long counts; hours
	$(TEST) -m soak

bench: $(STAMP)  ## every kernel beside plain PyTorch, with the C library's allocator as it is and with memory kept
	COGVX_BENCH_ALLOCATOR=default $(BENCH)
	$(BENCH)

check: $(STAMP)  ## lint, format, C++ warnings as errors, layout rules
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	COGVX_CUDA=0 $(VENV)/bin/cmake -S . -B $(BUILD) -G Ninja -DCMAKE_MAKE_PROGRAM=$(CURDIR)/$(VENV)/bin/ninja \
	  -DCOGVX_WERROR=ON -DPython_EXECUTABLE=$(CURDIR)/$(PY) -Dpybind11_DIR=$$($(PY) -m pybind11 --cmakedir) >/dev/null
	$(VENV)/bin/cmake --build $(BUILD)
	$(PY) -m pytest tests/test_layout.py

tiny: $(STAMP)  ## train the embedded checkpoint again; hours on two cores
	$(PY) -m cogvx.train.tiny

install: $(STAMP)

# torch goes first and alone, so that the build that constraints.txt asks for is the one that everything else sees.
$(STAMP): $(SOURCES)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python >= 3.11 is needed: make PYTHON=...")'
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable '.[dev]'
	@touch $@
