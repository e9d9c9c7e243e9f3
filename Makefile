# On a fresh machine, `make demo` or `make test` is all: each makes .venv, installs into it, and runs.
# PYTHON=python3.12 chooses the interpreter (3.11 or newer); ARGS="..." is passed on.

VENV := .venv
RUN := $(VENV)/bin/python -m
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: help demo web test lint format clean

help:
	@echo "make demo     train a teacher and students on handwritten digits; under 90 s once installed"
	@echo "make web      a page to try that student on, for a browser without a network (needs npm)"
	@echo "make test     run the tests                  (ARGS=\"-k losses\" for some of them)"
	@echo "make lint     ruff and pyright               (make format mends what ruff can)"
	@echo "make clean    remove what these left behind  (runs/ and data/ stay)"

demo:
	@.ci/setup $(VENV) experiments
	@$(RUN) experiments.quickstart $(ARGS)

web:
	@.ci/setup $(VENV) experiments,export
	@test -e runs/quickstart/kd/0/network.json || $(RUN) experiments.quickstart
	@$(RUN) experiments.export --run=runs/quickstart/kd/0 --web --output=runs/web $(ARGS)

test:
	@.ci/setup $(VENV) experiments,test
	@$(RUN) pytest --numprocesses=auto --maxprocesses=4 $(ARGS)

lint:
	@.ci/setup $(VENV) experiments,test
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) pyright

format:
	@.ci/setup $(VENV) experiments,test
	$(RUN) ruff check --fix
	$(RUN) ruff format

clean:
	rm -rf .venv .venv-* .cache .pytest_cache .ruff_cache .hypothesis experiments/web/node_modules
	find kdjax experiments tests -name __pycache__ -prune -exec rm -rf {} +
