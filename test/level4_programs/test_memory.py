"""Shared memory on a mount: between processes, with read and write, and as the server and another client see it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator

import pytest
from programs import Shared, all_at_once, over

PAGES = 64
SIZE = PAGES * mmap.PAGESIZE


@pytest.fixture
def fd(shared: Shared) -> Iterator[int]:
    """A file of zeros, open on the mount."""
    (shared.there / "memory").write_bytes(bytes(SIZE))
    fd = os.open(shared.here / "memory", os.O_RDWR)
    yield fd
    os.close(fd)


@over("unix-auto", "unix-none", "tcp-auto")
def test_two_processes_talk_through_shared_memory(shared: Shared, fd: int) -> None:
    rounds = 500
    all_at_once(*(("ping", shared.here / "memory", mine, rounds) for mine in range(2)))
    assert os.pread(fd, 8, 4000) == (2 * rounds).to_bytes(8, "little")
    assert (shared.there / "memory").read_bytes()[4000:4008] == (2 * rounds).to_bytes(8, "little")


@over("unix-auto", "unix-none")
def test_a_mapping_and_write_see_each_other(shared: Shared, fd: int) -> None:
    with mmap.mmap(fd, SIZE) as memory:
        for page in range(0, PAGES - 1, 3):
            place = page * mmap.PAGESIZE + 4090
            os.pwrite(fd, b"by write(2)%d" % page, place)
            assert memory[place : place + 11] == b"by write(2)"
            memory[place + 100 : place + 110] = b"by mapping"
            assert os.pread(fd, 10, place + 100) == b"by mapping"
        memory.flush()
        assert (shared.there / "memory").read_bytes() == memory[:]


@over("unix-auto", "unix-none", "tcp-auto")
def test_what_was_mapped_arrives(shared: Shared, again: Shared, fd: int) -> None:
    """By msync(2), and by unmapping and closing, the server and another client that opens the file then see it."""
    memory = mmap.mmap(fd, SIZE)
    memory[5000:5004] = b"sync"
    memory.flush()
    assert (shared.there / "memory").read_bytes()[5000:5004] == b"sync"
    memory[SIZE - 5 :] = b"close"
    memory.close()
    os.close(os.dup(fd))
    assert (shared.there / "memory").read_bytes()[-5:] == b"close"
    assert (again.here / "memory").read_bytes()[-5:] == b"close"


def test_a_private_mapping_changes_nothing(shared: Shared, fd: int) -> None:
    with mmap.mmap(fd, SIZE, mmap.MAP_PRIVATE) as memory:
        memory[:5] = b"other"
        assert os.pread(fd, 5, 0) == bytes(5) and memory[:5] == b"other"
    assert (shared.there / "memory").read_bytes() == bytes(SIZE)
