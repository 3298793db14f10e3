"""What a test may leave behind: nothing. Processes are told by a variable in their environment, daemons included."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
from harness.waiting import wait_until

VARIABLE = "QTFS_TEST_RUN"
#: This test run; every process started by the harness inherits it.
RUN = uuid.uuid4().hex


def environment(**more: str) -> dict[str, str]:
    """The environment of what the harness starts."""
    return {**os.environ, VARIABLE: RUN, "PYTHONUNBUFFERED": "1", **more}


def our_processes() -> list[psutil.Process]:
    """Processes of this test run, other than pytest itself."""
    wanted = f"{VARIABLE}={RUN}".encode()
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
    points = [line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    plain = [point.encode().decode("unicode_escape").encode("latin-1").decode() for point in points]
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
