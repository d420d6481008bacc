# Every command works on a fresh machine with Python >= 3.11: the first one creates .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EXTRAS ?= dicom,test
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/jax

.PHONY: demo test torture lint bench clean install

install: $(STAMP)

$(STAMP): pyproject.toml kernels/pyproject.toml constraints.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "capsfl needs Python 3.11 to 3.13, this is " + sys.version.split()[0] + "; set PYTHON=python3.x")'
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e kernels -e '.[$(EXTRAS)]'
	@touch $@

demo: $(STAMP)
	$(BIN)/capsfl train configs/demo.toml

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal

torture: $(STAMP)
	CAPSFL_TORTURE=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m torture

lint: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[lint]'
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

bench: $(STAMP)
	$(BIN)/capsfl bench routing
	$(BIN)/capsfl bench segcaps

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis runs
