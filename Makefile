# Everything that is built or tested goes through the venv in .venv, where the package is
# installed as users get it: compiled, from a wheel, not editable.
# make PYTHON=python3.12 ... picks the interpreter, make test ARGS="-k ring" some of the tests,
# NO_INSTALL=1 keeps apt-get out of it.

ifeq ($(origin PYTHON),undefined)
PYTHON := python3
KEEP_PYTHON := yes
endif
V := .venv
PY := $(V)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
LOG := $(V)/build.log
JOBS := 3

SOURCES := $(shell find src -type f ! -path '*.egg-info/*' \( \
	-name '*.py' -o -name '*.py[xi]' -o -name '*.pxd' -o -name '*.h' -o -name py.typed \) | LC_ALL=C sort)

MAKEFLAGS += --no-builtin-rules
.SUFFIXES:
.DELETE_ON_ERROR:
# One venv, one pip at a time, with make -j too; setup.py compiles the extensions side by side.
.NOTPARALLEL:
.DEFAULT_GOAL := help
.PHONY: help demo test test-guest check asan ubsan tsan coverage torn hostile soak crash mutants model litmus attack \
	check-cost build wheel \
	sdist check-hints clean distclean bootstrap FORCE

# $(call quietly,what,command): says what is done, and shows the command's output only where it fails.
quietly = echo "$(1)"; $(2) >$(LOG) 2>&1 || { s=$$?; cat $(LOG); echo "failed: $(1)"; exit $$s; } >&2

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

demo: $(V)/.installed ## install what is missing, build, and show a disk crossing shared memory
	@$(V)/bin/muenfast demo

# Three at a time, for many only wait, but of those that make devices one (tests/conftest.py); JOBS=0: all in one process.
test: $(V)/.installed $(V)/.test-group ## install what is missing, build, and run the tests on the installed package
	@$(PY) -m pytest -n $(JOBS) $(ARGS)

# A virtual environment's python by its path: a shim costs seconds in software emulation.
test-guest: $(V)/.installed $(V)/.test-group ## device tests in a kernel with device-mapper and nbd, under QEMU: tools/guest
	@$(PY) tools/guest --time 1500 -- "$(CURDIR)/$(PY)" -m pytest -c tests/guest/pytest.ini --confcutdir=tests tests/guest \
		$(ARGS)

# stubtest compares the stubs with what is installed; the FUSE front end is not built everywhere.
check: $(V)/.installed $(V)/.check-group ## style, types, stubs, Cython's hints and scores, contents of sdist and wheel
	@$(PY) -m ruff check .
	@$(PY) -m mypy
	@if [ -e "$$(echo $(V)/lib/*/site-packages/muenfast/attach/_fuse.*.so)" ]; then \
		more=muenfast.attach._fuse; else more=--ignore-unused-allowlist; fi; \
	$(PY) -m mypy.stubtest --allowlist tools/stubtest_allowlist.txt muenfast._inodes muenfast._ring muenfast._target muenfast._store \
		muenfast._user muenfast._engine muenfast._blk muenfast._buffer muenfast._client muenfast._bufclient muenfast._packets \
		muenfast._marks muenfast._net muenfast.attach._nbd $$more
	@$(PY) tools/check_hints.py
	@$(PY) -m pytest -q tests/test_packaging.py

asan: $(V)/.installed $(V)/.test-group ## ring, block and packet tests with AddressSanitizer; ARGS="-k name" some of them
	@$(PY) tools/sanitize.py address $(ARGS)

ubsan: $(V)/.installed $(V)/.test-group ## the same with UndefinedBehaviorSanitizer
	@$(PY) tools/sanitize.py undefined $(ARGS)

tsan: $(V)/.build-group ## the ring's core, called from C, with ThreadSanitizer; ARGS=10 seconds per scenario
	@$(PY) tools/tsan.py $(ARGS)

coverage: $(V)/.installed $(V)/.test-group ## lines of .pyx, .pxd and .h that the tests reach, by gcov; ARGS="--keep --missing -k ring"
	@$(PY) tools/coverage.py $(ARGS)

torn: $(V)/.installed ## torn reads: 10^9 bytes under overruns, every element checked; ARGS="--bytes N"
	@$(PY) tools/torn.py $(ARGS)

hostile: $(V)/.installed ## a hostile peer against server and client, ten minutes; ARGS="--minutes N --seed S --shm"
	@$(PY) tools/hostile.py $(ARGS)

soak: $(V)/.installed ## kill -9 of any side under load, 1000 times, with all data checked; ARGS="--kills N --seed S --minutes M --every 1"
	@$(PY) tools/soak.py $(ARGS)

crash: $(V)/.installed ## power lost at every flush, in the worst order, under ext4; ARGS="--rigs L --fsyncs N --states N --seed S"
	@$(PY) tools/crash.py $(ARGS)

