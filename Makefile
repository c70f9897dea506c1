# make lab: open the course. make test: what CI runs. make run: execute every chapter anew.
# make homework SEED=7: the sheets of that instance, for nbgrader (INSTRUCTORS.md).
# Each makes .venv and installs what the course needs when that has not been done or has changed.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready

.PHONY: lab run test homework test-homework

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir=notebooks notebooks/00_take_the_tour.ipynb

run: $(READY)
	$(BIN)/python tools/run_chapters.py

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 tests
	$(BIN)/python -m pytest -n 2 --dist loadscope --nbval --nbval-current-env notebooks

homework: $(READY)
	$(BIN)/python tools/make_homework.py $(if $(SEED),--seed $(SEED))

test-homework: $(READY)
	$(BIN)/python -m pytest tests/test_homework.py

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" \
		|| { echo "$(PYTHON) is older than Python 3.10: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -c constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -e .
	touch $(READY)
