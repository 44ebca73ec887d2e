# make demo and make test do everything on a fresh machine; see README.rst.
PYTHON3 ?= python3
BENCH ?=
FUZZ ?=
SEED ?=
TAG ?=
BIN := .venv/bin
DESTDIR ?=
MARK := -m "not long"
PACKAGES ?=
#: Where Debian's tools can be had, no test of packages may be left out.
TESTS := $(if $(shell command -v apt-get),QVM_REMOTE_PACKAGES=required) $(BIN)/python -m pytest

.PHONY: help prepare prepare-bench prepare-packages demo demo-shell bench bench-fleet test test-all lint docs diagrams model fuzz soak release packages papers bump install-client install-formula clean

help:
	@echo "make demo            show the main job on the simulator"
	@echo "make demo-shell      the same, then a prompt inside a VM, with the engine running"
	@echo "make bench           measure everything, beside qvm-run and ssh (BENCH=--short: a minute; BENCH=--help)"
	@echo "make bench-fleet     time an apply, for each VM"
	@echo "make test            lint, then the tests"
	@echo "make test-all        the same, and the tests that take minutes: the real systemd, the whole short benchmark, ..."
	@echo "make lint            ruff, salt-lint, yamllint, shellcheck, rstcheck"
	@echo "make docs            build the documentation into docs/_build/html"
	@echo "make diagrams        make the documentation's pictures anew from docs/diagrams/pictures.py"
	@echo "make model           check the model of the protocol with spin (model/README.rst)"
	@echo "make fuzz            fuzz the parsers that read what VMs send (SECONDS=60 for each, FUZZ=name for one; fuzz/README.rst)"
	@echo "make soak            load, kills, halts, hostile VMs and disk faults for an hour, and one table (SECONDS=600, SEED=n; docs/reliability.rst)"
	@echo "make release TAG=v1  tarball, sums and signature of a signed tag, into dist/ (docs/release.rst)"
	@echo "make packages        build the packages into dist/, with their digests (PACKAGES='rpm deb arch': only these)"
	@echo "make papers          make man pages and shell completion anew, of the command lines' tables and pillar.example"
	@echo "make bump            set a new version (VERSION=2.1.0); without one, print it"
	@echo "make install-client  install the VM's side (DESTDIR=...)"
	@echo "make install-formula install dom0's side (DESTDIR=...)"
	@echo "make clean           remove what the above made here"

prepare:
	@$(PYTHON3) tools/bootstrap.py

prepare-bench:
	@$(PYTHON3) tools/bootstrap.py --bench

demo: prepare
	@$(BIN)/python tools/demo.py

demo-shell: prepare
	@$(BIN)/python tools/demo.py --shell

bench: prepare-bench
	@$(BIN)/python bench/run.py $(BENCH)

bench-fleet: prepare
	@$(BIN)/python bench/fleet.py

test: prepare-bench lint
	# Without spin (Fedora has none) the model's test is left out; without atheris hypothesis fuzzes alone.
	-@$(PYTHON3) tools/bootstrap.py --model
	-@$(PYTHON3) tools/bootstrap.py --fuzz
	# And these for tests of man pages, completion and other shells: each is left out where there is no such program.
	-@$(PYTHON3) tools/bootstrap.py --papers
	@$(PYTHON3) tools/bootstrap.py --packages
	$(BIN)/nox --session oldest
	$(TESTS) -n 3 --dist loadfile $(MARK) tests

# Whole files, as some of the long tests go on from what those before them have made.
test-all: MARK :=
test-all: prepare-packages test

prepare-packages:
	@$(PYTHON3) tools/bootstrap.py --all-packages

lint: prepare
	$(BIN)/ruff check .
	$(BIN)/yamllint --strict .
	$(BIN)/salt-lint $$(git ls-files '*.sls')
	shellcheck $$(git ls-files '*.sh') .ci/run archlinux/PKGBUILD.in archlinux/qvm-remote.install
	shellcheck --shell=bash $$(git ls-files '*/bash-completion/*')
	$(BIN)/rstcheck README.rst $$(git ls-files 'docs/*.rst' 'model/*.rst' 'examples/*.rst' 'fuzz/*.rst')

docs: prepare
	$(BIN)/python -m sphinx -W --keep-going -b html docs docs/_build/html

diagrams:
	$(PYTHON3) docs/diagrams/make.py

model:
	@$(PYTHON3) tools/bootstrap.py --model
	@$(PYTHON3) model/check.py

fuzz: prepare
	-@$(PYTHON3) tools/bootstrap.py --fuzz
	@$(BIN)/python fuzz/run.py --seconds $(or $(SECONDS),60) $(FUZZ)

soak: prepare
	@$(BIN)/python soak/run.py --seconds $(or $(SECONDS),3600) $(if $(SEED),--seed $(SEED))

release:
	@tools/release.sh "$(TAG)"

packages: prepare-packages
	@$(PYTHON3) tools/packages.py $(PACKAGES)

papers:
	@$(PYTHON3) tools/papers.py

bump:
	@$(PYTHON3) tools/version.py $(VERSION)
	@$(PYTHON3) tools/papers.py

install-client:
	$(PYTHON3) tools/install.py client "$(DESTDIR)"

install-formula:
	$(PYTHON3) tools/install.py formula "$(DESTDIR)"

clean:
	rm -rf .venv .nox .pytest_cache .ruff_cache .sim dist docs/_build
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
