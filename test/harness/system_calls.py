"""Counting the system calls of running threads, by the kernel's tracepoints: nobody is slowed down, as by strace.

    with counted(threads_of(pid), ["poll", "futex"], tmp_path) as calls:
        before = calls()
        ...
        assert calls() == before

Sources: perf_event_open(2), Documentation/trace/events.rst.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

_SYS_PERF_EVENT_OPEN = 298 if os.uname().machine == "x86_64" else 241
_TRACEPOINT = 2
_ATTR_BYTES = 64
_FLAG_FD_CLOEXEC = 8
_libc = ctypes.CDLL(None, use_errno=True)


class CannotCount(Exception):
    """This kernel has no such tracepoints, or does not let us use them."""


def threads_of(*pids: int) -> list[int]:
    return [int(name) for pid in pids for name in os.listdir(f"/proc/{pid}/task")]


def _open(thread: int, event: int) -> int:
    attr = ctypes.create_string_buffer(struct.pack("<IIQ", _TRACEPOINT, _ATTR_BYTES, event), _ATTR_BYTES)
    fd = _libc.syscall(_SYS_PERF_EVENT_OPEN, attr, thread, -1, -1, _FLAG_FD_CLOEXEC)
    if fd < 0:
        raise CannotCount(f"perf_event_open: {os.strerror(ctypes.get_errno())}")
    return int(fd)


@contextlib.contextmanager
def _tracefs(area: Path) -> Iterator[Path]:
    point = area / "tracefs"
    point.mkdir()
    done = subprocess.run(["mount", "-t", "tracefs", "none", point], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise CannotCount(done.stderr)
    try:
        yield point
    finally:
        subprocess.run(["umount", point], check=True)


@contextlib.contextmanager
def counted(threads: Iterable[int], names: Iterable[str], area: Path) -> Iterator[Callable[[], int]]:
    """How many of these calls the threads have made up to now. Names that this machine lacks do not count."""
    with _tracefs(area) as tracefs:
        paths = [tracefs / f"events/syscalls/sys_enter_{name}/id" for name in names]
        events = [int(path.read_text()) for path in paths if path.exists()]
    if not events:
        raise CannotCount("the kernel has no tracepoints for system calls")
    with contextlib.ExitStack() as stack:
        fds = []
        for thread in threads:
            for event in events:
                fds.append(_open(thread, event))
                stack.callback(os.close, fds[-1])
        yield lambda: sum(int.from_bytes(os.read(fd, 8), "little") for fd in fds)
