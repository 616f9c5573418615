# `make demo`, `make test`, `make lint`; `make help` lists the rest.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# wheel: a pinned registry wheel of upstream commit a59f0563. git: that commit from upstream's own source.
DETECTRON2 ?= wheel
DETECTRON2_COMMIT := a59f0563
SEED ?= 0
DEMO_CONFIG := configs/neon_trees/focal_retinanet_Lite0_FPN_demo.yaml
DEMO_OUTPUT ?= output/neon_trees_demo

.PHONY: help install data demo test lint format clean

help: ## list the targets
	@grep -E '^[a-z]+:.*##' Makefile | sed -E 's/:.*## /\t/'

install: $(VENV)/.installed ## make .venv with the pinned versions

$(VENV)/.installed: constraints.txt setup.cfg setup.py pyproject.toml tools/install_detectron2.sh
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "make: $(PYTHON) is $$($(PYTHON) -V 2>&1); Python 3.10 to 3.13 is needed (make PYTHON=python3.11 …)" >&2; exit 2; }
	@echo "installing into $(VENV): some 5.5 GB, mostly PyTorch; a few minutes"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[detectron2,study,dev]'
	bash tools/install_detectron2.sh $(BIN)/python $(DETECTRON2) $(DETECTRON2_COMMIT)
	touch $@

data: $(VENV)/.installed ## fetch the aerial pictures and cut them into tiles under datasets/
	$(BIN)/focal-d2 data neon_trees

demo: data ## train, evaluate and draw detections on real images (CPU: about ten minutes in all)
	$(BIN)/focal-d2 train --minutes 6 --config-file $(DEMO_CONFIG) SEED $(SEED) OUTPUT_DIR $(DEMO_OUTPUT)
	rm -rf $(DEMO_OUTPUT)/predictions
	$(BIN)/focal-d2 predict --model $(DEMO_OUTPUT)/model_final.pth --dataset neon_trees_test \
	  --output $(DEMO_OUTPUT)/predictions
	@echo
	@echo "Checkpoint, log and metrics: $(DEMO_OUTPUT)/"
	@echo "Detections beside ground truth: $(DEMO_OUTPUT)/predictions/pictures/"
	@echo "Next:"
	@echo "  $(BIN)/focal-d2 eval --config-file $(DEMO_OUTPUT)/config.yaml OUTPUT_DIR output/other_forest MODEL.WEIGHTS $(DEMO_OUTPUT)/model_final.pth DATASETS.TEST '(\"neon_trees_other\",)'"
	@echo "  $(BIN)/focal-d2 predict --model $(DEMO_OUTPUT)/model_final.pth YOUR_IMAGE_OR_FOLDER --output output/predictions"
	@echo "  $(BIN)/focal-d2 train --config-file $(DEMO_OUTPUT)/config.yaml --resume SOLVER.MAX_ITER 1200"

test: $(VENV)/.installed ## run the tests, on two cores
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.installed ## ruff, mypy, import-linter
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports --config setup.cfg

format: $(VENV)/.installed ## let ruff rewrite the layout
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove caches and outputs, keep .venv and datasets/
	rm -rf output .mypy_cache .ruff_cache .pytest_cache .import_linter_cache build *.egg-info
