# make demo      creates .venv, installs the project, fine-tunes the embedded small Gemma 4
# make test      creates .venv, installs the project, runs the tests
# make legacy    what differs there, on the oldest stack that is supported, in .venv-legacy
# make parity    compares with transformers and PEFT on torch, in .venv-parity and .venv-legacy
# make verify-gguf   loads what is exported in llama.cpp, which it builds from source (10 minutes);
#                LLAMA_CPP=folder takes the converter of a source tree of yours
# make bench     ours beside mlx-lm: loss, step time, memory
# make soak     2,000 small steps: does memory stay flat, is every file closed? (minutes)
# make lint      ruff and mypy

VENV := .venv
# On Debian and Ubuntu, MLX's CPU matmul is tens of times faster with this library preloaded.
OPENBLAS := $(firstword $(wildcard /usr/lib/*-linux-gnu/openblas-pthread/libopenblas.so.0))
FAST := $(if $(OPENBLAS),LD_PRELOAD=$(OPENBLAS))
PIP := -m pip --disable-pip-version-check --quiet
LLAMA_CPP_PYTHON := 0.3.36
LLAMA_CPP := $(VENV)-gguf/llama_cpp_python-$(LLAMA_CPP_PYTHON)/vendor/llama.cpp

# Two processes; one that is done takes from the other's rest. Each has one thread of BLAS, or they
# would wait for each other's.
TWO := -n 2 --dist worksteal
ALONE := OPENBLAS_NUM_THREADS=1 $(FAST)
# What other versions of MLX, mlx-lm, mlx-vlm and transformers can change: loading, the capability
# gate, the forward and its gradients, LoRA layers, chat templates, the proofs of exports, and
# answers after a training run (tests/model/test_generation.py).
OLDEST := tests/model tests/nn tests/lora tests/train/test_step.py tests/train/test_optim.py \
	tests/data/test_chat.py tests/data/test_chat_prompts.py tests/data/test_chat_thoughts.py \
	tests/export/test_export.py tests/export/test_export_verify.py

.PHONY: demo test legacy parity verify-gguf bench soak lint clean

demo: $(VENV)/installed
	$(FAST) $(VENV)/bin/python -m mlx_gemma4.train

test: $(VENV)/installed-test
	$(ALONE) $(VENV)/bin/python -m pytest $(TWO) --ignore=tests/parity

legacy: $(VENV)-legacy/installed
	$(ALONE) $(VENV)-legacy/bin/python -m pytest $(TWO) $(OLDEST)

parity: $(VENV)-parity/installed $(VENV)-legacy/installed-parity
	$(FAST) $(VENV)-parity/bin/python -m pytest tests/parity
	$(FAST) $(VENV)-legacy/bin/python -m pytest tests/parity

verify-gguf: $(VENV)-gguf/installed
	$(FAST) $(VENV)-gguf/bin/python tools/verify_gguf.py $(LLAMA_CPP)

bench: $(VENV)/installed
	$(FAST) $(VENV)/bin/python benchmarks/run.py

soak: $(VENV)/installed
	$(FAST) $(VENV)/bin/python benchmarks/soak.py

lint: $(VENV)/installed-lint
	$(VENV)/bin/python -m ruff check .
	$(VENV)/bin/python -m ruff format --check .
	$(VENV)/bin/python -m mypy

clean:
	rm -rf $(VENV) $(VENV)-legacy $(VENV)-parity $(VENV)-gguf runs

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

# The source distribution of llama-cpp-python holds the llama.cpp that it builds, converter included.
$(VENV)-gguf/installed: pyproject.toml
	./tools/make-venv $(VENV)-gguf
	$(VENV)-gguf/bin/python $(PIP) install torch==2.13.0
	$(VENV)-gguf/bin/python $(PIP) install --editable ".[gguf]"
	$(VENV)-gguf/bin/python $(PIP) download --no-deps --no-binary :all: --dest $(VENV)-gguf \
		llama-cpp-python==$(LLAMA_CPP_PYTHON)
	tar -xzf $(VENV)-gguf/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz -C $(VENV)-gguf
	CMAKE_ARGS="-DLLAVA_BUILD=OFF $(CMAKE_ARGS)" $(VENV)-gguf/bin/python $(PIP) install \
		$(VENV)-gguf/llama_cpp_python-$(LLAMA_CPP_PYTHON).tar.gz
	@touch $@
