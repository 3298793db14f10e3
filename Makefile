# qtfs: make [all] builds in place; make help lists the rest.
#
# role=client|server, QTFS_TEST_MODE=1 and UDS_TEST_MODE=1, which the original's users pass, are accepted and change
# nothing: one build is both, and the address chooses the transport at run time.

PREFIX     ?= /usr/local
SYSCONFDIR ?= /etc
SBINDIR    ?= /sbin
DESTDIR    ?=
QTFS_DEBUG ?= 0
QTFS_SANITIZE ?= 0
# Two workers: one for what test/conftest.py sets apart, one for everything else. (PYTEST_ARGS="-n 0": none.)
PYTEST_ARGS ?=
TEST_WORKERS = -n 2 --dist loadscope --max-worker-restart 0
SOAK_SECONDS ?= 300
# What make sanitize runs: tests of commands and of whole programs would be three times as slow.
SANITIZE_ARGS ?= test/level0_codec test/level1_common test/level2_server test/level3_mount
FUZZ_SECONDS ?= 600

export PREFIX SYSCONFDIR SBINDIR DESTDIR QTFS_DEBUG QTFS_SANITIZE

PACKAGES = qtfs_common qtfs_server qtfs_client ipc rexec qtinfo
PRESENT := $(wildcard $(PACKAGES))
PY       = .venv/bin/python
MODE    := $(if $(filter-out 0,$(QTFS_SANITIZE)),sanitize,$(if $(filter-out 0,$(QTFS_DEBUG)),debug,release))
# Without libfuse 3's headers a module is left out; once they have come, it is not.
FUSE3   := $(shell pkg-config --exists fuse3 2>/dev/null || echo -without-fuse3)
BUILT    = build/built-$(MODE)$(FUSE3)
SOURCES := setup.py $(if $(PRESENT),$(shell find $(PRESENT) -name '*.pyx' -o -name '*.pxd' -o -name '*.pxi' -o -name '*.h'))

# Commands that run from where they are after make, as FILE:MODULE; those whose package has not come yet are left out.
COMMANDS  = qtfs_server/engine:qtfs_server.cli qtfs_client/mount.qtfs:qtfs_client.cli \
            qtfs_client/qtctl:qtfs_client.qtctl
LAUNCHERS = $(foreach c,$(COMMANDS),$(if $(wildcard $(firstword $(subst /, ,$(c)))),$(firstword $(subst :, ,$(c)))))

.PHONY: all ext deps demo test soak bench lint debug sanitize fuzz install uninstall dist clean distclean help FORCE

# Commands are started often, so Python need not compile them each time, also where PYTHONDONTWRITEBYTECODE is set.
all: ext $(LAUNCHERS)
	@$(PY) -m compileall -q $(PRESENT)

help:
	@echo "all (default)  build in place; then the commands run from there"
	@echo "deps           install what is missing: system packages (root) and .venv"
	@echo "demo           the tour on this machine      test   the tests (PYTEST_ARGS=...)"
	@echo "soak           faults and deaths by seed, for SOAK_SECONDS=$(SOAK_SECONDS); SOAK_ARGS=--help says more"
	@echo "bench          speed beside others           lint   ruff, mypy, Cython's warnings"
	@echo "debug          all, with assertions (any target: QTFS_DEBUG=1)"
	@echo "sanitize       tests over a build with the address and undefined-behaviour sanitizers (SANITIZE_ARGS=...)"
	@echo "fuzz           hostile bytes for both decoders and the engine (FUZZ_SECONDS=$(FUZZ_SECONDS))"
	@echo "install        into DESTDIR, PREFIX=$(PREFIX); uninstall takes it away, /etc/qtfs stays"
	@echo "dist           sdist and wheel in dist/      clean  distclean"

# Always asked, cheap if there is nothing to do: it compares contents, which make cannot.
.PHONY: venv
venv:
	@scripts/deps.sh venv

ext: venv $(BUILT)

# One build at a time in one checkout, whoever started it. The other mode's mark goes: its modules are no longer in place.
$(BUILT): $(SOURCES) | venv
	@mkdir -p build
	flock build/lock $(PY) setup.py -q build_ext --inplace
	@rm -f build/built-* && touch $@

# Rewritten every time, as a checkout may have been moved or a launcher removed.
$(LAUNCHERS): FORCE
	@scripts/launcher.sh "$@" $(patsubst $@:%,%,$(filter $@:%,$(COMMANDS)))

deps:
	scripts/deps.sh build test venv kernel

demo:
	scripts/deps.sh build
	$(MAKE) all
	demo/run.sh

test:
	scripts/deps.sh build test venv kernel
	$(MAKE) all
	@$(PY) -m compileall -q test
	$(PY) -m pytest $(TEST_WORKERS) $(PYTEST_ARGS)

soak:
	scripts/deps.sh build test venv
	$(MAKE) all
	$(PY) test/soak/run.py --seconds $(SOAK_SECONDS) $(SOAK_ARGS)

bench:
	scripts/deps.sh build bench
	$(MAKE) all
	$(PY) test/bench/run.py $(BENCH_ARGS)

lint: venv
	$(PY) -m ruff check .
	$(PY) -m mypy setup.py $(foreach p,$(PRESENT),$(if $(shell find $(p) -name '*.py'),$(p)))
	$(PY) setup.py -q lint_cython

debug:
	$(MAKE) all QTFS_DEBUG=1

# Afterwards the modules in place are those of the other mode again: sanitized ones load under the sanitizer only.
sanitize:
	scripts/deps.sh build test venv
	$(MAKE) all QTFS_SANITIZE=1
	scripts/sanitized.sh unshare -m $(PY) -m pytest $(TEST_WORKERS) --dist loadfile -m "not memory" $(SANITIZE_ARGS); \
	    status=$$?; $(MAKE) all QTFS_SANITIZE=0; exit $$status

# The instrumented modules stay apart from those in place.
fuzz:
	scripts/deps.sh build fuzz venv atheris
	$(MAKE) ext
	CC=clang QTFS_FUZZ=1 flock build/lock $(PY) setup.py -q build --build-lib build/fuzz/lib --build-temp build/fuzz/temp
	unshare -m $(PY) test/fuzz/run.py --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

# The wheel is made from the sdist, so a file that the sdist forgot is noticed here and not by a user.
dist: venv
	rm -rf dist
	$(PY) setup.py -q sdist
	$(PY) -m pip wheel -qq --no-deps --no-build-isolation -w dist dist/qtfs-*.tar.gz

install: dist
	scripts/install.sh install

uninstall:
	scripts/install.sh uninstall

clean:
	rm -rf build dist *.egg-info $(LAUNCHERS)
	@for pyx in $(filter %.pyx,$(SOURCES)); do rm -f "$${pyx%.pyx}.c" "$${pyx%.pyx}".*.so; done
	@for dir in $(PRESENT) test demo; do [ ! -d $$dir ] || find $$dir -name __pycache__ -prune -exec rm -rf {} +; done
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis

distclean: clean
	rm -rf .venv .cache
