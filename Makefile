# `make` lists what there is. `make serve` and `make test` set everything up by themselves, on a CPU or a GPU machine.
SHELL := bash
.DEFAULT_GOAL := help
.PHONY: help serve test test-without-engine test-engine check lint types chaos kills cluster recovery overload watch watch-cost equality socket front-end drift-proof drift-time drift-delays fleet fleet-size fleet-sim fleet-ray upgrade drift-real drift-streams auto mixtures bench monitoring clean setup setup-dev first-hour clients tiers cases eight docs hostile front-door neighbours canary-aa long-prompts batches tracing-cost wheel image sources hashes served-quality four-bits small-llama optimize-cost cpu-speed real-models real-tasks memory schemas page company speculation finetune loop loop-error tuning families sizes start grafana-types sanitize adapter-cost matrix-speed kernel-rows vllm-base vllm-diff cuda-wheel probe-noise as-on-a-gpu gpu gpu-wheels gpu-torch gpu-torch-wheels arm64

BIN := .venv/bin
# Campaigns run a process for each core.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1
# Tests without the engine: a process for each core, each file in one of them. Threads that wait do not take the other's core.
# make's own variables are not for the `make` that a test starts.
PARALLEL = unset MAKEFLAGS MFLAGS MAKELEVEL; OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -n $(or $(WORKERS),logical) --maxprocesses 8 --dist loadfile --max-worker-restart=0 --no-loadscope-reorder
export PYTHON DEVICE MODEL

help: ## this list
	@sed -nE 's/^([a-z0-9-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 16
	@echo
	@echo '  Times are rough, on 2 cores.'
	@echo
	@echo '  make serve PORT=8000 HOST=127.0.0.1 MODEL=smollm2 ARGS="--max-loras 16"   LORADOCK_* variables pass through'
	@echo '  make test  ARGS="-m \"not engine\" -k adapter"                               PYTHON=python3.12 picks a Python'

serve: setup ## a model and its adapters behind an OpenAI endpoint on port 8000
	@exec $(BIN)/loradock serve $(MODEL) $(if $(HOST),--host $(HOST)) $(if $(PORT),--port $(PORT)) $(ARGS)

test: setup-dev ## every test: those with the real engine, and beside them, on what these leave of every core, all others
	@$(if $(ARGS),$(BIN)/python -m pytest $(ARGS),$(MAKE) --no-print-directory --jobs 2 --keep-going test-engine test-without-engine)

# An engine computes half of the time: it starts, or waits for one thread. What is shown of its tests comes at their end.
test-engine: setup-dev
	@unset MAKEFLAGS MFLAGS MAKELEVEL; log=$$(mktemp); trap 'cat "$$log"; rm "$$log"' EXIT; $(BIN)/python -m pytest -m engine >"$$log" 2>&1

test-without-engine: setup-dev
	@$(subst OMP_WAIT_POLICY,exec nice -n 5 env OMP_WAIT_POLICY,$(PARALLEL)) -m "not engine"

check: setup-dev ## tests without the real engine and without the slowest files, on every core; 5 minutes
	@$(PARALLEL) -m "not engine and not slow" $(ARGS)

lint: setup-dev ## ruff (style, format), and who may import whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-cache

types: setup-dev ## mypy
	@$(BIN)/mypy

docs: setup-dev ## the documentation as a site in docs/_build/html; a warning, or a link that leads nowhere, is an error
	@$(BIN)/python -m sphinx -b html -nWq --keep-going docs docs/_build/html
	@echo docs/_build/html/index.html

chaos: setup-dev ## a server killed 120 times within changes, then 30 minutes of faults under 16 streams: nothing lost; 45 minutes
	@LORADOCK_TEST_FLEET=1 LORADOCK_TEST_KILLS=$(or $(KILLS),120) $(BIN)/python -m pytest -s tests/serve/adapters/test_killed.py tests/e2e/test_fleet.py
	@LORADOCK_TEST_CHAOS_SECONDS=$(or $(CHAOS_SECONDS),1800) $(BIN)/python -m pytest -s tests/e2e/test_chaos.py

