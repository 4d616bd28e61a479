# make demo    everything, on real data, in about nine minutes      make test    the whole test suite
# make setup   only the environment                                  make proto   gRPC code from online/proto/lookup.proto online/proto/rank.proto online/proto/admin.proto
# make bench-publish        publishing and lookups against Feast, Redis and FBGEMM, about half an hour, into reports/bench/
# make bench-publish-100m   one table of 100 M rows, from publishing to retiring
# make test-crash           publish and materialize killed more than a hundred times, twelve minutes; FACET_CRASH_SEED=N repeats one
# make bench-online         serving against tables at hand, a gRPC echo and Feast, 20 to 45 minutes, into reports/bench/
# make chaos                a million ranked requests, rollouts and kills at once, every answer recomputed; 25 to 100 minutes
# make soak                 fifteen minutes of everything, no process may grow
# make fuzz                 coverage-guided fuzzing of services, messages, headers, manifests, roles and tags, a quarter of an hour
# On a machine with an NVIDIA GPU: make LOCK=requirements/cuda.lock demo

PYTHON ?= python3
LOCK ?= requirements/cpu.lock
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(notdir $(LOCK))

.PHONY: demo test test-crash lint setup proto bench-publish bench-publish-100m bench-online chaos soak fuzz clean

demo: setup
	$(BIN)/facet demo

# Tests of a file share what they start; in the order of their folders, the demo, which takes longest, begins early.
test: setup
	@command -v java >/dev/null || { echo "One test compares Spark with DuckDB and needs Java 17: apt-get install openjdk-17-jre-headless"; exit 1; }
	@command -v redis-server >/dev/null || { test "$$(id -u)" = 0 && command -v apt-get >/dev/null && \
	  apt-get update --quiet && apt-get install --yes --no-install-recommends redis-server; } || \
	  { echo "Tests start a Redis server of their own and need its program: sudo apt-get install redis-server"; exit 1; }
	$(BIN)/ruff check .
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

test-crash: setup
	$(BIN)/python -m pytest -m crash -o faulthandler_timeout=0 -s tests/pipelines/test_crash_series.py

lint: setup
	$(BIN)/ruff check .

setup: $(STAMP)

$(STAMP): $(LOCK) pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "Facet's lock files are for Python 3.11; $(PYTHON) is $$($(PYTHON) -V). Run: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps --requirement $(LOCK)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	@$(BIN)/python -c 'import torch, fbgemm_gpu, torchrec' || \
	  { echo "torch does not load here. With $(LOCK), the package index gave a build for other hardware: use the index of PyTorch's CPU builds, or LOCK=requirements/cuda.lock on a GPU machine."; exit 1; }
	@touch $@

proto: setup
	$(BIN)/python -m grpc_tools.protoc --proto_path=. --python_out=. --grpc_python_out=. online/proto/lookup.proto online/proto/rank.proto online/proto/admin.proto

bench-publish bench-publish-100m bench-online: setup
	@command -v redis-server >/dev/null || { echo "One of the rivals is Redis: apt-get install redis-server"; exit 1; }
	$(BIN)/python -m tests.benchmarks.$(subst -,_,$(@:bench-%=%))

chaos soak: setup
	$(BIN)/python -m tests.benchmarks.$@

fuzz: setup
	for target in lookup message rank cpu_tier_admin ranker_admin gate shards manifest roles segment_header \
	    delta_header view_tags; do \
	  $(BIN)/python -m tests.online.fuzz $$target -max_total_time=60 || exit 1; done

clean:
	rm -rf var reports
