# make demo   creates .venv, installs the project, fine-tunes the embedded small Gemma 4
# make test   creates .venv, installs the project, runs the tests
# make lint   ruff and mypy

VENV := .venv
PYTHON := $(VENV)/bin/python
# On Debian, MLX's CPU matmul is tens of times faster with this library preloaded.
OPENBLAS := $(firstword $(wildcard /usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0))
RUN := $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS)) $(PYTHON)

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(RUN) -m mlx_gemma4.train

test: $(VENV)/installed-test
	$(RUN) -m pytest --ignore=tests/parity

lint: $(VENV)/installed-lint
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

$(VENV)/installed: pyproject.toml
	./tools/make-venv $(VENV)
	$(PYTHON) -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-test: $(VENV)/installed
	$(PYTHON) -m pip install --quiet --editable ".[test]"
	@touch $@

$(VENV)/installed-lint: $(VENV)/installed
	$(PYTHON) -m pip install --quiet --editable ".[lint]"
	@touch $@

clean:
	rm -rf $(VENV) runs
