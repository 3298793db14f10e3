"""Where operations are timed, and what timing one gives: seconds, and processor time of the daemons on both sides."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

MIB = 1 << 20
PAGE = 4096


@dataclass(frozen=True)
class Sample:
    """`amount` operations, or MiB, in so many seconds; processor seconds that both sides spent meanwhile."""

    seconds: float
    amount: float
    client_cpu_s: float
    server_cpu_s: float


@dataclass(frozen=True)
class Place:
    """A directory to work in, and the same one as its server sees it; the server's /proc, if it can be read.

    `clients` and `servers` are the processes behind it, `material` is where materials.py left what programs need.
    `keeps`: it is a file system that has again what was written, not nothing.c.
    """

    top: str
    backing: str
    proc: str | None
    material: str
    clients: tuple[int, ...] = ()
    servers: tuple[int, ...] = ()
    keeps: bool = True

    def path(self, name: str) -> str:
        return f"{self.top}/{name}"

    @property
    def is_bare(self) -> bool:
        return self.top == self.backing

    @property
    def is_served(self) -> bool:
        """False once a process behind it has ended."""
        return all(_runs(pid) for pid in self.clients + self.servers)

    def end_clients(self) -> None:
        """Whoever waits for this mount then gets an error."""
        for pid in self.clients:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def forget_pages(self, fd: int) -> None:
        """Drop what this side has cached of a file. Not in a bare directory: that would measure the disk."""
        if not self.is_bare:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)

    def timed(self, amount: float, work: Callable[[], object]) -> Sample:
        """`work` does `amount` operations."""
        clients, servers = _cpu_s(self.clients), _cpu_s(self.servers)
        begin = time.perf_counter()
        work()
        seconds = time.perf_counter() - begin
        return Sample(seconds, amount, _cpu_s(self.clients) - clients, _cpu_s(self.servers) - servers)

    def each(self, count: int, once: Callable[[], object]) -> Sample:
        """The same operation `count` times."""

        def repeat() -> None:
            for _ in range(count):
                once()

        return self.timed(count, repeat)


def _cpu_s(processes: tuple[int, ...]) -> float:
    """Processor time of all threads, ended ones too, to the nanosecond: /proc/PID/stat counts in 10 ms."""
    return sum(time.clock_gettime(_process_clock(pid)) for pid in processes)


def _runs(pid: int) -> bool:
    """proc_pid_stat(5): the state comes behind the name, and a zombie's is Z."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(") ")[2][0] not in "ZX"
    except FileNotFoundError:
        return False


def _process_clock(pid: int) -> int:
    """What clock_getcpuclockid(3), which Python lacks, gives: CPUCLOCK_SCHED of linux/posix-timers_types.h."""
    return (~pid << 3) | 2