mutants: $(V)/.installed $(V)/.test-group ## fences and re-checks removed one at a time: which test notices; ARGS="F1 S1" some of them
	@$(PY) tools/mutants.py $(ARGS)

attack: $(V)/.installed $(V)/.attack-group ## every parser of foreign bytes fuzzed (clang); ARGS="ring nbd --seconds 60 --keep --record", ARGS=--plants
	@$(PY) tools/attack.py $(ARGS)

litmus: $(V)/.python ## each pair of docs/memory-model.md under RC11 and AArch64, by herd7 (herdtools7); ARGS="kick" some of it
	@$(PY) tools/litmus.py $(ARGS)

model: bootstrap $(V)/.python ## the protocol in Promela, verified by spin, and each fence and look removed; ARGS="F1 bell" some of it
	@$(PY) tools/model.py $(ARGS)

# Of the C that was built; a compiler, libc or CPU of which nothing is kept ends with status 2: docs/testing.md.
check-cost: $(V)/.installed $(V)/.test-group ## instructions of the hot loops, by callgrind, against bench/cost.json; ARGS="--write", "--against HEAD", "ring"
	@$(PY) tools/cost.py $(ARGS)

build: $(V)/.installed ## build the package and install it into .venv

sdist: $(V)/.test-group ## the source archive, in dist/
	@rm -rf src/*.egg-info
	@$(call quietly,building the sdist,$(PY) -m build --no-isolation --sdist .)
	@ls dist/*.tar.gz

wheel: $(V)/.test-group ## the source archive, and a wheel built from it, in dist/
	@rm -rf src/*.egg-info
	@$(call quietly,building the sdist and the wheel,$(PY) -m build --no-isolation .)
	@ls dist/*.whl

check-hints: $(V)/.build-group ## compile every .pyx to C; fail on a warning, a performance hint or a core's score above 0
	@$(PY) tools/check_hints.py

clean: ## remove what was built
	@rm -rf build dist src/*.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	@find src tests $(wildcard bench tools) -name __pycache__ -prune -exec rm -rf {} +
	@find src -name '*.so' -delete
	@rm -f $(V)/.installed

distclean: clean ## remove .venv, too
	@rm -rf $(V)

bootstrap:
	@NO_INSTALL=$(NO_INSTALL) tools/bootstrap.sh "$(if $(KEEP_PYTHON),$(if $(wildcard $(PY)),$(PY),$(PYTHON)),$(PYTHON))" \
		$(if $(filter test check model,$(MAKECMDGOALS)),test) $(if $(filter test-guest,$(MAKECMDGOALS)),guest) \
		$(if $(filter check-cost,$(MAKECMDGOALS)),cost)

# A venv is bound to its interpreter and its place. A PYTHON that was asked for replaces another
# one's venv; the default keeps what is there.
$(V)/.python: FORCE | bootstrap
	@python=$(if $(KEEP_PYTHON),$$([ -x $(PY) ] && echo $(PY) || echo $(PYTHON)),$(PYTHON)); \
	this=$$($$python -c 'import sys; print(*sys.version_info[:3], sys.base_prefix, sys.argv[1])' '$(CURDIR)') || exit 1; \
	[ "$$(cat $@ 2>/dev/null)" = "$$this" ] && exit 0; \
	base=$$($$python -c 'import sys; print(sys._base_executable)') && rm -rf $(V) && mkdir $(V) || exit 1; \
	$(call quietly,making .venv,$$base -m venv $(V)); \
	$(call quietly,upgrading pip for dependency groups,$(PIP) install --upgrade "pip>=25.1"); \
	echo "$$this" >$@

$(V)/.%-group: pyproject.toml $(V)/.python
	@$(call quietly,installing the $* requirements,$(PIP) install --group $*)
	@touch $@

# What decides about the build besides the contents of the sources: rewritten only when it changes.
$(V)/.inputs: FORCE $(V)/.python
	@{ printf '%s\n' $(SOURCES); echo "$$CC $$CFLAGS $$MUENFAST_WERROR"; \
	   "$${PKG_CONFIG:-pkg-config}" --modversion fuse3 2>/dev/null || echo "no fuse3"; } >$@.new; \
	if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# Up-to-date .so files in build/lib are kept from one build to the next. The rest of build/lib is
# not: everything in it would land in the wheel, also what is no longer in src. The guest's kernel stays.
$(V)/.installed: $(SOURCES) setup.py pyproject.toml README.md LICENSE $(V)/.inputs $(V)/.build-group
	@$(if $(filter setup.py $(V)/%,$?),rm -rf $(filter-out build/guest,$(wildcard build/*)),\
		find build/lib* -type f ! -name '*.so' -delete 2>/dev/null || true)
	@rm -rf src/*.egg-info
	@$(call quietly,building and installing muenfast,$(PIP) install -v --no-build-isolation .)
	@grep -h 'building without the FUSE' $(LOG) | sort -u || true
	@touch $@
