# fs3: everything starts here. `make demo` shows the system at work, `make test` proves it.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

# The build cache lives outside the checkout so that fresh clones build quickly; nothing depends on it.
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/fs3
export CARGO_TARGET_DIR ?= $(CACHE)/target
export FDB_CLUSTER_FILE
export PIP_CACHE_DIR ?= $(CACHE)/pip
VENV := .venv
PY := $(VENV)/bin/python
CARGO := cargo --locked

.PHONY: help setup build workloads demo test lint test-rust test-python sim mutants bench pictures bench-meta profile kill-campaign control-kill-campaign posix-diff fsx torture torture-apps soak test-rdma test-connectors test-fdb need-fdb proto lock clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | column -t -s $$'\t'

setup: ## system packages, virtual environment, Python packages
	@tools/setup.sh $(VENV)

build: setup ## the native module, release mode, installed into the virtual environment
	@tools/build.sh $(VENV)

workloads: build # the libraries of workloads: what tests, examples and benchmarks use fs3 from
	@tools/setup.sh $(VENV) workloads

demo: build ## start a cluster, mount it, do real work, kill a node, verify every byte
	@$(PY) tools/demo.py

test: workloads lint test-rust test-python ## everything that must pass

lint: workloads ## ruff, mypy, clippy, rustfmt, layout and generated code
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/mypy
	@$(PY) tools/tidy.py
	@$(PY) tools/gen_proto.py --check
	@cd native && cargo fmt --check && $(CARGO) clippy -q --workspace --all-targets -- -D warnings

test-rust: build
	@cd native && $(CARGO) test -q --workspace

test-python: workloads
	@$(VENV)/bin/pytest

sim: build ## simulate the whole cluster from seeds, in virtual time: make sim HOURS=100, or SEED=7 to replay one
	@$(PY) -m fs3.testing.simulator $(if $(SEED),--seed $(SEED)) $(if $(HOURS),--hours $(HOURS)) $(ARGS)

mutants: setup ## seeded bugs that the simulation must catch: make mutants, or NAMES="no_dedupe dirty_read"
	@$(PY) tools/mutants.py $(NAMES)

bench: workloads ## limits of this machine, then fs3, as ratios
	@$(PY) benchmarks/run.py $(ARGS)

pictures: workloads ## draw the figures of benchmarks/RESULTS.md for the documents
	@$(PY) benchmarks/plot.py -o docs/pictures

bench-meta: build ## metadata with one and two services, durable and not; a million files in one tree
	@$(PY) benchmarks/metadata.py $(ARGS)

profile: build ## CPU of small files at a mount, by service and thread: make profile, or ARGS=--functions
	@$(PY) benchmarks/cpu_profile.py $(ARGS)

kill-campaign: build ## long run of kill -9 under write load: make kill-campaign CYCLES=1000
	@FS3_KILL_CYCLES=$(or $(CYCLES),1000) $(VENV)/bin/pytest tests/cluster/test_kill_cycles.py -x

control-kill-campaign: build ## long run of kill -9 of metadata services and managers under load: make control-kill-campaign CYCLES=50
	@FS3_CONTROL_KILL_CYCLES=$(or $(CYCLES),50) $(VENV)/bin/pytest tests/cluster/test_control_kill_cycles.py -x -s

posix-diff: build ## random system calls of two users on a mount and on the local file system: make posix-diff SEEDS=100 SEED=…
	@$(PY) -m tests.posix --seeds $(or $(SEEDS),100) $(if $(SEED),--seed $(SEED))

fsx: build ## random operations with mmap on mounts, compared with memory: make fsx OPS=1000000 SEED=…
	@$(PY) -m tests.fsx $(if $(OPS),--ops $(OPS)) $(if $(SEED),--seed $(SEED))

torture-apps: build ## PostgreSQL on a mount, killed and recovered; a storage service killed under it (root)
	@ls /usr/lib/postgresql/*/bin/pgbench >/dev/null 2>&1 || apt-get install -y -qq postgresql
	@$(PY) -m tests.cluster.postgres $(ARGS)

soak: build ## mixed work on a mount, memory, descriptors and threads of all processes watched: make soak HOURS=8
	@$(PY) -m tests.soak --hours $(or $(HOURS),8) $(if $(SEED),--seed $(SEED))

torture: build ## writers and readers under kill -9, partitions, bad disks, power cuts: make torture CYCLES=… MINUTES=… SEED=…
	@$(PY) -m tests.torture $(if $(CYCLES),--cycles $(CYCLES)) $(if $(MINUTES),--minutes $(MINUTES)) $(if $(SEED),--seed $(SEED)) $(ARGS)

test-connectors: workloads ## connectors of the KV cache against the real SGLang, LMCache and vLLM, which are fetched (400 MB)
	@tools/test_connectors.sh $(VENV)

test-rdma: build ## tests over real RDMA verbs, in a kernel with soft-RoCE and soft-iWARP that it builds once
	@$(PY) -m tests.rdma

test-fdb: need-fdb build ## tests and demo on FoundationDB: make test-fdb FDB_CLUSTER_FILE=…; ERASE=1 erases what it holds
	@export FS3_TEST_FDB_ERASE=$(ERASE); $(VENV)/bin/pytest tests/conformance/kv/test_fdb.py tests/conformance/kv/test_fdb_fake.py
	@export FS3_TEST_FDB_ERASE=$(ERASE) FS3_TEST_KV=fdb; $(VENV)/bin/pytest tests/unit/meta
	@$(PY) tools/demo.py --kv fdb:$$FDB_CLUSTER_FILE

need-fdb:
	@: $${FDB_CLUSTER_FILE:?is not given: make test-fdb FDB_CLUSTER_FILE=/path/to/fdb.cluster}

proto: setup ## regenerate fs3/v1 from proto/
	@$(PY) tools/gen_proto.py

lock: setup ## renew both lock files from pyproject.toml
	@$(VENV)/bin/pip install -q pip-tools
	@compile="$(VENV)/bin/pip-compile -q --extra dev --extra fusepy --no-emit-index-url --no-emit-find-links --no-emit-options --allow-unsafe --strip-extras --no-header --no-annotate --generate-hashes"; \
	$$compile --extra workloads -o requirements-workloads.lock pyproject.toml; \
	sed -E 's/ --hash=[^ ]+//; s/ \\$$//; /^ *$$/d' requirements-workloads.lock > $(VENV)/constraints.txt; \
	$$compile -c $(VENV)/constraints.txt -o requirements.lock pyproject.toml

clean: ## remove what the build made inside the checkout
	@rm -rf $(VENV) fs3/_native*.so native/target .mypy_cache .ruff_cache .pytest_cache