as-on-a-gpu: setup-dev ## the short end-to-end tests in spawn mode, without what is changed in vLLM for a CPU's speed; an hour
	@LORADOCK_TEST_AS_ON_A_GPU=1 $(BIN)/python -m pytest -m engine tests/e2e $(ARGS)

cluster: setup-dev ## replicas on a real Ray over PostgreSQL and an S3 server: the swap proof, a rolling restart, routing to homes; some minutes
	@$(BIN)/python -c 'import ray.serve' 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e '.[ray]'
	@LORADOCK_TEST_RAY=1 $(BIN)/python -m pytest -s tests/e2e/test_cluster.py tests/serve/server/test_ray_router.py

hostile: setup-dev ## 95 kinds of hostile requests, 10 s each, beside a victim and an operator: nobody else is disturbed; 25 minutes
	@$(BIN)/python -m tests.campaigns.hostile $(ARGS)

front-door: setup-dev ## 20,000 bodies that no honest client sends, to every route: longest stall and memory for each (ARGS="--bodies 2000"); an hour
	@$(BIN)/python -m tests.campaigns.front_door $(ARGS)

grafana-types: setup-dev ## the dashboards against the types that Grafana 11 and 12 publish, by TypeScript (npm); a minute
	@$(BIN)/python -m tests.campaigns.grafana $(ARGS)

page: setup-dev ## a thousand adapters on the dashboard in a real browser: seconds until it is ready, and bytes; a minute
	@$(BIN)/python -m tests.campaigns.page $(ARGS)

first-hour: ## the README, typed by a program in a fresh clone below an empty home: serve, demo, fine-tune, promote, roll back; 15 minutes
	@$(or $(PYTHON),python3) -m tests.campaigns.first_hour $(ARGS)

clients: setup-dev ## client libraries and load tools of others, each in an environment of its own, against the real engine; 15 minutes
	@$(BIN)/python -m tests.campaigns.clients $(ARGS)

schemas: setup-dev ## Schemathesis over the routes that vLLM answers, against the real engine: every answer of 500; 30 minutes
	@$(BIN)/python -m tests.campaigns.inference_schemas $(ARGS)

sizes: setup-dev ## memory and time of the steps on 1 or 8 billion random weights, planned and measured; 20 minutes
	@$(BIN)/python -m tests.campaigns.sizes $(ARGS)

families: setup-dev ## tiny models of each family, quantized, in vLLM with an adapter and without, against PyTorch; 10 minutes
	@$(BIN)/python -m tests.campaigns.families $(ARGS)

neighbours: setup-dev ## database, object store, hub and disk slow, refusing, cut in half, one and two servers: rollback in seconds; 6 minutes
	@$(BIN)/python -m tests.campaigns.neighbours $(ARGS)

batches: setup-dev ## a batch of 1,000 lines survives a kill of engine and server, none twice, none lost; what clients notice; 15 minutes
	@$(BIN)/python -m tests.campaigns.batches $(ARGS)

finetune: setup-dev ## a fine-tuning job learns, survives 20 kills with the same bytes, and what clients notice of one; 45 minutes
	@for part in learn kills beside; do $(BIN)/python -m tests.campaigns.finetune $$part || exit 1; done

loop: setup-dev ## the questions of an adapter change, and its loop trains, proves and promotes the next version; 20 minutes
	@$(BIN)/python -m tests.campaigns.loop $(ARGS)

loop-error: setup-dev ## how often 200 simulated loops promote a candidate that is bad by as much as may not be; 3 minutes
	@$(BIN)/python -m tests.campaigns.loop_error $(ARGS)

tracing-cost: setup-dev ## what OpenTelemetry's traces cost a server under 16 streams, on and off in turn, on a quiet machine; 30 minutes
	@$(BIN)/python -m tests.campaigns.tracing_cost $(ARGS)

recovery: setup-dev ## how soon a killed engine is back with 16 adapters, against a warm start; some minutes
	@$(BIN)/python -m tests.campaigns.recovery $(ARGS)

