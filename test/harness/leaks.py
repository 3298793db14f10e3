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
from dataclasses import dataclass
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


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def _is_ours(pid: int) -> bool:
    """Whether a process was started by this test run, its daemons included, or is a living child of this process."""
    with contextlib.suppress(OSError):
        if f"{VARIABLE}={RUN}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return True
        state, parent = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:2]
        return int(parent) == os.getpid() and state != "Z"
    return False


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def loop_devices_below(area: str) -> list[str]:
    """Those whose file lies there, or lay there."""
    found = []
    for path in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            if path.read_text().startswith(area.rstrip("/") + "/"):
                found.append(path.parts[3])
    return found


@dataclass(frozen=True)
class Resources:
    """What this test run has at a moment; of mounts and loop devices, what is below a directory."""

    area: str
    descriptors: frozenset[str]
    threads: frozenset[threading.Thread]
    pids: frozenset[int]
    mounts: frozenset[str]
    loops: frozenset[str]


def resources(area: str) -> Resources:
    return Resources(
        area,
        frozenset(descriptors().values()),
        frozenset(threading.enumerate()),
        frozenset(_pids()),
        frozenset(mounts_below(area)),
        frozenset(loop_devices_below(area)),
    )


def left_since(before: Resources) -> list[str]:
    """What has come since and is still there.

    Of descriptors sockets, pipes, event descriptors, devices, and directories; threads; processes, daemons included;
    mounts and loop devices. Not the memory of multiprocessing, which keeps it for its next use.
    """
    kinds = ("socket:", "pipe:", "anon_inode:", "/dev/fuse", "/dev/shm", "/proc", "/sys")
    names = [name for name in descriptors().values() if name not in before.descriptors and name.startswith(kinds)]
    threads = [thread for thread in set(threading.enumerate()) - before.threads if thread.is_alive()]
    return [
        *(f"descriptor {name}" for name in names if not name.startswith("/dev/shm/pym-")),
        *(f"thread {thread.name}" for thread in threads),
        *(f"process {pid}: {_command(pid)}" for pid in sorted(_pids() - before.pids) if _is_ours(pid)),
        *(f"mount {path}" for path in mounts_below(before.area) if path not in before.mounts),
        *(f"loop device {name}" for name in loop_devices_below(before.area) if name not in before.loops),
    ]


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
