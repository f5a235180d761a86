# make demo   set up, then everything on a tiny MoE and a dense model; ends by printing where the report is
# make test   set up, then every test
# make check  format, lint and types
# make tables every router family and every awkward way of running vLLM: the tables of reports/ that tests sample;
#             and the tests of the demo on the whole demo, of which they otherwise make the quick one
# make hunt   the tests without engines with other random cases and ten times as many (HUNT=100: a hundred times)
VENV := .venv
READY := $(VENV)/.moediag-ready
DEMO ?= moediag-demo
HUNT ?= 10

.PHONY: demo test check tables hunt format bench clean
.DEFAULT_GOAL := demo

$(READY): pyproject.toml .ci/constraints.txt .ci/setup
	@echo "Setting up $(VENV) (once; some minutes, about 4 GB)"
	@bash .ci/setup $(VENV)
	@touch $@

demo: $(READY)
	@$(VENV)/bin/moediag demo -o $(DEMO)

# Two processes, one thread each: with two, OpenMP's threads spin while they wait for a core, and scoring takes 20 times as long.
# Compiled modules are kept whatever the caller's Python is told: hundreds of commands start in processes of their own.
test: $(READY)
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 MOEDIAG_WORKERS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

check: $(READY)
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/mypy

tables: $(READY)
	@OMP_NUM_THREADS=1 $(VENV)/bin/python tests/family_measures.py
	@OMP_NUM_THREADS=1 $(VENV)/bin/python benchmarks/execution.py $(DEMO)/checkpoints/moe
	@MOEDIAG_WHOLE_DEMO=1 OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest tests/test_demo.py

hunt: $(READY)
	@seed=$${MOEDIAG_SEED:-$$(date +%s)}; echo "MOEDIAG_SEED=$$seed MOEDIAG_HUNT=$(HUNT)"; export OMP_NUM_THREADS=1 MOEDIAG_WORKERS=1; \
	MOEDIAG_SEED=$$seed MOEDIAG_HUNT=$(HUNT) $(VENV)/bin/python -m pytest -m "not engines" -n 2 --dist loadfile

format: $(READY)
	@$(VENV)/bin/ruff format .
	@$(VENV)/bin/ruff check --fix .

bench: $(READY)
	@$(VENV)/bin/python benchmarks/capture_overhead.py

clean:
	rm -rf $(VENV) $(DEMO)
