"""Directories with very many entries, and trees with more files than the engine may hold open."""

from __future__ import annotations

import ctypes
import os
import struct
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess, everything_below
from programs import Shared, mounted_here, program

FILES = 20_000
ENTRIES = 100_000
_libc = ctypes.CDLL(None, use_errno=True)
_libc.getdents64.restype = ctypes.c_ssize_t


# --------------------------------------------------------------------------------------------------- few descriptors


@pytest.fixture
def frugal(area: Path) -> Iterator[EngineProcess]:
    """An engine with 1024 descriptors."""
    limits = ["--nofile=1024"]
    with EngineProcess(area / "frugal", rules=everything_below(area), limits=limits).running() as engine:
        yield engine


@pytest.mark.slow
def test_find_with_few_descriptors(frugal: EngineProcess, share: Path, area: Path) -> None:
    """More files than descriptors, twice, with names, attributes and contents; the engine stays within its limit."""
    for directory in range(100):
        path = share / f"directory-{directory}"
        path.mkdir()
        for number in range(FILES // 100):
            os.close(os.open(path / f"file-{number}", os.O_CREAT | os.O_WRONLY, 0o640 + number % 8))
    with mounted_here(share, area, frugal.address) as shared:
        for words in (("-printf", "%P %m %n %s %T@ %y\n"), ("-printf", "%P %i\n")):
            here, there = (sorted(program("find", p, *words).splitlines()) for p in (shared.here, shared.there))
            assert len(there) == FILES + 101 and here == there
            assert frugal.descriptors() <= 1024
        program("rm", "-r", *shared.here.iterdir())
        assert os.listdir(shared.there) == []


# ----------------------------------------------------------------------------------------------- one large directory


def getdents(fd: int, size: int) -> list[tuple[int, bytes]]:
    """Inode numbers and names that one getdents64(2) with a buffer of that size returns; empty at the end."""
    buffer = ctypes.create_string_buffer(size)
    length = _libc.getdents64(fd, buffer, ctypes.c_size_t(size))
    if length < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    found, at = [], 0
    while at < length:
        inode, _, record, _ = struct.unpack_from("<QqHB", buffer, at)
        found.append((inode, buffer.raw[at + 19 : at + record].split(b"\0", 1)[0]))
        at += record
    return found


def names(directory: Path, size: int) -> Iterator[list[bytes]]:
    """The names in a directory, as they come."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        while batch := getdents(fd, size):
            yield [name for _, name in batch if name not in (b".", b"..")]
    finally:
        os.close(fd)


@pytest.fixture
def crowd(share: Path) -> set[bytes]:
    """The names of 100,000 files in a directory of the server."""
    (share / "crowd").mkdir()
    found = {b"%d-%s" % (number, b"x" * (number % 40)) for number in range(ENTRIES)}
    directory = os.open(share / "crowd", os.O_RDONLY)
    for name in found:
        os.close(os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=directory))
    os.close(directory)
    return found


@pytest.mark.slow
def test_a_hundred_thousand_entries(crowd: set[bytes], shared: Shared, again: Shared) -> None:
    """Every name once, at any size of buffer; so too while others are removed, here and elsewhere; rm -rf finds all."""
    here = shared.here / "crowd"
    for size in (512, 4096, 32768, 1 << 20):
        listed = [name for batch in names(here, size) for name in batch]
        assert len(listed) == len(crowd) and set(listed) == crowd
    left = crowd - _removing(here, sorted(crowd), [p / "crowd" for p in (shared.here, again.here, shared.there)])
    assert set(os.listdir(os.fsencode(again.here / "crowd"))) == left
    program("rm", "-rf", here)
    assert os.listdir(shared.there) == []


def _removing(here: Path, crowd: list[bytes], places: list[Path]) -> set[bytes]:
    """List with one descriptor while names are removed, both such as came already and such as did not."""
    ahead = iter(crowd[::20])
    removed: set[bytes] = set()
    seen: Counter[bytes] = Counter()
    for number, batch in enumerate(names(here, 8192)):
        seen.update(batch)
        for name in {*batch[::9], next(ahead, b""), next(ahead, b"")} - removed - {b""}:
            os.unlink(os.path.join(os.fsencode(places[number % len(places)]), name))
            removed.add(name)
    assert max(seen.values()) == 1, "names came twice"
    assert set(crowd) - removed <= set(seen) <= set(crowd)
    return removed
