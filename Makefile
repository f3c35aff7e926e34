# make demo      creates .venv, installs the project, fine-tunes the embedded small Gemma 4
# make test      creates .venv, installs the project, runs the tests
# make legacy    the same tests on the oldest stack that is supported, in .venv-legacy
# make parity    compares with transformers and PEFT on torch, in .venv-parity and .venv-legacy
# make bench     ours beside mlx-lm: loss, step time, memory
# make lint      ruff and mypy

VENV := .venv
# On Debian and Ubuntu, MLX's CPU matmul is tens of times faster with this library preloaded.
OPENBLAS := $(firstword $(wildcard /usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0))
FAST := $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS))
PIP := -m pip --disable-pip-version-check --quiet

.PHONY: demo test legacy parity bench lint clean

demo: $(VENV)/installed
	$(FAST) $(VENV)/bin/python -m mlx_gemma4.train

test: $(VENV)/installed-test
	$(FAST) $(VENV)/bin/python -m pytest --ignore=tests/parity

legacy: $(VENV)-legacy/installed
	$(FAST) $(VENV)-legacy/bin/python -m pytest --ignore=tests/parity

parity: $(VENV)-parity/installed $(VENV)-legacy/installed-parity
	$(FAST) $(VENV)-parity/bin/python -m pytest tests/parity
	$(FAST) $(VENV)-legacy/bin/python -m pytest tests/parity

bench: $(VENV)/installed
	$(FAST) $(VENV)/bin/python benchmarks/run.py

lint: $(VENV)/installed-lint
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

clean:
	rm -rf $(VENV) $(VENV)-legacy $(VENV)-parity runs

$(VENV)/installed: pyproject.toml
	./tools/make-venv $(VENV)
	$(VENV)/bin/python $(PIP) install --editable .
	@touch $@

$(VENV)/installed-%: $(VENV)/installed
	$(VENV)/bin/python $(PIP) install --editable ".[$*]"
	@touch $@

$(VENV)-legacy/installed: pyproject.toml tools/legacy-stack.txt
	./tools/make-venv $(VENV)-legacy
	$(VENV)-legacy/bin/python $(PIP) install --constraint tools/legacy-stack.txt --editable ".[test]"
	@touch $@

# torch first and by itself: whatever asks for it later is content with the version that is there.
$(VENV)-parity/installed: pyproject.toml
	./tools/make-venv $(VENV)-parity
	$(VENV)-parity/bin/python $(PIP) install torch==2.13.0
	$(VENV)-parity/bin/python $(PIP) install --editable ".[test,parity]"
	@touch $@

$(VENV)-legacy/installed-parity: $(VENV)-legacy/installed
	$(VENV)-legacy/bin/python $(PIP) install torch==2.13.0
	$(VENV)-legacy/bin/python $(PIP) install --constraint tools/legacy-stack.txt --editable ".[parity]"
	@touch $@
