"""What is timed: one function for each operation, which repeats it `count` times in a place and gives one figure."""

from __future__ import annotations

import errno
import fcntl
import os
import random
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

MIB = 1 << 20
PAGE = 4096
DATA_BYTES = 64 * MIB
MANY = 1000
_PARALLEL = 4


@dataclass(frozen=True)
class Place:
    """A directory to work in, and the same one as its server sees it; the server's /proc, if it can be read."""

    top: str
    backing: str
    proc: str | None

    def path(self, name: str) -> str:
        return f"{self.top}/{name}"

    def forget_pages(self, fd: int) -> None:
        """Drop what this side has cached of a file. Not in a bare directory: that would measure the disk."""
        if self.top != self.backing:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


Measure = Callable[[Place, int], float | None]


@dataclass(frozen=True)
class Operation:
    """`unit` says what `measure` returns: µs per operation (less is better), or something per second.

    None: the place cannot do it. `has_target`: it is judged beside sshfs.
    """

    name: str
    unit: str
    measure: Measure
    count: int
    has_target: bool = True

    @property
    def is_latency(self) -> bool:
        return self.unit == "µs"


def prepare(place: Place) -> None:
    """The files that the operations use, written on the server's side."""
    block = os.urandom(MIB)
    with open(f"{place.backing}/data", "wb") as file:
        for _ in range(DATA_BYTES // MIB):
            file.write(block)
    with open(f"{place.backing}/small", "wb") as file:
        file.write(block[:PAGE])
    os.mkdir(f"{place.backing}/many")
    for number in range(MANY):
        os.close(os.open(f"{place.backing}/many/file{number}", os.O_CREAT | os.O_WRONLY, 0o644))


# ----------------------------------------------------------------------------------------------------------- latencies


def _each_us(once: Callable[[], object], count: int) -> float:
    begin = time.perf_counter_ns()
    for _ in range(count):
        once()
    return (time.perf_counter_ns() - begin) / count / 1e3


def _stat(place: Place, count: int) -> float:
    name = place.path("small")
    return _each_us(lambda: os.stat(name), count)


def _open_close(place: Place, count: int) -> float:
    name = place.path("small")
    return _each_us(lambda: os.close(os.open(name, os.O_RDONLY)), count)


def _open_read_close(place: Place, count: int) -> float:
    name = place.path("small")

    def once() -> None:
        fd = os.open(name, os.O_RDONLY)
        os.read(fd, PAGE)
        os.close(fd)

    return _each_us(once, count)


def _create_write_unlink(place: Place, count: int) -> float:
    name, page = place.path("created"), bytes(PAGE)

    def once() -> None:
        fd = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        os.write(fd, page)
        os.close(fd)
        os.unlink(name)

    return _each_us(once, count)


def _mkdir_rmdir(place: Place, count: int) -> float:
    name = place.path("directory")

    def once() -> None:
        os.mkdir(name)
        os.rmdir(name)

    return _each_us(once, count)


def _list_and_stat(place: Place, count: int) -> float:
    """As `ls -l` does; µs for the whole directory."""
    name = place.path("many")

    def once() -> None:
        with os.scandir(name) as entries:
            found = sum(1 for entry in entries if entry.stat(follow_symlinks=False))
        assert found == MANY

    return _each_us(once, count)


def _random_read(place: Place, count: int) -> float:
    fd = os.open(place.path("data"), os.O_RDONLY)
    try:
        place.forget_pages(fd)
        chance = random.Random(count)
        offsets = iter([chance.randrange(DATA_BYTES // PAGE) * PAGE for _ in range(count)])
        return _each_us(lambda: os.pread(fd, PAGE, next(offsets)), count)
    finally:
        os.close(fd)


def _write(place: Place, count: int) -> float:
    """Into a file of 1 MiB, without fsync."""
    fd = os.open(place.path("written"), os.O_CREAT | os.O_RDWR, 0o644)
    try:
        chance, page = random.Random(count), os.urandom(PAGE)
        offsets = iter([chance.randrange(MIB // PAGE) * PAGE for _ in range(count)])
        return _each_us(lambda: os.pwrite(fd, page, next(offsets)), count)
    finally:
        os.close(fd)


# ------------------------------------------------------------------------------------- what only some can do, latencies


def _walk_proc(place: Place, count: int) -> float | None:
    """As ps(1) does, of all processes of the server: µs per process."""
    if place.proc is None:
        return None
    begin, processes = time.perf_counter_ns(), 0
    for _ in range(count):
        for name in os.listdir(place.proc):
            if name.isdecimal():
                processes += _look_at_process(f"{place.proc}/{name}")
    return (time.perf_counter_ns() - begin) / processes / 1e3


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


def _lock_hand_over(place: Place, count: int) -> float | None:
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

    child = _in_child(other)
    os.close(tell)
    assert os.read(ready, 1), "the other process failed"
    begin = time.perf_counter_ns()
    _pass_on(fd, 0, count)
    elapsed = time.perf_counter_ns() - begin
    os.close(fd)
    os.close(ready)
    assert os.waitpid(child, 0)[1] == 0, "the other process failed"
    return elapsed / count / 1e3


def _pass_on(fd: int, held: int, count: int) -> None:
    for _ in range(count):
        fcntl.lockf(fd, fcntl.LOCK_EX, 1, (held + 1) % 3)
        fcntl.lockf(fd, fcntl.LOCK_UN, 1, held)
        held = (held + 1) % 3


def _locks_reach_the_server(place: Place) -> bool:
    """Whether a process of the server is refused what is locked here."""
    with open(place.path("small"), "r+b") as here, open(f"{place.backing}/small", "r+b") as there:
        fcntl.lockf(here, fcntl.LOCK_EX | fcntl.LOCK_NB)
        status = os.waitpid(_in_child(lambda: fcntl.lockf(there, fcntl.LOCK_EX | fcntl.LOCK_NB), quiet=True), 0)[1]
    return status != 0


def _fifo_ping_pong(place: Place, count: int) -> float | None:
    """A byte to a process of the server and another back."""
    for name in ("ping", "pong"):
        os.mkfifo(f"{place.backing}/{name}")
    try:
        return _ping_pong(place, count)
    finally:
        for name in ("ping", "pong"):
            os.unlink(f"{place.backing}/{name}")


def _ping_pong(place: Place, count: int) -> float | None:
    coming = os.open(place.path("pong"), os.O_RDONLY | os.O_NONBLOCK)
    try:
        back = os.open(f"{place.backing}/pong", os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        os.close(coming)
        assert error.errno == errno.ENXIO, error
        return None  # here it is another FIFO than on the server
    os.set_blocking(back, True)

    def other() -> None:
        arriving = os.open(f"{place.backing}/ping", os.O_RDONLY)
        while os.read(arriving, 1):
            os.write(back, b"x")

    child = _in_child(other)
    os.close(back)
    going = os.open(place.path("ping"), os.O_WRONLY)
    ours = os.open(place.path("pong"), os.O_RDONLY)
    os.close(coming)

    def once() -> None:
        os.write(going, b"x")
        assert os.read(ours, 1), "the other process failed"

    elapsed = _each_us(once, count)
    os.close(going)
    os.close(ours)
    assert os.waitpid(child, 0)[1] == 0, "the other process failed"
    return elapsed


# --------------------------------------------------------------------------------------------------------- throughputs


def _sequential_read(place: Place, count: int) -> float:
    """`count` MiB from the beginning of a file, 1 MiB at a time, in MB/s."""
    buffer = bytearray(MIB)
    fd = os.open(place.path("data"), os.O_RDONLY)
    try:
        place.forget_pages(fd)
        begin = time.perf_counter()
        left = count * MIB
        while left > 0 and (got := os.readv(fd, [buffer])):
            left -= got
        return count * MIB / (time.perf_counter() - begin) / 1e6
    finally:
        os.close(fd)


def _sequential_write(place: Place, count: int) -> float:
    """`count` MiB into a new file, 1 MiB at a time, in MB/s. The close counts: whatever was held back has to go."""
    block, name = os.urandom(MIB), place.path("stream")
    begin = time.perf_counter()
    fd = os.open(name, os.O_CREAT | os.O_TRUNC | os.O_WRONLY, 0o644)
    for _ in range(count):
        os.write(fd, block)
    os.close(fd)
    elapsed = time.perf_counter() - begin
    os.unlink(name)
    return count * MIB / elapsed / 1e6


def _parallel_open_close(place: Place, count: int) -> float:
    """Operations per second of all of some processes together."""
    begin = time.perf_counter()
    children = [_in_child(lambda: _open_close(place, count)) for _ in range(_PARALLEL)]
    statuses = [os.waitpid(child, 0)[1] for child in children]
    assert not any(statuses), "a parallel process failed"
    return _PARALLEL * count / (time.perf_counter() - begin)


def _in_child(work: Callable[[], object], *, quiet: bool = False) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except OSError:
            if not quiet:
                traceback.print_exc()
        finally:
            os._exit(status)
    return child


OPERATIONS = (
    Operation("stat", "µs", _stat, 1000),
    Operation("open + close", "µs", _open_close, 500),
    Operation("open + read 4 KiB + close", "µs", _open_read_close, 500),
    Operation("create + write 4 KiB + unlink", "µs", _create_write_unlink, 200),
    Operation("mkdir + rmdir", "µs", _mkdir_rmdir, 200),
    Operation(f"list and stat {MANY} files", "µs", _list_and_stat, 2),
    Operation("random read 4 KiB", "µs", _random_read, 1000),
    Operation("write 4 KiB", "µs", _write, 500),
    Operation("walk of /proc, per process", "µs", _walk_proc, 4, has_target=False),
    Operation("FIFO round trip", "µs", _fifo_ping_pong, 500, has_target=False),
    Operation("lock hand-over", "µs", _lock_hand_over, 500, has_target=False),
    Operation("sequential read", "MB/s", _sequential_read, DATA_BYTES // MIB),
    Operation("sequential write", "MB/s", _sequential_write, DATA_BYTES // MIB),
    Operation(f"open + close, {_PARALLEL} processes", "1/s", _parallel_open_close, 500),
)