long-prompts: setup-dev ## how long running answers wait beside long prompts, by --target-inter-token; 7 minutes
	@$(BIN)/python -m tests.campaigns.long_prompts $(ARGS)

speculation: setup-dev ## what --speculation ngram gains and costs, with and without in turns, and 1,000 answers compared (CPU); 20 minutes
	@$(BIN)/python -m tests.campaigns.speculation $(ARGS)

company: setup-dev ## the same requests alone and many at once, with every format of weights and kinds of adapters (CPU); 15 minutes
	@$(BIN)/python -m tests.campaigns.company $(ARGS)

tuning: setup-dev ## 200 examples train the embedded model on a task: seconds, and right answers before and after; 6 minutes
	@$(BIN)/python -m tests.campaigns.tuning $(ARGS)
	@$(BIN)/python -m tests.campaigns.tuning --method dpo $(ARGS)

overload: setup-dev ## four times the load that it sustains: goodput, and how soon the rest is turned away; some minutes
	@$(BIN)/python -m tests.campaigns.overload $(ARGS)

watch: setup-dev ## drift, damage and latency are found on the real engine, and what watching costs; up to an hour
	@LORADOCK_TEST_DRIFT=$(or $(MORE),10) $(BIN)/python -m pytest -s tests/e2e/test_watching.py
	@$(BIN)/python -m tests.campaigns.cost

watch-cost: setup-dev ## CPU time of watching a request, by who looks at it, over an engine that costs nothing; a minute
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.campaigns.watch_cost $(ARGS)

drift-proof: setup-dev ## false alarms of drift over thousands of streams, every delay of the table; an hour or more
	@LORADOCK_TEST_DRIFT_STREAMS=$(or $(STREAMS),2000) LORADOCK_TEST_DRIFT_THRESHOLD=$(or $(THRESHOLD),300) \
	  $(BIN)/python -m pytest -s --timeout 7200 tests/serve/drift/detector/test_detector.py tests/serve/sequential/test_sequential_test.py

probe-noise: setup-dev ## rounding of .02 to .1 nats, as on a GPU: adapters refused or taken in error, false drift, and faint effects; 20 minutes
	@$(ONE_THREAD) $(BIN)/python -m tests.campaigns.probe_noise $(ARGS)

drift-time: setup-dev ## alarms about nothing under daily waves, autoregression and sessions, and delays there, from where it stopped; some hours
	@$(ONE_THREAD) $(BIN)/python -m tests.campaigns.drift_time --finished .campaigns/drift-time.jsonl $(ARGS)
	@$(ONE_THREAD) $(BIN)/python -m tests.campaigns.drift_time --delays

canary-aa: setup-dev ## canaries that are no different, slower, and much slower, on a simulated engine behind the real queue, from where it stopped; 30 minutes
	@$(ONE_THREAD) $(BIN)/python -m tests.campaigns.canary_aa --finished .campaigns/canary-aa.jsonl $(ARGS)
	@$(ONE_THREAD) $(BIN)/python -m tests.campaigns.canary_aa --others --streams 20

drift-real: setup-dev ## chats, windowed clients, agents, retrieval, batch jobs and hot topics of real texts raise no false alarm (ARGS=--changes: delays); an hour
	@$(ONE_THREAD) $(BIN)/python -m tests.campaigns.drift_real --seed 2000 --streams $(or $(STREAMS),50) --finished .campaigns/drift-real.jsonl $(ARGS)

mixtures: setup-dev ## the processor's time that the first request for a mixture of three adapters pays; a minute
	@$(ONE_THREAD) $(BIN)/python -m tests.campaigns.mixtures $(ARGS)

auto: setup-dev ## how often the model `auto` is right over adapters of eight real tasks, ARGS=--near with near ones; some minutes
	@$(ONE_THREAD) $(BIN)/python -m tests.campaigns.auto $(ARGS)

