# make demo and make test do everything on a fresh machine; see README.rst.
PYTHON3 ?= python3
BIN := .venv/bin
DESTDIR ?=

.PHONY: help prepare demo demo-shell bench test lint install-client clean

help:
	@echo "make demo            show the main job on the simulator"
	@echo "make demo-shell      the same, then a prompt inside a VM, with the engine running"
	@echo "make bench           time a command, beside a bare qvm-run"
	@echo "make test            lint, then all tests"
	@echo "make lint            ruff, salt-lint, yamllint, shellcheck, rstcheck"
	@echo "make install-client  install the VM's side (DESTDIR=...)"
	@echo "make clean           remove what the above made here"

prepare:
	@$(PYTHON3) tools/bootstrap.py

demo: prepare
	@$(BIN)/python tools/demo.py

demo-shell: prepare
	@$(BIN)/python tools/demo.py --shell

bench: prepare
	@$(BIN)/python bench/roundtrip.py

test: lint
	$(BIN)/python -m pytest tests

lint: prepare
	$(BIN)/ruff check .
	$(BIN)/yamllint --strict .
	$(BIN)/salt-lint $$(git ls-files '*.sls')
	shellcheck $$(git ls-files '*.sh') .ci/run
	$(BIN)/rstcheck README.rst

install-client:
	$(PYTHON3) tools/install_client.py "$(DESTDIR)"

clean:
	rm -rf .venv .pytest_cache .ruff_cache .sim
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
