# make bench | test | quick | test-slow | test-python-path | lint | types | imports | docs
#      | readme-table | mutants | micro | build | sanitize | conformance | dist | env
# PYTHON= is the interpreter to build on, VENV= where the environment goes
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
WORKERS ?= 2
RESULTS ?= results
KERNEL_TESTS ?= $(wildcard tests/engine/test_cpu*.py tests/engine/test_host*.py) \
	tests/engine/test_recipes.py tests/engine/test_dequantise.py \
	tests/engine/test_grouped.py tests/engine/test_grouped_ops.py
SANITIZERS = -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g -O1
PYTEST = $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal

.PHONY: bench test quick test-slow test-python-path coverage lint types imports docs readme-table mutants micro
.PHONY: build sanitize conformance dist env clean

# One layer, a real encoder, a few tokens at a time, text generation, the memory of a larger model;
# then one page of all. A wrong row stops it.
bench: env
	$(BIN)/lorafast-bench linear --seconds 5 --warmup 1 --json $(RESULTS)/linear.json
	$(BIN)/lorafast-bench model --seconds 5 --warmup 1 --json $(RESULTS)/model.json
	$(BIN)/lorafast-bench linear --pass train,inference --tokens 1,8,16 --shape 1024x1024 \
		--methods lora,dora --impl lorafast,accelerated,peft --dropout 0 --seconds 2 --warmup 1 \
		--json $(RESULTS)/few-tokens.json
	$(BIN)/lorafast-bench generate --methods lora --seconds 10 --warmup 1 \
		--json $(RESULTS)/generate.json
	$(BIN)/lorafast-bench estimate --model llama3.2-1b --methods lora,dora --batch-sizes 1,8 \
		--checkpointing off --json $(RESULTS)/estimate.json
	$(BIN)/lorafast-bench report --html $(RESULTS)/report.html \
		$(patsubst %,$(RESULTS)/%.json,linear model few-tokens generate estimate)

# Everything but the slow tests, in at most 8 minutes on two cores.
test: env
	$(PYTEST) -m "not slow"

# At most three cases of each test, without kernels, bench, compiling, PEFT or processes: a minute.
quick: env
	$(PYTEST) --cases 3 -k "not triton" \
		-m "not slow and not compile and not peft and not distributed" \
		--ignore tests/kernels --ignore tests/emulator --ignore tests/bench --ignore tests/docs \
		--ignore tests/test_packaging.py

# All forms of all kernels, whole models, packaging, every instruction set.
test-slow: env
	$(PYTEST) -m slow

# What layers and the op promise, with their calls kept in Python: the path without C++.
test-python-path: env
	LORAFAST_HOST=0 $(PYTEST) -m "not slow" tests/engine tests/nn tests/methods \
		tests/test_functional.py tests/integrations/test_accelerate.py

coverage: env
	$(PYTEST) -m "not slow" --cov=lorafast --cov-report=term

lint: env
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*/*.cpp csrc/*/*.h csrc/*/*.cu csrc/*/*.cuh)
	$(BIN)/codespell

# The public API and the engine.
types: env
	$(BIN)/python -m mypy

# Imports go one way: the contracts in pyproject.toml.
imports: env
	$(BIN)/lint-imports

docs: env
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The generated tables of README and docs, from bench/results and the code.
readme-table: env
	$(BIN)/python tools/readme_table.py

# Small faults planted in the code one at a time; a test must fail for each.
mutants: env
	$(BIN)/python tools/mutants.py

# The C++ kernels ahead of their first use, for every instruction set the compiler knows.
build: env
	$(BIN)/python -m lorafast build --all

# The tests of the C++ with a guard on every access. The runtimes come first because Python was not
# linked with them, and libstdc++ with them, or a C++ exception finds no handler. Built before, so
# that the compiler does not run under the guard; there the runtimes may come late.
sanitize: export LORAFAST_CXXFLAGS = $(SANITIZERS)
sanitize: export ASAN_OPTIONS = detect_leaks=0:verify_asan_link_order=0
sanitize: build
	LD_PRELOAD="$(foreach name,asan ubsan stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))" \
	UBSAN_OPTIONS=print_stacktrace=1 \
	$(BIN)/python -m pytest -q -s -p no:cacheprovider $(KERNEL_TESTS)

# Every primitive and every kind of call on its own. Times alone: nothing here is right or wrong.
micro: env
	$(BIN)/python -m pytest -q bench/micro.py --benchmark-sort=name \
		--benchmark-columns=min,median,iqr,rounds

# PEFT's own tests, plainly and with lorafast's class in place. Downloads them and what they import.
conformance: env
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		attrs datasets diffusers parameterized scipy
	$(BIN)/python tools/conformance.py

dist: env
	rm -rf dist
	$(BIN)/python -m build --no-isolation --outdir dist
	$(BIN)/python -m twine check --strict dist/*

env: $(VENV)/.installed

# A Python too old to parse the tool has to be told here.
$(VENV)/.installed: pyproject.toml constraints.txt tools/environment.py
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("lorafast needs Python 3.11 or newer; this is %s. Choose one: make PYTHON=python3.11 ..." % sys.version.split()[0])'
	@$(PYTHON) tools/environment.py $(VENV)
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
