# make demo   set up, then the whole story on a tiny MoE and a dense model; ends by printing where the report is
# make test   set up, then every test
# make check  format, lint and types
VENV := .venv
READY := $(VENV)/.moediag-ready
DEMO ?= moediag-demo

.PHONY: demo test check format bench clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml .ci/constraints.txt .ci/setup
	@echo "Setting up $(VENV) (once; some minutes, about 4 GB)"
	@bash .ci/setup $(VENV)
	@touch $@

demo: $(READY)
	@$(VENV)/bin/moediag demo -o $(DEMO)

# Two processes, one thread each: with two, OpenMP's threads spin while they wait for a core, and scoring takes 20 times as long.
test: $(READY)
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY)
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

format: $(READY)
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

bench: $(READY)
	@$(VENV)/bin/python benchmarks/capture_overhead.py

clean:
	rm -rf $(VENV) $(DEMO)
