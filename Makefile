# make demo | test | lint | bench | gpu | asan | compat: each makes what it needs. Settings, as in `make test VENV=env PYTHON=python3.12`:
VENV ?= .venv
PYTHON ?= python3
TORCH ?= torch==2.13.0
OUT ?= bench/results/local

BIN := $(VENV)/bin
READY := $(VENV)/.hico-ready
SAY := @printf '\033[1m==>\033[0m %s\n'
NATIVE := setup.py pyproject.toml $(shell find csrc -type f)

.PHONY: demo test lint format bench report instructions check-instructions gpu asan compat build clean

demo: $(READY)  ## a real video through the whole flow: a table here, pictures in hico_demo.html
	$(SAY) "running the demo"
	@$(BIN)/hico demo

test: $(READY) $(VENV)/timm $(VENV)/triton-3.6  ## every test, then every benchmark once with timing off
	$(SAY) "running the tests"
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder tests
	$(SAY) "running the tests of timm's towers"
	@PYTHONPATH=$(VENV)/timm $(BIN)/python -m pytest -q tests/test_tome_timm.py tests/test_tome_docs.py
	$(SAY) "running every benchmark once, without timing"
	@$(BIN)/python -m pytest -q -n auto --maxprocesses 4 bench --benchmark-disable

lint: $(READY)  ## style of Python, C++ and CUDA
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .
	@$(BIN)/clang-format --dry-run --Werror $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

format: $(READY)  ## rewrite to that style
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .
	@$(BIN)/clang-format -i $$(find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu')

bench: $(READY)  ## timings against floors and alternatives; results go to bench/results
	@mkdir -p build
	@git status --porcelain -- csrc hico_kernels model 'bench/*.py' 2>/dev/null | sed 's/^/not committed, results will not count: /'
	@$(BIN)/python -m pytest -q bench --benchmark-only --benchmark-json=build/bench.json; code=$$?; \
	  $(BIN)/python -m bench.results build/bench.json && exit $$code

report: $(READY)  ## write what was measured into README and docs
	@$(BIN)/python -m bench.report

instructions: $(READY)  ## count the instructions of every CPU kernel and keep the figures
	@$(BIN)/python -m bench.instructions --write

check-instructions: $(READY)  ## fail when a CPU kernel executes more instructions than kept
	@$(BIN)/python -m bench.instructions

gpu:  ## checks and measurements on a CUDA device, without network; results go to OUT
	@$(or $(wildcard $(BIN)/python),$(PYTHON)) -m hico_kernels.testing.gpu --out $(OUT)

# In a copy of the tree, where the package with these modules is what tests import. Without the leak
# test: it watches the process grow, and ASAN keeps freed memory on purpose.
asan: $(READY)  ## the suite with the native code under ASAN and UBSAN
	$(SAY) "building with sanitizers"
	@HICO_SANITIZE=1 HICO_CUDA=0 $(BIN)/python setup.py -q build --build-base build/asan
	@rm -rf build/asan/tree && mkdir build/asan/tree && git ls-files | tar -c -T - | tar -x -C build/asan/tree
	@cp build/asan/lib.*/hico_kernels/*.so build/asan/tree/hico_kernels
	$(SAY) "running the tests"
	@cd build/asan/tree && LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	  $(abspath $(BIN))/python -m pytest -q tests -k 'not leak_nothing'

compat: $(READY)  ## patching of other models on several releases of transformers; the table in docs/patching.md
	$(SAY) "testing patches on several releases of transformers"
	@$(BIN)/python tests/compat.py

build: $(READY)

$(BIN)/python:
	$(SAY) "creating the virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV)

# A torch that is there already (a VENV= of your own) stays as it is.
$(READY): $(NATIVE) | $(BIN)/python
	@$(BIN)/python -c 'import torch' 2>/dev/null || { printf '\033[1m==>\033[0m %s\n' \
	  "installing $(TORCH) (the large part: minutes, once)"; $(BIN)/python -m pip install -q $(TORCH); }
	$(SAY) "installing what the build and the tests need"
	@$(BIN)/python -m pip install -q 'setuptools>=77' wheel ninja 'pybind11>=2.12'
	$(SAY) "building hico_kernels"
	@$(BIN)/python -m pip install -q --no-build-isolation -e '.[dev]'
	@touch $@

# Beside the environment, for some tests alone, which skip where the download fails: timm wants torchvision, which PyPI has for CUDA
# only and transformers would use; tests/test_aot.py compiles with the oldest Triton that a supported torch brings, too.
$(VENV)/timm: | $(READY)
	@$(BIN)/python -m pip install -q --no-deps --target $@ timm \
	  $$($(BIN)/python -c 'import torch; print(f"torchvision==0.{int(torch.__version__.split(chr(46))[1]) + 15}.*")') \
	  || echo "not installed: the tests of timm's towers will skip"

$(VENV)/triton-3.6: | $(READY)
	@$(BIN)/python -m pip install -q --no-deps --target $@ 'triton==3.6.*' || echo "not installed: its tests will skip"

clean:  ## everything that was built, not the virtual environment
	rm -rf build *.egg-info hico_kernels/*.so $(READY) $(VENV)/timm $(VENV)/triton-3.6
