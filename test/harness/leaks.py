"""What a test may leave behind: nothing. Processes are told by a variable in their environment, daemons included."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
from harness.waiting import wait_until

_CLONE_NEWNS, _MS_REC, _MS_PRIVATE = 0x20000, 0x4000, 0x40000
VARIABLE = "QTFS_TEST_RUN"
#: This test run; every process started by the harness inherits it.
RUN = uuid.uuid4().hex
#: The same for xdist's workers and whoever started them.
SESSION_VARIABLE = "QTFS_TEST_SESSION"


def environment(**more: str) -> dict[str, str]:
    """The environment of what the harness starts."""
    return {**os.environ, VARIABLE: RUN, "PYTHONUNBUFFERED": "1", **more}


def our_processes(variable: str = VARIABLE, value: str = RUN) -> list[psutil.Process]:
    """Processes of this test run, other than pytest itself; or those that have a variable in their environment."""
    wanted = f"{variable}={value}".encode()
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            if wanted in Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0"):
                found.append(process)
    return found


def end_processes(processes: list[psutil.Process]) -> None:
    """SIGKILL, by pid, and wait until they are gone."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=10)


def mounts_below(path: str) -> list[str]:
    """Mount points at or below a path, innermost first."""
    points = [line.split(b" ")[4] for line in Path("/proc/self/mountinfo").read_bytes().splitlines()]
    plain = [os.fsdecode(point.decode("unicode_escape").encode("latin-1")) for point in points]
    return sorted((p for p in plain if p == path or p.startswith(path.rstrip("/") + "/")), key=len, reverse=True)


def unmount_below(path: str) -> None:
    """Lazily unmount whatever is mounted there; it never waits for a daemon."""
    for point in mounts_below(path):
        subprocess.run(["umount", "-l", point], check=False, capture_output=True)


def descriptors(pid: int | str = "self") -> dict[int, str]:
    """The open descriptors of a process and what they are."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[int(name)] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def descriptor_count(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def thread_count(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))


def resources() -> tuple[dict[int, str], set[threading.Thread]]:
    """What this process has open, and its threads."""
    return descriptors(), set(threading.enumerate())


def left_open(before: tuple[dict[int, str], set[threading.Thread]]) -> list[str]:
    """What has come since and is still there: sockets, pipes, event descriptors, devices, directories; threads.

    Not the memory of multiprocessing, which keeps it for its next use.
    """
    kinds = ("socket:", "pipe:", "anon_inode:", "/dev/fuse", "/dev/shm", "/proc", "/sys")
    known = set(before[0].values())
    names = [name for name in descriptors().values() if name not in known and not name.startswith("/dev/shm/pym-")]
    found = [f"descriptor {name}" for name in names if name.startswith(kinds)]
    return found + [f"thread {thread.name}" for thread in set(threading.enumerate()) - before[1] if thread.is_alive()]


def alone_with_mounts() -> None:
    """From now on this process has a mount namespace of its own: unshare(2). Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNS) != 0 or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0:
        raise OSError(ctypes.get_errno(), "no mount namespace")


@contextlib.contextmanager
def nothing_left(area: str) -> Iterator[None]:
    """Fail if mounts below `area`, processes of this run, or descriptors of ours outlive the body; then remove them."""
    before = set(descriptors().values())
    yield
    mounts = mounts_below(area)
    unmount_below(area)
    try:
        wait_until(lambda: not our_processes(), "all processes of this run to end", 5)
        processes = []
    except AssertionError:
        processes = our_processes()
    names = [f"{p.pid}: {' '.join(p.cmdline())}" for p in processes if p.is_running()]
    end_processes(processes)
    ours = [d for d in descriptors().values() if d not in before and d.startswith(("socket:", area))]
    left = [*(f"mount {m}" for m in mounts), *(f"process {n}" for n in names), *(f"descriptor {d}" for d in ours)]
    assert not left, "the tests left behind:\n" + "\n".join(left)
