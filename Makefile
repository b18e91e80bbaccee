# Orkestr Console. `make run` starts everything; `make help` lists the rest.
SHELL := /bin/bash
# A root shell that `su` opened has the PATH of the person before it.
export PATH := $(PATH):/usr/local/sbin:/usr/sbin:/sbin
.DEFAULT_GOAL := help
.PHONY: help run down clean doctor test test-pythons test-vm lint format lock bench faults recipes

BOOTSTRAP := orkestr_console/runner/bootstrap.sh
PYTHON := .venv/bin/python
NO_SUDO := sh -c "echo 'orkestr: this needs root: start again as root, or install sudo' >&2; exit 1"
AS_ROOT := $(shell [ "$$(id -u)" = 0 ] || { command -v sudo >/dev/null && echo sudo -EH; } || echo no)
ifeq ($(AS_ROOT),no)
AS_ROOT := $(NO_SUDO)
endif

help: ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 21

run: ## install what is missing, start everything, serve until Ctrl-C (PORT=8000)
	@$(BOOTSTRAP) run
	@$(AS_ROOT) $(PYTHON) manage.py up

down: ## stop everything, sandboxes too; keep the data
	@$(BOOTSTRAP) run
	@$(AS_ROOT) $(PYTHON) manage.py down

clean: ## down, and remove var/ with every template, sandbox and row
	@$(BOOTSTRAP) run
	@$(AS_ROOT) $(PYTHON) manage.py down --remove

doctor: ## say in plain words what this machine lacks
	@$(BOOTSTRAP) run
	@$(AS_ROOT) $(PYTHON) manage.py doctor

test: ## install what is missing, then lint, types, and every test on a real stack
	@$(BOOTSTRAP) dev
	@$(BOOTSTRAP) other
	@$(AS_ROOT) $(PYTHON) -m tests.verify

test-pythons: ## the host runtime's tests, all of them on Python 3.12 and again on 3.13
	@$(BOOTSTRAP) dev
	@$(BOOTSTRAP) other
	@$(AS_ROOT) $(PYTHON) -m tests.verify --only pythons

recipes: ## build and use two tables of real recipes (an hour and more, gigabytes fetched)
	@$(BOOTSTRAP) dev
	@$(AS_ROOT) $(PYTHON) -m tests.verify --only tests tests/recipes

test-vm: ## try it on whole Debian 12 and 13 machines, by emulation (RELEASES="bookworm trixie")
	@$(BOOTSTRAP) vm
	@$(AS_ROOT) $(PYTHON) -m tests.vm $(RELEASES)

lint: ## ruff, mypy and the templates' linter alone
	@$(BOOTSTRAP) dev
	@$(PYTHON) -m tests.verify --only static

format: ## rewrite the code the way `make lint` wants it
	@$(BOOTSTRAP) dev
	@$(PYTHON) -m ruff format . && $(PYTHON) -m ruff check --fix . && $(PYTHON) -m tests.template_lint --fix

bench: ## measure boots, first answers, the egress proxy, what hogs cost others, captures
	@$(BOOTSTRAP) dev
	@$(AS_ROOT) $(PYTHON) -m tests.benchmarks --out tests/benchmarks/RESULTS.md
	@$(AS_ROOT) $(PYTHON) -m tests.benchmarks.egress
	@$(AS_ROOT) $(PYTHON) -m tests.benchmarks.hogs
	@$(AS_ROOT) $(PYTHON) -m tests.benchmarks.capture

faults: ## kill, or stop, every process at every moment (two hours), and say what came of it
	@$(BOOTSTRAP) dev
	@$(AS_ROOT) $(PYTHON) -m tests.faults

lock: ## compile the requirement locks anew
	@$(BOOTSTRAP) run
	@for set in requirements requirements-dev; do .venv/bin/uv pip compile --quiet --universal \
	    --python-version 3.12 --generate-hashes --no-emit-index-url --no-emit-find-links --no-annotate \
	    --custom-compile-command 'make lock' $$set.in -o $$set.txt || exit 1; done