drift-streams: setup-dev ## popular prompts, sessions, bursts, new system prompts and parameters raise no false alarm, from where it stopped; some hours
	@$(ONE_THREAD) $(BIN)/python -m tests.campaigns.drift_streams --streams $(or $(STREAMS),100) --finished .campaigns/drift-streams.jsonl
	@$(ONE_THREAD) $(BIN)/python -m tests.campaigns.parameter_changes --streams $(or $(STREAMS),100) --finished .campaigns/parameters.jsonl
	@$(BIN)/python -m tests.campaigns.drift_streams --changes --streams $(or $(CHANGES),24)
	@$(BIN)/python -m tests.campaigns.drift_streams --cost

fleet: setup-dev ## servers over PostgreSQL and S3 under traffic, while each part is killed, frozen, slowed and cut off (ARGS=--engine: 20 minutes; ARGS=--ray: replicas on Ray); 10 minutes
	@$(if $(findstring --ray,$(ARGS)),$(BIN)/python -c 'import ray.serve' 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e '.[ray]')
	@$(BIN)/python -m tests.campaigns.fleet $(ARGS)

fleet-size: setup-dev ## four servers on a registry of 10,000 adapters: what a change and lists cost, stale answers, connections; 5 minutes
	@$(BIN)/python -m tests.campaigns.fleet_size $(ARGS)

fleet-sim: setup-dev ## homes of adapters beside Ray's routers, consistent hashing and replica sets, in simulated time; 20 minutes
	@$(ONE_THREAD) $(BIN)/python -m tests.campaigns.fleet_sim $(ARGS)

fleet-ray: setup-dev ## two replicas on a real Ray, 64 adapters on 8 slots each: homes beside Ray's router, the middleware's cost, the simulation on the same requests; 30 minutes
	@$(BIN)/python -c 'import ray.serve' 2>/dev/null || $(BIN)/python -m pip install -q -c constraints.txt -e '.[ray]'
	@$(BIN)/python -m tests.campaigns.fleet_ray $(ARGS)

upgrade: setup-dev ## servers of the commit BEFORE give way to those of this tree and come back, on one registry, under traffic; a minute
	@$(BIN)/python -m tests.campaigns.rolling_upgrade $(BEFORE) $(ARGS)

drift-delays: setup-dev ## requests until drift is seen on texts it was not tuned on, and by MEWMA and MMD at equal false alarms; 20 minutes
	@$(BIN)/python -m tests.campaigns.drift_delays $(ARGS)

kills: setup-dev ## an optimization killed 30 times and resumed ends in the same bytes; up to an hour
	@$(BIN)/python -m tests.campaigns.kills tests/campaigns/kills.yaml --kills $(or $(KILLS),30)

eight: setup-dev ## eight trained adapters joined by every method, and merged into the base: what each then answers; some minutes
	@$(BIN)/python -m tests.campaigns.eight $(ARGS)

equality: setup-dev ## 200 prompts x 4 adapters answer as on vLLM's own LoRA path, every format and family (CPU; ARGS="--prompts 6" is short); an hour or more
	@$(BIN)/python -m tests.campaigns.equality $(ARGS)

served-quality: setup-dev ## perplexity as served on a CPU with each --cpu-weights, and of exports (ARGS="--also DIR"); some minutes
	@$(BIN)/python -m tests.campaigns.served_quality $(ARGS)

four-bits: setup-dev ## methods of 4 bits on the same model, text and windows, llama.cpp's formats too (ARGS="--llama DIR"); 30 minutes
	@$(BIN)/python -m tests.campaigns.four_bits $(ARGS)

small-llama: setup-dev ## trains a small Llama whose weights were never rounded, for four-bits (ARGS="DIR --texts FILE"); 60 minutes
	@$(BIN)/python -m tests.campaigns.small_llama $(ARGS)

optimize-cost: setup-dev ## processor seconds of quantizing and measuring, by an earlier commit's code and this one's, in turns; 10 minutes
	@$(BIN)/python -m tests.campaigns.optimize_cost $(ARGS)

cpu-speed: setup-dev ## a model with each --cpu-weights, and llama.cpp's formats where they are given, in turns over HTTP; 10 minutes
	@$(BIN)/python -m tests.campaigns.cpu_speed $(ARGS)

