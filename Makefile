# make lab: open the course. make test: what CI runs. make run: execute every chapter anew.
# make test-alone: each of chapters 00 to 15 alone in an empty folder, as Colab has it.
# make test-oldest, make test-newest: every chapter on the lowest, the highest versions allowed, in an
# environment in _build. PyPI's torch for Linux weighs some 6 GB there.
# make homework SEED=7: the sheets of that instance, for nbgrader (INSTRUCTORS.md).
# make site: the course as web pages in _build/site, from the committed outputs. make test-site: every
# page of it in Chromium, which is installed where that is missing and apt and root are there.
# make pdf: the same pages as one file to print, _build/dpo_mini.pdf.
# Each makes .venv and installs what the course needs when that has not been done or has changed.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/ready
SITE := _build/venv
SITE_READY := $(SITE)/ready

.PHONY: lab run test test-alone test-oldest test-newest homework test-homework site test-site pdf

lab: $(READY)
	$(BIN)/jupyter lab --notebook-dir=notebooks notebooks/00_take_the_tour.ipynb

run: $(READY)
	$(BIN)/python tools/run_chapters.py

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 tests
	$(BIN)/python -m pytest -n 2 --dist loadscope --nbval --nbval-current-env notebooks

test-alone: $(READY)
	$(BIN)/python -m pytest -n 2 --all-chapters tests/test_alone.py

test-oldest test-newest: test-%: $(READY)
	$(BIN)/python tools/try_versions.py $*

homework: $(READY)
	$(BIN)/python tools/make_homework.py $(if $(SEED),--seed $(SEED))

test-homework: $(READY)
	$(BIN)/python -m pytest tests/test_homework.py

site: $(SITE_READY)
	rm -rf _build/site
	$(SITE)/bin/python docs/stage.py
	$(SITE)/bin/python -m sphinx -j 2 -W --keep-going -c docs -d _build/doctrees _build/source _build/site
	@echo "The site is in _build/site: open _build/site/index.html"

test-site: site $(SITE)/chromium
	$(SITE)/bin/python -m pytest -n 2 docs/tests

pdf: $(SITE_READY) $(SITE)/chromium
	$(SITE)/bin/python docs/stage.py
	$(SITE)/bin/python -m sphinx -W --keep-going -b singlehtml -c docs -d _build/doctrees _build/source _build/print
	$(SITE)/bin/python docs/print.py
	@echo "The course to print is _build/dpo_mini.pdf"

$(SITE)/chromium: $(SITE_READY)
	@command -v "$${CHROMIUM:-chromium}" > /dev/null \
		|| { [ "$$(id -u)" = 0 ] && apt-get update -q && apt-get install -y -q --no-install-recommends chromium; } \
		|| { echo "This needs Chromium: install Debian's package chromium, or set CHROMIUM to its path"; exit 1; }
	@touch $@

# The site's own environment stands on .venv: its docstrings are read from modules that import torch.
$(SITE_READY): $(READY) docs/requirements.txt
	rm -rf $(SITE)
	$(BIN)/python -m venv $(SITE)
	$(SITE)/bin/python -m pip install --disable-pip-version-check -r docs/requirements.txt -c constraints.txt
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))" \
		> "$$($(SITE)/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/course.pth"
	touch $(SITE_READY)

$(READY): requirements.txt constraints.txt pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" \
		|| { echo "$(PYTHON) is older than Python 3.10: make PYTHON=python3.11 ..."; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -r requirements.txt -c constraints.txt
	$(BIN)/python -m pip install --disable-pip-version-check --no-deps -e .
	touch $(READY)
