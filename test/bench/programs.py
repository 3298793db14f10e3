"""Whole programs: what people do with a file system. Each run begins with fresh names, made on the server's side."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial

import calls
import materials
from places import MIB, Place, Sample

_numbers = itertools.count()


def prepare(place: Place) -> None:
    """A tree and a clone to look at."""
    _run("tar", "-xf", f"{place.material}/tree.tar", "-C", place.backing)
    _run("git", "clone", "-q", f"file://{place.material}/tree.git", f"{place.backing}/clone")


def _run(*command: str) -> str:
    """Its output. A program that fails fails the measurement; what it says goes to the terminal."""
    done = subprocess.run(
        command,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=materials.GIT_ENVIRONMENT,
        text=True,
    )
    return done.stdout


@contextlib.contextmanager
def _fresh(place: Place) -> Iterator[str]:
    """The name of a new directory; removed on the server's side, which costs the mount nothing."""
    name = f"fresh{next(_numbers)}"
    os.mkdir(f"{place.backing}/{name}")
    try:
        yield name
    finally:
        shutil.rmtree(f"{place.backing}/{name}", ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------- programs


def git_clone(place: Place, _count: int) -> Sample:
    with _fresh(place) as name:
        source = f"file://{place.material}/tree.git"
        return place.timed(1, lambda: _run("git", "clone", "-q", source, place.path(f"{name}/clone")))


def git_status(place: Place, count: int) -> Sample:
    """Of a clone without changes; the run before it wrote down what git remembers of the files."""

    def once() -> None:
        changes = _run("git", "-C", place.path("clone"), "status", "--porcelain")
        assert not changes, f"git sees changes: {changes}"

    once()
    return place.each(count, once)


def untar(place: Place, _count: int) -> Sample:
    with _fresh(place) as name:
        return place.timed(1, lambda: _run("tar", "-xf", f"{place.material}/tree.tar", "-C", place.path(name)))


def find(place: Place, count: int) -> Sample:
    """With a condition that only the attributes of each file can answer."""

    def once() -> None:
        found = _run("find", place.path("tree"), "-type", "f", "-size", "+0").count("\n")
        assert found == materials.FILES, f"find found {found} of {materials.FILES}"

    return place.each(count, once)


def remove_tree(place: Place, _count: int) -> Sample:
    with _fresh(place) as name:
        _run("tar", "-xf", f"{place.material}/tree.tar", "-C", f"{place.backing}/{name}")
        return place.timed(1, lambda: _run("rm", "-rf", place.path(f"{name}/tree")))


def sqlite_commits(place: Place, count: int) -> Sample:
    """Each a transaction of its own, with sqlite's defaults: a journal, fsync(2), locks."""
    with _fresh(place) as name, contextlib.closing(sqlite3.connect(place.path(f"{name}/db"))) as database:
        database.isolation_level = None
        database.execute("create table entries (number integer primary key, text)")
        return place.each(count, lambda: database.execute("insert into entries (text) values ('some text')"))


# ------------------------------------------------------------------------------------------------------------------ fio


def fio(mode: str, block: str, depth: int) -> Callable[[Place, int], Sample]:
    """fio(1) at random offsets of the large file, for `count` ms; `mode`: randread or randwrite.

    Operations are counted at 4 KiB, else MiB.
    """
    return partial(_fio, mode, block, depth)


def _fio(mode: str, block: str, depth: int, place: Place, milliseconds: int) -> Sample:
    command = [
        *("fio", "--name=bench", f"--rw={mode}", f"--bs={block}", f"--size={calls.DATA_BYTES}"),
        *(f"--filename={place.path('data')}", "--time_based", f"--runtime={milliseconds}ms", "--fallocate=none"),
        # What it drops of the bare directory's cache would have to come from the disk.
        *(f"--invalidate={int(not place.is_bare)}", "--output-format=json", "--group_reporting"),
        *_at_depth(depth),
        # It begins a quarter of a second earlier without calibrating its own clock.
        *("--clocksource=clock_gettime", "--eta=never", "--disk_util=0"),
    ]
    output = ""

    def once() -> None:
        nonlocal output
        output = _run(*command)

    sample = place.timed(1, once)
    figures = json.loads(output[output.index("{") :])["jobs"][0]["read" if mode == "randread" else "write"]
    amount = figures["total_ios"] if block == "4k" else figures["io_bytes"] / MIB
    return dataclasses.replace(sample, seconds=figures["runtime"] / 1e3, amount=amount)


def _at_depth(depth: int) -> Sequence[str]:
    """Requests under way at once: of io_uring(7), or of as many threads where the kernel does not let us have it."""
    if depth == 1:
        return ("--ioengine=psync",)
    if _has_io_uring():
        return ("--ioengine=io_uring", f"--iodepth={depth}")
    return ("--ioengine=psync", "--thread", f"--numjobs={depth}")


@cache
def _has_io_uring() -> bool:
    command = [*("fio", "--name=probe", "--ioengine=io_uring", "--rw=read", "--filename=/dev/zero"), "--size=4k"]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0
