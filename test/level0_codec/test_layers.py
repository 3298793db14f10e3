"""The import table of doc/architecture.md: packages import downwards only, client and server never each other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

#: Package: the packages of ours that it may import.
TABLE = {
    "qtfs_common": set[str](),
    "qtfs_server": {"qtfs_common", "ipc"},
    "qtfs_client": {"qtfs_common", "ipc"},
    "ipc": {"qtfs_common"},
    "rexec": {"qtfs_common"},
    "qtinfo": {"qtfs_common"},
}
#: Outside the packages, yet imported by nobody.
OTHERS = {"demo", "test", "setup", "harness"}
SUFFIXES = (".py", ".pyx", ".pxd", ".pxi")

_COMMENT = re.compile(r"#.*")
_IMPORT = re.compile(r"^\s*c?import\s+(.+)$")
_FROM = re.compile(r"^\s*from\s+([\w.]+)\s+c?import\b")
_DYNAMIC = re.compile(r"""(?:import_module|__import__)\(\s*f?["']([\w.]+)""")
_INCLUDE = re.compile(r"""^\s*include\s+["']([^"']+)""")


def imported(source: str) -> set[str]:
    """Top-level names of everything a Python or Cython source imports, cimports or includes, wherever it does so."""
    names: set[str] = set()
    for raw in source.splitlines():
        line = _COMMENT.sub("", raw)
        if found := _IMPORT.match(line):
            names |= {part.split(" as ")[0].strip() for part in found.group(1).split(",")}
        elif found := _FROM.match(line):
            names.add(found.group(1))
        elif found := _INCLUDE.match(line):
            names.add(found.group(1).replace("/", "."))
        names |= set(_DYNAMIC.findall(line))
    return {name.split(".")[0] for name in names}


def sources(package: str) -> list[Path]:
    return sorted(path for path in (ROOT / package).rglob("*") if path.suffix in SUFFIXES)


def test_the_reader_of_imports_sees_every_form() -> None:
    source = """
import os, alpha.one as a, beta
    from gamma.two import x  # and not from omega import y
from delta cimport z
cimport epsilon
include "zeta/parts.pxi"
module = importlib.import_module("eta.inner")
from . import sibling
"""
    ours = {"alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta"}
    assert ours <= imported(source)
    assert "omega" not in imported(source)


def test_the_sources_are_where_the_table_looks() -> None:
    assert {package for package in TABLE if sources(package)} >= {"qtfs_common", "qtfs_server", "qtfs_client"}
    assert "qtfs_common" in imported((ROOT / "qtfs_server/dispatch.pyx").read_text())
    assert not [path for path in ROOT.glob("*.py") if path.name != "setup.py"]


@pytest.mark.parametrize("package", TABLE)
def test_a_package_imports_only_what_is_below_it(package: str) -> None:
    forbidden = (set(TABLE) | OTHERS) - TABLE[package] - {package}
    found = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources(package)
        for name in imported(path.read_text()) & forbidden
    }
    assert not found


def test_relative_imports_do_not_climb_out_of_a_package() -> None:
    climbing = re.compile(r"^\s*from\s+\.\.", re.MULTILINE)
    assert not [path for package in TABLE for path in sources(package) if climbing.search(path.read_text())]