real-models: setup-dev ## GGUF files in DIR: answers, perplexity and speed, beside llama.cpp's (ARGS="--llama-python DIR/bin/python"), each file of them; 15 minutes
	@$(BIN)/python -m tests.campaigns.real_models $(DIR) $(ARGS)

real-tasks: setup-dev ## GGUF files in DIR at tasks: programs, a job that teaches one what it cannot do, canaries of it, drift; 30 minutes
	@$(BIN)/python -m tests.campaigns.real_tasks $(DIR) $(ARGS)

vllm-diff: setup-dev ## what another vLLM changes of what loradock replaces or imports (V=0.33.0): its wheel is read, not installed; a minute
	@$(BIN)/python -m tests.campaigns.vllm_diff $(ARGS) $(V)

cuda-wheel: setup-dev ## vLLM's wheel for CUDA against the one for CPUs: what is replaced, imported and set is the same in both; a minute
	@$(BIN)/python -m tests.campaigns.cuda_wheel $(ARGS)

vllm-base: setup-dev ## the base against vLLM with both cores bound, tcmalloc and compiled, no adapters, in turns over HTTP (CPU); some minutes
	@$(BIN)/python -m tests.campaigns.vllm_base $(ARGS)

matrix-speed: setup-dev ## products of prompts of 1,024 against oneDNN's of the same shapes, bfloat16 and int8 (CPU); 3 minutes
	@$(BIN)/python -m tests.campaigns.matrix_speed $(ARGS)

kernel-rows: setup-dev ## products of 1 to 192 tokens by the CPU kernels of several checkouts, in turns (ARGS="CHECKOUT --weights int4"); 1 minute
	@$(BIN)/python -m tests.campaigns.kernel_rows $(ARGS)

adapter-cost: setup-dev ## a step of the CPU kernels without, with one and with sixteen adapters, in turns; 2 minutes
	@$(BIN)/python -m tests.campaigns.adapter_cost $(ARGS)

arm64: setup-dev ## steps and adapters by the kernels for arm64, in an emulator: Debian's g++-aarch64-linux-gnu, qemu-user and mmdebstrap; 10 minutes
	@LORADOCK_TEST_ARM64=1 $(BIN)/python -m pytest tests/serve/cpu_kernels/test_arm64.py

sanitize: setup-dev ## the tests of the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer; some minutes
	@CXX=$(CURDIR)/tests/support/sanitizing-c++ ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD=$$(g++ -print-file-name=libasan.so):$$(g++ -print-file-name=libubsan.so) \
	  $(BIN)/python -m pytest -m "not engine" --deselect tests/serve/cpu_kernels/test_punica.py::test_the_kernels_are_compiled_once_and_a_broken_compiler_is_said \
	  $(or $(ARGS),tests/serve/cpu_kernels)

gpu: ## all that was never measured on a GPU, in parts of some minutes, in any order, without a network (WHEELS=DIR, ARGS="--size 8B --part swap"; ARGS=--rehearse on a CPU); 25 minutes
	@python=$$($(or $(PYTHON),$(wildcard $(BIN)/python),python3) -m tests.campaigns.gpu_environment $(if $(WHEELS),--wheels $(WHEELS)) | tail -1) && \
	  test -n "$$python" && PYTHONPATH=$(CURDIR) "$$python" -m tests.campaigns.gpu $(ARGS)

gpu-torch: ## `loradock optimize` on a GPU against the processor, where torch is installed and vLLM is not, without a network (WHEELS=DIR; ARGS=--rehearse); 15 minutes
	@PYTHONPATH=$(CURDIR) $(or $(PYTHON),$(wildcard $(BIN)/python),python3) -m tests.campaigns.gpu_torch $(if $(WHEELS),--wheels $(WHEELS)) $(ARGS)

# Of torch and what torch's users have anyway (transformers, peft, accelerate) nothing: these are 3 MB.
gpu-torch-wheels: ## what `make gpu-torch` needs beside torch, transformers, peft and accelerate, for another Python (FOR=3.12 WHEELS=DIR)
	@$(or $(PYTHON),python3) -m pip download --quiet --no-deps --only-binary :all: --python-version $(or $(FOR),3.12) \
	  --dest $(or $(WHEELS),wheels-gpu-torch) -c constraints.txt \
	  compressed-tensors loguru msgspec pydantic pydantic-core annotated-types typing-inspection

