# Everything runs in one virtual environment, .venv, made the first time it is needed and remade when what it is made
# from changes. PYTHON chooses the interpreter it is made with.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo test lint readme clean

demo: $(READY)
	$(BIN)/subquad train fit --config configs/demo.yaml --run_dir runs/demo --overwrite
	$(BIN)/infer --model runs/demo/model --prompt "def " --max-new-tokens 300 --temperature 0.7 --seed 0
	@echo; echo "The loss curve is runs/demo/curve.png"

test: $(READY)
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

readme: $(READY)
	$(BIN)/subquad compare refresh README.md

clean:
	rm -rf .venv build dist subquad.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

# setuptools first, so that the build uses the pinned release and not one that pip fetches for it.
$(READY): pyproject.toml constraints.txt
	rm -rf .venv
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt setuptools
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@
