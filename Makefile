# The commands of the project; `make` alone lists them. The environment is .venv, made from requirements.lock when needed.

PYTHON ?= python3
ARGS ?=
# three test files at a time, because tests often wait; in the order of tests/conftest.py
PYTEST ?= -q -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not soak"
# what `make quick` runs: the files without trainings, the options, and the smallest run of the command line
QUICK := $(patsubst %,tests/test_%.py,answers capabilities compat configuration data embedded files grades imports kernels \
	losses metrics old_runs optim tasks typed_before versions) tests/test_conf.py::test_every_choice_composes_and_fits \
	tests/test_run_folder.py::test_a_run_records_its_command
TORCH ?= 2.13.0

BIN := .venv/bin
STAMP := .venv/.installed

# DeepSpeed's compiled operators are not used
export DS_BUILD_OPS := 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run test quick slow soak check bench tables site wheel lock clean
.DEFAULT_GOAL := help

help: ## this list
	@sed -n 's/^\([a-z]*\):[^#]*## /  make \1|/p' Makefile | while IFS='|' read -r target text; do \
		printf '%-14s%s\n' "$$target" "$$text"; done

run: $(STAMP) ## one run or, with -m, a sweep: make run ARGS="loss=npo optimizer=adam,sophia -m"
	@$(BIN)/python -m soul_exp $(ARGS)

test: $(STAMP) ## the tests; some of them: make test PYTEST="-q tests/test_metrics.py"
	@$(BIN)/python -m pytest $(PYTEST)

quick: $(STAMP) ## under 90 seconds, for every save: pure functions, composition, one tiny run
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile $(QUICK)

slow: $(STAMP) ## the tests that take minutes: SLURM jobs that are requeued, preempted and killed
	@$(BIN)/python -m pytest -q -m slow

soak: $(STAMP) ## 200 kills at random times, a quarter of them during a save: minutes
	@$(BIN)/python -m pytest -q -s -m soak

check: $(STAMP) ## lint, format, types and tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest $(PYTEST)

bench: $(STAMP) ## every measurement of benchmarks/
	@set -e; for file in benchmarks/*.py; do [ -e "$$file" ] || continue; echo "== $$file"; $(BIN)/python "$$file"; done

tables: $(STAMP) ## the tables, figures and page of each folder in runs/, then those of README.md and docs/
	@failed=0; for folder in runs/*/; do [ -d "$$folder" ] || continue; echo "== $$folder"; \
		for what in tables figures report; do $(BIN)/python -m soul_exp.$$what "$$folder" || failed=1; done; done; \
		$(BIN)/python analysis/documents.py || failed=1; exit $$failed

site: $(STAMP) ## build/site/index.html: docs/ as a site; to read it: python3 -m http.server -d build/site
	$(BIN)/python -m mkdocs build --strict --quiet

wheel: $(STAMP) ## dist/soul_exp-*.whl, conf/ included
	$(BIN)/python -m build --no-isolation --wheel --outdir dist .

lock: ## write requirements.lock from the ranges in pyproject.toml; another torch: make lock TORCH=2.13.1
	rm -rf build/lock
	$(PYTHON) -m venv build/lock
	build/lock/bin/pip install --quiet torch==$(TORCH)
	build/lock/bin/pip install --quiet --editable '.[dev]' torch==$(TORCH)
	@# torch pins its own CUDA libraries, and which ones depends on the machine; so does the suffix of its version
	build/lock/bin/pip freeze --exclude-editable > build/lock/frozen
	{ echo '# Written by `make lock`: the versions of everything that running and testing need. Ranges: pyproject.toml.'; \
		grep -v -e '^nvidia-' -e '^cuda-' -e '^triton' build/lock/frozen | sed 's/+[a-z0-9.]*$$//'; } > requirements.lock
	rm -rf build/lock

clean: ## remove the environment, caches and builds; runs/ stays
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache
	find soul_exp tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

$(STAMP): requirements.lock pyproject.toml
	@echo 'installing .venv from requirements.lock (once, some minutes)'
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "soul_exp needs Python 3.11 or later: make PYTHON=<its path>")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet -r requirements.lock
	@$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
