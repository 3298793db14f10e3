"""A C project with autoconf, automake and libtool is made, checked and packed on a mount."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest
from programs import Shared, over, program

PROJECT = {
    "configure.ac": """\
AC_INIT([counting], [1.2])
AC_CONFIG_AUX_DIR([build-aux])
AC_CONFIG_MACRO_DIRS([m4])
AM_INIT_AUTOMAKE([foreign subdir-objects])
AC_PROG_CC
AM_PROG_AR
LT_INIT([disable-static])
AC_CHECK_HEADERS([sys/stat.h])
AC_CHECK_FUNCS([posix_fallocate])
AC_CONFIG_HEADERS([config.h])
AC_CONFIG_FILES([Makefile src/Makefile test/Makefile])
AC_OUTPUT
""",
    "Makefile.am": "ACLOCAL_AMFLAGS = -I m4\nSUBDIRS = src test\n",
    "src/Makefile.am": """\
lib_LTLIBRARIES = libcount.la
libcount_la_SOURCES = count.c count.h
libcount_la_LDFLAGS = -version-info 1:0:0
include_HEADERS = count.h
bin_PROGRAMS = count
count_SOURCES = main.c
count_LDADD = libcount.la
""",
    "src/count.h": "int count_to(int end);\n",
    "src/count.c": """\
#include <config.h>
#include "count.h"
int count_to(int end) { int sum = 0; for (int n = 1; n <= end; n++) sum += n; return sum; }
""",
    "src/main.c": """\
#include <config.h>
#include <stdio.h>
#include <stdlib.h>
#include "count.h"
int main(int argc, char **argv) { printf("%s %d\\n", PACKAGE_STRING, count_to(argc > 1 ? atoi(argv[1]) : 0)); }
""",
    "test/Makefile.am": """\
check_PROGRAMS = sums
sums_SOURCES = sums.c
sums_CPPFLAGS = -I$(top_srcdir)/src
sums_LDADD = ../src/libcount.la
TESTS = sums output.sh
EXTRA_DIST = output.sh
""",
    "test/sums.c": "#include <count.h>\nint main(void) { return count_to(100) != 5050; }\n",
    "test/output.sh": "#!/bin/sh\ntest \"$(../src/count 4)\" = 'counting 1.2 10'\n",
}


@pytest.mark.slow
@over("unix-auto", "tcp-none")
def test_configure_make_check_install_and_pack(shared: Shared, cache: str) -> None:
    here, there = shared.here / "project", shared.there / "project"
    for name, text in PROJECT.items():
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text(text)
    (here / "test/output.sh").chmod(0o755)
    program("autoreconf", "-i", cwd=here)
    program("./configure", "-q", f"--prefix={shared.here}/installed", cwd=here)
    said = program("make", "-j2", "check", cwd=here)
    assert "# PASS:  2" in said and "# FAIL:  0" in said
    assert program(there / "src/count", "4") == "counting 1.2 10\n"
    program("make", "-q", "libcount.la", "count", cwd=there / "src")
    if cache == "none":
        return
    program("make", "-s", "install", "distcheck", cwd=here, timeout_s=90)
    assert program(shared.here / "installed/bin/count", "3") == "counting 1.2 6\n"
    _check_archive(there / "counting-1.2.tar.gz")


def _check_archive(path: Path) -> None:
    """It has what the project has, in the same bytes, and the generated files."""
    with tarfile.open(path) as archive:
        for name, text in PROJECT.items():
            member = archive.extractfile(f"counting-1.2/{name}")
            assert member is not None and member.read() == text.encode()
        assert "counting-1.2/configure" in archive.getnames()
