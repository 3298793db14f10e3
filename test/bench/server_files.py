"""What only some file systems can do: the server's /proc, its FIFOs and its locks. The others give None."""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import os

from children import ended_well, expect_all, in_child
from places import Place, Sample


def walk_proc(place: Place, count: int) -> Sample | None:
    """As ps(1) does, of all processes of the server; each process is one operation."""
    proc = place.proc
    if proc is None:
        return None
    processes = 0

    def walk() -> None:
        nonlocal processes
        for _ in range(count):
            for name in filter(str.isdecimal, os.listdir(proc)):
                processes += _look_at_process(f"{proc}/{name}")

    return dataclasses.replace(place.timed(count, walk), amount=processes)


def _look_at_process(directory: str) -> bool:
    """False if it has ended meanwhile."""
    try:
        os.stat(directory)
        for name in ("stat", "status", "cmdline"):
            with open(f"{directory}/{name}", "rb", buffering=0) as file:
                data = file.read()
            assert data or name == "cmdline", f"{directory}/{name} is empty"
    except (FileNotFoundError, ProcessLookupError):
        return False
    return True


# --------------------------------------------------------------------------------------------------------------- locks


def lock_hand_over(place: Place, count: int) -> Sample | None:
    """Two processes pass a lock to each other: each waits for the next of three bytes and then unlocks its own."""
    name = place.path("small")
    if not _locks_reach_the_server(place):
        return None
    fd = os.open(name, os.O_RDWR)
    ready, tell = os.pipe()
    fcntl.lockf(fd, fcntl.LOCK_EX, 1, 0)

    def other() -> None:
        theirs = os.open(name, os.O_RDWR)
        fcntl.lockf(theirs, fcntl.LOCK_EX, 1, 1)
        os.write(tell, b"x")
        _pass_on(theirs, 1, count)

    child = in_child(other)
    os.close(tell)
    try:
        if not os.read(ready, 1):
            raise ChildProcessError("the other process did not get its lock")
        return place.timed(count, lambda: _pass_on(fd, 0, count))
    finally:
        os.close(fd)
        os.close(ready)
        expect_all([child])


def _pass_on(fd: int, held: int, count: int) -> None:
    for _ in range(count):
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, (held + 1) % 3)
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, held)
        held = (held + 1) % 3


def _locks_reach_the_server(place: Place) -> bool:
    """Whether a process of the server is refused what is locked here."""
    with open(place.path("small"), "r+b") as here, open(f"{place.backing}/small", "r+b") as there:
        try:
            fcntl.lockf(here, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
                return False
            raise
        return not ended_well(in_child(lambda: fcntl.lockf(there, fcntl.LOCK_EX | fcntl.LOCK_NB), quiet=True))


# --------------------------------------------------------------------------------------------------------------- FIFOs


def fifo_round_trip(place: Place, count: int) -> Sample | None:
    """A byte to a process of the server and another back."""
    for name in ("ping", "pong"):
        os.mkfifo(f"{place.backing}/{name}")
    try:
        return _ping_pong(place, count)
    finally:
        for name in ("ping", "pong"):
            os.unlink(f"{place.backing}/{name}")


def _ping_pong(place: Place, count: int) -> Sample | None:
    try:
        coming = os.open(place.path("pong"), os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.EOPNOTSUPP:
            return None
        raise
    try:
        back = os.open(f"{place.backing}/pong", os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        os.close(coming)
        if error.errno == errno.ENXIO:
            return None  # here it is another FIFO than on the server
        raise
    os.set_blocking(back, True)

    def other() -> None:
        arriving = os.open(f"{place.backing}/ping", os.O_RDONLY)
        while os.read(arriving, 1):
            os.write(back, b"x")

    child = in_child(other)
    os.close(back)
    going = os.open(place.path("ping"), os.O_WRONLY)
    ours = os.open(place.path("pong"), os.O_RDONLY)
    os.close(coming)

    def once() -> None:
        os.write(going, b"x")
        if not os.read(ours, 1):
            raise ChildProcessError("the other process ended")

    try:
        return place.each(count, once)
    finally:
        os.close(going)
        os.close(ours)
        expect_all([child])