gpu-wheels: ## what `make gpu` installs from, into a folder to carry to a machine without a network (WHEELS=DIR); 4.3 GB
	@$(or $(PYTHON),python3) -m pip download --quiet --no-deps --only-binary :all: --dest $(or $(WHEELS),wheels-gpu) \
	  -r serve/cli/requirements/gpu.txt -r serve/cli/requirements/optimize.txt

memory: setup-dev ## what a server takes with each --cpu-weights, process by process (CPU; ARGS="--size 1B --adapters 16"); some minutes
	@$(BIN)/python -m tests.campaigns.memory $(ARGS)

start: setup-dev ## how soon a server is ready, against other checkouts in turns (ARGS="--against DIR"); some minutes
	@$(BIN)/python -m tests.campaigns.start $(ARGS)

socket: setup-dev ## what is lost between an engine's step and the socket: the engine in one process against the server; some minutes
	@$(BIN)/python -m tests.campaigns.socket_cost $(ROUNDS)

front-end: setup-dev ## the server's CPU for a token over a scripted engine, 1,000 streams, against vllm serve and other checkouts (ARGS="--against DIR"); 10 minutes
	@$(BIN)/python -m tests.campaigns.front_end $(ARGS)

tiers: setup-dev ## 1,000 adapters on one engine: a Zipf-distributed load, 1,000 loads and unloads that leak nothing; 10 minutes
	@LORADOCK_TEST_ADAPTERS=$(or $(ADAPTERS),1000) $(BIN)/python -m pytest -s tests/e2e/test_tiers.py

cases: setup-dev ## 10,000 malformed archives, headers and configs thrown at the checks of an upload; some minutes
	@HYPOTHESIS_EXAMPLES=$(or $(EXAMPLES),1000) $(BIN)/python -m pytest -s -m "not engine" --hypothesis-show-statistics \
		tests/serve/adapters/test_upload.py tests/serve/adapters/test_inspection.py

wheel: setup-dev ## the built wheel alone in an empty folder: install, serve, chat, push, then optimize; 10 minutes
	@$(BIN)/python -m tests.campaigns.wheel $(ARGS)

image: setup-dev ## the CPU image built by buildah and started: health check, chat, push, restart (ARGS="--device gpu": as far as the driver); 20 minutes
	@$(BIN)/python -m tests.campaigns.image $(ARGS)

sources: setup-dev ## pushes by MLflow's client and server, and by that of Weights & Biases, in an environment of their own; 4 minutes
	@folder=$$(mktemp -d) && trap 'rm -rf $$folder' EXIT && \
	  $(BIN)/python -m venv $$folder/clients && $$folder/clients/bin/pip install -q mlflow==3.17.2 wandb==0.31.0 && \
	  LORADOCK_TEST_MLFLOW=$$folder/clients/bin/python LORADOCK_TEST_WANDB=$$folder/clients/bin/python $(BIN)/python -m pytest -q tests/serve/adapters/sources

hashes: setup-dev ## serve/cli/requirements/*.txt again, after a change of pyproject.toml or constraints*.txt; some minutes
	@$(BIN)/python -m pip install --quiet uv
	@PATH=$(abspath $(BIN)):$$PATH $(BIN)/python .ci/hash_requirements.py

bench: setup ## load against a running server
	@exec $(BIN)/loradock bench $(ARGS)

monitoring: setup ## Prometheus and Alertmanager (Debian's) beside a running server
	@exec docker/monitoring.sh

clean: ## remove the virtual environment and everything else that was made here (not the model in the user's cache)
	rm -rf .venv .monitoring build dist docs/_build docs/generated *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find serve optimize tests -name __pycache__ -type d -prune -exec rm -rf {} +

setup:
	@./install.sh serve

setup-dev:
	@./install.sh test
