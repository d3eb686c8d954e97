# Two commands for a new reader: `make demo` and `make test`. Every target installs what it needs by deploy/bootstrap.sh,
# which says what it does and does nothing the second time.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help build demo up test fmt fmt-check clippy doc deny nextest doctest bench peers-bench recall calibrate gemma-test system rust tools model gemma openai nvrtc peers stores faiss faults planted clean-cache

CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/kvasir
CARGO_HOME_BIN := $(or $(CARGO_HOME),$(HOME)/.cargo)/bin
export PATH := $(CACHE)/tools/bin:$(CARGO_HOME_BIN):$(PATH)
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
KVASIR := $(TARGET_DIR)/debug/kvasir
BOOTSTRAP := deploy/bootstrap.sh
CARGO := cargo
# One profile (dev) for everything, so that RocksDB is built once; the lock file decides versions.
FLAGS := --workspace --locked

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

build: rust ## the binary, at $CARGO_TARGET_DIR (or target)/debug/kvasir
	$(CARGO) build --locked -p kvasir

demo: build model ## a real model and document: cold, warm, after a restart, after kill -9, with retrieval attention
	$(KVASIR) demo

up: build model ## store, worker and router in one process, until Ctrl-C
	$(KVASIR) up

test: tools model openai nvrtc fmt-check clippy doc deny nextest doctest ## everything that is checked
	@echo "make test: format, clippy, docs, licences, tests and doc tests passed"

fmt: rust ## formats the code
	$(CARGO) fmt --all

fmt-check: rust
	$(CARGO) fmt --all --check

clippy: rust
	$(CARGO) clippy $(FLAGS) --all-targets -- -D warnings

doc: rust
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(FLAGS) --no-deps

deny: rust tools
	$(CARGO) deny --locked check licenses bans sources

nextest: rust tools model openai nvrtc
	$(CARGO) nextest run $(FLAGS)

doctest: rust
	$(CARGO) test $(FLAGS) --doc

bench: build model peers ## prefill and decode speed beside llama.cpp, same model, same threads
	$(KVASIR) bench engine --json

peers-bench: build stores ## our store beside Mooncake, LMCache and Redis, the same requests in turns (installs 6 GB)
	tests/peers/run.sh

# QUICK=1 measures three layers and 32K made-up tokens instead of nine and 128K; CONTINUE=1 keeps the results that are there. Gemma 3 is
# measured where `make gemma` was run.
recall: build model ## every attention index beside faiss and hnswlib on the same arrays: tables and a page of plots (hours)
	tests/recall/run.sh $(if $(QUICK),--quick) $(if $(CONTINUE),--continue)

calibrate: build model ## the basis that the model's keys are sketched in, learnt from two windows of text (minutes)
	$(KVASIR) calibrate

# The model comes under Google's terms and is fetched only here and by `make gemma`.
gemma-test: rust gemma ## Gemma-3-270M against an independent forward
	$(CARGO) nextest run --locked -p kvasir-model --run-ignored only gemma_file

# ROWS=kill,torn SEED=7 COUNT=100 run less of it, SCALE=0.1 a tenth of all; JSON=file keeps what was counted.
faults: rust ## the fault matrix in full (an hour), then the suites against planted bugs
	$(CARGO) build $(FLAGS) --bin kvasir --example matrix
	$(TARGET_DIR)/debug/examples/matrix
	$(if $(ROWS),,$(MAKE) --no-print-directory planted)

PLANTED := $(FLAGS) --features kvasir/planted-bugs,kvasir-faults/planted-bugs

planted: rust ## the fault suites against planted bugs: each must be found
	$(CARGO) build $(PLANTED) --bin kvasir
	cp -f $(KVASIR) $(KVASIR)-planted
	KVASIR_BIN=$(abspath $(KVASIR)-planted) $(CARGO) test $(PLANTED) --test planted -- --nocapture
	$(CARGO) build $(FLAGS) --bin kvasir

system rust tools model gemma openai nvrtc peers stores faiss:
	@$(BOOTSTRAP) $@

# Cargo needs a compiler before it can build anything.
rust tools: system

clean-cache: ## removes what bootstrap put into the cache folder (models, tools, Python environments)
	rm -rf "$(CACHE)/models" "$(CACHE)/tools" "$(CACHE)/openai" "$(CACHE)/peers" "$(CACHE)/stores" "$(CACHE)/lmcache" "$(CACHE)/recall"
